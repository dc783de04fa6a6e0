//! Mixed precision on tensors: layers by kind, precision raised where quality is too low, and the
//! search of [`crate::search`].

use crate::calibration::{Calibration, importance};
use crate::recipe::PrecisionControlConfig;
use crate::recipe::{Choices, Format, Target};
use crate::search::{self, Candidate};
use crate::spec::{PrecisionAdjustment, PrecisionController};
use crate::tensor::quantizer::{
    QuantizedTensor, layout_named, quantize_activations, quantize_tensor,
};
use crate::tensor::runtime::Runtime;
use crate::tensor::{check_device, matrix_shape, with_floats};
use crate::{Error, Result};
use crate::{QuantizationConfig, Search};
use bitnet_checkpoint::matrix;
use bitnet_core::activation::{ActivationGranularity, ActivationMethod};
use bitnet_core::mixed_precision::{ComponentType, LayerPrecisionSpec};
use bitnet_core::{Precision, ZeroPoints, pack};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Conditions for raising the precision of a layer's weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecisionAdjustmentParams {
    /// Least cosine similarity between weights and dequantized weights. With the best scale it is
    /// `√(1 − error²)`, which gives the SQNR that the [`PrecisionController`] demands.
    pub accuracy_threshold: f32,
    /// Precision is not raised beyond this share of the memory.
    pub memory_pressure_threshold: f32,
    /// Bytes for all layers together; `None` for the free memory of the machine.
    pub memory_budget: Option<u64>,
}

impl Default for PrecisionAdjustmentParams {
    fn default() -> Self {
        Self {
            accuracy_threshold: 0.95,
            memory_pressure_threshold: 0.8,
            memory_budget: None,
        }
    }
}

/// A configuration of mixed precision.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MixedPrecisionQuantizationConfig {
    /// Settings of each precision, and rules for layers by name.
    pub config: QuantizationConfig,
    /// When precision is raised; `None`: never.
    pub adjustment: Option<PrecisionAdjustmentParams>,
}

impl MixedPrecisionQuantizationConfig {
    /// b1.58 for each kind of layer that allows it.
    pub fn bitnet() -> Self {
        Self {
            config: QuantizationConfig::bitnet_158(),
            adjustment: None,
        }
    }

    /// This configuration with adjustment.
    pub fn with_auto_adjustment(self, adjustment: PrecisionAdjustmentParams) -> Self {
        Self {
            adjustment: Some(adjustment),
            ..self
        }
    }
}

/// A quantized layer.
#[derive(Debug, Clone)]
pub struct LayerQuantization {
    /// The weights, packed; `None` if the layer's kind keeps them float.
    pub weights: Option<QuantizedTensor>,
    /// The activations; `None` if there are none or they stay float.
    pub activations: Option<QuantizedTensor>,
    /// The bias, which stays float.
    pub bias: Option<Tensor>,
    /// The changes of the precision of the weights.
    pub adjustments: Vec<PrecisionAdjustment>,
    /// Bytes before / bytes after.
    pub compression_ratio: f32,
    /// Bytes of weights, activations and bias before.
    pub original_size_bytes: usize,
    /// Bytes of weights, activations and bias after, scales included.
    pub quantized_size_bytes: usize,
}

/// Quantizes registered layers at the precision of their spec, a rule or their kind, raised where
/// that is too coarse.
///
/// ```
/// use bitnet_core::mixed_precision::{LayerPrecisionSpec, LayerType};
/// use bitnet_quant::prelude::*;
/// use candle_core::{Device, Tensor};
/// let mut quantizer = MixedPrecisionQuantizer::new(MixedPrecisionQuantizationConfig::bitnet())?;
/// quantizer.register_layer(LayerPrecisionSpec { layer_id: "fc".into(), weight_shape: vec![32, 64], ..Default::default() })?;
/// let weights = Tensor::randn(0f32, 1f32, (32, 64), &Device::Cpu)?;
/// let layer = quantizer.quantize_layer("fc", &weights, None, None)?;
/// assert_eq!(layer.quantized_size_bytes, 32 * 64 / 4 + 4); // two bits for each weight, one scale
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MixedPrecisionQuantizer {
    config: MixedPrecisionQuantizationConfig,
    runtime: Arc<Runtime>,
    layers: BTreeMap<String, LayerPrecisionSpec>,
    /// Bytes of each quantized layer.
    sizes: BTreeMap<String, usize>,
}

/// Creates a quantizer on a device.
///
/// # Errors
/// [`Error::Input`] for another device than the CPU; as [`MixedPrecisionQuantizer::new`].
pub fn create_mixed_precision_quantizer(
    config: MixedPrecisionQuantizationConfig,
    device: Device,
) -> Result<MixedPrecisionQuantizer> {
    check_device(&device)?;
    MixedPrecisionQuantizer::new(config)
}

