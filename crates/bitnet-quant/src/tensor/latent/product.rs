//! A latent layer as one operation of the graph. Between forward and backward pass it keeps its
//! inputs, as any linear layer does, and the codes of its weights. The equations are at
//! [`QatLinear`](super::QatLinear). A dead-zone bias β adds `λ·β·Σ` of the zero-valued weights of a
//! row to the bias of that row.

use super::codes::WeightCodes;
use super::rounding::WeightRounding;
use crate::Activations;
use crate::tensor::{contiguous_floats, into_candle, token_shape, with_floats};
use crate::{CheckpointError, Error, Result};
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::scheme::Rounding;
use bitnet_kernels::Kernels;
use bitnet_kernels::dense;
use bitnet_kernels::stream::quantize_token;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Device, InplaceOp1, Layout, Shape, Tensor};
use rayon::prelude::*;
use std::sync::{Mutex, OnceLock, PoisonError};

/// The operation. Its arguments are x, W, and a vector of the learned scales followed by the
/// biases, if there are any.
pub(crate) struct QuantizedProduct {
    pub(crate) rounding: WeightRounding,
    pub(crate) activations: Activations,
    pub(crate) lambda: f32,
    /// β.
    pub(crate) dead_zone: f32,
    /// Number of learned scales.
    pub(crate) scales: usize,
    pub(crate) non_finite: NonFinite,
    /// Set by the forward pass, read by the backward pass.
    pub(crate) codes: OnceLock<WeightCodes>,
}

/// What happens to input or weights with NaN or infinity, which cannot be quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NonFinite {
    /// The forward pass returns an error.
    Refuse,
    /// All outputs and gradients are NaN, as with floats: the loss shows it.
    Propagate,
}

