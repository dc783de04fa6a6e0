//! The linear layer in training.
//!
//! ```text
//! y = x̃ · W̃ᵀ + b      x̃ = x + λ·(x̂ − x),  W̃ = W + λ·(Ŵ − W)      x […, K], W [N, K], y […, N]
//! ∂L/∂x = ∂L/∂y · W̃,   ∂L/∂W = (∂L/∂yᵀ · x̃) ⊙ (1 − λ + λ·m),   ∂L/∂b = Σ ∂L/∂y
//! ```
//!
//! With a dead-zone bias β (see [`QatLinear::set_dead_zone_bias`]), `λ·β·Σ of the weights of the row whose value is 0` is a part of b.
//!
//! x̂ are activations with one scale for each token, Ŵ the quantized weights, m the slope of the estimator. At full strength (λ = 1) and
//! with quantized activations the product is that of the packed layer, in integers, so that a converted model gives the same bits.
//! The whole layer is one operation of the graph: between the passes it keeps its inputs, as any linear layer, and the codes of its weights.

use super::ste::{Codes, Quantizer, StraightThroughEstimator};
use super::{candle, slice};
use crate::config::{Activations, QuantizationConfig};
use crate::tensor::runtime::Runtime;
use crate::tensor::{matrix_shape, not_empty, token_shape, with_floats};
use crate::{BitLinear, Error, Result};
use bitnet_core::Matrix;
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::scheme::{Clip, Mapping, Method, Rounding, Scheme};
use bitnet_kernels::Kernels;
use bitnet_kernels::dense;
use bitnet_kernels::stream::quantize_token;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, InplaceOp1, Layout, Module, Shape, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, OnceLock, PoisonError};

/// What a layer rounds to at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Symmetric integers of so many bits, as a step on the way; with 2, 3 and 4 bits their range is that of the least error on normal weights.
    Bits(u32),
    /// What the configuration says.
    #[default]
    Target,
}

impl Stage {
    fn scheme(self, target: &Scheme) -> Result<Scheme> {
        let Self::Bits(bits) = self else { return Ok(*target) };
        let clip = match bits {
            2 => Clip::Rms(1.05),
            3 => Clip::Rms(1.81),
            4 => Clip::Rms(2.37),
            _ => Clip::None,
        };
        let scheme = Scheme { method: Method::Int { bits, mapping: Mapping::Symmetric, clip }, ..*target };
        scheme.spec(1, 1)?;
        Ok(scheme)
    }

    /// Stretched scales belong to few levels; stages of more learn theirs as LSQ.
    fn estimator(self, target: StraightThroughEstimator) -> StraightThroughEstimator {
        match (self, target) {
            (Self::Bits(3..), StraightThroughEstimator::Stretched) => StraightThroughEstimator::LearnedScale,
            _ => target,
        }
    }
}

/// A linear layer in training; the equations are in the module's text, and the estimators are at [`StraightThroughEstimator`].
///
/// ```
/// use bitnet_quant::{QuantizationConfig, qat::{QatLinear, StraightThroughEstimator}};
/// use candle_core::{Device, Module, Tensor, Var};
/// let weight = Var::randn(0f32, 1f32, (32, 64), &Device::Cpu)?;
/// let config = QuantizationConfig::bitnet_158();
/// let layer = QatLinear::new(weight.as_tensor().clone(), None, None, &config, StraightThroughEstimator::Plain)?;
/// let x = Tensor::randn(0f32, 1f32, (2, 5, 64), &Device::Cpu)?;
/// let y = layer.forward(&x)?;
/// assert!(y.sum_all()?.backward()?.get(&weight).is_some());
/// let packed = layer.convert()?;
/// assert_eq!(packed.forward(&x)?.to_vec3::<f32>()?, y.to_vec3::<f32>()?);
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QatLinear {
    /// `[N, K]`.
    weight: Tensor,
    /// `[N]`.
    bias: Option<Tensor>,
    /// `[granules]`.
    scale: Option<Var>,
    config: QuantizationConfig,
    target: Scheme,
    estimator: StraightThroughEstimator,
    activations: Activations,
    stage: Stage,
    lambda: f32,
    /// β.
    dead_zone: f32,
    quantizer: Quantizer,
}

