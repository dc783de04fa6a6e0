//! The trainable layer: latent float weights that the forward pass quantizes.
//!
//! ```text
//! QatLinear ── rounding ─► codes ─► product    one operation of the graph, on the CPU
//!     │                                 ▲
//!     └─ estimator: slope of rounding ──┘      backward pass
//!     └─ graph: the same in candle's operations, for other devices
//! ```
//!
//! A latent [`BitLinear`](crate::BitLinear) holds a [`QatLinear`] with the plain estimator;
//! quantization-aware training swaps one in for each linear layer of a model.

mod codes;
mod estimator;
mod graph;
mod product;
mod rounding;
mod slope;
mod stage;
mod weights;

pub use estimator::StraightThroughEstimator;
pub use stage::Stage;

pub(crate) use codes::WeightCodes;
#[cfg(feature = "qat")]
pub(crate) use graph::{RoundedGranules, divisor};
pub(crate) use product::NonFinite;

use super::runtime::Runtime;
use super::{into_candle, matrix_shape, not_empty, token_shape, with_host_floats};
use crate::{Activations, QuantizationConfig};
use crate::{Error, Result};
use bitnet_core::Matrix;
use bitnet_core::scheme::{Method, Scheme};
use candle_core::{DType, Device, Module, Tensor, Var};
use graph::DeviceGraph;
use product::QuantizedProduct;
use rounding::WeightRounding;
use std::sync::OnceLock;
use weights::FakeQuantizedWeights;

/// A linear layer with latent weights.
///
/// ```text
/// y = x̃ · W̃ᵀ + b      x̃ = x + λ·(x̂ − x),  W̃ = W + λ·(Ŵ − W)      x […, K], W [N, K], y […, N]
/// ∂L/∂x = ∂L/∂y · W̃,   ∂L/∂W = (∂L/∂yᵀ · x̃) ⊙ (1 − λ + λ·m),   ∂L/∂b = Σ ∂L/∂y
/// ```
///
/// x̂ are activations with one scale for each token, Ŵ the quantized weights, m the slope of the
/// [`StraightThroughEstimator`], λ the strength. With λ = 1 and quantized activations the product
/// is the integer product of the packed layer, so a converted model gives the same bits.
///
/// This is the CPU. On other devices the layer is computed with candle's operations in floats: for
/// ternary weights of one plane (absmean, mean, a factor; any rule where the scale is learned),
/// binary weights around 0 and symmetric integers. Groups must divide the columns.
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
    rounding: WeightRounding,
}

