//! The one place that knows the products of `bitnet-kernels`.

use super::runtime::Runtime;
use crate::Activations;
use crate::Result;
#[cfg(feature = "qat")]
use bitnet_core::pack::Layout;
use bitnet_core::{Matrix, MatrixSpec, ZeroPoints};
use bitnet_kernels::matmul::{self, Prepacked};
#[cfg(feature = "qat")]
use bitnet_kernels::stream;
use std::sync::{Mutex, PoisonError};

/// Laid out activations that are used again.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Mutex<Vec<matmul::Activations>>);

impl Scratch {
    fn take(&self) -> Option<matmul::Activations> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn put(&self, activations: matmul::Activations) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(activations);
    }
}

/// Weights in the layout of the kernels, and nothing else of them.
#[derive(Debug)]
pub(crate) struct Packed {
    spec: MatrixSpec,
    scales: Vec<f32>,
    zero_points: Vec<f32>,
    weights: Prepacked,
}

impl Packed {
    /// # Errors
    /// [`crate::Error::Kernels`] for a matrix that has no product.
    pub(crate) fn new(matrix: &Matrix, runtime: &Runtime) -> Result<Self> {
        let weights = Prepacked::new(matrix, &runtime.pool)?;
        Ok(Self {
            spec: matrix.spec.clone(),
            scales: matrix.scales.clone(),
            zero_points: matrix.zero_points.clone(),
            weights,
        })
    }

    /// From the bytes of a layout.
    ///
    /// # Errors
    /// As [`Packed::new`].
    #[cfg(feature = "qat")]
    pub(crate) fn from_wire(
        packed: &stream::Packed,
        layout: &dyn Layout,
        runtime: &Runtime,
    ) -> Result<Self> {
        let stream::Packed {
            spec,
            bytes,
            scales,
            zero_points,
        } = packed;
        let parts = matmul::Parts {
            spec,
            scales,
            zero_points,
        };
        let weights = Prepacked::from_wire(
            &runtime.machine.kernels,
            &runtime.pool,
            layout,
            parts,
            bytes,
            matmul::Stream::TwoBit,
        )?;
        Ok(Self {
            spec: spec.clone(),
            scales: scales.clone(),
            zero_points: zero_points.clone(),
            weights,
        })
    }

    pub(crate) fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    /// Bytes of codes, scales, zero points and padding.
    pub(crate) fn bytes(&self) -> usize {
        self.weights.memory() + size_of_val(&self.scales[..]) + size_of_val(&self.zero_points[..])
    }

    /// `out = x̂ · Ŵᵀ + bias`, x of `[M, K]` and out of `[M, N]`, with x quantized as said. Floats
    /// go with ternary weights of one plane only.
    pub(crate) fn product(
        &self,
        runtime: &Runtime,
        x: &[f32],
        activations: Activations,
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) -> Result<()> {
        let (kernels, pool, w) = (runtime.machine.kernels, &runtime.pool, &self.weights);
        let Some(method) = activations.method() else {
            kernels.matmul(pool, w, &matmul::Activations::floats(x, w)?, bias, out);
            return Ok(());
        };
        let mut acts = match runtime.scratch.take() {
            Some(acts) => acts,
            None => matmul::Activations::from_values(&[], &[], w)?,
        };
        let done = acts.requantize_for(&kernels, w, x, method);
        if done.is_ok() {
            kernels.matmul(pool, w, &acts, bias, out);
        }
        runtime.scratch.put(acts);
        Ok(done?)
    }

    /// The values again, by the product with the identity matrix: sums of `value − zero point`, if
    /// that is an integer.
    pub(crate) fn unpack(&self, runtime: &Runtime) -> Result<Matrix> {
        const TOKENS: usize = 64;
        let spec = &self.spec;
        let (rows, cols) = (spec.rows, spec.cols);
        let mut values = vec![0i8; spec.values_len()];
        let mut sums = vec![0i32; spec.planes * TOKENS * rows];
        for first in (0..cols).step_by(TOKENS) {
            let tokens = TOKENS.min(cols - first);
            let mut one_hot = vec![0i8; tokens * cols];
            (0..tokens).for_each(|t| one_hot[t * cols + first + t] = 1);
            let acts =
                matmul::Activations::from_values(&one_hot, &vec![1.0; tokens], &self.weights)?;
            let sums = &mut sums[..spec.planes * tokens * rows];
            runtime
                .machine
                .kernels
                .matmul_sums(&runtime.pool, &self.weights, &acts, sums);
            for (i, sums) in sums.chunks(rows).enumerate() {
                let (plane, col) = (i / tokens, first + i % tokens);
                for (row, &sum) in sums.iter().enumerate() {
                    let zero = match spec.zero_points {
                        ZeroPoints::I8 => {
                            self.zero_points[spec.scale_index(plane, row, col)] as i32
                        }
                        ZeroPoints::None | ZeroPoints::F32 => 0,
                    };
                    values[(plane * rows + row) * cols + col] = (sum + zero) as i8;
                }
            }
        }
        Ok(Matrix {
            spec: spec.clone(),
            values,
            scales: self.scales.clone(),
            zero_points: self.zero_points.clone(),
        })
    }
}
