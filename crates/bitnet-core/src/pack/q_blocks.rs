//! `q2_0`, `q1_0`, `q8_0`, `q4_0`: block types of ggml that begin with their f16 scale.
//!
//! ```text
//! q2_0   64 ternary values, 18 bytes   scale, then code (value + 1) of element j in byte j/4 at bits 2(j % 4)
//! q1_0   128 binary values, 18 bytes   scale, then bit j % 8 of byte j/8, set for +1
//! q8_0   32 int8 values, 34 bytes      scale, then a signed byte a value
//! q4_0   32 int4 values, 18 bytes      scale, then code (value + 8) of element j in the low half of byte j, of j + 16 in the high half
//! ```
//!
//! Code 3 of q2_0 would be the value +2, which no ternary matrix has: it is refused. (Its range −1
//! … 2 is not int2's −2 … 1.)

use super::ggml::{Block, Ggml};
use super::{Bad, bits};
use crate::{Precision, Result};

/// 2.25 bits per weight.
pub(super) const Q2_0: Ggml<Q2> = Ggml::new();
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

/// A block of `q2_0`.
#[derive(Debug)]
pub(super) struct Q2;

/// A block of `q1_0`.
#[derive(Debug)]
pub(super) struct Q1;

/// A block of `q8_0`.
#[derive(Debug)]
pub(super) struct Q8;

/// A block of `q4_0`.
#[derive(Debug)]
pub(super) struct Q4;

impl Block for Q2 {
    const NAME: &'static str = "q2_0";
    const SUMMARY: &'static str =
        "ternary, 64 values in 18 bytes with an f16 scale, 2.25 bits per weight (ggml Q2_0)";
    const PRECISION: Precision = Precision::Ternary;
    const GGML_TYPE: u32 = 42;
    const DEFAULT: bool = true;
    const READ_AS_CODES: bool = true;
    const VALUES: usize = 64;
    const BYTES: usize = 18;
    const SCALE_AT: usize = 0;

    fn pack(values: &[i8], block: &mut [u8]) {
        bits::pack_row(Self::PRECISION, values, &mut block[SCALE..]);
    }

    fn unpack(block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        bits::unpack_row(Self::PRECISION, &block[SCALE..], values).map_err(after_scale)
    }
}

impl Block for Q1 {
    const NAME: &'static str = "q1_0";
    const SUMMARY: &'static str =
        "binary, 128 values in 18 bytes with an f16 scale, 1.125 bits per weight (ggml Q1_0)";
    const PRECISION: Precision = Precision::Binary;
    const GGML_TYPE: u32 = 41;
    const DEFAULT: bool = true;
    const READ_AS_CODES: bool = true;
    const VALUES: usize = 128;
    const BYTES: usize = 18;
    const SCALE_AT: usize = 0;

    fn pack(values: &[i8], block: &mut [u8]) {
        bits::pack_row(Self::PRECISION, values, &mut block[SCALE..]);
    }

    fn unpack(block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        bits::unpack_row(Self::PRECISION, &block[SCALE..], values).map_err(after_scale)
    }
}

impl Block for Q8 {
    const NAME: &'static str = "q8_0";
    const SUMMARY: &'static str =
        "int8, 32 values in 34 bytes with an f16 scale, 8.5 bits per weight (ggml Q8_0)";
    const PRECISION: Precision = Precision::Int8;
    const GGML_TYPE: u32 = 8;
    const DEFAULT: bool = true;
    const READ_AS_CODES: bool = false;
    const VALUES: usize = 32;
    const BYTES: usize = 34;
    const SCALE_AT: usize = 0;

    fn pack(values: &[i8], block: &mut [u8]) {
        for (byte, &value) in block[SCALE..].iter_mut().zip(values) {
            *byte = value.cast_unsigned();
        }
    }

    fn unpack(block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
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
    const PRECISION: Precision = Precision::Int4;
    const GGML_TYPE: u32 = 2;
    const DEFAULT: bool = true;
    const READ_AS_CODES: bool = false;
    const VALUES: usize = 32;
    const BYTES: usize = 18;
    const SCALE_AT: usize = 0;

    fn pack(values: &[i8], block: &mut [u8]) {
        let code = |value: i8| value.wrapping_add(8).cast_unsigned();
        let (low, high) = values.split_at(16);
        for (byte, (&low, &high)) in block[SCALE..].iter_mut().zip(low.iter().zip(high)) {
            *byte = code(low) | code(high) << 4;
        }
    }

    fn unpack(block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        let (low, high) = values.split_at_mut(16);
        for (&byte, (low, high)) in block[SCALE..].iter().zip(low.iter_mut().zip(high)) {
            *low = (byte & 15).cast_signed() - 8;
            *high = (byte >> 4).cast_signed() - 8;
        }
        Ok(())
    }
}
