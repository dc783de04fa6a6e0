//! What the graph needs to know from config.json.

use crate::Result;
use bitnet_formats::arch::{Activation, Architecture, BITNET, HfConfig, HfRope, LLAMA};
use std::path::Path;

/// Architectures whose graph [`super::build`] makes.
static EXPORTED: [&Architecture; 2] = [&LLAMA, &BITNET];

/// Most positions of the rotary tables, 1 GiB of f32 for heads of 128.
const MAX_CONTEXT: usize = 1 << 21;

/// Sizes and choices of a decoder. Which norms and biases it has, its tensors say.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) architecture: &'static Architecture,
    pub(crate) hidden: usize,
    pub(crate) ffn: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab: usize,
    pub(crate) context: usize,
    pub(crate) norm_eps: f32,
    pub(crate) activation: Activation,
    /// Whether the embedding is the output matrix.
    pub(crate) tied: bool,
    /// Radians per position of the pairs of a head.
    pub(crate) frequencies: Vec<f32>,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Vec<u32>,
    pub(crate) pad: Option<u32>,
}

impl Facts {
    /// From a config.json; `path` is for messages.
    pub(crate) fn read(path: &Path, value: &serde_json::Value) -> Result<Self> {
        let architecture = Architecture::from_hf_config(path, value)?;
        if !EXPORTED.contains(&architecture) {
            let names: Vec<_> = EXPORTED.iter().map(|a| format!("'{}'", a.name)).collect();
            let expected = format!(
                "a model that has an ONNX graph here, {}; write a GGUF or a folder instead",
                names.join(" or ")
            );
            let got = format!("'{}'", architecture.name);
            return Err(bitnet_formats::Error::config(path, "model_type", expected, got).into());
        }
        let config = HfConfig { path, value };
        let (hidden, heads) = (
            config.size("hidden_size")?,
            config.size("num_attention_heads")?,
        );
        let kv_heads = config.optional_size("num_key_value_heads")?;
        let kv_heads = kv_heads.unwrap_or(heads);
        let head_dim = match config.optional_size("head_dim")? {
            Some(n) => n,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                let expected =
                    format!("the size of one of {heads} heads, which do not divide {hidden}");
                return Err(config.bad("head_dim", &expected).into());
            }
        };
        if heads % kv_heads != 0 {
            let expected = format!("a divisor of {heads} heads");
            return Err(config.bad("num_key_value_heads", &expected).into());
        }
        if !head_dim.is_multiple_of(16) {
            let expected = "a multiple of 16, which onnxruntime's attention rotates; write a GGUF \
                            or a folder instead";
            let got = head_dim.to_string();
            return Err(bitnet_formats::Error::config(path, "head_dim", expected, got).into());
        }
        let rope = HfRope::read(&config, architecture, head_dim)?;
        let frequency = |i: usize| {
            let divisor = match (&rope.freqs, rope.linear) {
                (Some(divisors), _) => divisors.get(i).copied().map_or(1.0, f64::from),
                // The divisor of an f32 everywhere.
                (None, linear) => linear.map_or(1.0, |factor| f64::from(factor as f32)),
            };
            (rope.theta.powf(-((2 * i) as f64) / head_dim as f64) / divisor) as f32
        };
        let context = config.size("max_position_embeddings")?;
        if context > MAX_CONTEXT {
            let expected = format!("at most {MAX_CONTEXT}");
            return Err(config.bad("max_position_embeddings", &expected).into());
        }
        let eps = architecture.hf_defaults.map(|d| d.rms_norm_eps);
        Ok(Self {
            architecture,
            hidden,
            ffn: config.size("intermediate_size")?,
            layers: layers(&config)?,
            heads,
            kv_heads,
            head_dim,
            vocab: config.size("vocab_size")?,
            context,
            norm_eps: config.float_or("rms_norm_eps", eps)? as f32,
            activation: architecture.activation(&config)?,
            tied: config.flag("tie_word_embeddings")?,
            frequencies: (0..head_dim / 2).map(frequency).collect(),
            bos: config.token_ids("bos_token_id")?.first().copied(),
            eos: config.token_ids("eos_token_id")?,
            pad: config.token_ids("pad_token_id")?.first().copied(),
        })
    }
}

/// The number of layers, bounded: each is some twenty nodes before any tensor is looked at.
fn layers(config: &HfConfig) -> Result<usize> {
    const MOST: usize = 1 << 12;
    match config.size("num_hidden_layers")? {
        n if n <= MOST => Ok(n),
        _ => Err(config
            .bad("num_hidden_layers", &format!("at most {MOST}"))
            .into()),
    }
}
