//! The configuration of a [`BitLinear`](super::BitLinear).

use super::norm::SubNorm;
use crate::recipe::Choices;
use crate::spec::QuantizationScheme;
use crate::{Activations, QuantizationConfig};
use crate::{CheckpointError, Error, Result};
use bitnet_core::Scheme;

/// The shape, norm and quantization of a [`BitLinear`](super::BitLinear).
///
/// ```
/// use bitnet_quant::prelude::*;
/// let config = BitLinearConfig::builder().input_features(768).output_features(3072).enable_bias(true).build()?;
/// assert_eq!((config.in_features, config.out_features), (768, 3072));
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct BitLinearConfig {
    /// K.
    pub in_features: usize,
    /// N.
    pub out_features: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether the layer is packed from the beginning, and so takes no gradient for its weights.
    pub packed: bool,
    /// The norm before quantization.
    pub norm: Option<SubNorm>,
    /// ε of that norm.
    pub norm_eps: f64,
    /// Quantization of weights and activations, and compute. Weights default to b1.58.
    pub config: QuantizationConfig,
}

impl BitLinearConfig {
    /// Latent, without bias and norm, as b1.58.
    pub fn new(in_features: usize, out_features: usize) -> Self {
        Self {
            in_features,
            out_features,
            bias: false,
            packed: false,
            norm: None,
            norm_eps: 1e-6,
            config: QuantizationConfig::bitnet_158(),
        }
    }

    /// A builder.
    pub fn builder() -> BitLinearConfigBuilder {
        BitLinearConfigBuilder(Self::new(0, 0))
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each wrong field.
    pub fn validate(&self) -> Result<()> {
        let mut wrong = vec![];
        for (name, got) in [
            ("in_features", self.in_features),
            ("out_features", self.out_features),
        ] {
            if got == 0 || got > isize::MAX as usize / 1024 {
                wrong.push(format!("{name}: expected at least 1, got {got}"));
            }
        }
        if !(self.norm_eps > 0.0 && self.norm_eps.is_finite()) {
            wrong.push(format!(
                "norm_eps: expected a positive number, got {}",
                self.norm_eps
            ));
        }
        if let Err(CheckpointError::Invalid(more)) = self.config.validate() {
            wrong.extend(more);
        } else if self.config.default.precision().is_none() {
            wrong.push(format!(
                "default.precision: expected one that is quantized, got {}",
                self.config.default.target()
            ));
        }
        Error::unless_empty(wrong)
    }
}

/// Builds a [`BitLinearConfig`].
#[derive(Debug, Clone)]
pub struct BitLinearConfigBuilder(BitLinearConfig);

impl BitLinearConfigBuilder {
    /// K.
    pub fn input_features(mut self, features: usize) -> Self {
        self.0.in_features = features;
        self
    }

    /// N.
    pub fn output_features(mut self, features: usize) -> Self {
        self.0.out_features = features;
        self
    }

    /// How weights are quantized.
    pub fn quantization_scheme(mut self, scheme: QuantizationScheme) -> Self {
        self.0.config.default = Choices::from(Scheme::from(scheme));
        self
    }

    /// How the input is quantized.
    pub fn activations(mut self, activations: Activations) -> Self {
        self.0.config.activations = Some(activations);
        self
    }

    /// Whether there is a bias.
    pub fn enable_bias(mut self, bias: bool) -> Self {
        self.0.bias = bias;
        self
    }

    /// Whether to hold packed weights only, instead of latent floats that can be trained.
    pub fn memory_optimization(mut self, packed: bool) -> Self {
        self.0.packed = packed;
        self
    }

    /// A norm between the input and its quantization.
    pub fn sub_norm(mut self, norm: SubNorm) -> Self {
        self.0.norm = Some(norm);
        self
    }

    /// Weights, activations and machine together.
    pub fn config(mut self, config: QuantizationConfig) -> Self {
        self.0.config = config;
        self
    }

    /// The configuration, checked.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each wrong field.
    pub fn build(self) -> Result<BitLinearConfig> {
        self.0.validate()?;
        Ok(self.0)
    }
}
