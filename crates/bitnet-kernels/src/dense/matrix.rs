//! Weight matrices for float activations.

use super::LANES;
use super::lanes::{Lanes, Plain};
use crate::Error;

/// Columns of a block of [`Data::Int8`] and [`Data::Int4`].
pub const BLOCK: usize = 32;
/// Steps whose scales are widened at once: 16 blocks.
pub(super) const SPAN: usize = LANES * BLOCK / LANES;

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
    /// `weight = scale · (code − 8)`, codes of four bits in the blocks of [`Data::Int8`].
    Int4 {
        /// `[N, ceil(K / 32), 16]`: the first 16 codes of a block are the low halves of its bytes, the others the high ones. Codes after the end of a row
        /// count for nothing.
        codes: Vec<u8>,
        /// `[N, ceil(K / 32)]`, the bits of binary16.
        scales: Vec<u16>,
    },
}

/// `len` zeros, on huge pages where the system grants them: for weights, which are read as one stream.
pub fn zeros<T: Copy + Default>(len: usize) -> Vec<T> {
    let zeros = vec![T::default(); len];
    #[cfg(target_os = "linux")]
    if size_of_val(zeros.as_slice()) >= 4 << 20 {
        let begin = (zeros.as_ptr() as usize).next_multiple_of(4096);
        let bytes = (zeros.as_ptr() as usize + size_of_val(zeros.as_slice()) - begin) / 4096 * 4096;
        // SAFETY: advice about whole pages of an allocation of ours changes no byte of it; a refusal leaves the system's default.
        unsafe { libc::madvise(begin as *mut libc::c_void, bytes, libc::MADV_HUGEPAGE) };
    }
    zeros
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
            Data::Int4 { codes, scales } => {
                let blocks = rows.checked_mul(cols.div_ceil(BLOCK));
                check(blocks.and_then(|n| n.checked_mul(BLOCK / 2)), codes.len())?;
                check(blocks, scales.len())?;
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
            Data::Int4 { codes, scales } => codes.len() + 2 * scales.len(),
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
                for (i, steps) in steps.chunks_mut(SPAN).enumerate() {
                    let scales = row.scales::<Plain>(i);
                    steps.iter_mut().enumerate().for_each(|(j, step)| row.full::<Plain>(i * SPAN + j, &scales).store(step));
                }
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
            Data::Int4 { codes, scales } => fill(Nibbles { codes, scales, cols: self.cols }, row, out),
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

/// Rounds a row of floats to blocks of 4-bit integers: the weight of largest magnitude becomes −8 · scale, as in Q4_0.
///
/// # Panics
/// If `codes` is not 16 bytes for each block of the row, or there is not one of `scales` for each.
pub fn quantize_nibbles(row: &[f32], codes: &mut [u8], scales: &mut [u16]) {
    let blocks = row.len().div_ceil(BLOCK);
    assert!(codes.len() == blocks * BLOCK / 2 && scales.len() == blocks, "a row of {} weights", row.len());
    for ((row, codes), scale) in row.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2)).zip(scales) {
        let half = half::f16::from_f32(row.iter().fold(0.0f32, |m, &w| if w.abs() > m.abs() { w } else { m }) / -8.0);
        let step = half.to_f32();
        *scale = half.to_bits();
        let code = |i: usize| match row.get(i) {
            Some(w) if step != 0.0 => (w / step).round_ties_even().clamp(-8.0, 7.0) as i8 + 8,
            _ => 8,
        };
        codes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (code(i) | code(i + BLOCK / 2) << 4) as u8);
    }
}

/// Rows of one kind of matrix.
pub(super) trait Rows<'a>: Copy {
    type Row: Row;
    /// Bytes of a step, without scales.
    const STEP: usize;
    fn row(self, row: usize) -> Self::Row;
    /// Where the values of a row begin, and their bytes.
    fn place(self, row: usize) -> (*const u8, usize);
}

