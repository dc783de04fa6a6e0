//! How codes lie in the bytes of a step.

use super::shape::STEP_BYTES;
use super::trits;
use bitnet_core::{Precision, ZeroPoints};

/// Most columns of a matrix; int8 has fewer, see [`Prepacked::new`](super::Prepacked::new).
pub const MAX_COLS: usize = 1 << 22;

/// How many bits of memory a ternary weight takes in the kernel layout. The sums are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Four in a byte: the fastest out of a cache, and what float activations take.
    TwoBit,
    /// Five in a byte, 1.6 bits: a fifth less to read, and more work for each weight. Scale groups
    /// that are no multiple of 20 columns are padded.
    Trits,
}

/// How codes lie in a byte. The columns of a step are 4 for each field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coding {
    /// Eight codes of one bit.
    Bits1,
    /// Four codes of two bits.
    Bits2,
    /// Two codes of four bits.
    Bits4,
    /// One code.
    Bits8,
    /// Five trits.
    Trits,
}

/// The values of codes: `value = factor · code − offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CodeValues {
    pub(crate) offset: i32,
    pub(crate) factor: i32,
    /// Largest |value|.
    most: usize,
}

impl CodeValues {
    pub(crate) const fn new(precision: Precision) -> Self {
        match precision {
            Precision::Ternary => Self {
                offset: 1,
                factor: 1,
                most: 1,
            },
            Precision::Binary => Self {
                offset: 1,
                factor: 2,
                most: 1,
            },
            Precision::Int2 => Self {
                offset: 2,
                factor: 1,
                most: 2,
            },
            Precision::Int3 => Self {
                offset: 4,
                factor: 1,
                most: 4,
            },
            Precision::Int4 => Self {
                offset: 8,
                factor: 1,
                most: 8,
            },
            Precision::Int8 => Self {
                offset: 128,
                factor: 1,
                most: 128,
            },
        }
    }

    /// The largest number of columns whose sum fits i32 for all values and activations.
    /// Accumulators may wrap on the way to the sum; the sum itself does not.
    pub(crate) const fn max_cols(self, zero_points: ZeroPoints) -> usize {
        // |v − z|: the zero point is a value too.
        let most = if matches!(zero_points, ZeroPoints::I8) {
            2 * self.most
        } else {
            self.most
        };
        let cols = i32::MAX as usize / (128 * most);
        if cols < MAX_COLS { cols } else { MAX_COLS }
    }
}

const _: () = assert!(CodeValues::new(Precision::Ternary).max_cols(ZeroPoints::None) == MAX_COLS);
const _: () = assert!(
    CodeValues::new(Precision::Int8).max_cols(ZeroPoints::I8) * 256 * 128 <= i32::MAX as usize
);

impl Coding {
    /// How weights of a precision are held.
    pub(crate) const fn new(precision: Precision, stream: Stream) -> Self {
        match (precision, stream) {
            (Precision::Ternary, Stream::Trits) => Self::Trits,
            (Precision::Ternary, Stream::TwoBit) | (Precision::Int2, _) => Self::Bits2,
            (Precision::Binary, _) => Self::Bits1,
            (Precision::Int3 | Precision::Int4, _) => Self::Bits4,
            (Precision::Int8, _) => Self::Bits8,
        }
    }

    /// The byte of a step whose codes all stand for 0 (for −1 where the coding is binary, whose
    /// padding meets activations of 0).
    pub(crate) const fn zero_byte(self, precision: Precision) -> u8 {
        let offset = CodeValues::new(precision).offset as u8;
        match self {
            Self::Trits => trits::ZERO,
            Self::Bits1 => 0,
            Self::Bits2 => 0b01_01_01_01 * offset,
            Self::Bits4 => 0x11 * offset,
            Self::Bits8 => 128,
        }
    }

    /// Codes of a byte.
    pub(crate) const fn fields(self) -> usize {
        match self {
            Self::Bits1 => 8,
            Self::Bits2 => 4,
            Self::Bits4 => 2,
            Self::Bits8 => 1,
            Self::Trits => 5,
        }
    }

    /// Columns of a step.
    pub(crate) const fn step(self) -> usize {
        4 * self.fields()
    }

    /// Largest byte that [`unpack`] makes of a code, at most.
    pub(crate) const fn most(self) -> usize {
        match self {
            Self::Bits1 | Self::Trits => 2,
            Self::Bits2 => 3,
            Self::Bits4 => 15,
            Self::Bits8 => 255,
        }
    }

    /// Bytes of an unpacked step: for every four columns, the four codes of every row.
    pub(crate) const fn step_codes(self) -> usize {
        self.fields() * STEP_BYTES
    }
}

/// Unpacks whole steps of 256 bytes to a code in each byte, times 2 where the coding is binary, so
/// that a value is the byte minus the offset.
#[inline(always)]
pub(crate) fn unpack(coding: Coding, weights: &[u8], out: &mut [u8]) {
    match coding {
        Coding::Bits1 => unpack_fields::<8>(weights, out, |byte, f| (byte >> f & 1) << 1),
        Coding::Bits2 => unpack_fields::<4>(weights, out, |byte, f| byte >> (2 * f) & 3),
        Coding::Bits4 => unpack_fields::<2>(weights, out, |byte, f| byte >> (4 * f) & 15),
        Coding::Bits8 => out.copy_from_slice(weights),
        Coding::Trits => trits::unpack(weights, out),
    }
}

#[inline(always)]
fn unpack_fields<const FIELDS: usize>(
    weights: &[u8],
    out: &mut [u8],
    code: impl Fn(u8, usize) -> u8,
) {
    for (weights, out) in weights
        .as_chunks::<STEP_BYTES>()
        .0
        .iter()
        .zip(out.chunks_exact_mut(FIELDS * STEP_BYTES))
    {
        for (field, out) in out.as_chunks_mut::<STEP_BYTES>().0.iter_mut().enumerate() {
            for (out, &byte) in out.iter_mut().zip(weights) {
                *out = code(byte, field);
            }
        }
    }
}
