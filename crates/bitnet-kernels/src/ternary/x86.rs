//! Tiles for x86-64.
//!
//! AVX-512 takes all 64 rows of a step in four registers. With 256-bit registers a tile goes through [`BLOCK`] steps, 4 KiB of weights,
//! four times, 16 rows each, so that the accumulators of six tokens fit 16 registers; blocks follow one another, which keeps the
//! stream of weights sequential.

use super::tiles::{Columns, Sums, Tiles, finish, unpack};
use super::{MAX_PRODUCT, PANEL, STEP, STEP_BYTES, STEP_CODES};
use std::arch::x86_64::*;

pub(super) const AVX512: Tiles =
    Tiles { direct: avx512::direct, dense: avx512::dense, unpack: avx512::unpack_codes, finish: avx512::finish_rows };
pub(super) const AVX_VNNI: Tiles =
    Tiles { direct: avx_vnni::direct, dense: avx_vnni::dense, unpack: avx_vnni::unpack_codes, finish: avx_vnni::finish_rows };
pub(super) const AVX2: Tiles = Tiles { direct: avx2::direct, dense: avx2::dense, unpack: avx2::unpack_codes, finish: avx2::finish_rows };

/// Steps that a 256-bit tile goes through before it adds to the sums.
const BLOCK: usize = 16;

// AVX2 adds two products at once in 16 bits, four times a step.
const _: () = assert!((BLOCK * 4) as i64 * 2 * MAX_PRODUCT <= 1 << 15);

/// Four activations of a token, as every lane meets them.
///
/// # Safety
/// `x + 4` bytes are readable.
#[inline(always)]
unsafe fn four(x: *const i8) -> i32 {
    // SAFETY: the caller's; the read needs no alignment.
    unsafe { x.cast::<i32>().read_unaligned() }
}

/// Entry points: bounds, the number of tokens as a constant, and the plain loops under the features.
macro_rules! entries {
    ($features:literal) => {
        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn direct(weights: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
            x.check(weights.len() / STEP_BYTES * STEP, sums.len());
            // SAFETY: the tile's bound was checked on the line above.
            unsafe {
                match sums.len() {
                    1 => direct_tile::<1, 4>(weights, x, sums),
                    2 => direct_tile::<2, 2>(weights, x, sums),
                    3 => direct_tile::<3, 1>(weights, x, sums),
                    4 => direct_tile::<4, 1>(weights, x, sums),
                    5 => direct_tile::<5, 1>(weights, x, sums),
                    6 => direct_tile::<6, 1>(weights, x, sums),
                    _ => {}
                }
            }
        }

        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn dense(codes: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
            x.check(codes.len() / STEP_CODES * STEP, sums.len());
            // SAFETY: the tile's bound was checked on the line above.
            unsafe {
                match sums.len() {
                    1 => dense_tile::<1>(codes, x, sums),
                    2 => dense_tile::<2>(codes, x, sums),
                    3 => dense_tile::<3>(codes, x, sums),
                    4 => dense_tile::<4>(codes, x, sums),
                    5 => dense_tile::<5>(codes, x, sums),
                    6 => dense_tile::<6>(codes, x, sums),
                    _ => {}
                }
            }
        }

        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn unpack_codes(weights: &[u8], out: &mut [u8]) {
            unpack(weights, out);
        }

        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn finish_rows(term: &Term<'_>, sums: &Sums, out: &mut [f32]) {
            // With a constant length the loops have no tail.
            match out.as_chunks_mut::<PANEL>().0 {
                [out] => finish(term, sums, out),
                _ => finish(term, sums, out),
            }
        }
    };
}

mod avx512 {
    use super::super::tiles::Term;
    use super::*;

    entries!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

    /// Bytes ahead at which weights are asked for. The scheduler holds the products of some three steps that wait for memory and no load
    /// beyond them; a prefetch waits for nothing.
    const AHEAD: usize = 12288;
    /// Steps that are summed before fields are shifted down.
    const FIELD_STEPS: usize = 1 << 14;
    // The top field holds its code times 64 and has four products a step.
    const _: () = assert!(FIELD_STEPS as i64 * 4 * 64 * MAX_PRODUCT <= i32::MAX as i64);

