//! What describes an architecture: facts that conversion, inference and training read. The
//! descriptions are in `known.rs`.

use super::experts::ExpertRule;
use super::known::{ARCHITECTURES, BITNET, DECODER_KEYS};
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
    /// `x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2`.
    GeluTanh,
}

impl Activation {
    /// Its name in config.json and in GGUF files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Relu2 => "relu2",
            Self::GeluTanh => "gelu_pytorch_tanh",
        }
    }
}

/// What a model computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelKind {
    /// The next token.
    Decoder,
    /// A vector for each token, which depends on all tokens of the text.
    Encoder,
}

impl ModelKind {
    /// What Hugging Face names of a layer's tensors begin with, before its number.
    pub(super) const fn hf_layers(self) -> &'static str {
        match self {
            Self::Decoder => "model.layers.",
            Self::Encoder => "encoder.layer.",
        }
    }
}

/// The parts of a decoder's layers. All have RMS norms before attention and feed-forward,
/// grouped-query attention and a gated feed-forward; the fields say what differs.
/// bitnet-inference's `arch/decoder.rs` has the equations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderGraph {
    /// Module of the norm before the feed-forward.
    pub ffn_norm: &'static str,
    /// Modules of the norms of what attention and feed-forward add to the residual stream.
    pub post_norms: Option<[&'static str; 2]>,
    /// Whether there is a norm before each output projection: `attn_sub_norm`, `ffn_sub_norm`.
    pub sub_norms: bool,
    /// Whether each head of q and of k has a norm: `q_norm`, `k_norm`.
    pub head_norms: bool,
    /// Whether each head of q has a gate beside it in the rows of `q_proj`: its sigmoid multiplies
    /// what the head attends to.
    pub output_gate: bool,
    /// Whether q, k and v are one matrix (`qkv_proj`), and gate and up (`gate_up_proj`).
    pub fused: bool,
}

impl DecoderGraph {
    /// Llama's layer, which has none of the parts that others add.
    pub const LLAMA: Self = Self {
        ffn_norm: "post_attention_layernorm",
        post_norms: None,
        sub_norms: false,
        head_norms: false,
        output_gate: false,
        fused: false,
    };
}

/// Which linear layers have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BiasRule {
    /// `attention_bias` of a config.json says so for q, k, v and o, `mlp_bias` for the rest.
    Config,
    /// `attention_bias` says so for q, k, v and o; the rest has none.
    Attention,
    /// q, k and v have them, nothing else.
    Qkv,
    /// None has.
    None,
}

/// How a config.json says what a layer sees and how it rotates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRule {
    /// Each layer sees all positions and rotates.
    Uniform,
    /// `sliding_window` holds for each layer.
    Window,
    /// `use_sliding_window` turns `sliding_window` on for each layer.
    SwitchedWindow,
    /// `use_sliding_window` turns `sliding_window` on, from layer `max_window_layers` on or where
    /// `layer_types` says so.
    UpperWindow,
    /// `no_rope_layers` says which layers rotate, or one in `no_rope_layer_interval` does not.
    /// `use_sliding_window` turns `sliding_window` on in those that do not, or where `layer_types`
    /// says so.
    SomeRotate,
    /// One layer in `sliding_window_pattern` sees all positions; the others see a window and have
    /// rotary positions of their own, or so where `layer_types` says it.
    Local,
    /// `layer_types` says which layers are gated delta nets, or all are but one in
    /// `full_attention_interval`.
    Delta,
}

/// What multiplies embedding, scores, residual stream and logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleRule {
    /// Scores by `1/√head_dim`; nothing else.
    Plain,
    /// `scale_emb`, `scale_depth` and `dim_model_base` of minicpm.
    Minicpm,
    /// The embedding by `√hidden_size`, scores by `1/√query_pre_attn_scalar`, and
    /// `final_logit_softcapping`.
    Gemma,
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
    /// The activation.
    pub activation: Activation,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// `num_key_value_heads`; none for as many as heads.
    pub kv_heads: Option<usize>,
    /// `head_dim`; none for `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// `partial_rotary_factor`.
    pub rotary_factor: f64,
}

