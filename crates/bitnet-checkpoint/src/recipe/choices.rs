//! The target of one tensor, and the choices that define it.

use crate::{Error, Result};
use bitnet_core::pack;
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, Method, Rounding, ScaleRule, Threshold};
use bitnet_core::{Granularity, Precision, ScaleDtype, ScaleForm, Scheme, as_string};
use bitnet_formats::output::AUTO;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The target of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// It stays as it is.
    Keep,
    /// Floats of this type.
    Float(ScaleDtype),
    /// Low-bit values.
    Quantized(Precision),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => f.pad("keep"),
            Self::Float(dtype) => f.pad(dtype.name()),
            Self::Quantized(precision) => f.pad(precision.name()),
        }
    }
}

impl FromStr for Target {
    type Err = bitnet_core::Error;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if s == "keep" {
            return Ok(Self::Keep);
        }
        s.parse()
            .map(Self::Quantized)
            .or_else(|_| s.parse().map(Self::Float))
            .map_err(|_: bitnet_core::Error| bitnet_core::Error::UnknownName {
                what: "precision",
                got: s.into(),
                expected: Precision::ALL
                    .iter()
                    .map(|precision| precision.name())
                    .chain(ScaleDtype::ALL.iter().map(|dtype| dtype.name()))
                    .chain(["keep"])
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }
}

as_string!(Target);

/// Choices for one tensor. Absent fields are inherited; the last defaults are those of precision
/// and format.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choices {
    /// Target of the tensor. Default: ternary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<Target>,
    /// Ternary threshold rule. Default: absmean, or optimal for several planes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<Threshold>,
    /// Where a ternary scale comes from. Default: the threshold rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<ScaleRule>,
    /// Number of trit planes. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub planes: Option<usize>,
    /// Levels of binary weights. Default: zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<BinarySplit>,
    /// Seed of stochastic binary weights. Default: deterministic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Symmetric or asymmetric integers. Default: symmetric.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mapping: Option<Mapping>,
    /// Range of integers. Default: none, i.e. all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<Clip>,
    /// Granularity of the scales. Default: channel; the block of a GGUF type; tensor for
    /// hf-bitnet; group:64 for mlx.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity: Option<Granularity>,
    /// How scales are stored. Default: f32; f16 in GGUF; the model's type for hf-bitnet and
    /// mlx.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_dtype: Option<ScaleDtype>,
    /// Rounding of ties. Default: half-even.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<Rounding>,
    /// Wire layout, or `auto` for the smallest. Default: the plain layout of the precision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
}

macro_rules! inherit {
    ($self:ident, $base:ident, $($field:ident),+) => {
        Choices { $($field: $self.$field.clone().or_else(|| $base.$field.clone())),+ }
    };
}

impl Choices {
    /// These choices, with absent fields from `base`.
    ///
    /// A precision other than that of `base` drops the choices that belong to the precision of
    /// `base`.
    pub fn over(&self, base: &Self) -> Self {
        let mut base = base.clone();
        if let Some(target) = self.precision
            && base
                .precision
                .unwrap_or(Target::Quantized(Precision::Ternary))
                != target
        {
            base = Self {
                threshold: None,
                scale: None,
                planes: None,
                split: None,
                seed: None,
                mapping: None,
                clip: None,
                layout: None,
                ..base
            };
        }
        inherit!(
            self,
            base,
            precision,
            threshold,
            scale,
            planes,
            split,
            seed,
            mapping,
            clip,
            granularity,
            scale_dtype,
            rounding,
            layout
        )
    }

    /// The precision chosen, ternary by default.
    pub fn target(&self) -> Target {
        self.precision
            .unwrap_or(Target::Quantized(Precision::Ternary))
    }

    /// The precision, if the target is quantized.
    pub fn precision(&self) -> Option<Precision> {
        match self.target() {
            Target::Quantized(precision) => Some(precision),
            Target::Keep | Target::Float(_) => None,
        }
    }

