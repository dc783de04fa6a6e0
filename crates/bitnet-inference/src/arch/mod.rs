//! The graphs, one file each.

mod decoder;
mod delta;

pub(crate) use decoder::{AttentionBlock, DecoderLayer, FeedForwardBlock};
pub(crate) use delta::{DeltaBuffers, DeltaVectors};
