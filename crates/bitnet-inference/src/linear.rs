//! Linear layers: the one place that calls the matrix kernels.
//!
//! A ternary layer of a model that was trained so quantizes its input to int8 with one absmax scale
//! for each token, and multiplies integers. Every other layer multiplies floats.

use crate::Result;
use bitnet_kernels::dense::DenseMatrix;
use bitnet_kernels::matmul::{PrepackedActivations, Prepacked};
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
    Dense(DenseMatrix),
}

/// `y = x · Wᵀ + bias`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weights: Weights,
    pub(crate) bias: Option<Vec<f32>>,
}

/// The input of linear layers, `[tokens, K]`: floats for those that multiply floats, and quantized
/// once for the others, however many layers of one shape read it.
#[derive(Debug, Default)]
pub(crate) struct Input {
    floats: Vec<f32>,
    quantized: Option<PrepackedActivations>,
    /// Whether `quantized` is the input of now; if not, it is room for another.
    fresh: bool,
}

impl Input {
    /// The elements, if they were last written for something that multiplies floats.
    pub(crate) fn floats(&self) -> &[f32] {
        &self.floats
    }

    /// Writes the input of `layers`, `cols` elements of each token by `fill`, on the pool. Where
    /// all of them multiply integers, the floats of a token go no further than the cache of the
    /// thread that quantizes them.
    ///
    /// # Errors
    /// [`bitnet_core::Error::NotFinite`], wrapped, if a token that is to be quantized holds NaN or
    /// infinity.
    pub(crate) fn write(
        &mut self,
        machine: &Machine,
        layers: &[&Linear],
        (tokens, cols): (usize, usize),
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<()> {
        if let [
            Linear {
                weights: Weights::Ternary(w),
                ..
            },
            ..,
        ] = layers
        {
            let mut quantized = self.room(w)?;
            let all = layers
                .iter()
                .all(|l| matches!(&l.weights, Weights::Ternary(w) if quantized.fits(w)));
            if all {
                quantized.requantize_rows(&machine.kernels, &machine.pool, w, tokens, &fill)?;
            }
            (self.quantized, self.fresh) = (Some(quantized), all);
            if all {
                return Ok(());
            }
        }
        self.fresh = false;
        self.floats.resize(tokens * cols, 0.0);
        machine.pool.for_chunks(&mut self.floats, cols, fill);
        Ok(())
    }

    /// PrepackedActivations for these weights, or room for them.
    fn room(&mut self, w: &Prepacked) -> Result<PrepackedActivations> {
        match self.quantized.take() {
            Some(same) if same.fits(w) => Ok(same),
            _ => {
                self.fresh = false;
                Ok(PrepackedActivations::from_values(&[], &[], w)?)
            }
        }
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
    /// [`bitnet_core::Error::NotFinite`], wrapped, if the input holds NaN or infinity and had to be
    /// quantized.
    pub(crate) fn apply(&self, machine: &Machine, x: &mut Input, out: &mut [f32]) -> Result<()> {
        let (kernels, pool, bias) = (&machine.kernels, &machine.pool, self.bias.as_deref());
        match &self.weights {
            Weights::Dense(w) => kernels.dense_matmul(pool, w, &x.floats, bias, out),
            Weights::Ternary(w) => {
                let mut quantized = x.room(w)?;
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
