//! Wire layouts: one file each behind one trait, and a registry by name.
//!
//! A layout turns the values of a matrix into bytes and back. Most layouts leave the scales to the
//! container; the block types of ggml hold them inside ([`Layout::stores_scales`]). Layouts are
//! little-endian and the same on every machine; docs/formats.md describes each of them.

mod auto;
mod base3;
mod bits;
mod checks;
mod entropy;
mod framed;
mod ggml;
mod hf_bitnet;
mod hybrid;
mod i2_s;
mod int8;
mod q_blocks;
mod quads;
mod run_length;
mod sparse;
mod tq_blocks;

pub use auto::{auto, bits_per_weight};

use crate::{Error, Granularity, MatrixSpec, Precision, Result};
use checks::*;
use std::fmt::Debug;

/// Size of the packed bytes, before packing.
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

/// The result of [`Layout::unpack`].
#[derive(Debug, Clone, PartialEq)]
pub struct Unpacked {
    /// Values, `[planes · N, K]` row-major.
    pub values: Vec<i8>,
    /// The scales, if the layout holds them, in the order and number of
    /// [`MatrixSpec::scales_len`].
    pub scales: Option<Vec<f32>>,
}

/// Who defines a layout, and so which files can hold it. Our safetensors files hold every layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayoutOrigin {
    /// Ours, without scales inside. `auto` picks among these.
    Own,
    /// The packed weights of Hugging Face's `bitnet` folders.
    HfBitnet,
    /// The tensor type of ggml with this number: GGUF files hold it.
    Ggml(u32),
    /// An older form of the ggml type with this number, with larger blocks. GGUF files hold it;
    /// the offsets of their tensors alone tell the two forms apart.
    GgmlOlder(u32),
    /// A variant of a ggml type with another order of bytes. GGUF has no number for it: it is read
    /// when the user names it, and never written.
    GgmlVariant(u32),
}

/// The arrangement of the codes of a layout that `bitnet-kernels` has a loop for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FastPath {
    /// Rows of two-bit codes, four a byte, the first in the low bits.
    TwoBit,
    /// Rows of trits, five a byte.
    BaseThree,
    /// Four two-bit codes a byte, a quarter of the rows apart, the first in the low bits.
    QuarterRows,
    /// Four two-bit codes a byte from each group of 128 or 64 values of a row, a quarter of the
    /// group apart, the first in the high bits; then the scale as f32 and padding.
    GroupQuarters(usize),
    /// Four two-bit codes a byte, of four rows at the same column, the first in the high bits; then
    /// the scale as f32 and padding.
    FourRows,
    /// Blocks of ggml's TQ1_0.
    Tq1,
    /// Blocks of ggml's TQ2_0.
    Tq2,
}

/// Whether some whole blocks hold values that only a wider precision has: [`Layout::wider`].
pub type FindsWider = fn(&[u8]) -> bool;

/// One wire layout.
pub trait Layout: Send + Sync + Debug {
    /// The name in files and on the command line.
    fn name(&self) -> &'static str;

    /// A short description: block size, bits per weight, who defines it.
    fn summary(&self) -> &'static str;

    /// Whether the bytes hold the scales too.
    fn stores_scales(&self) -> bool {
        false
    }

    /// Who defines the layout.
    fn origin(&self) -> LayoutOrigin {
        LayoutOrigin::Own
    }

