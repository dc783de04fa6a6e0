//! The graphs, one file each.

mod decoder;

pub(crate) use decoder::{AttentionBlock, DecoderLayer, FeedForward};
