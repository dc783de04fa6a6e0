//! The builder of a [`Recipe`].

use super::{
    Activations, Choices, LayoutChoice, PrecisionControlConfig, Recipe, Rule, Search, Target,
};
use crate::{Error, Result};
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, ScaleRule, Threshold};
use bitnet_core::{Granularity, Precision, ScaleDtype, Scheme};
use bitnet_kernels::Isa;

impl Recipe {
    /// A builder that begins with the default: ternary absmean, one scale for each channel.
    ///
    /// ```
    /// use bitnet_checkpoint::recipe::{Activations, Recipe};
    /// use bitnet_core::scheme::Threshold;
    /// let config = Recipe::builder()
    ///     .ternary_method(Threshold::Optimal)
    ///     .group_size(128)
    ///     .activations(Activations::Int8)
    ///     .build()?;
    /// assert_eq!(Recipe::from_toml(&config.to_toml()?)?, config);
    ///
    /// let error = Recipe::builder().planes(7).group_size(0).build().unwrap_err().to_string();
    /// assert!(error.contains("default.planes") && error.contains("default.granularity")); // both at once
    /// # Ok::<(), bitnet_checkpoint::Error>(())
    /// ```
    pub fn builder() -> RecipeBuilder {
        RecipeBuilder::new()
    }
}

/// Builds a [`Recipe`]. A later setter overrides an earlier one; contradicting setters are an error
/// of [`build`](Self::build).
#[derive(Debug, Clone, Default)]
pub struct RecipeBuilder {
    config: Recipe,
    method: Option<Threshold>,
    factor: Option<f32>,
}

impl RecipeBuilder {
    /// The default configuration.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces everything set so far by a configuration.
    pub fn base(self, config: Recipe) -> Self {
        Self {
            config,
            method: None,
            factor: None,
        }
    }

    fn set(mut self, set: impl FnOnce(&mut Choices)) -> Self {
        set(&mut self.config.default);
        self
    }

    /// Overrides the choices set so far.
    pub fn choices(mut self, choices: Choices) -> Self {
        self.config.default = choices.over(&self.config.default);
        self
    }

    /// The precision set so far.
    pub fn weight_precision(&self) -> Precision {
        self.config
            .default
            .precision()
            .unwrap_or(Precision::Ternary)
    }

    /// Alphabet of the weights. Choices that belong to another alphabet are dropped.
    pub fn precision(self, precision: impl Into<Precision>) -> Self {
        self.choices(Choices {
            precision: Some(Target::Quantized(precision.into())),
            ..Choices::default()
        })
    }

    /// Symmetric integers, or integers with zero points.
    pub fn strategy(self, mapping: Mapping) -> Self {
        self.set(|c| c.mapping = Some(mapping))
    }

    /// One scale for each output channel, or one for the tensor.
    pub fn per_channel(self, channel: bool) -> Self {
        self.granularity(if channel {
            Granularity::Channel
        } else {
            Granularity::Tensor
        })
    }

    /// Granularity of the scales.
    pub fn granularity(self, granularity: Granularity) -> Self {
        self.set(|c| c.granularity = Some(granularity))
    }

    /// One scale for each group of `columns` neighbours along a row.
    pub fn group_size(self, columns: usize) -> Self {
        self.granularity(Granularity::Group(columns))
    }

    /// How scales are stored.
    pub fn scale_dtype(self, dtype: ScaleDtype) -> Self {
        self.set(|c| c.scale_dtype = Some(dtype))
    }

    /// Integers saturate beyond `rms` times the root mean square of their granule.
    pub fn clip_threshold(self, rms: f32) -> Self {
        self.clip(Clip::Rms(rms))
    }

    /// Clipping of the range of integers.
    pub fn clip(self, clip: Clip) -> Self {
        self.set(|c| c.clip = Some(clip))
    }

    /// The ternary rule.
    pub fn ternary_method(mut self, method: impl Into<Threshold>) -> Self {
        self.method = Some(method.into());
        self
    }

    /// The ternary rule `Δ = factor · mean|W|`.
    pub fn custom_threshold_factor(mut self, factor: f32) -> Self {
        self.factor = Some(factor);
        self
    }

    /// The ternary rule that follows the shape of the weights; `false` leaves the rule as it is.
    pub fn adaptive_thresholds(self, adaptive: bool) -> Self {
        if adaptive {
            self.ternary_method(Threshold::Adaptive)
        } else {
            self
        }
    }

    /// Where a ternary scale comes from.
    pub fn scale_rule(self, rule: ScaleRule) -> Self {
        self.set(|c| c.scale = Some(rule))
    }

