//! `bitnet`: b1.58-2B-4T and its relatives. A llama layer with a sub-norm before the output
//! projection and another before the down projection.
//!
//! ```text
//! h = x + o · RMS_attn_sub(Attention(RMS_in(x)))
//! y = h + down · RMS_ffn_sub(f(gate · z) ⊙ (up · z))    z = RMS_post(h); in 2B-4T f is max(·, 0)²
//! logits = head · RMS(y)
//! ```

use super::llama::LlamaLayer;
use crate::Result;
use crate::forward::{ForwardPass, NormGain};
use crate::linear::LinearLayer;
use crate::load::WeightProvider;

/// Weights of a layer.
#[derive(Debug)]
pub(crate) struct BitnetLayer {
    /// The weights that a llama layer has too.
    pub(crate) base: LlamaLayer,
    /// Over all heads together, `[hidden]`.
    pub(crate) attention_sub_norm: NormGain,
    /// `[ffn]`.
    pub(crate) ffn_sub_norm: NormGain,
}

impl BitnetLayer {
    pub(crate) fn load(provider: &dyn WeightProvider, layer: usize) -> Result<Self> {
        Ok(Self {
            base: LlamaLayer::load(provider, layer)?,
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

    pub(crate) fn forward(&self, run: &mut ForwardPass<'_, '_>, layer: usize) -> Result<()> {
        let base = &self.base;
        run.norm(&base.attention_norm, &[&base.q, &base.k, &base.v])?;
        run.attention(layer, [&base.q, &base.k, &base.v])?;
        run.attention_out(&base.o, Some(&self.attention_sub_norm))?;
        run.norm(&base.ffn_norm, &[&base.gate, &base.up])?;
        run.feed_forward([&base.gate, &base.up], &base.down, Some(&self.ffn_sub_norm))
    }

    pub(crate) fn linears(&self) -> [&LinearLayer; 7] {
        self.base.linears()
    }
}
