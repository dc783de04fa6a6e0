//! The architectures. Each is one [`Architecture`]: facts that conversion, inference and training
//! read. A new one is a `static` here and a place in [`ARCHITECTURES`].

use super::values::{find, shown};
use crate::{Error, Result, gguf};
use serde_json::Value;
use std::fmt;
use std::path::Path;

/// The function between the gate and the product of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^−x)`.
    Silu,
    /// `max(x, 0)²`.
    Relu2,
}

impl Activation {
    /// Its name in config.json and in GGUF files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Relu2 => "relu2",
        }
    }
}

/// The equations of a decoder's layers; bitnet-inference's `arch` has them, one file for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecoderGraph {
    /// RMS norms before attention and feed-forward, grouped-query attention with rotary positions,
    /// and a gated feed-forward.
    Llama,
    /// Llama's, with a norm before each output projection.
    Bitnet,
}

/// A value of `general.architecture`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufName {
    /// The value, which is also the prefix of the architecture's keys.
    pub name: &'static str,
    /// What a file without the key `hidden_activation` computes.
    pub activation: Activation,
}

/// Values that Hugging Face's configuration class has for keys that a config.json leaves out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HfDefaults {
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// `hidden_act`.
    pub activation: Activation,
}

/// A model architecture: names, conventions and limits in Hugging Face folders and in GGUF files,
/// and the graphs that compute it.
#[derive(Clone, Copy, PartialEq)]
pub struct Architecture {
    /// `model_type` of a config.json, and the name in messages.
    pub name: &'static str,
    /// Its class in transformers: `architectures` of a config.json.
    pub hf_class: &'static str,
    /// Its values of `general.architecture`. The first is written.
    pub gguf_names: &'static [GgufName],
    /// Keys of a GGUF, without prefix, that a graph follows or that do not matter to it.
    pub gguf_keys: &'static [&'static str],
    /// Modules outside the layers: Hugging Face's name and ggml's.
    pub modules: &'static [(&'static str, &'static str)],
    /// Modules of a layer: the part after `model.layers.N.`, and the part after `blk.N.`.
    pub layer_modules: &'static [(&'static str, &'static str)],
    /// Whether llama.cpp rotates adjacent dimensions of a head, so that the rows of q and k change
    /// places. Hugging Face rotates dimension i with i + d/2 in every model.
    pub gguf_adjacent_pairs: bool,
    /// Whether llama.cpp's graph has biases.
    pub gguf_biases: bool,
    /// Whether llama.cpp reads an output matrix of its own; otherwise it takes the embedding.
    pub gguf_head: bool,
    /// Whether a GGUF names the activation, under `hidden_activation`.
    pub gguf_activation: bool,
    /// Whether the heads together must have `hidden_size` dimensions.
    pub heads_fill_hidden: bool,
    /// Whether `llama3` scaling of rotary positions is known.
    pub llama3_rope: bool,
    /// The activations that it may have.
    pub activations: &'static [Activation],
    /// The activation of a new model.
    pub new_activation: Activation,
    /// Defaults of config.json; without any, every key must be there.
    pub hf_defaults: Option<HfDefaults>,
    /// Whether published models were trained with int8 activations.
    pub int8_activations: bool,
    /// The graph that bitnet-inference computes; none if it has none.
    pub inference: Option<DecoderGraph>,
    /// The graph that bitnet-train differentiates; none if it has none.
    pub training: Option<DecoderGraph>,
}

