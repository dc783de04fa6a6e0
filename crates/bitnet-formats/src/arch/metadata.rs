//! The keys of a GGUF from a config.json, and a config.json from the keys of a GGUF.

use super::architecture::{Activation, Architecture, BiasRule, LayerRule, ModelKind, ScaleRule};
use super::decoder::HfDecoder;
use super::delta_keys::add_delta_net;
use super::encoder::{self, HfEncoder};
use super::end_ids;
use super::experts::add_experts;
use super::keys::GgufKeys;
use super::layers::{LayerAttention, LayerRope};
use super::rope::{RopeScaling, llama3_scaling};
use super::tokenizer;
use super::values::{HfConfig, find};
use crate::{Error, Result};
use crate::{gguf, hints};
use serde_json::{Value, json};
use std::path::Path;

/// Tensor with the divisors of the rotation frequencies.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// Tensors with the divisors of short and of long texts (`longrope`).
const ROPE_FACTORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

/// Whether a tensor is part of the rotary positions: the other container derives it, or stores it
/// elsewhere.
pub fn is_rope_tensor(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name == ROPE_FREQS || ROPE_FACTORS.contains(&name)
}

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
    /// Divisors of the rotation frequencies, to be written as f32 tensors of these names.
    pub rope_tensors: Vec<(&'static str, Vec<f32>)>,
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
    if architecture.kind == ModelKind::Encoder {
        return encoder_metadata(folder, &config);
    }
    let mut notes = vec![];
    let decoder = HfDecoder::read(&config, architecture)?;
    if decoder.vocab > MAX_VOCAB {
        return Err(config.bad("vocab_size", &format!("at most {MAX_VOCAB}")));
    }
    check_limits(&config, architecture, &decoder, &mut notes)?;
    let mut keys = NewKeys {
        prefix: architecture.gguf_name(),
        metadata: general_keys(folder, architecture),
    };
    keys.decoder(&decoder);
    keys.rope(&decoder, &mut notes);
    keys.layers(&config, architecture, &decoder)?;
    keys.scales(architecture, &decoder, &mut notes);
    keys.size("vocab_size", decoder.vocab);
    if let Some((key, value)) = encoder::pooling_key(folder, decoder.hidden, &mut notes)? {
        keys.put(key, value);
    }
    if architecture.gguf_activation {
        keys.put("hidden_activation", decoder.activation.name().into());
        if decoder.activation == Activation::Relu2 {
            notes.push(
                "versions of llama.cpp that do not read bitnet.hidden_activation compute SiLU instead of \
                 relu2 without a warning, among them the one in llama-cpp-python 0.3.36"
                    .into(),
            );
        }
    }
    let mut metadata = keys.metadata;
    let vocab_size = decoder.vocab;
    let rope_tensors = match decoder.rope.scaling {
        RopeScaling::Llama3(freqs) => vec![(ROPE_FREQS, freqs)],
        RopeScaling::LongRope { divisors, long, .. } => {
            ROPE_FACTORS.into_iter().zip([divisors, long]).collect()
        }
        _ => vec![],
    };
    let mut resolved = config.value.clone();
    resolved["eos_token_id"] = end_ids::eos_ids(folder, &config)?.into();
    let mut losses = vec![];
    let said = (&mut losses, &mut notes);
    let tokenizer = tokenizer::gguf_tokenizer(folder, &resolved, vocab_size, said)?;
    metadata.extend(tokenizer);
    Ok(GgufMetadata {
        architecture,
        metadata,
        rope_tensors,
        notes,
        losses,
    })
}