impl QatLinear {
    /// A layer on latent weights `[N, K]` and a bias `[N]`, f32 on one device, quantized by
    /// `default` of the configuration. Learned scales are `scale`, or a new variable if it is
    /// `None`.
    ///
    /// # Errors
    /// [`Error::Input`] for shapes, types, devices, and an estimator that does not fit the scheme;
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) for a wrong configuration.
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        scale: Option<Var>,
        config: &QuantizationConfig,
        estimator: StraightThroughEstimator,
    ) -> Result<Self> {
        for tensor in [Some(&weight), bias.as_ref()].into_iter().flatten() {
            check_f32(tensor)?;
        }
        Self::with_any_float(weight, bias, scale, config, estimator)
    }

    /// [`QatLinear::new`] on weights and biases of any float type; the product converts them to
    /// f32.
    pub(crate) fn with_any_float(
        weight: Tensor,
        bias: Option<Tensor>,
        scale: Option<Var>,
        config: &QuantizationConfig,
        estimator: StraightThroughEstimator,
    ) -> Result<Self> {
        config.validate()?;
        let cols = check_shapes(&weight, bias.as_ref())?;
        let target = config.default.plain_scheme()?.ok_or_else(|| {
            Error::input(
                "precision",
                "one that is quantized",
                config.default.target(),
            )
        })?;
        let rounding = WeightRounding::new(target, estimator, Runtime::shared(&config.compute)?)?;
        let scale = learned_scale(scale, &weight, &rounding)?;
        let layer = Self {
            weight,
            bias,
            scale,
            config: config.clone(),
            target,
            estimator,
            activations: config.activations.unwrap_or_default(),
            stage: Stage::Target,
            lambda: 1.0,
            dead_zone: 0.0,
            rounding,
        };
        if !layer.weight.device().is_cpu() {
            layer.graph().check(cols)?;
        }
        Ok(layer)
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
        &self.rounding.scheme
    }

    /// The scheme of the configuration.
    pub fn target(&self) -> &Scheme {
        &self.target
    }

    /// How the input is quantized.
    pub fn activations(&self) -> Activations {
        self.activations
    }

    /// The present stage.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Changes the stage and resets learned scales in place; load the scales of a checkpoint after
    /// this.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for an unsupported number of bits
    /// and for NaN among the weights.
    pub fn set_stage(&mut self, stage: Stage) -> Result<()> {
        if stage == self.stage {
            return Ok(());
        }
        let scheme = stage.scheme(&self.target)?;
        let rounding = WeightRounding::new(
            scheme,
            stage.estimator(self.estimator),
            self.rounding.runtime.clone(),
        )?;
        if let Some(scale) = &self.scale {
            let fresh = with_host_floats(&self.weight, |w| {
                rounding.initial_scales(w, matrix_shape(&self.weight)?)
            })?;
            scale.set(&Tensor::from_vec(fresh, scale.dims(), scale.device())?)?;
        }
        (self.stage, self.rounding) = (stage, rounding);
        Ok(())
    }

    /// λ, the strength of quantization: 0 computes in floats, 1 what the packed layer computes.
    pub fn lambda(&self) -> f32 {
        self.lambda
    }

    /// Sets λ, clamped to 0 … 1.
    pub fn set_lambda(&mut self, lambda: f32) {
        self.lambda = if lambda.is_nan() {
            1.0
        } else {
            lambda.clamp(0.0, 1.0)
        };
    }

    /// β, the factor of the dead-zone bias; 0, the default, for none.
    pub fn dead_zone_bias(&self) -> f32 {
        self.dead_zone
    }

    /// Sets β: adds β × (sum of the zero-valued weights of a row) to the bias of the row, so that
    /// these weights keep a gradient, β·∂L/∂b, and can leave the dead zone (after Tequila, Huang et
    /// al. 2025, arXiv:2509.23809, with β = 1e-3). A packed layer has it in its bias.
    ///
    /// # Errors
    /// [`Error::Input`] for a target that is not ternary of one plane, and for a β that is not
    /// finite.
    pub fn set_dead_zone_bias(&mut self, beta: f32) -> Result<()> {
        if !self.has_dead_zone() {
            return Err(Error::input(
                "dead-zone bias",
                "ternary weights of one plane",
                format!("{:?}", self.target.method),
            ));
        }
        if !beta.is_finite() {
            return Err(Error::input("dead-zone bias", "a number", beta));
        }
        self.dead_zone = beta;
        Ok(())
    }

    /// Whether the target is ternary of one plane; only such weights have a dead-zone bias.
    pub(crate) fn has_dead_zone(&self) -> bool {
        matches!(self.target.method, Method::Ternary { planes: 1, .. })
    }

    /// Changes the temperature of the soft estimator; other estimators ignore it.
    ///
    /// # Errors
    /// [`Error::Input`] unless it is a positive number.
    pub fn set_temperature(&mut self, temperature: f32) -> Result<()> {
        if let StraightThroughEstimator::Soft { .. } = self.estimator {
            let soft = StraightThroughEstimator::Soft { temperature };
            soft.validate()?;
            (self.estimator, self.rounding.estimator) = (soft, soft);
        }
        Ok(())
    }

    /// Values and scales of the weights that the next forward pass with λ = 1 uses.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among the weights.
    pub fn quantized_weights(&self) -> Result<Matrix> {
        self.round(|w, shape, scale| self.rounding.matrix(w, shape, scale))
    }

    /// The configuration.
    pub fn config(&self) -> &QuantizationConfig {
        &self.config
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.rounding.runtime
    }

    pub(crate) fn codes(&self) -> Result<WeightCodes> {
        self.round(|w, shape, scale| self.rounding.encode(w, shape, scale))
    }

    /// Calls `f` with the latent weights, their shape and the learned scales.
    fn round<T>(
        &self,
        f: impl FnOnce(&[f32], (usize, usize), Option<&[f32]>) -> Result<T>,
    ) -> Result<T> {
        let shape = matrix_shape(&self.weight)?;
        with_host_floats(&self.weight, |w| match &self.scale {
            Some(scale) => with_host_floats(scale, |s| f(w, shape, Some(s))),
            None => f(w, shape, None),
        })
    }

    /// Ŵ, `[N, K]`, detached.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among the weights.
    pub fn dequantized_weights(&self) -> Result<Tensor> {
        Ok(Tensor::from_vec(
            self.codes()?.dequantize(&self.rounding.runtime)?,
            self.weight.dims(),
            self.weight.device(),
        )?)
    }

    /// The bias `[N]` of the packed layer, on the CPU: the bias of this layer plus the dead-zone
    /// bias.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among the weights.
    pub fn packed_bias(&self) -> Result<Option<Tensor>> {
        let bias = self.bias.as_ref();
        let bias = bias.map(|bias| bias.detach().to_device(&Device::Cpu));
        let bias = bias.transpose()?;
        if self.dead_zone == 0.0 {
            return Ok(bias);
        }
        let codes = self.codes()?;
        let dead = with_host_floats(&self.weight, |w| {
            codes.sums_of_zeros(w, self.dead_zone, self.runtime())
        })?;
        let dead = Tensor::from_vec(dead, self.weight.dims()[0], &Device::Cpu)?;
        Ok(Some(match bias {
            Some(bias) => (bias + dead)?,
            None => dead,
        }))
    }

    /// A float layer on the same variables.
    pub fn to_full(&self) -> candle_nn::Linear {
        candle_nn::Linear::new(self.weight.clone(), self.bias.clone())
    }

    /// y `[…, N]` of f32 tokens `[…, K]` on the device of the weights.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        check_f32(x)?;
        check_same_device(x, &self.weight)?;
        not_empty(x)?;
        let (_, k) = token_shape(x)?;
        if k != self.weight.dims()[1] {
            return Err(Error::input(
                "input",
                format!("{} features", self.weight.dims()[1]),
                format!("shape {:?}", x.dims()),
            ));
        }
        if x.device().is_cpu() {
            self.product(x, NonFinite::Propagate)
        } else {
            self.apply_graph(x)
        }
    }

    /// y as one operation, on the CPU; x is f32 of the right shape.
    pub(crate) fn product(&self, x: &Tensor, non_finite: NonFinite) -> Result<Tensor> {
        let floats = |t: &Tensor| t.to_dtype(DType::F32)?.contiguous();
        let (x, w) = (x.contiguous()?, floats(&self.weight)?);
        let bias = self.bias.as_ref().map(floats).transpose()?;
        let op = self.operation(non_finite);
        Ok(match (&self.scale, &bias) {
            (None, None) => x.apply_op2(&w, op)?,
            (None, Some(bias)) => x.apply_op3(&w, bias, op)?,
            (Some(scale), None) => x.apply_op3(&w, scale, op)?,
            (Some(scale), Some(bias)) => {
                x.apply_op3(&w, &Tensor::cat(&[scale.as_tensor(), bias], 0)?, op)?
            }
        })
    }

    fn operation(&self, non_finite: NonFinite) -> QuantizedProduct {
        QuantizedProduct {
            rounding: self.rounding.clone(),
            activations: self.activations,
            lambda: self.lambda,
            dead_zone: self.dead_zone,
            scales: self.scale.as_ref().map_or(0, |s| s.elem_count()),
            non_finite,
            codes: OnceLock::new(),
        }
    }

    /// W̃ `[N, K]` with gradients, for what is no product of this layer: an embedding, whose rows
    /// are looked up. Rows with NaN or infinity make all of it NaN.
    ///
    /// ```
    /// use bitnet_quant::{QuantizationConfig, qat::{QatLinear, StraightThroughEstimator}};
    /// use candle_core::{Device, Tensor, Var};
    /// let table = Var::randn(0f32, 1f32, (10, 64), &Device::Cpu)?;
    /// let config = QuantizationConfig::bitnet_158();
    /// let layer = QatLinear::new(table.as_tensor().clone(), None, None, &config, StraightThroughEstimator::Plain)?;
    /// let tokens = Tensor::new(&[3u32, 7], &Device::Cpu)?;
    /// let rows = layer.fake_quantized_weights()?.index_select(&tokens, 0)?;
    /// assert_eq!(rows.to_vec2::<f32>()?, layer.dequantized_weights()?.index_select(&tokens, 0)?.to_vec2::<f32>()?);
    /// assert!(rows.sum_all()?.backward()?.get(&table).is_some());
    /// # Ok::<(), bitnet_quant::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`] for a scheme that the device of the weights has no operations for.
    pub fn fake_quantized_weights(&self) -> Result<Tensor> {
        if !self.weight.device().is_cpu() {
            return self.fake_quantized_graph();
        }
        let w = self.weight.to_dtype(DType::F32)?.contiguous()?;
        let op = FakeQuantizedWeights(QuantizedProduct {
            dead_zone: 0.0,
            ..self.operation(NonFinite::Propagate)
        });
        Ok(match &self.scale {
            None => w.apply_op1(op)?,
            Some(scale) => w.apply_op2(scale, op)?,
        })
    }

    /// [`QatLinear::fake_quantized_weights`] in candle's operations, on any device.
    pub(crate) fn fake_quantized_graph(&self) -> Result<Tensor> {
        let scale = self.scale.as_ref().map(Var::as_tensor);
        self.graph().fake_quantized_weights(&self.weight, scale)
    }

    /// y in candle's operations, on any device.
    pub(crate) fn apply_graph(&self, x: &Tensor) -> Result<Tensor> {
        self.graph().forward(
            x,
            &self.weight,
            self.scale.as_ref().map(Var::as_tensor),
            self.bias.as_ref(),
        )
    }

    /// The latent weights by granules, and their values and steps in candle's operations.
    #[cfg(feature = "qat")]
    pub(crate) fn rounded(&self) -> Result<(Tensor, RoundedGranules)> {
        let graph = self.graph();
        let scale = self.scale.as_ref();
        let scale = scale.map(|s| s.as_tensor().detach().reshape(((), 1)));
        let w = graph.granules(&self.weight)?;
        let rounded = graph.round(&w.detach(), scale.transpose()?.as_ref())?;
        Ok((w, rounded))
    }

    fn graph(&self) -> DeviceGraph<'_> {
        DeviceGraph {
            rounding: &self.rounding,
            activations: self.activations,
            lambda: self.lambda,
            dead_zone: self.dead_zone,
        }
    }
}

