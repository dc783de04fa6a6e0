//! The linear layer in training; what it computes is in `product.rs`.

use super::graph::{Graph, Rounded};
use super::product::Product;
use super::ste::{Codes, Quantizer, StraightThroughEstimator};
use super::{candle, with_host_floats};
use crate::tensor::runtime::Runtime;
use crate::tensor::{matrix_shape, not_empty, token_shape};
use crate::{Activations, QuantizationConfig};
use crate::{BitLinear, Error, Result};
use bitnet_core::Matrix;
use bitnet_core::scheme::{Clip, Mapping, Method, Scheme};
use candle_core::{DType, Device, Module, Tensor, Var};
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

/// What a layer rounds to at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Symmetric integers of so many bits, as a step on the way; with 2, 3 and 4 bits their range
    /// is that of the least error on normal weights.
    Bits(u32),
    /// What the configuration says.
    #[default]
    Target,
}

impl Stage {
    fn scheme(self, target: &Scheme) -> Result<Scheme> {
        let Self::Bits(bits) = self else {
            return Ok(*target);
        };
        let clip = match bits {
            2 => Clip::Rms(1.05),
            3 => Clip::Rms(1.81),
            4 => Clip::Rms(2.37),
            _ => Clip::None,
        };
        let scheme = Scheme {
            method: Method::Int {
                bits,
                mapping: Mapping::Symmetric,
                clip,
            },
            ..*target
        };
        scheme.spec(1, 1)?;
        Ok(scheme)
    }

    /// Stretched scales belong to few levels; stages of more learn theirs as LSQ.
    fn estimator(self, target: StraightThroughEstimator) -> StraightThroughEstimator {
        match (self, target) {
            (Self::Bits(3..), StraightThroughEstimator::Stretched) => {
                StraightThroughEstimator::LearnedScale
            }
            _ => target,
        }
    }
}

