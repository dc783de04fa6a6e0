//! `hybrid`: ternary, each block in whichever coding is shortest. Ours; for matrices that differ
//! from stretch to stretch.
//!
//! The body of a block (see [`super::framed`]) is a tag and a body of that coding, the lowest tag
//! where several are equally short:
//!
//! ```text
//! 0   the block's values in base-3, as one row
//! 1   a body of run-length (a full block of one non-zero value takes five bytes)
//! 2   a body of sparse
//! ```
//!
//! A reader takes any tag, shortest or not. Arithmetic coding is left to `entropy`: every coding
//! here decodes without a division or a model.

use super::framed::{Coder, Framed, ends};
use super::run_length::RunLength;
use super::sparse::Sparse;
use super::{Bad, base3};
use crate::{Precision, Result};

/// The shortest of the codings.
#[derive(Debug)]
pub(super) struct Hybrid;

/// The layout.
pub(super) const LAYOUT: Framed<Hybrid> = Framed::new();

const BASE_3: u8 = 0;
const RUN_LENGTH: u8 = 1;
const SPARSE: u8 = 2;

impl Coder for Hybrid {
    const NAME: &'static str = "hybrid";
    const SUMMARY: &'static str = "ternary, the shortest of base-3, run-length and sparse for \
        each block, at most 1.6 bits per weight and 5 bytes per block (ours)";
    const PRECISIONS: &'static [Precision] = &[Precision::Ternary];

    fn bound(_: Precision, n: usize) -> usize {
        1 + base3::packed_len(n)
    }

    fn encode(precision: Precision, values: &[i8], out: &mut Vec<u8>) {
        let mut runs = Vec::new();
        RunLength::encode(precision, values, &mut runs);
        let mut places = Vec::new();
        Sparse::encode(precision, values, &mut places);
        let dense = base3::packed_len(values.len());
        if dense <= runs.len().min(places.len()) {
            out.push(BASE_3);
            let start = out.len();
            out.resize(start + dense, 0);
            base3::pack_row(values, &mut out[start..]);
        } else if runs.len() <= places.len() {
            out.push(RUN_LENGTH);
            out.append(&mut runs);
        } else {
            out.push(SPARSE);
            out.append(&mut places);
        }
    }

    fn decode(precision: Precision, body: &[u8], values: &mut [i8]) -> Result<(), Bad> {
        let (&tag, rest) = body.split_first().ok_or_else(|| ends(body))?;
        let decoded = match tag {
            BASE_3 => base3::decode_body(rest, values),
            RUN_LENGTH => RunLength::decode(precision, rest, values),
            SPARSE => Sparse::decode(precision, rest, values),
            _ => {
                return Err(Bad::new(
                    0,
                    format!("the tag {tag}, and there are 0, 1 and 2"),
                ));
            }
        };
        decoded.map_err(|bad| Bad {
            offset: bad.offset + 1,
            ..bad
        })
    }
}
