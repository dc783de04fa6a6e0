//! `bitnet`: b1.58-2B-4T and its kin. A llama layer with a norm more in each half, before the
//! output projection.
//!
//! ```text
//! h = x + o · RMS_attn_sub(Attention(RMS_in(x)))
//! y = h + down · RMS_ffn_sub(f(gate · z) ⊙ (up · z))          z = RMS_post(h);  f as the config says, max(·, 0)² in 2B-4T
//! logits = head · RMS(y)
//! ```

use super::llama;
use crate::Result;
use crate::linear::Linear;
use crate::load::Provider;
use crate::run::{Norm, Run};

/// Weights of a layer.
#[derive(Debug)]
pub(crate) struct Layer {
    /// What llama has too.
    pub(crate) base: llama::Layer,
    /// Over all heads together, `[hidden]`.
    pub(crate) attention_sub_norm: Norm,
    /// `[ffn]`.
    pub(crate) ffn_sub_norm: Norm,
}

impl Layer {
    pub(crate) fn load(provider: &dyn Provider, layer: usize) -> Result<Self> {
        Ok(Self {
            base: llama::Layer::load(provider, layer)?,
            attention_sub_norm: provider.norm(
                &format!("model.layers.{layer}.self_attn.attn_sub_norm"),
                provider.config().hidden,
            )?,
            ffn_sub_norm: provider.norm(
                &format!("model.layers.{layer}.mlp.ffn_sub_norm"),
                provider.config().ffn,
            )?,
        })
    }

    pub(crate) fn forward(&self, run: &mut Run<'_, '_>, layer: usize) -> Result<()> {
        let base = &self.base;
        run.norm(&base.attention_norm, &[&base.q, &base.k, &base.v])?;
        run.attention(layer, [&base.q, &base.k, &base.v])?;
        run.attention_out(&base.o, Some(&self.attention_sub_norm))?;
        run.norm(&base.ffn_norm, &[&base.gate, &base.up])?;
        run.feed_forward([&base.gate, &base.up], &base.down, Some(&self.ffn_sub_norm))
    }

    pub(crate) fn linears(&self) -> [&Linear; 7] {
        self.base.linears()
    }
}
