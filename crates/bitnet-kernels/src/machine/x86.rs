//! The loops of [`super`] for x86-64.

use crate::lines::CacheLine;
use std::arch::asm;
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f")]
pub(super) fn read_512(words: &[u64]) -> u64 {
    let mut sums = [_mm512_setzero_si512(); 8];
    let (blocks, rest) = words.as_chunks::<64>();
    for block in blocks {
        for (sum, words) in sums.iter_mut().zip(block.as_chunks::<8>().0) {
            // SAFETY: `words` is a chunk of eight words; the read needs no alignment.
            *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(words.as_ptr().cast()) });
        }
    }
    let sums = sums
        .into_iter()
        .map(|s| _mm512_reduce_add_epi64(s).cast_unsigned());
    sums.chain(rest.iter().copied()).fold(0, u64::wrapping_add)
}

#[target_feature(enable = "avx2")]
pub(super) fn read_256(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, &word| sum.wrapping_add(word))
}

#[target_feature(enable = "avx512f")]
pub(super) fn write_512(words: &mut [u64], word: u64) {
    let value = _mm512_set1_epi64(word.cast_signed());
    let (eights, rest) = words.as_chunks_mut::<8>();
    for words in eights {
        // SAFETY: `words` is a chunk of eight words; the write needs no alignment.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), value) };
    }
    rest.fill(word);
}

pub(super) fn stream_128(lines: &mut [CacheLine], word: u64) {
    // SAFETY: SSE2 is part of x86-64; each line has room for four vectors and is aligned to more
    // than they need.
    unsafe {
        let value = _mm_set1_epi64x(word.cast_signed());
        for line in lines {
            let to = line.0.as_mut_ptr().cast::<__m128i>();
            for i in 0..4 {
                _mm_stream_si128(to.add(i), value);
            }
        }
        _mm_sfence();
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn stream_512(lines: &mut [CacheLine], word: u64) {
    let value = _mm512_set1_epi64(word.cast_signed());
    for line in lines {
        // SAFETY: a line is one vector and aligned like one.
        unsafe { _mm512_stream_si512(line.0.as_mut_ptr().cast(), value) };
    }
    _mm_sfence();
}

/// A loop of one instruction, or of a product and a sum, on independent sums in all registers. It
/// is written as assembly because a compiler would see that all products are alike.
macro_rules! peak {
    (
        $name:ident, $features:literal, $sums:literal, $zero:ident, $class:ident,
        [$($line:literal),+] $(, $product:ident)?
    ) => {
        #[target_feature(enable = $features)]
        pub(super) fn $name(rounds: usize) {
            let (mut sums, a, b) = ([$zero(); $sums], $zero(), $zero());
            for _ in 0..rounds {
                for sum in &mut sums {
                    // SAFETY: arithmetic of the enabled features on registers named here; it
                    // touches neither memory nor flags.
                    unsafe {
                        asm!(
                            $($line,)+
                            sum = inout($class) *sum,
                            a = in($class) a,
                            b = in($class) b,
                            $($product = out($class) _,)?
                            options(nomem, nostack, preserves_flags)
                        );
                    }
                }
            }
            std::hint::black_box(sums);
        }
    };
}

peak!(
    dpbusd_512,
    "avx512f,avx512vnni",
    24,
    _mm512_setzero_si512,
    zmm_reg,
    ["vpdpbusd {sum}, {a}, {b}"]
);
peak!(
    dpbusd_256,
    "avx2,avxvnni",
    12,
    _mm256_setzero_si256,
    ymm_reg,
    ["{{vex}} vpdpbusd {sum}, {a}, {b}"]
);
peak!(
    maddubs_256,
    "avx2",
    12,
    _mm256_setzero_si256,
    ymm_reg,
    [
        "vpmaddubsw {product}, {a}, {b}",
        "vpaddw {sum}, {sum}, {product}"
    ],
    product
);
peak!(
    maddubs_128,
    "ssse3",
    12,
    _mm_setzero_si128,
    xmm_reg,
    [
        "movdqa {product}, {a}",
        "pmaddubsw {product}, {b}",
        "paddw {sum}, {product}"
    ],
    product
);
peak!(
    fma_512,
    "avx512f",
    24,
    _mm512_setzero_ps,
    zmm_reg,
    ["vfmadd231ps {sum}, {a}, {b}"]
);
peak!(
    fma_256,
    "fma",
    12,
    _mm256_setzero_ps,
    ymm_reg,
    ["vfmadd231ps {sum}, {a}, {b}"]
);
peak!(
    mul_add_128,
    "sse2",
    12,
    _mm_setzero_ps,
    xmm_reg,
    [
        "movaps {product}, {a}",
        "mulps {product}, {b}",
        "addps {sum}, {product}"
    ],
    product
);
