//! Loops of laying weights out, compiled for each instruction set.

#[cfg(target_arch = "x86_64")]
use crate::Isa;
use crate::Kernels;

/// Values that [`quads`] takes at once: four steps of a row.
const QUADS: usize = 64;

/// The lanes of whole steps of a row of trits or int2: `value + offset` of column 4f + b in bits
/// 2f, 2f + 1 of byte b. Writes the lanes of whole runs of [`QUADS`] values, and returns how many
/// these are.
#[inline(always)]
fn quads_loop(values: &[i8], offset: u8, lanes: &mut [u32]) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    for (values, lanes) in values
        .as_chunks::<QUADS>()
        .0
        .iter()
        .zip(lanes.as_chunks_mut::<4>().0)
    {
        let mut pairs = [0; 8];
        for (pair, eight) in pairs.iter_mut().zip(values.as_chunks::<8>().0) {
            let eight = u64::from_le_bytes(eight.map(i8::cast_unsigned));
            // Bytes are added without a carry into the next one.
            let codes =
                ((eight & (0x7f * EACH)) + u64::from(offset) * EACH) ^ (eight & (0x80 * EACH));
            // The columns from 4 on come to bits 2 and 3 of the first four.
            *pair = codes | codes >> 30;
        }
        for (lane, [low, high]) in lanes.iter_mut().zip(pairs.as_chunks::<2>().0) {
            *lane = (low | high << 4) as u32;
        }
    }
    values.len() / QUADS * 4
}

/// Whether a value is outside `low … high`, or 0 where that is none.
#[inline(always)]
fn outside_loop(values: &[i8], low: i8, high: i8, no_zero: bool) -> bool {
    // Without an early exit this runs in wide registers.
    values.iter().fold(false, |bad, &v| {
        bad | (v < low) | (v > high) | (no_zero & (v == 0))
    })
}

#[cfg(target_arch = "x86_64")]
macro_rules! compiled {
    ($isa:ident, $features:literal) => {
        mod $isa {
            #[target_feature(enable = $features)]
            pub(super) fn quads(values: &[i8], offset: u8, lanes: &mut [u32]) -> usize {
                super::quads_loop(values, offset, lanes)
            }

            #[target_feature(enable = $features)]
            pub(super) fn outside(values: &[i8], low: i8, high: i8, no_zero: bool) -> bool {
                super::outside_loop(values, low, high, no_zero)
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
compiled!(avx2, "avx2");
#[cfg(target_arch = "x86_64")]
compiled!(avx512, "avx512f,avx512bw,avx512dq,avx512vl");

macro_rules! dispatch {
    ($kernels:ident, $loop:ident, $plain:ident($($argument:expr),*)) => {
        match $kernels.isa() {
            // SAFETY: `Kernels::new` made this value after `Isa::is_available` found every feature
            // that the loop enables.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { avx2::$loop($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Vbmi => unsafe { avx512::$loop($($argument),*) },
            _ => $plain($($argument),*),
        }
    };
}

/// See [`quads_loop`].
pub(super) fn quads(kernels: Kernels, values: &[i8], offset: u8, lanes: &mut [u32]) -> usize {
    dispatch!(kernels, quads, quads_loop(values, offset, lanes))
}

/// See [`outside_loop`].
pub(super) fn outside(kernels: Kernels, values: &[i8], low: i8, high: i8, no_zero: bool) -> bool {
    dispatch!(kernels, outside, outside_loop(values, low, high, no_zero))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_hold_the_codes() {
        for (offset, low, high) in [(1, -1, 1), (2, -2, 1)] {
            let span = i32::from(high) - i32::from(low) + 1;
            let values: Vec<i8> = (0..4 * QUADS as i32 + 5)
                .map(|i| ((i * 5 + i / 7) % span) as i8 + low)
                .collect();
            let whole = values.len() / QUADS * 4;
            let expected: Vec<u32> = values
                .chunks(16)
                .take(whole)
                .map(|step| {
                    step.iter()
                        .enumerate()
                        .map(|(c, v)| {
                            u32::from((v + offset).cast_unsigned()) << (8 * (c % 4) + c / 4 * 2)
                        })
                        .sum()
                })
                .collect();
            for kernels in Kernels::all() {
                let mut lanes = vec![u32::MAX; whole + 3];
                assert_eq!(
                    quads(kernels, &values, offset.cast_unsigned(), &mut lanes),
                    whole
                );
                assert_eq!(
                    (&lanes[..whole], &lanes[whole..]),
                    (&expected[..], &[u32::MAX; 3][..]),
                    "{}",
                    kernels.isa()
                );
                assert!(
                    !outside(kernels, &values, low, high, false)
                        && outside(kernels, &values, low, high, true)
                );
                for at in [0, 63, 100, values.len() - 1] {
                    let mut wrong = values.clone();
                    wrong[at] = high + 1;
                    assert!(outside(kernels, &wrong, low, high, false));
                }
            }
        }
    }
}
