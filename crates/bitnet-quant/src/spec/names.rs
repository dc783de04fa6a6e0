//! Names of the specification for types of this workspace. A name is an alias of the type behind
//! it, or converts into it.

use crate::{Error, Result};
use bitnet_checkpoint::recipe::{Choices, LayoutChoice, Recipe, RecipeBuilder};
use bitnet_core::Precision;
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, ScaleRule, Scheme, Threshold};

/// Symmetric integers, or integers with zero points.
pub use bitnet_core::scheme::Mapping as QuantizationStrategy;

/// The two levels of binary weights.
pub use bitnet_core::scheme::BinarySplit as BinaryThresholdMethod;

/// A wire layout, from values to bytes; implement it to add a packing.
pub use bitnet_core::pack::Layout as TernaryPacker;

/// The configuration: one serialisable, versioned type for the library, the command line and
/// files.
pub type QuantizationConfig = Recipe;

/// The builder of a configuration.
pub type QuantizationConfigBuilder = RecipeBuilder;

/// The builder of a weight configuration, which is the same builder.
pub type WeightQuantizationConfigBuilder = RecipeBuilder;

/// Configurations for common purposes.
pub use bitnet_checkpoint::recipe::Preset as ConfigurationPreset;

/// [`Precision`] by its number of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantizationPrecision {
    /// {−1, +1}.
    OneBit,
    /// {−1, 0, +1}, log2 3 = 1.58 bits.
    OneFiveEightBit,
    /// −2 … 1.
    TwoBit,
    /// −4 … 3.
    ThreeBit,
    /// −8 … 7.
    FourBit,
    /// −128 … 127.
    EightBit,
}

impl From<QuantizationPrecision> for Precision {
    fn from(precision: QuantizationPrecision) -> Self {
        match precision {
            QuantizationPrecision::OneBit => Self::Binary,
            QuantizationPrecision::OneFiveEightBit => Self::Ternary,
            QuantizationPrecision::TwoBit => Self::Int2,
            QuantizationPrecision::ThreeBit => Self::Int3,
            QuantizationPrecision::FourBit => Self::Int4,
            QuantizationPrecision::EightBit => Self::Int8,
        }
    }
}

/// [`Threshold`] under other names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TernaryMethod {
    /// [`Threshold::Absmean`], the rule of b1.58.
    Absmean,
    /// [`Threshold::Mean`].
    MeanThreshold,
    /// [`Threshold::Median`].
    MedianThreshold,
    /// [`Threshold::Adaptive`].
    AdaptiveThreshold,
    /// [`Threshold::Optimal`].
    OptimalThreshold,
}

impl From<TernaryMethod> for Threshold {
    fn from(method: TernaryMethod) -> Self {
        match method {
            TernaryMethod::Absmean => Self::Absmean,
            TernaryMethod::MeanThreshold => Self::Mean,
            TernaryMethod::MedianThreshold => Self::Median,
            TernaryMethod::AdaptiveThreshold => Self::Adaptive,
            TernaryMethod::OptimalThreshold => Self::Optimal,
        }
    }
}

/// Schemes by name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum QuantizationScheme {
    /// b1.58: ternary absmean, one scale for the tensor.
    BitNet158,
    /// Signs times mean magnitude, one scale for the tensor.
    BitNet1,
    /// Any other scheme.
    Custom(Scheme),
}

impl From<QuantizationScheme> for Scheme {
    fn from(scheme: QuantizationScheme) -> Self {
        match scheme {
            QuantizationScheme::BitNet158 => Self::ternary(Threshold::Absmean),
            QuantizationScheme::BitNet1 => Self::binary(BinarySplit::Zero),
            QuantizationScheme::Custom(scheme) => scheme,
        }
    }
}

/// How much work packing may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptimizationLevel {
    /// A byte for each value.
    None,
    /// The plain layout of the precision, with fixed bits per value.
    Basic,
    /// The smallest layout, found by trying all.
    Aggressive,
}

impl From<OptimizationLevel> for LayoutChoice {
    fn from(level: OptimizationLevel) -> Self {
        match level {
            OptimizationLevel::None => Self::Bytes,
            OptimizationLevel::Basic => Self::Plain,
            OptimizationLevel::Aggressive => Self::Smallest,
        }
    }
}

/// A choice of wire layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackingConfig(LayoutChoice);

impl PackingConfig {
    /// The plain layout of the precision: two bits for a trit.
    pub const fn bitnet() -> Self {
        Self(LayoutChoice::Plain)
    }

