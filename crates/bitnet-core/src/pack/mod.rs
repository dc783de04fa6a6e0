//! Wire layouts: one file each behind one trait, and a registry by name.
//!
//! A layout turns the values of a matrix into bytes and back. Most leave scales to the container;
//! the block types of ggml carry them inside ([`Layout::stores_scales`]). Layouts are little-endian
//! and the same on every machine; docs/formats.md draws them.

mod auto;
mod base3;
mod bits;
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

use crate::{Error, MatrixSpec, Precision, Result, ScaleDtype, ZeroPoints};
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
    /// The scales, if the layout carries them, in the order and number of
    /// [`MatrixSpec::scales_len`].
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

    /// If `Some(r)`: the stacked rows may be cut after each multiple of `r` rows, and the packed
    /// strips, one after another, are the packed matrix. `None`: the matrix packs only as a whole.
    fn chunk_rows(&self, spec: &MatrixSpec) -> Option<usize>;

    /// Appends the packed bytes of `values` (`[planes · N, K]`) to `out`. `scales` is read only
    /// where [`Layout::stores_scales`].
    ///
    /// # Errors
    /// What [`Layout::check`] finds; [`Error::Length`] for a slice that does not fit `spec`;
    /// [`Error::Value`] for a value outside the alphabet. `out` is then as it was.
    fn pack_into(
        &self,
        spec: &MatrixSpec,
        values: &[i8],
        scales: &[f32],
        out: &mut Vec<u8>,
    ) -> Result<()>;

    /// The values in `bytes`, which must be exactly one packed matrix.
    ///
    /// # Errors
    /// What [`Layout::check`] finds; [`Error::Length`] if the number of bytes is wrong;
    /// [`Error::Corrupt`] for a pattern that no writer produces. Never panics and never allocates
    /// more than `spec` asks for.
    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked>;

    /// The scales in `bytes`, if the layout holds them: those of [`Layout::unpack`], whose patterns
    /// of values may go unread.
    ///
    /// # Errors
    /// As [`Layout::unpack`], as far as bytes are read.
    fn scales(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Option<Vec<f32>>> {
        Ok(self.unpack(spec, bytes)?.scales)
    }
}

/// How many of [`layouts`], from the front, are our own. None of these carries scales.
const OWN: usize = 11;

/// Every layout there is, our own first.
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
        &q_blocks::Q1_0,
        &q_blocks::Q8_0,
        &q_blocks::Q4_0,
        &i2_s::GROUPS_OF_128,
        &i2_s::GROUPS_OF_64,
        &i2_s::FOUR_ROWS,
    ]
}

/// The layout of that name.
///
/// # Errors
/// [`Error::UnknownName`] that lists the names there are.
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

/// A pattern that no writer produces, found by a coder that sees only a part of the packed bytes.
#[derive(Debug, PartialEq)]
struct Bad {
    /// Offset into the bytes that the coder was given.
    offset: usize,
    what: String,
}

impl Bad {
    fn new(offset: usize, what: impl Into<String>) -> Self {
        Self {
            offset,
            what: what.into(),
        }
    }

    /// The error for it, given where the coder's bytes begin.
    fn at(self, layout: &'static str, start: usize) -> Error {
        Error::Corrupt {
            layout,
            offset: start + self.offset,
            what: self.what,
        }
    }
}

fn unsupported(layout: &'static str, why: impl Into<String>) -> Error {
    Error::Unsupported {
        layout,
        why: why.into(),
    }
}

/// What every layout asks for: a valid spec, with rows and columns that can be counted in bytes, in
/// one of the layout's precisions.
fn check_precision(
    layout: &'static str,
    spec: &MatrixSpec,
    precisions: &[Precision],
) -> Result<()> {
    spec.validate()?;
    // A matrix of no columns may still have any number of rows, and the reverse: no product with
    // them is to overflow.
    let limit = isize::MAX as usize / 64;
    if spec.rows > limit || spec.cols > limit {
        return Err(Error::TooLarge {
            rows: spec.rows,
            cols: spec.cols,
        });
    }
    if precisions.contains(&spec.precision) {
        return Ok(());
    }
    let names = precisions
        .iter()
        .map(|p| p.name())
        .collect::<Vec<_>>()
        .join(", ");
    Err(unsupported(
        layout,
        format!("it holds {names} and the matrix is {}", spec.precision),
    ))
}

/// The foreign layouts have no place for a second plane or for zero points.
fn check_plain(layout: &'static str, spec: &MatrixSpec) -> Result<()> {
    if spec.planes != 1 {
        return Err(unsupported(
            layout,
            format!("it holds 1 plane and the matrix has {}", spec.planes),
        ));
    }
    if spec.zero_points != ZeroPoints::None {
        return Err(unsupported(
            layout,
            format!(
                "it has no zero points and the matrix has {:?} ones",
                spec.zero_points
            ),
        ));
    }
    Ok(())
}

/// `K % block = 0`.
fn check_cols(layout: &'static str, spec: &MatrixSpec, block: usize) -> Result<()> {
    if spec.cols.is_multiple_of(block) {
        return Ok(());
    }
    Err(unsupported(
        layout,
        format!(
            "rows are cut into blocks of {block} and {} columns leave {}",
            spec.cols,
            spec.cols % block
        ),
    ))
}

/// The number of values and that each is in the alphabet.
fn check_values(spec: &MatrixSpec, values: &[i8]) -> Result<()> {
    check_len("values", spec.values_len(), values.len())?;
    match first_outside(spec.precision, values) {
        None => Ok(()),
        Some(index) => Err(Error::Value {
            index,
            got: i32::from(values[index]),
            expected: spec.precision.alphabet(),
        }),
    }
}

/// The first value that is not in the alphabet.
fn first_outside(precision: Precision, values: &[i8]) -> Option<usize> {
    // A branch-free pass over all of it, and the search only if there is something to find.
    let (low, high) = precision.range();
    let bad = match precision {
        Precision::Int8 => 0,
        Precision::Binary => values
            .iter()
            .fold(0u8, |bad, &v| bad | u8::from((v != 1) & (v != -1))),
        _ => values
            .iter()
            .fold(0u8, |bad, &v| bad | u8::from((v < low) | (v > high))),
    };
    if bad == 0 {
        None
    } else {
        values.iter().position(|&v| !precision.contains(v))
    }
}

/// The number of scales, and that each is a finite number of the type it will be stored in.
fn check_scales(
    layout: &'static str,
    spec: &MatrixSpec,
    dtype: ScaleDtype,
    scales: &[f32],
) -> Result<()> {
    check_len("scales", spec.scales_len(), scales.len())?;
    match scales.iter().position(|&s| !is_stored(dtype, s)) {
        None => Ok(()),
        Some(i) => Err(unsupported(
            layout,
            format!("scale {i} is {:?}, which is no finite {dtype}", scales[i]),
        )),
    }
}

/// Whether the type holds exactly this number, and it is finite.
fn is_stored(dtype: ScaleDtype, scale: f32) -> bool {
    scale.is_finite() && dtype.round(scale).to_bits() == scale.to_bits()
}

fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            expected,
            got,
        })
    }
}
