//! `run-length`: ternary, runs of one value. Ours; for matrices with long stretches of zeros or of
//! one sign.
//!
//! The body of a block (see [`super::framed`]) is one token for each maximal run of the block, rows
//! running on into one another:
//!
//! ```text
//! byte = [ r r r r r r c c ]     c = value + 1;   r < 63: a run of r + 1;   r = 63: a run of 64 + n, n a varint that follows
//! ```
//!
//! So a run of up to 63 takes a byte, and two runs of the same value never meet.

use super::Bad;
use super::framed::{Coder, Framed, check_end, ends, read_varint, write_varint};
use crate::{Precision, Result};

/// Runs of trits.
#[derive(Debug)]
pub(super) struct RunLength;

/// The layout.
pub(super) const LAYOUT: Framed<RunLength> = Framed::new();

/// The shortest run that takes more than one byte.
const LONG: usize = 64;

impl Coder for RunLength {
    const NAME: &'static str = "run-length";
    const SUMMARY: &'static str =
        "ternary, a byte for each run of up to 63 equal values, length by content (ours)";
    const PRECISIONS: &'static [Precision] = &[Precision::Ternary];

    fn bound(_: Precision, n: usize) -> usize {
        // A run of length 1 takes a byte, and no run takes more bytes than it has values.
        n
    }

    fn encode(_: Precision, values: &[i8], out: &mut Vec<u8>) {
        for run in values.chunk_by(|a, b| a == b) {
            let code = run[0].wrapping_add(1).cast_unsigned();
            if run.len() < LONG {
                out.push((run.len() - 1) as u8 * 4 + code);
            } else {
                out.push(63 * 4 + code);
                write_varint(run.len() - LONG, out);
            }
        }
    }

    fn decode(_: Precision, body: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        let (mut at, mut done, mut previous) = (0, 0, 3);
        while done < values.len() {
            let start = at;
            let &byte = body.get(at).ok_or_else(|| ends(body))?;
            at += 1;
            let (code, short) = (byte & 3, usize::from(byte >> 2));
            if code == 3 || code == previous {
                return Err(Bad::new(
                    start,
                    format!("a run of code {code} after one of code {previous}"),
                ));
            }
            let run = if short < LONG - 1 {
                short + 1
            } else {
                LONG + read_varint(body, &mut at)?
            };
            let left = values.len() - done;
            let target = values[done..].get_mut(..run);
            target
                .ok_or_else(|| {
                    Bad::new(
                        start,
                        format!("a run of {run} where {left} values are left"),
                    )
                })?
                .fill(code.cast_signed() - 1);
            done += run;
            previous = code;
        }
        check_end(body, at)
    }
}
