//! Where a graph takes its weights from: a checkpoint or a generator.

use crate::arch::DeltaVectors;
use crate::experts::Expert;
use crate::forward::NormGain;
use crate::linear::LinearLayer;
use crate::projections::Projections;
use crate::{Config, Result};
use bitnet_core::hadamard::Hadamard;
use bitnet_formats::arch::DeltaShape;
use bitnet_kernels::dense::DenseMatrix;

/// What an embedding's rows are used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EmbeddingUse {
    /// Tokens are looked up.
    Table,
    /// The output matrix.
    Head,
}

/// A source of weights. Modules have their Hugging Face names, without `.weight`.
pub(crate) trait WeightProvider: Sync {
    fn config(&self) -> &Config;
    /// The gain of a norm, `[len]`.
    fn norm(&self, module: &str, len: usize) -> Result<NormGain>;
    /// A linear layer `(rows, cols)`.
    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<LinearLayer>;
    /// The parameters of a gated delta net that are neither norms nor matrices.
    fn delta_vectors(&self, module: &str, shape: &DeltaShape) -> Result<DeltaVectors>;
    /// Whether a matrix takes the value heads of a gated delta net in Hugging Face's order, whatever
    /// the order of the model.
    fn grouped_input(&self, _module: &str) -> Result<bool> {
        Ok(false)
    }
    /// The experts of the module `mlp`; `shape` is their number, `ffn` and `hidden`.
    fn experts(&self, mlp: &str, shape: [usize; 3]) -> Result<Vec<Expert>>;
    /// The embedding or the output matrix, `(rows, cols)`.
    fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<DenseMatrix>;
    /// The rotation of the rows of an embedding or an output matrix, if they are in a rotated basis.
    fn rotation(&self, _module: &str, _used_as: EmbeddingUse) -> Result<Option<Hadamard>> {
        Ok(None)
    }
}

/// Experts that are modules of their own: `experts.N.gate_proj` and so on.
pub(crate) fn numbered_experts(
    provider: &dyn WeightProvider,
    mlp: &str,
    [count, ffn, hidden]: [usize; 3],
) -> Result<Vec<Expert>> {
    let expert = |i: usize| {
        let linear = |name: &str, rows, cols| {
            provider.linear(&format!("{mlp}.experts.{i}.{name}"), rows, cols, false)
        };
        Ok(Expert {
            gate_up: Projections::Separate([
                linear("gate_proj", ffn, hidden)?,
                linear("up_proj", ffn, hidden)?,
            ]),
            down: linear("down_proj", hidden, ffn)?,
        })
    };
    (0..count).map(expert).collect()
}
