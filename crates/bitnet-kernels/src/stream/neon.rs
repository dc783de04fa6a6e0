//! Loops for aarch64 where compiling the plain ones is not enough: its loads and stores of four
//! registers give each register every fourth byte. The rest after whole registers goes to the plain
//! loop.

use super::plain;
use std::arch::aarch64::*;

#[target_feature(enable = "neon")]
pub(crate) fn pack_two_bit(values: &[i8], bias: i8, top: u8, out: &mut [u8]) -> bool {
    let (blocks, tail) = values.as_chunks::<64>();
    let (body, end) = out.split_at_mut(16 * blocks.len());
    let bias_all = vdupq_n_u8(bias.cast_unsigned());
    let mut most = vdupq_n_u8(0);
    for (block, out) in blocks.iter().zip(body.as_chunks_mut::<16>().0) {
        // SAFETY: `block` is a chunk of 64 bytes; the read needs no alignment.
        let v = unsafe { vld4q_u8(block.as_ptr().cast()) };
        let (a, b) = (vaddq_u8(v.0, bias_all), vaddq_u8(v.1, bias_all));
        let (c, d) = (vaddq_u8(v.2, bias_all), vaddq_u8(v.3, bias_all));
        most = vmaxq_u8(most, vmaxq_u8(vmaxq_u8(a, b), vmaxq_u8(c, d)));
        // Each keeps the low bits of its first argument and puts the second above them.
        let packed = vsliq_n_u8::<6>(vsliq_n_u8::<4>(vsliq_n_u8::<2>(a, b), c), d);
        // SAFETY: `out` is a chunk of 16 bytes; the write needs no alignment.
        unsafe { vst1q_u8(out.as_mut_ptr(), packed) };
    }
    plain::pack_two_bit(tail, bias, top, end) && vmaxvq_u8(most) <= top
}

#[target_feature(enable = "neon")]
pub(crate) fn unpack_two_bit(bytes: &[u8], bias: i8, top: u8, values: &mut [i8]) -> bool {
    let (blocks, tail) = values.as_chunks_mut::<64>();
    let (body, end) = bytes.split_at(16 * blocks.len());
    let (bias_all, mask) = (vdupq_n_u8(bias.cast_unsigned()), vdupq_n_u8(3));
    let mut threes = vdupq_n_u8(0);
    for (bytes, out) in body.as_chunks::<16>().0.iter().zip(blocks) {
        // SAFETY: `bytes` is a chunk of 16; the read needs no alignment.
        let x = unsafe { vld1q_u8(bytes.as_ptr()) };
        threes = vorrq_u8(threes, vandq_u8(x, vshrq_n_u8::<1>(x)));
        let values = uint8x16x4_t(
            vsubq_u8(vandq_u8(x, mask), bias_all),
            vsubq_u8(vandq_u8(vshrq_n_u8::<2>(x), mask), bias_all),
            vsubq_u8(vandq_u8(vshrq_n_u8::<4>(x), mask), bias_all),
            vsubq_u8(vshrq_n_u8::<6>(x), bias_all),
        );
        // SAFETY: `out` is a chunk of 64 bytes; the write needs no alignment.
        unsafe { vst4q_u8(out.as_mut_ptr().cast(), values) };
    }
    let ok = top == 3 || vmaxvq_u8(vandq_u8(threes, vdupq_n_u8(0x55))) == 0;
    plain::unpack_two_bit(end, bias, top, tail) && ok
}