    /// The smallest layout.
    pub const fn max_compression() -> Self {
        Self(LayoutChoice::Smallest)
    }
}

impl From<PackingConfig> for LayoutChoice {
    fn from(packing: PackingConfig) -> Self {
        packing.0
    }
}

/// Builds a configuration with a closure over its builder.
///
/// ```
/// use bitnet_quant::{QuantizationPrecision, create_custom_enhanced_config};
/// let config = create_custom_enhanced_config(|b| b.precision(QuantizationPrecision::TwoBit).real_time_monitoring(true))?;
/// assert_eq!(config.default.precision(), Some(bitnet_core::Precision::Int2));
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
///
/// # Errors
/// As [`QuantizationConfigBuilder::build`].
pub fn create_custom_enhanced_config(
    build: impl FnOnce(QuantizationConfigBuilder) -> QuantizationConfigBuilder,
) -> Result<QuantizationConfig> {
    Ok(build(QuantizationConfigBuilder::new()).build()?)
}

/// Parameters of binary weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OneBitParams {
    /// The two levels.
    pub threshold_method: BinarySplit,
    /// Stochastic weights from this seed; needs [`BinarySplit::Zero`].
    pub stochastic_seed: Option<u64>,
}

/// Parameters of ternary weights.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct OneFiveEightBitParams {
    /// The rule; `None` for absmean, or optimal with several planes.
    pub threshold_method: Option<Threshold>,
    /// How the scale is computed.
    pub scale: ScaleRule,
    /// Trit planes; `None` for one.
    pub planes: Option<usize>,
}

/// Parameters of integers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MultiBitParams {
    /// Symmetric or with zero points.
    pub mapping: Mapping,
    /// How the range is clipped.
    pub clip: Clip,
}

/// Parameters for each precision; only those of the configured precision apply.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SchemeParameters {
    /// For binary.
    pub one_bit: OneBitParams,
    /// For ternary.
    pub one_five_eight_bit: OneFiveEightBitParams,
    /// For 2, 3, 4 and 8 bits.
    pub multi_bit: MultiBitParams,
}

/// Instruction set, threads and packing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptimizationConfig {
    /// Whether to use the widest instruction set, or scalar code.
    pub enable_simd: bool,
    /// Whether to use all cores, or one thread.
    pub parallel_processing: bool,
    /// How much work packing may do.
    pub memory_optimization_level: OptimizationLevel,
}

impl Default for OptimizationConfig {
    fn default() -> Self {
        Self {
            enable_simd: true,
            parallel_processing: true,
            memory_optimization_level: OptimizationLevel::Basic,
        }
    }
}

/// A configuration as one literal; it converts into [`QuantizationConfig`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct QuantizationSchemeConfig {
    /// The base configuration; its precision decides which parameters apply.
    pub base: QuantizationConfig,
    /// Parameters for each precision.
    pub scheme_params: SchemeParameters,
    /// For ternary weights, whether to use the adaptive threshold instead of that of
    /// `scheme_params`.
    pub adaptive_threshold: bool,
    /// Instruction set, threads and packing.
    pub optimization: OptimizationConfig,
}

impl TryFrom<QuantizationSchemeConfig> for QuantizationConfig {
    type Error = Error;
    fn try_from(literal: QuantizationSchemeConfig) -> Result<Self> {
        let params = literal.scheme_params;
        let builder = QuantizationConfigBuilder::new().base(literal.base);
        let precision = builder.weight_precision();
        let choices = match precision {
            Precision::Binary => Choices {
                split: Some(params.one_bit.threshold_method),
                seed: params.one_bit.stochastic_seed,
                ..Choices::default()
            },
            Precision::Ternary => {
                let p = params.one_five_eight_bit;
                let threshold = if literal.adaptive_threshold {
                    Some(Threshold::Adaptive)
                } else {
                    p.threshold_method
                };
                Choices {
                    threshold,
                    scale: Some(p.scale),
                    planes: p.planes,
                    ..Choices::default()
                }
            }
            _ => Choices {
                mapping: Some(params.multi_bit.mapping),
                clip: Some(params.multi_bit.clip),
                ..Choices::default()
            },
        };
        let how = literal.optimization;
        Ok(builder
            .choices(choices)
            .enable_simd(how.enable_simd)
            .threads(if how.parallel_processing { 0 } else { 1 })
            .optimization_level(how.memory_optimization_level)
            .build()?)
    }
}