/// A model architecture: names, conventions and limits in Hugging Face folders and in GGUF files,
/// and the graphs that compute it.
#[derive(Clone, Copy, PartialEq)]
pub struct Architecture {
    /// What a model computes.
    pub kind: ModelKind,
    /// `model_type` of a config.json, and the name in messages.
    pub name: &'static str,
    /// Its class in transformers: `architectures` of a config.json.
    pub hf_class: &'static str,
    /// Its values of `general.architecture`. The first is written.
    pub gguf_names: &'static [GgufName],
    /// Keys of a GGUF, without prefix, that its graph follows beside those of all decoders.
    pub gguf_keys: &'static [&'static str],
    /// Modules outside the layers: Hugging Face's name and ggml's.
    pub modules: &'static [(&'static str, &'static str)],
    /// Modules of a layer: the part after `model.layers.N.`, and the part after `blk.N.`.
    pub layer_modules: &'static [(&'static str, &'static str)],
    /// Tensors of a layer that are no weight or bias of a module, in the same way.
    pub layer_tensors: &'static [(&'static str, &'static str)],
    /// Whether llama.cpp rotates adjacent dimensions of a head, so that the rows of q and k change
    /// places. Hugging Face rotates dimension i with i + d/2 in every model.
    pub gguf_adjacent_pairs: bool,
    /// Whether llama.cpp's graph has biases.
    pub gguf_biases: bool,
    /// Whether llama.cpp reads an output matrix of its own; otherwise it takes the embedding.
    pub gguf_head: bool,
    /// Whether llama.cpp takes the embedding where a file has no output matrix.
    pub gguf_tied: bool,
    /// Whether a GGUF names the activation, under `hidden_activation`.
    pub gguf_activation: bool,
    /// Whether the heads together must have `hidden_size` dimensions.
    pub heads_fill_hidden: bool,
    /// Whether llama.cpp reads divisors of the rotation frequencies: `llama3` scaling.
    pub gguf_rope_freqs: bool,
    /// Whether llama.cpp reads such divisors for short and for long texts: `longrope` scaling.
    pub gguf_rope_factors: bool,
    /// Whether llama.cpp's graph has sliding windows.
    pub gguf_window: bool,
    /// Whether `partial_rotary_factor` is followed; otherwise it must be 1.
    pub partial_rotary: bool,
    /// Which linear layers have biases.
    pub biases: BiasRule,
    /// What each layer sees and how it rotates.
    pub layers: LayerRule,
    /// What multiplies embedding, scores, residual stream and logits.
    pub scales: ScaleRule,
    /// How it mixes experts, if it does.
    pub experts: Option<ExpertRule>,
    /// Whether a Hugging Face norm with weights w multiplies by `1 + w`. A GGUF stores the factor.
    pub hf_norms_from_one: bool,
    /// Key of the activation in a config.json.
    pub hf_activation: &'static str,
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

impl Architecture {
    /// The architecture of a `model_type`.
    pub fn by_name(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().copied().find(|a| a.name == name)
    }

    /// The architecture of a config.json, if its `model_type` is known.
    pub fn of(config: &Value) -> Option<&'static Self> {
        Self::by_name(config.get("model_type").and_then(Value::as_str)?)
    }

    /// The defaults for keys that a config.json leaves out, if its `model_type` is known and has any.
    pub fn hf_defaults_of(config: &Value) -> Option<HfDefaults> {
        Self::of(config)?.hf_defaults
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
            let got = match self.kind {
                ModelKind::Decoder => format!("'{}'", self.name),
                ModelKind::Encoder => {
                    format!("'{}', an encoder, which bitnet embed takes", self.name)
                }
            };
            Error::config(path, "model_type", expected, got)
        })
    }

    /// Whether the graph follows a key of a GGUF, given without prefix, or is not affected by it.
    pub fn follows_gguf_key(&self, key: &str) -> bool {
        DECODER_KEYS.contains(&key) || self.gguf_keys.contains(&key)
    }

    /// The architecture of the same GGUF name whose layers have windows: mistral of llama.
    pub(super) fn with_windows(&self) -> Option<&'static Self> {
        let same = |a: &&&Self| a.gguf_name() == self.gguf_name() && a.layers != LayerRule::Uniform;
        ARCHITECTURES.iter().find(same).copied()
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

/// Each architecture with each of its names in GGUF files; one whose names all belong to an earlier
/// one is found by [`Architecture::with_windows`].
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
    use super::super::known::LLAMA;
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
            (json!({"model_type": "mamba"}), "\"mamba\""),
            (json!({}), "none"),
        ] {
            let message = Architecture::from_hf_config(path, &config)
                .unwrap_err()
                .to_string();
            assert!(
                message.contains("'llama', 'bitnet', 'qwen2'") && message.contains(got),
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
            message.contains("'llama', 'bitnet', 'bitnet-b1.58', 'bitnet-25', 'qwen2'")
                && message.contains("got 'gemma'"),
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

    /// Conversion needs no graph. A model that is trained as llama would lose what llama has
    /// not.
    #[test]
    fn an_architecture_without_a_graph_is_refused() {
        let other = Architecture {
            name: "other",
            inference: None,
            training: None,
            ..LLAMA
        };
        let path = Path::new("config.json");
        assert_eq!(
            other.training_graph(path).unwrap_err().to_string(),
            "config.json: model_type: expected a model that can be trained: 'llama', 'bitnet', 'qwen2', \
             'qwen3', 'mistral' or 'smollm3', got 'other'"
        );
        let message = other.inference_graph(path).unwrap_err().to_string();
        assert!(
            message.contains("can be run: 'llama', 'bitnet', 'qwen2'"),
            "{message}"
        );
        assert!(BITNET.training_graph(path).unwrap().sub_norms);
    }

    #[test]
    fn names_and_graphs_belong_to_one_architecture() {
        for (architecture, known) in gguf_names() {
            // Two may share a name, as mistral and llama do: the first reads it.
            let key = format!("{}.block_count", known.name);
            let (first, rest) = strip_prefix(&key).unwrap();
            assert_eq!(rest, "block_count");
            assert!(first == architecture || first.layer_modules == architecture.layer_modules);
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