/// [`gguf_metadata`] of an encoder.
fn encoder_metadata(folder: &Path, config: &HfConfig) -> Result<GgufMetadata> {
    let facts = HfEncoder::read(config)?;
    let architecture = facts.architecture;
    let mut keys = NewKeys {
        prefix: architecture.gguf_name(),
        metadata: general_keys(folder, architecture),
    };
    let (mut notes, mut losses) = (vec![], vec![]);
    let pooling = encoder::pooling_key(folder, facts.hidden, &mut notes)?;
    for (key, value) in facts.gguf_keys().into_iter().chain(pooling) {
        keys.put(key, value);
    }
    let mut metadata = keys.metadata;
    let types = ("tokenizer.ggml.token_type_count", facts.token_types as u32);
    metadata.push((types.0.into(), gguf::Value::U32(types.1)));
    let said = (&mut losses, &mut notes);
    metadata.extend(tokenizer::gguf_tokenizer(
        folder,
        config.value,
        facts.vocab,
        said,
    )?);
    Ok(GgufMetadata {
        architecture,
        metadata,
        rope_tensors: vec![],
        notes,
        losses,
    })
}

/// Refuses a config that llama.cpp's graph of the architecture does not support.
fn check_limits(
    config: &HfConfig,
    architecture: &Architecture,
    decoder: &HfDecoder,
    notes: &mut Vec<String>,
) -> Result<()> {
    let name = architecture.name;
    for key in ["attention_bias", "mlp_bias"] {
        if config.flag(key)? && !architecture.gguf_biases {
            let expected = format!("false, since {name} in llama.cpp has no biases");
            return Err(config.bad(key, &expected));
        }
    }
    let scaling = match decoder.rope.scaling {
        RopeScaling::Llama3(_) if !architecture.gguf_rope_freqs => Some("llama3"),
        RopeScaling::LongRope { .. } if !architecture.gguf_rope_factors => Some("longrope"),
        _ => None,
    };
    if let Some(scaling) = scaling {
        let key = match config.get("rope_parameters") {
            Some(_) => "rope_parameters.rope_type",
            None => "rope_scaling.rope_type",
        };
        let expected = format!("a scaling that a GGUF of {name} can say");
        return Err(Error::config(
            config.path,
            key,
            expected,
            format!("'{scaling}'"),
        ));
    }
    if !architecture.gguf_head && !decoder.tied {
        notes.push(format!(
            "{name} in llama.cpp always uses the embedding as output matrix: a file with an \
             output.weight of its own is refused there"
        ));
    }
    if !architecture.gguf_tied && decoder.tied {
        notes.push(format!(
            "llama.cpp opens no {name} without an output matrix, and this model's is the embedding"
        ));
    }
    let windows = decoder.layers.iter().filter_map(|layer| layer.window);
    if let Some(window) = windows
        .min()
        .filter(|w| *w < decoder.context && !architecture.gguf_window)
    {
        notes.push(format!(
            "llama.cpp computes no sliding window for {name}: texts of more than {window} tokens get \
             other results there"
        ));
    }
    if let Some(experts) = &decoder.experts {
        experts.check_gguf(config, architecture)?;
    }
    Ok(())
}

/// The keys of a GGUF in the making.
pub(super) struct NewKeys {
    /// Before each key of the architecture.
    prefix: &'static str,
    metadata: Vec<(String, gguf::Value)>,
}

impl NewKeys {
    pub(super) fn put(&mut self, key: &str, value: gguf::Value) {
        self.metadata
            .push((format!("{}.{key}", self.prefix), value));
    }

    pub(super) fn size(&mut self, key: &str, n: usize) {
        self.put(key, gguf::Value::U32(n as u32));
    }

    fn float(&mut self, key: &str, x: f64) {
        self.put(key, (x as f32).into());
    }

    fn decoder(&mut self, decoder: &HfDecoder) {
        self.size("block_count", decoder.layers.len());
        self.size("context_length", decoder.context);
        self.size("embedding_length", decoder.hidden);
        self.size("feed_forward_length", decoder.ffn);
        self.size("attention.head_count", decoder.heads);
        self.size("attention.head_count_kv", decoder.kv_heads);
        self.float("attention.layer_norm_rms_epsilon", decoder.norm_eps);
        if decoder.head_dim * decoder.heads != decoder.hidden {
            self.size("attention.key_length", decoder.head_dim);
            self.size("attention.value_length", decoder.head_dim);
        }
        if let Some(experts) = &decoder.experts {
            self.size("expert_count", experts.count);
            self.size("expert_used_count", experts.used);
            self.size("expert_feed_forward_length", experts.ffn);
            if let Some(ffn) = experts.shared_ffn {
                self.size("expert_shared_feed_forward_length", ffn);
            }
        }
    }

