//! Tensor bytes to the integers and scales that they hold, for products that never make floats of
//! them.
//!
//! ```text
//! value = (code − 8 in Q4_0) · s + m      s = d·factor, m = half·factor, or d and half themselves where a type has no factors
//! ```
//!
//! Groups of 32 values in Q4_0 to Q8_0, Q4_K and Q5_K, of 16 in Q2_K, Q3_K and Q6_K. The modules
//! beside this one draw the bytes.

use super::super::GgmlType;
use super::super::error::{Error, Result};
use super::kquants::{scale_min, two_bit_run};

/// Where the parts of a row go. What a type does not have stays untouched.
#[derive(Debug)]
pub struct BlockIntegers<'a> {
    /// A code for each value: 0 … 15 in the 4-bit types, the bits of an `i8` in all others.
    pub codes: &'a mut [u8],
    /// Scales and minima in binary16, for each group, or for each 256 values where there are
    /// factors.
    pub halves: [&'a mut [u16]; 2],
    /// What they are multiplied by, for each group.
    pub factors: [&'a mut [i8]; 2],
}

/// Takes a row of Q4_0 to Q8_0 or Q2_K to Q6_K apart. What the bytes subtract as a minimum is added
/// here: its binary16 has the other sign.
///
/// # Errors
/// [`Error::NoDecoder`] for another type, [`Error::RowLength`] if the codes are no whole number of
/// blocks, [`Error::Length`] if `bytes` or the parts have another length than theirs.
pub fn integers(ggml_type: GgmlType, bytes: &[u8], to: BlockIntegers<'_>) -> Result<()> {
    let expected = ggml_type.row_bytes(to.codes.len())?;
    if bytes.len() != expected {
        return Err(Error::Length {
            ggml_type,
            expected: expected as u64,
            got: bytes.len() as u64,
        });
    }
    match ggml_type {
        GgmlType::Q4_0 => simple::<18, false>(ggml_type, bytes, to, |b, out| nibbles(&b[2..], out)),
        GgmlType::Q4_1 => simple::<20, true>(ggml_type, bytes, to, |b, out| nibbles(&b[4..], out)),
        GgmlType::Q5_0 => simple::<22, false>(ggml_type, bytes, to, |b, out| {
            nibbles(&b[6..], out);
            fifth_bits(&b[2..6], out);
            out.iter_mut().for_each(|q| *q = q.wrapping_sub(16));
        }),
        GgmlType::Q5_1 => simple::<24, true>(ggml_type, bytes, to, |b, out| {
            nibbles(&b[8..], out);
            fifth_bits(&b[4..8], out);
        }),
        GgmlType::Q8_0 => {
            simple::<34, false>(ggml_type, bytes, to, |b, out| out.copy_from_slice(&b[2..]))
        }
        GgmlType::Q2K => {
            nested::<84, 16, 80, true>(ggml_type, bytes, to, |b, out, [factors, minima]| {
                for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    (factors[i], minima[i]) =
                        ((b[i] & 15).cast_signed(), (b[i] >> 4).cast_signed());
                    let (qs, shift) = two_bit_run(i);
                    out.iter_mut()
                        .zip(&b[16 + qs..])
                        .for_each(|(out, q)| *out = q >> shift & 3);
                }
            })
        }
        GgmlType::Q3K => {
            nested::<110, 16, 108, false>(ggml_type, bytes, to, |b, out, [factors, _]| {
                for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    let (low, high) = (
                        b[96 + i % 8] >> (4 * (i / 8)) & 15,
                        b[104 + i % 4] >> (2 * (i / 4)) & 3,
                    );
                    factors[i] = (low | high << 4).cast_signed() - 32;
                    let (qs, shift) = two_bit_run(i);
                    for ((out, q), h) in out.iter_mut().zip(&b[32 + qs..]).zip(&b[16 * (i % 2)..]) {
                        *out = (q >> shift & 3 | (h >> (i / 2) & 1) << 2).wrapping_sub(4);
                    }
                }
            })
        }
        GgmlType::Q4K => {
            nested::<144, 32, 0, true>(ggml_type, bytes, to, |b, out, [factors, minima]| {
                for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let (scale, min) = scale_min(b, 4, i);
                    (factors[i], minima[i]) = (scale.cast_signed(), min.cast_signed());
                    out.iter_mut()
                        .zip(&b[16 + 32 * (i / 2)..])
                        .for_each(|(out, q)| *out = q >> (4 * (i % 2)) & 15);
                }
            })
        }
        GgmlType::Q5K => {
            nested::<176, 32, 0, true>(ggml_type, bytes, to, |b, out, [factors, minima]| {
                for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let (scale, min) = scale_min(b, 4, i);
                    (factors[i], minima[i]) = (scale.cast_signed(), min.cast_signed());
                    for ((out, q), h) in out.iter_mut().zip(&b[48 + 32 * (i / 2)..]).zip(&b[16..48])
                    {
                        *out = q >> (4 * (i % 2)) & 15 | (h >> i & 1) << 4;
                    }
                }
            })
        }
        GgmlType::Q6K => {
            nested::<210, 16, 208, false>(ggml_type, bytes, to, |b, out, [factors, _]| {
                for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                    factors[i] = b[192 + i].cast_signed();
                    let (ql, low_shift) = (64 * (i / 8) + 16 * (i % 4), 4 * (i / 4 % 2));
                    let (qh, high_shift) = two_bit_run(i);
                    for ((out, l), h) in out.iter_mut().zip(&b[ql..]).zip(&b[128 + qh..]) {
                        *out = (l >> low_shift & 15 | (h >> high_shift & 3) << 4).wrapping_sub(32);
                    }
                }
            })
        }
        _ => Err(Error::NoDecoder { ggml_type }),
    }
}

