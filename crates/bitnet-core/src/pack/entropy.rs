//! `entropy`: values of any precision close to the order-0 entropy of each block, by range
//! asymmetric numeral systems. Ours; after J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540).
//!
//! The body of a block (see [`super::framed`]) of `n` values of an alphabet of `A` symbols, a
//! value's symbol being its rank:
//!
//! ```text
//! 0, the values as one row of base-3 (ternary) or of fixed-width codes (the others)      where that is no longer
//! 1, frequencies, states, words
//!    frequencies   those of the first A − 1 symbols as varints; all A add up to M, the last is what remains;
//!                  a 0 is followed by a varint: how many more zeros come next
//!    states        u32 LE, one for each lane: 4 lanes from 4096 values on, else 1
//!    words         u16 LE, to the end of the body
//! ```
//!
//! `M = 2^12`, for int8 `2^14`. With `f` the frequency of a symbol and `c` the sum of those before
//! it, lane `i % lanes` gives value `i`:
//!
//! ```text
//! slot = x mod M;   the symbol with c ≤ slot < c + f;   x ← f · (x div M) + slot − c;   if x < 2^16: x ← 2^16 · x + next word
//! ```
//!
//! The states begin within 2^16 … 2^32 − 1, and end at exactly 2^16 with no word left. A body that
//! passes this last check is the one that a writer makes of these values and frequencies.

use super::framed::{Coder, Framed, ends, read_varint, write_varint};
use super::{Bad, base3, bits};
use crate::{Precision, Result};

/// Order-0 coding, the model in the header.
#[derive(Debug)]
pub(super) struct Entropy;

/// The layout.
pub(super) const LAYOUT: Framed<Entropy> = Framed::new();

const STORED: u8 = 0;
const CODED: u8 = 1;
/// States stay in `LOW ..= u32::MAX` between symbols.
const LOW: u32 = 1 << 16;
/// Lanes of a long block, and its smallest length: four states take a dozen bytes more and keep
/// four multiplications in flight.
const LANES: usize = 4;
const LANES_FROM: usize = 4096;

/// log2 of the sum of all frequencies.
const fn scale_bits(precision: Precision) -> u32 {
    match precision {
        Precision::Int8 => 14,
        _ => 12,
    }
}

fn symbol(precision: Precision, value: i8) -> usize {
    let rank = usize::from(value.wrapping_sub(precision.range().0).cast_unsigned());
    if precision == Precision::Binary {
        rank / 2
    } else {
        rank
    }
}

fn value(precision: Precision, symbol: usize) -> i8 {
    let rank = if precision == Precision::Binary {
        2 * symbol
    } else {
        symbol
    };
    precision.range().0.wrapping_add((rank as u8).cast_signed())
}

fn stored_len(precision: Precision, n: usize) -> usize {
    match precision {
        Precision::Ternary => base3::packed_len(n),
        _ => bits::packed_len(precision, n),
    }
}

impl Coder for Entropy {
    const NAME: &'static str = "entropy";
    const SUMMARY: &'static str = "any precision, rANS with each block's frequencies in its \
        header, close to the order-0 entropy (ours)";
    const PRECISIONS: &'static [Precision] = Precision::ALL;

    fn bound(precision: Precision, n: usize) -> usize {
        1 + stored_len(precision, n)
    }

    fn encode(precision: Precision, values: &[i8], out: &mut Vec<u8>) {
        let start = out.len();
        out.push(CODED);
        encode_coded(precision, values, out);
        let stored = stored_len(precision, values.len());
        if out.len() - start > stored {
            out.truncate(start);
            out.push(STORED);
            out.resize(start + 1 + stored, 0);
            match precision {
                Precision::Ternary => base3::pack_row(values, &mut out[start + 1..]),
                _ => bits::pack_row(precision, values, &mut out[start + 1..]),
            }
        }
    }

    fn decode(precision: Precision, body: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        let (&tag, rest) = body.split_first().ok_or_else(|| ends(body))?;
        let decoded = match (tag, precision) {
            (STORED, Precision::Ternary) => base3::decode_body(rest, values),
            (STORED, _) if rest.len() != stored_len(precision, values.len()) => Err(Bad::new(
                0,
                format!("{} bytes for {} stored values", rest.len(), values.len()),
            )),
            (STORED, _) => bits::unpack_row(precision, rest, values),
            (CODED, _) => decode_coded(precision, rest, values),
            _ => {
                return Err(Bad::new(
                    0,
                    format!("the tag {tag}, which is neither a stored nor a coded block's"),
                ));
            }
        };
        decoded.map_err(|bad| Bad {
            offset: bad.offset + 1,
            ..bad
        })
    }
}

