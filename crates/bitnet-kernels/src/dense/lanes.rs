//! A step of 16 numbers in the registers of an instruction set. Every operation rounds as its plain
//! form does, so all give the same bits.

use super::LANES;
use super::matrix::f16_to_f32;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// 16 lanes of f32.
///
/// Weights in blocks come from a line of codes (`blocks`), whose rows' 16 lanes hold `BITS` bits
/// for each step.
///
/// # Safety
/// Every function may be called where the machine has the implementor's instruction set, and
/// nowhere else.
pub(super) trait Lanes: Copy {
    /// The codes of a row in a line.
    type Codes: Copy;
    /// What turns codes into weights.
    type Table: Copy;
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
    /// `(code − offset) · scale + minimum`, rounded once.
    unsafe fn table<const BITS: usize>(offset: u8, scale: f32, minimum: f32) -> Self::Table;
    /// Those of row `row` of the 64 bytes at `line`; three bytes more may be read.
    unsafe fn codes<const BITS: usize>(line: *const u8, row: usize) -> Self::Codes;
    /// The weights of a step of a line.
    unsafe fn weights<const BITS: usize>(
        codes: Self::Codes,
        step: usize,
        table: Self::Table,
    ) -> Self;
    /// Asks for the cache line at an address that may lie anywhere, to the nearest cache or to the
    /// one after it.
    unsafe fn ask<const NEAR: bool>(at: *const u8);
    /// `self · by`, lane by lane.
    unsafe fn times(self, by: Self) -> Self;
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
    type Codes = [u8; LANES];
    type Table = (f32, f32, f32);

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

    unsafe fn table<const BITS: usize>(offset: u8, scale: f32, minimum: f32) -> Self::Table {
        (offset.into(), scale, minimum)
    }

    unsafe fn codes<const BITS: usize>(line: *const u8, row: usize) -> Self::Codes {
        // SAFETY: the caller vouches for 64 bytes, which are never anything but bytes.
        let line: &[u8; 64] = unsafe { &*line.cast() };
        std::array::from_fn(|j| {
            line[if BITS == 8 {
                LANES * row + j
            } else {
                4 * j + row
            }]
        })
    }

    unsafe fn weights<const BITS: usize>(
        codes: Self::Codes,
        step: usize,
        (offset, scale, minimum): Self::Table,
    ) -> Self {
        Self(codes.map(|byte| {
            let code = if BITS == 8 {
                f32::from(byte.cast_signed())
            } else {
                f32::from(byte >> (BITS * step) & ((1 << BITS) - 1))
            };
            (code - offset).mul_add(scale, minimum)
        }))
    }

    unsafe fn ask<const NEAR: bool>(_: *const u8) {}

    unsafe fn times(self, by: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * by.0[i]))
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
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// The weights of eight lanes of codes.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn weights_of_8<const BITS: usize>(
    codes: __m256i,
    step: usize,
    (offset, scale, minimum): (__m256, __m256, __m256),
) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        if BITS == 8 {
            return _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scale, minimum);
        }
        let shifted = _mm256_srl_epi32(codes, _mm_cvtsi32_si128((BITS * step) as i32));
        let codes = _mm256_cvtepi32_ps(_mm256_and_si256(
            shifted,
            _mm256_set1_epi32((1 << BITS) - 1),
        ));
        _mm256_fmadd_ps(_mm256_sub_ps(codes, offset), scale, minimum)
    }
}

