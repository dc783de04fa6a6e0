//! Wire layouts: one file each behind one trait, and a registry by name.
//!
//! A layout turns the values of a matrix into bytes and back. Most leave scales to the container; the block types of ggml carry
//! them inside ([`Layout::stores_scales`]). Layouts are little-endian and the same on every machine; docs/formats.md draws them.

use crate::{Error, MatrixSpec, Result};
use std::fmt::Debug;

/// Size of the packed bytes, as far as it is known before packing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedLen {
    /// Exactly this many bytes.
    Exact(usize),
    /// No more than this many bytes, depending on the values.
    AtMost(usize),
}

impl PackedLen {
    /// The largest size it can have.
    pub const fn bound(self) -> usize {
        match self {
            Self::Exact(n) | Self::AtMost(n) => n,
        }
    }
}

/// What [`Layout::unpack`] finds in the bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Unpacked {
    /// Values, `[planes · N, K]` row-major.
    pub values: Vec<i8>,
    /// The scales, if the layout carries them, in the order and number of [`MatrixSpec::scales_len`].
    pub scales: Option<Vec<f32>>,
}

/// One wire layout.
pub trait Layout: Send + Sync + Debug {
    /// The name in files and on the command line.
    fn name(&self) -> &'static str;

    /// One line for people: block size, bits per weight, whose layout it is.
    fn summary(&self) -> &'static str;

    /// Whether the bytes hold the scales too.
    fn stores_scales(&self) -> bool {
        false
    }

    /// Whether such a matrix fits: its alphabet, its number of columns, its granularity.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the constraint and the offending number.
    fn check(&self, spec: &MatrixSpec) -> Result<()>;

    /// Size of the packed bytes of such a matrix.
    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen;

    /// If `Some(r)`: the stacked rows may be cut after each multiple of `r` rows, and the packed strips, one after another, are the packed
    /// matrix. `None`: the matrix packs only as a whole.
    fn chunk_rows(&self, spec: &MatrixSpec) -> Option<usize>;

    /// Appends the packed bytes of `values` (`[planes · N, K]`) to `out`. `scales` is read only where [`Layout::stores_scales`].
    ///
    /// # Errors
    /// What [`Layout::check`] finds; [`Error::Length`] for a slice that does not fit `spec`; [`Error::Value`] for a value outside the
    /// alphabet. `out` is then as it was.
    fn pack_into(&self, spec: &MatrixSpec, values: &[i8], scales: &[f32], out: &mut Vec<u8>) -> Result<()>;

    /// The values in `bytes`, which must be exactly one packed matrix.
    ///
    /// # Errors
    /// What [`Layout::check`] finds; [`Error::Length`] if the number of bytes is wrong; [`Error::Corrupt`] for a pattern that no writer
    /// produces. Never panics and never allocates more than `spec` asks for.
    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked>;
}

/// Every layout there is, our own first.
pub fn layouts() -> &'static [&'static dyn Layout] {
    &[]
}

/// The layout of that name.
///
/// # Errors
/// [`Error::UnknownName`] that lists the names there are.
pub fn by_name(name: &str) -> Result<&'static dyn Layout> {
    layouts().iter().copied().find(|l| l.name() == name).ok_or_else(|| Error::UnknownName {
        what: "layout",
        got: name.into(),
        expected: layouts().iter().map(|l| l.name()).collect::<Vec<_>>().join(", "),
    })
}
