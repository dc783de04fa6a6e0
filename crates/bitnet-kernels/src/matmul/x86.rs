//! Registers of x86-64.

use super::coding::{self, Coding};
use super::shape::STEP_BYTES;
use super::tiles::{self, Columns, PanelSums};
use super::trits;
use super::vector::{self, Vector, entries, max_pairs, max_quads, vector_functions};
use std::arch::x86_64::*;

/// Bytes by which prefetches are ahead of the weights: into the second cache, then into the first.
/// The scheduler holds the products of some steps that wait for memory and no load beyond them; a
/// prefetch waits for nothing.
const AHEAD: [usize; 2] = [12288, 3072];

/// Prefetches the lines of a step, [`AHEAD`] of the one at `at`.
#[inline(always)]
fn prefetch(at: *const u8) {
    for line in 0..STEP_BYTES / 64 {
        // SAFETY: every x86-64 has SSE, and a prefetch of any address is allowed.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD[0] + 64 * line).cast());
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD[1] + 64 * line).cast());
        }
    }
}

/// One instruction set: its registers, by the names of their intrinsics, then its kernels.
macro_rules! registers {
    (
        $module:ident, $features:literal, $doc:literal, $register:ty, $rows:literal,
        unsigned $unsigned:literal, products $max_products:expr,
        load $load:ident, fill $fill:ident, splat $splat:ident, and $and:ident, down $down:ident,
        zero $zero:ident, store $store:ident, add $add:ident, left $left:ident, right $right:ident,
        dot $dot:expr, wide $wide:expr,
        entries $($entries:tt)*
    ) => {
        pub(crate) mod $module {
            use super::*;

            #[doc = $doc]
            pub(super) struct Registers;

            // SAFETY: every intrinsic belongs to the features of the module, which `entries!`
            // enables.
            unsafe impl Vector for Registers {
                type Bytes = $register;
                type Sum = $register;
                const ROWS: usize = $rows;
                const UNSIGNED: bool = $unsigned;

                #[inline(always)]
                fn max_products(most: usize) -> usize {
                    $max_products(most)
                }
                #[inline(always)]
                unsafe fn prefetch(at: *const u8) {
                    prefetch(at);
                }
                vector_functions! {
                    fn load(from: *const u8) -> $register { $load(from.cast()) }
                    fn fill(byte: u8) -> $register { $fill(byte.cast_signed()) }
                    fn splat(four: i32) -> $register { $splat(four) }
                    fn and(a: $register, b: $register) -> $register { $and(a, b) }
                    fn down(codes: $register, bits: usize) -> $register {
                        match bits {
                            1 => $down::<1>(codes),
                            2 => $down::<2>(codes),
                            4 => $down::<4>(codes),
                            _ => $down::<8>(codes),
                        }
                    }
                    fn zero() -> $register { $zero() }
                    fn dot(sum: $register, codes: $register, x: $register) -> $register {
                        $dot(sum, codes, x)
                    }
                    fn add(sum: $register, up: u32, down: u32, sums: *mut i32) {
                        let up = _mm_cvtsi32_si128(up.cast_signed());
                        let down = _mm_cvtsi32_si128(down.cast_signed());
                        let total = $right($left($wide(sum), up), down);
                        $store(sums.cast(), $add($load(sums.cast()), total));
                    }
                }
            }

            entries!(Registers, $features, $($entries)*);
        }
    };
}

