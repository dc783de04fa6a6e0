//! The decoders of [`bitnet_inference`] as graphs with gradients: llama's layer with the parts that
//! [`DecoderGraph`] and config.json turn on. These are the sub-norms and squared ReLU of bitnet, the
//! norms of the heads of q and k of qwen3, biases (qwen2), and layers without rotary positions
//! (smollm3).
//!
//! Embedding and output matrix are layers too, so they are quantized where the configuration says
//! so. Their inputs stay floats, as in the engine: the rows of a fake-quantized embedding are looked
//! up, and a tied one multiplies the last hidden state.

use super::gain;
use crate::ops::{self, Angles};
use crate::{Error, Result};
use bitnet_formats::arch::{ARCHITECTURES, Architecture, DecoderGraph, LayerRope, LayerRule};
use bitnet_inference::{Activation, Config};
use bitnet_quant::qat::{Linear, Linears};
use candle_core::{Module, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// The shape of a decoder with random weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecoderShape {
    /// An architecture with a training graph: `llama`, `bitnet` (with sub-norms and `relu²`),
    /// `qwen3` (with norms of the heads of q and k), `qwen2`, `mistral` or `smollm3`.
    pub architecture: String,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Elements of the feed-forward product.
    pub ffn: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Elements of a head. Default: `hidden / heads`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Base of the rotary position embedding.
    pub rope_theta: f64,
    /// Whether the embedding is also the output matrix.
    pub tied: bool,
}

impl Default for DecoderShape {
    /// A llama of about a million parameters.
    fn default() -> Self {
        Self {
            architecture: "llama".into(),
            hidden: 128,
            ffn: 384,
            layers: 5,
            heads: 4,
            kv_heads: 2,
            head_dim: None,
            rope_theta: 10_000.0,
            tied: true,
        }
    }
}

impl DecoderShape {
    /// The config.json of this shape.
    ///
    /// # Errors
    /// [`Error::Option`] for an architecture without a graph.
    pub fn config_json(&self, vocabulary: usize, context: usize) -> Result<Value> {
        let Some(architecture) =
            Architecture::by_name(&self.architecture).filter(|a| a.training.is_some())
        else {
            let trained = ARCHITECTURES.iter().filter(|a| a.training.is_some());
            let names: Vec<&str> = trained.map(|a| a.name).collect();
            return Err(Error::option(
                "model.architecture",
                names.join(" or "),
                format!("'{}'", self.architecture),
            ));
        };
        let mut config = json!({
            "architectures": [architecture.hf_class],
            "model_type": architecture.name,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim.unwrap_or(self.hidden / self.heads.max(1)),
            "vocab_size": vocabulary,
            "max_position_embeddings": context,
            "hidden_act": architecture.new_activation.name(),
            "rms_norm_eps": 1e-6,
            "rope_theta": self.rope_theta,
            "rope_scaling": null,
            "tie_word_embeddings": self.tied,
            "attention_bias": false,
            "mlp_bias": false,
            "initializer_range": 0.02,
            "torch_dtype": "float32",
        });
        if architecture.layers != LayerRule::Uniform {
            // Classes of transformers have tokens and windows of the published models as defaults.
            for key in [
                "sliding_window",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
            ] {
                config[key] = Value::Null;
            }
        }
        Ok(config)
    }
}

/// Weights of a layer; D = heads · head_dim, V = kv_heads · head_dim.
#[derive(Debug)]
struct DecoderLayer {
    /// `[hidden]`.
    attention_norm: Tensor,
    /// Q `(D, hidden)`, K and V `(V, hidden)`, O `(hidden, D)`.
    attention: [Linear; 4],
    /// Of each head of q and of k, `[head_dim]`.
    head_norms: Option<[Tensor; 2]>,
    /// Whether q and k rotate by their positions.
    rotates: bool,
    /// Over all heads together, `[D]`.
    attention_sub_norm: Option<Tensor>,
    /// `[hidden]`.
    ffn_norm: Tensor,
    /// Gate and up `(ffn, hidden)`, down `(hidden, ffn)`.
    ffn: [Linear; 3],
    /// `[ffn]`.
    ffn_sub_norm: Option<Tensor>,
}

