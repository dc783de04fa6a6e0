//! Tile kernels for x86-64. Each loads a step once and meets it with up to six tokens.

use super::scalar::TOKENS;
use super::{BLOCK_STEPS, PANEL, STEP, STEP_BYTES};
use std::arch::x86_64::*;

/// One tile kernel, for a number of tokens that is known at compile time.
macro_rules! by_tokens {
    ($name:ident, $inner:ident, $features:literal, $($n:literal)+) => {
        /// As [`super::scalar::tile`].
        ///
        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        pub(crate) unsafe fn $name(weights: &[u8], x: &[i8], stride: usize, tokens: usize, sums: &mut [[i32; PANEL]; TOKENS]) {
            let steps = weights.len() / STEP_BYTES;
            // The bound of every pointer below: the last token's last step lies inside `x`.
            assert!(tokens <= TOKENS && (tokens == 0 || (tokens - 1) * stride + steps * STEP <= x.len()));
            match tokens {
                // SAFETY: the caller vouches for the features, the assertion above for the bounds.
                $($n => unsafe { $inner::<$n>(weights, x, stride, sums) },)+
                _ => {}
            }
        }
    };
}

by_tokens!(avx512_vnni, avx512_vnni_tokens, "AVX-512 F, BW and VNNI", 1 2 3 4 5 6);
by_tokens!(avx_vnni, avx_vnni_tokens, "AVX2 and AVX-VNNI", 1 2 3 4 5 6);
by_tokens!(avx2, avx2_tokens, "AVX2", 1 2 3 4 5 6);

/// Four activations of a token, as every lane meets them.
///
/// # Safety
/// `x + 4` bytes are readable.
#[inline(always)]
unsafe fn four(x: *const i8) -> i32 {
    // SAFETY: the caller's; the read needs no alignment.
    unsafe { x.cast::<i32>().read_unaligned() }
}

/// With one token, fields stay in place and have accumulators of their own; with more, shifting once serves all tokens.
///
/// # Safety
/// AVX-512 F, BW, VNNI; `x` holds T rows, `stride` apart, of the columns of `weights`' steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn avx512_vnni_tokens<const T: usize>(weights: &[u8], x: &[i8], stride: usize, sums: &mut [[i32; PANEL]; TOKENS]) {
    for (block, weights) in weights.chunks(BLOCK_STEPS * STEP_BYTES).enumerate() {
        let x = x[block * BLOCK_STEPS * STEP..].as_ptr();
        let steps = weights.len() / STEP_BYTES;
        let w = weights.as_ptr();
        let mut total = [[_mm512_setzero_si512(); 2]; T];
        if T == 1 {
            let mut acc = [[_mm512_setzero_si512(); 4]; 2];
            let masks = [0x0303_0303, 0x0c0c_0c0c, 0x3030_3030, 0xc0c0_c0c0u32 as i32].map(|m| _mm512_set1_epi32(m));
            for step in 0..steps {
                // SAFETY: `step < steps` whole steps of `weights` and of the one token.
                unsafe {
                    let w = [load512(w.add(step * STEP_BYTES)), load512(w.add(step * STEP_BYTES + 64))];
                    for field in 0..4 {
                        let x = _mm512_set1_epi32(four(x.add(step * STEP + 4 * field)));
                        for half in 0..2 {
                            acc[half][field] = _mm512_dpbusd_epi32(acc[half][field], _mm512_and_si512(w[half], masks[field]), x);
                        }
                    }
                }
            }
            for half in 0..2 {
                let [a, b, c, d] = acc[half];
                let ab = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
                let cd = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
                total[0][half] = _mm512_add_epi32(ab, cd);
            }
        } else {
            let mask = _mm512_set1_epi8(3);
            for step in 0..steps {
                // SAFETY: `step < steps` whole steps of `weights` and of each of T tokens.
                unsafe {
                    let mut w = [load512(w.add(step * STEP_BYTES)), load512(w.add(step * STEP_BYTES + 64))];
                    for field in 0..4 {
                        let codes = w.map(|w| _mm512_and_si512(w, mask));
                        for (token, total) in total.iter_mut().enumerate() {
                            let x = _mm512_set1_epi32(four(x.add(token * stride + step * STEP + 4 * field)));
                            for half in 0..2 {
                                total[half] = _mm512_dpbusd_epi32(total[half], codes[half], x);
                            }
                        }
                        w = w.map(|w| _mm512_srli_epi16::<2>(w));
                    }
                }
            }
        }
        for (total, sums) in total.iter().zip(sums.iter_mut()) {
            for (half, &total) in total.iter().enumerate() {
                let sums = &mut sums[16 * half..16 * half + 16];
                // SAFETY: 16 sums of 4 bytes, unaligned access.
                unsafe {
                    let old = _mm512_loadu_si512(sums.as_ptr().cast());
                    _mm512_storeu_si512(sums.as_mut_ptr().cast(), _mm512_add_epi32(old, total));
                }
            }
        }
    }
}

