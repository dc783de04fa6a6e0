//! Loops for x86-64 where compiling the plain ones is not enough. The rest after whole registers
//! goes to the plain loop.

use super::plain;
use bitnet_core::ops::{self, Cuts, Key, Magnitudes};
use std::arch::x86_64::*;

/// 64 bytes that a formula gives.
macro_rules! table {
    ($i:ident, $byte:expr) => {{
        let mut table = [0; 64];
        let mut $i = 0;
        while $i < 64 {
            table[$i] = $byte;
            $i += 1;
        }
        table
    }};
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[u8; 64]) -> __m512i {
    // SAFETY: the array has 64 bytes; the read needs no alignment.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline(always)]
fn bytes<const N: usize>(from: &[i8; N]) -> &[u8; N] {
    // SAFETY: i8 and u8 have the same size and alignment, and the array N of them.
    unsafe { &*from.as_ptr().cast() }
}

#[target_feature(enable = "avx2")]
pub(crate) fn pack_two_bit_256(values: &[i8], bias: i8, top: u8, out: &mut [u8]) -> bool {
    let (blocks, tail) = values.as_chunks::<128>();
    let (body, end) = out.split_at_mut(32 * blocks.len());
    let mut most = _mm256_setzero_si256();
    let (pairs, fours) = (_mm256_set1_epi16(0x0401), _mm256_set1_epi32(0x0010_0001));
    for (block, out) in blocks.iter().zip(body.as_chunks_mut::<32>().0) {
        let sums: [__m256i; 4] = std::array::from_fn(|i| {
            // SAFETY: i < 4: 32 of the 128 bytes of `block`; the read needs no alignment.
            let v = unsafe { _mm256_loadu_si256(block.as_ptr().add(32 * i).cast()) };
            let codes = _mm256_add_epi8(v, _mm256_set1_epi8(bias));
            most = _mm256_max_epu8(most, codes);
            // c0 + 4·c1 and then + 16·(c2 + 4·c3).
            _mm256_madd_epi16(_mm256_maddubs_epi16(codes, pairs), fours)
        });
        let words = _mm256_packus_epi16(
            _mm256_packus_epi32(sums[0], sums[1]),
            _mm256_packus_epi32(sums[2], sums[3]),
        );
        let ordered = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        // SAFETY: `out` is a chunk of 32 bytes; the write needs no alignment.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), ordered) };
    }
    let top_all = _mm256_set1_epi8(top.cast_signed());
    let ok = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(most, top_all), top_all)) == -1;
    plain::pack_two_bit(tail, bias, top, end) && ok
}

#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn pack_two_bit_512(values: &[i8], bias: i8, top: u8, out: &mut [u8]) -> bool {
    let (blocks, tail) = values.as_chunks::<256>();
    let (body, end) = out.split_at_mut(64 * blocks.len());
    let mut most = _mm512_setzero_si512();
    let (pairs, fours) = (_mm512_set1_epi16(0x0401), _mm512_set1_epi32(0x0010_0001));
    // Packing works within 128 bits: dword 4l + s of the result comes from lane l of sum s.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (block, out) in blocks.iter().zip(body.as_chunks_mut::<64>().0) {
        let block = bytes(block).as_chunks::<64>().0;
        let sums: [__m512i; 4] = std::array::from_fn(|i| {
            let codes = _mm512_add_epi8(load(&block[i]), _mm512_set1_epi8(bias));
            most = _mm512_max_epu8(most, codes);
            _mm512_madd_epi16(_mm512_maddubs_epi16(codes, pairs), fours)
        });
        let words = _mm512_packus_epi16(
            _mm512_packus_epi32(sums[0], sums[1]),
            _mm512_packus_epi32(sums[2], sums[3]),
        );
        // SAFETY: `out` is a chunk of 64 bytes; the write needs no alignment.
        unsafe {
            _mm512_storeu_si512(
                out.as_mut_ptr().cast(),
                _mm512_permutexvar_epi32(order, words),
            )
        };
    }
    let ok = _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(top.cast_signed())) == 0;
    plain::pack_two_bit(tail, bias, top, end) && ok
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(crate) fn unpack_two_bit_vbmi(bytes: &[u8], bias: i8, top: u8, values: &mut [i8]) -> bool {
    unpack_two_bit_aligned::<false>(bytes, bias, top, values)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(crate) fn unpack_two_bit_streamed(bytes: &[u8], bias: i8, top: u8, values: &mut [i8]) -> bool {
    let ok = unpack_two_bit_aligned::<true>(bytes, bias, top, values);
    _mm_sfence();
    ok
}

/// Whole bytes of codes up to the first cache line of the output that can be written as one go the
/// plain way.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn unpack_two_bit_aligned<const STREAMED: bool>(
    bytes: &[u8],
    bias: i8,
    top: u8,
    values: &mut [i8],
) -> bool {
    let head = values.as_ptr().align_offset(64);
    if !head.is_multiple_of(4) || values.len() < 1024 {
        return unpack_two_bit_wide::<false>(bytes, bias, top, values);
    }
    let (head_bytes, bytes) = bytes.split_at(head / 4);
    let (head, values) = values.split_at_mut(head);
    let ok = plain::unpack_two_bit(head_bytes, bias, top, head);
    unpack_two_bit_wide::<STREAMED>(bytes, bias, top, values) && ok
}