impl MixedPrecisionQuantizer {
    /// A quantizer without layers.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each wrong field.
    pub fn new(config: MixedPrecisionQuantizationConfig) -> Result<Self> {
        config.config.validate()?;
        if let Some(p) = config.adjustment {
            let mut wrong = vec![];
            for (name, got) in [
                ("accuracy_threshold", p.accuracy_threshold),
                ("memory_pressure_threshold", p.memory_pressure_threshold),
            ] {
                if !(0.0..=1.0).contains(&got) {
                    wrong.push(format!("{name}: expected 0 to 1, got {got}"));
                }
            }
            Error::unless_empty(wrong)?;
        }
        let runtime = Runtime::shared(&config.config.compute)?;
        Ok(Self {
            config,
            runtime,
            layers: BTreeMap::new(),
            sizes: BTreeMap::new(),
        })
    }

    /// Registers a layer.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for shapes that do not fit,
    /// [`Error::Input`] for a name that exists.
    pub fn register_layer(&mut self, layer: LayerPrecisionSpec) -> Result<()> {
        layer.validate()?;
        if self.layers.contains_key(&layer.layer_id) {
            return Err(Error::input(
                "layer",
                "a new name",
                format!("'{}' again", layer.layer_id),
            ));
        }
        self.layers.insert(layer.layer_id.clone(), layer);
        Ok(())
    }

