//! Registers of aarch64: 128 bits, four rows.

use super::coding::{Coding, unpack};
use super::float::{self, Float, STEP_TABLES};
use super::tiles::{self, Columns, Sums, Term, Tiles, finish};
use super::vector::{self, Vector, entries, room_of_products, room_of_quads};
use super::{PANEL, STEP_BYTES, trits};
use std::arch::aarch64::*;

pub(super) const NEON: Tiles = Tiles {
    direct: plain::direct,
    dense: plain::dense,
    unpack: unpack_codes,
    finish: plain::finish_rows,
    float: by_table,
};
pub(super) const DOTPROD: Tiles = Tiles {
    direct: dotprod::direct,
    dense: dotprod::dense,
    ..NEON
};

/// What both have in common.
macro_rules! bytes {
    () => {
        type Bytes = uint8x16_t;
        const ROWS: usize = 4;
        /// The products are of signed bytes.
        const UNSIGNED: bool = false;

        #[inline(always)]
        unsafe fn load(from: *const u8) -> uint8x16_t {
            // SAFETY: the caller's.
            unsafe { vld1q_u8(from) }
        }
        #[inline(always)]
        unsafe fn fill(byte: u8) -> uint8x16_t {
            // SAFETY: the caller's.
            unsafe { vdupq_n_u8(byte) }
        }
        #[inline(always)]
        unsafe fn splat(four: i32) -> uint8x16_t {
            // SAFETY: the caller's.
            unsafe { vreinterpretq_u8_s32(vdupq_n_s32(four)) }
        }
        #[inline(always)]
        unsafe fn and(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
            // SAFETY: the caller's.
            unsafe { vandq_u8(a, b) }
        }
        #[inline(always)]
        unsafe fn down(codes: uint8x16_t, bits: usize) -> uint8x16_t {
            // SAFETY: the caller's.
            unsafe {
                match bits {
                    1 => vshrq_n_u8::<1>(codes),
                    2 => vshrq_n_u8::<2>(codes),
                    4 => vshrq_n_u8::<4>(codes),
                    _ => vshrq_n_u8::<8>(codes),
                }
            }
        }
    };
}

/// `sums[r] += (sum[r] << up) >> down`
///
/// # Safety
/// The machine has NEON; `sums` holds four.
#[inline(always)]
unsafe fn add(sum: int32x4_t, up: u32, down: u32, sums: *mut i32) {
    // SAFETY: the caller's; neither access needs alignment.
    unsafe {
        let left = vshlq_s32(sum, vdupq_n_s32(up.cast_signed()));
        let total = vshlq_s32(left, vdupq_n_s32(-down.cast_signed()));
        vst1q_s32(sums, vaddq_s32(vld1q_s32(sums), total));
    }
}

mod plain {
    use super::*;

    /// Products added one at a time in 16 bits.
    pub(super) struct Registers;

    // SAFETY: every intrinsic belongs to NEON, which the trait asks for.
    unsafe impl Vector for Registers {
        bytes!();
        /// Of rows 0 and 1, and of rows 2 and 3: the four bytes of a row have four sums.
        type Sum = [int16x8_t; 2];

        #[inline(always)]
        fn room(most: usize) -> usize {
            room_of_products(most)
        }
        #[inline(always)]
        unsafe fn zero() -> [int16x8_t; 2] {
            // SAFETY: the caller's.
            unsafe { [vdupq_n_s16(0); 2] }
        }
        #[inline(always)]
        unsafe fn dot(
            [low, high]: [int16x8_t; 2],
            codes: uint8x16_t,
            x: uint8x16_t,
        ) -> [int16x8_t; 2] {
            // SAFETY: the caller's.
            unsafe {
                let (codes, x) = (vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(x));
                [
                    vmlal_s8(low, vget_low_s8(codes), vget_low_s8(x)),
                    vmlal_high_s8(high, codes, x),
                ]
            }
        }
        #[inline(always)]
        unsafe fn add([low, high]: [int16x8_t; 2], up: u32, down: u32, sums: *mut i32) {
            // SAFETY: the caller's.
            unsafe {
                add(
                    vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)),
                    up,
                    down,
                    sums,
                )
            }
        }
    }

    entries!(Registers, "neon", rows 2, in place 1 1);
}

#[allow(dead_code, reason = "what is no product is that of NEON")]
mod dotprod {
    use super::*;
    use std::arch::asm;

    /// Byte dot products.
    pub(super) struct Registers;

    // SAFETY: every intrinsic belongs to NEON and the one instruction to its dot products, which
    // the trait asks for.
    unsafe impl Vector for Registers {
        bytes!();
        type Sum = int32x4_t;