/// `llama` on both sides.
pub static LLAMA: Architecture = Architecture {
    name: "llama",
    hf_class: "LlamaForCausalLM",
    gguf_names: &[GgufName {
        name: "llama",
        activation: Activation::Silu,
    }],
    gguf_keys: &DECODER_KEYS,
    modules: &DECODER_MODULES,
    layer_modules: &LAYER_MODULES,
    gguf_adjacent_pairs: true,
    gguf_biases: true,
    gguf_head: true,
    gguf_activation: false,
    heads_fill_hidden: false,
    llama3_rope: true,
    activations: &[Activation::Silu],
    new_activation: Activation::Silu,
    hf_defaults: Some(HfDefaults {
        rope_theta: 10000.0,
        rms_norm_eps: 1e-6,
        activation: Activation::Silu,
    }),
    int8_activations: false,
    inference: Some(DecoderGraph::Llama),
    training: Some(DecoderGraph::Llama),
};

/// `bitnet` in Hugging Face folders; `bitnet`, `bitnet-b1.58` or `bitnet-25` in GGUF files.
///
/// Mainline llama.cpp knows the name `bitnet` alone, and computes SiLU for a file without the key
/// `bitnet.hidden_activation`: so that key is always written. Hugging Face's configuration class
/// has defaults, on which no published model relies.
pub static BITNET: Architecture = Architecture {
    name: "bitnet",
    hf_class: "BitNetForCausalLM",
    gguf_names: &[
        GgufName {
            name: "bitnet",
            activation: Activation::Silu,
        },
        GgufName {
            name: "bitnet-b1.58",
            activation: Activation::Relu2,
        },
        GgufName {
            name: "bitnet-25",
            activation: Activation::Relu2,
        },
    ],
    gguf_keys: &DECODER_KEYS,
    modules: &DECODER_MODULES,
    layer_modules: &LAYER_MODULES,
    gguf_adjacent_pairs: false,
    gguf_biases: false,
    gguf_head: false,
    gguf_activation: true,
    heads_fill_hidden: true,
    llama3_rope: false,
    activations: &[Activation::Silu, Activation::Relu2],
    new_activation: Activation::Relu2,
    hf_defaults: None,
    int8_activations: true,
    inference: Some(DecoderGraph::Bitnet),
    training: Some(DecoderGraph::Bitnet),
};

/// All architectures.
pub static ARCHITECTURES: &[&Architecture] = &[&LLAMA, &BITNET];

/// Modules of a decoder outside its layers.
const DECODER_MODULES: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Modules of a decoder's layer, sub-norms among them.
const LAYER_MODULES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.attn_sub_norm", "attn_sub_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.ffn_sub_norm", "ffn_sub_norm"),
];

/// Keys of a GGUF, without prefix, that the decoder graphs follow or that do not affect them.
const DECODER_KEYS: [&str; 20] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "vocab_size",
    "hidden_activation",
    "tensor_data_layout",
    "attention.causal",
    "tie_word_embeddings",
];

impl Architecture {
    /// The architecture of a `model_type`.
    pub fn by_name(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().copied().find(|a| a.name == name)
    }

