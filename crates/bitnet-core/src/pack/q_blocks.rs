//! `q2_0`, `q2_0-g128`, `pq2_0`, `q1_0`, `q8_0`, `q4_0`: block types of ggml that begin with their
//! f16 scale.
//!
//! ```text
//! q2_0   64 ternary values, 18 bytes   scale, then code (value + 1) of element j in byte j/4 at bits 2(j % 4)
//! q2_0-g128, pq2_0   128 values, 34 bytes, likewise
//! q1_0   128 binary values, 18 bytes   scale, then bit j % 8 of byte j/8, set for +1
//! q8_0   32 int8 values, 34 bytes      scale, then a signed byte a value
//! q4_0   32 int4 values, 18 bytes      scale, then code (value + 8) of element j in the low half of byte j, of j + 16 in the high half
//! ```
//!
//! The code 3 of the two-bit types is the value +2. No ternary matrix has it, so there it is refused.
//! A matrix that has it is int2: a block with the scale `d` and the values −1 … 2 is the values 1 …
//! −2 with the scale `−d`, and the int2 code (value + 2) is the stored code with all bits inverted.

use super::ggml::{Block, Ggml};
use super::{Bad, FindsWider, LayoutOrigin, bits};
use crate::{Precision, Result};

/// 2.25 bits per weight.
pub(super) const Q2_0: Ggml<Q2> = Ggml::new();
/// 2.125 bits per weight: the files that Prism first published under the number of Q2_0.
pub(super) const Q2_0_G128: Ggml<Q2G128> = Ggml::new();
/// 2.125 bits per weight: the same bytes under a number of their own.
pub(super) const PQ2_0: Ggml<Pq2> = Ggml::new();
/// 1.125 bits per weight.
pub(super) const Q1_0: Ggml<Q1> = Ggml::new();
/// 8.5 bits per weight.
pub(super) const Q8_0: Ggml<Q8> = Ggml::new();
/// 4.5 bits per weight.
pub(super) const Q4_0: Ggml<Q4> = Ggml::new();

/// Bytes of the scale, before the codes.
const SCALE: usize = 2;

/// The offset of a [`Bad`] among the codes, from the beginning of the block.
fn after_scale(bad: Bad) -> Bad {
    Bad {
        offset: SCALE + bad.offset,
        ..bad
    }
}

/// A block of `q1_0`.
#[derive(Debug)]
pub(super) struct Q1;

/// A block of `q8_0`.
#[derive(Debug)]
pub(super) struct Q8;

/// A block of `q4_0`.
#[derive(Debug)]
pub(super) struct Q4;

/// Bytes of the codes of the largest two-bit block.
const MAX_CODES: usize = 32;

fn pack_two_bits(precision: Precision, values: &[i8], codes: &mut [u8]) {
    bits::pack_row(precision, values, codes);
    if precision == Precision::Int2 {
        codes.iter_mut().for_each(|byte| *byte = !*byte);
    }
}

fn unpack_two_bits(precision: Precision, codes: &[u8], values: &mut [i8]) -> Result<(), Bad> {
    if precision != Precision::Int2 {
        return bits::unpack_row(precision, codes, values).map_err(after_scale);
    }
    let mut inverted = [0; MAX_CODES];
    for (inverted, code) in inverted.iter_mut().zip(codes) {
        *inverted = !code;
    }
    bits::unpack_row(precision, &inverted[..codes.len()], values).map_err(after_scale)
}

/// Whether some of the two-bit blocks of `size` bytes have a code 3.
fn has_code_3(blocks: &[u8], size: usize) -> bool {
    let found = |codes: &[u8]| {
        codes
            .iter()
            .fold(0, |found, &b| found | (b & b >> 1 & 0x55))
            != 0
    };
    blocks
        .chunks_exact(size)
        .any(|block| found(&block[SCALE..]))
}

/// A two-bit block: type, its name in words, layout, summary, origin, what it is the default for,
/// values and bytes.
macro_rules! two_bit_block {
    ($block:ident, $doc:literal, $name:literal, $summary:literal, $origin:expr, $default:expr,
     $values:literal => $bytes:literal) => {
        #[doc = $doc]
        #[derive(Debug)]
        pub(super) struct $block;

        impl Block for $block {
            const NAME: &'static str = $name;
            const SUMMARY: &'static str = $summary;
            const PRECISIONS: &'static [Precision] = &[Precision::Ternary, Precision::Int2];
            const ORIGIN: LayoutOrigin = $origin;
            const DEFAULT_FOR: &'static [Precision] = $default;
            const WIDER: Option<FindsWider> = Some(|blocks| has_code_3(blocks, $bytes));
            const READ_AS_CODES: bool = true;
            const VALUES: usize = $values;
            const BYTES: usize = $bytes;
            const SCALE_AT: usize = 0;

            fn pack(precision: Precision, values: &[i8], block: &mut [u8]) {
                pack_two_bits(precision, values, &mut block[SCALE..]);
            }

            fn unpack(precision: Precision, block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
                unpack_two_bits(precision, &block[SCALE..], values)
            }
        }
    };
}

