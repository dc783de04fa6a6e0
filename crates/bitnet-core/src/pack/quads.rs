//! Four two-bit ternary codes a byte, a quarter of the values apart. Shared by the foreign layouts
//! that are strided in this way.
//!
//! With `m` bytes, byte `p` holds the codes (value + 1) of values `p`, `m + p`, `2m + p` and `3m +
//! p`, at the four given shifts:
//!
//! ```text
//! low first    [ 3m+p | 2m+p |  m+p |   p  ]     hf-bitnet (m = the matrix / 4), tq2_0 (m = 32)
//! high first   [   p  |  m+p | 2m+p | 3m+p ]     i2_s (m = 32), i2_s-g64 (m = 16), i2_s-x4 (m = K)
//! ```

use super::Bad;
use crate::Result;

/// Shifts of the four quarters: the first in the low bits.
pub(super) const LOW_FIRST: [u32; 4] = [0, 2, 4, 6];
/// Shifts of the four quarters: the first in the high bits.
pub(super) const HIGH_FIRST: [u32; 4] = [6, 4, 2, 0];

#[inline]
fn code(value: i8) -> u8 {
    value.wrapping_add(1).cast_unsigned()
}

/// Packs up to `4 · out.len()` trits; where values are missing at the end their fields are 0.
#[inline]
pub(super) fn pack(values: &[i8], shifts: [u32; 4], out: &mut [u8]) {
    let m = out.len();
    if values.len() == 4 * m {
        let (front, back) = values.split_at(2 * m);
        let ((a, b), (c, d)) = (front.split_at(m), back.split_at(m));
        for ((((out, &a), &b), &c), &d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            *out = code(a) << shifts[0]
                | code(b) << shifts[1]
                | code(c) << shifts[2]
                | code(d) << shifts[3];
        }
        return;
    }
    out.fill(0);
    for (quarter, shift) in values.chunks(m.max(1)).zip(shifts) {
        for (out, &value) in out.iter_mut().zip(quarter) {
            *out |= code(value) << shift;
        }
    }
}

/// Unpacks up to `4 · bytes.len()` trits. Code 3 and a field beyond the values that is not 0 are
/// [`Bad`].
#[inline]
pub(super) fn unpack(bytes: &[u8], shifts: [u32; 4], values: &mut [i8]) -> Result<(), Bad> {
    if bytes.iter().fold(0u8, |bad, &b| bad | (b & b >> 1 & 0x55)) != 0
        && let Some(i) = bytes.iter().position(|&b| b & b >> 1 & 0x55 != 0)
    {
        return Err(Bad::new(i, format!("{:#04x}, with a code 3", bytes[i])));
    }
    let m = bytes.len();
    if values.len() < 4 * m {
        for (quarter, shift) in shifts.into_iter().enumerate() {
            let used = values.len().saturating_sub(quarter * m).min(m);
            if let Some(i) = bytes[used..].iter().position(|&b| b >> shift & 3 != 0) {
                let i = used + i;
                return Err(Bad::new(
                    i,
                    format!(
                        "{:#04x}, with a code in field {quarter}, which no row has",
                        bytes[i]
                    ),
                ));
            }
        }
    }
    for (quarter, shift) in values.chunks_mut(m.max(1)).zip(shifts) {
        for (value, &byte) in quarter.iter_mut().zip(bytes) {
            *value = (byte >> shift & 3).cast_signed() - 1;
        }
    }
    Ok(())
}
