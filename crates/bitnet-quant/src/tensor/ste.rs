//! Operations with gradients: fake quantization, `x̂ = dequantize(quantize(x))` forwards and the
//! identity backwards (straight-through estimator), and the product of packed weights.

use super::kernel::Packed;
use super::runtime::Runtime;
use super::{check_kind, matrix_shape, token_shape};
use crate::Activations;
use bitnet_checkpoint::matrix;
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::scheme::{Rounding, Scheme};
use bitnet_kernels::Kernels;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use half::{bf16, f16};
use std::sync::Arc;

/// A weight matrix by a scheme.
pub(super) struct FakeWeights {
    pub(super) scheme: Scheme,
    pub(super) kernels: Kernels,
}

/// Activations, one scale for each token.
pub(super) struct FakeActivations(pub(super) ActivationMethod);

impl FakeWeights {
    /// `[N, K]` to the same shape, with `∂x̂/∂x = 1`.
    pub(super) fn apply(self, weights: &Tensor) -> crate::Result<Tensor> {
        check_kind(weights)?;
        matrix_shape(weights)?;
        Ok(weights.contiguous()?.apply_op1(self)?)
    }
}

impl FakeActivations {
    /// `[…, K]` to the same shape, with `∂x̂/∂x = 1`.
    pub(super) fn apply(self, x: &Tensor) -> crate::Result<Tensor> {
        check_kind(x)?;
        token_shape(x)?;
        Ok(x.contiguous()?.apply_op1(self)?)
    }
}

/// The product of packed weights with activations, which it quantizes.
pub(super) struct PackedProduct {
    pub(super) packed: Arc<Packed>,
    pub(super) runtime: Arc<Runtime>,
    pub(super) activations: Activations,
}

impl PackedProduct {
    /// `[…, K]` to `[…, N]`, with `∂L/∂x = ∂L/∂y · Ŵ`.
    pub(super) fn apply(self, x: &Tensor) -> crate::Result<Tensor> {
        check_kind(x)?;
        Ok(x.contiguous()?.apply_op1(self)?)
    }
}

/// Runs `f` on the elements as f32 and stores its result in their type.
fn floats(
    storage: &CpuStorage,
    layout: &Layout,
    f: impl FnOnce(&[f32]) -> crate::Result<Vec<f32>>,
) -> Result<CpuStorage> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::msg("fake quantization needs contiguous tensors"))?;
    let f = |x: &[f32]| f(x).map_err(candle_core::Error::wrap);
    let out = match storage {
        CpuStorage::F32(x) => CpuStorage::F32(f(&x[start..end])?),
        CpuStorage::F16(x) => {
            let x: Vec<f32> = x[start..end].iter().map(|x| x.to_f32()).collect();
            CpuStorage::F16(f(&x)?.into_iter().map(f16::from_f32).collect())
        }
        CpuStorage::BF16(x) => {
            let x: Vec<f32> = x[start..end].iter().map(|x| x.to_f32()).collect();
            CpuStorage::BF16(f(&x)?.into_iter().map(bf16::from_f32).collect())
        }
        _ => {
            return Err(candle_core::Error::msg(
                "fake quantization needs f32, f16 or bf16",
            ));
        }
    };
    Ok(out)
}

impl CustomOp1 for FakeWeights {
    fn name(&self) -> &'static str {
        "fake-quantize-weights"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, rest) = layout
            .dims()
            .split_first()
            .map_or((1, &[][..]), |(&n, rest)| (n, rest));
        let shape = if rest.is_empty() {
            (1, rows)
        } else {
            (rows, rest.iter().product())
        };
        let out = floats(storage, layout, |w| {
            Ok(matrix::quantize(self.kernels, w, shape, &self.scheme, None)?.dequantize())
        })?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}

impl CustomOp1 for FakeActivations {
    fn name(&self) -> &'static str {
        "fake-quantize-activations"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let cols = layout.dims().last().copied().unwrap_or(1).max(1);
        let out = floats(storage, layout, |x| {
            let q = activation::quantize(
                x,
                cols,
                self.0,
                ActivationGranularity::Token,
                Rounding::HalfEven,
            )?;
            let tokens = q.values.chunks(cols).zip(&q.scales);
            Ok(tokens
                .flat_map(|(q, &s)| q.iter().map(move |&q| s * f32::from(q)))
                .collect())
        })?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}

impl CustomOp1 for PackedProduct {
    fn name(&self) -> &'static str {
        "packed-product"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, cols) = (self.packed.spec().rows, self.packed.spec().cols);
        let out = floats(storage, layout, |x| {
            let mut out = vec![0.0; x.len() / cols.max(1) * rows];
            self.packed
                .product(&self.runtime, x, self.activations, None, &mut out)?;
            Ok(out)
        })?;
        let mut dims = layout.dims().to_vec();
        dims.splice(dims.len() - 1.., [rows]);
        Ok((out, Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, cols) = (self.packed.spec().rows, self.packed.spec().cols);
        let weight = self
            .packed
            .unpack(&self.runtime)
            .map_err(candle_core::Error::wrap)?
            .dequantize();
        let weight =
            Tensor::from_vec(weight, (rows, cols), grad.device())?.to_dtype(grad.dtype())?;
        Ok(Some(
            grad.contiguous()?
                .reshape(((), rows))?
                .matmul(&weight)?
                .reshape(x.shape())?,
        ))
    }
}
