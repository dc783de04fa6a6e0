//! The loops in plain Rust, compiled for each instruction set.
//!
//! A packer returns whether every value was in the alphabet, an unpacker whether a writer makes
//! such bytes. After `false` the output means nothing, and the layout in core returns the error.

use bitnet_core::ops::{self, Cuts, Magnitudes};

/// Values that are encoded to bytes before they are packed: whole bytes of two-bit and of base-3.
pub(crate) const BLOCK: usize = 1280;

/// Two-bit codes `value + bias`, at most `top`, four a byte, the first in the low bits.
#[inline(always)]
pub(crate) fn pack_two_bit(values: &[i8], bias: i8, top: u8, out: &mut [u8]) -> bool {
    let code = |v: i8| v.wrapping_add(bias).cast_unsigned();
    // The bits that no code has, and the low bits of code 3 where it does not exist.
    let three = if top == 3 { 0 } else { 0x0101_0101 };
    let mut bad = 0;
    let (quads, tail) = values.as_chunks::<4>();
    for (quad, out) in quads.iter().zip(&mut *out) {
        let x = u32::from_le_bytes(quad.map(code));
        bad |= x & 0xfcfc_fcfc | x & x >> 1 & three;
        *out = (x | x >> 6 | x >> 12 | x >> 18) as u8;
    }
    if !tail.is_empty() {
        let byte = &mut out[quads.len()];
        *byte = 0;
        for (i, &v) in tail.iter().enumerate() {
            bad |= u32::from(code(v) > top);
            *byte |= (code(v) & 3) << (2 * i);
        }
    }
    bad == 0
}

/// The inverse of [`pack_two_bit`].
#[inline(always)]
pub(crate) fn unpack_two_bit(bytes: &[u8], bias: i8, top: u8, values: &mut [i8]) -> bool {
    let mut threes = 0;
    let biases = u32::from(bias.cast_unsigned()) * 0x0101_0101;
    let (quads, tail) = values.as_chunks_mut::<4>();
    for (quad, &byte) in quads.iter_mut().zip(bytes) {
        threes |= byte & byte >> 1;
        let x = u32::from(byte);
        let x = x | x << 6;
        let codes = (x | x << 12) & 0x0303_0303;
        // Four subtractions at once: with bit 7 set there is no borrow.
        *quad = (((codes | 0x8080_8080) - biases) ^ 0x8080_8080)
            .to_le_bytes()
            .map(u8::cast_signed);
    }
    let mut rest = 0;
    if !tail.is_empty() {
        rest = bytes[quads.len()];
        for v in &mut *tail {
            threes |= rest & rest >> 1 & 1;
            *v = (rest & 3).cast_signed() - bias;
            rest >>= 2;
        }
    }
    (top == 3 || threes & 0x55 == 0) && rest == 0
}

/// Five trits a byte, `Σ (value_i + 1) · 3^i`.
#[inline(always)]
pub(crate) fn pack_base3(values: &[i8], out: &mut [u8]) -> bool {
    // Byte 4 of the product with 3^i at byte 4 − i is the sum; no byte of the product exceeds 242,
    // so none carries.
    const POWERS: u64 = 81 | 27 << 8 | 9 << 16 | 3 << 24 | 1 << 32;
    let mut most = 0;
    let code = |v: i8| v.wrapping_add(1).cast_unsigned();
    for v in values {
        most = code(*v).max(most);
    }
    let body = values.len().saturating_sub(3) / 5;
    for (i, out) in out[..body].iter_mut().enumerate() {
        let mut word = [0; 8];
        word.copy_from_slice(&values[5 * i..][..8]);
        // Digits 0 … 2, seen as −1 … 1 with 1 added to each byte; the three bytes of the next group
        // leave with the high half.
        let digits = u64::from_le_bytes(word.map(code)) & 0xff_ffff_ffff;
        *out = (digits.wrapping_mul(POWERS) >> 32) as u8;
    }
    for (values, out) in values[5 * body..].chunks(5).zip(&mut out[body..]) {
        *out = values
            .iter()
            .rev()
            .fold(0u8, |byte, &v| byte.wrapping_mul(3).wrapping_add(code(v)));
    }
    most <= 2
}

