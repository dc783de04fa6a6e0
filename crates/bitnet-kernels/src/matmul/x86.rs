//! Registers of x86-64.

use super::coding::{Coding, unpack};
use super::float::{self, Float};
use super::tiles::{self, Columns, Sums, Term, Tiles, finish};
use super::vector::{self, Vector, entries, room_of_pairs, room_of_quads};
use super::{PANEL, STEP_BYTES, trits};
use std::arch::x86_64::*;

macro_rules! tiles_of {
    ($module:ident) => {
        Tiles {
            direct: $module::direct,
            dense: $module::dense,
            unpack: $module::unpack_codes,
            finish: $module::finish_rows,
            float: $module::float,
        }
    };
}
pub(super) const SSE41: Tiles = tiles_of!(sse41);
pub(super) const AVX2: Tiles = tiles_of!(avx2);
pub(super) const AVX_VNNI: Tiles = tiles_of!(avx_vnni);
pub(super) const AVX512: Tiles = tiles_of!(avx512);
pub(super) const AVX512_VBMI: Tiles = Tiles {
    direct: vbmi::direct,
    unpack: vbmi::unpack_codes,
    ..tiles_of!(avx512)
};

/// Bytes ahead at which weights are asked for into the second and then into the first cache. The
/// scheduler holds the products of some steps that wait for memory and no load beyond them; a
/// prefetch waits for nothing.
const AHEAD: [usize; 2] = [12288, 3072];

/// Asks for the lines of a step, [`AHEAD`] of the one at `at`.
#[inline(always)]
fn ask(at: *const u8) {
    for line in 0..STEP_BYTES / 64 {
        // SAFETY: every x86-64 has SSE, and a prefetch reads nothing.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD[0] + 64 * line).cast());
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD[1] + 64 * line).cast());
        }
    }
}

/// One instruction set: its registers, by the names of their intrinsics, then its entry points and
/// what else it has.
macro_rules! registers {
    (
        $module:ident, $features:literal, $doc:literal, $register:ty, $rows:literal, unsigned $unsigned:literal, room $room:expr,
        load $load:ident, fill $fill:ident, splat $splat:ident, and $and:ident, down $down:ident, zero $zero:ident, store $store:ident, add $add:ident,
        left $left:ident, right $right:ident, dot $dot:expr, wide $wide:expr, entries $($entries:tt)*
    ) => {
        mod $module {
            use super::*;

            #[doc = $doc]
            pub(super) struct Registers;

            // SAFETY: every intrinsic belongs to the features of the module, which the trait asks
            // for.
            unsafe impl Vector for Registers {
                type Bytes = $register;
                type Sum = $register;
                const ROWS: usize = $rows;
                const UNSIGNED: bool = $unsigned;

                #[inline(always)]
                fn room(most: usize) -> usize {
                    $room(most)
                }
                #[inline(always)]
                unsafe fn load(from: *const u8) -> $register {
                    // SAFETY: the caller's.
                    unsafe { $load(from.cast()) }
                }
                #[inline(always)]
                unsafe fn fill(byte: u8) -> $register {
                    // SAFETY: the caller's.
                    unsafe { $fill(byte.cast_signed()) }
                }
                #[inline(always)]
                unsafe fn splat(four: i32) -> $register {
                    // SAFETY: the caller's.
                    unsafe { $splat(four) }
                }
                #[inline(always)]
                unsafe fn and(a: $register, b: $register) -> $register {
                    // SAFETY: the caller's.
                    unsafe { $and(a, b) }
                }
                #[inline(always)]
                unsafe fn down(codes: $register, bits: usize) -> $register {
                    // SAFETY: the caller's.
                    unsafe {
                        match bits {
                            1 => $down::<1>(codes),
                            2 => $down::<2>(codes),
                            4 => $down::<4>(codes),
                            _ => $down::<8>(codes),
                        }
                    }
                }
                #[inline(always)]
                unsafe fn zero() -> $register {
                    // SAFETY: the caller's.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn dot(sum: $register, codes: $register, x: $register) -> $register {
                    // SAFETY: the caller's.
                    unsafe { $dot(sum, codes, x) }
                }
                #[inline(always)]
                unsafe fn ask(at: *const u8) {
                    ask(at);
                }
                #[inline(always)]
                unsafe fn add(sum: $register, up: u32, down: u32, sums: *mut i32) {
                    // SAFETY: the caller's; neither access needs alignment.
                    unsafe {
                        let wide = $wide(sum);
                        let total = $right($left(wide, _mm_cvtsi32_si128(up.cast_signed())), _mm_cvtsi32_si128(down.cast_signed()));
                        $store(sums.cast(), $add($load(sums.cast()), total));
                    }
                }
            }

            entries!(Registers, $features, $($entries)*);

            /// # Safety
            #[doc = concat!("The machine has ", $features, ".")]
            #[target_feature(enable = $features)]
            pub(super) unsafe fn float(weights: &[u8], x: Float<'_>, sums: &mut float::Sums) {
                // SAFETY: the caller's.
                unsafe { float::x86::$module(weights, x, sums) }
            }
        }
    };
}

