//! The configuration of a training.

use super::StraightThroughEstimator;
use super::checkpoint::CheckpointConfig;
use super::optimizer::OptimizerConfig;
use super::progressive::Progressive;
use super::schedule::Schedule;
use super::telemetry::TelemetryConfig;
use crate::recipe::Choices;
use crate::spec::QuantizationScheme;
use crate::{CheckpointError, Error, Result};
use crate::{Compute, QuantizationConfig};
use bitnet_core::Scheme;
use serde::{Deserialize, Serialize};

/// The configuration of a training. Model and data are a [`Task`](super::Task).
///
/// ```
/// use bitnet_quant::qat::QATConfig;
/// let config = QATConfig::from_toml("steps = 200\nclip = 1.0\n[optimizer]\nlearning_rate = 0.002\n[quantization.default]\nthreshold = 'optimal'")?;
/// assert_eq!(config.optimizer.learning_rate, 0.002);
/// assert_eq!(QATConfig::from_toml(&config.to_toml()?)?, config);
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QATConfig {
    /// Steps of the optimizer.
    pub steps: u64,
    /// Micro-batches per step; their gradients are averaged.
    pub accumulate: u64,
    /// Largest norm of all gradients together; longer gradients are scaled down to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// How gradients pass the rounding of weights.
    pub estimator: StraightThroughEstimator,
    /// Stages with decreasing bits, and strength that grows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progressive: Option<Progressive>,
    /// Factor of the gradients of latent weights.
    pub gradient_scaling: f64,
    /// β of [`QatLinear::set_dead_zone_bias`](super::QatLinear::set_dead_zone_bias) for layers with
    /// ternary weights of one plane.
    #[serde(skip_serializing_if = "is_zero")]
    pub dead_zone_bias: f32,
    /// Factor of [`level_distance`](super::regularization::level_distance) in the loss; 0 adds
    /// nothing.
    #[serde(skip_serializing_if = "is_zero64")]
    pub level_regularization: f64,
    /// Steps between evaluations; 0 evaluates only at the end. After several evaluations the final
    /// model is that of the best one.
    pub evaluate_every: u64,
    /// When to stop early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
    /// Where and when checkpoints are written; `None` writes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointConfig>,
    /// Records of the layers, and the log.
    pub telemetry: TelemetryConfig,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate and weight decay over the steps.
    pub schedule: Schedule,
    /// Quantization of weights and activations, as for quantization after training.
    pub quantization: QuantizationConfig,
}

fn is_zero(x: &f32) -> bool {
    *x == 0.0
}

fn is_zero64(x: &f64) -> bool {
    *x == 0.0
}

/// Stops when evaluations no longer improve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EarlyStopping {
    /// Number of evaluations without improvement before the training stops.
    pub patience: u64,
    /// An improvement is an evaluation lower than the best so far by more than this.
    pub min_delta: f64,
}

impl Default for EarlyStopping {
    fn default() -> Self {
        Self {
            patience: 3,
            min_delta: 0.0,
        }
    }
}

impl Default for QATConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            accumulate: 1,
            clip: None,
            gradient_scaling: 1.0,
            dead_zone_bias: 0.0,
            level_regularization: 0.0,
            evaluate_every: 0,
            early_stopping: None,
            estimator: StraightThroughEstimator::default(),
            progressive: None,
            checkpoint: None,
            telemetry: TelemetryConfig::default(),
            optimizer: OptimizerConfig::default(),
            schedule: Schedule::default(),
            quantization: QuantizationConfig::bitnet_158(),
        }
    }
}

impl QATConfig {
    /// A builder with the defaults: b1.58, AdamW, cosine schedule.
    pub fn builder() -> QATConfigBuilder {
        QATConfigBuilder::default()
    }