    fn rope(&mut self, decoder: &HfDecoder, notes: &mut Vec<String>) {
        let rope = &decoder.rope;
        self.size("rope.dimension_count", rope.dims);
        self.float("rope.freq_base", rope.theta);
        match &rope.scaling {
            RopeScaling::None => {}
            RopeScaling::LongRope { context, .. } => {
                self.size("rope.scaling.original_context_length", *context);
                self.float("rope.scaling.attn_factor", rope.attention_factor);
            }
            RopeScaling::Dynamic => notes.push(format!(
                "dynamic rope scaling begins after {} positions: the file has none",
                decoder.context
            )),
            RopeScaling::Linear(factor) => {
                self.put("rope.scaling.type", "linear".into());
                self.float("rope.scaling.factor", *factor);
            }
            RopeScaling::Llama3(_) => {
                notes.push(format!("llama3 rope scaling is the tensor {ROPE_FREQS}"));
            }
            RopeScaling::Yarn(yarn) => {
                self.put("rope.scaling.type", "yarn".into());
                self.float("rope.scaling.factor", yarn.factor);
                let context = yarn.context as usize;
                self.size("rope.scaling.original_context_length", context);
                // llama.cpp multiplies this by what the factor means.
                let factor = rope.attention_factor / yarn.magnitude(1.0);
                if (factor - 1.0).abs() > 1e-9 {
                    self.float("rope.scaling.attn_factor", factor);
                }
                if yarn.beta_fast != 32.0 {
                    self.float("rope.scaling.yarn_beta_fast", yarn.beta_fast);
                }
                if yarn.beta_slow != 1.0 {
                    self.float("rope.scaling.yarn_beta_slow", yarn.beta_slow);
                }
                if !yarn.truncate {
                    notes.push(
                        "the bounds of yarn rope scaling are rounded to whole dimensions in a GGUF"
                            .into(),
                    );
                }
            }
        }
    }

    /// Windows and layers that do not rotate.
    fn layers(
        &mut self,
        config: &HfConfig,
        architecture: &Architecture,
        decoder: &HfDecoder,
    ) -> Result<()> {
        let layers = &decoder.layers;
        let refused = |key: &str, expected: &str| {
            let expected = format!("{expected} in a GGUF of {}", architecture.name);
            Err(config.bad(key, &expected))
        };
        let windows: Vec<Option<usize>> = layers.iter().map(|layer| layer.window).collect();
        let window = windows.iter().flatten().next().copied();
        match architecture.layers {
            LayerRule::Uniform => {}
            LayerRule::Window | LayerRule::SwitchedWindow | LayerRule::UpperWindow => {
                if windows.iter().any(|w| *w != window) {
                    return refused("max_window_layers", "a window in all layers or in none");
                }
            }
            LayerRule::SomeRotate => {
                let rotates = |i: usize| !(i + 1).is_multiple_of(SMOLLM3_INTERVAL);
                let fits =
                    |(i, l): (usize, &LayerAttention)| (l.rope != LayerRope::None) == rotates(i);
                if window.is_some() {
                    return refused("use_sliding_window", "false");
                }
                if !layers.iter().enumerate().all(fits) {
                    let key = match config.get("no_rope_layers") {
                        Some(_) => "no_rope_layers",
                        None => "no_rope_layer_interval",
                    };
                    return refused(key, "one layer in 4 without rotary positions");
                }
            }
            LayerRule::Delta => self.delta_net(config, architecture, decoder)?,
            LayerRule::Local => {
                let Some(pattern) = pattern(&windows) else {
                    return refused("layer_types", "windows in all layers but each n-th");
                };
                if pattern != GEMMA3_PATTERN {
                    self.size("attention.sliding_window_pattern", pattern);
                }
            }
        }
        if let Some(window) = window {
            self.size("attention.sliding_window", window);
        }
        if let Some(local) = &decoder.local_rope {
            if local.scaling != RopeScaling::None {
                let key = "rope_parameters.sliding_attention";
                return refused(
                    key,
                    "no scaling of the rotary positions of layers with a window",
                );
            }
            if local.theta != 10000.0 {
                self.float("rope.freq_base_swa", local.theta);
            }
        }
        Ok(())
    }

