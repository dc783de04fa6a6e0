//! `sparse`: ternary, the places of the non-zeros and their signs. Ours; for matrices of few
//! non-zeros.
//!
//! The body of a block (see [`super::framed`]) takes the shorter of two forms, the bitmap where
//! they are equal:
//!
//! ```text
//! 0, bitmap of the non-zeros (ceil(n / 8) bytes), signs
//! 1, varint number of non-zeros, for each a varint number of zeros since the one before, signs
//! signs: one bit for each non-zero, set for −1
//! ```
//!
//! Bits fill bytes from the least significant up; the bits left over are 0.

use super::Bad;
use super::framed::{Coder, Framed, check_end, ends, read_varint, write_varint};
use crate::{Precision, Result};

/// Places and signs of the non-zero trits.
#[derive(Debug)]
pub(super) struct Sparse;

/// The layout.
pub(super) const LAYOUT: Framed<Sparse> = Framed::new();

const BITMAP: u8 = 0;
const LIST: u8 = 1;

impl Coder for Sparse {
    const NAME: &'static str = "sparse";
    const SUMMARY: &'static str = "ternary, bitmap or list of the non-zeros and a bit for each \
        sign, length by content (ours)";
    const PRECISIONS: &'static [Precision] = &[Precision::Ternary];

    fn bound(_: Precision, n: usize) -> usize {
        1 + 2 * n.div_ceil(8)
    }

    fn encode(_: Precision, values: &[i8], out: &mut Vec<u8>) {
        let start = out.len();
        let bitmap_len = values.len().div_ceil(8);
        out.push(LIST);
        write_varint(values.iter().filter(|&&v| v != 0).count(), out);
        let (mut gap, mut fits) = (0, true);
        for &value in values {
            if value == 0 {
                gap += 1;
                continue;
            }
            write_varint(gap, out);
            gap = 0;
            fits = out.len() - start - 1 < bitmap_len;
            if !fits {
                break;
            }
        }
        if !fits || out.len() - start > bitmap_len {
            out.truncate(start);
            out.push(BITMAP);
            out.extend(values.chunks(8).map(|eight| {
                eight
                    .iter()
                    .rev()
                    .fold(0, |byte, &v| byte << 1 | u8::from(v != 0))
            }));
        }
        pack_signs(values, out);
    }

    fn decode(_: Precision, body: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        values.fill(0);
        let mut at = 1;
        match *body.first().ok_or_else(|| ends(body))? {
            BITMAP => {
                let bitmap = body
                    .get(at..at + values.len().div_ceil(8))
                    .ok_or_else(|| ends(body))?;
                for (&byte, eight) in bitmap.iter().zip(values.chunks_mut(8)) {
                    for (i, value) in eight.iter_mut().enumerate() {
                        *value = (byte >> i & 1).cast_signed();
                    }
                }
                check_left_over(bitmap, values.len(), at)?;
                at += bitmap.len();
            }
            LIST => {
                let count = read_varint(body, &mut at)?;
                let mut next = 0usize;
                for _ in 0..count {
                    let start = at;
                    let gap = read_varint(body, &mut at)?;
                    let place = next.saturating_add(gap);
                    let n = values.len();
                    *values.get_mut(place).ok_or_else(|| {
                        Bad::new(start, format!("a non-zero at {place} of {n} values"))
                    })? = 1;
                    next = place + 1;
                }
            }
            tag => {
                return Err(Bad::new(
                    0,
                    format!("the tag {tag}, which is neither a bitmap's nor a list's"),
                ));
            }
        }
        let signs = &body[at..];
        let mut non_zeros = 0;
        for value in values.iter_mut() {
            let byte = signs.get(non_zeros / 8).copied().unwrap_or(0);
            let negative = byte >> (non_zeros % 8) & 1;
            non_zeros += usize::from(*value != 0);
            *value *= 1 - 2 * negative.cast_signed();
        }
        let signs_len = non_zeros.div_ceil(8);
        if signs.len() < signs_len {
            return Err(ends(body));
        }
        check_left_over(&signs[..signs_len], non_zeros, at)?;
        check_end(body, at + signs_len)
    }
}

fn pack_signs(values: &[i8], out: &mut Vec<u8>) {
    // No branch on a value: it would be guessed wrong every third time.
    let (mut byte, mut used) = (0u8, 0u32);
    for &value in values {
        byte |= u8::from(value < 0) << used;
        used += u32::from(value != 0);
        if used == 8 {
            out.push(byte);
            (byte, used) = (0, 0);
        }
    }
    if used > 0 {
        out.push(byte);
    }
}

/// Checks that the bits of `bytes`, which begin at `start` of the body, are 0 from bit `n` on.
fn check_left_over(bytes: &[u8], n: usize, start: usize) -> Result<(), Bad> {
    match bytes.last() {
        Some(&last) if !n.is_multiple_of(8) && last >> (n % 8) != 0 => Err(Bad::new(
            start + bytes.len() - 1,
            format!("{last:#04x}, with bits beyond the last of {n}"),
        )),
        _ => Ok(()),
    }
}