/// # Safety
/// 64 bytes are readable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load512(p: *const u8) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_loadu_si512(p.cast()) }
}

/// The four eights of rows of a panel with 256-bit registers.
///
/// # Safety
/// AVX2 and AVX-VNNI; bounds as in [`avx512_vnni_tokens`].
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn avx_vnni_tokens<const T: usize>(weights: &[u8], x: &[i8], stride: usize, sums: &mut [[i32; PANEL]; TOKENS]) {
    let steps = weights.len() / STEP_BYTES;
    let mask = _mm256_set1_epi8(3);
    // Rows in halves, so that T · 2 accumulators, two weights and one activation fit 16 registers.
    for half in 0..2 {
        let mut total = [[_mm256_setzero_si256(); 2]; T];
        for step in 0..steps {
            // SAFETY: `step < steps` whole steps of `weights` and of each of T tokens.
            unsafe {
                let at = weights.as_ptr().add(step * STEP_BYTES + 64 * half);
                let mut w = [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())];
                for field in 0..4 {
                    let codes = w.map(|w| _mm256_and_si256(w, mask));
                    for (token, total) in total.iter_mut().enumerate() {
                        let x = _mm256_set1_epi32(four(x.as_ptr().add(token * stride + step * STEP + 4 * field)));
                        for i in 0..2 {
                            total[i] = _mm256_dpbusd_avx_epi32(total[i], codes[i], x);
                        }
                    }
                    w = w.map(|w| _mm256_srli_epi16::<2>(w));
                }
            }
        }
        store256(&total, half, sums);
    }
}

/// Steps whose products fit 16 bits: a pair of codes ≤ 2 times int8 lies in −512 ..= 508, and a step adds four pairs.
const PAIR_STEPS: usize = 16;
const _: () = assert!(PAIR_STEPS * 4 * 512 <= 1 << 15);

/// # Safety
/// AVX2; bounds as in [`avx512_vnni_tokens`].
#[target_feature(enable = "avx2")]
unsafe fn avx2_tokens<const T: usize>(weights: &[u8], x: &[i8], stride: usize, sums: &mut [[i32; PANEL]; TOKENS]) {
    let steps = weights.len() / STEP_BYTES;
    let (mask, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi16(1));
    for half in 0..2 {
        let mut total = [[_mm256_setzero_si256(); 2]; T];
        let mut first = 0;
        while first < steps {
            let last = (first + PAIR_STEPS).min(steps);
            let mut pairs = [[_mm256_setzero_si256(); 2]; T];
            for step in first..last {
                // SAFETY: `step < steps` whole steps of `weights` and of each of T tokens.
                unsafe {
                    let at = weights.as_ptr().add(step * STEP_BYTES + 64 * half);
                    let mut w = [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())];
                    for field in 0..4 {
                        let codes = w.map(|w| _mm256_and_si256(w, mask));
                        for (token, pairs) in pairs.iter_mut().enumerate() {
                            let x = _mm256_set1_epi32(four(x.as_ptr().add(token * stride + step * STEP + 4 * field)));
                            for i in 0..2 {
                                pairs[i] = _mm256_add_epi16(pairs[i], _mm256_maddubs_epi16(codes[i], x));
                            }
                        }
                        w = w.map(|w| _mm256_srli_epi16::<2>(w));
                    }
                }
            }
            for (total, pairs) in total.iter_mut().zip(&pairs) {
                for i in 0..2 {
                    total[i] = _mm256_add_epi32(total[i], _mm256_madd_epi16(pairs[i], ones));
                }
            }
            first = last;
        }
        store256(&total, half, sums);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store256<const T: usize>(total: &[[__m256i; 2]; T], half: usize, sums: &mut [[i32; PANEL]; TOKENS]) {
    for (total, sums) in total.iter().zip(sums.iter_mut()) {
        for (i, &total) in total.iter().enumerate() {
            let sums = &mut sums[16 * half + 8 * i..][..8];
            // SAFETY: 8 sums of 4 bytes, unaligned access.
            unsafe {
                let old = _mm256_loadu_si256(sums.as_ptr().cast());
                _mm256_storeu_si256(sums.as_mut_ptr().cast(), _mm256_add_epi32(old, total));
            }
        }
    }
}