    /// From `model_type` of a config.json; `path` is for the message.
    ///
    /// # Errors
    /// [`Error::Config`] for any other model type.
    pub fn from_hf_config(path: &Path, config: &Value) -> Result<&'static Self> {
        let key = "model_type";
        let value = config.get(key);
        let known = value.and_then(Value::as_str).and_then(Self::by_name);
        let architecture = known.ok_or_else(|| {
            let names = ARCHITECTURES.iter().map(|a| a.name);
            Error::config(path, key, one_of(names), shown(value))
        })?;
        architecture.check_class(path, config)?;
        Ok(architecture)
    }

    /// Refuses the first BitNet models: by `model_type` they are a llama, but their own class makes
    /// the weights ternary in each forward pass and has two norms more.
    fn check_class(&self, path: &Path, config: &Value) -> Result<()> {
        let bits = config.get("weight_bits").filter(|v| !v.is_null());
        let class = config.pointer("/architectures/0").and_then(Value::as_str);
        let bitnet = |class: &str| class == "BitnetForCausalLM";
        let is_bitnet = class.is_some_and(bitnet);
        let few_bits = bits.is_some_and(|b| b.as_f64().is_none_or(|b| b < 16.0));
        if self.name == BITNET.name || !(is_bitnet || few_bits) {
            return Ok(());
        }
        let expected = format!(
            "{} with weights that are used as they are stored; only quantize and dequantize take \
             others",
            self.hf_class
        );
        let (key, value) = match bits {
            Some(bits) => ("weight_bits", Some(bits)),
            None => ("architectures", config.get("architectures")),
        };
        let got = format!(
            "{} of a {}, whose weights are made ternary in each forward pass",
            shown(value),
            class.unwrap_or("model without a class")
        );
        Err(Error::config(path, key, expected, got))
    }

    /// From `general.architecture` of a GGUF.
    ///
    /// # Errors
    /// [`Error::Config`] for any other architecture.
    pub fn from_gguf(metadata: &[(String, gguf::Value)]) -> Result<&'static Self> {
        Self::named(metadata).map(|(architecture, _)| architecture)
    }

    /// [`Architecture::from_gguf`], with the name that the file has for it.
    pub(super) fn named(
        metadata: &[(String, gguf::Value)],
    ) -> Result<(&'static Self, &'static GgufName)> {
        let key = "general.architecture";
        let got = find(metadata, key).and_then(gguf::Value::as_str);
        gguf_names()
            .find(|(_, known)| Some(known.name) == got)
            .ok_or_else(|| {
                Error::config(
                    Path::new("GGUF metadata"),
                    key,
                    one_of(gguf_names().map(|(_, known)| known.name)),
                    got.map_or("none".into(), |s| format!("'{s}'")),
                )
            })
    }

    /// The graph that bitnet-inference computes; `path` is for the message.
    ///
    /// # Errors
    /// [`Error::Config`] for an architecture that bitnet-inference does not compute.
    pub fn inference_graph(&self, path: &Path) -> Result<DecoderGraph> {
        self.graph(path, "run", |a| a.inference)
    }

    /// The graph that bitnet-train differentiates; `path` is for the message.
    ///
    /// # Errors
    /// [`Error::Config`] for an architecture that bitnet-train does not train.
    pub fn training_graph(&self, path: &Path) -> Result<DecoderGraph> {
        self.graph(path, "trained", |a| a.training)
    }

    fn graph(
        &self,
        path: &Path,
        used: &str,
        of: fn(&Self) -> Option<DecoderGraph>,
    ) -> Result<DecoderGraph> {
        of(self).ok_or_else(|| {
            let known = ARCHITECTURES.iter().filter(|a| of(a).is_some());
            let expected = format!(
                "a model that can be {used}: {}",
                one_of(known.map(|a| a.name))
            );
            Error::config(path, "model_type", expected, format!("'{}'", self.name))
        })
    }

    /// The name that is written as `general.architecture`, and before each key of the architecture.
    pub const fn gguf_name(&self) -> &'static str {
        self.gguf_names[0].name
    }

    /// The activations that it may have, as text for a message: `'silu' or 'relu2'`.
    pub(super) fn activation_names(&self) -> String {
        one_of(self.activations.iter().map(|a| a.name()))
    }
}

impl fmt::Debug for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Architecture").field(&self.name).finish()
    }
}

/// Each architecture with each of its names in GGUF files.
fn gguf_names() -> impl Iterator<Item = (&'static Architecture, &'static GgufName)> {
    ARCHITECTURES
        .iter()
        .flat_map(|&a| a.gguf_names.iter().map(move |name| (a, name)))
}

/// The architecture whose prefix a key has, and the key without it.
pub fn strip_prefix(key: &str) -> Option<(&'static Architecture, &str)> {
    gguf_names().find_map(|(architecture, known)| {
        let rest = key.strip_prefix(known.name)?.strip_prefix('.')?;
        Some((architecture, rest))
    })
}