/// Frequencies that add up to `total`, as near to proportional to the counts as rounding goes, and
/// none 0 whose count is not.
fn frequencies(counts: &[u64], total: u64) -> Vec<u64> {
    let n: u64 = counts.iter().sum();
    let mut freqs: Vec<u64> = counts
        .iter()
        .map(|&c| {
            if c == 0 {
                0
            } else {
                ((c * total + n / 2) / n).max(1)
            }
        })
        .collect();
    // Ratios are compared as products, so that every machine picks the same symbol. Counts are
    // below 2^32, frequencies at most 2^14.
    loop {
        let sum: u64 = freqs.iter().sum();
        if sum == total {
            return freqs;
        }
        let seen = (0..freqs.len()).filter(|&s| counts[s] > 0);
        if sum > total {
            // From the symbol that has the most for its count; one above 1 exists, since total ≥
            // the number of symbols.
            let most = seen.filter(|&s| freqs[s] > 1).reduce(|a, b| {
                if freqs[b] * counts[a] > freqs[a] * counts[b] {
                    b
                } else {
                    a
                }
            });
            freqs[most.expect("more symbols than the frequencies can add up to")] -= 1;
        } else {
            let least = seen.reduce(|a, b| {
                if freqs[b] * counts[a] < freqs[a] * counts[b] {
                    b
                } else {
                    a
                }
            });
            freqs[least.expect("a block without values")] += 1;
        }
    }
}

fn encode_coded(precision: Precision, values: &[i8], out: &mut Vec<u8>) {
    let bits = scale_bits(precision);
    let mut counts = vec![0u64; precision.levels()];
    for &v in values {
        counts[symbol(precision, v)] += 1;
    }
    let freqs = frequencies(&counts, 1 << bits);
    for run in freqs[..freqs.len() - 1].chunk_by(|&a, &b| a == 0 && b == 0) {
        write_varint(run[0] as usize, out);
        if run[0] == 0 {
            write_varint(run.len() - 1, out);
        }
    }
    // (frequency, sum of those before it) of each value, by its bit pattern.
    let mut ranges = [(0u32, 0u32); 256];
    let mut sum = 0;
    for (s, &f) in freqs.iter().enumerate() {
        ranges[usize::from(value(precision, s).cast_unsigned())] = (f as u32, sum);
        sum += f as u32;
    }
    // Encoded backwards, because the decoder reads forwards.
    let lanes = if values.len() < LANES_FROM { 1 } else { LANES };
    let mut states = [LOW; LANES];
    let mut words = Vec::with_capacity(values.len() / 8);
    for (i, &v) in values.iter().enumerate().rev() {
        let (f, start) = ranges[usize::from(v.cast_unsigned())];
        let x = &mut states[i % lanes];
        if u64::from(*x) >= u64::from(f) << (32 - bits) {
            words.push(*x as u16);
            *x >>= 16;
        }
        *x = ((*x / f) << bits) + *x % f + start;
    }
    out.extend(states[..lanes].iter().flat_map(|x| x.to_le_bytes()));
    out.extend(words.iter().rev().flat_map(|w| w.to_le_bytes()));
}

/// The symbol of one slot of 0 … M − 1.
#[derive(Clone, Copy, Default)]
struct DecodeSlot {
    /// Frequency of the symbol.
    freq: u16,
    /// Distance of the slot from the symbol's first.
    offset: u16,
    value: i8,
}

impl DecodeSlot {
    /// The state after this symbol, before it takes a word. With `x ≥ 2^16` it is at least 4 and
    /// never overflows.
    #[inline]
    fn next(self, x: u32, bits: u32) -> u32 {
        u32::from(self.freq) * (x >> bits) + u32::from(self.offset)
    }
}

