//! The keys of a GGUF from a config.json, and a config.json from the keys of a GGUF.

use super::{Architecture, find, shown, tokenizer};
use crate::gguf;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::f64::consts::PI;
use std::path::Path;

/// Name of the tensor that holds [`GgufMetadata::rope_freqs`].
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// What a GGUF of a model has besides the model's own tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufMetadata {
    /// The architecture.
    pub architecture: Architecture,
    /// Keys and values, without `general.file_type` and `general.quantization_version`.
    pub metadata: Vec<(String, gguf::Value)>,
    /// Divisors of the rotation frequencies: to be written as the f32 tensor [`ROPE_FREQS`] where
    /// there are any.
    pub rope_freqs: Option<Vec<f32>>,
    /// What the file cannot say as the folder says it, each a sentence for a person.
    pub notes: Vec<String>,
}

/// A config.json and where it is: typed access, with errors that name file and key. A null is no
/// value.
#[derive(Debug, Clone, Copy)]
pub struct HfConfig<'a> {
    /// The file, for messages.
    pub path: &'a Path,
    /// Its content.
    pub value: &'a Value,
}

impl HfConfig<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    /// The error for a key that is something else.
    pub fn bad(&self, key: &str, expected: &str) -> Error {
        Error::config(self.path, key, expected, shown(self.value.get(key)))
    }

    /// A positive number that fits the u32 of a GGUF key.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else, or missing.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    /// [`HfConfig::size`], or nothing.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let n = value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| *n > 0);
        n.map(|n| Some(n as usize))
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .filter(|x| *x > 0.0 && x.is_finite())
            .map(Some)
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    /// A boolean; false where there is none.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn flag(&self, key: &str) -> Result<bool> {
        self.get(key).map_or(Ok(false), |value| {
            value
                .as_bool()
                .ok_or_else(|| self.bad(key, "true or false"))
        })
    }

    /// A positive number. A default of Hugging Face's llama configuration; its bitnet configuration
    /// has other defaults, and nobody relies on them.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else, or missing in a bitnet configuration.
    pub fn float_or(&self, key: &str, architecture: Architecture, default: f64) -> Result<f64> {
        match (self.optional_float(key)?, architecture) {
            (Some(x), _) => Ok(x),
            (None, Architecture::Llama) => Ok(default),
            (None, Architecture::Bitnet) => Err(self.bad(key, "a positive number")),
        }
    }
}

