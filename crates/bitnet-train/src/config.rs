//! What a run is told: one document for flags, TOML and the folder that it writes.

use crate::models::DecoderShape;
use crate::{Error, Result};
use bitnet_quant::qat::QATConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// A classifier of images.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// What is learnt from.
    pub data: ImageData,
    /// What learns.
    pub model: ImageModelConfig,
    /// How the run goes.
    pub run: RunConfig,
    /// How both the full-precision twin and the quantized model are trained.
    pub training: QATConfig,
}

impl ImageConfig {
    /// Leaves the first convolution in floats unless a rule says something about it.
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

/// Which network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// A multilayer perceptron.
    #[default]
    Mlp,
    /// A small convolutional network, whose first layer stays in floats: it has 9 inputs.
    Cnn,
}

bitnet_core::named!(Network, "network", { Mlp = "mlp", Cnn = "cnn" });

/// A network by its sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageModelConfig {
    /// Which one.
    pub network: Network,
    /// Elements of each hidden layer of the perceptron, or channels of each convolution. Default:
    /// 512, 512; 32, 64.
    pub sizes: Vec<usize>,
    /// Elements of the layer behind the convolutions.
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

/// A language model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LmConfig {
    /// What is learnt from.
    pub data: TextData,
    /// What learns.
    pub model: LmModelConfig,
    /// How the run goes.
    pub run: RunConfig,
    /// How both the full-precision twin and the quantized model are trained.
    pub training: QATConfig,
}

/// Text files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextData {
    /// The files, UTF-8.
    pub text: Vec<PathBuf>,
    /// A tokenizer.json. Default: that of the model begun from; bytes where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Share of each file, at its end, that is held out.
    pub held_out: f64,
    /// Most held-out tokens that are measured on; 0: all. Taken from the whole of them at equal
    /// distances, a window each.
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

/// A decoder from a folder, or from scratch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LmModelConfig {
    /// A folder with config.json, float weights and perhaps a tokenizer.json to begin from. Then
    /// `shape` says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// Tokens of a window.
    pub context: usize,
    /// A new decoder.
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

/// How a run goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// What all randomness is drawn from.
    pub seed: u64,
    /// Images, or windows, of a micro-batch.
    pub batch: usize,
    /// Whether the full-precision twin is trained first, from the same start on the same data: the
    /// report compares with it.
    pub twin: bool,
    /// Whether the quantized model begins with the twin's weights instead of the twin's start.
    pub fine_tune: bool,
    /// What is also learnt from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<Teacher>,
    /// How much the teacher counts.
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

/// A model to learn from.
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

/// `loss = (1 − logits)·L + logits·KL + hidden·MSE + relations·R`, L the cross-entropy with the
/// data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distillation {
    /// Share of the divergence from the teacher's outputs.
    pub logits: f64,
    /// Temperature of both outputs in it.
    pub temperature: f64,
    /// Weight of the distance of hidden states; decoders with as many layers of the same size.
    pub hidden: f64,
    /// Weight of the divergence of the last layer's relations among queries, keys and values;
    /// decoders.
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
/// [`Error::Config`] with what is wrong and where.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bad = |what: String| Error::Config {
        path: path.to_path_buf(),
        what: what.trim_end().replace('\n', " "),
    };
    let text = fs::read_to_string(path).map_err(|e| bad(format!("cannot read: {e}")))?;
    toml::from_str(&text).map_err(|e| bad(e.to_string()))
}