    /// The precisions for which it is picked when the user names no layout. Of several layouts of
    /// one origin the first of [`layouts`] that takes the matrix is picked.
    fn default_for(&self) -> &'static [Precision] {
        &[]
    }

    /// The granularities to try when the user names none, the finest first: where the layout
    /// stores a scale for each block anyway, a finer one costs nothing.
    fn default_granularities(&self) -> &'static [Granularity] {
        if self.stores_scales() {
            &[
                Granularity::Group(32),
                Granularity::Group(64),
                Granularity::Group(128),
                Granularity::Group(256),
                Granularity::Channel,
                Granularity::Tensor,
            ]
        } else {
            &[Granularity::Channel]
        }
    }

    /// The spec of a tensor of this layout in a file of another program, which says nothing but the
    /// layout and the shape. `None` where such a tensor is read as floats.
    fn foreign_spec(&self, _rows: usize, _cols: usize) -> Option<MatrixSpec> {
        None
    }

    /// For a layout whose codes other programs use in two alphabets: the wider precision than that
    /// of [`Layout::foreign_spec`], and whether some whole blocks hold values that only it has.
    fn wider(&self) -> Option<(Precision, FindsWider)> {
        None
    }

    /// The loop of `bitnet-kernels` that reads it, if it has one. The results are those of
    /// [`Layout::unpack`].
    fn fast_path(&self) -> Option<FastPath> {
        None
    }

    /// Whether the layout can hold the matrix: its alphabet, number of columns, granularity.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the constraint and the offending number.
    fn check(&self, spec: &MatrixSpec) -> Result<()>;

    /// Size of the packed bytes of a matrix.
    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen;

    /// `Some(r)`: the stacked rows can be cut at multiples of `r` rows, and the packed strips,
    /// concatenated, are the packed matrix. `None`: the matrix can only be packed as a whole.
    fn chunk_rows(&self, spec: &MatrixSpec) -> Option<usize>;

    /// Appends the packed bytes of `values` (`[planes · N, K]`) to `out`. `scales` is read only
    /// where [`Layout::stores_scales`].
    ///
    /// # Errors
    /// The errors of [`Layout::check`]; [`Error::Length`] for a slice that does not fit `spec`;
    /// [`Error::Value`] for a value outside the alphabet. On an error `out` is unchanged.
    fn pack_into(
        &self,
        spec: &MatrixSpec,
        values: &[i8],
        scales: &[f32],
        out: &mut Vec<u8>,
    ) -> Result<()>;

    /// Unpacks `bytes`, which must be exactly one packed matrix.
    ///
    /// # Errors
    /// The errors of [`Layout::check`]; [`Error::Length`] if the number of bytes is wrong;
    /// [`Error::Corrupt`] for a pattern that no writer produces. Never panics and never allocates
    /// more than the matrix of `spec` needs.
    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked>;

    /// The scales in `bytes`, if the layout holds them. Values need not be read.
    ///
    /// # Errors
    /// As [`Layout::unpack`], for the bytes that are read.
    fn scales(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Option<Vec<f32>>> {
        Ok(self.unpack(spec, bytes)?.scales)
    }
}

/// All layouts. Of several that fit equally well the first is taken.
pub fn layouts() -> &'static [&'static dyn Layout] {
    &[
        &bits::ONE_BIT,
        &bits::TWO_BIT,
        &bits::THREE_BIT,
        &bits::FOUR_BIT,
        &int8::Int8,
        &base3::Base3,
        &bits::BYTE_ALIGNED,
        &run_length::LAYOUT,
        &sparse::LAYOUT,
        &hybrid::LAYOUT,
        &entropy::LAYOUT,
        &hf_bitnet::HfBitnet,
        &tq_blocks::TQ1_0,
        &tq_blocks::TQ2_0,
        &q_blocks::Q2_0,
        &q_blocks::Q2_0_G128,
        &q_blocks::PQ2_0,
        &tq_blocks::PTQ1_0,
        &q_blocks::Q1_0,
        &q_blocks::Q8_0,
        &q_blocks::Q4_0,
        &i2_s::GROUPS_OF_128,
        &i2_s::GROUPS_OF_64,
        &i2_s::FOUR_ROWS,
    ]
}

/// The layout with this name.
///
/// # Errors
/// [`Error::UnknownName`], with the known names.
pub fn by_name(name: &str) -> Result<&'static dyn Layout> {
    layouts()
        .iter()
        .copied()
        .find(|l| l.name() == name)
        .ok_or_else(|| Error::UnknownName {
            what: "layout",
            got: name.into(),
            expected: layouts()
                .iter()
                .map(|l| l.name())
                .collect::<Vec<_>>()
                .join(", "),
        })
}

/// The layouts of an origin, in the order of [`layouts`].
pub fn of_origin(origin: LayoutOrigin) -> impl Iterator<Item = &'static dyn Layout> {
    layouts()
        .iter()
        .copied()
        .filter(move |layout| layout.origin() == origin)
}

fn own() -> impl Iterator<Item = &'static dyn Layout> {
    of_origin(LayoutOrigin::Own)
}

/// The plain layout of a precision: ours, with a fixed number of bits for each value.
///
/// ```
/// use bitnet_core::{Precision, pack};
/// assert_eq!(pack::plain(Precision::Ternary).name(), "two-bit");
/// ```
pub fn plain(precision: Precision) -> &'static dyn Layout {
    own()
        .find(|layout| layout.default_for().contains(&precision))
        .unwrap_or(&int8::Int8)
}

/// The longest name of the layouts that `auto` picks among.
pub fn longest_own_name() -> &'static str {
    own()
        .map(|layout| layout.name())
        .max_by_key(|name| name.len())
        .unwrap_or_default()
}

/// The possible layouts of a tensor of this ggml type: first the one that is written, then its
/// older form and its variants.
pub fn of_ggml_type(id: u32) -> impl Iterator<Item = &'static dyn Layout> {
    layouts().iter().copied().filter(move |layout| {
        matches!(
            layout.origin(),
            LayoutOrigin::Ggml(i) | LayoutOrigin::GgmlOlder(i) | LayoutOrigin::GgmlVariant(i) if i == id
        )
    })
}
