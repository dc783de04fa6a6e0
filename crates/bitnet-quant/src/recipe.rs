//! Recipes: which tensors become what. The same type serves the command line, TOML and JSON files,
//! the metadata of the result, and the library, which calls it
//! [`QuantizationConfig`](crate::QuantizationConfig).

use crate::config::{Activations, Compute, Search};
use crate::control::PrecisionControlConfig;
use crate::{Error, Result};
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, Method, Rounding, ScaleRule, Threshold};
use bitnet_core::{Granularity, Precision, ScaleDtype, ScaleForm, Scheme, as_string, named};
use bitnet_formats::hf::LinearClass;
use bitnet_formats::{Content, Source, Tensor};
use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Version of the recipe format.
pub const VERSION: u32 = 1;

/// The container to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// safetensors with packed uint8 tensors and scales: one file, or a folder if the path has no
    /// ending.
    #[default]
    Safetensors,
    /// A folder that HF transformers and mlx-lm open: ternary, one scale for each tensor.
    HfBitnet,
    /// GGUF.
    Gguf,
}

named!(Format, "format", {
    Safetensors = "safetensors",
    HfBitnet = "hf-bitnet",
    Gguf = "gguf",
});

/// What a tensor becomes.
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

/// Choices for one tensor; what is absent is inherited, at last from the defaults of precision and
/// format.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choices {
    /// What the tensor becomes. Default: ternary.
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
    /// What one scale covers. Default: channel; the block of a GGUF type; tensor for hf-bitnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity: Option<Granularity>,
    /// How scales are stored. Default: f32; f16 in GGUF; the model's type for hf-bitnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_dtype: Option<ScaleDtype>,
    /// What happens at ties. Default: half-even.
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
    /// These choices over those of `base`.
    ///
    /// A choice of precision does not inherit the choices that belong to another precision.
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

    /// The choices made that belong to another precision.
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
        // What is left are combinations: several planes with another threshold, stochastic with
        // another split.
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

/// Choices for the tensors that a glob matches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rule {
    /// The glob. `*` matches any characters, `?` one.
    #[serde(rename = "match")]
    pub glob: String,
    /// The choices, over those of the recipe.
    #[serde(flatten)]
    pub choices: Choices,
}

impl FromStr for Rule {
    type Err = bitnet_core::Error;

    /// `GLOB=PRECISION`.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (glob, precision) =
            s.rsplit_once('=')
                .ok_or_else(|| bitnet_core::Error::UnknownName {
                    what: "rule",
                    got: s.into(),
                    expected: "GLOB=PRECISION".into(),
                })?;
        Ok(Self {
            glob: glob.into(),
            choices: Choices {
                precision: Some(precision.parse()?),
                ..Choices::default()
            },
        })
    }
}

impl<'de> Deserialize<'de> for Rule {
    /// By hand, because a flattened struct does not refuse unknown fields.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let mut fields = serde_json::Map::deserialize(deserializer)?;
        let glob = match fields.remove("match") {
            Some(serde_json::Value::String(glob)) => glob,
            other => {
                return Err(D::Error::custom(format!(
                    "a rule needs match = \"GLOB\", got {}",
                    other.unwrap_or_default()
                )));
            }
        };
        let choices =
            Choices::deserialize(serde_json::Value::Object(fields)).map_err(D::Error::custom)?;
        Ok(Self { glob, choices })
    }
}

/// What `bitnet quantize` does to a checkpoint.
///
/// ```
/// let recipe = bitnet_quant::Recipe::from_toml(r#"
///     format = "safetensors"
///
///     [default]
///     precision = "ternary"
///     threshold = "optimal"
///     granularity = "group:128"
///
///     [[rule]]
///     match = "*embed_tokens*"
///     precision = "int8"
/// "#)?;
/// assert_eq!(recipe.rules[0].glob, "*embed_tokens*");
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// [`VERSION`].
    pub version: u32,
    /// The container.
    pub format: Format,
    /// Scale convention of hf-bitnet. Default: bitlinear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linear_class: Option<LinearClass>,
    /// Weights to quantize, as globs.
    pub include: Vec<String>,
    /// Weights to keep, as globs, although `include` matches them.
    pub exclude: Vec<String>,
    /// Choices for every weight.
    pub default: Choices,
    /// Choices for some weights; the first rule that matches counts, and it counts more than
    /// include and exclude.
    #[serde(rename = "rule")]
    pub rules: Vec<Rule>,
    /// How a layer's input is quantized when it runs. Default: int8, as in b1.58. Of no influence
    /// on weights: it goes into the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activations: Option<Activations>,
    /// What chooses the precision of each weight that no rule matches. Default: nothing; `default`
    /// says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search: Option<Search>,
    /// How the precision of a stream follows its quality. Default: balanced. For the library, as
    /// `activations`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<PrecisionControlConfig>,
    /// Threads and instruction set. No result depends on it, so it is not written into quantized
    /// files.
    #[serde(skip_serializing_if = "Compute::is_default")]
    pub compute: Compute,
}

