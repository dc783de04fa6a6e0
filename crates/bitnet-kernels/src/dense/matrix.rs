//! Weight matrices for float activations.

use super::LANES;
use super::lanes::{Lanes, Plain};
use crate::Error;

/// Columns of a block of [`Data::Int8`].
pub const BLOCK: usize = 32;

/// The weights of a matrix, row-major.
#[derive(Debug, Clone)]
pub enum Data {
    /// `[N, K]`.
    F32(Vec<f32>),
    /// `[N, K]`, the bits of binary16.
    F16(Vec<u16>),
    /// `[N, K]`, the bits of bfloat16.
    Bf16(Vec<u16>),
    /// `weight = scale · value`, one scale for every [`BLOCK`] columns of a row; the last block of a row may be shorter. A product of the two is exact in f32.
    Int8 {
        /// `[N, K]`.
        values: Vec<i8>,
        /// `[N, ceil(K / 32)]`, the bits of binary16.
        scales: Vec<u16>,
    },
}

/// Weights `(N, K)` as they are multiplied with floats.
#[derive(Debug, Clone)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Data,
}

impl Matrix {
    /// A matrix of N rows and K columns.
    ///
    /// # Errors
    /// [`Error::Matrix`] if the data has another length.
    pub fn new(rows: usize, cols: usize, data: Data) -> Result<Self, Error> {
        let check = |expected: Option<usize>, got: usize| match expected {
            Some(n) if n == got => Ok(()),
            _ => Err(bitnet_core::Error::Length { what: "weights", expected: expected.unwrap_or(usize::MAX), got }),
        };
        let weights = rows.checked_mul(cols);
        match &data {
            Data::F32(v) => check(weights, v.len())?,
            Data::F16(v) | Data::Bf16(v) => check(weights, v.len())?,
            Data::Int8 { values, scales } => {
                check(weights, values.len())?;
                check(rows.checked_mul(cols.div_ceil(BLOCK)), scales.len())?;
            }
        }
        Ok(Self { rows, cols, data })
    }

    /// N, the number of output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, the number of input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The weights.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// Bytes of the weights, scales included.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(v) => 4 * v.len(),
            Data::F16(v) | Data::Bf16(v) => 2 * v.len(),
            Data::Int8 { values, scales } => values.len() + 2 * scales.len(),
        }
    }

    /// Row `row` as floats: how an embedding is looked up.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not K elements.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {}, {} columns of {}", self.rows, out.len(), self.cols);
        fn fill<'a, R: Rows<'a>>(rows: R, row: usize, out: &mut [f32]) {
            let row = rows.row(row);
            let (steps, rest) = out.as_chunks_mut::<LANES>();
            let mut last = [0.0; LANES];
            // SAFETY: the plain form asks for no instruction set.
            unsafe {
                steps.iter_mut().enumerate().for_each(|(i, step)| row.full::<Plain>(i).store(step));
                if !rest.is_empty() {
                    row.tail::<Plain>().store(&mut last);
                }
            }
            rest.copy_from_slice(&last[..rest.len()]);
        }
        match &self.data {
            Data::F32(v) => fill(Floats { all: v, cols: self.cols }, row, out),
            Data::F16(v) => fill(Halves { all: v, cols: self.cols }, row, out),
            Data::Bf16(v) => fill(Brains { all: v, cols: self.cols }, row, out),
            Data::Int8 { values, scales } => fill(Blocks { values, scales, cols: self.cols }, row, out),
        }
    }
}

/// Rounds a row of floats to blocks of 8-bit integers: scale max|w|/127 as binary16, then the nearest value.
///
/// # Panics
/// If `values` has another length than the row, or `scales` another than its blocks.
pub fn quantize_blocks(row: &[f32], values: &mut [i8], scales: &mut [u16]) {
    assert!(row.len() == values.len() && scales.len() == row.len().div_ceil(BLOCK), "a row of {} weights", row.len());
    for ((row, values), scale) in row.chunks(BLOCK).zip(values.chunks_mut(BLOCK)).zip(scales) {
        let half = half::f16::from_f32(row.iter().fold(0.0f32, |m, w| m.max(w.abs())) / 127.0);
        let step = half.to_f32();
        *scale = half.to_bits();
        for (value, &w) in values.iter_mut().zip(row) {
            *value = if step > 0.0 { (w / step).round_ties_even().clamp(-127.0, 127.0) as i8 } else { 0 };
        }
    }
}

