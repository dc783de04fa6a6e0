//! What the graph needs to know from config.json.

use crate::Result;
use bitnet_formats::Error as FileError;
use bitnet_formats::arch::{
    Activation, Architecture, DecoderGraph, HfConfig, HfDecoder, LayerAttention, Scales,
};
use std::path::Path;

/// Most positions of the rotary tables, 1 GiB of f32 for heads of 128.
const MAX_CONTEXT: usize = 1 << 21;

/// Sizes and choices of a decoder.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) architecture: &'static Architecture,
    pub(crate) graph: DecoderGraph,
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
    /// Multiplier of sines and cosines.
    pub(crate) attention_factor: f32,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Vec<u32>,
    pub(crate) pad: Option<u32>,
}

impl Facts {
    /// From a config.json; `path` is for messages.
    pub(crate) fn read(path: &Path, value: &serde_json::Value) -> Result<Self> {
        let architecture = Architecture::from_hf_config(path, value)?;
        let graph = architecture.inference_graph(path)?;
        let config = HfConfig { path, value };
        let decoder = HfDecoder::read(&config, architecture)?;
        if let Some((key, got)) = beyond_the_graph(architecture, &graph, &decoder) {
            let expected = "a decoder that has an ONNX graph here, which are llama, bitnet, qwen2 \
                            and qwen3 without windows; write a GGUF or a folder instead";
            let got = format!("'{}' with {got}", architecture.name);
            return Err(FileError::config(path, key, expected, got).into());
        }
        if !decoder.head_dim.is_multiple_of(16) {
            let expected = "a multiple of 16, which onnxruntime's attention rotates; write a GGUF \
                            or a folder instead";
            let got = decoder.head_dim.to_string();
            return Err(FileError::config(path, "head_dim", expected, got).into());
        }
        if decoder.context > MAX_CONTEXT {
            let expected = format!("at most {MAX_CONTEXT}");
            return Err(config.bad("max_position_embeddings", &expected).into());
        }
        let (theta, dims) = (decoder.rope.theta, decoder.rope.dims);
        let divisors = decoder.rope.divisors();
        let frequency = |i: usize| {
            let divisor = divisors.as_ref().map_or(1.0, |d| f64::from(d[i]));
            (theta.powf(-((2 * i) as f64) / dims as f64) / divisor) as f32
        };
        Ok(Self {
            architecture,
            graph,
            hidden: decoder.hidden,
            ffn: decoder.ffn,
            layers: decoder.layers.len(),
            heads: decoder.heads,
            kv_heads: decoder.kv_heads,
            head_dim: decoder.head_dim,
            vocab: decoder.vocab,
            context: decoder.context,
            norm_eps: decoder.norm_eps as f32,
            activation: decoder.activation,
            tied: decoder.tied,
            frequencies: (0..dims / 2).map(frequency).collect(),
            attention_factor: decoder.rope.attention_factor as f32,
            bos: config.token_ids("bos_token_id")?.first().copied(),
            eos: config.token_ids("eos_token_id")?,
            pad: config.token_ids("pad_token_id")?.first().copied(),
        })
    }
}

/// What a decoder has that [`super::build`] makes no nodes for: the key that says so, and what it
/// is.
fn beyond_the_graph(
    architecture: &Architecture,
    graph: &DecoderGraph,
    decoder: &HfDecoder,
) -> Option<(&'static str, &'static str)> {
    let plain = Scales {
        embedding: 1.0,
        scores: 1.0 / (decoder.head_dim as f32).sqrt(),
        residual: 1.0,
        logits: 1.0,
        logit_cap: None,
    };
    let parts = [
        (graph.fused, "model_type", "fused matrices"),
        (
            decoder.experts.is_some(),
            "model_type",
            "mixtures of experts",
        ),
        (
            graph.post_norms.is_some(),
            "model_type",
            "norms behind attention and feed-forward",
        ),
        (
            architecture.hf_norms_from_one,
            "model_type",
            "norms of 1 + w",
        ),
        (decoder.scales != plain, "model_type", "scaled activations"),
        (
            !decoder.layers.iter().all(|l| *l == LayerAttention::FULL),
            "model_type",
            "windows, or layers without rotation",
        ),
        (
            decoder.rope.dims != decoder.head_dim,
            "partial_rotary_factor",
            "heads that rotate in part",
        ),
        (
            decoder.activation == Activation::GeluTanh,
            "hidden_act",
            "another activation",
        ),
    ];
    let found = parts.into_iter().find(|(there, ..)| *there);
    found.map(|(_, key, what)| (key, what))
}
