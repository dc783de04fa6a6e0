//! A step of 16 numbers in the registers of an instruction set. Every operation rounds as its plain form does, so all give the same bits.

use super::LANES;
use super::matrix::f16_to_f32;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// 16 lanes of f32.
///
/// # Safety
/// Every function may be called where the machine has the implementor's instruction set, and nowhere else.
pub(super) trait Lanes: Copy {
    /// Zeros.
    unsafe fn zero() -> Self;
    /// As they are.
    unsafe fn f32(from: &[f32; LANES]) -> Self;
    /// From binary16.
    unsafe fn f16(from: &[u16; LANES]) -> Self;
    /// From bfloat16.
    unsafe fn bf16(from: &[u16; LANES]) -> Self;
    /// From integers.
    unsafe fn i8(from: &[i8; LANES]) -> Self;
    /// From the low or the high halves of bytes, less 8, times a scale.
    unsafe fn i4(from: &[u8; LANES], high: bool, scale: f32) -> Self;
    /// Asks for the cache line at an address that may lie anywhere.
    unsafe fn ask(at: *const u8);
    /// `self · by`, lane by lane.
    unsafe fn times(self, by: f32) -> Self;
    /// `self + w · x` with one rounding.
    unsafe fn add_product(self, w: Self, x: Self) -> Self;
    /// The lanes.
    unsafe fn store(self, to: &mut [f32; LANES]);
    /// The sum, in pairs: 16 → 8 → 4 → 2 → 1, lane i with the one half the width above it.
    unsafe fn total(self) -> f32;
    /// The sum of each.
    #[inline(always)]
    unsafe fn totals(all: &[Self; 16]) -> [f32; 16] {
        let mut totals = [0.0; 16];
        for (total, lanes) in totals.iter_mut().zip(all) {
            // SAFETY: the caller's.
            *total = unsafe { lanes.total() };
        }
        totals
    }
}

/// The plain form.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; LANES]);

impl Lanes for Plain {
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }

    unsafe fn f32(from: &[f32; LANES]) -> Self {
        Self(*from)
    }

    unsafe fn f16(from: &[u16; LANES]) -> Self {
        Self(from.map(f16_to_f32))
    }

    unsafe fn bf16(from: &[u16; LANES]) -> Self {
        Self(from.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    unsafe fn i8(from: &[i8; LANES]) -> Self {
        Self(from.map(f32::from))
    }

    unsafe fn i4(from: &[u8; LANES], high: bool, scale: f32) -> Self {
        Self(from.map(|byte| f32::from((if high { byte >> 4 } else { byte & 15 }) as i8 - 8) * scale))
    }

    unsafe fn ask(_: *const u8) {}

    unsafe fn times(self, by: f32) -> Self {
        Self(self.0.map(|x| x * by))
    }

    unsafe fn add_product(self, w: Self, x: Self) -> Self {
        Self(std::array::from_fn(|i| w.0[i].mul_add(x.0[i], self.0[i])))
    }

    unsafe fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

    unsafe fn total(self) -> f32 {
        super::total(self.0)
    }
}

/// AVX-512 F and DQ.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

/// AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

/// The sum of eight lanes in pairs.
///
/// # Safety
/// The machine has AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn total_of_8(eight: __m256) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

// SAFETY of every block below: the caller has the instruction set; loads and stores are unaligned and inside the arrays that they are given.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "one comment above for all of them")]
impl Lanes for Avx512 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn f32(from: &[f32; LANES]) -> Self {
        unsafe { Self(_mm512_loadu_ps(from.as_ptr())) }
    }

    #[inline(always)]
    unsafe fn f16(from: &[u16; LANES]) -> Self {
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))) }
    }

    #[inline(always)]
    unsafe fn bf16(from: &[u16; LANES]) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn i8(from: &[i8; LANES]) -> Self {
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast())))) }
    }

    #[inline(always)]
    unsafe fn i4(from: &[u8; LANES], high: bool, scale: f32) -> Self {
        unsafe {
            let table = _mm512_setr_ps(-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
            let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            let table = _mm512_mul_ps(table, _mm512_set1_ps(scale));
            // The lower four bits of a lane are the place in the table.
            Self(_mm512_permutexvar_ps(if high { _mm512_srli_epi32::<4>(wide) } else { wide }, table))
        }
    }

    #[inline(always)]
    unsafe fn ask(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn times(self, by: f32) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, _mm512_set1_ps(by))) }
    }

    #[inline(always)]
    unsafe fn add_product(self, w: Self, x: Self) -> Self {
        unsafe { Self(_mm512_fmadd_ps(w.0, x.0, self.0)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        unsafe { total_of_8(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))) }
    }

    /// Halves of two registers side by side, level after level, so that each level adds the pairs of [`Lanes::total`] for two at once.
    #[inline(always)]
    unsafe fn totals(all: &[Self; 16]) -> [f32; 16] {
        unsafe {
            let zero = _mm512_setzero_ps();
            let (mut eights, mut fours, mut twos) = ([zero; 8], [zero; 4], [zero; 2]);
            for i in 0..8 {
                let [a, b] = [all[2 * i].0, all[2 * i + 1].0];
                eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
            }
            for i in 0..4 {
                let [a, b] = [eights[2 * i], eights[2 * i + 1]];
                fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b));
            }
            for i in 0..2 {
                let [a, b] = [fours[2 * i], fours[2 * i + 1]];
                twos[i] = _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(a, b), _mm512_shuffle_ps::<0b11_10_11_10>(a, b));
            }
            let [a, b] = twos;
            let ones = _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b));
            // Lane 4k + m is the sum of register 4m + k.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let mut totals = [0.0; 16];
            _mm512_storeu_ps(totals.as_mut_ptr(), _mm512_permutexvar_ps(order, ones));
            totals
        }
    }
}

