//! Registers of WebAssembly: 128 bits, four rows.

use super::coding::Coding;
use super::shape::STEP_BYTES;
use super::tiles::{self, Columns, PanelSums};
use super::vector::{self, Vector, entries, max_singles, vector_functions};
use std::arch::wasm32::*;

/// Products added one at a time in 16 bits.
struct Registers;

// SAFETY: every intrinsic belongs to simd128, which `entries!` enables.
unsafe impl Vector for Registers {
    type Bytes = v128;
    /// Of rows 0 and 1, and of rows 2 and 3: the four bytes of a row have four sums.
    type Sum = [v128; 2];
    const ROWS: usize = 4;
    /// The products are of signed bytes.
    const UNSIGNED: bool = false;

    #[inline(always)]
    fn max_products(most: usize) -> usize {
        max_singles(most)
    }
    #[inline(always)]
    unsafe fn fill(byte: u8) -> v128 {
        u8x16_splat(byte)
    }
    #[inline(always)]
    unsafe fn splat(four: i32) -> v128 {
        i32x4_splat(four)
    }
    #[inline(always)]
    unsafe fn and(a: v128, b: v128) -> v128 {
        v128_and(a, b)
    }
    #[inline(always)]
    unsafe fn down(codes: v128, bits: usize) -> v128 {
        u16x8_shr(codes, bits as u32)
    }
    #[inline(always)]
    unsafe fn zero() -> [v128; 2] {
        [i16x8_splat(0); 2]
    }
    #[inline(always)]
    unsafe fn dot([low, high]: [v128; 2], codes: v128, x: v128) -> [v128; 2] {
        [
            i16x8_add(low, i16x8_extmul_low_i8x16(codes, x)),
            i16x8_add(high, i16x8_extmul_high_i8x16(codes, x)),
        ]
    }
    vector_functions! {
        fn load(from: *const u8) -> v128 { v128_load(from.cast()) }
        fn add(sum: [v128; 2], up: u32, down: u32, sums: *mut i32) {
            let low = i32x4_extadd_pairwise_i16x8(sum[0]);
            let high = i32x4_extadd_pairwise_i16x8(sum[1]);
            let sum = i32x4_add(
                i32x4_shuffle::<0, 2, 4, 6>(low, high),
                i32x4_shuffle::<1, 3, 5, 7>(low, high),
            );
            let total = i32x4_shr(i32x4_shl(sum, up), down);
            v128_store(sums.cast(), i32x4_add(v128_load(sums.cast()), total))
        }
    }
}

entries!(Registers, "simd128", rows 2, in place 1 1);