    fn scales(
        &mut self,
        architecture: &Architecture,
        decoder: &HfDecoder,
        notes: &mut Vec<String>,
    ) {
        let scales = decoder.scales;
        match architecture.scales {
            ScaleRule::Plain => {}
            ScaleRule::Minicpm => {
                self.put("embedding_scale", scales.embedding.into());
                self.put("residual_scale", scales.residual.into());
                // llama.cpp divides by it.
                self.float("logit_scale", 1.0 / f64::from(scales.logits));
            }
            ScaleRule::Gemma => {
                let (heads, dim) = (decoder.heads, decoder.head_dim);
                let default = gemma3_scores(decoder.layers.len(), decoder.hidden, heads, dim);
                if scales.scores != (1.0 / default.sqrt()) as f32 {
                    self.put("attention.scale", scales.scores.into());
                    notes.push(format!(
                        "llama.cpp takes {default} for query_pre_attn_scalar of a gemma3 and does \
                         not read attention.scale: its results differ"
                    ));
                }
                if let Some(cap) = scales.logit_cap {
                    self.put("final_logit_softcapping", cap.into());
                }
            }
        }
    }
}

/// n, where layer n and its multiples alone have no window; none where other layers have none.
fn pattern(windows: &[Option<usize>]) -> Option<usize> {
    let first = windows.iter().position(Option::is_none);
    let n = match first {
        Some(i) => i + 1,
        // The usual number, if no layer has it.
        None => GEMMA3_PATTERN.max(windows.len() + 1),
    };
    let fits = |(i, w): (usize, &Option<usize>)| w.is_none() == (i + 1).is_multiple_of(n);
    windows.iter().enumerate().all(fits).then_some(n)
}

/// `query_pre_attn_scalar` that llama.cpp takes for a gemma3: the size of a head, or in the largest
/// model, of 62 layers, the part of the embedding for a head.
fn gemma3_scores(layers: usize, hidden: usize, heads: usize, head_dim: usize) -> f64 {
    match layers {
        62 => (hidden / heads) as f64,
        _ => head_dim as f64,
    }
}

/// llama.cpp's smollm3: one layer in so many does not rotate.
const SMOLLM3_INTERVAL: usize = 4;

/// llama.cpp's gemma3: one layer in so many has no window, unless a key says it.
const GEMMA3_PATTERN: usize = 6;

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
    /// `hidden_act` of a config.json, or what the architecture calls so.
    ///
    /// # Errors
    /// [`Error::Config`] for one that the architecture does not have.
    pub fn activation(&self, config: &HfConfig) -> Result<Activation> {
        let key = self.hf_activation;
        let known = |name: &str| self.activations.iter().find(|a| a.name() == name).copied();
        match config.get(key) {
            Some(value) => value.as_str().and_then(known),
            None => self.hf_defaults.map(|d| d.activation),
        }
        .ok_or_else(|| config.bad(key, &self.activation_names()))
    }
}

