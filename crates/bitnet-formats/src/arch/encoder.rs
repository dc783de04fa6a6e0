//! Encoders: the facts of a bert's config.json, and the keys of its GGUF.

use super::architecture::{Architecture, ModelKind};
use super::keys::GgufKeys;
use super::sentence::{Pooling, SentenceFiles};
use super::values::HfConfig;
use crate::{Error, Result, gguf};
use serde_json::{Value, json};
use std::path::Path;

/// ε of a LayerNorm where config.json has none, as in Hugging Face's configuration class.
const NORM_EPS: f64 = 1e-12;
/// Token types where config.json has none.
const TOKEN_TYPES: usize = 2;

/// The facts of an encoder's config.json.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HfEncoder {
    /// The description of the architecture.
    pub architecture: &'static Architecture,
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub ffn: usize,
    /// `num_hidden_layers`.
    pub layers: usize,
    /// `num_attention_heads`; a divisor of `hidden`.
    pub heads: usize,
    /// `vocab_size`.
    pub vocab: usize,
    /// `max_position_embeddings`: rows of the position embedding.
    pub context: usize,
    /// `type_vocab_size`: rows of the token type embedding.
    pub token_types: usize,
    /// `layer_norm_eps`, added to the variance.
    pub norm_eps: f64,
}

impl HfEncoder {
    /// Reads and checks a config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for a model that is no encoder, and for a key that is missing, is no value
    /// of its kind, contradicts another, or asks for what the graph does not compute.
    pub fn read(config: &HfConfig) -> Result<Self> {
        let architecture = Architecture::from_hf_config(config.path, config.value)?;
        if architecture.kind != ModelKind::Encoder {
            return Err(config.bad("model_type", "an encoder: 'bert'"));
        }
        for (key, only) in [
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
        ] {
            if config.get(key).is_some_and(|v| *v != only) {
                let expected = format!("'{only}', since this graph computes nothing else");
                return Err(config.bad(key, &expected));
            }
        }
        for key in ["is_decoder", "add_cross_attention"] {
            if config.flag(key)? {
                return Err(config.bad(key, "false, since this graph is an encoder"));
            }
        }
        let bounded = |key: &str, most: usize| match config.size(key)? {
            n if n <= most => Ok(n),
            _ => Err(config.bad(key, &format!("at most {most}"))),
        };
        let hidden = bounded("hidden_size", 1 << 17)?;
        let heads = bounded("num_attention_heads", 1 << 12)?;
        if !hidden.is_multiple_of(heads) {
            let expected = format!("a divisor of hidden_size {hidden}");
            return Err(config.bad("num_attention_heads", &expected));
        }
        let token_types = config.optional_size("type_vocab_size")?;
        Ok(Self {
            architecture,
            hidden,
            ffn: bounded("intermediate_size", 1 << 20)?,
            layers: bounded("num_hidden_layers", 1 << 12)?,
            heads,
            vocab: bounded("vocab_size", 1 << 22)?,
            context: bounded("max_position_embeddings", 1 << 20)?,
            token_types: token_types.unwrap_or(TOKEN_TYPES),
            norm_eps: config.float_or("layer_norm_eps", Some(NORM_EPS))?,
        })
    }

    /// The keys of a GGUF, without prefix.
    pub(super) fn gguf_keys(&self) -> Vec<(&'static str, gguf::Value)> {
        let size = |n: usize| gguf::Value::U32(n as u32);
        vec![
            ("block_count", size(self.layers)),
            ("context_length", size(self.context)),
            ("embedding_length", size(self.hidden)),
            ("feed_forward_length", size(self.ffn)),
            ("attention.head_count", size(self.heads)),
            (
                "attention.layer_norm_epsilon",
                (self.norm_eps as f32).into(),
            ),
            ("attention.causal", false.into()),
            ("vocab_size", size(self.vocab)),
        ]
    }
}

