//! The configuration under the names of a library: sections of [`Recipe`] beside its tensors,
//! builder, validation and presets.

use crate::control::PrecisionControlConfig;
use crate::recipe::{Choices, Recipe, Rule, Target, VERSION, compile};
use crate::{Error, Result};
use bitnet_core::activation::ActivationMethod;
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, ScaleRule, Threshold};
use bitnet_core::{Granularity, Precision, ScaleDtype, named};
use bitnet_formats::output::AUTO;
use bitnet_kernels::{Isa, Kernels};
use serde::{Deserialize, Serialize};

/// The library's name for [`Recipe`]: one serialisable, versioned type for the library, the command
/// line and files.
pub type QuantizationConfig = Recipe;

/// What a layer's input becomes, one scale for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// It stays float: weight-only, W1.58A16.
    Float,
    /// 8 bits by absmax, as in b1.58.
    #[default]
    Int8,
    /// 4 bits by absmax.
    Int4,
    /// Signs times their mean magnitude.
    Sign,
}

impl Activations {
    /// The quantizer; `None` for floats.
    pub const fn method(self) -> Option<ActivationMethod> {
        match self {
            Self::Float => None,
            Self::Int8 => Some(ActivationMethod::Int8),
            Self::Int4 => Some(ActivationMethod::Int4),
            Self::Sign => Some(ActivationMethod::Sign),
        }
    }
}

/// What a mixed-precision search is to reach. At least one of the two.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Search {
    /// Most bits per weight over the quantized tensors together, scales and padding included. The
    /// summed error is then the least possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_bpw: Option<f64>,
    /// Least SQNR of each tensor in dB. Without a budget the size is then the least possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_sqnr: Option<f64>,
}

/// Threads and instruction set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Compute {
    /// Threads; 0 for one on each core.
    pub threads: usize,
    /// Instruction set by name: scalar, avx2, avxvnni, avx512. Default: `BITNET_ISA`, or the widest
    /// there is.
    pub isa: Option<String>,
}

/// What a configuration comes to on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Threads that will work.
    pub threads: usize,
    /// The loops that will run.
    pub kernels: Kernels,
    /// Bytes of memory that are free, where the system says so.
    pub memory: Option<u64>,
}

impl Compute {
    /// Adapts to the machine.
    ///
    /// ```
    /// let machine = bitnet_quant::Compute::default().machine()?;
    /// assert!(machine.threads >= 1);
    /// println!("{machine:?}");
    /// # Ok::<(), bitnet_quant::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Kernels`] for an instruction set that does not exist or that this machine does not
    /// run.
    pub fn machine(&self) -> Result<Machine> {
        let kernels = match &self.isa {
            None => Kernels::from_env()?,
            Some(name) => {
                let isa: Isa = name.parse()?;
                Kernels::new(isa).ok_or(bitnet_kernels::Error::Unavailable { isa })?
            }
        };
        let threads = if self.threads > 0 {
            self.threads
        } else {
            std::thread::available_parallelism().map_or(1, |n| n.get())
        };
        Ok(Machine {
            threads,
            kernels,
            memory: free_memory(),
        })
    }
}

/// `MemAvailable` of Linux.
fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?
        .trim()
        .strip_suffix(" kB")?
        .parse::<u64>()
        .ok()?;
    Some(kib * 1024)
}

impl Recipe {
    /// A builder that begins with the default: ternary absmean, one scale for each channel.
    ///
    /// ```
    /// use bitnet_quant::{Activations, QuantizationConfig, TernaryMethod};
    /// let config = QuantizationConfig::builder()
    ///     .ternary_method(TernaryMethod::OptimalThreshold)
    ///     .group_size(128)
    ///     .activations(Activations::Int8)
    ///     .build()?;
    /// assert_eq!(QuantizationConfig::from_toml(&config.to_toml()?)?, config);
    ///
    /// let error = QuantizationConfig::builder().planes(7).group_size(0).build().unwrap_err().to_string();
    /// assert!(error.contains("default.planes") && error.contains("default.granularity")); // both at once
    /// # Ok::<(), bitnet_quant::Error>(())
    /// ```
    pub fn builder() -> QuantizationConfigBuilder {
        QuantizationConfigBuilder::new()
    }

