//! Five trits in a byte: see the module above.

use super::shape::STEP_BYTES;

/// Set in a byte whose trits are negated.
const NEGATED: u8 = 0x80;
/// Numbers modulo 64 below this have +1 as their fifth trit: 82 numbers, 81 of them used.
const WITH_FIFTH: usize = 41;

const TABLES: Tables = Tables::new();

/// The first four trits of each number, as codes `t + 1` in 2-bit fields.
pub(crate) static QUADS: [u8; 128] = TABLES.quads;
/// The fifth trit of each number modulo 64, as code.
pub(crate) static FIFTHS: [u8; 64] = TABLES.fifths;
/// The byte of five trits, by Σ (t_i + 1) · 3^i.
static BYTES: [u8; 243] = TABLES.bytes;

/// The byte of five zeros.
pub(crate) const ZERO: u8 = TABLES.bytes[121];

struct Tables {
    quads: [u8; 128],
    fifths: [u8; 64],
    bytes: [u8; 243],
}

impl Tables {
    const fn new() -> Self {
        let mut tables = Self {
            quads: [0b01_01_01_01; 128],
            fifths: [1; 64],
            bytes: [0; 243],
        };
        let mut i = 0;
        while i < WITH_FIFTH {
            tables.fifths[i] = 2;
            i += 1;
        }
        // Of a pattern and its negation, the larger number in base 3 is the one whose last trit
        // other than 0 is +1.
        let (mut with, mut without) = (0, 0);
        let mut q = 121;
        while q < 243 {
            let number = if q / 81 == 2 {
                with += 1;
                (with - 1) / WITH_FIFTH * 64 + (with - 1) % WITH_FIFTH
            } else {
                without += 1;
                (without - 1) / (64 - WITH_FIFTH) * 64
                    + WITH_FIFTH
                    + (without - 1) % (64 - WITH_FIFTH)
            };
            tables.quads[number] =
                (q % 3 + 4 * (q / 3 % 3) + 16 * (q / 9 % 3) + 64 * (q / 27 % 3)) as u8;
            // The negation of q is 242 − q; zero is its own, and is not negated.
            tables.bytes[242 - q] = number as u8 | NEGATED;
            tables.bytes[q] = number as u8;
            q += 1;
        }
        assert!(with == 81 && without == 41, "122 patterns");
        tables
    }
}

/// Five times four codes `t + 1`, as the bytes of a lane.
#[inline(always)]
pub(crate) fn pack(quads: [u32; 5]) -> u32 {
    // A byte is at most 2 · (1 + 3 + 9 + 27 + 81) = 242.
    let numbers = quads[0] + 3 * quads[1] + 9 * quads[2] + 27 * quads[3] + 81 * quads[4];
    u32::from_le_bytes(numbers.to_le_bytes().map(|q| BYTES[usize::from(q)]))
}

/// Four trits as codes in 2-bit fields, and the code of the fifth.
#[inline(always)]
fn split(byte: u8) -> (u8, u8) {
    let (quad, fifth) = (
        QUADS[usize::from(byte & !NEGATED)],
        FIFTHS[usize::from(byte & 63)],
    );
    // No field exceeds 2, so nothing is borrowed.
    if byte & NEGATED != 0 {
        (0b10_10_10_10 - quad, 2 - fifth)
    } else {
        (quad, fifth)
    }
}

/// Whole steps, a code in each byte.
#[inline(always)]
pub(crate) fn unpack(weights: &[u8], out: &mut [u8]) {
    for (weights, out) in weights
        .as_chunks::<STEP_BYTES>()
        .0
        .iter()
        .zip(out.chunks_exact_mut(5 * STEP_BYTES))
    {
        for (i, &byte) in weights.iter().enumerate() {
            let (quad, fifth) = split(byte);
            for field in 0..4 {
                out[field * STEP_BYTES + i] = quad >> (2 * field) & 3;
            }
            out[4 * STEP_BYTES + i] = fifth;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_has_one_byte() {
        let mut seen = [false; 256];
        for q in 0..243u32 {
            let trits: [u32; 5] = std::array::from_fn(|i| q / 3u32.pow(i as u32) % 3);
            let lane = pack(trits.map(|t| t * 0x01_01_01_01)).to_le_bytes();
            assert!(lane.iter().all(|&b| b == lane[0]));
            assert!(
                !std::mem::replace(&mut seen[usize::from(lane[0])], true),
                "byte {} twice",
                lane[0]
            );
            let (quad, fifth) = split(lane[0]);
            let back: [u32; 5] =
                std::array::from_fn(|i| u32::from(if i < 4 { quad >> (2 * i) & 3 } else { fifth }));
            assert_eq!(back, trits);
        }
        assert_eq!(split(ZERO), (0b01_01_01_01, 1));
    }
}
