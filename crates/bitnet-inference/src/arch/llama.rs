//! `llama`: Llama 1 to 3, Falcon3, Falcon-E, TriLM, SmolLM2 and others with this graph, ternary or
//! not.
//!
//! ```text
//! h = x + o · Attention(RMS_in(x))              grouped-query attention with rotary positions
//! y = h + down · (silu(gate · z) ⊙ (up · z))    z = RMS_post(h)
//! logits = head · RMS(y)
//! ```

use crate::Result;
use crate::forward::{ForwardPass, NormGain};
use crate::linear::LinearLayer;
use crate::load::WeightProvider;

/// Weights of a layer. Shapes are (N, K); D = heads · head_dim, V = kv_heads · head_dim.
#[derive(Debug)]
pub(crate) struct LlamaLayer {
    /// `[hidden]`.
    pub(crate) attention_norm: NormGain,
    /// `(D, hidden)`.
    pub(crate) q: LinearLayer,
    /// `(V, hidden)`.
    pub(crate) k: LinearLayer,
    /// `(V, hidden)`.
    pub(crate) v: LinearLayer,
    /// `(hidden, D)`.
    pub(crate) o: LinearLayer,
    /// `[hidden]`.
    pub(crate) ffn_norm: NormGain,
    /// `(ffn, hidden)`.
    pub(crate) gate: LinearLayer,
    /// `(ffn, hidden)`.
    pub(crate) up: LinearLayer,
    /// `(hidden, ffn)`.
    pub(crate) down: LinearLayer,
}

impl LlamaLayer {
    pub(crate) fn load(provider: &dyn WeightProvider, layer: usize) -> Result<Self> {
        let c = provider.config();
        let (d, v) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let name = |module: &str| format!("model.layers.{layer}.{module}");
        let attention = |module: &str, rows, cols| {
            provider.linear(
                &name(&format!("self_attn.{module}")),
                rows,
                cols,
                c.attention_bias,
            )
        };
        let mlp = |module: &str, rows, cols| {
            provider.linear(&name(&format!("mlp.{module}")), rows, cols, c.mlp_bias)
        };
        Ok(Self {
            attention_norm: provider.norm(&name("input_layernorm"), c.hidden)?,
            q: attention("q_proj", d, c.hidden)?,
            k: attention("k_proj", v, c.hidden)?,
            v: attention("v_proj", v, c.hidden)?,
            o: attention("o_proj", c.hidden, d)?,
            ffn_norm: provider.norm(&name("post_attention_layernorm"), c.hidden)?,
            gate: mlp("gate_proj", c.ffn, c.hidden)?,
            up: mlp("up_proj", c.ffn, c.hidden)?,
            down: mlp("down_proj", c.hidden, c.ffn)?,
        })
    }

    pub(crate) fn forward(&self, run: &mut ForwardPass<'_, '_>, layer: usize) -> Result<()> {
        run.norm(&self.attention_norm, &[&self.q, &self.k, &self.v])?;
        run.attention(layer, [&self.q, &self.k, &self.v])?;
        run.attention_out(&self.o, None)?;
        run.norm(&self.ffn_norm, &[&self.gate, &self.up])?;
        run.feed_forward([&self.gate, &self.up], &self.down, None)
    }

    pub(crate) fn linears(&self) -> [&LinearLayer; 7] {
        [
            &self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down,
        ]
    }
}