        #[inline(always)]
        fn room(most: usize) -> usize {
            room_of_quads(most)
        }
        #[inline(always)]
        unsafe fn zero() -> int32x4_t {
            // SAFETY: the caller's.
            unsafe { vdupq_n_s32(0) }
        }
        #[inline(always)]
        unsafe fn dot(mut sum: int32x4_t, codes: uint8x16_t, x: uint8x16_t) -> int32x4_t {
            // SAFETY: the caller's machine has the instruction, whose intrinsic `vdotq_s32` is not
            // stable; it reads and writes registers only.
            unsafe {
                asm!(
                    ".arch_extension dotprod",
                    "sdot {sum:v}.4s, {codes:v}.16b, {x:v}.16b",
                    sum = inout(vreg) sum, codes = in(vreg) codes, x = in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            sum
        }
        #[inline(always)]
        unsafe fn add(sum: int32x4_t, up: u32, down: u32, sums: *mut i32) {
            // SAFETY: the caller's.
            unsafe { super::add(sum, up, down, sums) }
        }
    }

    entries!(Registers, "neon,dotprod", rows 4, in place 1 1);
}

/// Whole steps, a code in each byte; five trits of a byte by table.
///
/// # Safety
/// The machine has NEON.
#[target_feature(enable = "neon")]
unsafe fn unpack_codes(coding: Coding, weights: &[u8], out: &mut [u8]) {
    if coding != Coding::Trits {
        // SAFETY: the caller's.
        return unsafe { plain::unpack_codes(coding, weights, out) };
    }
    // SAFETY: the tables have 64, 128 and 64 bytes.
    let [low, high, fifths] = unsafe {
        [
            vld1q_u8_x4(trits::QUADS.as_ptr()),
            vld1q_u8_x4(trits::QUADS[64..].as_ptr()),
            vld1q_u8_x4(trits::FIFTHS.as_ptr()),
        ]
    };
    let (number, place) = (vdupq_n_u8(127), vdupq_n_u8(63));
    for (weights, out) in weights
        .as_chunks::<STEP_BYTES>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<{ 5 * STEP_BYTES }>().0)
    {
        for (v, weights) in weights.as_chunks::<16>().0.iter().enumerate() {
            // SAFETY: 16 bytes; the read needs no alignment.
            let bytes = unsafe { vld1q_u8(weights.as_ptr()) };
            let turned = vcltzq_s8(vreinterpretq_s8_u8(bytes));
            let numbers = vandq_u8(bytes, number);
            // A number outside the first table finds 0 there, and keeps it where it is outside the
            // second.
            let quads = vqtbx4q_u8(
                vqtbl4q_u8(low, numbers),
                high,
                vsubq_u8(numbers, vdupq_n_u8(64)),
            );
            let fifths = vqtbl4q_u8(fifths, vandq_u8(bytes, place));
            // No field exceeds 2, so nothing is borrowed.
            let quads = vbslq_u8(turned, vsubq_u8(vdupq_n_u8(0b10_10_10_10), quads), quads);
            let fifths = vbslq_u8(turned, vsubq_u8(vdupq_n_u8(2), fifths), fifths);
            let fields = [
                quads,
                vshrq_n_u8::<2>(quads),
                vshrq_n_u8::<4>(quads),
                vshrq_n_u8::<6>(quads),
                fifths,
            ];
            for (field, codes) in fields.into_iter().enumerate() {
                let out = &mut out[field * STEP_BYTES + 16 * v..][..16];
                // SAFETY: 16 bytes; the write needs no alignment. A fifth trit's code is its own
                // under the mask.
                unsafe { vst1q_u8(out.as_mut_ptr(), vandq_u8(codes, vdupq_n_u8(3))) };
            }
        }
    }
}

/// [`float::plain`] with a table of 16 floats in four registers: the four bytes of a float are
/// looked up by their places.
///
/// # Safety
/// The machine has NEON.
#[target_feature(enable = "neon")]
unsafe fn by_table(weights: &[u8], x: Float<'_>, sums: &mut float::Sums) {
    const ROWS: usize = 16;
    x.check(weights);
    let (nibble, four_times, places) = (
        vdupq_n_u32(15),
        vdupq_n_u32(0x04_04_04_04),
        vdupq_n_u32(0x03_02_01_00),
    );
    for part in 0..PANEL / ROWS {
        // SAFETY: every read and write is inside `weights`, whose steps have PANEL rows, the
        // tables, whose number was checked, and `sums`.
        unsafe {
            let mut acc: [[float32x4_t; 4]; 2] = std::array::from_fn(|o| {
                std::array::from_fn(|v| vld1q_f32(sums[o].as_ptr().add(part * ROWS + 4 * v)))
            });
            for step in 0..weights.len() / STEP_BYTES {
                let at = weights.as_ptr().add(step * STEP_BYTES + part * ROWS * 4);
                let mut w: [uint32x4_t; 4] =
                    std::array::from_fn(|v| vreinterpretq_u32_u8(vld1q_u8(at.add(16 * v))));
                for i in 0..8 {
                    let table = vld1q_u8_x4(x.0.as_ptr().add(step * STEP_TABLES + 16 * i).cast());
                    for (w, acc) in w.iter_mut().zip(&mut acc[i % 2]) {
                        let at = vreinterpretq_u8_u32(vmlaq_u32(
                            places,
                            vandq_u32(*w, nibble),
                            four_times,
                        ));
                        *acc = vaddq_f32(*acc, vreinterpretq_f32_u8(vqtbl4q_u8(table, at)));
                        *w = vshrq_n_u32::<4>(*w);
                    }
                }
            }
            for (sums, acc) in sums.iter_mut().zip(acc) {
                for (v, acc) in acc.into_iter().enumerate() {
                    vst1q_f32(sums.as_mut_ptr().add(part * ROWS + 4 * v), acc);
                }
            }
        }
    }
}