/// Intermediate results of a forward pass, for distillation.
#[derive(Debug, Default)]
pub struct Trace {
    /// The residual stream after each layer, `[B, T, hidden]`.
    pub hidden: Vec<Tensor>,
    /// Queries `[B, T, D]`, keys and values `[B, T, V]` of the last layer before rotation, and a
    /// number of heads that divides D and V.
    pub relations: Option<([Tensor; 3], usize)>,
}

/// A decoder. The equations are in `arch` of `bitnet_inference`. Variables have their Hugging Face
/// names.
#[derive(Debug)]
pub struct DecoderModel {
    config: Config,
    /// `(vocab, hidden)`.
    embedding: Linear,
    layers: Vec<DecoderLayer>,
    norm: Tensor,
    /// `(vocab, hidden)`; none if the embedding is the output matrix.
    head: Option<Linear>,
    angles: Angles,
}

const ATTENTION: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];
const FFN: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Name of the embedding among the layers of a decoder.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";
/// Name of the output matrix, if it is not the embedding.
pub(crate) const HEAD: &str = "lm_head";

impl DecoderLayer {
    fn new(config: &Config, layer: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let graph = config.graph;
        let (hidden, ffn) = (config.hidden, config.ffn);
        let (d, v) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let (attention, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
        let project = |i: usize, inputs, outputs| {
            let vb = attention.pp(ATTENTION[i]);
            let bias = if i == 3 {
                config.biases.out
            } else {
                config.biases.qkv
            };
            Linear::new(inputs, outputs, bias, &vb)
        };
        let feed = |i: usize, inputs, outputs| {
            Linear::new(inputs, outputs, config.biases.mlp, &mlp.pp(FFN[i]))
        };
        let sub_norm = |vb: VarBuilder<'_>, len| match graph.sub_norms {
            true => gain(&vb, len).map(Some),
            false => Ok(None),
        };
        let head_norms = if graph.head_norms {
            let norm = |name: &str| gain(&attention.pp(name), config.head_dim);
            Some([norm("q_norm")?, norm("k_norm")?])
        } else {
            None
        };
        Ok(Self {
            attention_norm: gain(&vb.pp("input_layernorm"), hidden)?,
            attention: [
                project(0, hidden, d)?,
                project(1, hidden, v)?,
                project(2, hidden, v)?,
                project(3, d, hidden)?,
            ],
            head_norms,
            rotates: config.attention[layer].rope != LayerRope::None,
            attention_sub_norm: sub_norm(attention.pp("attn_sub_norm"), d)?,
            ffn_norm: gain(&vb.pp(graph.ffn_norm), hidden)?,
            ffn: [
                feed(0, hidden, ffn)?,
                feed(1, hidden, ffn)?,
                feed(2, ffn, hidden)?,
            ],
            ffn_sub_norm: sub_norm(mlp.pp("ffn_sub_norm"), ffn)?,
        })
    }
}