/// With `STREAMED`, `values` begins at a multiple of 64 bytes and is written past the caches.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn unpack_two_bit_wide<const STREAMED: bool>(
    bytes: &[u8],
    bias: i8,
    top: u8,
    values: &mut [i8],
) -> bool {
    assert!(!STREAMED || values.as_ptr().cast::<__m512i>().is_aligned());
    let (blocks, tail) = values.as_chunks_mut::<256>();
    let (body, end) = bytes.split_at(64 * blocks.len());
    // Two bytes hold the eight codes of a qword; byte j of it is bits 2j … 2j + 7 of those, of
    // which two count.
    const PICK: [[u8; 64]; 4] = [
        table!(i, (i / 8 * 2 + i % 2) as u8),
        table!(i, (16 + i / 8 * 2 + i % 2) as u8),
        table!(i, (32 + i / 8 * 2 + i % 2) as u8),
        table!(i, (48 + i / 8 * 2 + i % 2) as u8),
    ];
    let pick = [
        load(&PICK[0]),
        load(&PICK[1]),
        load(&PICK[2]),
        load(&PICK[3]),
    ];
    let fields = _mm512_set1_epi64(0x0e0c_0a08_0604_0200);
    let (mask, bias_all) = (_mm512_set1_epi8(3), _mm512_set1_epi8(bias));
    let mut threes = _mm512_setzero_si512();
    for (bytes, out) in body.as_chunks::<64>().0.iter().zip(blocks) {
        if STREAMED {
            _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().cast::<i8>().wrapping_add(AHEAD.1));
        }
        let x = load(bytes);
        // threes |= x & x >> 1
        threes = _mm512_ternarylogic_epi64::<0xf8>(threes, x, _mm512_srli_epi16::<1>(x));
        for (pick, out) in pick.iter().zip(out.as_chunks_mut::<64>().0) {
            let codes = _mm512_multishift_epi64_epi8(fields, _mm512_permutexvar_epi8(*pick, x));
            let v = _mm512_sub_epi8(_mm512_and_si512(codes, mask), bias_all);
            // SAFETY: `out` is a chunk of 64 bytes; with `STREAMED` it begins at a multiple of 64,
            // because the assertion at the top says so of `values`.
            unsafe {
                if STREAMED {
                    _mm512_stream_si512(out.as_mut_ptr().cast(), v);
                } else {
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), v);
                }
            }
        }
    }
    let ok = top == 3 || _mm512_test_epi8_mask(threes, _mm512_set1_epi8(0x55)) == 0;
    plain::unpack_two_bit(end, bias, top, tail) && ok
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(crate) fn pack_base3_vbmi(values: &[i8], out: &mut [u8]) -> bool {
    let (blocks, tail) = values.as_chunks::<320>();
    let (body, end) = out.split_at_mut(64 * blocks.len());
    // Byte 8g + i of a register is digit i of group g, bytes 5 … 7 are 0. The last register is read
    // 24 bytes early, to stay in the block.
    const SPREAD: [[u8; 64]; 2] = [
        table!(i, (i / 8 * 5 + i % 8) as u8),
        table!(i, (i / 8 * 5 + i % 8 + 24) as u8),
    ];
    // Packing works within 128 bits: byte 8r + 2l + h of the result comes from qword 2l + h of
    // register r.
    const ORDER: [u8; 64] = table!(i, (16 * (i / 2 % 4) + 2 * (i / 8) + i % 2) as u8);
    let (spread, order, digits) = (
        [load(&SPREAD[0]), load(&SPREAD[1])],
        load(&ORDER),
        0x1f1f_1f1f_1f1f_1f1f,
    );
    let powers = _mm512_set1_epi64(0x51_1b09_0301);
    let mut most = _mm512_setzero_si512();
    for (block, out) in blocks.iter().zip(body.as_chunks_mut::<64>().0) {
        let sums: [__m512i; 8] = std::array::from_fn(|r| {
            // SAFETY: 64 of the 320 bytes of `block`, from 256 on at most; unaligned.
            let v = unsafe { _mm512_loadu_si512(block.as_ptr().add((40 * r).min(256)).cast()) };
            let codes = _mm512_maskz_permutexvar_epi8(
                digits,
                spread[r / 7],
                _mm512_add_epi8(v, _mm512_set1_epi8(1)),
            );
            most = _mm512_max_epu8(most, codes);
            // Words of at most 162, whose bytes are then added up.
            _mm512_sad_epu8(_mm512_maddubs_epi16(codes, powers), _mm512_setzero_si512())
        });
        let dwords: [__m512i; 4] =
            std::array::from_fn(|i| _mm512_packus_epi32(sums[2 * i], sums[2 * i + 1]));
        let words = [
            _mm512_packus_epi32(dwords[0], dwords[1]),
            _mm512_packus_epi32(dwords[2], dwords[3]),
        ];
        let packed = _mm512_packus_epi16(words[0], words[1]);
        // SAFETY: `out` is a chunk of 64 bytes; the write needs no alignment.
        unsafe {
            _mm512_storeu_si512(
                out.as_mut_ptr().cast(),
                _mm512_permutexvar_epi8(order, packed),
            )
        };
    }
    let ok = _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(2)) == 0;
    plain::pack_base3(tail, end) && ok
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(crate) fn unpack_base3_vbmi(bytes: &[u8], values: &mut [i8]) -> bool {
    // The first four digits of bytes 0 … 121 as two-bit fields. Byte 242 − b has the digits 2 − d.
    const FIELDS: [[u8; 64]; 2] = [table!(i, fields(i)), table!(i, fields(i + 64))];
    const fn fields(byte: usize) -> u8 {
        ((byte % 3) | ((byte / 3 % 3) << 2) | ((byte / 9 % 3) << 4) | ((byte / 27 % 3) << 6)) as u8
    }
    // With a word for each byte, whose fields are its five digits: the four words from which the
    // eight values of a qword come, and in which bit of those each begins.
    const WORDS: [[u8; 64]; 3] = [
        table!(i, word(i, 0)),
        table!(i, word(i, 64)),
        table!(i, word(i, 128)),
    ];
    const BITS: [[u8; 64]; 3] = [
        table!(i, bit(i)),
        table!(i, bit(i + 64)),
        table!(i, bit(i + 128)),
    ];
    const fn word(i: usize, first: usize) -> u8 {
        let word = (first + i / 8 * 8) / 5 + i % 8 / 2;
        (if word < 32 { 2 * word + i % 2 } else { 0 }) as u8
    }
    const fn bit(value: usize) -> u8 {
        (16 * (value / 5 - value / 8 * 8 / 5) + 2 * (value % 5)) as u8
    }
    let (blocks, tail) = values.as_chunks_mut::<320>();
    let (body, end) = bytes.split_at(64 * blocks.len());
    let fields = [load(&FIELDS[0]), load(&FIELDS[1])];
    let words = [load(&WORDS[0]), load(&WORDS[1]), load(&WORDS[2])];
    let bits = [load(&BITS[0]), load(&BITS[1]), load(&BITS[2])];
    let halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    let all = |byte: u8| _mm512_set1_epi8(byte.cast_signed());
    let mut most = _mm512_setzero_si512();
    for (bytes, out) in body.as_chunks::<64>().0.iter().zip(blocks) {
        let x = load(bytes);
        most = _mm512_max_epu8(most, x);
        // Unpacking works within 128 bits: its low half is to be bytes 0 … 31, its high half the
        // others.
        let x = _mm512_permutexvar_epi64(halves, x);
        let upper = _mm512_cmpgt_epu8_mask(x, all(121));
        let x = _mm512_mask_sub_epi8(x, upper, all(242), x);
        let four = _mm512_permutex2var_epi8(fields[0], x, fields[1]);
        let fifth = _mm512_maskz_mov_epi8(_mm512_cmpgt_epu8_mask(x, all(80)), all(1));
        let four = _mm512_mask_sub_epi8(four, upper, all(0xaa), four);
        let fifth = _mm512_mask_sub_epi8(fifth, upper, all(2), fifth);
        let out = out.as_mut_ptr();
        for (half, five) in [
            _mm512_unpacklo_epi8(four, fifth),
            _mm512_unpackhi_epi8(four, fifth),
        ]
        .into_iter()
        .enumerate()
        {
            let part = |i: usize| {
                let codes =
                    _mm512_multishift_epi64_epi8(bits[i], _mm512_permutexvar_epi8(words[i], five));
                _mm512_sub_epi8(_mm512_and_si512(codes, all(3)), all(1))
            };
            // SAFETY: 160 of the 320 bytes of `out`, from 160·half on: 64, 64 and 32; unaligned.
            unsafe {
                _mm512_storeu_si512(out.add(160 * half).cast(), part(0));
                _mm512_storeu_si512(out.add(160 * half + 64).cast(), part(1));
                _mm256_storeu_si256(
                    out.add(160 * half + 128).cast(),
                    _mm512_castsi512_si256(part(2)),
                );
            }
        }
    }
    let ok = _mm512_cmpgt_epu8_mask(most, all(242)) == 0;
    plain::unpack_base3(end, tail) && ok
}

