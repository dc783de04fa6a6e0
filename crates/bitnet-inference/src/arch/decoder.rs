//! The layer of the decoders, which the architecture's
//! [`DecoderGraph`](bitnet_formats::arch::DecoderGraph) and config.json describe.
//!
//! ```text
//! a = RMS_in(x)
//! h = x + r · RMS_post(o · G(RMS_sub(Attention(rope(RMS_q(q·a)), rope(RMS_k(k·a)), v·a))))
//! z = RMS_ffn(h)
//! y = h + r · RMS_post'(down · RMS_sub'(f(gate·z) ⊙ up·z))
//! ```
//!
//! `RMS_in` and `RMS_ffn` are in every model; r is 1 in all but minicpm. llama, mistral, smollm3 and
//! minicpm have no other norm, `RMS_q` and `RMS_k` over each head are in qwen3 and gemma3, `RMS_sub`
//! in bitnet, `RMS_post` in gemma3. `G(y) = y ⊙ sigmoid(gate·a)` in qwen3_5, where each head's rows
//! of q are followed by those of its gate, and where most layers have a gated delta net (`delta.rs`)
//! in place of attention. In qwen3_moe and qwen2_moe a mixture of experts (`crate::experts`) takes the
//! place of the feed-forward in the layers that the config names. phi3 has q, k and v in one matrix,
//! and gate and up in another.
//! What a layer sees and how it rotates is [`LayerAttention`](bitnet_formats::arch::LayerAttention).

use super::delta::DeltaBlock;
use crate::Result;
use crate::experts::ExpertBlock;
use crate::forward::{ForwardPass, NormGain};
use crate::linear::LinearLayer;
use crate::load::WeightProvider;
use crate::projections::Projections;
use bitnet_formats::arch::TokenMixer;

/// Weights of a layer. Shapes are (N, K); D = heads · head_dim, V = kv_heads · head_dim.
#[derive(Debug)]
pub(crate) struct DecoderLayer {
    mixer: MixerBlock,
    feed_forward: FeedForward,
}

/// The second part of a layer.
#[derive(Debug)]
pub(crate) enum FeedForward {
    Dense(Box<FeedForwardBlock>),
    Experts(Box<ExpertBlock>),
}

/// What mixes the tokens of a layer.
#[derive(Debug)]
enum MixerBlock {
    Attention(Box<AttentionBlock>),
    DeltaNet(Box<DeltaBlock>),
}

/// Weights of the attention of a layer.
#[derive(Debug)]
pub(crate) struct AttentionBlock {
    /// `[hidden]`.
    pub(crate) norm: NormGain,
    /// `(D, hidden)`, `(V, hidden)` and `(V, hidden)`; with an output gate, `(2D, hidden)` first.
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

impl AttentionBlock {
    fn load(provider: &dyn WeightProvider, layer: usize) -> Result<Self> {
        let c = provider.config();
        let graph = c.graph;
        let name = |module: &str| format!("model.layers.{layer}.{module}");
        let norm = |module: &str, len| provider.norm(&name(module), len);
        let linear =
            |module: &str, rows, cols, bias| provider.linear(&name(module), rows, cols, bias);
        let (d, v, bias) = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.biases.qkv);
        let qkv = if graph.fused {
            let fused = linear("self_attn.qkv_proj", d + 2 * v, c.hidden, bias)?;
            Projections::Fused(Box::new(fused))
        } else {
            let q_rows = if graph.output_gate { 2 * d } else { d };
            Projections::Separate([
                linear("self_attn.q_proj", q_rows, c.hidden, bias)?,
                linear("self_attn.k_proj", v, c.hidden, bias)?,
                linear("self_attn.v_proj", v, c.hidden, bias)?,
            ])
        };
        let head_norms = if graph.head_norms {
            let [q, k] = ["self_attn.q_norm", "self_attn.k_norm"];
            Some([norm(q, c.head_dim)?, norm(k, c.head_dim)?])
        } else {
            None
        };
        Ok(Self {
            norm: norm("input_layernorm", c.hidden)?,
            qkv,
            head_norms,
            sub_norm: match graph.sub_norms {
                true => Some(norm("self_attn.attn_sub_norm", d)?),
                false => None,
            },
            out: linear("self_attn.o_proj", c.hidden, d, c.biases.out)?,
            post_norm: match graph.post_norms {
                Some([module, _]) => Some(norm(module, c.hidden)?),
                None => None,
            },
        })
    }
}

