//! Where a graph takes its weights from: a checkpoint or a generator.

use crate::forward::NormGain;
use crate::linear::LinearLayer;
use crate::{Config, Result};
use bitnet_kernels::dense::DenseMatrix;

/// A source of weights. Modules have their Hugging Face names, without `.weight`.
pub(crate) trait WeightProvider: Sync {
    fn config(&self) -> &Config;
    /// The gain of a norm, `[len]`.
    fn norm(&self, module: &str, len: usize) -> Result<NormGain>;
    /// A linear layer `(rows, cols)`.
    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<LinearLayer>;
    /// The embedding or the output matrix, `(rows, cols)`.
    fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<DenseMatrix>;
}
