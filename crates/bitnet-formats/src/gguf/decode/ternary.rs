//! Binary, ternary and two-bit blocks with one scale `d`.
//!
//! | type | values | bytes | value |
//! |---|---|---|---|
//! | TQ1_0 | 256 | qs\[48\], qh\[4\], f16 d | d·(digit − 1) |
//! | TQ2_0 | 256 | qs\[64\], f16 d | d·(q − 1) |
//! | Q1_0 | 128 | f16 d, qs\[16\] | d where the bit is set, else −d |
//! | Q2_0 | 64 | f16 d, qs\[16\] | d·(q − 1) |
//! | PQ2_0, older Q2_0 | 128 | f16 d, qs\[32\] | d·(q − 1) |
//! | PTQ1_0 | 128 | qs\[24\], qh\[2\], f16 d | d·(digit − 1) |
//!
//! - TQ1_0: a byte is a fraction of 256 whose base-3 digits are the codes, the most significant
//!   first: digit `n` is the integer part of 3·((byte·3ⁿ mod 256) / 256). Digits 0 to 4 of `qs[m]`,
//!   m < 32, are values `m + 32n`; those of `qs[32 + m]`, m < 16, are values `160 + m + 16n`;
//!   digits 0 to 3 of `qh[j]` are values `240 + j + 4n`.
//! - TQ2_0: for each half of `qs`, bits `2n` and `2n + 1` of byte `m` are value `32n + m` of the
//!   128 values of that half.
//! - PTQ1_0: as TQ1_0, with digits of `qs[m]`, m < 16, for values `m + 16n`, of `qs[16 + m]`, m < 8,
//!   for `80 + m + 8n`, and of `qh[h]` for `120 + h + 2n`.
//! - Q1_0 and the Q2_0 types go through a byte from its lowest bit, byte after byte.
//!
//! A two-bit code of 3 does not occur in ternary data; it decodes to 2·d as in ggml.

use super::{for_blocks, half_at};

pub(super) fn tq1_0(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 54], out: &mut [f32; 256]| {
        let d = half_at(b, 52);
        let (first, rest) = out.split_at_mut(160);
        let (second, third) = rest.split_at_mut(80);
        digits(&b[..32], first, d);
        digits(&b[32..48], second, d);
        digits(&b[48..52], third, d);
    });
}

pub(super) fn ptq1_0(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 28], out: &mut [f32; 128]| {
        let d = half_at(b, 26);
        let (first, rest) = out.split_at_mut(80);
        let (second, third) = rest.split_at_mut(40);
        digits(&b[..16], first, d);
        digits(&b[16..24], second, d);
        digits(&b[24..26], third, d);
    });
}

/// Digit `n` of `bytes[m]` goes to `out[m + n · bytes.len()]`.
#[inline(always)]
fn digits(bytes: &[u8], out: &mut [f32], d: f32) {
    let mut power = 1u8;
    for out in out.chunks_exact_mut(bytes.len()) {
        for (out, byte) in out.iter_mut().zip(bytes) {
            let digit = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
            *out = d * (f32::from(digit) - 1.0);
        }
        power = power.wrapping_mul(3);
    }
}

pub(super) fn tq2_0(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 66], out: &mut [f32; 256]| {
        let d = half_at(b, 64);
        for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let shift = 2 * (i % 4);
            for (out, q) in out.iter_mut().zip(&b[32 * (i / 4)..64]) {
                *out = d * (f32::from((q >> shift) & 3) - 1.0);
            }
        }
    });
}

pub(super) fn q1_0(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 18], out: &mut [f32; 128]| {
        let d = half_at(b, 0);
        for (out, q) in out.as_chunks_mut::<8>().0.iter_mut().zip(&b[2..]) {
            for (bit, out) in out.iter_mut().enumerate() {
                *out = if (q >> bit) & 1 == 1 { d } else { -d };
            }
        }
    });
}

/// Blocks of `B` bytes and `N` values: Q2_0 and its larger forms.
pub(super) fn q2<const B: usize, const N: usize>(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; B], out: &mut [f32; N]| {
        let d = half_at(b, 0);
        for (out, q) in out.as_chunks_mut::<4>().0.iter_mut().zip(&b[2..]) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = d * (f32::from((q >> (2 * i)) & 3) - 1.0);
            }
        }
    });
}