    /// The default with another precision.
    pub fn new(precision: impl Into<Precision>) -> Self {
        let mut config = Self::default();
        config.default.precision = Some(Target::Quantized(precision.into()));
        config
    }

    /// b1.58: ternary absmean with one scale for the tensor, int8 activations.
    pub fn bitnet_158() -> Self {
        ConfigurationPreset::BitNetOptimized.config()
    }

    /// This configuration as TOML.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a number that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Recipe(e.to_string()))
    }

    /// This configuration as JSON.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a number that JSON cannot hold.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| Error::Recipe(e.to_string()))
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming each wrong field.
    pub fn validate(&self) -> Result<()> {
        let mut wrong = vec![];
        if self.version != VERSION {
            wrong.push(format!("version: expected {VERSION}, got {}", self.version));
        }
        self.default.problems("default", &mut wrong);
        let standard = |glob: &String| {
            glob == "*.weight" || crate::recipe::DEFAULT_EXCLUDE.contains(&glob.as_str())
        };
        for (list, globs) in [("include", &self.include), ("exclude", &self.exclude)] {
            let bad = globs
                .iter()
                .filter(|g| !standard(g))
                .filter_map(|g| compile(g).err());
            wrong.extend(bad.map(|e| format!("{list}: {e}")));
        }
        for (i, rule) in self.rules.iter().enumerate() {
            wrong.extend(
                compile(&rule.glob)
                    .err()
                    .map(|e| format!("rule[{i}].match: {e}")),
            );
            rule.choices
                .over(&self.default)
                .problems(&format!("rule[{i}]"), &mut wrong);
        }
        if let Some(search) = &self.search {
            search.problems(&self.default, &mut wrong);
        }
        if let Some(control) = &self.control {
            control.problems(&mut wrong);
        }
        wrong.extend(
            self.compute
                .machine_check()
                .err()
                .map(|e| format!("compute.isa: {e}")),
        );
        if self.compute.threads > crate::checkpoint::MAX_THREADS {
            wrong.push(format!(
                "compute.threads: expected at most {}, got {}",
                crate::checkpoint::MAX_THREADS,
                self.compute.threads
            ));
        }
        Error::unless_empty(wrong)
    }
}

impl Compute {
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn machine_check(&self) -> Result<()> {
        let Some(name) = &self.isa else { return Ok(()) };
        let isa: Isa = name.parse()?;
        if isa.is_available() {
            Ok(())
        } else {
            Err(bitnet_kernels::Error::Unavailable { isa }.into())
        }
    }
}

impl Search {
    pub(crate) fn problems(&self, default: &Choices, wrong: &mut Vec<String>) {
        if self.target_bpw.is_none() && self.min_sqnr.is_none() {
            wrong.push("search: expected target_bpw or min_sqnr, got neither".into());
        }
        if let Some(bits) = self.target_bpw.filter(|b| !(b.is_finite() && *b > 0.0)) {
            wrong.push(format!(
                "search.target_bpw: expected a positive number, got {bits}"
            ));
        }
        if let Some(db) = self.min_sqnr.filter(|db| !db.is_finite()) {
            wrong.push(format!("search.min_sqnr: expected a number, got {db}"));
        }
        let chosen = [
            ("precision", default.precision.is_some()),
            ("threshold", default.threshold.is_some()),
            ("scale", default.scale.is_some()),
            ("planes", default.planes.is_some()),
            ("split", default.split.is_some()),
            ("seed", default.seed.is_some()),
            ("mapping", default.mapping.is_some()),
            ("clip", default.clip.is_some()),
            ("layout", default.layout.is_some()),
        ];
        wrong.extend(
            chosen
                .iter()
                .filter(|c| c.1)
                .map(|(name, _)| format!("default.{name}: the search chooses it; leave it out")),
        );
    }
}

/// Settings for a purpose. Each says in [`ConfigurationPreset::summary`] what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigurationPreset {
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
}

impl ConfigurationPreset {
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
        }
    }

    /// The configuration.
    ///
    /// # Errors
    /// None; a builder's `build` may fail, and this one is used in its place.
    ///
    /// ```
    /// use bitnet_quant::ConfigurationPreset;
    /// let config = ConfigurationPreset::AccuracyOptimized.build()?;
    /// assert_eq!(config.default.granularity, Some(bitnet_core::Granularity::Group(32)));
    /// # Ok::<(), bitnet_quant::Error>(())
    /// ```
    pub fn build(self) -> Result<QuantizationConfig> {
        Ok(self.config())
    }

    fn config(self) -> QuantizationConfig {
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
                let layout = Some("two-bit".into());
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
        };
        QuantizationConfig {
            default,
            activations: Some(activations),
            control: Some(control),
            ..QuantizationConfig::default()
        }
    }
}