#[target_feature(enable = "avx512f,bmi2")]
pub(crate) fn encode_two_bit_512(w: &[f32], cuts: Cuts, out: &mut [u8]) {
    let (blocks, tail) = w.as_chunks::<32>();
    let (body, end) = out.split_at_mut(8 * blocks.len());
    for (block, out) in blocks.iter().zip(body.as_chunks_mut::<8>().0) {
        block.as_chunks::<16>().0.iter().for_each(prefetch);
        *out = encode_32(block, cuts);
    }
    if !tail.is_empty() {
        plain::encode_two_bit(tail, cuts, end);
    }
}

/// Additions for `next` wait for one another; meanwhile the codes of `w` are made.
#[target_feature(enable = "avx512f,bmi2")]
pub(crate) fn encode_two_bit_and_measure_512(
    w: &[f32],
    cuts: Cuts,
    out: &mut [u8],
    next: &[f32],
) -> Magnitudes {
    if w.len() != next.len() {
        encode_two_bit_512(w, cuts, out);
        return magnitudes_512(next);
    }
    let (blocks, tail) = w.as_chunks::<32>();
    let (next_blocks, _) = next.as_chunks::<32>();
    let (body, end) = out.split_at_mut(8 * blocks.len());
    let mut sizes = Sizes::new();
    for ((block, out), next) in blocks
        .iter()
        .zip(body.as_chunks_mut::<8>().0)
        .zip(next_blocks)
    {
        for line in next.as_chunks::<16>().0 {
            prefetch(line);
            sizes.add(line);
        }
        *out = encode_32(block, cuts);
    }
    if !tail.is_empty() {
        plain::encode_two_bit(tail, cuts, end);
    }
    sizes.finish(next, 32 * blocks.len())
}