    /// Reads TOML.
    ///
    /// # Errors
    /// [`CheckpointError::Recipe`](crate::CheckpointError::Recipe) for text that is not such TOML,
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) for invalid values.
    pub fn from_toml(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(Error::recipe)?;
        config.validate()?;
        Ok(config)
    }

    /// The part that the results depend on, as a document.
    pub(crate) fn numbers(&self) -> Result<serde_json::Value> {
        let quantization = QuantizationConfig {
            compute: Compute::default(),
            ..self.quantization.clone()
        };
        let numbers = Self {
            evaluate_every: 0,
            early_stopping: None,
            checkpoint: None,
            telemetry: TelemetryConfig::default(),
            quantization,
            ..self.clone()
        };
        // Through text, because a JSON reader may round numbers: then both sides of a comparison
        // are rounded.
        let text = serde_json::to_string(&numbers).map_err(Error::recipe)?;
        serde_json::from_str(&text).map_err(Error::recipe)
    }

    /// This configuration as TOML.
    ///
    /// # Errors
    /// [`CheckpointError::Recipe`](crate::CheckpointError::Recipe) for a number that TOML cannot
    /// hold.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(Error::recipe)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each wrong field.
    pub fn validate(&self) -> Result<()> {
        let mut wrong = vec![];
        for (name, n) in [("steps", self.steps), ("accumulate", self.accumulate)] {
            if n == 0 {
                wrong.push(format!("{name}: expected at least 1, got 0"));
            }
        }
        if let Some(clip) = self.clip.filter(|c| !(c.is_finite() && *c > 0.0)) {
            wrong.push(format!("clip: expected a positive number, got {clip}"));
        }
        if !(self.gradient_scaling.is_finite() && self.gradient_scaling > 0.0) {
            wrong.push(format!(
                "gradient_scaling: expected a positive number, got {}",
                self.gradient_scaling
            ));
        }
        if !self.dead_zone_bias.is_finite() {
            wrong.push(format!(
                "dead_zone_bias: expected a number, got {}",
                self.dead_zone_bias
            ));
        }
        if !(self.level_regularization.is_finite() && self.level_regularization >= 0.0) {
            wrong.push(format!(
                "level_regularization: expected a number of at least 0, got {}",
                self.level_regularization
            ));
        }
        if let Some(stop) = self.early_stopping {
            if stop.patience == 0 {
                wrong.push("early_stopping.patience: expected at least 1, got 0".into());
            }
            if !(stop.min_delta.is_finite() && stop.min_delta >= 0.0) {
                wrong.push(format!(
                    "early_stopping.min_delta: expected a number of at least 0, got {}",
                    stop.min_delta
                ));
            }
            if self.evaluate_every == 0 {
                wrong.push("early_stopping: expected evaluate_every above 0, got 0".into());
            }
        }
        if let Some(progressive) = &self.progressive {
            match progressive.validate() {
                Err(Error::Checkpoint(CheckpointError::Invalid(fields))) => wrong.extend(fields),
                other => other?,
            }
            if progressive.settled() >= self.steps {
                let settled = progressive.settled();
                wrong.push(format!(
                    "progressive: expected to settle before step {}, the last, got {settled}",
                    self.steps
                ));
            }
        }
        self.optimizer.problems(&mut wrong);
        self.schedule.problems(&mut wrong);
        match self.quantization.validate() {
            Err(CheckpointError::Invalid(fields)) => {
                wrong.extend(fields.into_iter().map(|f| format!("quantization.{f}")))
            }
            Err(other) => return Err(other.into()),
            Ok(()) => {}
        }
        Error::unless_empty(wrong)
    }
}

/// Builds a [`QATConfig`].
#[derive(Debug, Clone, Default)]
pub struct QATConfigBuilder {
    config: QATConfig,
    progressive: bool,
    initial_bits: Option<u32>,
    target_bits: Option<u32>,
}

/// A setter for each plain field.
macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty => $($field:ident).+;)*) => {$(
        $(#[$doc])*
        pub fn $name(mut self, $name: $type) -> Self {
            self.config.$($field).+ = $name.into();
            self
        }
    )*};
}