/// `'a', 'b' or 'c'`.
fn one_of(names: impl Iterator<Item = &'static str>) -> String {
    let quoted: Vec<String> = names.map(|name| format!("'{name}'")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn architectures_and_what_is_not_one() {
        let path = Path::new("config.json");
        for architecture in ARCHITECTURES {
            let config = json!({"model_type": architecture.name});
            let found = Architecture::from_hf_config(path, &config).unwrap();
            assert_eq!(found, *architecture);
        }
        for (config, got) in [
            (json!({"model_type": "qwen3"}), "\"qwen3\""),
            (json!({}), "none"),
        ] {
            let message = Architecture::from_hf_config(path, &config)
                .unwrap_err()
                .to_string();
            assert!(
                message.contains("'llama' or 'bitnet'") && message.contains(got),
                "{message}"
            );
        }
        let named =
            |name: &str| Architecture::from_gguf(&[("general.architecture".into(), name.into())]);
        assert_eq!(named("llama").unwrap(), &LLAMA);
        for name in ["bitnet", "bitnet-b1.58", "bitnet-25"] {
            assert_eq!(named(name).unwrap(), &BITNET);
        }
        let message = named("gemma").unwrap_err().to_string();
        assert!(
            message.contains("'llama', 'bitnet', 'bitnet-b1.58' or 'bitnet-25', got 'gemma'"),
            "{message}"
        );
        let none = Architecture::from_gguf(&[]).unwrap_err().to_string();
        assert!(none.contains("got none"), "{none}");
    }

    /// 1bitLLM's first models: their class computes something else than llama's.
    #[test]
    fn a_llama_that_is_made_ternary_is_refused() {
        let path = Path::new("config.json");
        let read = |class: &str, bits: Value| {
            let config =
                json!({"model_type": "llama", "architectures": [class], "weight_bits": bits});
            Architecture::from_hf_config(path, &config)
        };
        for (class, bits) in [
            ("BitnetForCausalLM", json!(1)),
            ("BitnetForCausalLM", Value::Null),
            ("LlamaForCausalLM", json!(1)),
        ] {
            let message = read(class, bits.clone()).unwrap_err().to_string();
            assert!(
                message.contains("ternary in each forward pass"),
                "{message}"
            );
            assert!(message.contains(class) || bits == 1, "{message}");
        }
        for bits in [Value::Null, json!(16)] {
            assert_eq!(read("LlamaForCausalLM", bits).unwrap(), &LLAMA);
        }
    }

    /// Conversion needs no graph. A qwen3 model that is trained as llama would lose its norms of q
    /// and k.
    #[test]
    fn an_architecture_without_a_graph_is_refused() {
        let qwen3 = Architecture {
            name: "qwen3",
            inference: None,
            training: None,
            ..LLAMA
        };
        let path = Path::new("config.json");
        assert_eq!(
            qwen3.training_graph(path).unwrap_err().to_string(),
            "config.json: model_type: expected a model that can be trained: 'llama' or 'bitnet', \
             got 'qwen3'"
        );
        let message = qwen3.inference_graph(path).unwrap_err().to_string();
        assert!(
            message.contains("can be run: 'llama' or 'bitnet'"),
            "{message}"
        );
        assert_eq!(BITNET.training_graph(path).unwrap(), DecoderGraph::Bitnet);
    }

    #[test]
    fn names_and_graphs_belong_to_one_architecture() {
        let mut seen = std::collections::BTreeSet::new();
        for (architecture, known) in gguf_names() {
            assert!(seen.insert(known.name), "{} twice", known.name);
            assert_eq!(
                strip_prefix(&format!("{}.block_count", known.name)),
                Some((architecture, "block_count"))
            );
        }
        for architecture in ARCHITECTURES {
            assert!(
                architecture
                    .activations
                    .contains(&architecture.new_activation)
            );
            // A run measures what it trained with the inference engine.
            assert!(architecture.training.is_none() || architecture.inference.is_some());
        }
        assert_eq!(strip_prefix("general.architecture"), None);
        assert_eq!(strip_prefix("llama"), None);
    }
}
