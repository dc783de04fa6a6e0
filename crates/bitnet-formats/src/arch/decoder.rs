//! A decoder's config.json, read once for conversion and inference.

use super::architecture::{Activation, Architecture, BiasRule, ScaleRule};
use super::delta::DeltaShape;
use super::experts::Experts;
use super::layers::LayerAttention;
use super::rope::HfRope;
use super::values::HfConfig;
use crate::Result;

/// Which linear layers have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// The output projection of attention.
    pub out: bool,
    /// Gate, up and down.
    pub mlp: bool,
}

/// What multiplies embedding, scores, residual stream and logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scales {
    /// Of the embedding.
    pub embedding: f32,
    /// Of the scores of attention.
    pub scores: f32,
    /// Of what attention and feed-forward add to the residual stream.
    pub residual: f32,
    /// Of the input of the output matrix.
    pub logits: f32,
    /// `c` in `c · tanh(logit / c)`.
    pub logit_cap: Option<f32>,
}

/// The facts of a decoder's config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct HfDecoder {
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub ffn: usize,
    /// Each layer.
    pub layers: Vec<LayerAttention>,
    /// Sizes of the layers that are gated delta nets, if any are.
    pub delta: Option<DeltaShape>,
    /// `num_attention_heads`.
    pub heads: usize,
    /// `num_key_value_heads`; a divisor of `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// `vocab_size`.
    pub vocab: usize,
    /// `max_position_embeddings`.
    pub context: usize,
    /// `rms_norm_eps`.
    pub norm_eps: f64,
    /// Activation of the feed-forward gate.
    pub activation: Activation,
    /// Rotary positions.
    pub rope: HfRope,
    /// Rotary positions of layers with a window, where they have their own.
    pub local_rope: Option<HfRope>,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// Biases.
    pub biases: Biases,
    /// Multipliers.
    pub scales: Scales,
    /// Experts, where layers have them.
    pub experts: Option<Experts>,
}

impl HfDecoder {
    /// Reads and checks a config.json. A missing key has the default of
    /// [`Architecture::hf_defaults`]; another missing key is an error.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key that is missing, is no value of its kind,
    /// contradicts another, or asks for what the graph does not compute.
    pub fn read(config: &HfConfig, architecture: &Architecture) -> Result<Self> {
        let defaults = architecture.hf_defaults;
        let hidden = config.size("hidden_size")?;
        let heads = config.size("num_attention_heads")?;
        let kv_heads = match (config.optional_size("num_key_value_heads")?, defaults) {
            (Some(n), _) => n,
            (None, Some(defaults)) => defaults.kv_heads.unwrap_or(heads),
            (None, None) => return Err(config.bad("num_key_value_heads", "a positive number")),
        };
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of {heads} heads");
            return Err(config.bad("num_key_value_heads", &expected));
        }
        let head_dim = head_dim(config, architecture, hidden, heads)?;
        let layers = LayerAttention::read(config, architecture)?;
        Ok(Self {
            hidden,
            ffn: config.size("intermediate_size")?,
            delta: DeltaShape::read(config, &layers)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: config.size("vocab_size")?,
            context: config.size("max_position_embeddings")?,
            norm_eps: config.float_or("rms_norm_eps", defaults.map(|d| d.rms_norm_eps))?,
            activation: architecture.activation(config)?,
            rope: HfRope::read(config, architecture, head_dim)?,
            local_rope: HfRope::read_local(config, architecture, head_dim)?,
            tied: config.flag_or("tie_word_embeddings", defaults.is_some_and(|d| d.tied))?,
            biases: biases(config, architecture)?,
            scales: scales(config, architecture, hidden, head_dim)?,
            experts: Experts::read(config, architecture)?,
        })
    }
}

fn head_dim(
    config: &HfConfig,
    architecture: &Architecture,
    hidden: usize,
    heads: usize,
) -> Result<usize> {
    let key = "head_dim";
    let default = architecture.hf_defaults.and_then(|d| d.head_dim);
    let head_dim = match config.optional_size(key)?.or(default) {
        Some(n) => n,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!(
                "the size of one of {heads} heads, which do not divide hidden_size {hidden}"
            );
            return Err(config.bad(key, &expected));
        }
    };
    if architecture.heads_fill_hidden && head_dim.checked_mul(heads) != Some(hidden) {
        let expected =
            format!("{hidden} / {heads}, since the norm of the heads has hidden_size elements");
        return Err(config.bad(key, &expected));
    }
    Ok(head_dim)
}

fn biases(config: &HfConfig, architecture: &Architecture) -> Result<Biases> {
    let [attention, mlp] = [config.flag("attention_bias")?, config.flag("mlp_bias")?];
    let none = |key: &str, there: bool| match there {
        true => Err(config.bad(
            key,
            &format!("false: {} has no such biases", architecture.name),
        )),
        false => Ok(()),
    };
    match architecture.biases {
        BiasRule::Config => {}
        BiasRule::Attention => none("mlp_bias", mlp)?,
        BiasRule::Qkv => {
            none("mlp_bias", mlp)?;
            if !config.flag_or("qkv_bias", true)? {
                let expected = format!("true: q, k and v of {} have biases", architecture.name);
                return Err(config.bad("qkv_bias", &expected));
            }
            return Ok(Biases {
                qkv: true,
                ..Biases::default()
            });
        }
        BiasRule::None => {
            none("attention_bias", attention)?;
            none("mlp_bias", mlp)?;
        }
    }
    Ok(Biases {
        qkv: attention,
        out: attention,
        mlp,
    })
}

fn scales(
    config: &HfConfig,
    architecture: &Architecture,
    hidden: usize,
    head_dim: usize,
) -> Result<Scales> {
    let plain = Scales {
        embedding: 1.0,
        scores: 1.0 / (head_dim as f32).sqrt(),
        residual: 1.0,
        logits: 1.0,
        logit_cap: None,
    };
    Ok(match architecture.scales {
        ScaleRule::Plain => plain,
        ScaleRule::Minicpm => {
            let key = "sparse_config";
            if config.get(key).is_some() {
                return Err(config.bad(key, "none, since this graph does not compute it"));
            }
            let layers = config.size("num_hidden_layers")? as f64;
            let depth = config.float_or("scale_depth", Some(1.0))?;
            let base = config.float_or("dim_model_base", Some(1.0))?;
            Scales {
                embedding: config.float_or("scale_emb", Some(1.0))? as f32,
                residual: (depth / layers.sqrt()) as f32,
                logits: (base / hidden as f64) as f32,
                ..plain
            }
        }
        ScaleRule::Gemma => {
            for key in ["attn_logit_softcapping", "use_bidirectional_attention"] {
                if config.get(key).is_some_and(|v| *v != false) {
                    return Err(config.bad(key, "none, since this graph does not compute it"));
                }
            }
            let scalar = config.float_or("query_pre_attn_scalar", Some(256.0))?;
            Scales {
                // Of the type that the graph computes in, f32.
                embedding: (hidden as f32).sqrt(),
                scores: (1.0 / scalar.sqrt()) as f32,
                logit_cap: config
                    .optional_float("final_logit_softcapping")?
                    .map(|cap| cap as f32),
                ..plain
            }
        }
    })
}
