//! The layer of the decoders, which the architecture's
//! [`DecoderGraph`](bitnet_formats::arch::DecoderGraph) and config.json describe.
//!
//! ```text
//! a = RMS_in(x)
//! h = x + r · RMS_post(o · RMS_sub(Attention(rope(RMS_q(q·a)), rope(RMS_k(k·a)), v·a)))
//! z = RMS_ffn(h)
//! y = h + r · RMS_post'(down · RMS_sub'(f(gate·z) ⊙ up·z))
//! ```
//!
//! `RMS_in` and `RMS_ffn` are in every model; r is 1 in all but minicpm. llama, mistral, smollm3 and
//! minicpm have no other norm, `RMS_q` and `RMS_k` over each head are in qwen3 and gemma3, `RMS_sub`
//! in bitnet, `RMS_post` in gemma3. phi3 has q, k and v in one matrix, and gate and up in another.
//! What a layer sees and how it rotates is [`LayerAttention`](bitnet_formats::arch::LayerAttention).

use crate::Result;
use crate::forward::{ForwardPass, NormGain};
use crate::linear::LinearLayer;
use crate::load::WeightProvider;
use crate::projections::Projections;

/// Weights of a layer. Shapes are (N, K); D = heads · head_dim, V = kv_heads · head_dim.
#[derive(Debug)]
pub(crate) struct DecoderLayer {
    attention: AttentionBlock,
    feed_forward: FeedForwardBlock,
}

/// Weights of the attention of a layer.
#[derive(Debug)]
pub(crate) struct AttentionBlock {
    /// `[hidden]`.
    pub(crate) norm: NormGain,
    /// `(D, hidden)`, `(V, hidden)` and `(V, hidden)`.
    pub(crate) qkv: Projections<3>,
    /// Of each head of q and of k, `[head_dim]`.
    pub(crate) head_norms: Option<[NormGain; 2]>,
    /// Over all heads together, `[D]`.
    pub(crate) sub_norm: Option<NormGain>,
    /// `(hidden, D)`.
    pub(crate) out: LinearLayer,
    /// `[hidden]`.
    pub(crate) post_norm: Option<NormGain>,
}

/// Weights of the feed-forward of a layer.
#[derive(Debug)]
pub(crate) struct FeedForwardBlock {
    /// `[hidden]`.
    pub(crate) norm: NormGain,
    /// `(ffn, hidden)` each.
    pub(crate) gate_up: Projections<2>,
    /// `[ffn]`.
    pub(crate) sub_norm: Option<NormGain>,
    /// `(hidden, ffn)`.
    pub(crate) down: LinearLayer,
    /// `[hidden]`.
    pub(crate) post_norm: Option<NormGain>,
}

impl DecoderLayer {
    pub(crate) fn load(provider: &dyn WeightProvider, layer: usize) -> Result<Self> {
        let c = provider.config();
        let graph = c.graph;
        let name = |module: &str| format!("model.layers.{layer}.{module}");
        let norm = |module: &str, len| provider.norm(&name(module), len);
        let optional = |there: bool, module: &str, len| match there {
            true => norm(module, len).map(Some),
            false => Ok(None),
        };
        let post_norm = |i: usize| match graph.post_norms {
            Some(modules) => norm(modules[i], c.hidden).map(Some),
            None => Ok(None),
        };
        let linear =
            |module: &str, rows, cols, bias| provider.linear(&name(module), rows, cols, bias);
        let (d, v) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let (qkv_bias, mlp_bias) = (c.biases.qkv, c.biases.mlp);
        let qkv = if graph.fused {
            Projections::Fused(Box::new(linear(
                "self_attn.qkv_proj",
                d + 2 * v,
                c.hidden,
                qkv_bias,
            )?))
        } else {
            Projections::Separate([
                linear("self_attn.q_proj", d, c.hidden, qkv_bias)?,
                linear("self_attn.k_proj", v, c.hidden, qkv_bias)?,
                linear("self_attn.v_proj", v, c.hidden, qkv_bias)?,
            ])
        };
        let gate_up = if graph.fused {
            Projections::Fused(Box::new(linear(
                "mlp.gate_up_proj",
                2 * c.ffn,
                c.hidden,
                mlp_bias,
            )?))
        } else {
            Projections::Separate([
                linear("mlp.gate_proj", c.ffn, c.hidden, mlp_bias)?,
                linear("mlp.up_proj", c.ffn, c.hidden, mlp_bias)?,
            ])
        };
        let head_norms = if graph.head_norms {
            let [q, k] = ["self_attn.q_norm", "self_attn.k_norm"];
            Some([norm(q, c.head_dim)?, norm(k, c.head_dim)?])
        } else {
            None
        };
        Ok(Self {
            attention: AttentionBlock {
                norm: norm("input_layernorm", c.hidden)?,
                qkv,
                head_norms,
                sub_norm: optional(graph.sub_norms, "self_attn.attn_sub_norm", d)?,
                out: linear("self_attn.o_proj", c.hidden, d, c.biases.out)?,
                post_norm: post_norm(0)?,
            },
            feed_forward: FeedForwardBlock {
                norm: norm(graph.ffn_norm, c.hidden)?,
                gate_up,
                sub_norm: optional(graph.sub_norms, "mlp.ffn_sub_norm", c.ffn)?,
                down: linear("mlp.down_proj", c.hidden, c.ffn, mlp_bias)?,
                post_norm: post_norm(1)?,
            },
        })
    }

    pub(crate) fn forward(&self, run: &mut ForwardPass<'_, '_>, layer: usize) -> Result<()> {
        run.attention(layer, &self.attention)?;
        run.feed_forward(&self.feed_forward)
    }

    /// The linear layers that see every token.
    pub(crate) fn before_attention(&self) -> &[LinearLayer] {
        self.attention.qkv.layers()
    }

    /// The linear layers that in the last layer see only the tokens whose logits are wanted.
    pub(crate) fn after_attention(&self) -> impl Iterator<Item = &LinearLayer> {
        let gate_up = self.feed_forward.gate_up.layers();
        [&self.attention.out, &self.feed_forward.down]
            .into_iter()
            .chain(gate_up)
    }

    /// All linear layers.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &LinearLayer> {
        self.before_attention().iter().chain(self.after_attention())
    }
}
