//! Blocks of 32 values with one scale, or a scale and a minimum.
//!
//! In the 4-bit and 5-bit types byte `j` of `qs` holds the low four bits of value `j` in its low
//! half and those of value `16 + j` in its high half; bit `j` of the little-endian u32 `qh` is the
//! fifth bit of value `j`.
//!
//! | type | bytes | value |
//! |---|---|---|
//! | Q4_0 | f16 d, qs\[16\] | d·(q − 8) |
//! | Q4_1 | f16 d, f16 m, qs\[16\] | d·q + m |
//! | Q5_0 | f16 d, qh, qs\[16\] | d·(q − 16) |
//! | Q5_1 | f16 d, f16 m, qh, qs\[16\] | d·q + m |
//! | Q8_0 | f16 d, i8 q\[32\] | d·q |

use super::{for_blocks, half_at};

const HALF: usize = 16;

pub(super) fn q4_0(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 18], out: &mut [f32; 32]| {
        let d = half_at(b, 0);
        for j in 0..HALF {
            let q = b[2 + j];
            out[j] = d * (f32::from(q & 15) - 8.0);
            out[HALF + j] = d * (f32::from(q >> 4) - 8.0);
        }
    });
}

pub(super) fn q4_1(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 20], out: &mut [f32; 32]| {
        let (d, m) = (half_at(b, 0), half_at(b, 2));
        for j in 0..HALF {
            let q = b[4 + j];
            out[j] = d * f32::from(q & 15) + m;
            out[HALF + j] = d * f32::from(q >> 4) + m;
        }
    });
}

/// The two five-bit codes whose low bits are in `qs[j]`.
#[inline(always)]
fn five_bits(qh: u32, q: u8, j: usize) -> (f32, f32) {
    let low = u32::from(q & 15) | ((qh >> j) & 1) << 4;
    let high = u32::from(q >> 4) | ((qh >> (HALF + j)) & 1) << 4;
    (low as f32, high as f32)
}

pub(super) fn q5_0(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 22], out: &mut [f32; 32]| {
        let d = half_at(b, 0);
        let qh = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
        for j in 0..HALF {
            let (low, high) = five_bits(qh, b[6 + j], j);
            out[j] = d * (low - 16.0);
            out[HALF + j] = d * (high - 16.0);
        }
    });
}

pub(super) fn q5_1(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 24], out: &mut [f32; 32]| {
        let (d, m) = (half_at(b, 0), half_at(b, 2));
        let qh = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
        for j in 0..HALF {
            let (low, high) = five_bits(qh, b[8 + j], j);
            out[j] = d * low + m;
            out[HALF + j] = d * high + m;
        }
    });
}

pub(super) fn q8_0(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b: &[u8; 34], out: &mut [f32; 32]| {
        let d = half_at(b, 0);
        for (out, q) in out.iter_mut().zip(&b[2..]) {
            *out = f32::from(q.cast_signed()) * d;
        }
    });
}
