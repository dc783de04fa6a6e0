//! Super-blocks of 256 values: sub-blocks have integer scales, which f16 numbers of the super-block
//! multiply.
//!
//! The codes of 128 values (Q2_K, Q3_K and the high bits of Q6_K) lie in 32 bytes: value `32·s + l`
//! in bits `2s` and `2s + 1` of byte `l`. Those of 64 values (Q4_K, Q5_K) lie in 32 bytes: value
//! `l` in the low half of byte `l`, value `32 + l` in the high half. The low four bits of 128
//! values in Q6_K lie in 64 bytes: value `l` in the low half of byte `l`, value `64 + l` in the
//! high half.
//!
//! | type | bytes | sub-block | value |
//! |---|---|---|---|
//! | Q2_K | sc\[16\], qs\[64\], f16 d, f16 m | 16 | (d·low half of sc)·q − (m·high half of sc) |
//! | Q3_K | hmask\[32\], qs\[64\], sc\[12\], f16 d | 16 | (d·(sc − 32))·(q − 4 if the mask bit is 0) |
//! | Q4_K | f16 d, f16 m, sc\[12\], qs\[128\] | 32 | (d·sc)·q − (m·mn) |
//! | Q5_K | f16 d, f16 m, sc\[12\], qh\[32\], qs\[128\] | 32 | (d·sc)·q − (m·mn) |
//! | Q6_K | ql\[128\], qh\[64\], i8 sc\[16\], f16 d | 16 | (d·sc)·(q − 32) |
//!
//! - Q3_K: bit `i` of `hmask[l]` belongs to value `32i + l`. The low four bits of the sixteen 6-bit
//!   scales are the low halves of `sc[0..8]`, then their high halves; the upper two bits of scale
//!   `i` are bits `2(i / 4)` and above of `sc[8 + i % 4]`.
//! - Q4_K and Q5_K have eight 6-bit scales `sc` and eight 6-bit minima `mn` in twelve bytes. For i
//!   < 4 the low six bits of byte `i` are `sc[i]`, of byte `4 + i` `mn[i]`; byte `8 + i` has the
//!   low four bits of `sc[4 + i]` and of `mn[4 + i]` (low and high half), whose upper two bits are
//!   those of byte `i` and of byte `4 + i`.
//! - Q5_K: bit `i` of `qh[l]` is the fifth bit of value `32i + l`.

use super::{for_blocks, half_at};

pub(super) fn q2_k(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 84], out: &mut [f32; 256]| {
        let (d, m) = (half_at(b, 80), half_at(b, 82));
        for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (scale, min) = (d * f32::from(b[i] & 15), m * f32::from(b[i] >> 4));
            let (qs, shift) = two_bit_run(i);
            for (out, q) in out.iter_mut().zip(&b[16 + qs..]) {
                *out = scale * f32::from((q >> shift) & 3) - min;
            }
        }
    });
}

/// First byte and shift of the two-bit codes of values `16i` and up.
#[inline(always)]
pub(super) fn two_bit_run(i: usize) -> (usize, usize) {
    (32 * (i / 8) + 16 * (i % 2), 2 * (i / 2 % 4))
}

pub(super) fn q3_k(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 110], out: &mut [f32; 256]| {
        let d = half_at(b, 108);
        for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let low = (b[96 + i % 8] >> (4 * (i / 8))) & 15;
            let high = (b[104 + i % 4] >> (2 * (i / 4))) & 3;
            let scale = d * (f32::from(low | high << 4) - 32.0);
            let (qs, shift) = two_bit_run(i);
            let (hmask, bit) = (16 * (i % 2), i / 2);
            for ((out, q), h) in out.iter_mut().zip(&b[32 + qs..]).zip(&b[hmask..]) {
                // The mask bit is worth four, and four is subtracted.
                let q = (q >> shift) & 3 | ((h >> bit) & 1) << 2;
                *out = scale * (f32::from(q) - 4.0);
            }
        }
    });
}

/// Scale and minimum of sub-block `i` in the twelve bytes at `at`.
#[inline(always)]
pub(super) fn scale_min<const B: usize>(b: &[u8; B], at: usize, i: usize) -> (u8, u8) {
    if i < 4 {
        (b[at + i] & 63, b[at + 4 + i] & 63)
    } else {
        let low = b[at + 4 + i];
        (
            low & 15 | (b[at + i - 4] >> 6) << 4,
            low >> 4 | (b[at + i] >> 6) << 4,
        )
    }
}

pub(super) fn q4_k(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 144], out: &mut [f32; 256]| {
        let (d, m) = (half_at(b, 0), half_at(b, 2));
        for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (scale, min) = scale_min(b, 4, i);
            let (scale, min) = (d * f32::from(scale), m * f32::from(min));
            let shift = 4 * (i % 2);
            for (out, q) in out.iter_mut().zip(&b[16 + 32 * (i / 2)..]) {
                *out = scale * f32::from((q >> shift) & 15) - min;
            }
        }
    });
}

pub(super) fn q5_k(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 176], out: &mut [f32; 256]| {
        let (d, m) = (half_at(b, 0), half_at(b, 2));
        for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (scale, min) = scale_min(b, 4, i);
            let (scale, min) = (d * f32::from(scale), m * f32::from(min));
            let shift = 4 * (i % 2);
            for ((out, q), h) in out.iter_mut().zip(&b[48 + 32 * (i / 2)..]).zip(&b[16..48]) {
                let q = (q >> shift) & 15 | ((h >> i) & 1) << 4;
                *out = scale * f32::from(q) - min;
            }
        }
    });
}

pub(super) fn q6_k(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 210], out: &mut [f32; 256]| {
        let d = half_at(b, 208);
        for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = d * f32::from(b[192 + i].cast_signed());
            let (ql, low_shift) = (64 * (i / 8) + 16 * (i % 4), 4 * (i / 4 % 2));
            let (qh, high_shift) = two_bit_run(i);
            for ((out, l), h) in out.iter_mut().zip(&b[ql..]).zip(&b[128 + qh..]) {
                let q = (l >> low_shift) & 15 | ((h >> high_shift) & 3) << 4;
                *out = scale * (f32::from(q) - 32.0);
            }
        }
    });
}