impl DecoderLayer {
    pub(crate) fn load(provider: &dyn WeightProvider, layer: usize) -> Result<Self> {
        let c = provider.config();
        let mixer = match (c.attention[layer].mixer, c.delta) {
            (TokenMixer::DeltaNet, Some(shape)) => {
                MixerBlock::DeltaNet(Box::new(DeltaBlock::load(provider, layer, shape)?))
            }
            _ => MixerBlock::Attention(Box::new(AttentionBlock::load(provider, layer)?)),
        };
        Ok(Self {
            mixer,
            feed_forward: FeedForward::load(provider, layer)?,
        })
    }

    pub(crate) fn forward(&self, run: &mut ForwardPass<'_, '_>, layer: usize) -> Result<()> {
        match &self.mixer {
            MixerBlock::Attention(block) => run.attention(layer, block)?,
            MixerBlock::DeltaNet(block) => run.delta_net(layer, block)?,
        }
        run.feed_forward(&self.feed_forward)
    }

    /// The linear layers that see every token.
    pub(crate) fn before_attention(&self) -> &[LinearLayer] {
        match &self.mixer {
            MixerBlock::Attention(block) => block.qkv.layers(),
            MixerBlock::DeltaNet(block) => block.inputs(),
        }
    }

    /// The output matrix of what mixes the tokens.
    fn out(&self) -> &LinearLayer {
        match &self.mixer {
            MixerBlock::Attention(block) => &block.out,
            MixerBlock::DeltaNet(block) => block.out(),
        }
    }

    /// All linear layers.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &LinearLayer> {
        let (dense, experts) = self.feed_forward.parts();
        let dense = dense.into_iter().flat_map(FeedForwardBlock::linears);
        let experts = experts
            .into_iter()
            .flat_map(|b| b.for_all_tokens().chain(b.of_experts()));
        let attention = self.before_attention().iter().chain([self.out()]);
        attention.chain(dense).chain(experts)
    }

    /// Bytes of the experts that a token does not use.
    pub(crate) fn unused_bytes(&self) -> usize {
        let FeedForward::Experts(block) = &self.feed_forward else {
            return 0;
        };
        let all = block.of_experts().map(LinearLayer::bytes).sum();
        all - block.used_share(all)
    }

    /// Integer multiply-adds per token after attention: in the last layer only the tokens whose
    /// logits are wanted need them.
    pub(crate) fn products_after_attention(&self) -> usize {
        let out = self.out().integer_products();
        out + match &self.feed_forward {
            FeedForward::Dense(block) => block.linears().map(LinearLayer::integer_products).sum(),
            FeedForward::Experts(block) => {
                let sum = |n: usize, l: &LinearLayer| n + l.integer_products();
                block.for_all_tokens().fold(0, sum)
                    + block.used_share(block.of_experts().fold(0, sum))
            }
        }
    }
}

impl FeedForwardBlock {
    fn linears(&self) -> impl Iterator<Item = &LinearLayer> {
        self.gate_up.layers().iter().chain([&self.down])
    }
}

impl FeedForward {
    fn load(provider: &dyn WeightProvider, layer: usize) -> Result<Self> {
        let c = provider.config();
        let (graph, bias) = (c.graph, c.biases.mlp);
        let name = |module: &str| format!("model.layers.{layer}.{module}");
        let norm = provider.norm(&name(graph.ffn_norm), c.hidden)?;
        let experts = c.experts.as_ref().filter(|experts| experts.layers[layer]);
        if let Some(facts) = experts {
            let block = ExpertBlock::load(provider, &name("mlp"), norm, facts)?;
            return Ok(Self::Experts(Box::new(block)));
        }
        let linear = |module: &str, rows, cols| provider.linear(&name(module), rows, cols, bias);
        let gate_up = if graph.fused {
            Projections::Fused(Box::new(linear("mlp.gate_up_proj", 2 * c.ffn, c.hidden)?))
        } else {
            Projections::Separate([
                linear("mlp.gate_proj", c.ffn, c.hidden)?,
                linear("mlp.up_proj", c.ffn, c.hidden)?,
            ])
        };
        let sub_norm = match graph.sub_norms {
            true => Some(provider.norm(&name("mlp.ffn_sub_norm"), c.ffn)?),
            false => None,
        };
        let post_norm = match graph.post_norms {
            Some([_, module]) => Some(provider.norm(&name(module), c.hidden)?),
            None => None,
        };
        Ok(Self::Dense(Box::new(FeedForwardBlock {
            norm,
            gate_up,
            sub_norm,
            down: linear("mlp.down_proj", c.hidden, c.ffn)?,
            post_norm,
        })))
    }

    fn parts(&self) -> (Option<&FeedForwardBlock>, Option<&ExpertBlock>) {
        match self {
            Self::Dense(block) => (Some(block), None),
            Self::Experts(block) => (None, Some(block)),
        }
    }
}