#[inline]
#[target_feature(enable = "avx512f,bmi2")]
fn encode_32(w: &[f32; 32], cuts: Cuts) -> [u8; 8] {
    let (low, high) = (_mm512_set1_ps(cuts.low), _mm512_set1_ps(cuts.high));
    let (mut over, mut under) = (0u32, 0u32);
    for i in 0..2 {
        // SAFETY: i < 2: 16 of the 32 numbers of `w`; the read needs no alignment.
        let w = unsafe { _mm512_loadu_ps(w.as_ptr().add(16 * i)) };
        over |= u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(w, high)) << (16 * i);
        under |= u32::from(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(w, low)) << (16 * i);
    }
    // Code 2 is the high bit of a field, code 1 the low one.
    let codes = _pdep_u64(over.into(), 0xaaaa_aaaa_aaaa_aaaa)
        | _pdep_u64((!(over | under)).into(), 0x5555_5555_5555_5555);
    codes.to_le_bytes()
}

#[target_feature(enable = "avx512f")]
pub(crate) fn absmax_512(x: &[f32]) -> u32 {
    let mut most = [_mm512_setzero_si512(); 4];
    let (blocks, tail) = x.as_chunks::<64>();
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    for block in blocks {
        for (i, most) in most.iter_mut().enumerate() {
            // SAFETY: i < 4: 16 of the 64 numbers of `block`; the read needs no alignment.
            let x = unsafe { _mm512_loadu_si512(block.as_ptr().add(16 * i).cast()) };
            *most = _mm512_max_epu32(*most, _mm512_and_si512(x, magnitude));
        }
    }
    let most = _mm512_max_epu32(
        _mm512_max_epu32(most[0], most[1]),
        _mm512_max_epu32(most[2], most[3]),
    );
    _mm512_reduce_max_epu32(most).max(plain::absmax(tail))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn round_to_int8_512(x: &[f32], inverse: f32, out: &mut [i8]) -> i32 {
    let (blocks, tail) = x.as_chunks::<64>();
    let (body, end) = out.split_at_mut(64 * blocks.len());
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let (factor, ones) = (_mm512_set1_ps(inverse), _mm512_set1_epi8(1));
    let mut sums = _mm512_setzero_si512();
    for (block, out) in blocks.iter().zip(body.as_chunks_mut::<64>().0) {
        let q: [__m512i; 4] = std::array::from_fn(|i| {
            // SAFETY: i < 4: 16 of the 64 numbers of `block`; the read needs no alignment.
            let x = unsafe { _mm512_loadu_ps(block.as_ptr().add(16 * i)) };
            _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm512_mul_ps(x, factor),
            )
        });
        let words = _mm512_packs_epi16(
            _mm512_packs_epi32(q[0], q[1]),
            _mm512_packs_epi32(q[2], q[3]),
        );
        let q = _mm512_permutexvar_epi32(order, words);
        sums = _mm512_dpbusd_epi32(sums, ones, q);
        // SAFETY: `out` is a chunk of 64 bytes; the write needs no alignment.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), q) };
    }
    _mm512_reduce_add_epi32(sums) + plain::round_to_int8(tail, inverse, end)
}