/// Two-dimensional weights that are not linear layers, or that lose more than they save:
/// embeddings, output heads, norms, routers.
pub const DEFAULT_EXCLUDE: &[&str] = &[
    "*embed*",
    "*embd*",
    "*lm_head*",
    "output.weight",
    "*norm*",
    "*Norm*",
    "*.wte.*",
    "*.wpe.*",
    "*.gate.weight",
    "*ffn_gate_inp*",
];

impl Default for Recipe {
    fn default() -> Self {
        Self {
            version: VERSION,
            format: Format::default(),
            linear_class: None,
            include: vec!["*.weight".into()],
            exclude: DEFAULT_EXCLUDE.iter().map(|&s| s.into()).collect(),
            default: Choices::default(),
            rules: vec![],
            activations: None,
            search: None,
            control: None,
            compute: Compute::default(),
        }
    }
}

impl Recipe {
    /// Reads a recipe from TOML.
    ///
    /// # Errors
    /// [`Error::Recipe`] with line and column for TOML that is not a recipe, and for another
    /// version.
    pub fn from_toml(text: &str) -> Result<Self> {
        toml::from_str::<Self>(text)
            .map_err(|e| Error::Recipe(e.to_string().trim_end().into()))?
            .of_this_version()
    }

    /// Reads a recipe from JSON, which has the fields that TOML has.
    ///
    /// # Errors
    /// As [`Recipe::from_toml`].
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str::<Self>(text)
            .map_err(|e| Error::Recipe(e.to_string()))?
            .of_this_version()
    }

    fn of_this_version(self) -> Result<Self> {
        if self.version == VERSION {
            Ok(self)
        } else {
            Err(Error::Recipe(format!(
                "version {}, expected {VERSION}",
                self.version
            )))
        }
    }

    /// The choices for a weight of that name, whatever its shape and container: the first rule that
    /// matches over the default.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a glob that is not one.
    pub fn choices_for(&self, name: &str) -> Result<Choices> {
        Ok(self.rule_for(name)?.map_or_else(
            || self.default.clone(),
            |rule| rule.choices.over(&self.default),
        ))
    }

    /// The choices for a matrix of that name if it is to be quantized: the first rule that matches,
    /// else the default where `include` and `exclude` say so.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a glob that is not one.
    #[cfg(feature = "qat")]
    pub(crate) fn matrix_choices(&self, name: &str) -> Result<Option<Choices>> {
        let choices = match self.rule_for(name)? {
            Some(rule) => rule.choices.over(&self.default),
            None => {
                let matches = |globs: &[String]| -> Result<bool> {
                    globs
                        .iter()
                        .try_fold(false, |any, glob| Ok(any || compile(glob)?.is_match(name)))
                };
                if !matches(&self.include)? || matches(&self.exclude)? {
                    return Ok(None);
                }
                self.default.clone()
            }
        };
        Ok(choices.precision().is_some().then_some(choices))
    }

    /// The first rule that matches a name.
    pub(crate) fn rule_for(&self, name: &str) -> Result<Option<&Rule>> {
        for rule in &self.rules {
            if compile(&rule.glob)?.is_match(name) {
                return Ok(Some(rule));
            }
        }
        Ok(None)
    }

    /// Compiles the globs and checks that each of the user's own matches a tensor.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a glob that is not one, and for one that matches nothing (the default
    /// globs may).
    pub(crate) fn selector<'a>(&'a self, source: &Source) -> Result<Selector<'a>> {
        let all = |globs: &[String]| globs.iter().map(|g| compile(g)).collect::<Result<Vec<_>>>();
        let default = Self::default();
        let selector = Selector {
            recipe: self,
            include: all(&self.include)?,
            exclude: all(&self.exclude)?,
            rules: self
                .rules
                .iter()
                .map(|r| compile(&r.glob))
                .collect::<Result<_>>()?,
        };
        let own = |own: &[String], default: &[String]| {
            own.iter()
                .filter(|g| !default.contains(g))
                .cloned()
                .collect::<Vec<_>>()
        };
        let mut globs = own(&self.include, &default.include);
        globs.extend(own(&self.exclude, &default.exclude));
        globs.extend(self.rules.iter().map(|r| r.glob.clone()));
        for glob in globs {
            let matcher = compile(&glob)?;
            if !source.tensors.iter().any(|t| matcher.is_match(&t.name)) {
                return Err(Error::Recipe(format!(
                    "'{glob}' matches no tensor of {}",
                    source.path.display()
                )));
            }
        }
        for (rule, glob) in self.rules.iter().zip(&selector.rules) {
            let target = rule.choices.over(&self.default).target();
            if target != Target::Keep
                && !source
                    .tensors
                    .iter()
                    .any(|t| glob.is_match(&t.name) && can_become(t, target))
            {
                let (glob, path) = (&rule.glob, source.path.display());
                return Err(Error::Recipe(format!(
                    "'{glob}' matches no tensor of {path} that can become {target}"
                )));
            }
        }
        Ok(selector)
    }
}