// SAFETY of every block below: the caller has the instruction set; loads and stores are unaligned
// and inside the arrays that they are given.
#[cfg(target_arch = "x86_64")]
#[allow(
    clippy::undocumented_unsafe_blocks,
    reason = "one comment above for all of them"
)]
impl Lanes for Avx512 {
    type Codes = __m512i;
    type Table = (__m512, __m512);

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
        unsafe {
            Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
                from.as_ptr().cast(),
            ))))
        }
    }

    #[inline(always)]
    unsafe fn table<const BITS: usize>(offset: u8, scale: f32, minimum: f32) -> Self::Table {
        unsafe {
            let (scale, minimum) = (_mm512_set1_ps(scale), _mm512_set1_ps(minimum));
            if BITS == 8 {
                return (scale, minimum);
            }
            // All 16 codes, or four times four: a place in the table is the lower four bits of a
            // lane.
            let codes: [f32; LANES] = std::array::from_fn(|i| (i % (1 << BITS)) as f32);
            let codes = _mm512_sub_ps(
                _mm512_loadu_ps(codes.as_ptr()),
                _mm512_set1_ps(offset.into()),
            );
            (_mm512_fmadd_ps(codes, scale, minimum), minimum)
        }
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(line: *const u8, row: usize) -> Self::Codes {
        unsafe {
            if BITS == 8 {
                return _mm512_cvtepi8_epi32(_mm_loadu_si128(line.add(LANES * row).cast()));
            }
            _mm512_loadu_si512(line.add(row).cast())
        }
    }

    #[inline(always)]
    unsafe fn weights<const BITS: usize>(
        codes: Self::Codes,
        step: usize,
        (table, minimum): Self::Table,
    ) -> Self {
        unsafe {
            if BITS == 8 {
                return Self(_mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), table, minimum));
            }
            Self(_mm512_permutexvar_ps(
                _mm512_srl_epi32(codes, _mm_cvtsi32_si128((BITS * step) as i32)),
                table,
            ))
        }
    }

    #[inline(always)]
    unsafe fn ask<const NEAR: bool>(at: *const u8) {
        unsafe {
            if NEAR {
                _mm_prefetch::<_MM_HINT_T0>(at.cast())
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at.cast())
            }
        }
    }

    #[inline(always)]
    unsafe fn times(self, by: Self) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, by.0)) }
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
        unsafe {
            total_of_8(_mm256_add_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            ))
        }
    }

    /// Halves of two registers side by side, level after level, so that each level adds the pairs
    /// of [`Lanes::total`] for two at once.
    #[inline(always)]
    unsafe fn totals(all: &[Self; 16]) -> [f32; 16] {
        unsafe {
            let zero = _mm512_setzero_ps();
            let (mut eights, mut fours, mut twos) = ([zero; 8], [zero; 4], [zero; 2]);
            for i in 0..8 {
                let [a, b] = [all[2 * i].0, all[2 * i + 1].0];
                eights[i] = _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
                    _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
                );
            }
            for i in 0..4 {
                let [a, b] = [eights[2 * i], eights[2 * i + 1]];
                fours[i] = _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
                );
            }
            for i in 0..2 {
                let [a, b] = [fours[2 * i], fours[2 * i + 1]];
                twos[i] = _mm512_add_ps(
                    _mm512_shuffle_ps::<0b01_00_01_00>(a, b),
                    _mm512_shuffle_ps::<0b11_10_11_10>(a, b),
                );
            }
            let [a, b] = twos;
            let ones = _mm512_add_ps(
                _mm512_shuffle_ps::<0b10_00_10_00>(a, b),
                _mm512_shuffle_ps::<0b11_01_11_01>(a, b),
            );
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
#[allow(
    clippy::undocumented_unsafe_blocks,
    reason = "one comment above for all of them"
)]
impl Lanes for Avx2 {
    type Codes = (__m256i, __m256i);
    type Table = (__m256, __m256, __m256);

    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn f32(from: &[f32; LANES]) -> Self {
        unsafe {
            Self(
                _mm256_loadu_ps(from.as_ptr()),
                _mm256_loadu_ps(from[8..].as_ptr()),
            )
        }
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
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(upper)),
            )
        }
    }

    #[inline(always)]
    unsafe fn table<const BITS: usize>(offset: u8, scale: f32, minimum: f32) -> Self::Table {
        unsafe {
            (
                _mm256_set1_ps(offset.into()),
                _mm256_set1_ps(scale),
                _mm256_set1_ps(minimum),
            )
        }
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(line: *const u8, row: usize) -> Self::Codes {
        unsafe {
            if BITS == 8 {
                let all = _mm_loadu_si128(line.add(LANES * row).cast());
                return (
                    _mm256_cvtepi8_epi32(all),
                    _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(all)),
                );
            }
            (
                _mm256_loadu_si256(line.add(row).cast()),
                _mm256_loadu_si256(line.add(32 + row).cast()),
            )
        }
    }

    #[inline(always)]
    unsafe fn weights<const BITS: usize>(
        codes: Self::Codes,
        step: usize,
        table: Self::Table,
    ) -> Self {
        unsafe {
            Self(
                weights_of_8::<BITS>(codes.0, step, table),
                weights_of_8::<BITS>(codes.1, step, table),
            )
        }
    }

    #[inline(always)]
    unsafe fn ask<const NEAR: bool>(at: *const u8) {
        unsafe {
            if NEAR {
                _mm_prefetch::<_MM_HINT_T0>(at.cast())
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at.cast())
            }
        }
    }

    #[inline(always)]
    unsafe fn times(self, by: Self) -> Self {
        unsafe { Self(_mm256_mul_ps(self.0, by.0), _mm256_mul_ps(self.1, by.1)) }
    }

    #[inline(always)]
    unsafe fn add_product(self, w: Self, x: Self) -> Self {
        unsafe {
            Self(
                _mm256_fmadd_ps(w.0, x.0, self.0),
                _mm256_fmadd_ps(w.1, x.1, self.1),
            )
        }
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
