//! Plain numbers: little-endian, one after another.

use super::for_blocks;

pub(super) fn f32(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b, [out]| *out = f32::from_le_bytes(*b));
}

pub(super) fn f16(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b, [out]| {
        *out = half::f16::from_le_bytes(*b).to_f32()
    });
}

pub(super) fn bf16(bytes: &[u8], out: &mut [f32]) {
    // Not half's conversion, which would set the quiet bit of a NaN.
    for_blocks(bytes, out, |b, [out]| {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)
    });
}

pub(super) fn f64(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b, [out]| *out = f64::from_le_bytes(*b) as f32);
}

pub(super) fn i8(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b, [out]| *out = i8::from_le_bytes(*b).into());
}

pub(super) fn i16(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b, [out]| *out = i16::from_le_bytes(*b).into());
}

pub(super) fn i32(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b, [out]| *out = i32::from_le_bytes(*b) as f32);
}

pub(super) fn i64(bytes: &[u8], out: &mut [f32]) {
    for_blocks(bytes, out, |b, [out]| *out = i64::from_le_bytes(*b) as f32);
}
