//! The graphs, one file each.

pub(crate) mod bitnet;
pub(crate) mod llama;

use crate::Result;
use crate::linear::Linear;
use crate::load::Provider;
use crate::run::Run;
use bitnet_formats::arch::DecoderGraph;

/// A layer of one of the graphs.
#[derive(Debug)]
pub(crate) enum Layer {
    Llama(llama::Layer),
    Bitnet(bitnet::Layer),
}

impl Layer {
    pub(crate) fn load(provider: &dyn Provider, layer: usize) -> Result<Self> {
        Ok(match provider.config().graph {
            DecoderGraph::Llama => Self::Llama(llama::Layer::load(provider, layer)?),
            DecoderGraph::Bitnet => Self::Bitnet(bitnet::Layer::load(provider, layer)?),
        })
    }

    pub(crate) fn forward(&self, run: &mut Run<'_, '_>, layer: usize) -> Result<()> {
        match self {
            Self::Llama(l) => l.forward(run, layer),
            Self::Bitnet(l) => l.forward(run, layer),
        }
    }

    /// q, k, v, o, gate, up, down.
    pub(crate) fn linears(&self) -> [&Linear; 7] {
        match self {
            Self::Llama(l) => l.linears(),
            Self::Bitnet(l) => l.linears(),
        }
    }
}