fn length(ggml_type: GgmlType, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::Length {
            ggml_type,
            expected: expected as u64,
            got: got as u64,
        })
    }
}

/// Blocks of 32 values after a binary16 scale, and a minimum if there is one.
#[inline(always)]
fn simple<const B: usize, const MINIMUM: bool>(
    ggml_type: GgmlType,
    bytes: &[u8],
    to: BlockIntegers<'_>,
    codes: impl Fn(&[u8; B], &mut [u8; 32]),
) -> Result<()> {
    let (blocks, [scales, minima]) = (bytes.as_chunks::<B>().0, to.halves);
    length(ggml_type, blocks.len(), scales.len())?;
    for ((block, out), scale) in blocks.iter().zip(to.codes.as_chunks_mut().0).zip(scales) {
        *scale = u16::from_le_bytes([block[0], block[1]]);
        codes(block, out);
    }
    if MINIMUM {
        length(ggml_type, blocks.len(), minima.len())?;
        blocks
            .iter()
            .zip(minima)
            .for_each(|(block, minimum)| *minimum = u16::from_le_bytes([block[2], block[3]]));
    }
    Ok(())
}

/// Blocks of 256 values in groups of `G`, whose scale, and the minimum after it, is at byte `AT`.
#[inline(always)]
fn nested<const B: usize, const G: usize, const AT: usize, const MINIMUM: bool>(
    ggml_type: GgmlType,
    bytes: &[u8],
    to: BlockIntegers<'_>,
    parts: impl Fn(&[u8; B], &mut [u8; 256], [&mut [i8]; 2]),
) -> Result<()> {
    let (blocks, [scales, minima], [factors, minimum_factors]) =
        (bytes.as_chunks::<B>().0, to.halves, to.factors);
    length(ggml_type, blocks.len(), scales.len())?;
    length(ggml_type, blocks.len() * (256 / G), factors.len())?;
    if MINIMUM {
        length(ggml_type, blocks.len(), minima.len())?;
        length(ggml_type, blocks.len() * (256 / G), minimum_factors.len())?;
        // The other sign.
        blocks.iter().zip(minima).for_each(|(block, minimum)| {
            *minimum = u16::from_le_bytes([block[AT + 2], block[AT + 3]]) ^ 0x8000
        });
    }
    let mut minimum_factors = minimum_factors.chunks_mut(256 / G);
    for (((block, out), scale), factors) in blocks
        .iter()
        .zip(to.codes.as_chunks_mut().0)
        .zip(scales)
        .zip(factors.chunks_mut(256 / G))
    {
        *scale = u16::from_le_bytes([block[AT], block[AT + 1]]);
        parts(
            block,
            out,
            [factors, minimum_factors.next().unwrap_or_default()],
        );
    }
    Ok(())
}

/// The low halves of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8], out: &mut [u8; 32]) {
    let (low, high) = out.split_at_mut(16);
    for ((low, high), q) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (q & 15, q >> 4);
    }
}

/// Bit j of a little-endian u32 is the fifth bit of code j.
#[inline(always)]
fn fifth_bits(bytes: &[u8], out: &mut [u8; 32]) {
    for (j, q) in out.iter_mut().enumerate() {
        *q |= (bytes[j / 8] >> (j % 8) & 1) << 4;
    }
}