impl QatLinear {
    /// A layer on latent weights `[N, K]` and a bias `[N]`, f32 on the CPU, quantized as `default` of the configuration says. Learned scales
    /// are `scale`, or a new variable where none is given.
    ///
    /// # Errors
    /// [`Error::Input`] for shapes, types, devices, and an estimator that does not go with the scheme; [`Error::Invalid`] for a
    /// configuration that is wrong.
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        scale: Option<Var>,
        config: &QuantizationConfig,
        estimator: StraightThroughEstimator,
    ) -> Result<Self> {
        config.validate()?;
        let [rows, cols] = *weight.dims() else {
            return Err(Error::input("weight", "2 dimensions", format!("shape {:?}", weight.dims())));
        };
        not_empty(&weight)?;
        for tensor in [Some(&weight), bias.as_ref()].into_iter().flatten() {
            is_f32(tensor)?;
        }
        if let Some(bias) = bias.as_ref().filter(|b| b.dims() != [rows]) {
            return Err(Error::input("bias", format!("shape [{rows}]"), format!("{:?}", bias.dims())));
        }
        let target = config.default.plain_scheme()?;
        let target = target.ok_or_else(|| Error::input("precision", "one that is quantized", config.default.target()))?;
        let runtime = Runtime::of(&config.compute)?;
        let quantizer = Quantizer::new(target, estimator, runtime)?;
        let granules = target.spec(rows, cols)?.scales_len();
        let scale = match scale.filter(|_| estimator.learns_scale()) {
            Some(scale) if scale.dims() == [granules] && scale.dtype() == DType::F32 => Some(scale),
            Some(scale) => return Err(Error::input("scale", format!("f32 of [{granules}]"), format!("{:?}", scale.as_tensor()))),
            None if estimator.learns_scale() => {
                let fresh = with_floats(&weight, |w| quantizer.initial_scales(w, (rows, cols)))?;
                Some(Var::from_vec(fresh, granules, &Device::Cpu)?)
            }
            None => None,
        };
        let (stage, lambda) = (Stage::Target, 1.0);
        let activations = config.activations.unwrap_or_default();
        Ok(Self { weight, bias, scale, config: config.clone(), target, estimator, activations, stage, lambda, dead_zone: 0.0, quantizer })
    }

    /// The latent weights `[N, K]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[N]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The learned scales, one for each granule.
    pub fn learned_scale(&self) -> Option<&Var> {
        self.scale.as_ref()
    }

    /// The scheme of the present stage.
    pub fn scheme(&self) -> &Scheme {
        &self.quantizer.scheme
    }

    /// The scheme of the configuration.
    pub fn target(&self) -> &Scheme {
        &self.target
    }

    /// What the input becomes.
    pub fn activations(&self) -> Activations {
        self.activations
    }

    /// What the layer rounds to at present.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Goes to another stage. Learned scales begin anew in it, in place; to keep those of a checkpoint, load them after this.
    ///
    /// # Errors
    /// [`Error::Core`] for a number of bits that does not exist and for NaN among the weights.
    pub fn set_stage(&mut self, stage: Stage) -> Result<()> {
        if stage == self.stage {
            return Ok(());
        }
        let scheme = stage.scheme(&self.target)?;
        let quantizer = Quantizer::new(scheme, stage.estimator(self.estimator), self.quantizer.runtime.clone())?;
        if let Some(scale) = &self.scale {
            let fresh = with_floats(&self.weight, |w| quantizer.initial_scales(w, matrix_shape(&self.weight)?))?;
            scale.set(&Tensor::from_vec(fresh, scale.dims(), &Device::Cpu)?)?;
        }
        (self.stage, self.quantizer) = (stage, quantizer);
        Ok(())
    }

    /// λ, the share of the rounding that the forward pass sees: 0 for floats, 1 for what the packed layer will compute.
    pub fn lambda(&self) -> f32 {
        self.lambda
    }

    /// Sets λ, which is kept between 0 and 1.
    pub fn set_lambda(&mut self, lambda: f32) {
        self.lambda = if lambda.is_nan() { 1.0 } else { lambda.clamp(0.0, 1.0) };
    }

    /// β, the weight of the dead-zone bias; 0, as in the beginning, for none.
    pub fn dead_zone_bias(&self) -> f32 {
        self.dead_zone
    }

    /// Sets β: weights whose value is 0 count as β times themselves in the bias of their row, whatever the input, and so get the gradient
    /// β·∂L/∂b more, which leads them out of the dead zone (after Tequila, Huang et al. 2025, arXiv:2509.23809, where β is 1e-3). Packed, it is a bias.
    ///
    /// # Errors
    /// [`Error::Input`] for a target that is not ternary of one plane, and for a β that is no number.
    pub fn set_dead_zone_bias(&mut self, beta: f32) -> Result<()> {
        if !matches!(self.target.method, Method::Ternary { planes: 1, .. }) {
            return Err(Error::input("dead-zone bias", "ternary weights of one plane", format!("{:?}", self.target.method)));
        }
        if !beta.is_finite() {
            return Err(Error::input("dead-zone bias", "a number", beta));
        }
        self.dead_zone = beta;
        Ok(())
    }

    /// Changes the temperature of the soft estimator; of no effect on another.
    ///
    /// # Errors
    /// [`Error::Input`] unless it is a positive number.
    pub fn set_temperature(&mut self, temperature: f32) -> Result<()> {
        if let StraightThroughEstimator::Soft { .. } = self.estimator {
            let soft = StraightThroughEstimator::Soft { temperature };
            soft.validate()?;
            (self.estimator, self.quantizer.estimator) = (soft, soft);
        }
        Ok(())
    }

    /// Values and scales of the weights as the next forward pass at full strength has them.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN among the weights.
    pub fn quantized_weights(&self) -> Result<Matrix> {
        self.codes()?.into_matrix(&self.quantizer.runtime)
    }

    pub(super) fn runtime(&self) -> &Runtime {
        &self.quantizer.runtime
    }

    pub(super) fn codes(&self) -> Result<Codes> {
        let shape = matrix_shape(&self.weight)?;
        with_floats(&self.weight, |w| match &self.scale {
            Some(scale) => with_floats(scale, |s| self.quantizer.encode(w, shape, Some(s))),
            None => self.quantizer.encode(w, shape, None),
        })
    }

    /// Ŵ, `[N, K]`, apart from the graph.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN among the weights.
    pub fn dequantized_weights(&self) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.codes()?.dequantize(&self.quantizer.runtime)?, self.weight.dims(), &Device::Cpu)?)
    }

    /// The packed layer: at full strength it computes the same.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN among the weights, [`Error::Kernels`] for a scheme that has no product.
    pub fn convert(&self) -> Result<BitLinear> {
        let codes = self.codes()?;
        let mut bias = self.bias.as_ref().map(Tensor::detach);
        if self.dead_zone != 0.0 {
            let dead = with_floats(&self.weight, |w| codes.sums_of_zeros(w, self.dead_zone, self.runtime()))?;
            let dead = Tensor::from_vec(dead, self.weight.dims()[0], &Device::Cpu)?;
            bias = Some(match bias {
                Some(bias) => (bias + dead)?,
                None => dead,
            });
        }
        BitLinear::from_matrix(&codes.into_matrix(self.runtime())?, bias, &self.config)
    }

    /// The same layer without quantization, on the same variables.
    pub fn to_full(&self) -> candle_nn::Linear {
        candle_nn::Linear::new(self.weight.clone(), self.bias.clone())
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        is_f32(x)?;
        not_empty(x)?;
        let (_, k) = token_shape(x)?;
        if k != self.weight.dims()[1] {
            return Err(Error::input("input", format!("{} features", self.weight.dims()[1]), format!("shape {:?}", x.dims())));
        }
        let (x, w) = (x.contiguous()?, self.weight.contiguous()?);
        let op = Product {
            quantizer: self.quantizer.clone(),
            activations: self.activations,
            lambda: self.lambda,
            dead_zone: self.dead_zone,
            scales: self.scale.as_ref().map_or(0, |s| s.elem_count()),
            codes: OnceLock::new(),
        };
        Ok(match (&self.scale, &self.bias) {
            (None, None) => x.apply_op2(&w, op)?,
            (None, Some(bias)) => x.apply_op3(&w, &bias.contiguous()?, op)?,
            (Some(scale), None) => x.apply_op3(&w, scale, op)?,
            (Some(scale), Some(bias)) => x.apply_op3(&w, &Tensor::cat(&[scale.as_tensor(), bias], 0)?, op)?,
        })
    }
}