    /// Trit planes, 1 to 3.
    pub fn planes(self, planes: usize) -> Self {
        self.set(|c| c.planes = Some(planes))
    }

    /// Where the two levels of binary weights are.
    pub fn binary_threshold(self, split: BinarySplit) -> Self {
        self.set(|c| c.split = Some(split))
    }

    /// Stochastic binary weights from this seed.
    pub fn stochastic(self, seed: u64) -> Self {
        self.set(|c| c.seed = Some(seed))
    }

    /// The wire layout of packed weights, or `auto`.
    pub fn layout(self, name: &str) -> Self {
        self.set(|c| c.layout = Some(name.into()))
    }

    /// The scheme as a whole, instead of its parts.
    pub fn scheme(self, scheme: impl Into<Scheme>) -> Self {
        self.choices(Choices::from(scheme.into()))
    }

    /// How the layout of packed weights is chosen. Set the precision first.
    pub fn packing(self, packing: impl Into<LayoutChoice>) -> Self {
        let layout = packing.into().name(self.weight_precision());
        self.layout(layout)
    }

    /// How much work packing may take. Set the precision first.
    pub fn optimization_level(self, level: impl Into<LayoutChoice>) -> Self {
        self.packing(level)
    }

    /// Quantization of a layer's input at run time.
    pub fn activations(mut self, activations: Activations) -> Self {
        self.config.activations = Some(activations);
        self
    }

    /// Choices for the layers that a glob matches; the first match applies.
    pub fn layer(mut self, glob: &str, choices: Choices) -> Self {
        self.config.rules.push(Rule {
            glob: glob.into(),
            choices,
        });
        self
    }

    /// The search that chooses precisions.
    pub fn search(mut self, search: Search) -> Self {
        self.config.search = Some(search);
        self
    }

    /// How the precision of a stream follows its quality.
    pub fn precision_control(mut self, control: PrecisionControlConfig) -> Self {
        self.config.control = Some(control);
        self
    }

    fn control(mut self, set: impl FnOnce(&mut PrecisionControlConfig)) -> Self {
        set(self.config.control.get_or_insert_default());
        self
    }

    /// Whether precision control may change the precision.
    pub fn auto_optimization(self, adjust: bool) -> Self {
        self.control(|c| c.adjust = adjust)
    }

    /// Whether precision control keeps a window of observations.
    pub fn real_time_monitoring(self, remember: bool) -> Self {
        self.control(|c| {
            c.window = if remember {
                PrecisionControlConfig::balanced().window
            } else {
                0
            }
        })
    }

    /// The widest instruction set, or the plain one.
    pub fn enable_simd(mut self, simd: bool) -> Self {
        self.config.compute.isa = (!simd).then(|| Isa::Scalar.to_string());
        self
    }

    /// Threads; 0 for one on each core.
    pub fn threads(mut self, threads: usize) -> Self {
        self.config.compute.threads = threads;
        self
    }

    /// The configuration, checked.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming each wrong field and each contradiction.
    pub fn build(self) -> Result<Recipe> {
        let Self {
            mut config,
            method,
            factor,
        } = self;
        if let Some(threshold) = method.or(factor.map(Threshold::Factor)) {
            config.default.threshold = Some(threshold);
        }
        let mut wrong = match config.validate() {
            Err(Error::Invalid(wrong)) => wrong,
            _ => vec![],
        };
        if let (Some(method), Some(factor)) = (method, factor) {
            wrong.push(format!(
                "custom_threshold_factor: {factor} contradicts ternary_method, got {method}"
            ));
        }
        Error::unless_empty(wrong)?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_field_is_named() {
        let control = PrecisionControlConfig {
            patience: 0,
            min_sqnr_db: 50.0,
            ..PrecisionControlConfig::balanced()
        };
        let builder = Recipe::builder()
            .group_size(0)
            .planes(9)
            .clip_threshold(-1.0)
            .layout("zip")
            .precision_control(control);
        let builder = builder
            .layer("[", Choices::default())
            .search(Search {
                target_bpw: Some(-1.0),
                min_sqnr: None,
            })
            .threads(1 << 20);
        let Err(Error::Invalid(wrong)) = builder.build() else {
            panic!("expected errors")
        };
        for field in [
            "default.granularity",
            "default.planes",
            "default.clip",
            "default.layout",
            "rule[0].match",
            "search.target_bpw",
            "control.patience",
            "control.max_sqnr_db",
            "compute.threads",
        ] {
            assert!(
                wrong.iter().any(|w| w.starts_with(field)),
                "{field} in {wrong:?}"
            );
        }
    }
}