    /// Quantizes and packs the weights of a layer, and its activations `[…, K]` if there are any.
    ///
    /// # Errors
    /// [`Error::Input`] for a layer that was not registered and for weights of another shape than
    /// its spec; as [`quantize_tensor`].
    pub fn quantize_layer(
        &mut self,
        layer_id: &str,
        weights: &Tensor,
        activations: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<LayerQuantization> {
        let layer = self
            .layers
            .get(layer_id)
            .ok_or_else(|| Error::input("layer", "a registered name", format!("'{layer_id}'")))?;
        if weights.dims() != layer.weight_shape {
            return Err(Error::input(
                "weights",
                format!("shape {:?}", layer.weight_shape),
                format!("{:?}", weights.dims()),
            ));
        }
        let mut adjustments = vec![];
        let quantized = match self.precision(layer)? {
            None => None,
            Some(precision) => {
                Some(self.adjusted(layer_id, weights, precision, &mut adjustments)?)
            }
        };
        let method = match layer.precision(ComponentType::Activations) {
            Some(Precision::Binary) => Some(ActivationMethod::Sign),
            Some(Precision::Int4) => Some(ActivationMethod::Int4),
            Some(_) => Some(ActivationMethod::Int8),
            None => None,
        };
        let acts = match (activations, method) {
            (Some(x), Some(method)) => Some(quantize_activations(
                x,
                method,
                ActivationGranularity::Token,
            )?),
            _ => None,
        };
        let bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let size = |q: &Option<QuantizedTensor>, t: Option<&Tensor>| {
            q.as_ref()
                .map_or(t.map_or(0, bytes), |q| q.memory_footprint())
        };
        let weight_bytes = size(&quantized, Some(weights));
        let before = bytes(weights) + activations.map_or(0, bytes) + bias.map_or(0, bytes);
        let after = weight_bytes + size(&acts, activations) + bias.map_or(0, bytes);
        self.sizes
            .insert(layer_id.into(), weight_bytes + bias.map_or(0, bytes));
        Ok(LayerQuantization {
            weights: quantized,
            activations: acts,
            bias: bias.cloned(),
            adjustments,
            compression_ratio: before as f32 / after.max(1) as f32,
            original_size_bytes: before,
            quantized_size_bytes: after,
        })
    }

    /// Bytes of all layers quantized so far.
    pub fn memory_footprint(&self) -> usize {
        self.sizes.values().sum()
    }

    /// The first precision: of the layer's spec, of a rule, or of its kind.
    fn precision(&self, layer: &LayerPrecisionSpec) -> Result<Option<Precision>> {
        if layer.weights.is_some() {
            return Ok(layer.weights);
        }
        Ok(
            match self
                .config
                .config
                .rule_for(&layer.layer_id)?
                .and_then(|rule| rule.choices.precision)
            {
                Some(Target::Quantized(precision)) => Some(precision),
                Some(Target::Keep | Target::Float(_)) => None,
                None => layer.precision(ComponentType::Weights),
            },
        )
    }

    fn quantize_at(
        &self,
        layer_id: &str,
        weights: &Tensor,
        precision: Precision,
    ) -> Result<QuantizedTensor> {
        let base = self.config.config.choices_for(layer_id)?;
        let choices = Choices {
            precision: Some(Target::Quantized(precision)),
            ..Choices::default()
        }
        .over(&base);
        let scheme = choices
            .plain_scheme()?
            .ok_or_else(|| Error::input("precision", "one that is quantized", choices.target()))?;
        let mut quantized = quantize_tensor(&self.runtime, weights, &scheme, None)?;
        quantized.pack_with(match choices.layout.as_deref() {
            Some(name) => layout_named(name)?,
            None => Some(pack::plain(precision)),
        })?;
        Ok(quantized)
    }

    fn adjusted(
        &self,
        layer_id: &str,
        weights: &Tensor,
        precision: Precision,
        adjustments: &mut Vec<PrecisionAdjustment>,
    ) -> Result<QuantizedTensor> {
        let mut quantized = self.quantize_at(layer_id, weights, precision)?;
        let Some(params) = self.config.adjustment else {
            return Ok(quantized);
        };
        let budget = params
            .memory_budget
            .or(self.runtime.machine.memory)
            .unwrap_or(u64::MAX) as f64;
        let room = budget * f64::from(params.memory_pressure_threshold);
        let others: usize = self
            .sizes
            .iter()
            .filter(|(id, _)| *id != layer_id)
            .map(|(_, bytes)| bytes)
            .sum();
        let min_sqnr_db = (-10.0 * (1.0 - params.accuracy_threshold.powi(2)).max(1e-12).log10())
            .clamp(0.0, 119.0);
        let control = PrecisionControlConfig {
            initial: precision,
            min_sqnr_db,
            max_sqnr_db: 120.0,
            patience: 1,
            ..Default::default()
        };
        let mut controller = PrecisionController::new(control)?;
        while let Some(change) =
            controller.adjust_precision_dynamically(&quantized.stats(weights)?)?
        {
            let finer = self.quantize_at(layer_id, weights, change.to_precision)?;
            if change.to_precision.levels() < change.from_precision.levels()
                || (others + finer.memory_footprint()) as f64 > room
            {
                break;
            }
            quantized = finer;
            adjustments.push(change);
        }
        Ok(quantized)
    }

    /// Chooses a precision for each matrix so that together they reach the goal with the least
    /// error; see [`crate::search`]. With a calibration, which must contain every matrix, the error
    /// is that of the outputs.
    ///
    /// ```
    /// use bitnet_quant::prelude::*;
    /// use candle_core::{Device, Tensor};
    /// let quantizer = MixedPrecisionQuantizer::new(MixedPrecisionQuantizationConfig::default())?;
    /// let (a, b) = (Tensor::randn(0f32, 1f32, (16, 256), &Device::Cpu)?, Tensor::randn(0f32, 9f32, (16, 256), &Device::Cpu)?);
    /// let found = quantizer.search(&[("a", &a), ("b", &b)], Search::within(3.0), None)?;
    /// assert!(found.bytes * 8 <= 3 * 2 * 16 * 256);
    /// # Ok::<(), bitnet_quant::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`CheckpointError::Recipe`](crate::CheckpointError::Recipe) for a goal that cannot be
    /// reached, [`CheckpointError::NotCalibrated`](crate::CheckpointError::NotCalibrated); as
    /// [`quantize_tensor`].
    pub fn search(
        &self,
        layers: &[(&str, &Tensor)],
        goal: Search,
        calibration: Option<&Calibration>,
    ) -> Result<MixedPrecision> {
        let mut wrong = vec![];
        goal.problems(&Choices::default(), &mut wrong);
        Error::unless_empty(wrong)?;
        let grid = search::grid(Format::Safetensors, &Choices::default())?;
        let kernels = self.runtime.machine.kernels;
        let (mut tensors, mut weights) = (vec![], 0);
        for (name, tensor) in layers {
            let shape = matrix_shape(tensor)?;
            let h = importance(calibration, name, Some(shape))?;
            weights += shape.0 * shape.1;
            let measured = with_floats(tensor, |w| {
                self.runtime.install(|| {
                    let mut all = vec![];
                    for choices in &grid {
                        let Some(scheme) = choices.plain_scheme()? else {
                            continue;
                        };
                        let quantized = matrix::quantize(kernels, w, shape, &scheme, h.as_deref())?;
                        let spec = &quantized.spec;
                        let layout = pack::plain(spec.precision);
                        let zero = if spec.zero_points == ZeroPoints::None {
                            0
                        } else {
                            1
                        };
                        let scales = spec.scales_len() * (spec.scale_dtype.bytes() + zero);
                        let bytes = (layout.packed_len(spec).bound() + scales) as u64;
                        let stats = matrix::measure(w, &quantized);
                        let error = h
                            .as_ref()
                            .map_or(stats.noise, |h| matrix::weighted_error(w, &quantized, h));
                        all.push(Candidate {
                            choices: choices.clone(),
                            bytes,
                            error,
                            sqnr_db: stats.sqnr_db(),
                        });
                    }
                    Ok(all)
                })
            })?;
            tensors.push(measured);
        }
        let budget = goal
            .target_bpw
            .map(|bits| (bits * weights as f64 / 8.0).floor() as u64);
        let found = search::select(&tensors, budget, goal.min_sqnr)?;
        let choices = layers.iter().zip(tensors.iter().zip(&found.picks));
        let choices = choices
            .map(|((name, _), (all, &pick))| (name.to_string(), all[pick].choices.clone()))
            .collect();
        Ok(MixedPrecision {
            choices,
            bytes: found.bytes,
            error: found.error,
        })
    }
}

/// The result of a search.
#[derive(Debug, Clone, PartialEq)]
pub struct MixedPrecision {
    /// The choices of each matrix by name: rules for a [`QuantizationConfig`].
    pub choices: Vec<(String, Choices)>,
    /// Bytes of all matrices, scales included.
    pub bytes: u64,
    /// Sum of their errors.
    pub error: f64,
}
