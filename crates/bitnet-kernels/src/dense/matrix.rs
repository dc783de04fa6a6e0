//! Weight matrices for float activations.

use super::LANES;
use super::blocks::Blocks;
use super::lanes::{Lanes, Plain};
use crate::Error;

/// The weights of a matrix; floats are row-major.
#[derive(Debug, Clone)]
pub enum Data {
    /// `[N, K]`.
    F32(Vec<f32>),
    /// `[N, K]`, the bits of binary16.
    F16(Vec<u16>),
    /// `[N, K]`, the bits of bfloat16.
    Bf16(Vec<u16>),
    /// Blocks of small integers.
    Blocks(Blocks),
}

/// `len` zeros, on huge pages where the system grants them: for weights, which are read as one
/// stream.
pub fn zeros<T: Copy + Default>(len: usize) -> Vec<T> {
    let zeros = vec![T::default(); len];
    #[cfg(target_os = "linux")]
    if size_of_val(zeros.as_slice()) >= 4 << 20 {
        let begin = (zeros.as_ptr() as usize).next_multiple_of(4096);
        let bytes = (zeros.as_ptr() as usize + size_of_val(zeros.as_slice()) - begin) / 4096 * 4096;
        // SAFETY: advice about whole pages of an allocation of ours changes no byte of it; a
        // refusal leaves the system's default.
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
            _ => Err(bitnet_core::Error::Length {
                what: "weights",
                expected: expected.unwrap_or(usize::MAX),
                got,
            }),
        };
        let weights = rows.checked_mul(cols);
        match &data {
            Data::F32(v) => check(weights, v.len())?,
            Data::F16(v) | Data::Bf16(v) => check(weights, v.len())?,
            Data::Blocks(blocks) => {
                check(Some(rows), blocks.rows())?;
                check(Some(cols), blocks.cols())?;
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
            Data::Blocks(blocks) => blocks.bytes(),
        }
    }

    /// Row `row` as floats: how an embedding is looked up.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not K elements.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "row {row} of {}, {} columns of {}",
            self.rows,
            out.len(),
            self.cols
        );
        fn fill<'a, R: Rows<'a>>(rows: R, row: usize, out: &mut [f32]) {
            let row = rows.row(row);
            let (steps, rest) = out.as_chunks_mut::<LANES>();
            let mut last = [0.0; LANES];
            // SAFETY: the plain form asks for no instruction set.
            unsafe {
                steps
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, step)| row.full::<Plain>(i).store(step));
                if !rest.is_empty() {
                    row.tail::<Plain>().store(&mut last);
                }
            }
            rest.copy_from_slice(&last[..rest.len()]);
        }
        match &self.data {
            Data::F32(v) => fill(
                Floats {
                    all: v,
                    cols: self.cols,
                },
                row,
                out,
            ),
            Data::F16(v) => fill(
                Halves {
                    all: v,
                    cols: self.cols,
                },
                row,
                out,
            ),
            Data::Bf16(v) => fill(
                Brains {
                    all: v,
                    cols: self.cols,
                },
                row,
                out,
            ),
            Data::Blocks(blocks) => blocks.row_into(row, out),
        }
    }
}

impl From<Blocks> for Matrix {
    fn from(blocks: Blocks) -> Self {
        Self {
            rows: blocks.rows(),
            cols: blocks.cols(),
            data: Data::Blocks(blocks),
        }
    }
}

/// Rows of one kind of floats.
pub(super) trait Rows<'a>: Copy {
    type Row: Row;
    /// Bytes of a step.
    const STEP: usize;
    fn row(self, row: usize) -> Self::Row;
    /// Where the values of a row begin, and their bytes.
    fn place(self, row: usize) -> (*const u8, usize);
}

/// A row in steps of 16 columns.
///
/// # Safety
/// Its functions may be called where the machine has the instruction set of `L`, with steps that
/// the row has.
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
            const STEP: usize = LANES * size_of::<$element>();
            #[inline(always)]
            fn row(self, row: usize) -> $row<'a> {
                $row(&self.all[row * self.cols..][..self.cols])
            }
            #[inline(always)]
            fn place(self, row: usize) -> (*const u8, usize) {
                (
                    self.all.as_ptr().wrapping_add(row * self.cols).cast(),
                    self.cols * size_of::<$element>(),
                )
            }
        }

        impl Row for $row<'_> {
            #[inline(always)]
            unsafe fn full<L: Lanes>(self, step: usize) -> L {
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

/// binary16 to binary32 without a branch, so that it vectorises: the fields are shifted into place,
/// a multiplication by 2^112 rebases the exponent (exact, also for subnormals), and infinities and
/// NaN get their exponent filled.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if bits & 0x7c00 == 0x7c00 {
        0x7f80_0000
    } else {
        0
    };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}