named!(ConfigurationPreset, "preset", {
    BitNetOptimized = "bitnet",
    PerformanceOptimized = "performance",
    AccuracyOptimized = "accuracy",
    MemoryOptimized = "memory",
    Balanced = "balanced",
});

/// Builds a [`QuantizationConfig`]. A setter replaces what an earlier one said; two setters that
/// contradict each other are an error of [`build`](Self::build).
#[derive(Debug, Clone, Default)]
pub struct QuantizationConfigBuilder {
    config: QuantizationConfig,
    method: Option<Threshold>,
    factor: Option<f32>,
}

impl QuantizationConfigBuilder {
    /// The default configuration.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins anew from a configuration.
    pub fn base(self, config: QuantizationConfig) -> Self {
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

    /// These choices over those so far.
    pub fn choices(mut self, choices: Choices) -> Self {
        self.config.default = choices.over(&self.config.default);
        self
    }

    /// The precision so far.
    pub(crate) fn weight_precision(&self) -> Precision {
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

    /// Symmetric integers, or such with zero points.
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

    /// What one scale covers.
    pub fn granularity(self, granularity: Granularity) -> Self {
        self.set(|c| c.granularity = Some(granularity))
    }

    /// One scale for so many columns of a row.
    pub fn group_size(self, columns: usize) -> Self {
        self.granularity(Granularity::Group(columns))
    }

    /// How scales are stored.
    pub fn scale_dtype(self, dtype: ScaleDtype) -> Self {
        self.set(|c| c.scale_dtype = Some(dtype))
    }

    /// Integers saturate beyond so many root mean squares of their granule.
    pub fn clip_threshold(self, rms: f32) -> Self {
        self.clip(Clip::Rms(rms))
    }

    /// How much of the range of integers is kept.
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

    /// How a layer's input is quantized when it runs.
    pub fn activations(mut self, activations: Activations) -> Self {
        self.config.activations = Some(activations);
        self
    }

    /// Other choices for the layers that a glob matches; the first that matches counts.
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

    /// Whether precision control remembers its latest observations.
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
    /// [`Error::Invalid`] naming each wrong field, and setters that contradict each other.
    pub fn build(self) -> Result<QuantizationConfig> {
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
        let builder = QuantizationConfig::builder()
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

    #[test]
    fn presets_are_valid_distinct_and_survive_toml_and_json() {
        let all = ConfigurationPreset::ALL
            .iter()
            .map(|p| p.build().unwrap())
            .collect::<Vec<_>>();
        for (i, config) in all.iter().enumerate() {
            config.validate().unwrap();
            assert_eq!(
                &Recipe::from_toml(&config.to_toml().unwrap()).unwrap(),
                config
            );
            assert_eq!(
                &Recipe::from_json(&config.to_json().unwrap()).unwrap(),
                config
            );
            assert!(
                all[i + 1..]
                    .iter()
                    .all(|other| other.default != config.default)
            );
            assert_eq!(
                ConfigurationPreset::ALL[i]
                    .name()
                    .parse::<ConfigurationPreset>()
                    .unwrap(),
                ConfigurationPreset::ALL[i]
            );
        }
    }

    #[test]
    fn a_newer_version_and_an_unknown_field_are_refused() {
        assert!(
            Recipe::from_json(r#"{"version": 2}"#)
                .unwrap_err()
                .to_string()
                .contains("version 2, expected 1")
        );
        assert!(
            Recipe::from_json(r#"{"control": {"min_sqnr": 2}}"#)
                .unwrap_err()
                .to_string()
                .contains("min_sqnr")
        );
        assert!(
            Recipe::from_toml("[compute]\nthread = 2")
                .unwrap_err()
                .to_string()
                .contains("thread")
        );
        assert!(
            QuantizationConfig {
                version: 2,
                ..Recipe::default()
            }
            .validate()
            .unwrap_err()
            .to_string()
            .contains("version")
        );
    }
}