/// A linear layer in training.
///
/// ```text
/// y = x̃ · W̃ᵀ + b      x̃ = x + λ·(x̂ − x),  W̃ = W + λ·(Ŵ − W)      x […, K], W [N, K], y […, N]
/// ∂L/∂x = ∂L/∂y · W̃,   ∂L/∂W = (∂L/∂yᵀ · x̃) ⊙ (1 − λ + λ·m),   ∂L/∂b = Σ ∂L/∂y
/// ```
///
/// x̂ are activations with one scale for each token, Ŵ the quantized weights, m the slope of the
/// [`StraightThroughEstimator`], λ the strength. At full strength, λ = 1, and with quantized
/// activations the product is that of the packed layer, in integers, so that a converted model
/// gives the same bits.
///
/// So it is on the CPU. On other devices of candle the same is said in its own operations, in
/// floats, for ternary weights of one plane (absmean, mean, a factor; any rule where the scale is
/// learned), binary ones around 0 and symmetric integers; groups must divide the columns.
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
    /// A layer on latent weights `[N, K]` and a bias `[N]`, f32 on one device, quantized as
    /// `default` of the configuration says. Learned scales are `scale`, or a new variable where
    /// none is given.
    ///
    /// # Errors
    /// [`Error::Input`] for shapes, types, devices, and an estimator that does not go with the
    /// scheme; [`Error::Invalid`] for a configuration that is wrong.
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        scale: Option<Var>,
        config: &QuantizationConfig,
        estimator: StraightThroughEstimator,
    ) -> Result<Self> {
        config.validate()?;
        let [rows, cols] = *weight.dims() else {
            return Err(Error::input(
                "weight",
                "2 dimensions",
                format!("shape {:?}", weight.dims()),
            ));
        };
        not_empty(&weight)?;
        for tensor in [Some(&weight), bias.as_ref()].into_iter().flatten() {
            is_f32(tensor)?;
            same_device(tensor, &weight)?;
        }
        if let Some(bias) = bias.as_ref().filter(|b| b.dims() != [rows]) {
            return Err(Error::input(
                "bias",
                format!("shape [{rows}]"),
                format!("{:?}", bias.dims()),
            ));
        }
        let target = config.default.plain_scheme()?;
        let target = target.ok_or_else(|| {
            Error::input(
                "precision",
                "one that is quantized",
                config.default.target(),
            )
        })?;
        let runtime = Runtime::of(&config.compute)?;
        let quantizer = Quantizer::new(target, estimator, runtime)?;
        let granules = target.spec(rows, cols)?.scales_len();
        let scale = match scale.filter(|_| estimator.learns_scale()) {
            Some(scale) if scale.dims() == [granules] && scale.dtype() == DType::F32 => {
                same_device(&scale, &weight)?;
                Some(scale)
            }
            Some(scale) => {
                return Err(Error::input(
                    "scale",
                    format!("f32 of [{granules}]"),
                    format!("{:?}", scale.as_tensor()),
                ));
            }
            None if estimator.learns_scale() => {
                let fresh =
                    with_host_floats(&weight, |w| quantizer.initial_scales(w, (rows, cols)))?;
                Some(Var::from_vec(fresh, granules, weight.device())?)
            }
            None => None,
        };
        let (stage, lambda) = (Stage::Target, 1.0);
        let activations = config.activations.unwrap_or_default();
        let config = config.clone();
        let layer = Self {
            weight,
            bias,
            scale,
            config,
            target,
            estimator,
            activations,
            stage,
            lambda,
            dead_zone: 0.0,
            quantizer,
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

    /// Goes to another stage. Learned scales begin anew in it, in place; to keep those of a
    /// checkpoint, load them after this.
    ///
    /// # Errors
    /// [`Error::Core`] for a number of bits that does not exist and for NaN among the weights.
    pub fn set_stage(&mut self, stage: Stage) -> Result<()> {
        if stage == self.stage {
            return Ok(());
        }
        let scheme = stage.scheme(&self.target)?;
        let quantizer = Quantizer::new(
            scheme,
            stage.estimator(self.estimator),
            self.quantizer.runtime.clone(),
        )?;
        if let Some(scale) = &self.scale {
            let fresh = with_host_floats(&self.weight, |w| {
                quantizer.initial_scales(w, matrix_shape(&self.weight)?)
            })?;
            scale.set(&Tensor::from_vec(fresh, scale.dims(), scale.device())?)?;
        }
        (self.stage, self.quantizer) = (stage, quantizer);
        Ok(())
    }

    /// λ, the share of the rounding that the forward pass sees: 0 for floats, 1 for what the packed
    /// layer will compute.
    pub fn lambda(&self) -> f32 {
        self.lambda
    }

    /// Sets λ, which is kept between 0 and 1.
    pub fn set_lambda(&mut self, lambda: f32) {
        self.lambda = if lambda.is_nan() {
            1.0
        } else {
            lambda.clamp(0.0, 1.0)
        };
    }

    /// β, the weight of the dead-zone bias; 0, as in the beginning, for none.
    pub fn dead_zone_bias(&self) -> f32 {
        self.dead_zone
    }

    /// Sets β: weights whose value is 0 count as β times themselves in the bias of their row,
    /// whatever the input, and so get the gradient β·∂L/∂b more, which leads them out of the dead
    /// zone (after Tequila, Huang et al. 2025, arXiv:2509.23809, where β is 1e-3). Packed, it is a
    /// bias.
    ///
    /// # Errors
    /// [`Error::Input`] for a target that is not ternary of one plane, and for a β that is no
    /// number.
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

    /// Whether the target is ternary of one plane, which alone has a dead zone to be led out of.
    pub(super) fn has_dead_zone(&self) -> bool {
        matches!(self.target.method, Method::Ternary { planes: 1, .. })
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
        with_host_floats(&self.weight, |w| match &self.scale {
            Some(scale) => with_host_floats(scale, |s| self.quantizer.encode(w, shape, Some(s))),
            None => self.quantizer.encode(w, shape, None),
        })
    }

    /// Ŵ, `[N, K]`, apart from the graph.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN among the weights.
    pub fn dequantized_weights(&self) -> Result<Tensor> {
        Ok(Tensor::from_vec(
            self.codes()?.dequantize(&self.quantizer.runtime)?,
            self.weight.dims(),
            self.weight.device(),
        )?)
    }

    /// The bias `[N]` of the packed layer, on the CPU: this one's, and what the dead zone adds.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN among the weights.
    pub fn packed_bias(&self) -> Result<Option<Tensor>> {
        self.bias_with(&self.codes()?)
    }

    fn bias_with(&self, codes: &Codes) -> Result<Option<Tensor>> {
        let bias = self
            .bias
            .as_ref()
            .map(|bias| bias.detach().to_device(&Device::Cpu))
            .transpose()?;
        if self.dead_zone == 0.0 {
            return Ok(bias);
        }
        let dead = with_host_floats(&self.weight, |w| {
            codes.sums_of_zeros(w, self.dead_zone, self.runtime())
        })?;
        let dead = Tensor::from_vec(dead, self.weight.dims()[0], &Device::Cpu)?;
        Ok(Some(match bias {
            Some(bias) => (bias + dead)?,
            None => dead,
        }))
    }

    /// The packed layer, on the CPU: at full strength it computes the same.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN among the weights, [`Error::Kernels`] for a scheme that has no
    /// product.
    pub fn convert(&self) -> Result<BitLinear> {
        let codes = self.codes()?;
        let bias = self.bias_with(&codes)?;
        BitLinear::from_matrix(&codes.into_matrix(self.runtime())?, bias, &self.config)
    }

    /// The same layer without quantization, on the same variables.
    pub fn to_full(&self) -> candle_nn::Linear {
        candle_nn::Linear::new(self.weight.clone(), self.bias.clone())
    }

    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        is_f32(x)?;
        same_device(x, &self.weight)?;
        not_empty(x)?;
        let (_, k) = token_shape(x)?;
        if k != self.weight.dims()[1] {
            return Err(Error::input(
                "input",
                format!("{} features", self.weight.dims()[1]),
                format!("shape {:?}", x.dims()),
            ));
        }
        if !x.device().is_cpu() {
            return self.apply_graph(x);
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
            (Some(scale), Some(bias)) => {
                x.apply_op3(&w, &Tensor::cat(&[scale.as_tensor(), bias], 0)?, op)?
            }
        })
    }

    /// y as operations of candle, whatever the device.
    pub(super) fn apply_graph(&self, x: &Tensor) -> Result<Tensor> {
        self.graph().forward(
            x,
            &self.weight,
            self.scale.as_ref().map(Var::as_tensor),
            self.bias.as_ref(),
        )
    }

    /// The latent weights by granules, and what candle's operations make of them.
    pub(super) fn rounded(&self) -> Result<(Tensor, Rounded)> {
        let (graph, scale) = (
            self.graph(),
            self.scale
                .as_ref()
                .map(|s| s.as_tensor().detach().reshape(((), 1)))
                .transpose()?,
        );
        let w = graph.granules(&self.weight)?;
        let rounded = graph.round(&w.detach(), scale.as_ref())?;
        Ok((w, rounded))
    }

    pub(super) fn graph(&self) -> Graph<'_> {
        Graph {
            quantizer: &self.quantizer,
            activations: self.activations,
            lambda: self.lambda,
            dead_zone: self.dead_zone,
        }
    }
}

impl Module for QatLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.apply(x).map_err(candle)
    }
}

fn is_f32(x: &Tensor) -> Result<()> {
    if x.dtype() == DType::F32 {
        Ok(())
    } else {
        Err(Error::input(
            "dtype",
            "f32, which is what trains",
            x.dtype().as_str(),
        ))
    }
}

fn same_device(x: &Tensor, weight: &Tensor) -> Result<()> {
    if x.device().same_device(weight.device()) {
        return Ok(());
    }
    Err(Error::input(
        "device",
        format!("that of the weights, {:?}", weight.device().location()),
        format!("{:?}", x.device().location()),
    ))
}
