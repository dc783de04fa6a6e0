//! The keys of a GGUF from a config.json, and a config.json from the keys of a GGUF.

use super::architecture::{Activation, Architecture};
use super::end_ids;
use super::keys::GgufKeys;
use super::rope::HfRope;
use super::tokenizer;
use super::values::{HfConfig, find};
use crate::{Error, Result};
use crate::{gguf, hints};
use serde_json::{Value, json};
use std::path::Path;

/// Name of the tensor that holds [`GgufMetadata::rope_freqs`].
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// Largest vocabulary: a list of this length is made before the embedding is looked at. Known
/// models have at most 262,208 tokens.
const MAX_VOCAB: usize = 1 << 22;

/// What a GGUF of a model has besides the model's own tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufMetadata {
    /// The architecture.
    pub architecture: &'static Architecture,
    /// Keys and values, without `general.file_type` and `general.quantization_version`.
    pub metadata: Vec<(String, gguf::Value)>,
    /// Divisors of the rotation frequencies: to be written as the f32 tensor [`ROPE_FREQS`] where
    /// there are any.
    pub rope_freqs: Option<Vec<f32>>,
    /// Differences between the folder and the file, each a sentence for a person.
    pub notes: Vec<String>,
    /// What of the tokenizer is not in the file, each a sentence for a person.
    pub losses: Vec<String>,
}

/// Keys of llama.cpp for a model folder with this config.json, tokenizer included.
///
/// A missing key has the default that Hugging Face documents: as many key/value heads as heads,
/// `hidden_size / num_attention_heads` dimensions for each, and those of
/// [`Architecture::hf_defaults`]. Another missing key is an error. A tokenizer that GGUF cannot
/// express is a note, and the file then has none: token ids go in and come out.
///
/// # Errors
/// [`Error::Config`] for a key that is missing or that llama.cpp's graph of the architecture cannot
/// follow; [`Error::Io`] and [`Error::File`] for a tokenizer file that cannot be read.
pub fn gguf_metadata(folder: &Path, config: &Value) -> Result<GgufMetadata> {
    let path = folder.join("config.json");
    let architecture = Architecture::from_hf_config(&path, config)?;
    let config = HfConfig {
        path: &path,
        value: config,
    };
    let mut notes = vec![];
    let heads = HeadShape::read(&config, architecture)?;
    let vocab_size = config.size("vocab_size")?;
    if vocab_size > MAX_VOCAB {
        return Err(config.bad("vocab_size", &format!("at most {MAX_VOCAB}")));
    }
    let activation = architecture.activation(&config)?;
    let rope = HfRope::read(&config, architecture, heads.dim)?;
    check_limits(&config, architecture, &heads, &mut notes)?;

    let mut metadata = general_keys(folder, architecture);
    let prefix = architecture.gguf_name();
    let size = |n: usize| gguf::Value::U32(n as u32);
    let mut put = |key: &str, value: gguf::Value| metadata.push((format!("{prefix}.{key}"), value));
    put("block_count", size(config.size("num_hidden_layers")?));
    let context = config.size("max_position_embeddings")?;
    put("context_length", size(context));
    put("embedding_length", size(heads.hidden));
    let ffn = config.size("intermediate_size")?;
    put("feed_forward_length", size(ffn));
    put("attention.head_count", size(heads.count));
    put("attention.head_count_kv", size(heads.kv_count));
    let default = architecture.hf_defaults.map(|d| d.rms_norm_eps);
    let eps = config.float_or("rms_norm_eps", default)?;
    put("attention.layer_norm_rms_epsilon", (eps as f32).into());
    if heads.dim * heads.count != heads.hidden {
        put("attention.key_length", size(heads.dim));
        put("attention.value_length", size(heads.dim));
    }
    put("rope.dimension_count", size(heads.dim));
    put("rope.freq_base", (rope.theta as f32).into());
    if let Some(factor) = rope.linear {
        put("rope.scaling.type", "linear".into());
        put("rope.scaling.factor", (factor as f32).into());
    }
    put("vocab_size", size(vocab_size));
    if architecture.gguf_activation {
        put("hidden_activation", activation.name().into());
        if activation == Activation::Relu2 {
            notes.push(
                "versions of llama.cpp that do not read bitnet.hidden_activation compute SiLU instead of \
                 relu2 without a warning, among them the one in llama-cpp-python 0.3.36"
                    .into(),
            );
        }
    }
    if rope.freqs.is_some() {
        notes.push(format!("llama3 rope scaling is the tensor {ROPE_FREQS}"));
    }
    let mut resolved = config.value.clone();
    resolved["eos_token_id"] = end_ids::eos_ids(folder, &config)?.into();
    let mut losses = vec![];
    let said = (&mut losses, &mut notes);
    let tokenizer = tokenizer::gguf_tokenizer(folder, &resolved, vocab_size, said)?;
    metadata.extend(tokenizer);
    Ok(GgufMetadata {
        architecture,
        metadata,
        rope_freqs: rope.freqs,
        notes,
        losses,
    })
}