/// A row in steps of 16 columns.
///
/// # Safety
/// Its functions may be called where the machine has the instruction set of `L`, with steps that the row has.
pub(super) trait Row: Copy {
    /// The scales of [`SPAN`] steps.
    type Scales: Copy;
    /// Those of one span.
    unsafe fn scales<L: Lanes>(self, span: usize) -> Self::Scales;
    /// A step that the row has in full, with the scales of its span.
    unsafe fn full<L: Lanes>(self, step: usize, scales: &Self::Scales) -> L;
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
            const STEP: usize = LANES * size_of::<$element>();
            #[inline(always)]
            fn row(self, row: usize) -> $row<'a> {
                $row(&self.all[row * self.cols..][..self.cols])
            }
            #[inline(always)]
            fn place(self, row: usize) -> (*const u8, usize) {
                (self.all.as_ptr().wrapping_add(row * self.cols).cast(), self.cols * size_of::<$element>())
            }
        }

        impl Row for $row<'_> {
            type Scales = ();
            #[inline(always)]
            unsafe fn scales<L: Lanes>(self, _: usize) {}

            #[inline(always)]
            unsafe fn full<L: Lanes>(self, step: usize, (): &()) -> L {
                // SAFETY: the caller's.
                unsafe { L::$load(self.0.as_chunks::<LANES>().0.get_unchecked(step)) }
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

/// The scales of a row's blocks, widened for a span.
///
/// # Safety
/// The machine has the instruction set of `L`.
#[inline(always)]
unsafe fn widened<L: Lanes>(scales: &[u16], span: usize) -> [f32; LANES] {
    let here = &scales[span * LANES..];
    let mut wide = [0.0; LANES];
    // SAFETY: the caller's.
    unsafe {
        match here.first_chunk::<LANES>() {
            Some(all) => L::f16(all).store(&mut wide),
            None => {
                let mut padded = [0; LANES];
                padded[..here.len()].copy_from_slice(here);
                L::f16(&padded).store(&mut wide);
            }
        }
    }
    wide
}

/// The scale of a step among those of its span.
#[inline(always)]
fn scale(scales: &[f32; LANES], step: usize) -> f32 {
    scales[step / (BLOCK / LANES) % LANES]
}

impl<'a> Rows<'a> for Blocks<'a> {
    type Row = BlockRow<'a>;
    const STEP: usize = LANES;
    #[inline(always)]
    fn row(self, row: usize) -> BlockRow<'a> {
        let blocks = self.cols.div_ceil(BLOCK);
        BlockRow { values: &self.values[row * self.cols..][..self.cols], scales: &self.scales[row * blocks..][..blocks] }
    }
    #[inline(always)]
    fn place(self, row: usize) -> (*const u8, usize) {
        (self.values.as_ptr().wrapping_add(row * self.cols).cast(), self.cols)
    }
}

impl Row for BlockRow<'_> {
    type Scales = [f32; LANES];

    #[inline(always)]
    unsafe fn scales<L: Lanes>(self, span: usize) -> [f32; LANES] {
        // SAFETY: the caller's.
        unsafe { widened::<L>(self.scales, span) }
    }

    #[inline(always)]
    unsafe fn full<L: Lanes>(self, step: usize, scales: &[f32; LANES]) -> L {
        // SAFETY: the caller's.
        unsafe { L::i8(self.values.as_chunks::<LANES>().0.get_unchecked(step)).times(scale(scales, step)) }
    }

    #[inline(always)]
    unsafe fn tail<L: Lanes>(self) -> L {
        let last = self.values.len() / BLOCK;
        // SAFETY: the caller's.
        unsafe { L::i8(&tail(self.values)).times(f16_to_f32(self.scales[last])) }
    }
}

/// Rows of 4-bit blocks.
#[derive(Clone, Copy)]
pub(super) struct Nibbles<'a> {
    pub(super) codes: &'a [u8],
    pub(super) scales: &'a [u16],
    pub(super) cols: usize,
}

#[derive(Clone, Copy)]
pub(super) struct NibbleRow<'a> {
    codes: &'a [u8],
    scales: &'a [u16],
    cols: usize,
}

impl<'a> Rows<'a> for Nibbles<'a> {
    type Row = NibbleRow<'a>;
    const STEP: usize = LANES / 2;
    #[inline(always)]
    fn row(self, row: usize) -> NibbleRow<'a> {
        let blocks = self.cols.div_ceil(BLOCK);
        let codes = &self.codes[row * blocks * LANES..][..blocks * LANES];
        NibbleRow { codes, scales: &self.scales[row * blocks..][..blocks], cols: self.cols }
    }
    #[inline(always)]
    fn place(self, row: usize) -> (*const u8, usize) {
        let bytes = self.cols.div_ceil(BLOCK) * LANES;
        (self.codes.as_ptr().wrapping_add(row * bytes), bytes)
    }
}

impl Row for NibbleRow<'_> {
    type Scales = [f32; LANES];

    #[inline(always)]
    unsafe fn scales<L: Lanes>(self, span: usize) -> [f32; LANES] {
        // SAFETY: the caller's.
        unsafe { widened::<L>(self.scales, span) }
    }

    #[inline(always)]
    unsafe fn full<L: Lanes>(self, step: usize, scales: &[f32; LANES]) -> L {
        // SAFETY: the caller's.
        unsafe { L::i4(self.codes.as_chunks::<LANES>().0.get_unchecked(step / 2), step % 2 == 1, scale(scales, step)) }
    }

    #[inline(always)]
    unsafe fn tail<L: Lanes>(self) -> L {
        let step = self.cols / LANES;
        let mut codes = self.codes.as_chunks::<LANES>().0[step / 2];
        let (keep, zero) = if step % 2 == 1 { (0x0f, 0x80) } else { (0xf0, 0x08) };
        codes[self.cols % LANES..].iter_mut().for_each(|code| *code = *code & keep | zero);
        // SAFETY: the caller's.
        unsafe { L::i4(&codes, step % 2 == 1, f16_to_f32(self.scales[step / 2])) }
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