/// The slots that the frequencies at the beginning of the body describe, M of them, and where the
/// states begin.
fn read_slots(precision: Precision, body: &[u8]) -> Result<(Vec<DecodeSlot>, usize), Bad> {
    let mut at = 0;
    let total = 1usize << scale_bits(precision);
    let mut slots = Vec::with_capacity(total);
    let last = precision.levels() - 1;
    let (mut s, mut after_zeros) = (0, false);
    while s <= last {
        let (start, left) = (at, total - slots.len());
        let freq = if s < last {
            read_varint(body, &mut at)?
        } else {
            left
        };
        if freq > left {
            return Err(Bad::new(
                start,
                format!("the frequency {freq} where {left} of {total} are left"),
            ));
        }
        // At most 2^14, so it fits.
        slots.extend((0..freq as u16).map(|offset| DecodeSlot {
            freq: freq as u16,
            offset,
            value: value(precision, s),
        }));
        s += 1;
        if freq == 0 && s <= last {
            let more = read_varint(body, &mut at)?;
            if after_zeros || more > last - s {
                return Err(Bad::new(
                    start,
                    format!(
                        "{} frequencies of 0 from symbol {} of {}",
                        more + 1,
                        s - 1,
                        last + 1
                    ),
                ));
            }
            s += more;
        }
        after_zeros = freq == 0;
    }
    Ok((slots, at))
}

fn decode_coded(precision: Precision, body: &[u8], values: &mut [i8]) -> Result<(), Bad> {
    let (slots, at) = read_slots(precision, body)?;
    match (precision, values.len() < LANES_FROM) {
        (Precision::Int8, true) => decode_words::<14, 1>(&slots, body, at, values),
        (Precision::Int8, false) => decode_words::<14, LANES>(&slots, body, at, values),
        (_, true) => decode_words::<12, 1>(&slots, body, at, values),
        (_, false) => decode_words::<12, LANES>(&slots, body, at, values),
    }
}

/// Decodes states and words, which begin at `at` of the body. `slots` has `2^BITS` entries.
fn decode_words<const BITS: u32, const N: usize>(
    slots: &[DecodeSlot],
    body: &[u8],
    at: usize,
    values: &mut [i8],
) -> Result<(), Bad> {
    let mask = (1u32 << BITS) - 1;
    let slots = &slots[..mask as usize + 1];
    let (heads, words) = body[at..]
        .split_at_checked(4 * N)
        .ok_or_else(|| ends(body))?;
    let mut states = [0; N];
    for (lane, (x, head)) in states.iter_mut().zip(heads.as_chunks::<4>().0).enumerate() {
        *x = u32::from_le_bytes(*head);
        if *x < LOW {
            return Err(Bad::new(
                at + 4 * lane,
                format!("the state {x:#x}, below 2^16"),
            ));
        }
    }
    let mut pos = 0;
    let (rounds, tail) = values.as_chunks_mut::<N>();
    let mut rounds = rounds.iter_mut();
    // While eight bytes are left, a round of at most four words takes them from one load, without a
    // branch.
    while let Some(ahead) = words[pos..].first_chunk::<8>() {
        let Some(round) = rounds.next() else { break };
        let mut ahead = u64::from_le_bytes(*ahead);
        for (x, out) in states.iter_mut().zip(round) {
            let slot = slots[(*x & mask) as usize];
            *out = slot.value;
            let next = slot.next(*x, BITS);
            let take = next < LOW;
            *x = if take {
                next << 16 | (ahead & 0xffff) as u32
            } else {
                next
            };
            ahead >>= 16 * u32::from(take);
            pos += 2 * usize::from(take);
        }
    }
    for out in rounds.flatten().chain(tail).enumerate() {
        let (i, out) = out;
        let x = &mut states[i % N];
        let slot = slots[(*x & mask) as usize];
        *out = slot.value;
        *x = slot.next(*x, BITS);
        if *x < LOW {
            let word = words[pos..].first_chunk::<2>().ok_or_else(|| ends(body))?;
            *x = *x << 16 | u32::from(u16::from_le_bytes(*word));
            pos += 2;
        }
    }
    if pos != words.len() {
        return Err(Bad::new(
            at + 4 * N + pos,
            format!("{} bytes after the last word", words.len() - pos),
        ));
    }
    match states.iter().position(|&x| x != LOW) {
        None => Ok(()),
        Some(lane) => Err(Bad::new(
            at + 4 * lane,
            format!("a state that ends at {:#x} instead of 2^16", states[lane]),
        )),
    }
}