/// Attention heads of a config.json.
struct HeadShape {
    hidden: usize,
    count: usize,
    kv_count: usize,
    /// Dimensions of a head.
    dim: usize,
}

impl HeadShape {
    fn read(config: &HfConfig, architecture: &Architecture) -> Result<Self> {
        let hidden = config.size("hidden_size")?;
        let count = config.size("num_attention_heads")?;
        let kv_count = match config.optional_size("num_key_value_heads")? {
            Some(n) => n,
            None if architecture.hf_defaults.is_some() => count,
            None => return Err(config.bad("num_key_value_heads", "a positive number")),
        };
        let dim = match config.optional_size("head_dim")? {
            Some(n) => n,
            None if hidden % count == 0 => hidden / count,
            None => {
                let expected = format!(
                    "the size of one of {count} heads, which do not divide hidden_size {hidden}"
                );
                return Err(config.bad("head_dim", &expected));
            }
        };
        if count % kv_count != 0 {
            let expected = format!("a divisor of {count} heads");
            return Err(config.bad("num_key_value_heads", &expected));
        }
        Ok(Self {
            hidden,
            count,
            kv_count,
            dim,
        })
    }
}

/// Refuses a config that llama.cpp's graph of the architecture does not support.
fn check_limits(
    config: &HfConfig,
    architecture: &Architecture,
    heads: &HeadShape,
    notes: &mut Vec<String>,
) -> Result<()> {
    let name = architecture.name;
    for key in ["attention_bias", "mlp_bias"] {
        if config.flag(key)? && !architecture.gguf_biases {
            let expected = format!("false, since {name} in llama.cpp has no biases");
            return Err(config.bad(key, &expected));
        }
    }
    if architecture.heads_fill_hidden && heads.dim * heads.count != heads.hidden {
        let (hidden, count) = (heads.hidden, heads.count);
        let expected = format!("{hidden} / {count}, which {name} in llama.cpp assumes");
        return Err(config.bad("head_dim", &expected));
    }
    if !architecture.gguf_head && !config.flag("tie_word_embeddings")? {
        notes.push(format!(
            "{name} in llama.cpp always uses the embedding as output matrix: a file with an \
             output.weight of its own is refused there"
        ));
    }
    Ok(())
}

/// The keys that every GGUF begins with.
fn general_keys(folder: &Path, architecture: &Architecture) -> Vec<(String, gguf::Value)> {
    let prefix = architecture.gguf_name();
    let name = hints::model_name(folder);
    vec![
        ("general.architecture".into(), prefix.into()),
        ("general.type".into(), "model".into()),
        (
            "general.name".into(),
            name.unwrap_or_else(|| prefix.into()).into(),
        ),
    ]
}

impl Architecture {
    /// `hidden_act` of a config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for one that the architecture does not have.
    pub fn activation(&self, config: &HfConfig) -> Result<Activation> {
        let key = "hidden_act";
        let known = |name: &str| self.activations.iter().find(|a| a.name() == name).copied();
        match config.get(key) {
            Some(value) => value.as_str().and_then(known),
            None => self.hf_defaults.map(|d| d.activation),
        }
        .ok_or_else(|| config.bad(key, &self.activation_names()))
    }
}