/// Keys of llama.cpp for a model folder with this config.json, tokenizer included.
///
/// Defaults are those that Hugging Face documents: as many key/value heads as heads, `hidden_size /
/// num_attention_heads` dimensions for each, and for llama `rope_theta` 10000 and `rms_norm_eps`
/// 1e-6. Another missing key is an error. A tokenizer that GGUF cannot express is a note, and the
/// file then has none: token ids go in and come out.
///
/// # Errors
/// [`Error::Config`] for a key that is missing or that llama.cpp's graph of the architecture cannot
/// follow; [`Error::Io`] and [`Error::File`] for a tokenizer file that cannot be read.
pub fn gguf_metadata(folder: &Path, config: &Value) -> Result<GgufMetadata> {
    let architecture = Architecture::from_hf_config(config)?;
    let path = folder.join("config.json");
    let config = HfConfig {
        path: &path,
        value: config,
    };
    let mut notes = vec![];

    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = match (config.optional_size("num_key_value_heads")?, architecture) {
        (Some(n), _) => n,
        (None, Architecture::Llama) => heads,
        (None, Architecture::Bitnet) => {
            return Err(config.bad("num_key_value_heads", "a positive number"));
        }
    };
    let head_dim = match config.optional_size("head_dim")? {
        Some(n) => n,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            return Err(config.bad(
                "head_dim",
                &format!(
                    "the size of one of {heads} heads, which do not divide hidden_size {hidden}"
                ),
            ));
        }
    };
    if heads % kv_heads != 0 {
        return Err(config.bad(
            "num_key_value_heads",
            &format!("a divisor of {heads} heads"),
        ));
    }
    let vocab_size = config.size("vocab_size")?;
    let activation = activation(&config, architecture)?;
    let rope = HfRope::read(&config, architecture, head_dim)?;
    for key in ["attention_bias", "mlp_bias"] {
        if config.flag(key)? && architecture == Architecture::Bitnet {
            return Err(config.bad(key, "false, since bitnet in llama.cpp has no biases"));
        }
    }
    if architecture == Architecture::Bitnet {
        if head_dim * heads != hidden {
            return Err(config.bad(
                "head_dim",
                &format!("{hidden} / {heads}, which bitnet in llama.cpp takes for granted"),
            ));
        }
        if !config.flag("tie_word_embeddings")? {
            notes.push(
                "bitnet in llama.cpp always uses the embedding as output matrix: a file with an output.weight of its own is refused there"
                    .into(),
            );
        }
    }

    let prefix = architecture.gguf_name();
    let name = folder
        .canonicalize()
        .ok()
        .and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    let size = |n: usize| gguf::Value::U32(n as u32);
    let mut metadata: Vec<(String, gguf::Value)> = vec![
        ("general.architecture".into(), prefix.into()),
        ("general.type".into(), "model".into()),
        (
            "general.name".into(),
            name.unwrap_or_else(|| prefix.into()).into(),
        ),
    ];
    let mut put = |key: &str, value: gguf::Value| metadata.push((format!("{prefix}.{key}"), value));
    put("block_count", size(config.size("num_hidden_layers")?));
    put(
        "context_length",
        size(config.size("max_position_embeddings")?),
    );
    put("embedding_length", size(hidden));
    put(
        "feed_forward_length",
        size(config.size("intermediate_size")?),
    );
    put("attention.head_count", size(heads));
    put("attention.head_count_kv", size(kv_heads));
    put(
        "attention.layer_norm_rms_epsilon",
        (config.float_or("rms_norm_eps", architecture, 1e-6)? as f32).into(),
    );
    if head_dim * heads != hidden {
        put("attention.key_length", size(head_dim));
        put("attention.value_length", size(head_dim));
    }
    put("rope.dimension_count", size(head_dim));
    put("rope.freq_base", (rope.theta as f32).into());
    if let Some(factor) = rope.linear {
        put("rope.scaling.type", "linear".into());
        put("rope.scaling.factor", (factor as f32).into());
    }
    put("vocab_size", size(vocab_size));
    if architecture == Architecture::Bitnet {
        put("hidden_activation", activation.into());
        if activation == "relu2" {
            notes.push("llama.cpp from before it read bitnet.hidden_activation computes SiLU instead of relu2 and says nothing: so does the one in llama-cpp-python 0.3.36".into());
        }
    }
    if rope.freqs.is_some() {
        notes.push(format!("llama3 rope scaling is the tensor {ROPE_FREQS}"));
    }
    metadata.extend(tokenizer::gguf_tokenizer(
        folder,
        config.value,
        vocab_size,
        &mut notes,
    )?);
    Ok(GgufMetadata {
        architecture,
        metadata,
        rope_freqs: rope.freqs,
        notes,
    })
}

/// `hidden_act`, one that llama.cpp computes too: SiLU for llama, SiLU or ReLU² for bitnet.
///
/// # Errors
/// [`Error::Config`] for any other.
pub fn activation<'a>(config: &HfConfig<'a>, architecture: Architecture) -> Result<&'a str> {
    let key = "hidden_act";
    match (config.value.get(key).and_then(Value::as_str), architecture) {
        (Some(act @ "silu"), _) | (Some(act @ "relu2"), Architecture::Bitnet) => Ok(act),
        (None, Architecture::Llama) if config.get(key).is_none() => Ok("silu"),
        (_, Architecture::Llama) => Err(config.bad(key, "'silu'")),
        (_, Architecture::Bitnet) => Err(config.bad(key, "'silu' or 'relu2'")),
    }
}

/// Rotary embedding of a config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct HfRope {
    /// The base θ.
    pub theta: f64,
    /// What all frequencies are divided by (`linear` scaling).
    pub linear: Option<f64>,
    /// What each frequency θ^(−2i/d) is divided by (`llama3` scaling).
    pub freqs: Option<Vec<f32>>,
}