/// A glob in which `*` matches any characters.
pub(crate) fn compile(glob: &str) -> Result<GlobMatcher> {
    let matcher = GlobBuilder::new(glob).literal_separator(false).build();
    matcher
        .map(|g| g.compile_matcher())
        .map_err(|e| Error::Recipe(format!("glob '{glob}': {}", e.kind())))
}

/// Whether a tensor holds numbers, and rows of them if it is to be quantized.
fn can_become(tensor: &Tensor, target: Target) -> bool {
    !matches!(tensor.content, Content::Opaque(_))
        && (!matches!(target, Target::Quantized(_)) || tensor.shape.len() >= 2)
}

/// A recipe with its globs compiled.
pub(crate) struct Selector<'a> {
    recipe: &'a Recipe,
    include: Vec<GlobMatcher>,
    exclude: Vec<GlobMatcher>,
    rules: Vec<GlobMatcher>,
}

impl Selector<'_> {
    /// Whether a rule decides about the tensor of that name.
    #[cfg(feature = "advanced")]
    pub(crate) fn has_rule(&self, name: &str) -> bool {
        self.rules.iter().any(|g| g.is_match(name))
    }

    /// The choices for a tensor; `None` if it stays as it is.
    ///
    /// Only weights with at least two dimensions can be quantized. Include reaches those with
    /// exactly two; convolutions need a rule.
    pub(crate) fn choices(&self, tensor: &Tensor) -> Option<Choices> {
        if matches!(tensor.content, Content::Opaque(_)) {
            return None;
        }
        let matches = |globs: &[GlobMatcher]| globs.iter().any(|g| g.is_match(&tensor.name));
        if let Some(i) = self.rules.iter().position(|g| g.is_match(&tensor.name)) {
            let choices = self.recipe.rules[i].choices.over(&self.recipe.default);
            return can_become(tensor, choices.target()).then_some(choices);
        }
        let selected = tensor.shape.len() == 2 && matches(&self.include) && !matches(&self.exclude);
        selected.then(|| self.recipe.default.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_and_versions_are_errors() {
        for (toml, part) in [
            ("formatt = 'gguf'", "formatt"),
            ("[default]\nthreshhold = 'optimal'", "threshhold"),
            ("[[rule]]\nmatch = '*'\nprecison = 'int8'", "precison"),
            ("version = 2", "version 2"),
            ("[default]\ngranularity = 'group:0'", "group:0"),
            ("[default]\nprecision = 'int5'", "int5"),
        ] {
            let message = Recipe::from_toml(toml).unwrap_err().to_string();
            assert!(message.contains(part), "{toml}: {message}");
        }
    }

    #[test]
    fn a_recipe_survives_toml() {
        let recipe = Recipe {
            rules: vec![Rule {
                glob: "a*".into(),
                choices: Choices {
                    precision: Some(Target::Keep),
                    ..Choices::default()
                },
            }],
            default: Choices {
                threshold: Some(Threshold::Factor(0.9)),
                clip: None,
                ..Choices::default()
            },
            ..Recipe::default()
        };
        assert_eq!(
            Recipe::from_toml(&toml::to_string(&recipe).unwrap()).unwrap(),
            recipe
        );
    }

    #[test]
    fn another_precision_drops_the_choices_of_the_first() {
        let base = Choices {
            threshold: Some(Threshold::Optimal),
            granularity: Some(Granularity::Channel),
            ..Choices::default()
        };
        let int8 = Choices {
            precision: Some(Target::Quantized(Precision::Int8)),
            ..Choices::default()
        }
        .over(&base);
        assert_eq!(int8.threshold, None);
        assert_eq!(int8.granularity, Some(Granularity::Channel));
    }

    #[test]
    fn a_choice_of_another_precision_is_an_error() {
        let choices = Choices {
            precision: Some(Target::Quantized(Precision::Int4)),
            planes: Some(2),
            ..Choices::default()
        };
        let error = choices
            .scheme(Granularity::Channel, ScaleDtype::F32, ScaleForm::Direct)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "recipe: planes does not apply to precision int4"
        );
    }
}