/// config.json of a GGUF. `path` is for messages; `shape` gives the shape of the GGUF tensor of a
/// name, if there is one.
///
/// The weights are taken to be written as f32 without any quantization.
///
/// # Errors
/// [`Error::Config`] for an unsupported architecture, a missing key, or a rotary embedding that no
/// config.json can express; [`Error::Tensor`] if there is no token embedding.
pub fn hf_config(
    path: &Path,
    metadata: &[(String, gguf::Value)],
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
) -> Result<Value> {
    let keys = GgufKeys::new(path, metadata)?;
    let architecture = keys.architecture;
    let hidden = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let head_dim = head_dim(&keys, hidden, heads)?;
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
    let scaling = rope_scaling(&keys)?;
    let hidden_act = gguf_activation(&keys)?.name();
    let eps_key = "attention.layer_norm_rms_epsilon";
    let eps = keys.optional_float(eps_key)?;
    let mut config = json!({
        "architectures": [architecture.hf_class],
        "attention_bias": shape("blk.0.attn_q.bias").is_some(),
        "head_dim": head_dim,
        "hidden_act": hidden_act,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length")?,
        "max_position_embeddings": keys.size("context_length")?,
        "mlp_bias": shape("blk.0.ffn_up.bias").is_some(),
        "model_type": architecture.name,
        "num_attention_heads": heads,
        "num_hidden_layers": keys.size("block_count")?,
        "num_key_value_heads": keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
        "rms_norm_eps": eps.ok_or_else(|| keys.bad(eps_key, "a positive number"))?,
        "rope_scaling": scaling,
        "rope_theta": keys.optional_float("rope.freq_base")?.unwrap_or(10000.0),
        "tie_word_embeddings": shape("output.weight").is_none(),
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
    });
    for (key, id) in [
        ("bos_token_id", "bos_token_id"),
        ("pad_token_id", "padding_token_id"),
    ] {
        let id = find(metadata, &format!("tokenizer.ggml.{id}"));
        if let Some(id) = id.and_then(gguf::Value::as_u64) {
            config[key] = id.into();
        }
    }
    match end_ids::gguf_eos_ids(metadata).as_slice() {
        [] => {}
        [one] => config["eos_token_id"] = (*one).into(),
        several => config["eos_token_id"] = several.into(),
    }
    Ok(config)
}

/// Dimensions of a head. Keys, values and rotated dimensions must have the same number.
fn head_dim(keys: &GgufKeys, hidden: usize, heads: usize) -> Result<usize> {
    let key = "attention.key_length";
    let head_dim = match keys.optional_size(key)? {
        Some(n) => n,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("the size of one of {heads} heads of {hidden} dimensions");
            return Err(keys.bad(key, &expected));
        }
    };
    for (key, whose) in [
        ("attention.value_length", "key"),
        ("rope.dimension_count", "head"),
    ] {
        if keys.optional_size(key)?.is_some_and(|n| n != head_dim) {
            return Err(keys.bad(key, &format!("{head_dim}, the size of a {whose}")));
        }
    }
    Ok(head_dim)
}

/// `rope_scaling` of a config.json.
fn rope_scaling(keys: &GgufKeys) -> Result<Value> {
    let kind = keys.get("rope.scaling.type").map(gguf::Value::as_str);
    let factor = keys.optional_float("rope.scaling.factor")?;
    Ok(match (kind, factor) {
        (None | Some(Some("none")), _) | (Some(Some("linear")), None | Some(1.0)) => Value::Null,
        (Some(Some("linear")), Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
        _ => return Err(keys.bad("rope.scaling.type", "'none' or 'linear'")),
    })
}

/// The activation that a GGUF names, or that its architecture's name means.
fn gguf_activation(keys: &GgufKeys) -> Result<Activation> {
    let (key, architecture) = ("hidden_activation", keys.architecture);
    match keys.get(key) {
        Some(value) if architecture.gguf_activation => architecture
            .activations
            .iter()
            .find(|a| value.as_str() == Some(a.name()))
            .copied()
            .ok_or_else(|| keys.bad(key, &architecture.activation_names())),
        _ => Ok(keys.name.activation),
    }
}

#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