/// Rows of one kind of matrix.
pub(super) trait Rows<'a>: Copy {
    type Row: Row;
    fn row(self, row: usize) -> Self::Row;
}

/// A row in steps of 16 columns.
///
/// # Safety
/// Its functions may be called where the machine has the instruction set of `L`.
pub(super) trait Row: Copy {
    /// A step that the row has in full.
    unsafe fn full<L: Lanes>(self, step: usize) -> L;
    /// The step after the full ones, zeros after the end of the row.
    unsafe fn tail<L: Lanes>(self) -> L;
}

/// The rest of a row after its full steps.
#[inline(always)]
pub(super) fn tail<T: Copy + Default>(row: &[T]) -> [T; LANES] {
    let mut padded = [T::default(); LANES];
    let rest = row.as_chunks::<LANES>().1;
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

macro_rules! plain {
    ($rows:ident, $row:ident, $element:ty, $doc:literal, $load:ident) => {
        #[doc = $doc]
        #[derive(Clone, Copy)]
        pub(super) struct $rows<'a> {
            pub(super) all: &'a [$element],
            pub(super) cols: usize,
        }

        #[derive(Clone, Copy)]
        pub(super) struct $row<'a>(&'a [$element]);

        impl<'a> Rows<'a> for $rows<'a> {
            type Row = $row<'a>;
            #[inline(always)]
            fn row(self, row: usize) -> $row<'a> {
                $row(&self.all[row * self.cols..][..self.cols])
            }
        }

        impl Row for $row<'_> {
            #[inline(always)]
            unsafe fn full<L: Lanes>(self, step: usize) -> L {
                // SAFETY: the caller's.
                unsafe { L::$load(&self.0.as_chunks::<LANES>().0[step]) }
            }

            #[inline(always)]
            unsafe fn tail<L: Lanes>(self) -> L {
                // SAFETY: the caller's.
                unsafe { L::$load(&tail(self.0)) }
            }
        }
    };
}

plain!(Floats, FloatRow, f32, "Rows of f32.", f32);
plain!(Halves, HalfRow, u16, "Rows of binary16.", f16);
plain!(Brains, BrainRow, u16, "Rows of bfloat16.", bf16);
plain!(Bytes, ByteRow, i8, "Rows of integers without scales.", i8);

/// Rows of 8-bit blocks.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    pub(super) values: &'a [i8],
    pub(super) scales: &'a [u16],
    pub(super) cols: usize,
}

#[derive(Clone, Copy)]
pub(super) struct BlockRow<'a> {
    values: &'a [i8],
    scales: &'a [u16],
}

impl<'a> Rows<'a> for Blocks<'a> {
    type Row = BlockRow<'a>;
    #[inline(always)]
    fn row(self, row: usize) -> BlockRow<'a> {
        let blocks = self.cols.div_ceil(BLOCK);
        BlockRow { values: &self.values[row * self.cols..][..self.cols], scales: &self.scales[row * blocks..][..blocks] }
    }
}

impl BlockRow<'_> {
    /// The scale of a step.
    #[inline(always)]
    fn scale(self, step: usize) -> f32 {
        f16_to_f32(self.scales[step / (BLOCK / LANES)])
    }
}

impl Row for BlockRow<'_> {
    #[inline(always)]
    unsafe fn full<L: Lanes>(self, step: usize) -> L {
        // SAFETY: the caller's.
        unsafe { L::i8(&self.values.as_chunks::<LANES>().0[step]).times(self.scale(step)) }
    }

    #[inline(always)]
    unsafe fn tail<L: Lanes>(self) -> L {
        // SAFETY: the caller's.
        unsafe { L::i8(&tail(self.values)).times(self.scale(self.values.len() / LANES)) }
    }
}

/// binary16 to binary32 without a branch, so that it vectorises: the fields are shifted into place, a multiplication by 2^112 rebases the
/// exponent (exact, also for subnormals), and infinities and NaN get their exponent filled.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}