/// The pooling of the folder's sentence-transformers files, as the key of a GGUF, without prefix.
/// `notes` gets what the file does not say.
pub(super) fn pooling_key(
    folder: &Path,
    hidden: usize,
    notes: &mut Vec<String>,
) -> Result<Option<(&'static str, gguf::Value)>> {
    let Some(files) = SentenceFiles::read(folder, hidden)? else {
        return Ok(None);
    };
    let key = files.pooling.and_then(Pooling::gguf_type);
    match files.pooling {
        Some(pooling) if key.is_none() => notes.push(format!(
            "a GGUF has no name for the pooling {pooling}: embed with --pooling {pooling}"
        )),
        Some(_) if !files.normalize => notes.push(
            "a GGUF does not say that vectors keep their length: embed with --no-normalize".into(),
        ),
        _ => {}
    }
    if files.prompts.iter().any(|(_, text)| !text.is_empty()) {
        notes.push("a GGUF has no prompts: put them before the texts".into());
    }
    Ok(key.map(|n| (POOLING_TYPE, gguf::Value::U32(n))))
}

/// Key of the pooling in a GGUF, without prefix.
const POOLING_TYPE: &str = "pooling_type";

/// The pooling that a GGUF names, if it names one: none inside if it names that it has none.
///
/// # Errors
/// [`Error::Config`] for one that this program does not compute.
pub fn gguf_pooling(
    path: &Path,
    metadata: &[(String, gguf::Value)],
) -> Result<Option<Option<Pooling>>> {
    let keys = GgufKeys::new(path, metadata)?;
    let Some(value) = keys.get(POOLING_TYPE) else {
        return Ok(None);
    };
    match value.as_u64() {
        Some(0) => Ok(Some(None)),
        n => match n.and_then(Pooling::from_gguf_type) {
            Some(pooling) => Ok(Some(Some(pooling))),
            None => Err(keys.bad(POOLING_TYPE, "0 (none), 1 (mean), 2 (cls) or 3 (last)")),
        },
    }
}

/// config.json of an encoder's GGUF.
pub(super) fn hf_config(
    path: &Path,
    keys: &GgufKeys,
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
) -> Result<Value> {
    let rows = |name: &str| match shape(name).as_deref() {
        Some(&[rows, _]) => Ok(rows),
        Some(shape) => Err(Error::tensor(path, name, "a matrix", format!("{shape:?}"))),
        None => Err(Error::tensor(path, name, "an embedding", "no such tensor")),
    };
    if keys
        .get("attention.causal")
        .is_some_and(|v| v.as_bool() == Some(true))
    {
        return Err(keys.bad("attention.causal", "false, since this graph is an encoder"));
    }
    let eps_key = "attention.layer_norm_epsilon";
    let eps = keys.optional_float(eps_key)?;
    Ok(json!({
        "architectures": [keys.architecture.hf_class],
        "hidden_act": "gelu",
        "hidden_size": keys.size("embedding_length")?,
        "intermediate_size": keys.size("feed_forward_length")?,
        "layer_norm_eps": eps.ok_or_else(|| keys.bad(eps_key, "a positive number"))?,
        "max_position_embeddings": rows("position_embd.weight")?,
        "model_type": keys.architecture.name,
        "num_attention_heads": keys.size("attention.head_count")?,
        "num_hidden_layers": keys.size("block_count")?,
        "position_embedding_type": "absolute",
        "torch_dtype": "float32",
        "type_vocab_size": rows("token_types.weight")?,
        "vocab_size": rows("token_embd.weight")?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minilm() -> Value {
        json!({
            "model_type": "bert", "hidden_act": "gelu", "hidden_size": 384,
            "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
            "vocab_size": 30522, "max_position_embeddings": 512,
        })
    }

    fn read(value: &Value) -> Result<HfEncoder> {
        let path = Path::new("config.json");
        HfEncoder::read(&HfConfig { path, value })
    }

    #[test]
    fn facts_and_their_defaults() {
        let facts = read(&minilm()).unwrap();
        assert_eq!((facts.hidden, facts.heads, facts.context), (384, 12, 512));
        assert_eq!((facts.token_types, facts.norm_eps), (2, 1e-12));
    }

    #[test]
    fn what_the_graph_does_not_compute_is_refused_by_its_key() {
        for (key, value) in [
            ("hidden_act", json!("gelu_new")),
            ("position_embedding_type", json!("relative_key")),
            ("is_decoder", json!(true)),
            ("add_cross_attention", json!(true)),
            ("num_attention_heads", json!(7)),
            ("layer_norm_eps", json!(0)),
            ("hidden_size", json!(1 << 20)),
            ("vocab_size", Value::Null),
            ("model_type", json!("llama")),
        ] {
            let mut config = minilm();
            config[key] = value;
            let message = read(&config).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }
}
