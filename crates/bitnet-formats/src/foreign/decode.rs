//! From the parts of a matrix to rows of f32.

use super::Foreign;
use crate::storage::Storage;
use crate::tensor::StoredId;
use crate::{Error, Result};

/// How to decode a matrix.
#[derive(Debug)]
pub(crate) enum Coding {
    /// F8 values or signed bytes times scales.
    Scaled(super::scaled::Scaled),
    /// Packed integers with scales and zero points.
    Packed(super::packed::Packed),
}

/// What is kept of the matrix that was read last: its scales, zero points and order of groups, and
/// the codes where a row of the matrix is a column of theirs.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// Packed codes, if they do not lie row by row.
    pub(super) codes: Vec<u8>,
    /// One for each row and group.
    pub(super) scales: Vec<f32>,
    /// Zero points (or biases), as many as scales, or none.
    pub(super) zeros: Vec<f32>,
    /// The group of each column.
    pub(super) group_of: Vec<u32>,
}

impl Coding {
    pub(super) fn load(&self, storage: &Storage, matrix: &Foreign) -> Result<Loaded> {
        match self {
            Self::Scaled(scaled) => scaled.load(storage),
            Self::Packed(packed) => packed.load(storage, matrix),
        }
    }

    /// Decodes elements from `start` on.
    pub(super) fn read(
        &self,
        storage: &Storage,
        loaded: &Loaded,
        start: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let cols = match self {
            Self::Scaled(scaled) => scaled.cols,
            Self::Packed(packed) => packed.cols,
        };
        let mut bytes = vec![];
        let mut row = vec![0.0; cols];
        let mut done = 0;
        while done < out.len() {
            let (r, first) = ((start + done) / cols, (start + done) % cols);
            let n = (cols - first).min(out.len() - done);
            match self {
                Self::Scaled(scaled) => scaled.row(storage, loaded, r, &mut bytes, &mut row)?,
                Self::Packed(packed) => packed.row(storage, loaded, r, &mut bytes, &mut row)?,
            }
            out[done..done + n].copy_from_slice(&row[first..first + n]);
            done += n;
        }
        Ok(())
    }
}

/// Value `i` of a stream of `bits` bits each, low bits first.
pub(super) fn code(bytes: &[u8], i: usize, bits: usize) -> u32 {
    let at = i * bits;
    let low = u32::from(bytes[at / 8]);
    let high = bytes.get(at / 8 + 1).map_or(0, |&b| u32::from(b));
    (high << 8 | low) >> (at % 8) & ((1 << bits) - 1)
}

/// All bytes of a stored tensor.
pub(super) fn all_bytes(storage: &Storage, id: StoredId) -> Result<Vec<u8>> {
    let mut bytes = vec![0; storage.stored(id).len as usize];
    storage.read(id, 0, &mut bytes)?;
    Ok(bytes)
}

/// An error about one part of a matrix.
pub(super) fn part_error(storage: &Storage, id: StoredId, expected: String, got: String) -> Error {
    let name = &storage.stored(id).name;
    Error::tensor(storage.file_of(id), name, expected, got)
}
