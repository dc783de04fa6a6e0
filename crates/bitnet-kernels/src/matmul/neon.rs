//! Registers of aarch64: 128 bits, four rows.

use super::coding::{self, Coding};
use super::float::{FloatSums, FloatTables, STEP_TABLES};
use super::shape::{PANEL, STEP_BYTES};
use super::tiles::{self, Columns, PanelSums};
use super::trits;
use super::vector::{self, Vector, entries, max_quads, max_singles, vector_functions};
use std::arch::aarch64::*;

/// What both have in common.
macro_rules! bytes {
    () => {
        type Bytes = uint8x16_t;
        const ROWS: usize = 4;
        /// The products are of signed bytes.
        const UNSIGNED: bool = false;

        vector_functions! {
            fn load(from: *const u8) -> uint8x16_t { vld1q_u8(from) }
            fn fill(byte: u8) -> uint8x16_t { vdupq_n_u8(byte) }
            fn splat(four: i32) -> uint8x16_t { vreinterpretq_u8_s32(vdupq_n_s32(four)) }
            fn and(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t { vandq_u8(a, b) }
            fn down(codes: uint8x16_t, bits: usize) -> uint8x16_t {
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
/// The machine has NEON; `sums` points to four sums.
#[inline(always)]
unsafe fn add(sum: int32x4_t, up: u32, down: u32, sums: *mut i32) {
    // SAFETY: the function's contract: the machine has NEON, and four sums are there; neither
    // access needs alignment.
    unsafe {
        let left = vshlq_s32(sum, vdupq_n_s32(up.cast_signed()));
        let total = vshlq_s32(left, vdupq_n_s32(-down.cast_signed()));
        vst1q_s32(sums, vaddq_s32(vld1q_s32(sums), total));
    }
}

pub(crate) mod plain {
    use super::*;

    /// Products added one at a time in 16 bits.
    pub(super) struct Registers;

    // SAFETY: every intrinsic belongs to NEON, which `entries!` enables.
    unsafe impl Vector for Registers {
        bytes!();
        /// Of rows 0 and 1, and of rows 2 and 3: the four bytes of a row have four sums.
        type Sum = [int16x8_t; 2];

        #[inline(always)]
        fn max_products(most: usize) -> usize {
            max_singles(most)
        }
        vector_functions! {
            fn zero() -> [int16x8_t; 2] { [vdupq_n_s16(0); 2] }
            fn dot(sum: [int16x8_t; 2], codes: uint8x16_t, x: uint8x16_t) -> [int16x8_t; 2] {
                let (codes, x) = (vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(x));
                [
                    vmlal_s8(sum[0], vget_low_s8(codes), vget_low_s8(x)),
                    vmlal_high_s8(sum[1], codes, x),
                ]
            }
            fn add(sum: [int16x8_t; 2], up: u32, down: u32, sums: *mut i32) {
                let sum = vpaddq_s32(vpaddlq_s16(sum[0]), vpaddlq_s16(sum[1]));
                super::add(sum, up, down, sums);
            }
        }
    }

    entries!(Registers, "neon", rows 2, in place 1 1);
}

pub(crate) mod dotprod {
    use super::*;
    use std::arch::asm;

    /// Byte dot products.
    pub(super) struct Registers;

    // SAFETY: every intrinsic belongs to NEON and the one instruction to its dot products, both of
    // which `entries!` enables.
    unsafe impl Vector for Registers {
        bytes!();
        type Sum = int32x4_t;

        #[inline(always)]
        fn max_products(most: usize) -> usize {
            max_quads(most)
        }
        #[inline(always)]
        unsafe fn dot(mut sum: int32x4_t, codes: uint8x16_t, x: uint8x16_t) -> int32x4_t {
            // SAFETY: the contract of `Vector`: the machine has the instruction, whose intrinsic
            // `vdotq_s32` is not stable. It reads and writes registers only.
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
        vector_functions! {
            fn zero() -> int32x4_t { vdupq_n_s32(0) }
            fn add(sum: int32x4_t, up: u32, down: u32, sums: *mut i32) {
                super::add(sum, up, down, sums);
            }
        }
    }

    entries!(Registers, "neon,dotprod", rows 4, in place 1 1);
}

/// [`coding::unpack`]; five trits of a byte by table.
#[target_feature(enable = "neon")]
pub(crate) fn unpack_codes(coding: Coding, weights: &[u8], out: &mut [u8]) {
    if coding != Coding::Trits {
        return coding::unpack(coding, weights, out);
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

/// [`float::table_sums`](super::float::table_sums) with a table of 16 floats in four registers: the
/// four bytes of a float are looked up by their places.
#[target_feature(enable = "neon")]
pub(crate) fn table_sums(weights: &[u8], x: FloatTables<'_>, sums: &mut FloatSums) {
    const ROWS: usize = 16;
    x.check(weights);
    let (nibble, four_times, places) = (
        vdupq_n_u32(15),
        vdupq_n_u32(0x04_04_04_04),
        vdupq_n_u32(0x03_02_01_00),
    );
    for part in 0..PANEL / ROWS {
        // SAFETY: every access is to one of PANEL rows of a whole step of `weights`, to one of the
        // tables of this step, which `FloatTables::check` counted, or to one of PANEL sums; none
        // needs alignment.
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
