//! Quantize, pack, prove and compare checkpoints.
//!
//! ```no_run
//! use bitnet_quant::{Job, Recipe, Source, checkpoint};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let source = Source::open("model-folder".as_ref())?;
//! let recipe = Recipe::from_toml("[default]\nthreshold = 'optimal'")?;
//! let out = std::path::Path::new("model-ternary");
//! let job = Job::quantize(&source, &recipe, out)?;
//! let summary = checkpoint::run(&job, out, &checkpoint::Options {
//!     threads: 0,
//!     kernels: bitnet_kernels::Kernels::detect(),
//!     progress: &(),
//!     interrupt: &Default::default(),
//!     existing: checkpoint::Existing::Refuse,
//! })?;
//! for tensor in &summary.tensors {
//!     println!("{} {} {:.3} bits", tensor.name, tensor.became, tensor.bits_per_weight());
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod error;
#[cfg(feature = "tensor")]
mod matrix;
mod names;
mod plan;
mod rows;

#[cfg(feature = "calibration")]
pub mod calibration;
pub mod checkpoint;
pub mod compare;
pub mod config;
pub mod control;
pub mod inspect;
#[cfg(feature = "qat")]
pub mod qat;
pub mod recipe;
#[cfg(feature = "advanced")]
pub mod search;
#[cfg(feature = "tensor")]
pub mod tensor;
pub mod verify;

pub use bitnet_formats::Source;
pub use config::{
    Activations, Compute, ConfigurationPreset, Machine, QuantizationConfig,
    QuantizationConfigBuilder, Search,
};
pub use control::{
    PrecisionAdjustment, PrecisionControlConfig, PrecisionController, QuantizationStats,
};
pub use error::{Error, Result};
pub use names::{
    BinaryThresholdMethod, MultiBitParams, OneBitParams, OneFiveEightBitParams, OptimizationConfig,
    OptimizationLevel, PackingConfig, QuantizationPrecision, QuantizationScheme,
    QuantizationSchemeConfig, QuantizationStrategy, SchemeParameters, TernaryMethod, TernaryPacker,
    WeightQuantizationConfigBuilder, create_custom_enhanced_config,
};
pub use plan::{GENERATOR, Job};
pub use recipe::{Format, Recipe};

#[cfg(feature = "qat")]
pub use qat::{QATConfig, QATTrainer, StraightThroughEstimator};
#[cfg(all(feature = "tensor", feature = "advanced"))]
pub use tensor::mixed::{
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