impl DecoderModel {
    /// A decoder of this config.json with the variables of `vb`, for up to `positions` positions.
    /// New embeddings are drawn with the deviation `initializer_range`.
    ///
    /// # Errors
    /// As [`Config::from_hf`] and [`Architecture::training_graph`]; [`Error::Option`] for scaled or
    /// partial rotary positions, for windows that are smaller than `positions`, and for more
    /// positions than the model has; variables of another shape.
    pub fn new(path: &Path, json: &Value, positions: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let config = Config::from_hf(path, json)?;
        config.architecture.training_graph(path)?;
        check_trainable(&config, json, positions)?;
        let deviation = json
            .get("initializer_range")
            .and_then(Value::as_f64)
            .unwrap_or(0.02);
        let (model, layers) = (vb.pp("model"), vb.pp("model.layers"));
        let embedding = vb.pp(EMBEDDING).get_with_hints(
            (config.vocab, config.hidden),
            "weight",
            Init::Randn {
                mean: 0.0,
                stdev: deviation,
            },
        )?;
        let embedding = Linear::Full(candle_nn::Linear::new(embedding, None));
        let layers = (0..config.layers).map(|i| DecoderLayer::new(&config, i, &layers.pp(i)));
        let layers = layers.collect::<Result<_>>()?;
        let norm = gain(&model.pp("norm"), config.hidden)?;
        let head = if config.tied {
            None
        } else {
            let vb = vb.pp(HEAD);
            Some(Linear::new(config.hidden, config.vocab, false, &vb)?)
        };
        let angles = Angles::new(config.rope.theta, config.head_dim, positions);
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            head,
            angles,
        })
    }

    /// The config of the graph.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Logits `[B, T, vocab]` of tokens `[B, T]`.
    ///
    /// # Errors
    /// For tokens outside the vocabulary and too many positions.
    pub fn forward(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        self.run(tokens, None)
    }

    /// [`DecoderModel::forward`] with intermediate results.
    ///
    /// # Errors
    /// As [`DecoderModel::forward`].
    pub fn forward_traced(&self, tokens: &Tensor) -> candle_core::Result<(Tensor, Trace)> {
        let mut trace = Trace::default();
        Ok((self.run(tokens, Some(&mut trace))?, trace))
    }

    fn run(&self, tokens: &Tensor, mut trace: Option<&mut Trace>) -> candle_core::Result<Tensor> {
        let (batch, positions) = tokens.dims2()?;
        let shape = (batch, positions, self.config.hidden);
        let embedding = self.embedding.weights().map_err(into_candle)?;
        let mut x = embedding
            .index_select(&tokens.flatten_all()?, 0)?
            .reshape(shape)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let last = i + 1 == self.layers.len();
            x = (&x + self.attention(layer, &x, trace.as_deref_mut().filter(|_| last))?)?;
            x = (&x + self.feed_forward(layer, &x)?)?;
            if let Some(trace) = &mut trace {
                trace.hidden.push(x.clone());
            }
        }
        let x = self.rms_norm(&x, &self.norm)?;
        let head = match &self.head {
            Some(head) => head.weights().map_err(into_candle)?,
            None => embedding,
        };
        x.reshape(((), self.config.hidden))?
            .matmul(&head.t()?)?
            .reshape((batch, positions, self.config.vocab))
    }

    fn rms_norm(&self, x: &Tensor, gain: &Tensor) -> candle_core::Result<Tensor> {
        ops::rms_norm(x, gain, f64::from(self.config.norm_eps))
    }

    /// RMS norm of each head of `[B, T, H·D]`.
    fn head_norm(&self, x: &Tensor, gain: &Tensor) -> candle_core::Result<Tensor> {
        let heads = x.reshape(((), self.config.head_dim))?;
        self.rms_norm(&heads, gain)?.reshape(x.shape())
    }

    /// `o · sub_norm(Attention(rope(norm(q·z)), rope(norm(k·z)), v·z))`, z = RMS(x).
    fn attention(
        &self,
        layer: &DecoderLayer,
        x: &Tensor,
        trace: Option<&mut Trace>,
    ) -> candle_core::Result<Tensor> {
        let (batch, positions, _) = x.dims3()?;
        let Config {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.config;
        let z = self.rms_norm(x, &layer.attention_norm)?;
        let [q, k, v, o] = &layer.attention;
        let [mut q, mut k, v] = [q.forward(&z)?, k.forward(&z)?, v.forward(&z)?];
        if let Some([of_q, of_k]) = &layer.head_norms {
            (q, k) = (self.head_norm(&q, of_q)?, self.head_norm(&k, of_k)?);
        }
        if let Some(trace) = trace {
            trace.relations = Some(([q.clone(), k.clone(), v.clone()], kv_heads));
        }
        let angles = Some(&self.angles).filter(|_| layer.rotates);
        let q = ops::heads_first(&q, heads, angles)?;
        let k = ops::heads_first(&k, kv_heads, angles)?;
        let v = ops::heads_first(&v, kv_heads, None)?;
        // The queries of the heads that share a key head are stacked, so one product serves them.
        let grouped = q.reshape((batch, kv_heads, heads / kv_heads * positions, head_dim))?;
        let scores = grouped.matmul(&k.transpose(2, 3)?)?;
        let mixed = ops::causal_softmax(&scores, self.config.scales.scores)?.matmul(&v)?;
        let mut mixed = ops::heads_last(&mixed.reshape((batch, heads, positions, head_dim))?)?;
        if let Some(gain) = &layer.attention_sub_norm {
            mixed = self.rms_norm(&mixed, gain)?;
        }
        o.forward(&mixed)
    }

    /// `down · sub_norm(f(gate·z) ⊙ up·z)`, z = RMS(x).
    fn feed_forward(&self, layer: &DecoderLayer, x: &Tensor) -> candle_core::Result<Tensor> {
        let z = self.rms_norm(x, &layer.ffn_norm)?;
        let [gate, up, down] = &layer.ffn;
        let (gate, up) = (gate.forward(&z)?, up.forward(&z)?);
        let mut product = match self.config.activation {
            Activation::Silu => ops::silu_gate(&gate, &up)?,
            Activation::Relu2 => ops::relu2_gate(&gate, &up)?,
            other @ Activation::GeluTanh => {
                candle_core::bail!("{} has no gradient here", other.name())
            }
        };
        if let Some(gain) = &layer.ffn_sub_norm {
            product = self.rms_norm(&product, gain)?;
        }
        down.forward(&product)
    }
}

