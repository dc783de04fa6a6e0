//! The settings of a run: one document for the flags, the TOML file and run.toml.

use crate::models::DecoderShape;
use crate::{Error, Result};
use bitnet_quant::qat::QATConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// Settings of an image classifier.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// The images.
    pub data: ImageData,
    /// The network.
    pub model: ImageModelConfig,
    /// The run.
    pub run: RunConfig,
    /// The training of the full-precision twin and of the quantized model.
    pub training: QATConfig,
}

impl ImageConfig {
    /// Excludes the first convolution from quantization.
    pub fn complete(&mut self) {
        const FIRST: &str = "conv.0.weight";
        let recipe = &mut self.training.quantization;
        if self.model.network == Network::Cnn && !recipe.exclude.iter().any(|glob| glob == FIRST) {
            recipe.exclude.push(FIRST.into());
        }
    }
}

/// A folder of idx files: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-…`, each
/// plain or with `.gz`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageData {
    /// The folder.
    pub folder: PathBuf,
    /// Number of classes.
    pub classes: usize,
}

impl Default for ImageData {
    fn default() -> Self {
        Self {
            folder: PathBuf::new(),
            classes: 10,
        }
    }
}

/// The kinds of networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// A multilayer perceptron.
    #[default]
    Mlp,
    /// A small convolutional network. Its first layer has 9 inputs and stays in floats.
    Cnn,
}

bitnet_core::named!(Network, "network", { Mlp = "mlp", Cnn = "cnn" });

/// Kind and sizes of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageModelConfig {
    /// The kind.
    pub network: Network,
    /// Elements of each hidden layer of the perceptron (default 512, 512), or channels of each
    /// convolution (default 32, 64).
    pub sizes: Vec<usize>,
    /// Elements of the layer after the convolutions.
    pub dense: usize,
    /// Whether an RMS norm precedes every layer but the first.
    pub norm: bool,
}

impl Default for ImageModelConfig {
    fn default() -> Self {
        Self {
            network: Network::Mlp,
            sizes: vec![],
            dense: 128,
            norm: true,
        }
    }
}

/// Settings of a language model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LmConfig {
    /// The text.
    pub data: TextData,
    /// The decoder.
    pub model: LmModelConfig,
    /// The run.
    pub run: RunConfig,
    /// The training of the full-precision twin and of the quantized model.
    pub training: QATConfig,
}

/// Text files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextData {
    /// The files, UTF-8.
    pub text: Vec<PathBuf>,
    /// A tokenizer.json. Default: that of the initial model; bytes if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Share of each file to hold out, at its end.
    pub held_out: f64,
    /// Largest number of held-out tokens to measure on; 0: all. Windows are taken at equal
    /// distances.
    pub measured: usize,
}

impl Default for TextData {
    fn default() -> Self {
        Self {
            text: vec![],
            tokenizer: None,
            held_out: 0.1,
            measured: 65_536,
        }
    }
}

/// A decoder, from a folder or with random weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LmModelConfig {
    /// Folder of the initial model: config.json, float weights and perhaps tokenizer.json. Then
    /// `shape` is ignored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// Tokens of a window.
    pub context: usize,
    /// Shape of a decoder with random weights.
    pub shape: DecoderShape,
}

impl Default for LmModelConfig {
    fn default() -> Self {
        Self {
            from: None,
            context: 128,
            shape: DecoderShape::default(),
        }
    }
}

/// Settings of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Random seed.
    pub seed: u64,
    /// Number of images or windows in a micro-batch.
    pub batch: usize,
    /// Whether to train the full-precision twin first, from the same initial weights on the same
    /// data, as the baseline of the report.
    pub twin: bool,
    /// Whether the quantized model starts from the twin's final weights, not its initial ones.
    pub fine_tune: bool,
    /// The teacher for distillation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<Teacher>,
    /// Weights of the distillation terms.
    pub distillation: Distillation,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            batch: 64,
            twin: true,
            fine_tune: false,
            teacher: None,
            distillation: Distillation::default(),
        }
    }
}

/// A teacher for distillation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Teacher {
    /// The full-precision twin of the same run: `self`.
    Twin,
    /// A folder with a model of the same kind and the same outputs.
    Folder(PathBuf),
}

impl From<String> for Teacher {
    fn from(s: String) -> Self {
        if s == "self" {
            Self::Twin
        } else {
            Self::Folder(s.into())
        }
    }
}

impl From<Teacher> for String {
    fn from(teacher: Teacher) -> Self {
        match teacher {
            Teacher::Twin => "self".into(),
            Teacher::Folder(path) => path.display().to_string(),
        }
    }
}

/// `loss = (1 − logits)·L + logits·KL + hidden·MSE + relations·R`, where L is the cross-entropy
/// with the data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distillation {
    /// Share of the KL divergence from the teacher's outputs.
    pub logits: f64,
    /// Temperature of both outputs in that divergence.
    pub temperature: f64,
    /// Weight of the distance of hidden states; decoders with equal numbers and sizes of layers.
    pub hidden: f64,
    /// Weight of the divergence of the last layer's relations among queries, keys and values;
    /// decoders only.
    pub relations: f64,
}

impl Default for Distillation {
    fn default() -> Self {
        Self {
            logits: 0.5,
            temperature: 1.0,
            hidden: 0.0,
            relations: 0.0,
        }
    }
}

impl RunConfig {
    pub(crate) fn validate(&self) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::option("run.batch", "at least 1", 0));
        }
        if !self.twin && self.fine_tune {
            return Err(Error::option("run.fine_tune", "false without a twin", true));
        }
        if !self.twin && self.teacher == Some(Teacher::Twin) {
            return Err(Error::option(
                "run.teacher",
                "a folder where there is no twin",
                "self",
            ));
        }
        let Distillation {
            logits,
            temperature,
            hidden,
            relations,
        } = self.distillation;
        if !(0.0..=1.0).contains(&logits) {
            return Err(Error::option(
                "run.distillation.logits",
                "a share from 0 to 1",
                logits,
            ));
        }
        for (name, value, least) in [
            ("temperature", temperature, f64::MIN_POSITIVE),
            ("hidden", hidden, 0.0),
            ("relations", relations, 0.0),
        ] {
            if !(value.is_finite() && value >= least) {
                let expected = if least > 0.0 {
                    "a positive number"
                } else {
                    "a number of at least 0"
                };
                return Err(Error::option(
                    format!("run.distillation.{name}"),
                    expected,
                    value,
                ));
            }
        }
        Ok(())
    }
}

/// Reads a configuration in TOML.
///
/// # Errors
/// [`Error::Config`] with the error and its line.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bad = |what: String| Error::Config {
        path: path.to_path_buf(),
        what: what.trim_end().replace('\n', " "),
    };
    let text = fs::read_to_string(path).map_err(|e| bad(format!("cannot read: {e}")))?;
    toml::from_str(&text).map_err(|e| bad(e.to_string()))
}
