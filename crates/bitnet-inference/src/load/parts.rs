//! One matrix of several that are packed as one: its rows alone, or all values unpacked where the
//! layout cannot be cut there.

use super::tensors::{CheckpointLoader, FoundTensor};
use crate::Result;
use bitnet_core::Matrix;
use bitnet_formats::StoredMatrix;
use std::ops::Range;

impl FoundTensor<'_> {
    /// Checks that a packed matrix has the rows of the tensor.
    pub(super) fn check_spec(&self, q: &StoredMatrix) -> Result<()> {
        let [_, cols] = self.shape;
        let rows = self.tensor.elements() / cols.max(1);
        if (q.spec.rows, q.spec.cols) == (rows, cols) {
            return Ok(());
        }
        Err(self.error(
            format!("a matrix of {rows} × {cols}"),
            format!("{} × {}", q.spec.rows, q.spec.cols),
        ))
    }

    /// The rows of the matrix among those of all matrices of the tensor.
    pub(super) fn rows(&self) -> Range<usize> {
        self.first..self.first + self.shape[0]
    }
}

impl CheckpointLoader<'_> {
    /// The values and scales of a matrix.
    pub(super) fn matrix(&self, found: FoundTensor<'_>, q: &StoredMatrix) -> Result<Matrix> {
        let name = &found.tensor.name;
        let Some(unpacked) = found.unpacked else {
            return Ok(self.source.matrix(name, q)?);
        };
        found.check_spec(q)?;
        if let Some(matrix) = self.source.matrix_part(name, q, found.rows())? {
            return Ok(matrix);
        }
        let whole = match unpacked.get() {
            Some(whole) => whole,
            None => {
                let whole = self.source.matrix(name, q)?;
                unpacked.get_or_init(|| whole)
            }
        };
        Ok(whole.select_rows(&found.rows().collect::<Vec<_>>()))
    }
}
