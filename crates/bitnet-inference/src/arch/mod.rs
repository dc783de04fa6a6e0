//! The graphs, one file each.

mod bitnet;
mod llama;

use crate::Result;
use crate::forward::ForwardPass;
use crate::linear::LinearLayer;
use crate::load::WeightProvider;
use bitnet::BitnetLayer;
use bitnet_formats::arch::DecoderGraph;
use llama::LlamaLayer;

/// A layer of one of the graphs.
#[derive(Debug)]
pub(crate) enum GraphLayer {
    Llama(LlamaLayer),
    Bitnet(BitnetLayer),
}

impl GraphLayer {
    pub(crate) fn load(provider: &dyn WeightProvider, layer: usize) -> Result<Self> {
        Ok(match provider.config().graph {
            DecoderGraph::Llama => Self::Llama(LlamaLayer::load(provider, layer)?),
            DecoderGraph::Bitnet => Self::Bitnet(BitnetLayer::load(provider, layer)?),
        })
    }

    pub(crate) fn forward(&self, run: &mut ForwardPass<'_, '_>, layer: usize) -> Result<()> {
        match self {
            Self::Llama(l) => l.forward(run, layer),
            Self::Bitnet(l) => l.forward(run, layer),
        }
    }

    /// q, k, v, o, gate, up, down.
    pub(crate) fn linears(&self) -> [&LinearLayer; 7] {
        match self {
            Self::Llama(l) => l.linears(),
            Self::Bitnet(l) => l.linears(),
        }
    }
}