impl QuantizedProduct {
    fn forward(
        &self,
        x: (&CpuStorage, &Layout),
        w: (&CpuStorage, &Layout),
        third: Option<&[f32]>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, cols) = w.1.shape().dims2()?;
        let (x_slice, w_slice) = (contiguous_floats(x.0, x.1)?, contiguous_floats(w.0, w.1)?);
        let mut out = vec![0.0; x_slice.len() / cols * rows];
        match self.product(x_slice, w_slice, (rows, cols), third, &mut out) {
            Err(error) if self.non_finite == NonFinite::Propagate && is_not_finite(&error) => {
                out.fill(f32::NAN);
            }
            done => done.map_err(into_candle)?,
        }
        let mut dims = x.1.dims().to_vec();
        dims.splice(dims.len() - 1.., [rows]);
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }

    fn product(
        &self,
        x: &[f32],
        w: &[f32],
        shape: (usize, usize),
        third: Option<&[f32]>,
        out: &mut [f32],
    ) -> Result<()> {
        let runtime = &*self.rounding.runtime;
        let (scales, bias) = third.unwrap_or_default().split_at(self.scales);
        let scales = (!scales.is_empty()).then_some(scales);
        let codes = if self.lambda > 0.0 {
            Some(self.rounding.encode(w, shape, scales)?)
        } else {
            None
        };
        let mut dead;
        let mut bias = (!bias.is_empty()).then_some(bias);
        if let (Some(codes), Some(beta)) = (&codes, self.beta()) {
            dead = codes.sums_of_zeros(w, beta, runtime)?;
            dead.iter_mut()
                .zip(bias.unwrap_or_default())
                .for_each(|(dead, bias)| *dead += bias);
            bias = Some(&dead);
        }
        match (&codes, self.activations.method()) {
            (Some(codes), Some(_)) if self.lambda == 1.0 => {
                codes
                    .prepack(runtime)?
                    .product(runtime, x, self.activations, bias, out)?
            }
            _ => {
                let weights = self.mixed_weights(w, codes.as_ref())?;
                let weights =
                    dense::DenseMatrix::new(shape.0, shape.1, dense::DenseData::F32(weights))?;
                let x = self.mixed_tokens(x, shape.1)?;
                runtime
                    .machine
                    .kernels
                    .dense_matmul(&runtime.pool, &weights, &x, bias, out);
            }
        }
        if let Some(codes) = codes {
            let _ = self.codes.set(codes);
        }
        Ok(())
    }

    /// λ·β, if it is not 0.
    fn beta(&self) -> Option<f32> {
        Some(self.lambda * self.dead_zone).filter(|&beta| beta != 0.0)
    }

    /// W̃.
    pub(super) fn mixed_weights(&self, w: &[f32], codes: Option<&WeightCodes>) -> Result<Vec<f32>> {
        let Some(codes) = codes else {
            return Ok(w.to_vec());
        };
        let mut out = codes.dequantize(&self.rounding.runtime)?;
        self.mix(w, &mut out);
        Ok(out)
    }

    /// x̃ of tokens of `k` columns.
    fn mixed_tokens(&self, x: &[f32], k: usize) -> Result<Vec<f32>> {
        let Some(method) = self.activations.method().filter(|_| self.lambda > 0.0) else {
            return Ok(x.to_vec());
        };
        let kernels = self.rounding.runtime.machine.kernels;
        let mut out = vec![0.0; x.len()];
        self.rounding.runtime.install(|| {
            let tokens = out
                .par_chunks_mut(k)
                .zip(x.par_chunks(k))
                .with_min_len((1 << 14) / k + 1);
            tokens.try_for_each_init(
                || vec![0i8; k],
                |values, (out, x)| fake_token(kernels, method, x, values, out),
            )
        })?;
        self.mix(x, &mut out);
        Ok(out)
    }

    /// `x̂` becomes `x + λ·(x̂ − x)`.
    fn mix(&self, x: &[f32], out: &mut [f32]) {
        if self.lambda < 1.0 {
            out.iter_mut()
                .zip(x)
                .for_each(|(q, &x)| *q = x + self.lambda * (*q - x));
        }
    }

    /// Gradients of the arguments that are part of the graph.
    fn backward(
        &self,
        x: &Tensor,
        w: &Tensor,
        third: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (tokens, k) = token_shape(x)?;
        let n = w.dims()[0];
        let grad = grad.contiguous()?.reshape((tokens, n))?;
        let third = third.filter(|t| t.track_op());
        if self.lambda > 0.0 && self.codes.get().is_none() {
            let nan = |t: &Tensor| Tensor::full(f32::NAN, t.shape(), t.device());
            return Ok([Some(nan(x)?), Some(nan(w)?), third.map(nan).transpose()?]);
        }
        let dx = if x.track_op() {
            let weights = with_floats(w, |w| self.mixed_weights(w, self.codes.get()))?;
            Some(
                grad.matmul(&Tensor::from_vec(weights, (n, k), &Device::Cpu)?)?
                    .reshape(x.shape())?,
            )
        } else {
            None
        };
        let of_bias =
            match third.is_some_and(|t| t.elem_count() > self.scales) || self.beta().is_some() {
                true => with_floats(&grad, |g| Ok(column_sums(g, n)))?,
                false => vec![],
            };
        let (mut dw, mut dthird) = (None, vec![0.0; self.scales]);
        if w.track_op() || (third.is_some() && self.scales > 0) {
            let tokens = with_floats(x, |x| self.mixed_tokens(x, k))?;
            let product = grad
                .t()?
                .matmul(&Tensor::from_vec(tokens, ((), k), &Device::Cpu)?)?;
            dthird = self
                .through_rounding(w, &of_bias, &product)?
                .unwrap_or(dthird);
            dw = Some(product);
        }
        let dthird = match third {
            Some(third) => {
                dthird.extend(of_bias);
                dthird.truncate(third.elem_count());
                Some(Tensor::from_vec(dthird, third.shape(), &Device::Cpu)?)
            }
            None => None,
        };
        Ok([dx, dw, dthird])
    }

    /// Turns ∂L/∂W̃ into ∂L/∂W in place; returns that of learned scales.
    pub(super) fn through_rounding(
        &self,
        w: &Tensor,
        of_bias: &[f32],
        grad: &Tensor,
    ) -> Result<Option<Vec<f32>>> {
        let Some(codes) = self.codes.get() else {
            return Ok(None);
        };
        with_floats(w, |w| {
            let surrogate = Surrogate {
                of: self,
                w,
                codes,
                of_bias,
                of_scales: Mutex::new(None),
            };
            grad.inplace_op1(&surrogate)?;
            let of_scales = surrogate.of_scales.into_inner();
            Ok(of_scales.unwrap_or_else(PoisonError::into_inner))
        })
    }
}