impl HfRope {
    /// From `rope_parameters` (since transformers 5), or from `rope_theta` and `rope_scaling`.
    ///
    /// # Errors
    /// [`Error::Config`] for a scaling other than `default`, `linear` and (llama alone) `llama3`,
    /// and for parameters that are missing.
    pub fn read(config: &HfConfig, architecture: Architecture, head_dim: usize) -> Result<Self> {
        if !head_dim.is_multiple_of(2) {
            return Err(config.bad("head_dim", "an even number"));
        }
        let key = if config.get("rope_parameters").is_some() {
            "rope_parameters"
        } else {
            "rope_scaling"
        };
        let Some(value) = config.get(key) else {
            return Ok(Self {
                theta: config.float_or("rope_theta", architecture, 10000.0)?,
                linear: None,
                freqs: None,
            });
        };
        let scaling = HfConfig {
            path: config.path,
            value,
        };
        let bad = |name: &str, expected: &str| {
            Error::config(
                config.path,
                format!("{key}.{name}"),
                expected,
                shown(value.get(name)),
            )
        };
        let theta = match scaling.optional_float("rope_theta")? {
            Some(theta) => theta,
            None => config.float_or("rope_theta", architecture, 10000.0)?,
        };
        for part in [scaling, *config] {
            if part
                .optional_float("partial_rotary_factor")?
                .is_some_and(|f| f != 1.0)
            {
                return Err(part.bad("partial_rotary_factor", "1"));
            }
        }
        let required = |name: &str| {
            scaling
                .optional_float(name)?
                .ok_or_else(|| bad(name, "a positive number"))
        };
        let kind = value.get("rope_type").or_else(|| value.get("type"));
        match kind.map(|kind| kind.as_str().unwrap_or_default()) {
            None if key == "rope_parameters" => Ok(Self {
                theta,
                linear: None,
                freqs: None,
            }),
            Some("default") => Ok(Self {
                theta,
                linear: None,
                freqs: None,
            }),
            Some("linear") => Ok(Self {
                theta,
                linear: Some(required("factor")?),
                freqs: None,
            }),
            Some("llama3") if architecture == Architecture::Llama => {
                let scaling = Llama3 {
                    factor: required("factor")?,
                    low: required("low_freq_factor")?,
                    high: required("high_freq_factor")?,
                    context: required("original_max_position_embeddings")?,
                };
                if scaling.low >= scaling.high {
                    return Err(bad("high_freq_factor", "more than low_freq_factor"));
                }
                Ok(Self {
                    theta,
                    linear: None,
                    freqs: Some(scaling.divisors(theta, head_dim)),
                })
            }
            _ => {
                let expected = match architecture {
                    Architecture::Llama => "'default', 'linear' or 'llama3'",
                    Architecture::Bitnet => "'default' or 'linear'",
                };
                Err(Error::config(
                    config.path,
                    format!("{key}.rope_type"),
                    expected,
                    shown(kind),
                ))
            }
        }
    }
}

/// Parameters of llama3 rope scaling.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    context: f64,
}

impl Llama3 {
    /// What each frequency θ^(−2i/d) is divided by. With wavelength λ and n = context/λ turns
    /// within the old context: 1 from `high` turns on, `factor` up to `low` turns, and between them
    /// 1/((1 − s)/factor + s) with s = (n − low)/(high − low).
    fn divisors(&self, theta: f64, head_dim: usize) -> Vec<f32> {
        let divisor = |i: usize| {
            let turns = self.context / (2.0 * PI) * theta.powf(-((2 * i) as f64) / head_dim as f64);
            let smooth = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / self.factor + smooth)) as f32
        };
        (0..head_dim / 2).map(divisor).collect()
    }
}

/// The keys of a GGUF, those of its architecture by the part behind the prefix.
pub(super) struct Keys<'a> {
    path: &'a Path,
    metadata: &'a [(String, gguf::Value)],
    prefix: &'a str,
}

impl<'a> Keys<'a> {
    pub(super) fn new(path: &'a Path, metadata: &'a [(String, gguf::Value)]) -> Result<Self> {
        Architecture::from_gguf(metadata)?;
        let prefix = find(metadata, "general.architecture")
            .and_then(gguf::Value::as_str)
            .unwrap_or_default();
        Ok(Self {
            path,
            metadata,
            prefix,
        })
    }

    fn get(&self, key: &str) -> Option<&'a gguf::Value> {
        let full = format!("{}.{key}", self.prefix);
        find(self.metadata, &full)
    }

    fn bad(&self, key: &str, expected: &str) -> Error {
        let got = self.get(key).map_or("none".into(), |v| v.preview(120));
        Error::config(self.path, format!("{}.{key}", self.prefix), expected, got)
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let n = value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| *n > 0);
        n.map(|n| Some(n as usize))
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        // The shortest decimal of an f32, so that 1e-5 stays 1e-5.
        let float = match value {
            gguf::Value::F32(x) => x.to_string().parse().ok(),
            value => value.as_f64(),
        };
        float
            .filter(|x: &f64| *x > 0.0 && x.is_finite())
            .map(Some)
            .ok_or_else(|| self.bad(key, "a positive number"))
    }
}