registers!(
    sse41, "ssse3,sse4.1", "128 bits, products added two at a time in 16 bits.", __m128i, 4,
    unsigned false, products max_pairs,
    load _mm_loadu_si128, fill _mm_set1_epi8, splat _mm_set1_epi32, and _mm_and_si128,
    down _mm_srli_epi16, zero _mm_setzero_si128, store _mm_storeu_si128, add _mm_add_epi32,
    left _mm_sll_epi32, right _mm_sra_epi32,
    dot |sum, codes, x| _mm_add_epi16(sum, _mm_maddubs_epi16(codes, x)),
    wide |sum| _mm_madd_epi16(sum, _mm_set1_epi16(1)),
    entries rows 2, in place 1 1
);
registers!(
    avx2, "avx2", "256 bits, products added two at a time in 16 bits.", __m256i, 8,
    unsigned false, products max_pairs,
    load _mm256_loadu_si256, fill _mm256_set1_epi8, splat _mm256_set1_epi32, and _mm256_and_si256,
    down _mm256_srli_epi16, zero _mm256_setzero_si256, store _mm256_storeu_si256,
    add _mm256_add_epi32, left _mm256_sll_epi32, right _mm256_sra_epi32,
    dot |sum, codes, x| _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)),
    wide |sum| _mm256_madd_epi16(sum, _mm256_set1_epi16(1)),
    entries rows 2, in place 1 1
);
registers!(
    avx_vnni, "avx2,avxvnni", "256 bits with byte dot products.", __m256i, 8,
    unsigned true, products max_quads,
    load _mm256_loadu_si256, fill _mm256_set1_epi8, splat _mm256_set1_epi32, and _mm256_and_si256,
    down _mm256_srli_epi16, zero _mm256_setzero_si256, store _mm256_storeu_si256,
    add _mm256_add_epi32, left _mm256_sll_epi32, right _mm256_sra_epi32,
    dot |sum, codes, x| _mm256_dpbusd_avx_epi32(sum, codes, x),
    wide |sum| sum,
    entries rows 2, in place 4 2
);
registers!(
    avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", "512 bits with byte dot products.",
    __m512i, 16,
    unsigned true, products max_quads,
    load _mm512_loadu_si512, fill _mm512_set1_epi8, splat _mm512_set1_epi32, and _mm512_and_si512,
    down _mm512_srli_epi16, zero _mm512_setzero_si512, store _mm512_storeu_si512,
    add _mm512_add_epi32, left _mm512_sll_epi32, right _mm512_sra_epi32,
    dot |sum, codes, x| _mm512_dpbusd_epi32(sum, codes, x),
    wide |sum| sum,
    entries rows 4, in place 4 2
);

/// What VBMI adds to AVX-512: five trits of a byte by table.
pub(crate) mod vbmi {
    use super::*;

    /// Steps that are summed before fields are shifted down: the top field holds its code times 64.
    const STEPS: usize = 1 << 14;
    const _: () = assert!(STEPS <= max_quads(2 << 6));

    /// Four trits in 2-bit fields, and the fifth.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn split(tables: &[__m512i; 3], bytes: __m512i) -> [__m512i; 2] {
        let turned = _mm512_movepi8_mask(bytes);
        let quads = _mm512_permutex2var_epi8(tables[0], bytes, tables[1]);
        let fifths = _mm512_permutexvar_epi8(bytes, tables[2]);
        // No field exceeds 2, so nothing is borrowed.
        [
            _mm512_mask_sub_epi8(
                quads,
                turned,
                _mm512_set1_epi8(0b10_10_10_10u8.cast_signed()),
                quads,
            ),
            _mm512_mask_sub_epi8(fifths, turned, _mm512_set1_epi8(2), fifths),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn tables() -> [__m512i; 3] {
        let [low, high] = [0, 64].map(|at| trits::QUADS[at..at + 64].as_ptr());
        // SAFETY: 64 bytes each; the reads need no alignment.
        [low, high, trits::FIFTHS.as_ptr()].map(|table| unsafe { _mm512_loadu_si512(table.cast()) })
    }

    /// [`tiles::packed_sums`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    pub(crate) fn packed_sums(
        coding: Coding,
        weights: &[u8],
        x: Columns<'_>,
        sums: &mut [PanelSums],
    ) {
        if coding != Coding::Trits {
            return avx512::packed_sums(coding, weights, x, sums);
        }
        x.check(weights.len() / STEP_BYTES * coding.step(), sums.len());
        // SAFETY: `Columns::check` passed on the line above.
        unsafe {
            match sums.len() {
                1 => trits_tile::<1, 4>(weights, x, sums),
                2 => trits_tile::<2, 2>(weights, x, sums),
                3 => trits_tile::<3, 1>(weights, x, sums),
                4 => trits_tile::<4, 1>(weights, x, sums),
                5 => trits_tile::<5, 1>(weights, x, sums),
                6 => trits_tile::<6, 1>(weights, x, sums),
                _ => {}
            }
        }
    }

