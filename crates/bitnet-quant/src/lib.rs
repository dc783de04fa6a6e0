//! Ternary and low-bit quantization on candle tensors: quantizers, layers that train and run
//! packed, and whole checkpoints.
//!
//! | start with | for |
//! |---|---|
//! | [`tensor`], [`BitLinear`], [`quantize_tensor`] | tensors and layers |
//! | [`qat`], [`QATTrainer`] | quantization-aware training |
//! | [`spec`] | the names of the specification: presets, builders, precision control |
//! | [`checkpoint`], [`Job`], [`Recipe`] | whole models; re-exported from `bitnet-checkpoint` |
//!
//! Features: `tensor` (layers and quantizers on candle), `calibration`, `advanced` (mixed
//! precision), `qat` (training).
#![forbid(unsafe_code)]

mod error;

#[cfg(feature = "qat")]
pub mod qat;
pub mod spec;
#[cfg(feature = "tensor")]
pub mod tensor;

#[cfg(feature = "calibration")]
pub use bitnet_checkpoint::calibration;
#[cfg(feature = "advanced")]
pub use bitnet_checkpoint::search;
pub use bitnet_checkpoint::{
    Error as CheckpointError, Format, GENERATOR, Job, Recipe, Source, compare, inspect,
    job as checkpoint, recipe,
    recipe::{Activations, Compute, Machine, PrecisionControlConfig, Search},
    verify,
};
pub use error::{Error, Result};
pub use spec::{
    BinaryThresholdMethod, ConfigurationPreset, MultiBitParams, OneBitParams,
    OneFiveEightBitParams, OptimizationConfig, OptimizationLevel, PackingConfig,
    PrecisionAdjustment, PrecisionController, QuantizationConfig, QuantizationConfigBuilder,
    QuantizationPrecision, QuantizationScheme, QuantizationSchemeConfig, QuantizationStats,
    QuantizationStrategy, SchemeParameters, TernaryMethod, TernaryPacker,
    WeightQuantizationConfigBuilder, create_custom_enhanced_config,
};

#[cfg(feature = "qat")]
pub use qat::{QATConfig, QATTrainer, StraightThroughEstimator};
#[cfg(all(feature = "tensor", feature = "advanced"))]
pub use spec::mixed::{
    LayerQuantization, MixedPrecisionQuantizationConfig, MixedPrecisionQuantizer,
    PrecisionAdjustmentParams, create_mixed_precision_quantizer,
};
#[cfg(feature = "tensor")]
pub use tensor::{
    bitlinear::{BitLinear, BitLinearConfig, BitLinearConfigBuilder, Speedup, SubNorm},
    quantizer::{
        BitNetQuantizer, ConfigurableQuantizationScheme, QuantizationSchemeFactory,
        QuantizedTensor, Quantizer, QuantizerFactory, StreamingQuantizer, WeightQuantizer,
        absmax_quantize_activations, absmean_quantize_weights, create_precision_controller,
        quantize_activations, quantize_tensor, sign_quantize_activations,
    },
    runtime::Runtime,
};

/// Everything that code on candle tensors needs: `use bitnet_quant::prelude::*`.
#[cfg(feature = "tensor")]
pub mod prelude {
    #[cfg(feature = "calibration")]
    pub use crate::calibration::{Calibration, Observer};
    #[cfg(feature = "calibration")]
    pub use crate::tensor::observe::Observed;
    pub use crate::{
        Activations, BinaryThresholdMethod, BitLinear, BitLinearConfig, BitNetQuantizer,
        ConfigurableQuantizationScheme, ConfigurationPreset, MultiBitParams, OneBitParams,
        OneFiveEightBitParams, OptimizationConfig, OptimizationLevel, PackingConfig,
        PrecisionControlConfig, PrecisionController, QuantizationConfig, QuantizationConfigBuilder,
        QuantizationPrecision, QuantizationScheme, QuantizationSchemeConfig,
        QuantizationSchemeFactory, QuantizationStats, QuantizationStrategy, QuantizedTensor,
        Quantizer, QuantizerFactory, SchemeParameters, Search, StreamingQuantizer, SubNorm,
        TernaryMethod, TernaryPacker, WeightQuantizationConfigBuilder, WeightQuantizer,
        absmax_quantize_activations, absmean_quantize_weights, create_custom_enhanced_config,
        create_precision_controller, sign_quantize_activations,
    };
    #[cfg(feature = "advanced")]
    pub use crate::{
        LayerQuantization, MixedPrecisionQuantizationConfig, MixedPrecisionQuantizer,
        PrecisionAdjustmentParams, create_mixed_precision_quantizer,
    };
    pub use bitnet_core::{Granularity, Precision, ScaleDtype, Scheme};
}

/// The examples of the README compile and hold.
#[cfg(all(doctest, feature = "tensor"))]
#[doc = include_str!("../../../README.md")]
struct Readme;
