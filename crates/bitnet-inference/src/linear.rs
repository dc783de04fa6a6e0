//! Linear layers: the one place that calls the matrix kernels.
//!
//! A ternary layer of a model that was trained so quantizes its input to int8 with one absmax scale for each token, and multiplies integers. Every other
//! layer multiplies floats.

use crate::Result;
use bitnet_core::Granularity;
use bitnet_kernels::dense::Matrix;
use bitnet_kernels::ternary::{Activations, Prepacked};
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
    /// Ternary weights with int8 activations; what one scale covers, since activations are laid out for it.
    Ternary(Prepacked, Granularity),
    /// Anything with float activations.
    Dense(Matrix),
}

/// `y = x · Wᵀ + bias`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weights: Weights,
    pub(crate) bias: Option<Vec<f32>>,
}

/// The input of linear layers, `[tokens, K]`, quantized at most once however many layers read it.
#[derive(Debug, Default)]
pub(crate) struct Input {
    floats: Vec<f32>,
    quantized: Option<(Granularity, Activations)>,
}

impl Input {
    /// The elements.
    pub(crate) fn floats(&self) -> &[f32] {
        &self.floats
    }

    /// Room for `len` elements, to be written anew.
    pub(crate) fn fill(&mut self, len: usize) -> &mut [f32] {
        self.quantized = None;
        self.floats.resize(len, 0.0);
        &mut self.floats
    }
}

impl Linear {
    /// Bytes of the weights in memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Ternary(w, _) => w.bytes(),
            Weights::Dense(w) => w.bytes(),
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
            Weights::Ternary(w, granularity) => {
                let acts = match x.quantized.take() {
                    Some((same, acts)) if same == *granularity => acts,
                    _ => Activations::quantize(&x.floats, w)?,
                };
                kernels.ternary_matmul(pool, w, &acts, bias, out);
                x.quantized = Some((*granularity, acts));
            }
        }
        Ok(())
    }
}
