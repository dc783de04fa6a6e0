//! Linear layers of one input, and the gated feed-forward.

use crate::forward::NormGain;
use crate::linear::{KernelPool, LayerInput, LinearLayer};
use crate::{Activation, Config, Result};

/// N linear layers of one input: a matrix each, or one whose rows are theirs after one another.
#[derive(Debug)]
pub(crate) enum Projections<const N: usize> {
    Separate([LinearLayer; N]),
    Fused(Box<LinearLayer>),
}

impl<const N: usize> Projections<N> {
    /// The matrices.
    pub(crate) fn layers(&self) -> &[LinearLayer] {
        match self {
            Self::Separate(layers) => layers,
            Self::Fused(layer) => std::slice::from_ref(&**layer),
        }
    }

    /// Calls `f` with the matrices, for which an input is to be written.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&[&LinearLayer]) -> R) -> R {
        match self {
            Self::Separate(layers) => f(&layers.each_ref()),
            Self::Fused(layer) => f(&[layer]),
        }
    }

    /// `outs[i] = x · Wᵢᵀ + biasᵢ`, `[tokens, width]` of the width beside it. `fused` is a buffer.
    ///
    /// # Errors
    /// As [`LinearLayer::apply`].
    pub(crate) fn apply(
        &self,
        runtime: &KernelPool,
        x: &mut LayerInput,
        tokens: usize,
        fused: &mut Vec<f32>,
        outs: [(&mut Vec<f32>, usize); N],
    ) -> Result<()> {
        match self {
            Self::Separate(layers) => {
                for (layer, (out, width)) in layers.iter().zip(outs) {
                    out.resize(tokens * width, 0.0);
                    layer.apply(runtime, x, out)?;
                }
            }
            Self::Fused(layer) => {
                let row: usize = outs.iter().map(|(_, width)| width).sum();
                fused.resize(tokens * row, 0.0);
                layer.apply(runtime, x, fused)?;
                let mut first = 0;
                for (out, width) in outs {
                    out.resize(tokens * width, 0.0);
                    for (out, row) in out.chunks_exact_mut(width).zip(fused.chunks_exact(row)) {
                        out.copy_from_slice(&row[first..first + width]);
                    }
                    first += width;
                }
            }
        }
        Ok(())
    }
}

/// Weights of a gated feed-forward.
pub(crate) struct GatedWeights<'a> {
    /// `(ffn, hidden)` each.
    pub(crate) gate_up: &'a Projections<2>,
    /// `[ffn]`.
    pub(crate) sub_norm: Option<&'a NormGain>,
    /// `(hidden, ffn)`.
    pub(crate) down: &'a LinearLayer,
    pub(crate) ffn: usize,
}

/// Buffers of a gated feed-forward.
#[derive(Debug, Default)]
pub(crate) struct GatedBuffers {
    gate: Vec<f32>,
    up: Vec<f32>,
    /// The output of a matrix that is several layers.
    pub(crate) fused: Vec<f32>,
    /// The input of the down projection, `[tokens, ffn]`.
    product: LayerInput,
}

impl GatedBuffers {
    /// `out = down · RMS_sub(f(gate·x) ⊙ up·x)`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// As [`LinearLayer::apply`].
    pub(crate) fn apply(
        &mut self,
        (runtime, config): (&KernelPool, &Config),
        weights: &GatedWeights<'_>,
        x: &mut LayerInput,
        out: &mut [f32],
    ) -> Result<()> {
        let (kernels, ffn, down) = (&runtime.kernels, weights.ffn, weights.down);
        let tokens = out.len() / config.hidden;
        let outs = [(&mut self.gate, ffn), (&mut self.up, ffn)];
        weights
            .gate_up
            .apply(runtime, x, tokens, &mut self.fused, outs)?;
        let (gate, up) = (&self.gate, &self.up);
        self.product
            .write(runtime, &[down], (tokens, ffn), |token, out| {
                let (gate, up) = (&gate[token * ffn..][..ffn], &up[token * ffn..][..ffn]);
                match config.activation {
                    Activation::Silu => kernels.silu_mul(gate, up, out),
                    Activation::Relu2 => kernels.relu2_mul(gate, up, out),
                    Activation::GeluTanh => kernels.gelu_tanh_mul(gate, up, out),
                }
                if let Some(norm) = weights.sub_norm {
                    kernels.rms_norm_in_place(out, &norm.0, config.norm_eps);
                }
            })?;
        down.apply(runtime, &mut self.product, out)
    }
}