impl Module for QatLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.apply(x).map_err(into_candle)
    }
}

/// Returns the columns of the weights; rejects shapes and devices that do not go together.
fn check_shapes(weight: &Tensor, bias: Option<&Tensor>) -> Result<usize> {
    let [rows, cols] = *weight.dims() else {
        return Err(Error::input(
            "weight",
            "2 dimensions",
            format!("shape {:?}", weight.dims()),
        ));
    };
    not_empty(weight)?;
    if let Some(bias) = bias {
        check_same_device(bias, weight)?;
        if bias.dims() != [rows] {
            return Err(Error::input(
                "bias",
                format!("shape [{rows}]"),
                format!("{:?}", bias.dims()),
            ));
        }
    }
    Ok(cols)
}

/// The variable of learned scales, if the estimator learns them: the given one, checked, or a new
/// one.
fn learned_scale(
    given: Option<Var>,
    weight: &Tensor,
    rounding: &WeightRounding,
) -> Result<Option<Var>> {
    if !rounding.estimator.learns_scale() {
        return Ok(None);
    }
    let shape = matrix_shape(weight)?;
    let granules = rounding.scheme.spec(shape.0, shape.1)?.scales_len();
    match given {
        Some(scale) if scale.dims() == [granules] && scale.dtype() == DType::F32 => {
            check_same_device(&scale, weight)?;
            Ok(Some(scale))
        }
        Some(scale) => Err(Error::input(
            "scale",
            format!("f32 of [{granules}]"),
            format!("{:?}", scale.as_tensor()),
        )),
        None => {
            let fresh = with_host_floats(weight, |w| rounding.initial_scales(w, shape))?;
            Ok(Some(Var::from_vec(fresh, granules, weight.device())?))
        }
    }
}

fn check_f32(x: &Tensor) -> Result<()> {
    if x.dtype() == DType::F32 {
        Ok(())
    } else {
        Err(Error::input("dtype", "f32", x.dtype().as_str()))
    }
}

fn check_same_device(x: &Tensor, weight: &Tensor) -> Result<()> {
    if x.device().same_device(weight.device()) {
        return Ok(());
    }
    Err(Error::input(
        "device",
        format!("that of the weights, {:?}", weight.device().location()),
        format!("{:?}", x.device().location()),
    ))
}