// SAFETY of every block below: as above.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "one comment above for all of them")]
impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn f32(from: &[f32; LANES]) -> Self {
        unsafe { Self(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from[8..].as_ptr())) }
    }

    #[inline(always)]
    unsafe fn f16(from: &[u16; LANES]) -> Self {
        unsafe {
            let half = |from: &[u16]| _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()));
            Self(half(&from[..8]), half(&from[8..]))
        }
    }

    #[inline(always)]
    unsafe fn bf16(from: &[u16; LANES]) -> Self {
        unsafe {
            let wide = |from: &[u16]| _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            let shifted = |wide: __m256i| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide));
            Self(shifted(wide(&from[..8])), shifted(wide(&from[8..])))
        }
    }

    #[inline(always)]
    unsafe fn i8(from: &[i8; LANES]) -> Self {
        unsafe {
            let all = _mm_loadu_si128(from.as_ptr().cast());
            let upper = _mm_srli_si128::<8>(all);
            Self(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(upper)))
        }
    }

    #[inline(always)]
    unsafe fn i4(from: &[u8; LANES], high: bool, scale: f32) -> Self {
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            let codes = _mm_and_si128(if high { _mm_srli_epi16::<4>(bytes) } else { bytes }, _mm_set1_epi8(15));
            let mut values = [0; LANES];
            _mm_storeu_si128(values.as_mut_ptr().cast(), _mm_sub_epi8(codes, _mm_set1_epi8(8)));
            Self::i8(&values).times(scale)
        }
    }

    #[inline(always)]
    unsafe fn ask(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn times(self, by: f32) -> Self {
        unsafe {
            let by = _mm256_set1_ps(by);
            Self(_mm256_mul_ps(self.0, by), _mm256_mul_ps(self.1, by))
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, w: Self, x: Self) -> Self {
        unsafe { Self(_mm256_fmadd_ps(w.0, x.0, self.0), _mm256_fmadd_ps(w.1, x.1, self.1)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), self.0);
            _mm256_storeu_ps(to[8..].as_mut_ptr(), self.1);
        }
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        unsafe { total_of_8(_mm256_add_ps(self.0, self.1)) }
    }
}
