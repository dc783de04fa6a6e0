//! Recipes for a purpose.

use super::{Activations, Choices, PrecisionControlConfig, Recipe, Target};
use crate::Result;
use bitnet_core::pack;
use bitnet_core::scheme::{Clip, Mapping, Threshold};
use bitnet_core::{Granularity, Precision, ScaleDtype, named};
use bitnet_formats::output::AUTO;

/// Settings for a purpose. Each says in [`Preset::summary`] what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// The published b1.58.
    BitNetOptimized,
    /// Quick to quantize and to run.
    PerformanceOptimized,
    /// Little error.
    AccuracyOptimized,
    /// Few bytes.
    MemoryOptimized,
    /// Between accuracy and memory.
    Balanced,
    /// What the ternary Bonsai models are: every matrix ternary, embedding and head included.
    Bonsai,
}

/// Weights that stay floats where every matrix is ternary: norms, tables of positions, routers.
const BONSAI_EXCLUDE: &[&str] = &[
    "*norm*",
    "*Norm*",
    "*.wpe.*",
    "*.gate.weight",
    "*ffn_gate_inp*",
];

impl Preset {
    /// What it consists of, for people.
    pub const fn summary(self) -> &'static str {
        match self {
            Self::BitNetOptimized => {
                "ternary absmean, one scale for the tensor, int8 activations: what models trained as b1.58 expect"
            }
            Self::PerformanceOptimized => {
                "ternary by mean (one pass), one scale for each channel, two bits in place, int8 activations"
            }
            Self::AccuracyOptimized => {
                "int4 asymmetric with clip search, groups of 32 with f16 scales, int8 activations; strict control"
            }
            Self::MemoryOptimized => {
                "ternary optimal, groups of 256 with f16 scales, the smallest layout, int4 activations; lax control"
            }
            Self::Balanced => "two trit planes, groups of 128 with f16 scales, int8 activations",
            Self::Bonsai => {
                "every matrix ternary by absmean, embedding and head too, groups of 128 with f16 scales, int8 activations; in a GGUF Q2_0, which llama.cpp opens"
            }
        }
    }

    /// The configuration.
    ///
    /// # Errors
    /// None; a builder's `build` may fail, and this one is used in its place.
    ///
    /// ```
    /// use bitnet_checkpoint::recipe::Preset;
    /// let config = Preset::AccuracyOptimized.build()?;
    /// assert_eq!(config.default.granularity, Some(bitnet_core::Granularity::Group(32)));
    /// # Ok::<(), bitnet_checkpoint::Error>(())
    /// ```
    pub fn build(self) -> Result<Recipe> {
        Ok(self.config())
    }

    fn config(self) -> Recipe {
        let quantized = |precision| Choices {
            precision: Some(Target::Quantized(precision)),
            ..Choices::default()
        };
        let grouped = |g, choices| Choices {
            granularity: Some(Granularity::Group(g)),
            scale_dtype: Some(ScaleDtype::F16),
            ..choices
        };
        let ternary = |threshold| Choices {
            threshold: Some(threshold),
            ..quantized(Precision::Ternary)
        };
        let (default, activations, control) = match self {
            Self::BitNetOptimized => {
                let choices = Choices {
                    granularity: Some(Granularity::Tensor),
                    ..ternary(Threshold::Absmean)
                };
                (
                    choices,
                    Activations::Int8,
                    PrecisionControlConfig::balanced(),
                )
            }
            Self::PerformanceOptimized => {
                let layout = Some(pack::plain(Precision::Ternary).name().into());
                let choices = Choices {
                    granularity: Some(Granularity::Channel),
                    layout,
                    ..ternary(Threshold::Mean)
                };
                (
                    choices,
                    Activations::Int8,
                    PrecisionControlConfig::balanced(),
                )
            }
            Self::AccuracyOptimized => {
                let int4 = Choices {
                    mapping: Some(Mapping::Asymmetric),
                    clip: Some(Clip::Search),
                    ..quantized(Precision::Int4)
                };
                (
                    grouped(32, int4),
                    Activations::Int8,
                    PrecisionControlConfig::conservative(),
                )
            }
            Self::MemoryOptimized => {
                let choices = Choices {
                    layout: Some(AUTO.into()),
                    ..ternary(Threshold::Optimal)
                };
                (
                    grouped(256, choices),
                    Activations::Int4,
                    PrecisionControlConfig::aggressive(),
                )
            }
            Self::Balanced => {
                let planes = Choices {
                    planes: Some(2),
                    ..quantized(Precision::Ternary)
                };
                (
                    grouped(128, planes),
                    Activations::Int8,
                    PrecisionControlConfig::balanced(),
                )
            }
            // The rule that ternary models are trained with: scale and threshold are one mean, which
            // moves little from one step to the next. Codes of a trained model are the same by any
            // rule.
            Self::Bonsai => (
                grouped(128, ternary(Threshold::Absmean)),
                Activations::Int8,
                PrecisionControlConfig::balanced(),
            ),
        };
        let defaults = Recipe::default();
        let exclude = match self {
            Self::Bonsai => BONSAI_EXCLUDE.iter().map(|&glob| glob.into()).collect(),
            _ => defaults.exclude,
        };
        Recipe {
            exclude,
            default,
            activations: Some(activations),
            control: Some(control),
            ..defaults
        }
    }
}

named!(Preset, "preset", {
    BitNetOptimized = "bitnet",
    PerformanceOptimized = "performance",
    AccuracyOptimized = "accuracy",
    MemoryOptimized = "memory",
    Balanced = "balanced",
    Bonsai = "bonsai",
});

impl Recipe {
    /// b1.58: ternary absmean with one scale for the tensor, int8 activations.
    pub fn bitnet_158() -> Self {
        Preset::BitNetOptimized.config()
    }
}
