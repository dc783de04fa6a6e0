//! Linear layers of one input.

use crate::Result;
use crate::linear::{KernelPool, LayerInput, LinearLayer};

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
