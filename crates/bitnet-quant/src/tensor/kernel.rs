//! The one place that knows the products of `bitnet-kernels`.

use super::runtime::Runtime;
use crate::config::Activations;
use crate::{Error, Result};
use bitnet_core::{Matrix, MatrixSpec};
use bitnet_kernels::ternary::{self, Prepacked};
use std::sync::{Mutex, PoisonError};

/// Laid out activations that are used again.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Mutex<Vec<ternary::Activations>>);

impl Scratch {
    fn take(&self) -> Option<ternary::Activations> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn put(&self, activations: ternary::Activations) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(activations);
    }
}

/// Weights in the layout of the kernels, and nothing else of them.
#[derive(Debug)]
pub(crate) struct Packed {
    spec: MatrixSpec,
    scales: Vec<f32>,
    weights: Prepacked,
}

impl Packed {
    /// # Errors
    /// [`Error::Kernels`] for a matrix that has no product.
    pub(crate) fn new(matrix: &Matrix, runtime: &Runtime) -> Result<Self> {
        Ok(Self { spec: matrix.spec.clone(), scales: matrix.scales.clone(), weights: Prepacked::new(matrix, &runtime.pool)? })
    }

    pub(crate) fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    /// Bytes of codes, scales and padding.
    pub(crate) fn bytes(&self) -> usize {
        self.weights.bytes() + size_of_val(&self.scales[..])
    }

    /// `out = x̂ · Ŵᵀ + bias`, x of `[M, K]` and out of `[M, N]`, with x quantized as said.
    pub(crate) fn product(
        &self,
        runtime: &Runtime,
        x: &[f32],
        activations: Activations,
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) -> Result<()> {
        let method = activations.method().ok_or_else(|| Error::input("activations", "int8, int4 or sign", "float"))?;
        let mut acts = match runtime.scratch.take() {
            Some(acts) => acts,
            None => ternary::Activations::from_values(&[], &[], &self.weights)?,
        };
        let done = acts.requantize(x, &self.weights, method);
        if done.is_ok() {
            runtime.machine.kernels.ternary_matmul(&runtime.pool, &self.weights, &acts, bias, out);
        }
        runtime.scratch.put(acts);
        Ok(done?)
    }

    /// The values again, by the product with the identity matrix.
    pub(crate) fn unpack(&self, runtime: &Runtime) -> Result<Matrix> {
        const TOKENS: usize = 64;
        let (rows, cols) = (self.spec.rows, self.spec.cols);
        let mut values = vec![0i8; rows * cols];
        let mut sums = vec![0i32; TOKENS * rows];
        for first in (0..cols).step_by(TOKENS) {
            let tokens = TOKENS.min(cols - first);
            let mut one_hot = vec![0i8; tokens * cols];
            (0..tokens).for_each(|t| one_hot[t * cols + first + t] = 1);
            let acts = ternary::Activations::from_values(&one_hot, &vec![1.0; tokens], &self.weights)?;
            let sums = &mut sums[..tokens * rows];
            runtime.machine.kernels.ternary_sums(&runtime.pool, &self.weights, &acts, sums);
            for (t, sums) in sums.chunks(rows).enumerate() {
                sums.iter().enumerate().for_each(|(row, &q)| values[row * cols + first + t] = q as i8);
            }
        }
        Ok(Matrix { spec: self.spec.clone(), values, scales: self.scales.clone(), zero_points: vec![] })
    }
}