/// config.json of a GGUF. `path` is for messages; `shape` gives the shape of the GGUF tensor of a
/// name, if there is one, and `values` the elements of a small one.
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
    values: &dyn Fn(&str) -> Result<Option<Vec<f32>>>,
) -> Result<Value> {
    let keys = GgufKeys::new(path, metadata)?;
    let architecture = keys.hf_architecture();
    if architecture.kind == ModelKind::Encoder {
        return encoder::hf_config(path, &keys, shape);
    }
    let hidden = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let (head_dim, rotated) = head_dim(&keys, hidden, heads)?;
    let Some(&[vocab_size, _]) = shape("token_embd.weight").as_deref() else {
        return Err(Error::tensor(
            path,
            "token_embd.weight",
            "a matrix [vocabulary, embedding]",
            "none",
        ));
    };
    let theta = keys.optional_float("rope.freq_base")?.unwrap_or(10000.0);
    let scaling = if shape(ROPE_FREQS).is_some() {
        let divisors = values(ROPE_FREQS)?.unwrap_or_default();
        llama3_scaling(&divisors, theta, rotated).ok_or_else(|| {
            let expected = "divisors of llama3 rope scaling; others no config.json can hold";
            Error::tensor(path, ROPE_FREQS, expected, format!("{divisors:.60?}"))
        })?
    } else {
        match values(ROPE_FACTORS[0])? {
            None => rope_scaling(&keys)?,
            Some(short) => long_rope(&keys, short, values)?,
        }
    };
    let hidden_act = gguf_activation(&keys)?.name();
    let eps_key = "attention.layer_norm_rms_epsilon";
    let eps = keys.optional_float(eps_key)?;
    let mut config = json!({
        "architectures": [architecture.hf_class],
        "attention_bias": shape("blk.0.attn_q.bias").is_some(),
        "head_dim": head_dim,
        architecture.hf_activation: hidden_act,
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
        "rope_theta": theta,
        "tie_word_embeddings": shape("output.weight").is_none(),
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
    });
    if architecture.partial_rotary {
        config["partial_rotary_factor"] = (rotated as f64 / head_dim as f64).into();
    }
    if matches!(architecture.biases, BiasRule::Qkv) {
        config["attention_bias"] = Value::Null;
    }
    add_layers(&keys, &mut config)?;
    add_experts(&keys, shape, &mut config)?;
    add_scales(&keys, head_dim, &mut config)?;
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

/// Dimensions of a head, and those that rotate. Keys and values must have the same number.
fn head_dim(keys: &GgufKeys, hidden: usize, heads: usize) -> Result<(usize, usize)> {
    let key = "attention.key_length";
    let head_dim = match keys.optional_size(key)? {
        Some(n) => n,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("the size of one of {heads} heads of {hidden} dimensions");
            return Err(keys.bad(key, &expected));
        }
    };
    let key = "attention.value_length";
    if keys.optional_size(key)?.is_some_and(|n| n != head_dim) {
        return Err(keys.bad(key, &format!("{head_dim}, the size of a key")));
    }
    let key = "rope.dimension_count";
    let rotated = keys.optional_size(key)?.unwrap_or(head_dim);
    if rotated > head_dim || (rotated != head_dim && !keys.architecture.partial_rotary) {
        return Err(keys.bad(key, &format!("{head_dim}, the size of a head")));
    }
    Ok((head_dim, rotated))
}

/// `rope_scaling` of a config.json.
fn rope_scaling(keys: &GgufKeys) -> Result<Value> {
    let kind = keys.get("rope.scaling.type").map(gguf::Value::as_str);
    let factor = keys.optional_float("rope.scaling.factor")?;
    let attention = keys.optional_float("rope.scaling.attn_factor")?;
    if attention.is_some_and(|f| f != 1.0) && kind != Some(Some("yarn")) {
        return Err(keys.bad("rope.scaling.attn_factor", "1 without yarn"));
    }
    Ok(match (kind, factor) {
        (None | Some(Some("none")), _) | (Some(Some("linear")), None | Some(1.0)) => Value::Null,
        (Some(Some("linear")), Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
        (Some(Some("yarn")), Some(factor)) => {
            let context = "rope.scaling.original_context_length";
            let mut scaling = json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": keys.size(context)?,
            });
            for (key, gguf) in [
                ("beta_fast", "rope.scaling.yarn_beta_fast"),
                ("beta_slow", "rope.scaling.yarn_beta_slow"),
            ] {
                if let Some(beta) = keys.optional_float(gguf)? {
                    scaling[key] = beta.into();
                }
            }
            if let Some(attention) = attention {
                let usual = 1.0 + 0.1 * factor.max(1.0).ln();
                scaling["attention_factor"] = (attention * usual).into();
            }
            scaling
        }
        _ => {
            let expected = "'none', 'linear' with a factor or 'yarn' with a factor";
            return Err(keys.bad("rope.scaling.type", expected));
        }
    })
}

