//! Linear layers: the one place that calls the matrix kernels.
//!
//! A ternary layer of a model that was trained so quantizes its input to int8 with one absmax scale for each token, and multiplies integers. Every other
//! layer multiplies floats.

use crate::Result;
use bitnet_kernels::dense::Matrix;
use bitnet_kernels::matmul::{Activations, Prepacked};
use bitnet_kernels::{Kernels, Pool};

/// What every step of a graph computes with.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) kernels: Kernels,
    pub(crate) pool: Pool,
}

/// The weights of a layer `(N, K)`.
#[derive(Debug)]
pub(crate) enum Weights {
    /// Ternary weights with int8 activations.
    Ternary(Prepacked),
    /// Anything with float activations.
    Dense(Matrix),
}

/// `y = x · Wᵀ + bias`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weights: Weights,
    pub(crate) bias: Option<Vec<f32>>,
}

/// The input of linear layers, `[tokens, K]`, quantized at most once however many layers of one shape read it.
#[derive(Debug, Default)]
pub(crate) struct Input {
    floats: Vec<f32>,
    quantized: Option<Activations>,
    /// Whether `quantized` are the floats of now; if not, it is room for others.
    fresh: bool,
}

impl Input {
    /// The elements.
    pub(crate) fn floats(&self) -> &[f32] {
        &self.floats
    }

    /// Room for `len` elements, to be written anew.
    pub(crate) fn fill(&mut self, len: usize) -> &mut [f32] {
        self.fresh = false;
        self.floats.resize(len, 0.0);
        &mut self.floats
    }

    /// Takes elements, and leaves those before in their place.
    pub(crate) fn swap(&mut self, floats: &mut Vec<f32>) {
        self.fresh = false;
        std::mem::swap(&mut self.floats, floats);
    }
}

impl Linear {
    /// Bytes of the weights in memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Ternary(w) => w.memory(),
            Weights::Dense(w) => w.bytes(),
        }
    }

    /// Multiply-adds of a token, if they are of integers.
    pub(crate) fn integer_products(&self) -> usize {
        match &self.weights {
            Weights::Ternary(w) => w.rows() * w.cols(),
            Weights::Dense(_) => 0,
        }
    }

    /// `out = x · Wᵀ + bias`, `[tokens, N]`.
    ///
    /// # Errors
    /// [`bitnet_core::Error::NotFinite`], wrapped, if the input holds NaN or infinity and had to be quantized.
    pub(crate) fn apply(&self, machine: &Machine, x: &mut Input, out: &mut [f32]) -> Result<()> {
        let (kernels, pool, bias) = (&machine.kernels, &machine.pool, self.bias.as_deref());
        match &self.weights {
            Weights::Dense(w) => kernels.dense_matmul(pool, w, &x.floats, bias, out),
            Weights::Ternary(w) => {
                let quantized = match x.quantized.take() {
                    Some(mut same) if same.fits(w) => {
                        if !x.fresh {
                            same.requantize(kernels, &x.floats)?;
                        }
                        same
                    }
                    _ => Activations::quantize(kernels, &x.floats, w)?,
                };
                kernels.matmul(pool, w, &quantized, bias, out);
                (x.quantized, x.fresh) = (Some(quantized), true);
            }
        }
        Ok(())
    }
}