#[target_feature(enable = "avx512f")]
pub(crate) fn inside_512(w: &[f32], key: Key, low: f32, high: f32, out: &mut Vec<f32>) {
    let (blocks, tail) = w.as_chunks::<16>();
    let sign = _mm512_set1_epi32(if key == Key::Magnitude {
        0x7fff_ffff
    } else {
        -1
    });
    let (over, limit) = (_mm512_set1_ps(low), _mm512_set1_ps(high));
    for block in blocks {
        // SAFETY: `block` is a chunk of 16 numbers; the read needs no alignment.
        let bits = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
        let u = _mm512_castsi512_ps(_mm512_and_si512(bits, sign));
        let inside = _mm512_mask_cmp_ps_mask::<_CMP_LE_OQ>(
            _mm512_cmp_ps_mask::<_CMP_GT_OQ>(u, over),
            u,
            limit,
        );
        if out.capacity() - out.len() < 16 {
            out.reserve(out.len().max(w.len() / 4 + 16));
        }
        // No branch on the keys: it would be mispredicted for many. SAFETY: `reserve` above made
        // room for 16 numbers after `out.len()`; the length grows by those of them that were kept.
        unsafe {
            _mm512_storeu_ps(
                out.as_mut_ptr().add(out.len()),
                _mm512_maskz_compress_ps(inside, u),
            );
            out.set_len(out.len() + inside.count_ones() as usize);
        }
    }
    ops::inside(tail, key, low, high, out);
}

/// Lanes of [`Magnitudes`], as the oracle has them.
struct Sizes {
    sums: [__m512d; 2],
    most: [__m512d; 2],
}