    /// Fields f with the same f mod C share accumulators: C = 4 needs no shift, C = 1 a shift for each field.
    ///
    /// # Safety
    /// `x` holds T rows of the columns of `weights`' steps.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn direct_tile<const T: usize, const C: usize>(weights: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
        let masks: [__m512i; C] = std::array::from_fn(|c| _mm512_set1_epi8((3u8 << (2 * c)) as i8));
        for (block, weights) in weights.chunks(FIELD_STEPS * STEP_BYTES).enumerate() {
            let (steps, w) = (weights.len() / STEP_BYTES, weights.as_ptr());
            let mut acc = [[[_mm512_setzero_si512(); 4]; C]; T];
            for step in 0..steps {
                for line in 0..4 {
                    _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(step * STEP_BYTES + 64 * line + AHEAD).cast());
                }
                // SAFETY: inside `weights`, which has `steps` whole steps.
                let mut w: [__m512i; 4] = std::array::from_fn(|v| unsafe { _mm512_loadu_si512(w.add(step * STEP_BYTES + 64 * v).cast()) });
                for field in 0..4 {
                    if field > 0 && field % C == 0 {
                        w = w.map(|w| if C == 1 { _mm512_srli_epi16::<2>(w) } else { _mm512_srli_epi16::<4>(w) });
                    }
                    let codes = w.map(|w| _mm512_and_si512(w, masks[field % C]));
                    for (token, acc) in acc.iter_mut().enumerate() {
                        let at = token * x.stride + (block * FIELD_STEPS + step) * STEP + 4 * field;
                        // SAFETY: inside `x`, which the caller vouches for.
                        let x = _mm512_set1_epi32(unsafe { four(x.values.as_ptr().add(at)) });
                        for (acc, codes) in acc[field % C].iter_mut().zip(codes) {
                            *acc = _mm512_dpbusd_epi32(*acc, codes, x);
                        }
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                for (v, sums) in sums.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    let mut total = acc[0][v];
                    for (c, acc) in acc.iter().enumerate().skip(1) {
                        total = _mm512_add_epi32(total, _mm512_sra_epi32(acc[v], _mm_cvtsi32_si128(2 * c as i32)));
                    }
                    add(sums, total);
                }
            }
        }
    }

    /// # Safety
    /// `x` holds T rows of the columns of `codes`' steps.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn dense_tile<const T: usize>(codes: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
        let mut acc = [[_mm512_setzero_si512(); 4]; T];
        for quad in 0..codes.len() / (4 * PANEL) {
            let at = codes.as_ptr().wrapping_add(quad * 4 * PANEL);
            // SAFETY: inside `codes`, which has so many quads.
            let w: [__m512i; 4] = std::array::from_fn(|v| unsafe { _mm512_loadu_si512(at.add(64 * v).cast()) });
            for (token, acc) in acc.iter_mut().enumerate() {
                // SAFETY: inside `x`, which the caller vouches for.
                let x = _mm512_set1_epi32(unsafe { four(x.values.as_ptr().add(token * x.stride + 4 * quad)) });
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = _mm512_dpbusd_epi32(*acc, w, x);
                }
            }
        }
        for (acc, sums) in acc.iter().zip(sums) {
            for (&acc, sums) in acc.iter().zip(sums.as_chunks_mut::<16>().0) {
                add(sums, acc);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(sums: &mut [i32; 16], total: __m512i) {
        // SAFETY: 16 sums of 4 bytes; neither access needs alignment.
        unsafe {
            let old = _mm512_loadu_si512(sums.as_ptr().cast());
            _mm512_storeu_si512(sums.as_mut_ptr().cast(), _mm512_add_epi32(old, total));
        }
    }
}

/// The 256-bit tiles. `$dot(acc, codes, x)` adds products, `$close(acc)` makes 32-bit sums of an accumulator.
macro_rules! narrow {
    ($module:ident, $features:literal, $dot:expr, $close:expr) => {
        mod $module {
            use super::super::tiles::Term;
            use super::*;

            entries!($features);

            /// Fields are shifted down one after the other: `C` is for wider registers.
            ///
            /// # Safety
            /// `x` holds T rows of the columns of `weights`' steps.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn direct_tile<const T: usize, const C: usize>(weights: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
                let mask = _mm256_set1_epi8(3);
                for (block, weights) in weights.chunks(BLOCK * STEP_BYTES).enumerate() {
                    for quarter in 0..4 {
                        let mut acc = [[_mm256_setzero_si256(); 2]; T];
                        for step in 0..weights.len() / STEP_BYTES {
                            let at = weights.as_ptr().wrapping_add(step * STEP_BYTES + 64 * quarter);
                            // SAFETY: inside `weights`, which has so many steps.
                            let mut w: [__m256i; 2] = std::array::from_fn(|v| unsafe { _mm256_loadu_si256(at.add(32 * v).cast()) });
                            for field in 0..4 {
                                let codes = w.map(|w| _mm256_and_si256(w, mask));
                                for (token, acc) in acc.iter_mut().enumerate() {
                                    let at = token * x.stride + (block * BLOCK + step) * STEP + 4 * field;
                                    // SAFETY: inside `x`, which the caller vouches for.
                                    let x = _mm256_set1_epi32(unsafe { four(x.values.as_ptr().add(at)) });
                                    for (acc, codes) in acc.iter_mut().zip(codes) {
                                        *acc = $dot(*acc, codes, x);
                                    }
                                }
                                w = w.map(|w| _mm256_srli_epi16::<2>(w));
                            }
                        }
                        for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                            for (&acc, sums) in acc.iter().zip(&mut sums.as_chunks_mut::<8>().0[2 * quarter..]) {
                                add(sums, $close(acc));
                            }
                        }
                    }
                }
            }

            /// # Safety
            /// `x` holds T rows of the columns of `codes`' steps.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn dense_tile<const T: usize>(codes: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
                for (block, codes) in codes.chunks(BLOCK * STEP_CODES).enumerate() {
                    for quarter in 0..4 {
                        let mut acc = [[_mm256_setzero_si256(); 2]; T];
                        for quad in 0..codes.len() / (4 * PANEL) {
                            let at = codes.as_ptr().wrapping_add(quad * 4 * PANEL + 64 * quarter);
                            // SAFETY: inside `codes`, which has so many quads.
                            let w: [__m256i; 2] = std::array::from_fn(|v| unsafe { _mm256_loadu_si256(at.add(32 * v).cast()) });
                            for (token, acc) in acc.iter_mut().enumerate() {
                                let at = token * x.stride + block * BLOCK * STEP + 4 * quad;
                                // SAFETY: inside `x`, which the caller vouches for.
                                let x = _mm256_set1_epi32(unsafe { four(x.values.as_ptr().add(at)) });
                                for (acc, w) in acc.iter_mut().zip(w) {
                                    *acc = $dot(*acc, w, x);
                                }
                            }
                        }
                        for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                            for (&acc, sums) in acc.iter().zip(&mut sums.as_chunks_mut::<8>().0[2 * quarter..]) {
                                add(sums, $close(acc));
                            }
                        }
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn add(sums: &mut [i32; 8], total: __m256i) {
                // SAFETY: 8 sums of 4 bytes; neither access needs alignment.
                unsafe {
                    let old = _mm256_loadu_si256(sums.as_ptr().cast());
                    _mm256_storeu_si256(sums.as_mut_ptr().cast(), _mm256_add_epi32(old, total));
                }
            }
        }
    };
}

narrow!(avx_vnni, "avx2,avxvnni", _mm256_dpbusd_avx_epi32, |acc| acc);
narrow!(avx2, "avx2", |acc, codes, x| _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x)), |acc| _mm256_madd_epi16(
    acc,
    _mm256_set1_epi16(1)
));
