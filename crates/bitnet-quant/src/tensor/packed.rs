//! Packed weights: the one place that knows the matrix products of `bitnet-kernels`.

use super::runtime::Runtime;
use super::{contiguous_floats, into_candle};
use crate::{Activations, Result};
use bitnet_core::pack::Layout as WireLayout;
use bitnet_core::{Matrix, MatrixSpec};
use bitnet_kernels::matmul::{self, Prepacked};
use bitnet_kernels::stream;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};
use std::sync::Arc;

/// Weights in the kernel layout, with the scales and zero points that dequantize them.
#[derive(Debug)]
pub(crate) struct PackedWeights {
    spec: MatrixSpec,
    scales: Vec<f32>,
    zero_points: Vec<f32>,
    weights: Prepacked,
}

impl PackedWeights {
    /// # Errors
    /// [`CheckpointError::Kernels`](crate::CheckpointError::Kernels) for a matrix that has no
    /// product.
    pub(crate) fn new(matrix: &Matrix, runtime: &Runtime) -> Result<Self> {
        let weights = Prepacked::new(matrix, &runtime.pool)?;
        Ok(Self {
            spec: matrix.spec.clone(),
            scales: matrix.scales.clone(),
            zero_points: matrix.zero_points.clone(),
            weights,
        })
    }

    /// From the bytes of a wire layout.
    ///
    /// # Errors
    /// As [`PackedWeights::new`].
    pub(crate) fn from_wire(
        packed: &stream::PackedMatrix,
        layout: &dyn WireLayout,
        runtime: &Runtime,
    ) -> Result<Self> {
        let stream::PackedMatrix {
            spec,
            bytes,
            scales,
            zero_points,
        } = packed;
        let parts = matmul::MatrixParameters {
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

    /// `out = x̂ · Ŵᵀ + bias`, x `[M, K]`, out `[M, N]`. Float activations need ternary weights of
    /// one plane.
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
            kernels.matmul(
                pool,
                w,
                &matmul::PrepackedActivations::floats(x, w)?,
                bias,
                out,
            );
            return Ok(());
        };
        let mut acts = match runtime.take_activations() {
            Some(acts) => acts,
            None => matmul::PrepackedActivations::from_values(&[], &[], w)?,
        };
        let done = acts.requantize_for(&kernels, w, x, method);
        if done.is_ok() {
            kernels.matmul(pool, w, &acts, bias, out);
        }
        runtime.put_activations(acts);
        Ok(done?)
    }

    /// Values, scales and zero points.
    pub(crate) fn unpack(&self, runtime: &Runtime) -> Matrix {
        Matrix {
            spec: self.spec.clone(),
            values: self.weights.unpack(&runtime.pool),
            scales: self.scales.clone(),
            zero_points: self.zero_points.clone(),
        }
    }
}

/// The product of packed weights as an operation of the graph: x gets a gradient, `∂L/∂x = ∂L/∂y ·
/// Ŵ`.
pub(crate) struct PackedProduct {
    pub(crate) weights: Arc<PackedWeights>,
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) activations: Activations,
}

impl PackedProduct {
    /// `[…, K]` to `[…, N]`, in the type of x.
    pub(crate) fn apply(self, x: &Tensor) -> Result<Tensor> {
        let y = x.to_dtype(DType::F32)?.contiguous()?.apply_op1(self)?;
        Ok(y.to_dtype(x.dtype())?)
    }
}

impl CustomOp1 for PackedProduct {
    fn name(&self) -> &'static str {
        "packed-product"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, cols) = (self.weights.spec.rows, self.weights.spec.cols);
        let x = contiguous_floats(storage, layout)?;
        let mut out = vec![0.0; x.len() / cols.max(1) * rows];
        self.weights
            .product(&self.runtime, x, self.activations, None, &mut out)
            .map_err(into_candle)?;
        let mut dims = layout.dims().to_vec();
        dims.splice(dims.len() - 1.., [rows]);
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (rows, cols) = (self.weights.spec.rows, self.weights.spec.cols);
        let weights = self.weights.unpack(&self.runtime).dequantize();
        let weights = Tensor::from_vec(weights, (rows, cols), grad.device())?;
        Ok(Some(
            grad.contiguous()?
                .reshape(((), rows))?
                .matmul(&weights)?
                .reshape(x.shape())?,
        ))
    }
}