/// config.json of a llama or bitnet GGUF. `path` is for messages; `shape` gives the shape of the
/// GGUF tensor of a name, if there is one.
///
/// The weights are taken to be written as f32 without any quantization.
///
/// # Errors
/// [`Error::Config`] for an unsupported architecture, a missing key, or a rotary embedding that a
/// config.json cannot say; [`Error::Tensor`] if there is no token embedding.
pub fn hf_config(
    path: &Path,
    metadata: &[(String, gguf::Value)],
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
) -> Result<Value> {
    let architecture = Architecture::from_gguf(metadata)?;
    let keys = Keys::new(path, metadata)?;
    let hidden = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(n) => n,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            return Err(keys.bad(
                "attention.key_length",
                &format!("the size of one of {heads} heads of {hidden} dimensions"),
            ));
        }
    };
    if keys
        .optional_size("attention.value_length")?
        .unwrap_or(head_dim)
        != head_dim
    {
        return Err(keys.bad(
            "attention.value_length",
            &format!("{head_dim}, the size of a key"),
        ));
    }
    if keys
        .optional_size("rope.dimension_count")?
        .unwrap_or(head_dim)
        != head_dim
    {
        return Err(keys.bad(
            "rope.dimension_count",
            &format!("{head_dim}, the size of a head"),
        ));
    }
    if let Some(shape) = shape(ROPE_FREQS) {
        return Err(Error::tensor(
            path,
            ROPE_FREQS,
            "no divisors of rotation frequencies, which config.json cannot hold",
            format!("shape {shape:?}"),
        ));
    }
    let Some(&[vocab_size, _]) = shape("token_embd.weight").as_deref() else {
        return Err(Error::tensor(
            path,
            "token_embd.weight",
            "a matrix [vocabulary, embedding]",
            "none",
        ));
    };
    let scaling = match (
        keys.get("rope.scaling.type").map(gguf::Value::as_str),
        keys.optional_float("rope.scaling.factor")?,
    ) {
        (None | Some(Some("none")), _) | (Some(Some("linear")), None) => Value::Null,
        (Some(Some("linear")), Some(1.0)) => Value::Null,
        (Some(Some("linear")), Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
        _ => return Err(keys.bad("rope.scaling.type", "'none' or 'linear'")),
    };
    let (class, model_type) = match architecture {
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Bitnet => ("BitNetForCausalLM", "bitnet"),
    };
    let hidden_act = match (
        architecture,
        keys.get("hidden_activation").map(gguf::Value::as_str),
        keys.prefix,
    ) {
        (Architecture::Llama, ..) | (_, Some(Some("silu")), _) | (_, None, "bitnet") => "silu",
        (_, Some(Some("relu2")) | None, _) => "relu2",
        _ => return Err(keys.bad("hidden_activation", "'silu' or 'relu2'")),
    };
    let eps = keys.optional_float("attention.layer_norm_rms_epsilon")?;
    let mut config = json!({
        "architectures": [class],
        "attention_bias": shape("blk.0.attn_q.bias").is_some(),
        "head_dim": head_dim,
        "hidden_act": hidden_act,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length")?,
        "max_position_embeddings": keys.size("context_length")?,
        "mlp_bias": shape("blk.0.ffn_up.bias").is_some(),
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": keys.size("block_count")?,
        "num_key_value_heads": keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
        "rms_norm_eps": eps.ok_or_else(|| keys.bad("attention.layer_norm_rms_epsilon", "a positive number"))?,
        "rope_scaling": scaling,
        "rope_theta": keys.optional_float("rope.freq_base")?.unwrap_or(10000.0),
        "tie_word_embeddings": shape("output.weight").is_none(),
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
    });
    for (key, id) in [
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("pad_token_id", "padding_token_id"),
    ] {
        if let Some(id) =
            find(metadata, &format!("tokenizer.ggml.{id}")).and_then(gguf::Value::as_u64)
        {
            config[key] = id.into();
        }
    }
    Ok(config)
}

#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