registers!(
    sse41, "ssse3,sse4.1", "128 bits, products added two at a time in 16 bits.", __m128i, 4, unsigned false, room room_of_pairs,
    load _mm_loadu_si128, fill _mm_set1_epi8, splat _mm_set1_epi32, and _mm_and_si128, down _mm_srli_epi16, zero _mm_setzero_si128,
    store _mm_storeu_si128, add _mm_add_epi32, left _mm_sll_epi32, right _mm_sra_epi32,
    dot |sum, codes, x| _mm_add_epi16(sum, _mm_maddubs_epi16(codes, x)), wide |sum| _mm_madd_epi16(sum, _mm_set1_epi16(1)),
    entries rows 2, in place 1 1
);
registers!(
    avx2, "avx2", "256 bits, products added two at a time in 16 bits.", __m256i, 8, unsigned false, room room_of_pairs,
    load _mm256_loadu_si256, fill _mm256_set1_epi8, splat _mm256_set1_epi32, and _mm256_and_si256, down _mm256_srli_epi16, zero _mm256_setzero_si256,
    store _mm256_storeu_si256, add _mm256_add_epi32, left _mm256_sll_epi32, right _mm256_sra_epi32,
    dot |sum, codes, x| _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)), wide |sum| _mm256_madd_epi16(sum, _mm256_set1_epi16(1)),
    entries rows 2, in place 1 1
);
registers!(
    avx_vnni, "avx2,avxvnni", "256 bits with byte dot products.", __m256i, 8, unsigned true, room room_of_quads,
    load _mm256_loadu_si256, fill _mm256_set1_epi8, splat _mm256_set1_epi32, and _mm256_and_si256, down _mm256_srli_epi16, zero _mm256_setzero_si256,
    store _mm256_storeu_si256, add _mm256_add_epi32, left _mm256_sll_epi32, right _mm256_sra_epi32,
    dot |sum, codes, x| _mm256_dpbusd_avx_epi32(sum, codes, x), wide |sum| sum,
    entries rows 2, in place 4 2
);
registers!(
    avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", "512 bits with byte dot products.", __m512i, 16, unsigned true, room room_of_quads,
    load _mm512_loadu_si512, fill _mm512_set1_epi8, splat _mm512_set1_epi32, and _mm512_and_si512, down _mm512_srli_epi16, zero _mm512_setzero_si512,
    store _mm512_storeu_si512, add _mm512_add_epi32, left _mm512_sll_epi32, right _mm512_sra_epi32,
    dot |sum, codes, x| _mm512_dpbusd_epi32(sum, codes, x), wide |sum| sum,
    entries rows 4, in place 4 2
);

/// What VBMI adds to AVX-512: five trits of a byte by table.
mod vbmi {
    use super::*;

    /// Steps that are summed before fields are shifted down: the top field holds its code times 64.
    const STEPS: usize = 1 << 14;
    const _: () = assert!(STEPS <= room_of_quads(2 << 6));

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

    /// # Safety
    /// The machine has VBMI and what `avx512` asks for.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    pub(super) unsafe fn direct(coding: Coding, weights: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
        if coding != Coding::Trits {
            // SAFETY: the caller's.
            return unsafe { avx512::direct(coding, weights, x, sums) };
        }
        x.check(weights.len() / STEP_BYTES * coding.step(), sums.len());
        // SAFETY: the tile's bound was checked on the line above.
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

    /// [`vector::direct`] with the fifth trit of each byte beside the four: it goes with field 0.
    ///
    /// # Safety
    /// As there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn trits_tile<const T: usize, const C: usize>(
        weights: &[u8],
        x: Columns<'_>,
        sums: &mut [Sums],
    ) {
        let masks: [__m512i; C] =
            std::array::from_fn(|c| _mm512_set1_epi8((3u8 << (2 * c)).cast_signed()));
        let tables = tables();
        for (block, weights) in weights.chunks(STEPS * STEP_BYTES).enumerate() {
            let mut acc = [[[_mm512_setzero_si512(); 4]; C]; T];
            for step in 0..weights.len() / STEP_BYTES {
                ask(weights.as_ptr().wrapping_add(step * STEP_BYTES));
                let split: [_; 4] = std::array::from_fn(|v| {
                    // SAFETY: inside `weights`, which has so many steps.
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
                        // SAFETY: inside `x`, which the caller vouches for; the read needs no
                        // alignment.
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
                        // SAFETY: 16 sums.
                        unsafe { avx512::Registers::add(acc, 0, 2 * c as u32, sums.as_mut_ptr()) };
                    }
                }
            }
        }
    }

    /// # Safety
    /// The machine has VBMI and what `avx512` asks for.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    pub(super) unsafe fn unpack_codes(coding: Coding, weights: &[u8], out: &mut [u8]) {
        if coding != Coding::Trits {
            // SAFETY: the caller's.
            return unsafe { avx512::unpack_codes(coding, weights, out) };
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
