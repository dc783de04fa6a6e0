//! Weights of a checkpoint, in the layouts of the kernels.

mod dense;
mod experts;
mod options;
mod parts;
mod provider;
mod rounding;
mod tensors;
mod ternary;

pub use options::{ActivationType, FloatType};
pub(crate) use provider::{EmbeddingUse, WeightProvider, numbered_experts};
pub(crate) use tensors::CheckpointLoader;

use crate::arch::DeltaVectors;
use crate::experts::Expert;
use crate::forward::NormGain;
use crate::linear::{LinearLayer, LinearWeights};
use crate::{Config, Result};
use bitnet_core::Precision;
use bitnet_core::hadamard::Hadamard;
use bitnet_formats::arch::DeltaShape;
use bitnet_formats::{Content, Kind};
use bitnet_kernels::dense::DenseMatrix;
use dense::WeightUse;
use tensors::FoundTensor;

/// The weights of a decoder.
pub(crate) struct DecoderLoader<'a> {
    pub(crate) tensors: CheckpointLoader<'a>,
    pub(crate) config: &'a Config,
}

impl WeightProvider for DecoderLoader<'_> {
    fn config(&self) -> &Config {
        self.config
    }

    fn norm(&self, module: &str, len: usize) -> Result<NormGain> {
        let name = format!("{module}.weight");
        let mut gain = self.tensors.vector(&name, len)?;
        let form = self.config.architecture.gguf_elements(&name);
        if self.tensors.source.kind() != Kind::Gguf {
            gain.iter_mut().for_each(|w| *w = form.to_gguf(*w));
        }
        Ok(NormGain(gain))
    }

    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<LinearLayer> {
        self.tensors.linear(module, rows, cols, bias)
    }

    fn delta_vectors(&self, module: &str, shape: &DeltaShape) -> Result<DeltaVectors> {
        let (heads, width, taps) = (shape.value_heads, shape.conv_width(), shape.taps);
        let gguf = self.tensors.source.kind() == Kind::Gguf;
        let name = format!("{module}.conv1d.weight");
        let rows = match gguf {
            true => self.tensors.floats(&name, &[width, taps])?,
            false => self.tensors.floats(&name, &[width, 1, taps])?,
        };
        let conv = (0..taps * width).map(|i| rows[i % width * taps + i / width]);
        let name = format!("{module}.A_log");
        let mut rates = self.tensors.vector(&name, heads)?;
        let form = self.config.architecture.gguf_elements(&name);
        if !gguf {
            rates.iter_mut().for_each(|a| *a = form.to_gguf(*a));
        }
        Ok(DeltaVectors {
            conv: conv.collect(),
            rates,
            dt_bias: self.tensors.vector(&format!("{module}.dt_bias"), heads)?,
        })
    }

    fn grouped_input(&self, module: &str) -> Result<bool> {
        let name = self.tensors.stored_name(&format!("{module}.weight"));
        let rotation = self.tensors.source.input_rotation(&name)?;
        Ok(rotation.is_some_and(|input| input.grouped_heads))
    }

    fn experts(&self, mlp: &str, shape: [usize; 3]) -> Result<Vec<Expert>> {
        let stacked = self.tensors.stacked_experts(mlp, shape)?;
        stacked.map_or_else(|| numbered_experts(self, mlp, shape), Ok)
    }

    fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<DenseMatrix> {
        self.tensors.embedding(module, rows, cols)
    }

    fn rotation(&self, module: &str, used_as: EmbeddingUse) -> Result<Option<Hadamard>> {
        self.tensors.rotation(module, used_as)
    }
}

impl CheckpointLoader<'_> {
    /// A linear layer `(rows, cols)`.
    pub(crate) fn linear(
        &self,
        module: &str,
        rows: usize,
        cols: usize,
        bias: bool,
    ) -> Result<LinearLayer> {
        let found = self.find(&format!("{module}.weight"), &[rows, cols])?;
        let bias = if bias {
            Some(self.vector(&format!("{module}.bias"), rows)?)
        } else {
            None
        };
        self.linear_of(found, module, bias)
    }

    /// A linear layer with the weights of a tensor, or of one matrix of a stack.
    fn linear_of(
        &self,
        found: FoundTensor<'_>,
        module: &str,
        bias: Option<Vec<f32>>,
    ) -> Result<LinearLayer> {
        let multiplier = self.multiplier(module)?;
        let quantize = self.int8
            && match &found.tensor.content {
                Content::Quantized(q) => {
                    q.spec.precision == Precision::Ternary && q.spec.planes == 1
                }
                _ => self.is_online(module)?,
            };
        let rotation = self.source.input_rotation(&found.tensor.name)?;
        let rotation = rotation.map(|input| input.transform.clone());
        let weights = if quantize {
            LinearWeights::Ternary(self.ternary(found, multiplier)?)
        } else if self.is_online(module)? {
            return Err(found.error(
                "int8 activations: weights that are made ternary on load are multiplied with \
                 nothing else",
                "float activations",
            ));
        } else {
            LinearWeights::Dense(self.dense_multiplied(found, multiplier)?)
        };
        Ok(LinearLayer {
            weights,
            bias,
            rotation,
        })
    }

    /// An embedding or the output matrix, `(rows, cols)`.
    pub(crate) fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<DenseMatrix> {
        let found = self.find(&format!("{module}.weight"), &[rows, cols])?;
        self.dense(found, WeightUse::Embedding)
    }

    /// The rotation of the rows of an embedding or an output matrix, if they have one.
    pub(crate) fn rotation(&self, module: &str, used_as: EmbeddingUse) -> Result<Option<Hadamard>> {
        let name = self.stored_name(&format!("{module}.weight"));
        let listed = self.source.rotation()?;
        let table = listed.is_some_and(|rotation| rotation.is_table(&name));
        let rotation = self.source.rotation_of(&name)?;
        if rotation.is_some() && used_as == EmbeddingUse::Table && !table {
            return Err(bitnet_formats::Error::tensor(
                self.source.path(),
                &name,
                "an entry in inverse_weight_names, since tokens are looked up in it",
                "one in weight_names alone",
            )
            .into());
        }
        Ok(rotation.cloned())
    }
}
