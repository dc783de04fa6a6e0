//! `tq1_0`, `tq2_0`, `ptq1_0`: the ternary block types of ggml, 256 or 128 values and an f16 scale
//! that comes last.
//!
//! With the digit of a value `x = value + 1` and `e` the number of a value in its block:
//!
//! ```text
//! tq1_0, 54 bytes   0 …31  byte m      five digits, those of e = m + 32n,         n = 0 … 4
//!                   32…47  byte 32+m   five digits, those of e = 160 + m + 16n,   n = 0 … 4
//!                   48…51  byte 48+m   four digits, those of e = 240 + m + 4n,    n = 0 … 3, and a fifth that is 0
//!                   52,53  scale
//! tq2_0, 66 bytes   0 …31  byte m      [ x(96+m) | x(64+m) | x(32+m) | x(m) ]
//!                   32…63  byte 32+m   the same of e = 128 …
//!                   64,65  scale
//! ptq1_0, 28 bytes  0 …15  byte m      five digits, those of e = m + 16n,         n = 0 … 4
//!                   16…23  byte 16+m   five digits, those of e = 80 + m + 8n,     n = 0 … 4
//!                   24,25  byte 24+m   four digits, those of e = 120 + m + 2n,    n = 0 … 3, and a fifth that is 0
//!                   26,27  scale
//! ```
//!
//! The digits of tq1_0 and ptq1_0 are a fraction: with `q = Σ x_n · 3^(4−n)` a byte is `ceil(256·q / 243)`,
//! and digit `n` comes back as the carry of a multiplication, `(byte · 3^n mod 256) · 3 div 256`.
//! Thirteen bytes are the image of no `q`; they are refused, and so are the bytes of four
//! digits whose fifth is not 0, and code 3 in tq2_0.

use super::ggml::{Block, Ggml};
use super::{Bad, FastPath, LayoutOrigin, quads};
use crate::{Precision, Result};

/// 1.6875 bits per weight.
pub(super) const TQ1_0: Ggml<Tq1> = Ggml::new();
/// 2.0625 bits per weight.
pub(super) const TQ2_0: Ggml<Tq2> = Ggml::new();
/// 1.75 bits per weight, of Prism's fork.
pub(super) const PTQ1_0: Ggml<Ptq1> = Ggml::new();

/// A block of `tq1_0`.
#[derive(Debug)]
pub(super) struct Tq1;

/// A block of `tq2_0`.
#[derive(Debug)]
pub(super) struct Tq2;

/// A block of `ptq1_0`.
#[derive(Debug)]
pub(super) struct Ptq1;

/// Where the three parts of a block begin, in values and in bytes. The last has four digits a byte.
type Parts = [(usize, usize); 3];

const TQ1_PARTS: Parts = [(0, 0), (160, 32), (240, 48)];
const PTQ1_PARTS: Parts = [(0, 0), (80, 16), (120, 24)];

const fn fraction(q: u16) -> u8 {
    (q * 256).div_ceil(243) as u8
}

/// Bytes that hold five digits, the last of which is a multiple of `step`: 1 for any, 3 for 0.
const fn written(step: u16) -> [bool; 256] {
    let mut table = [false; 256];
    let mut q = 0;
    while q < 243 {
        table[fraction(q) as usize] = true;
        q += step;
    }
    table
}

const FIVE_DIGITS: [bool; 256] = written(1);
const FOUR_DIGITS: [bool; 256] = written(3);

/// Packs `N` digits a byte, a stride of `out.len()` values apart.
#[inline]
fn pack_digits<const N: usize>(values: &[i8], out: &mut [u8]) {
    let stride = out.len();
    let values = &values[..N * stride];
    for (m, out) in out.iter_mut().enumerate() {
        let mut q = 0u16;
        for n in 0..5 {
            let digit = if n < N {
                values[n * stride + m].wrapping_add(1).cast_unsigned()
            } else {
                0
            };
            q = q * 3 + u16::from(digit);
        }
        *out = fraction(q);
    }
}

#[inline]
fn unpack_digits(bytes: &[u8], values: &mut [i8]) {
    let mut power = 1u8;
    for values in values.chunks_exact_mut(bytes.len()) {
        for (value, &byte) in values.iter_mut().zip(bytes) {
            *value = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as i8 - 1;
        }
        power = power.wrapping_mul(3);
    }
}

fn pack_parts(parts: Parts, values: &[i8], codes: &mut [u8]) {
    let [(v0, b0), (v1, b1), (v2, b2)] = parts;
    pack_digits::<5>(&values[v0..v1], &mut codes[b0..b1]);
    pack_digits::<5>(&values[v1..v2], &mut codes[b1..b2]);
    pack_digits::<4>(&values[v2..], &mut codes[b2..]);
}

