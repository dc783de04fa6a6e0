//! Weight matrices for float activations.

use super::blocks::Blocks;
use super::lanes::Plain;
use super::rows::{Brains, Floats, Halves, RowSource, RowSteps};
use crate::error::Error;

/// The weights of a matrix; floats are row-major.
#[derive(Debug, Clone)]
pub enum DenseData {
    /// `[N, K]`.
    F32(Vec<f32>),
    /// `[N, K]`, the bits of binary16.
    F16(Vec<u16>),
    /// `[N, K]`, the bits of bfloat16.
    Bf16(Vec<u16>),
    /// Blocks of small integers.
    Blocks(Blocks),
}

/// Weights `(N, K)` as they are multiplied with floats.
#[derive(Debug, Clone)]
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    data: DenseData,
}

impl DenseMatrix {
    /// A matrix of N rows and K columns.
    ///
    /// # Errors
    /// [`Error::Matrix`] if the data has another length.
    pub fn new(rows: usize, cols: usize, data: DenseData) -> Result<Self, Error> {
        let check = |expected: Option<usize>, got: usize| match expected {
            Some(n) if n == got => Ok(()),
            _ => Err(bitnet_core::Error::Length {
                what: "weights",
                expected: expected.unwrap_or(usize::MAX),
                got,
            }),
        };
        let weights = rows.checked_mul(cols);
        match &data {
            DenseData::F32(v) => check(weights, v.len())?,
            DenseData::F16(v) | DenseData::Bf16(v) => check(weights, v.len())?,
            DenseData::Blocks(blocks) => {
                check(Some(rows), blocks.rows())?;
                check(Some(cols), blocks.cols())?;
            }
        }
        Ok(Self { rows, cols, data })
    }

    /// N, the number of output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, the number of input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The weights.
    pub fn data(&self) -> &DenseData {
        &self.data
    }

    /// Bytes of the weights, scales included.
    pub fn bytes(&self) -> usize {
        match &self.data {
            DenseData::F32(v) => 4 * v.len(),
            DenseData::F16(v) | DenseData::Bf16(v) => 2 * v.len(),
            DenseData::Blocks(blocks) => blocks.bytes(),
        }
    }

    /// Row `row` as floats: how an embedding is looked up.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not K elements.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "row {row} of {}, {} columns of {}",
            self.rows,
            out.len(),
            self.cols
        );
        fn fill<'a>(rows: impl RowSource<'a>, row: usize, out: &mut [f32]) {
            rows.row(row).widen(Plain, out);
        }
        let cols = self.cols;
        match &self.data {
            DenseData::F32(all) => fill(Floats { all, cols }, row, out),
            DenseData::F16(all) => fill(Halves { all, cols }, row, out),
            DenseData::Bf16(all) => fill(Brains { all, cols }, row, out),
            DenseData::Blocks(blocks) => blocks.row_into(row, out),
        }
    }
}

impl From<Blocks> for DenseMatrix {
    fn from(blocks: Blocks) -> Self {
        Self {
            rows: blocks.rows(),
            cols: blocks.cols(),
            data: DenseData::Blocks(blocks),
        }
    }
}