impl QATConfigBuilder {
    setters! {
        /// Steps of the optimizer.
        steps: u64 => steps;
        /// Micro-batches of a step.
        accumulate: u64 => accumulate;
        /// Largest norm of all gradients together; longer gradients are scaled down to it.
        clip: f64 => clip;
        /// How gradients pass the rounding of weights.
        estimator: StraightThroughEstimator => estimator;
        /// Factor of the gradients of latent weights.
        gradient_scaling: f64 => gradient_scaling;
        /// β of the dead-zone bias.
        dead_zone_bias: f32 => dead_zone_bias;
        /// Factor of the distance of weights to their levels in the loss.
        level_regularization: f64 => level_regularization;
        /// Steps between evaluations.
        evaluate_every: u64 => evaluate_every;
        /// When to stop early.
        early_stopping: EarlyStopping => early_stopping;
        /// Checkpoints.
        checkpoint: CheckpointConfig => checkpoint;
        /// Records of the layers, and the log.
        telemetry: TelemetryConfig => telemetry;
        /// The optimizer.
        optimizer: OptimizerConfig => optimizer;
        /// Learning rate η.
        learning_rate: f64 => optimizer.learning_rate;
        /// Decay λ.
        weight_decay: f64 => optimizer.weight_decay;
        /// Learning rate and weight decay over the steps.
        schedule: Schedule => schedule;
        /// Quantization of weights and activations.
        quantization: QuantizationConfig => quantization;
    }

    /// The scheme of the weights by name.
    pub fn quantization_scheme(mut self, scheme: QuantizationScheme) -> Self {
        self.config.quantization.default =
            Choices::from(Scheme::from(scheme)).over(&self.config.quantization.default);
        self
    }

    /// Stages and strength in full.
    pub fn progressive(mut self, progressive: Progressive) -> Self {
        self.config.progressive = Some(progressive);
        self
    }

    /// Whether the number of bits decreases during training: [`Progressive::first_half`] from
    /// `initial_bit_width`.
    pub fn progressive_quantization(mut self, progressive: bool) -> Self {
        self.progressive = progressive;
        self
    }

    /// The bits of the first stage of `progressive_quantization`; 8 by default.
    pub fn initial_bit_width(mut self, bits: u32) -> Self {
        self.initial_bits = Some(bits);
        self
    }

    /// The bits at the end. They must be those of the scheme: 2 for ternary.
    pub fn target_bit_width(mut self, bits: u32) -> Self {
        self.target_bits = Some(bits);
        self
    }

    /// The configuration.
    ///
    /// # Errors
    /// As [`QATConfig::validate`]; [`CheckpointError::Invalid`](crate::CheckpointError::Invalid)
    /// also where setters contradict each other.
    pub fn build(mut self) -> Result<QATConfig> {
        let mut wrong = vec![];
        let precision = self.config.quantization.default.precision();
        let bits = precision.map(|p| p.code_bits());
        if let Some(target) = self.target_bits.filter(|target| Some(*target) != bits) {
            let expected = bits.map_or("none, as weights stay floats".into(), |bits| {
                format!("{bits}, as the scheme has")
            });
            wrong.push(format!(
                "target_bit_width: expected {expected}, got {target}"
            ));
        }
        match (self.progressive, &self.config.progressive) {
            (true, Some(_)) => wrong
                .push("progressive_quantization: expected without progressive, got both".into()),
            (true, None) => {
                self.config.progressive = Some(Progressive::first_half(
                    self.initial_bits.unwrap_or(8),
                    self.config.steps,
                ));
            }
            (false, _) if self.initial_bits.is_some() => {
                wrong.push(
                    "initial_bit_width: expected with progressive_quantization, got it alone"
                        .into(),
                );
            }
            (false, _) => {}
        }
        Error::unless_empty(wrong)?;
        self.config.validate()?;
        Ok(self.config)
    }
}
