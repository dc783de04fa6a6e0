//! Recipes: which tensors become what. The same type serves the command line, TOML and JSON files,
//! the metadata of the result, and the library.

mod builder;
mod choices;
mod preset;
pub(crate) mod role;
mod sections;
mod selector;
mod validate;

pub use builder::RecipeBuilder;
pub use choices::{Choices, LayoutChoice, Target};
pub use preset::Preset;
pub use sections::{Activations, Compute, MAX_THREADS, Machine, PrecisionControlConfig, Search};
pub(crate) use selector::{Selector, Stays};
pub use selector::{compile, escape};

use crate::{Error, Result};
use bitnet_core::{Precision, named};
use bitnet_formats::hf::LinearClass;
use serde::{Deserialize, Serialize};
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
    /// A folder that mlx-lm opens: ternary and integers of 2, 3, 4 and 8 bits in groups of 32, 64 or
    /// 128.
    Mlx,
    /// GGUF.
    Gguf,
    /// A folder that onnxruntime opens: `model.onnx` with the whole decoder, and its weights.
    Onnx,
}

named!(Format, "format", {
    Safetensors = "safetensors",
    HfBitnet = "hf-bitnet",
    Mlx = "mlx",
    Gguf = "gguf",
    Onnx = "onnx",
});

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
/// let recipe = bitnet_checkpoint::Recipe::from_toml(r#"
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
/// # Ok::<(), bitnet_checkpoint::Error>(())
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
    /// Weights that are stored `[in, out]`, as globs, and no others. Default: those that the
    /// checkpoint shows ([`crate::forms`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transposed: Option<Vec<String>>,
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
///
/// As long as a recipe excludes these, and leaves `include` as it is, embeddings, heads, classifiers
/// and routers stay under other names too: those with a dimension of the vocabulary, or a row for
/// each position, label or expert, as config.json says or the shapes show.
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
            transposed: None,
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
        toml::from_str::<Self>(without_mark(text))
            .map_err(|e| Error::Recipe(e.to_string().trim_end().into()))?
            .of_this_version()
    }

    /// Reads a recipe from JSON, which has the fields that TOML has.
    ///
    /// # Errors
    /// As [`Recipe::from_toml`].
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str::<Self>(without_mark(text))
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

    /// The default with another precision.
    pub fn new(precision: impl Into<Precision>) -> Self {
        let mut config = Self::default();
        config.default.precision = Some(Target::Quantized(precision.into()));
        config
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
}

/// The text without the byte order mark that some editors put before it.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_core::ScaleForm;
    use bitnet_core::scheme::Threshold;
    use bitnet_core::{Granularity, ScaleDtype};

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
    fn a_byte_order_mark_is_no_part_of_a_recipe() {
        let toml = "\u{feff}format = 'gguf'";
        assert_eq!(Recipe::from_toml(toml).unwrap().format, Format::Gguf);
        let json = "\u{feff}{\"format\": \"gguf\"}";
        assert_eq!(Recipe::from_json(json).unwrap().format, Format::Gguf);
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

    #[test]
    fn presets_are_valid_distinct_and_survive_toml_and_json() {
        let all = Preset::ALL
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
                Preset::ALL[i].name().parse::<Preset>().unwrap(),
                Preset::ALL[i]
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
            Recipe {
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