/// Whether the error is about NaN or infinity.
pub(super) fn is_not_finite(error: &Error) -> bool {
    use bitnet_core::Error::NotFinite;
    matches!(
        error,
        Error::Checkpoint(
            CheckpointError::Core(NotFinite { .. })
                | CheckpointError::Kernels(bitnet_kernels::Error::Matrix(NotFinite { .. }))
        )
    )
}

/// Quantizes and dequantizes one token.
fn fake_token(
    kernels: Kernels,
    method: ActivationMethod,
    x: &[f32],
    values: &mut [i8],
    out: &mut [f32],
) -> Result<()> {
    let scale = match method {
        ActivationMethod::Int8 => quantize_token(kernels, x, x.len(), x.len(), values, &mut [0])?,
        _ => {
            let q = activation::quantize(
                x,
                x.len(),
                method,
                ActivationGranularity::Token,
                Rounding::HalfEven,
            )?;
            values.copy_from_slice(&q.values);
            q.scales[0]
        }
    };
    out.iter_mut()
        .zip(&*values)
        .for_each(|(out, &q)| *out = scale * f32::from(q));
    Ok(())
}

/// Sums of the columns of `[M, n]`: in f32 over 256 rows, in f64 over these sums.
fn column_sums(x: &[f32], n: usize) -> Vec<f32> {
    let mut sums = vec![0f64; n];
    let mut part = vec![0f32; n];
    for rows in x.chunks(256 * n) {
        part.fill(0.0);
        rows.chunks(n)
            .for_each(|row| part.iter_mut().zip(row).for_each(|(sum, x)| *sum += x));
        sums.iter_mut()
            .zip(&part)
            .for_each(|(sum, &part)| *sum += f64::from(part));
    }
    sums.into_iter().map(|sum| sum as f32).collect()
}

/// Turns ∂L/∂W̃ into ∂L/∂W in place.
struct Surrogate<'a> {
    of: &'a QuantizedProduct,
    w: &'a [f32],
    codes: &'a WeightCodes,
    of_bias: &'a [f32],
    of_scales: Mutex<Option<Vec<f32>>>,
}

impl InplaceOp1 for Surrogate<'_> {
    fn name(&self) -> &'static str {
        "straight-through-estimator"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(grad), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            return Err(candle_core::Error::msg(
                "the gradient of weights is contiguous f32",
            ));
        };
        let (of, grad) = (self.of, &mut grad[start..end]);
        let of_scales = of
            .rounding
            .surrogate(self.w, self.codes, of.lambda, of.scales > 0, grad)
            .map_err(into_candle)?;
        if let Some(beta) = of.beta() {
            self.codes
                .add_to_zeros(self.of_bias, beta, &of.rounding.runtime, grad)
                .map_err(into_candle)?;
        }
        *self
            .of_scales
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = of_scales;
        Ok(())
    }
}

const NAME: &str = "quantized-linear";

impl CustomOp2 for QuantizedProduct {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((x, lx), (w, lw), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = self.backward(x, w, None, grad).map_err(into_candle)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for QuantizedProduct {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        third: &CpuStorage,
        lt: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((x, lx), (w, lw), Some(contiguous_floats(third, lt)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        third: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, dthird] = self
            .backward(x, w, Some(third), grad)
            .map_err(into_candle)?;
        Ok((dx, dw, dthird))
    }
}