    /// Names of the set choices that belong to another precision.
    fn inapplicable(&self) -> impl Iterator<Item = &'static str> {
        let precision = self.precision();
        let ternary = precision == Some(Precision::Ternary);
        let binary = precision == Some(Precision::Binary);
        let int = precision.is_some() && !ternary && !binary;
        let choices = [
            (ternary, "threshold", self.threshold.is_some()),
            (ternary, "scale", self.scale.is_some()),
            (ternary, "planes", self.planes.is_some()),
            (binary, "split", self.split.is_some()),
            (binary, "seed", self.seed.is_some()),
            (int, "mapping", self.mapping.is_some()),
            (int, "clip", self.clip.is_some()),
            (precision.is_some(), "layout", self.layout.is_some()),
        ];
        choices
            .into_iter()
            .filter(|&(applies, _, set)| set && !applies)
            .map(|(_, name, _)| name)
    }

    /// Each wrong choice with what is wrong; `at` is where these choices stand.
    pub(crate) fn problems(&self, at: &str, wrong: &mut Vec<String>) {
        let before = wrong.len();
        wrong.extend(
            self.inapplicable()
                .map(|name| format!("{at}.{name}: does not apply to precision {}", self.target())),
        );
        if self.granularity == Some(Granularity::Group(0)) {
            wrong.push(format!(
                "{at}.granularity: expected a group of at least 1 column, got 0"
            ));
        }
        if let Some(planes) = self.planes.filter(|n| !(1..=3).contains(n)) {
            wrong.push(format!("{at}.planes: expected 1 to 3, got {planes}"));
        }
        let positive = |name, x: f32, wrong: &mut Vec<String>| {
            if !(x.is_finite() && x > 0.0) {
                wrong.push(format!("{at}.{name}: expected a positive number, got {x}"));
            }
        };
        if let Some(Threshold::Factor(x)) = self.threshold {
            positive("threshold", x, wrong);
        }
        if let Some(Clip::Rms(x)) = self.clip {
            positive("clip", x, wrong);
        }
        if let Some(Err(error)) = self
            .layout
            .as_deref()
            .filter(|&name| name != bitnet_formats::output::AUTO)
            .map(bitnet_core::pack::by_name)
        {
            wrong.push(format!("{at}.layout: {error}"));
        }
        // Combinations remain: several planes with another threshold, stochastic with another
        // split.
        if wrong.len() == before
            && let Err(error) = self.scheme(
                self.granularity.unwrap_or(Granularity::Channel),
                ScaleDtype::F32,
                ScaleForm::Direct,
            )
        {
            wrong.push(format!("{at}: {error}"));
        }
    }

    /// The scheme outside any container: one scale for each channel and f32 scales unless chosen.
    ///
    /// # Errors
    /// As [`Choices::scheme`].
    pub fn plain_scheme(&self) -> Result<Option<Scheme>> {
        let granularity = self.granularity.unwrap_or(Granularity::Channel);
        self.scheme(
            granularity,
            self.scale_dtype.unwrap_or(ScaleDtype::F32),
            ScaleForm::Direct,
        )
    }

    /// The scheme, if the target is quantized.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a choice that belongs to another precision; what [`Scheme::spec`]
    /// refuses.
    pub fn scheme(
        &self,
        granularity: Granularity,
        scale_dtype: ScaleDtype,
        scale_form: ScaleForm,
    ) -> Result<Option<Scheme>> {
        if let Some(name) = self.inapplicable().next() {
            return Err(Error::Recipe(format!(
                "{name} does not apply to precision {}",
                self.target()
            )));
        }
        let Target::Quantized(precision) = self.target() else {
            return Ok(None);
        };
        let method = match precision {
            Precision::Ternary => {
                let planes = self.planes.unwrap_or(1);
                let default = if planes > 1 {
                    Threshold::Optimal
                } else {
                    Threshold::Absmean
                };
                Method::Ternary {
                    threshold: self.threshold.unwrap_or(default),
                    scale: self.scale.unwrap_or_default(),
                    planes,
                }
            }
            Precision::Binary => Method::Binary {
                split: self.split.unwrap_or_default(),
                stochastic: self.seed,
            },
            int => Method::Int {
                bits: int.code_bits(),
                mapping: self.mapping.unwrap_or_default(),
                clip: self.clip.unwrap_or_default(),
            },
        };
        let scheme = Scheme {
            granularity,
            scale_dtype,
            scale_form,
            rounding: self.rounding.unwrap_or_default(),
            ..Scheme::new(method)
        };
        scheme.spec(1, 1)?;
        Ok(Some(scheme))
    }
}

/// Which wire layout packs the values, where the recipe does not name one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayoutChoice {
    /// One byte for each value.
    Bytes,
    /// The plain layout of the precision, with a fixed number of bits.
    Plain,
    /// The smallest of all layouts, found by trying them.
    Smallest,
}

impl LayoutChoice {
    /// The name of the layout for values of this precision.
    pub fn name(self, precision: Precision) -> &'static str {
        match self {
            Self::Bytes => pack::plain(Precision::Int8).name(),
            Self::Plain => pack::plain(precision).name(),
            Self::Smallest => AUTO,
        }
    }
}

impl From<Scheme> for Choices {
    fn from(scheme: Scheme) -> Self {
        let precision = scheme.precision().ok().map(Target::Quantized);
        let storage = Self {
            precision,
            granularity: Some(scheme.granularity),
            scale_dtype: Some(scheme.scale_dtype),
            rounding: Some(scheme.rounding),
            ..Self::default()
        };
        match scheme.method {
            Method::Ternary {
                threshold,
                scale,
                planes,
            } => Self {
                threshold: Some(threshold),
                scale: Some(scale),
                planes: Some(planes),
                ..storage
            },
            Method::Binary { split, stochastic } => Self {
                split: Some(split),
                seed: stochastic,
                ..storage
            },
            Method::Int { mapping, clip, .. } => Self {
                mapping: Some(mapping),
                clip: Some(clip),
                ..storage
            },
        }
    }
}
