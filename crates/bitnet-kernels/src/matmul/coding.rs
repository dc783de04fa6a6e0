//! How codes lie in the bytes of a step.

use super::{MAX_COLS, STEP_BYTES};
use bitnet_core::{Precision, ZeroPoints};

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

/// What a code stands for: `value = factor · code − offset`, in `−low ..= high`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Values {
    pub(crate) offset: i32,
    pub(crate) factor: i32,
    /// Largest |value|.
    most: usize,
}

impl Values {
    pub(crate) const fn of(precision: Precision) -> Self {
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

    /// Most columns whose sums an i32 holds, whatever the values and activations are. On the way to
    /// a sum 32-bit accumulators may wrap; the sum itself does not.
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

const _: () = assert!(Values::of(Precision::Ternary).max_cols(ZeroPoints::None) == MAX_COLS);
const _: () =
    assert!(Values::of(Precision::Int8).max_cols(ZeroPoints::I8) * 256 * 128 <= i32::MAX as usize);

impl Coding {
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

/// Whole steps of 256 bytes, a code in each byte, times 2 where the coding is binary: what is left
/// to subtract is the offset.
#[inline(always)]
pub(crate) fn unpack(coding: Coding, weights: &[u8], out: &mut [u8]) {
    match coding {
        Coding::Bits1 => unpack_fields::<8>(weights, out, |byte, f| (byte >> f & 1) << 1),
        Coding::Bits2 => unpack_fields::<4>(weights, out, |byte, f| byte >> (2 * f) & 3),
        Coding::Bits4 => unpack_fields::<2>(weights, out, |byte, f| byte >> (4 * f) & 15),
        Coding::Bits8 => out.copy_from_slice(weights),
        Coding::Trits => super::trits::unpack(weights, out),
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