    /// [`vector::packed_sums`] with the fifth trit of each byte beside the four: it goes with
    /// field 0.
    ///
    /// # Safety
    /// [`Columns::check`] passed for the columns of `weights` and T tokens.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn trits_tile<const T: usize, const C: usize>(
        weights: &[u8],
        x: Columns<'_>,
        sums: &mut [PanelSums],
    ) {
        let masks: [__m512i; C] =
            std::array::from_fn(|c| _mm512_set1_epi8((3u8 << (2 * c)).cast_signed()));
        let tables = tables();
        for (block, weights) in weights.chunks(STEPS * STEP_BYTES).enumerate() {
            let mut acc = [[[_mm512_setzero_si512(); 4]; C]; T];
            for step in 0..weights.len() / STEP_BYTES {
                prefetch(weights.as_ptr().wrapping_add(step * STEP_BYTES));
                let split: [_; 4] = std::array::from_fn(|v| {
                    // SAFETY: 64 of the STEP_BYTES of a step of `weights`; unaligned.
                    split(&tables, unsafe {
                        _mm512_loadu_si512(weights.as_ptr().add(step * STEP_BYTES + 64 * v).cast())
                    })
                });
                let mut w = split.map(|[quads, _]| quads);
                for field in 0..5 {
                    if field > 0 && field < 4 && field % C == 0 {
                        w = w.map(|w| {
                            if C == 1 {
                                _mm512_srli_epi16::<2>(w)
                            } else {
                                _mm512_srli_epi16::<4>(w)
                            }
                        });
                    }
                    let (c, codes) = if field < 4 {
                        (field % C, w.map(|w| _mm512_and_si512(w, masks[field % C])))
                    } else {
                        (0, split.map(|[_, fifths]| fifths))
                    };
                    for (token, acc) in acc.iter_mut().enumerate() {
                        let at = token * x.stride
                            + (block * STEPS + step) * Coding::Trits.step()
                            + 4 * field;
                        // SAFETY: `Columns::check` passed by the function's contract, so that the
                        // columns of every step are inside `x`; the read needs no alignment.
                        let x = _mm512_set1_epi32(unsafe {
                            x.values.as_ptr().add(at).cast::<i32>().read_unaligned()
                        });
                        for (acc, codes) in acc[c].iter_mut().zip(codes) {
                            *acc = _mm512_dpbusd_epi32(*acc, codes, x);
                        }
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                for (c, acc) in acc.iter().enumerate() {
                    for (&acc, sums) in acc.iter().zip(sums.as_chunks_mut::<16>().0) {
                        // SAFETY: `sums` is a chunk of 16, the rows of a register.
                        unsafe { avx512::Registers::add(acc, 0, 2 * c as u32, sums.as_mut_ptr()) };
                    }
                }
            }
        }
    }

    /// [`coding::unpack`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    pub(crate) fn unpack_codes(coding: Coding, weights: &[u8], out: &mut [u8]) {
        if coding != Coding::Trits {
            return coding::unpack(coding, weights, out);
        }
        let (tables, mask) = (tables(), _mm512_set1_epi8(3));
        for (weights, out) in weights
            .as_chunks::<STEP_BYTES>()
            .0
            .iter()
            .zip(out.as_chunks_mut::<{ 5 * STEP_BYTES }>().0)
        {
            for (v, weights) in weights.as_chunks::<64>().0.iter().enumerate() {
                // SAFETY: 64 bytes; the read needs no alignment.
                let [quads, fifths] = split(&tables, unsafe {
                    _mm512_loadu_si512(weights.as_ptr().cast())
                });
                let fields = [
                    quads,
                    _mm512_srli_epi16::<2>(quads),
                    _mm512_srli_epi16::<4>(quads),
                    _mm512_srli_epi16::<6>(quads),
                    fifths,
                ];
                for (field, codes) in fields.into_iter().enumerate() {
                    let out = &mut out[field * STEP_BYTES + 64 * v..][..64];
                    // SAFETY: 64 bytes; the write needs no alignment. A fifth trit's code is its
                    // own under the mask.
                    unsafe {
                        _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_and_si512(codes, mask))
                    };
                }
            }
        }
    }
}
