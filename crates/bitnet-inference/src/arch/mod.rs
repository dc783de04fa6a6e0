//! The graphs, one file each.

mod bert;
mod decoder;
mod delta;

pub(crate) use bert::{BertModel, EncoderBuffers};
pub(crate) use decoder::{AttentionBlock, DecoderLayer, FeedForward};
pub(crate) use delta::{DeltaBuffers, DeltaVectors};
