//! Layouts of variable length: a stream of self-delimiting blocks.
//!
//! ```text
//! packed matrix = block block …                      block = u32 LE length of the body, body
//! a block covers max(1, 65536 / K) stacked rows, the last block of the matrix the remaining rows
//! ```
//!
//! Blocks are independent, so strips of rows cut at block boundaries can be packed separately and
//! concatenated, and damage stays inside its block. A [`Coder`] defines the body.

use super::{Bad, Layout, PackedLen, Unpacked, check_precision, check_values, unsupported};
use crate::{Error, MatrixSpec, Precision, Result};
use std::fmt::Debug;
use std::marker::PhantomData;

/// Target number of values of a block.
const BLOCK_VALUES: usize = 1 << 16;
/// Bytes before each body.
const HEADER: usize = 4;
/// Largest number of columns: a block holds at least one row.
const MOST_COLUMNS: usize = 1 << 16;

/// Codes the body of a block. The reader knows the number of values and the precision.
pub(super) trait Coder: Send + Sync + Debug {
    const NAME: &'static str;
    const SUMMARY: &'static str;
    const PRECISIONS: &'static [Precision];

    /// Upper bound of the length of a body of `n ≥ 1` values.
    fn bound(precision: Precision, n: usize) -> usize;

    /// Appends the body of `values`, which has at least one value, all in the alphabet.
    fn encode(precision: Precision, values: &[i8], out: &mut Vec<u8>);

    /// Decodes all of `body` into all of `values`. Accepts any bytes; after [`Bad`] the values are
    /// unspecified.
    fn decode(precision: Precision, body: &[u8], values: &mut [i8]) -> Result<(), Bad>;
}

/// The layout of one coder.
#[derive(Debug)]
pub(super) struct Framed<C>(PhantomData<C>);

impl<C: Coder> Framed<C> {
    pub(super) const fn new() -> Self {
        Self(PhantomData)
    }
}

/// Stacked rows of a full block.
fn block_rows(spec: &MatrixSpec) -> usize {
    (BLOCK_VALUES / spec.cols.max(1)).max(1)
}

/// Values of a full block; a matrix without columns has no blocks.
fn block_values(spec: &MatrixSpec) -> usize {
    block_rows(spec) * spec.cols.max(1)
}

impl<C: Coder> Layout for Framed<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn summary(&self) -> &'static str {
        C::SUMMARY
    }

    fn check(&self, spec: &MatrixSpec) -> Result<()> {
        check_precision(C::NAME, spec, C::PRECISIONS)?;
        // A few bytes can encode a block of equal values, so the size of a block bounds the memory
        // that a malicious file can make a reader allocate.
        if spec.cols > MOST_COLUMNS {
            return Err(unsupported(
                C::NAME,
                format!("{} columns, at most {MOST_COLUMNS} make a block", spec.cols),
            ));
        }
        Ok(())
    }

    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen {
        let (n, block) = (spec.values_len(), block_values(spec));
        let full = n / block * (HEADER + C::bound(spec.precision, block));
        PackedLen::AtMost(match n % block {
            0 => full,
            rest => full + HEADER + C::bound(spec.precision, rest),
        })
    }

    fn chunk_rows(&self, spec: &MatrixSpec) -> Option<usize> {
        Some(block_rows(spec))
    }

    fn pack_into(
        &self,
        spec: &MatrixSpec,
        values: &[i8],
        _: &[f32],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.check(spec)?;
        check_values(spec, values)?;
        for block in values.chunks(block_values(spec)) {
            let start = out.len();
            out.extend([0; HEADER]);
            C::encode(spec.precision, block, out);
            // `check` made sure that the length fits.
            let len = (out.len() - start - HEADER) as u32;
            out[start..start + HEADER].copy_from_slice(&len.to_le_bytes());
        }
        Ok(())
    }

    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked> {
        self.check(spec)?;
        let length = |expected| Error::Length {
            what: "packed bytes",
            expected,
            got: bytes.len(),
        };
        // A block takes at least its header and one byte: the sizes in `spec` are checked against
        // the number of bytes before anything is allocated.
        let least = spec.values_len().div_ceil(block_values(spec)) * (HEADER + 1);
        if bytes.len() < least {
            return Err(length(least));
        }
        let mut values = vec![0; spec.values_len()];
        let mut at = 0;
        for block in values.chunks_mut(block_values(spec)) {
            let (header, rest) = bytes[at..]
                .split_first_chunk::<HEADER>()
                .ok_or_else(|| length(at + HEADER + 1))?;
            at += HEADER;
            let len = u32::from_le_bytes(*header) as usize;
            let body = rest
                .get(..len)
                .ok_or_else(|| length(at.saturating_add(len)))?;
            C::decode(spec.precision, body, block).map_err(|bad| bad.at(C::NAME, at))?;
            at += len;
        }
        if at == bytes.len() {
            Ok(Unpacked {
                values,
                scales: None,
            })
        } else {
            Err(length(at))
        }
    }
}

/// Appends `n` seven bits a byte, low bits first, the top bit set on all but the last byte.
pub(super) fn write_varint(mut n: usize, out: &mut Vec<u8>) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Reads a number of [`write_varint`] at `*at` and advances `*at`. Rejects a number that is longer
/// than necessary or above 2^56.
pub(super) fn read_varint(body: &[u8], at: &mut usize) -> Result<usize, Bad> {
    let start = *at;
    let mut n = 0u64;
    for shift in (0..56).step_by(7) {
        let &byte = body.get(*at).ok_or_else(|| ends(body))?;
        *at += 1;
        n |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            let fits = usize::try_from(n).ok().filter(|_| byte != 0 || shift == 0);
            return fits.ok_or_else(|| {
                Bad::new(start, format!("the number {n} in {} bytes", *at - start))
            });
        }
    }
    Err(Bad::new(start, "a number of more than 56 bits"))
}

/// The body ends before its last value.
pub(super) fn ends(body: &[u8]) -> Bad {
    Bad::new(body.len(), "the end of the block, before all of its values")
}

/// Checks that a decoder has read the whole body.
pub(super) fn check_end(body: &[u8], at: usize) -> Result<(), Bad> {
    if at == body.len() {
        Ok(())
    } else {
        Err(Bad::new(
            at,
            format!("{} bytes after the block's last value", body.len() - at),
        ))
    }
}