/// `rope_scaling` of a file with divisors for short texts.
fn long_rope(
    keys: &GgufKeys,
    short: Vec<f32>,
    values: &dyn Fn(&str) -> Result<Option<Vec<f32>>>,
) -> Result<Value> {
    let key = "rope.scaling.original_context_length";
    // Without divisors for long texts, config.json cannot be read, which says so.
    let long = values(ROPE_FACTORS[1])?;
    let attention = keys.optional_float("rope.scaling.attn_factor")?;
    Ok(json!({
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": keys.size(key)?,
        "attention_factor": attention.unwrap_or(1.0),
    }))
}

/// `attention.sliding_window`; files of phi3 without one say 0.
fn sliding_window(keys: &GgufKeys) -> Result<Option<usize>> {
    let key = "attention.sliding_window";
    match keys.get(key).and_then(gguf::Value::as_u64) {
        Some(0) => Ok(None),
        _ => keys.optional_size(key),
    }
}

/// Windows and layers that do not rotate.
fn add_layers(keys: &GgufKeys, config: &mut Value) -> Result<()> {
    let window = sliding_window(keys)?;
    match keys.hf_architecture().layers {
        LayerRule::Uniform => {}
        LayerRule::Window => config["sliding_window"] = window.into(),
        rule @ (LayerRule::SwitchedWindow | LayerRule::UpperWindow) => {
            config["sliding_window"] = window.into();
            config["use_sliding_window"] = window.is_some().into();
            if rule == LayerRule::UpperWindow {
                config["max_window_layers"] = 0.into();
            }
        }
        LayerRule::SomeRotate => config["no_rope_layer_interval"] = SMOLLM3_INTERVAL.into(),
        LayerRule::Delta => add_delta_net(keys, config)?,
        LayerRule::Local => {
            let pattern = keys.optional_size("attention.sliding_window_pattern")?;
            config["sliding_window"] = keys.size("attention.sliding_window")?.into();
            config["sliding_window_pattern"] = pattern.unwrap_or(GEMMA3_PATTERN).into();
            let theta = keys.optional_float("rope.freq_base_swa")?;
            config["rope_local_base_freq"] = theta.unwrap_or(10000.0).into();
        }
    }
    Ok(())
}

/// Multipliers of embedding, scores, residual stream and logits.
fn add_scales(keys: &GgufKeys, head_dim: usize, config: &mut Value) -> Result<()> {
    let (layers, hidden) = (keys.size("block_count")?, keys.size("embedding_length")?);
    let heads = keys.size("attention.head_count")?;
    match keys.architecture.scales {
        ScaleRule::Plain => {}
        ScaleRule::Minicpm => {
            let float = |key: &str, default: f64| Ok(keys.optional_float(key)?.unwrap_or(default));
            // llama.cpp's defaults for files that are older than the keys.
            let root = (layers as f64).sqrt();
            config["scale_emb"] = float("embedding_scale", 12.0)?.into();
            config["scale_depth"] = (float("residual_scale", 1.4 / root)? * root).into();
            let divisor = float("logit_scale", hidden as f64 / 256.0)?;
            config["dim_model_base"] = (hidden as f64 / divisor).into();
        }
        ScaleRule::Gemma => {
            let scalar = match keys.optional_float("attention.scale")? {
                Some(scale) => 1.0 / (scale * scale),
                None => gemma3_scores(layers, hidden, heads, head_dim),
            };
            config["query_pre_attn_scalar"] = scalar.into();
            let cap = keys.optional_float("final_logit_softcapping")?;
            config["final_logit_softcapping"] = cap.into();
        }
    }
    Ok(())
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
