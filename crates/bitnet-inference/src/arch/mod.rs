//! The graphs, one file each.

mod bert;
mod decoder;

pub(crate) use bert::{BertModel, EncoderBuffers};
pub(crate) use decoder::{AttentionBlock, DecoderLayer, FeedForward};
