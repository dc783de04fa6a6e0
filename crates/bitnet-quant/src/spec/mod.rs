//! The names of the specification: schemes, builders, presets, precision control and mixed
//! precision. A name is an alias of the type behind it, or converts into it.

pub mod control;
#[cfg(all(feature = "tensor", feature = "advanced"))]
pub mod mixed;
mod names;

pub use control::{
    AdjustmentReason, PerformanceSummary, PrecisionAdjustment, PrecisionController,
    QuantizationStats,
};
pub use names::{
    BinaryThresholdMethod, ConfigurationPreset, MultiBitParams, OneBitParams,
    OneFiveEightBitParams, OptimizationConfig, OptimizationLevel, PackingConfig,
    QuantizationConfig, QuantizationConfigBuilder, QuantizationPrecision, QuantizationScheme,
    QuantizationSchemeConfig, QuantizationStrategy, SchemeParameters, TernaryMethod, TernaryPacker,
    WeightQuantizationConfigBuilder, create_custom_enhanced_config,
};