impl Module for QatLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.apply(x).map_err(candle)
    }
}

fn is_f32(x: &Tensor) -> Result<()> {
    crate::tensor::check_device(x.device())?;
    if x.dtype() == DType::F32 { Ok(()) } else { Err(Error::input("dtype", "f32, which is what trains", x.dtype().as_str())) }
}

/// The operation: of x, W, and a vector of learned scales followed by biases, if there are any.
struct Product {
    quantizer: Quantizer,
    activations: Activations,
    lambda: f32,
    dead_zone: f32,
    /// Number of learned scales.
    scales: usize,
    /// From the forward pass to the backward pass.
    codes: OnceLock<Codes>,
}

impl Product {
    fn forward(
        &self,
        x: (&CpuStorage, &Layout),
        w: (&CpuStorage, &Layout),
        third: Option<&[f32]>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, cols) = w.1.shape().dims2()?;
        let (x_slice, w_slice) = (slice(x.0, x.1)?, slice(w.0, w.1)?);
        let mut out = vec![0.0; x_slice.len() / cols * rows];
        self.product(x_slice, w_slice, (rows, cols), third, &mut out).map_err(candle)?;
        let mut dims = x.1.dims().to_vec();
        dims.splice(dims.len() - 1.., [rows]);
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }

    fn product(&self, x: &[f32], w: &[f32], shape: (usize, usize), third: Option<&[f32]>, out: &mut [f32]) -> Result<()> {
        let runtime = &*self.quantizer.runtime;
        let (scales, bias) = third.unwrap_or_default().split_at(self.scales);
        let scales = (!scales.is_empty()).then_some(scales);
        let codes = if self.lambda > 0.0 { Some(self.quantizer.encode(w, shape, scales)?) } else { None };
        let mut dead;
        let mut bias = (!bias.is_empty()).then_some(bias);
        if let (Some(codes), Some(beta)) = (&codes, self.beta()) {
            dead = codes.sums_of_zeros(w, beta, runtime)?;
            dead.iter_mut().zip(bias.unwrap_or_default()).for_each(|(dead, bias)| *dead += bias);
            bias = Some(&dead);
        }
        match (&codes, self.activations.method()) {
            (Some(codes), Some(_)) if self.lambda == 1.0 => codes.prepack(runtime)?.product(runtime, x, self.activations, bias, out)?,
            _ => {
                let weights = self.mixed_weights(w, codes.as_ref())?;
                let weights = dense::Matrix::new(shape.0, shape.1, dense::Data::F32(weights))?;
                let x = self.mixed_tokens(x, shape.1)?;
                runtime.machine.kernels.dense_matmul(&runtime.pool, &weights, &x, bias, out);
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
    fn mixed_weights(&self, w: &[f32], codes: Option<&Codes>) -> Result<Vec<f32>> {
        let Some(codes) = codes else { return Ok(w.to_vec()) };
        let mut out = codes.dequantize(&self.quantizer.runtime)?;
        self.mix(w, &mut out);
        Ok(out)
    }

    /// x̃ of tokens of `k` columns.
    fn mixed_tokens(&self, x: &[f32], k: usize) -> Result<Vec<f32>> {
        let Some(method) = self.activations.method().filter(|_| self.lambda > 0.0) else { return Ok(x.to_vec()) };
        let kernels = self.quantizer.runtime.machine.kernels;
        let mut out = vec![0.0; x.len()];
        self.quantizer.runtime.install(|| {
            let tokens = out.par_chunks_mut(k).zip(x.par_chunks(k)).with_min_len((1 << 14) / k + 1);
            tokens.try_for_each_init(|| vec![0i8; k], |values, (out, x)| fake_token(kernels, method, x, values, out))
        })?;
        self.mix(x, &mut out);
        Ok(out)
    }

    /// `x̂` becomes `x + λ·(x̂ − x)`.
    fn mix(&self, x: &[f32], out: &mut [f32]) {
        if self.lambda < 1.0 {
            out.iter_mut().zip(x).for_each(|(q, &x)| *q = x + self.lambda * (*q - x));
        }
    }

    /// Gradients of the three arguments, of those that are part of the graph.
    fn backward(&self, x: &Tensor, w: &Tensor, third: Option<&Tensor>, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let (tokens, k) = token_shape(x)?;
        let n = w.dims()[0];
        let grad = grad.contiguous()?.reshape((tokens, n))?;
        if self.lambda > 0.0 && self.codes.get().is_none() {
            return Err(Error::input("backward pass", "one after the forward pass", "one before it"));
        }
        let third = third.filter(|t| t.track_op());
        let dx = if x.track_op() {
            let weights = with_floats(w, |w| self.mixed_weights(w, self.codes.get()))?;
            Some(grad.matmul(&Tensor::from_vec(weights, (n, k), &Device::Cpu)?)?.reshape(x.shape())?)
        } else {
            None
        };
        let of_bias = match third.is_some_and(|t| t.elem_count() > self.scales) || self.beta().is_some() {
            true => with_floats(&grad, |g| Ok(column_sums(g, n)))?,
            false => vec![],
        };
        let (mut dw, mut dthird) = (None, vec![0.0; self.scales]);
        if w.track_op() || (third.is_some() && self.scales > 0) {
            let tokens = with_floats(x, |x| self.mixed_tokens(x, k))?;
            let product = grad.t()?.matmul(&Tensor::from_vec(tokens, ((), k), &Device::Cpu)?)?;
            if let Some(codes) = self.codes.get() {
                let of_scales = with_floats(w, |w| {
                    let surrogate = Surrogate { of: self, w, codes, of_bias: &of_bias, of_scales: Mutex::new(None) };
                    product.inplace_op1(&surrogate)?;
                    Ok(surrogate.of_scales.into_inner().unwrap_or_else(PoisonError::into_inner))
                })?;
                dthird = of_scales.unwrap_or(dthird);
            }
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
}

/// One token quantized and back.
fn fake_token(kernels: Kernels, method: ActivationMethod, x: &[f32], values: &mut [i8], out: &mut [f32]) -> Result<()> {
    let scale = match method {
        ActivationMethod::Int8 => quantize_token(kernels, x, x.len(), x.len(), values, &mut [0])?,
        _ => {
            let q = activation::quantize(x, x.len(), method, ActivationGranularity::Token, Rounding::HalfEven)?;
            values.copy_from_slice(&q.values);
            q.scales[0]
        }
    };
    out.iter_mut().zip(&*values).for_each(|(out, &q)| *out = scale * f32::from(q));
    Ok(())
}

/// Σ over the rows of `[M, n]`: in f32 over some rows, in f64 over those sums.
fn column_sums(x: &[f32], n: usize) -> Vec<f32> {
    let mut sums = vec![0f64; n];
    let mut part = vec![0f32; n];
    for rows in x.chunks(256 * n) {
        part.fill(0.0);
        rows.chunks(n).for_each(|row| part.iter_mut().zip(row).for_each(|(sum, x)| *sum += x));
        sums.iter_mut().zip(&part).for_each(|(sum, &part)| *sum += f64::from(part));
    }
    sums.into_iter().map(|sum| sum as f32).collect()
}

/// Turns ∂L/∂W̃ into ∂L/∂W where it lies.
struct Surrogate<'a> {
    of: &'a Product,
    w: &'a [f32],
    codes: &'a Codes,
    of_bias: &'a [f32],
    of_scales: Mutex<Option<Vec<f32>>>,
}

impl InplaceOp1 for Surrogate<'_> {
    fn name(&self) -> &'static str {
        "straight-through-estimator"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(grad), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            return Err(candle_core::Error::msg("the gradient of weights is contiguous f32"));
        };
        let (of, grad) = (self.of, &mut grad[start..end]);
        let of_scales = of.quantizer.surrogate(self.w, self.codes, of.lambda, of.scales > 0, grad).map_err(candle)?;
        if let Some(beta) = of.beta() {
            self.codes.add_to_zeros(self.of_bias, beta, &of.quantizer.runtime, grad).map_err(candle)?;
        }
        *self.of_scales.lock().unwrap_or_else(PoisonError::into_inner) = of_scales;
        Ok(())
    }
}

const NAME: &str = "quantized-linear";

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((x, lx), (w, lw), None)
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = self.backward(x, w, None, grad).map_err(candle)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Product {
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
        self.forward((x, lx), (w, lw), Some(slice(third, lt)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        third: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, dthird] = self.backward(x, w, Some(third), grad).map_err(candle)?;
        Ok((dx, dw, dthird))
    }
}