fn unpack_parts(parts: Parts, codes: &[u8], values: &mut [i8]) -> Result<(), Bad> {
    let [(v0, b0), (v1, b1), (v2, b2)] = parts;
    let five = codes[..b2]
        .iter()
        .fold(true, |ok, &b| ok & FIVE_DIGITS[usize::from(b)]);
    let four = codes[b2..]
        .iter()
        .fold(true, |ok, &b| ok & FOUR_DIGITS[usize::from(b)]);
    if !(five && four) {
        let known = |i: usize, b: u8| {
            if i < b2 {
                FIVE_DIGITS[usize::from(b)]
            } else {
                FOUR_DIGITS[usize::from(b)]
            }
        };
        let offset = codes
            .iter()
            .enumerate()
            .position(|(i, &b)| !known(i, b))
            .unwrap_or(0);
        let digits = if offset < b2 { "five" } else { "four" };
        return Err(Bad::new(
            offset,
            format!("{}, which no {digits} digits give", codes[offset]),
        ));
    }
    unpack_digits(&codes[b0..b1], &mut values[v0..v1]);
    unpack_digits(&codes[b1..b2], &mut values[v1..v2]);
    unpack_digits(&codes[b2..], &mut values[v2..]);
    Ok(())
}

impl Block for Tq1 {
    const NAME: &'static str = "tq1_0";
    const SUMMARY: &'static str =
        "ternary, 256 values in 54 bytes with an f16 scale, 1.6875 bits per weight (ggml TQ1_0)";
    const PRECISIONS: &'static [Precision] = &[Precision::Ternary];
    const ORIGIN: LayoutOrigin = LayoutOrigin::Ggml(34);
    const DEFAULT_FOR: &'static [Precision] = &[];
    const READ_AS_CODES: bool = true;
    const FAST_PATH: Option<FastPath> = Some(FastPath::Tq1);
    const VALUES: usize = 256;
    const BYTES: usize = 54;
    const SCALE_AT: usize = 52;

    fn pack(_: Precision, values: &[i8], block: &mut [u8]) {
        pack_parts(TQ1_PARTS, values, &mut block[..Self::SCALE_AT]);
    }

    fn unpack(_: Precision, block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        unpack_parts(TQ1_PARTS, &block[..Self::SCALE_AT], values)
    }
}

impl Block for Ptq1 {
    const NAME: &'static str = "ptq1_0";
    const SUMMARY: &'static str =
        "ternary, 128 values in 28 bytes with an f16 scale, 1.75 bits per weight (Prism's PTQ1_0)";
    const PRECISIONS: &'static [Precision] = &[Precision::Ternary];
    const ORIGIN: LayoutOrigin = LayoutOrigin::Ggml(143);
    const DEFAULT_FOR: &'static [Precision] = &[];
    const READ_AS_CODES: bool = true;
    const VALUES: usize = 128;
    const BYTES: usize = 28;
    const SCALE_AT: usize = 26;

    fn pack(_: Precision, values: &[i8], block: &mut [u8]) {
        pack_parts(PTQ1_PARTS, values, &mut block[..Self::SCALE_AT]);
    }

    fn unpack(_: Precision, block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        unpack_parts(PTQ1_PARTS, &block[..Self::SCALE_AT], values)
    }
}

impl Block for Tq2 {
    const NAME: &'static str = "tq2_0";
    const SUMMARY: &'static str =
        "ternary, 256 values in 66 bytes with an f16 scale, 2.0625 bits per weight (ggml TQ2_0)";
    const PRECISIONS: &'static [Precision] = &[Precision::Ternary];
    const ORIGIN: LayoutOrigin = LayoutOrigin::Ggml(35);
    const DEFAULT_FOR: &'static [Precision] = Self::PRECISIONS;
    const READ_AS_CODES: bool = true;
    const FAST_PATH: Option<FastPath> = Some(FastPath::Tq2);
    const VALUES: usize = 256;
    const BYTES: usize = 66;
    const SCALE_AT: usize = 64;

    fn pack(_: Precision, values: &[i8], block: &mut [u8]) {
        for (values, bytes) in values
            .as_chunks::<128>()
            .0
            .iter()
            .zip(block.as_chunks_mut::<32>().0)
        {
            quads::pack(values, quads::LOW_FIRST, bytes);
        }
    }

    fn unpack(_: Precision, block: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        for (i, (bytes, values)) in block
            .as_chunks::<32>()
            .0
            .iter()
            .zip(values.as_chunks_mut::<128>().0)
            .enumerate()
        {
            quads::unpack(bytes, quads::LOW_FIRST, values).map_err(|bad| Bad {
                offset: 32 * i + bad.offset,
                ..bad
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thirteen_bytes_are_never_written() {
        let never: Vec<usize> = (0..256).filter(|&b| !FIVE_DIGITS[b]).collect();
        assert_eq!(
            never,
            [1, 20, 40, 60, 79, 99, 119, 138, 158, 178, 197, 217, 237]
        );
        assert_eq!(FOUR_DIGITS.iter().filter(|&&ok| ok).count(), 81);
        assert!((0..256).all(|b| FIVE_DIGITS[b] || !FOUR_DIGITS[b]));
    }
}