/// Rejects a config that asks for what the graph does not differentiate, by the key that does.
fn check_trainable(config: &Config, json: &Value, positions: usize) -> Result<()> {
    // The parts that the equations here have beside llama's.
    let graph = DecoderGraph {
        sub_norms: config.graph.sub_norms,
        head_norms: config.graph.head_norms,
        ..DecoderGraph::LLAMA
    };
    let scales = config.scales;
    let plain = [scales.embedding, scales.residual, scales.logits] == [1.0; 3]
        && scales.logit_cap.is_none()
        && config.local_rope.is_none();
    if config.graph != graph || !plain || config.activation == Activation::GeluTanh {
        let known = "a model whose parts have gradients here";
        return Err(Error::option("model_type", known, config.architecture.name));
    }
    if config.rope.divisors.is_some() || config.rope.attention_factor != 1.0 {
        let key = ["rope_scaling", "rope_parameters"].map(|key| (key, &json[key]));
        let found = key.into_iter().find(|(_, value)| !value.is_null());
        let (key, value) = found.unwrap_or(("rope_scaling", &Value::Null));
        let expected = "no scaling, in a model to be trained";
        return Err(Error::option(key, expected, value.to_string()));
    }
    if config.rope.dims != config.head_dim {
        let expected = format!(
            "1, in a model to be trained: all {} elements of a head rotate",
            config.head_dim
        );
        let got = config.rope.dims as f64 / config.head_dim as f64;
        return Err(Error::option("partial_rotary_factor", expected, got));
    }
    if positions == 0 || positions > config.context {
        return Err(Error::option(
            "context",
            format!("1 to {}, the positions of the model", config.context),
            positions,
        ));
    }
    let windows = config.attention.iter().filter_map(|layer| layer.window);
    if let Some(window) = windows.min().filter(|&window| window < positions) {
        let expected = format!(
            "none, or at least the {positions} tokens that are trained at once; a context of \
             {window} has no window"
        );
        return Err(Error::option("sliding_window", expected, window));
    }
    if !config.head_dim.is_multiple_of(2) {
        return Err(Error::option("head_dim", "an even number", config.head_dim));
    }
    Ok(())
}

/// As an error of candle, which a forward pass returns.
fn into_candle(error: bitnet_quant::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

impl Linears for DecoderModel {
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> bitnet_quant::Result<()>,
    ) -> bitnet_quant::Result<()> {
        visit(EMBEDDING, &mut self.embedding)?;
        for (i, layer) in self.layers.iter_mut().enumerate() {
            for (name, linear) in ATTENTION.iter().zip(&mut layer.attention) {
                visit(&format!("model.layers.{i}.self_attn.{name}"), linear)?;
            }
            for (name, linear) in FFN.iter().zip(&mut layer.ffn) {
                visit(&format!("model.layers.{i}.mlp.{name}"), linear)?;
            }
        }
        self.head.iter_mut().try_for_each(|head| visit(HEAD, head))
    }
}
