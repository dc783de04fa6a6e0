//! Linear layers. This file alone calls the matrix kernels.
//!
//! A ternary layer of a model trained with int8 activations quantizes its input, with one absmax
//! scale per token, and multiplies integers. Every other layer multiplies floats.

use crate::Result;
use bitnet_kernels::dense::DenseMatrix;
use bitnet_kernels::matmul::{Prepacked, PrepackedActivations};
use bitnet_kernels::{Kernels, Pool};

/// The kernels and threads of a model.
#[derive(Debug)]
pub(crate) struct KernelPool {
    pub(crate) kernels: Kernels,
    pub(crate) pool: Pool,
}

/// The weights of a linear layer, `(N, K)`.
#[derive(Debug)]
pub(crate) enum LinearWeights {
    /// Ternary weights with int8 activations.
    Ternary(Prepacked),
    /// Weights of any kind with float activations.
    Dense(DenseMatrix),
}

/// `y = x · Wᵀ + bias`.
#[derive(Debug)]
pub(crate) struct LinearLayer {
    pub(crate) weights: LinearWeights,
    pub(crate) bias: Option<Vec<f32>>,
}

/// The input of linear layers, `[tokens, K]`: floats for layers that multiply floats, int8 for
/// ternary layers. Layers of the same K share one quantization.
#[derive(Debug, Default)]
pub(crate) struct LayerInput {
    floats: Vec<f32>,
    quantized: Option<PrepackedActivations>,
    /// Whether `quantized` holds the current input; otherwise it is a free buffer.
    fresh: bool,
}

impl LayerInput {
    /// The elements, if the last `write` was for layers that multiply floats.
    pub(crate) fn floats(&self) -> &[f32] {
        &self.floats
    }

    /// Writes the input of `layers` on the pool; `fill(token, out)` computes the `cols` elements of
    /// a token. If all layers multiply integers, each thread quantizes a token at once and its
    /// floats stay in cache.
    ///
    /// # Errors
    /// [`bitnet_core::Error::NotFinite`], wrapped, if a quantized token holds NaN or infinity.
    pub(crate) fn write(
        &mut self,
        runtime: &KernelPool,
        layers: &[&LinearLayer],
        (tokens, cols): (usize, usize),
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<()> {
        if let [
            LinearLayer {
                weights: LinearWeights::Ternary(w),
                ..
            },
            ..,
        ] = layers
        {
            let mut quantized = self.buffer_for(w)?;
            let all = layers
                .iter()
                .all(|l| matches!(&l.weights, LinearWeights::Ternary(w) if quantized.fits(w)));
            if all {
                quantized.requantize_rows(&runtime.kernels, &runtime.pool, w, tokens, &fill)?;
            }
            (self.quantized, self.fresh) = (Some(quantized), all);
            if all {
                return Ok(());
            }
        }
        self.fresh = false;
        self.floats.resize(tokens * cols, 0.0);
        runtime.pool.for_chunks(&mut self.floats, cols, fill);
        Ok(())
    }

    /// The quantized activations, if they fit these weights, or an empty buffer that does.
    fn buffer_for(&mut self, w: &Prepacked) -> Result<PrepackedActivations> {
        match self.quantized.take() {
            Some(same) if same.fits(w) => Ok(same),
            _ => {
                self.fresh = false;
                Ok(PrepackedActivations::from_values(&[], &[], w)?)
            }
        }
    }
}

impl LinearLayer {
    /// Bytes of the weights in memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            LinearWeights::Ternary(w) => w.memory(),
            LinearWeights::Dense(w) => w.bytes(),
        }
    }

    /// Integer multiply-adds per token; 0 for a layer that multiplies floats.
    pub(crate) fn integer_products(&self) -> usize {
        match &self.weights {
            LinearWeights::Ternary(w) => w.rows() * w.cols(),
            LinearWeights::Dense(_) => 0,
        }
    }

    /// `out = x · Wᵀ + bias`, `[tokens, N]`.
    ///
    /// # Errors
    /// [`bitnet_core::Error::NotFinite`], wrapped, if the input is quantized and holds NaN or
    /// infinity.
    pub(crate) fn apply(
        &self,
        runtime: &KernelPool,
        x: &mut LayerInput,
        out: &mut [f32],
    ) -> Result<()> {
        let (kernels, pool, bias) = (&runtime.kernels, &runtime.pool, self.bias.as_deref());
        match &self.weights {
            LinearWeights::Dense(w) => kernels.dense_matmul(pool, w, &x.floats, bias, out),
            LinearWeights::Ternary(w) => {
                let mut quantized = x.buffer_for(w)?;
                if !x.fresh {
                    quantized.requantize(kernels, &x.floats)?;
                }
                kernels.matmul(pool, w, &quantized, bias, out);
                (x.quantized, x.fresh) = (Some(quantized), true);
            }
        }
        Ok(())
    }
}