/// The five values of each byte below 243, and three bytes that are overwritten.
const TRITS: [[i8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut byte = 0;
    while byte < 243 {
        let (mut rest, mut i) = (byte, 0);
        while i < 5 {
            table[byte][i] = (rest % 3) as i8 - 1;
            rest /= 3;
            i += 1;
        }
        byte += 1;
    }
    table
};

/// The inverse of [`pack_base3`].
#[inline(always)]
pub(crate) fn unpack_base3(bytes: &[u8], values: &mut [i8]) -> bool {
    let most = bytes.iter().fold(0, |most: u8, &b| most.max(b));
    let body = values.len().saturating_sub(3) / 5;
    for (i, &byte) in bytes[..body].iter().enumerate() {
        // Eight bytes at once; the next group overwrites the last three.
        values[5 * i..][..8].copy_from_slice(&TRITS[usize::from(byte)]);
    }
    let mut padding = true;
    for (values, &byte) in values[5 * body..].chunks_mut(5).zip(&bytes[body..]) {
        let (digits, rest) = TRITS[usize::from(byte)][..5].split_at(values.len());
        values.copy_from_slice(digits);
        padding &= rest.iter().all(|&v| v == -1);
    }
    most <= 242 && padding
}

/// Two-bit trits, four a byte, each quarter of the values at one of the given shifts.
#[inline(always)]
pub(crate) fn unpack_quads(bytes: &[u8], shifts: [u32; 4], [a, b, c, d]: [&mut [i8]; 4]) -> bool {
    let mut threes = 0;
    let value = |byte: u8, shift: u32| (byte >> shift & 3).cast_signed() - 1;
    for ((((&byte, a), b), c), d) in bytes.iter().zip(a).zip(b).zip(c).zip(d) {
        threes |= byte & byte >> 1;
        *a = value(byte, shifts[0]);
        *b = value(byte, shifts[1]);
        *c = value(byte, shifts[2]);
        *d = value(byte, shifts[3]);
    }
    threes & 0x55 == 0
}

/// [`unpack_quads`] block by block: `4 · N` values in `N` bytes.
#[inline(always)]
pub(crate) fn unpack_quad_blocks<const N: usize>(
    bytes: &[u8],
    shifts: [u32; 4],
    values: &mut [i8],
) -> bool {
    let (blocks, quarters) = (
        bytes.as_chunks::<N>().0,
        values.as_chunks_mut::<N>().0.as_chunks_mut::<4>().0,
    );
    blocks
        .iter()
        .zip(quarters)
        .fold(true, |ok, (bytes, [a, b, c, d])| {
            ok & unpack_quads(bytes, shifts, [a, b, c, d])
        })
}

/// Blocks of tq2_0 without their scales.
#[inline(always)]
pub(crate) fn unpack_tq2(blocks: &[[u8; 66]], values: &mut [[i8; 256]]) -> bool {
    blocks.iter().zip(values).fold(true, |ok, (block, values)| {
        ok & unpack_quad_blocks::<32>(&block[..64], [0, 2, 4, 6], values)
    })
}

/// Blocks of tq1_0 without their scales.
#[inline(always)]
pub(crate) fn unpack_tq1(blocks: &[[u8; 54]], values: &mut [[i8; 256]]) -> bool {
    blocks.iter().zip(values).fold(true, |ok, (block, values)| {
        ok & unpack_tq1_block(block, values)
    })
}

/// 52 bytes of digits: five each of 32 and of 16 bytes, four and a 0 of the last 4.
#[inline(always)]
fn unpack_tq1_block(block: &[u8; 54], values: &mut [i8; 256]) -> bool {
    let (first, rest) = block.split_at(32);
    let (second, third) = rest.split_at(16);
    let mut ok = unpack_digits::<32>(first, &mut values[..160]);
    ok &= unpack_digits::<16>(second, &mut values[160..240]);
    ok &= unpack_digits::<4>(&third[..4], &mut values[240..]);
    ok & third[..4]
        .iter()
        .fold(true, |ok, &byte| ok & (digit(byte.wrapping_mul(81)) == -1))
}

/// The first digit of a fraction `ceil(256·q / 243)`; a product with 3 moves the next one there.
#[inline(always)]
fn digit(byte: u8) -> i8 {
    ((u16::from(byte) * 3) >> 8) as i8 - 1
}

/// Digits of `N` bytes, `N` values apart. A byte is the fraction of some q exactly if `byte · 243
/// mod 256 < 243`.
#[inline(always)]
fn unpack_digits<const N: usize>(bytes: &[u8], values: &mut [i8]) -> bool {
    let mut ok = true;
    for bytes in bytes.as_chunks::<N>().0 {
        for &byte in bytes {
            ok &= byte.wrapping_mul(243) < 243;
        }
        let mut power = 1u8;
        for values in values.as_chunks_mut::<N>().0 {
            for i in 0..N {
                values[i] = digit(bytes[i].wrapping_mul(power));
            }
            power = power.wrapping_mul(3);
        }
    }
    ok
}

/// [`encode_two_bit`] and the magnitudes of the weights that come next.
#[inline(always)]
pub(crate) fn encode_two_bit_and_measure(
    w: &[f32],
    cuts: Cuts,
    out: &mut [u8],
    next: &[f32],
) -> Magnitudes {
    encode_two_bit(w, cuts, out);
    ops::magnitudes(next)
}

/// Weights to two-bit ternary codes.
#[inline(always)]
pub(crate) fn encode_two_bit(w: &[f32], cuts: Cuts, out: &mut [u8]) {
    let mut values = [0; BLOCK];
    for (w, out) in w.chunks(BLOCK).zip(out.chunks_mut(BLOCK / 4)) {
        ops::encode_cut(w, cuts, &mut values[..w.len()]);
        pack_two_bit(&values[..w.len()], 1, 2, out);
    }
}

/// `out = scale · value`.
#[inline(always)]
pub(crate) fn scale(values: &[i8], scale: f32, out: &mut [f32]) {
    for (out, &v) in out.iter_mut().zip(values) {
        *out = scale * f32::from(v);
    }
}

/// Bits of max |x|; if a number is not finite, at least the bits of infinity.
#[inline(always)]
pub(crate) fn absmax(x: &[f32]) -> u32 {
    x.iter()
        .fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff))
}

/// `out = round(x · inverse)`, ties to even, where no product is beyond ±127.4; returns `Σ out`.
#[inline(always)]
pub(crate) fn round_to_int8(x: &[f32], inverse: f32, out: &mut [i8]) -> i32 {
    // Above 2^23 the last bit of an f32 is 1, so the addition rounds to integers, and the low bits
    // hold them.
    const INTEGERS: f32 = (3 << 22) as f32;
    let mut sum = 0;
    for (q, &x) in out.iter_mut().zip(x) {
        *q = (x * inverse + INTEGERS).to_bits() as i8;
        sum += i32::from(*q);
    }
    sum
}

/// f16 to f32, exactly; infinities and NaN stay.
#[inline(always)]
pub(crate) fn widen_f16(from: &[half::f16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = u32::from(from.to_bits());
        // The exponent is re-biased by a product that is exact, also for subnormals.
        let finite = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
        let special = if bits & 0x7c00 == 0x7c00 {
            0x7f80_0000
        } else {
            0
        };
        *to = f32::from_bits(finite.to_bits() | special | (bits & 0x8000) << 16);
    }
}

/// bf16 to f32.
#[inline(always)]
pub(crate) fn widen_bf16(from: &[half::bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}