impl Sizes {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        Self {
            sums: [_mm512_setzero_pd(); 2],
            most: [_mm512_setzero_pd(); 2],
        }
    }

    /// Adds one weight to each lane.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(&mut self, w: &[f32; 16]) {
        for (i, w) in w.as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: `w` is a chunk of 8 numbers; the read needs no alignment.
            self.add_half(i, _mm512_cvtps_pd(unsafe { _mm256_loadu_ps(w.as_ptr()) }));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add_half(&mut self, i: usize, w: __m512d) {
        let a = _mm512_abs_pd(w);
        self.sums[i] = _mm512_add_pd(self.sums[i], a);
        self.most[i] = _mm512_max_pd(self.most[i], a);
    }

    /// The magnitudes of `w`, whose first `done` weights, a multiple of 16, were added.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn finish(mut self, w: &[f32], done: usize) -> Magnitudes {
        let (blocks, tail) = w[done..].as_chunks::<16>();
        blocks.iter().for_each(|block| self.add(block));
        let mut rest = _mm512_setzero_ps();
        if !tail.is_empty() {
            // SAFETY: the mask has `tail.len()` bits, and numbers without a bit are not read. They
            // add 0 to sums that are never −0.
            rest = unsafe { _mm512_maskz_loadu_ps((1u16 << tail.len()) - 1, tail.as_ptr()) };
            self.add_half(0, _mm512_cvtps_pd(_mm512_castps512_ps256(rest)));
            self.add_half(
                1,
                _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(
                    _mm512_castps_pd(rest),
                ))),
            );
        }
        // By halves, as the oracle does.
        let sum = _mm512_add_pd(self.sums[0], self.sums[1]);
        let sum = _mm256_add_pd(
            _mm512_castpd512_pd256(sum),
            _mm512_extractf64x4_pd::<1>(sum),
        );
        let sum = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd::<1>(sum));
        let sum = _mm_cvtsd_f64(_mm_add_sd(sum, _mm_unpackhi_pd(sum, sum)));
        let max = _mm512_reduce_max_pd(_mm512_max_pd(self.most[0], self.most[1])) as f32;
        let one = |w: __m512| {
            let a = _mm512_abs_ps(w);
            _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, _mm512_set1_ps(max))
                | _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, _mm512_setzero_ps())
                == u16::MAX
        };
        let mut ternary = one(rest);
        for block in w.as_chunks::<16>().0 {
            if !ternary {
                break;
            }
            // SAFETY: `block` is a chunk of 16 numbers; the read needs no alignment.
            ternary = one(unsafe { _mm512_loadu_ps(block.as_ptr()) });
        }
        Magnitudes {
            count: w.len() as u64,
            sum,
            max,
            ternary,
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn magnitudes_512(w: &[f32]) -> Magnitudes {
    let mut sizes = Sizes::new();
    let (blocks, tail) = w.as_chunks::<16>();
    for block in blocks {
        prefetch(block);
        sizes.add(block);
    }
    sizes.finish(w, w.len() - tail.len())
}

#[target_feature(enable = "avx512f")]
pub(crate) fn magnitudes_each_512(w: &[f32], width: usize, out: &mut Vec<Magnitudes>) {
    for w in w.chunks(width) {
        out.push(magnitudes_512(w));
    }
}

/// Bytes by which prefetches are ahead of a line: into L2 first, into L1 later. A single core's
/// loads alone do not keep memory busy.
const AHEAD: (usize, usize) = (12 << 10, 3 << 10);

/// Prefetches the lines [`AHEAD`] of `w`; the addresses may be out of bounds.
#[inline(always)]
fn prefetch(w: &[f32; 16]) {
    let at = w.as_ptr().cast::<i8>();
    // SAFETY: every x86-64 has SSE, and a prefetch of any address is allowed.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD.0));
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD.1));
    }
}

#[target_feature(enable = "avx512f")]
pub(crate) fn scale_streamed_512(values: &[i8], scale: f32, out: &mut [f32]) {
    if !out.as_ptr().cast::<__m512>().is_aligned() {
        return plain::scale(values, scale, out);
    }
    let (blocks, tail) = values.as_chunks::<16>();
    let (body, end) = out.split_at_mut(16 * blocks.len());
    for (block, out) in blocks.iter().zip(body.as_chunks_mut::<16>().0) {
        // SAFETY: `block` is a chunk of 16 bytes; the read needs no alignment.
        let v = _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(block.as_ptr().cast()) });
        // SAFETY: a chunk of 16 numbers, aligned to 64 bytes because `out` is: checked at the top.
        unsafe {
            _mm512_stream_ps(
                out.as_mut_ptr(),
                _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(v)),
            )
        };
    }
    plain::scale(tail, scale, end);
    _mm_sfence();
}