two_bit_block!(
    Q2,
    "A block of `q2_0`.",
    "q2_0",
    "ternary or int2, 64 values in 18 bytes with an f16 scale, 2.25 bits per weight (ggml Q2_0)",
    LayoutOrigin::Ggml(42),
    &[Precision::Ternary, Precision::Int2],
    64 => 18
);
two_bit_block!(
    Q2G128,
    "A block of `q2_0-g128`.",
    "q2_0-g128",
    "ternary or int2, 128 values in 34 bytes with an f16 scale, 2.125 bits per weight (Q2_0 of older \
     Prism files)",
    LayoutOrigin::GgmlOlder(42),
    &[],
    128 => 34
);
two_bit_block!(
    Pq2,
    "A block of `pq2_0`.",
    "pq2_0",
    "ternary or int2, 128 values in 34 bytes with an f16 scale, 2.125 bits per weight (Prism's PQ2_0)",
    LayoutOrigin::Ggml(142),
    &[],
    128 => 34
);

impl Block for Q1 {
    const NAME: &'static str = "q1_0";
    const SUMMARY: &'static str =
        "binary, 128 values in 18 bytes with an f16 scale, 1.125 bits per weight (ggml Q1_0)";
    const PRECISIONS: &'static [Precision] = &[Precision::Binary];
    const ORIGIN: LayoutOrigin = LayoutOrigin::Ggml(41);
    const DEFAULT_FOR: &'static [Precision] = Self::PRECISIONS;
    const READ_AS_CODES: bool = true;
    const VALUES: usize = 128;
    const BYTES: usize = 18;
    const SCALE_AT: usize = 0;

    fn pack(precision: Precision, values: &[i8], block: &mut [u8]) {
        bits::pack_row(precision, values, &mut block[SCALE..]);
    }

    fn unpack(precision: Precision, block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        bits::unpack_row(precision, &block[SCALE..], values).map_err(after_scale)
    }
}

impl Block for Q8 {
    const NAME: &'static str = "q8_0";
    const SUMMARY: &'static str =
        "int8, 32 values in 34 bytes with an f16 scale, 8.5 bits per weight (ggml Q8_0)";
    const PRECISIONS: &'static [Precision] = &[Precision::Int8];
    const ORIGIN: LayoutOrigin = LayoutOrigin::Ggml(8);
    const DEFAULT_FOR: &'static [Precision] = Self::PRECISIONS;
    const READ_AS_CODES: bool = false;
    const VALUES: usize = 32;
    const BYTES: usize = 34;
    const SCALE_AT: usize = 0;

    fn pack(_: Precision, values: &[i8], block: &mut [u8]) {
        for (byte, &value) in block[SCALE..].iter_mut().zip(values) {
            *byte = value.cast_unsigned();
        }
    }

    fn unpack(_: Precision, block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        for (value, &byte) in values.iter_mut().zip(&block[SCALE..]) {
            *value = byte.cast_signed();
        }
        Ok(())
    }
}

impl Block for Q4 {
    const NAME: &'static str = "q4_0";
    const SUMMARY: &'static str =
        "int4, 32 values in 18 bytes with an f16 scale, 4.5 bits per weight (ggml Q4_0)";
    const PRECISIONS: &'static [Precision] = &[Precision::Int4];
    const ORIGIN: LayoutOrigin = LayoutOrigin::Ggml(2);
    const DEFAULT_FOR: &'static [Precision] = Self::PRECISIONS;
    const READ_AS_CODES: bool = false;
    const VALUES: usize = 32;
    const BYTES: usize = 18;
    const SCALE_AT: usize = 0;

    fn pack(_: Precision, values: &[i8], block: &mut [u8]) {
        let code = |value: i8| value.wrapping_add(8).cast_unsigned();
        let (low, high) = values.split_at(16);
        for (byte, (&low, &high)) in block[SCALE..].iter_mut().zip(low.iter().zip(high)) {
            *byte = code(low) | code(high) << 4;
        }
    }

    fn unpack(_: Precision, block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        let (low, high) = values.split_at_mut(16);
        for (&byte, (low, high)) in block[SCALE..].iter().zip(low.iter_mut().zip(high)) {
            *low = (byte & 15).cast_signed() - 8;
            *high = (byte >> 4).cast_signed() - 8;
        }
        Ok(())
    }
}
