//! The containers that are read and written, with their own metadata.

use crate::gguf;

/// A container and its metadata, the document aside.
#[derive(Debug, Clone)]
pub enum Container {
    /// safetensors with this `__metadata__`.
    Safetensors(Vec<(String, String)>),
    /// GGUF with these keys.
    Gguf(Vec<(String, gguf::Value)>),
}

/// Alignment of the data of a GGUF with these keys.
pub(crate) fn gguf_alignment(metadata: &[(String, gguf::Value)]) -> u32 {
    metadata
        .iter()
        .find(|(key, _)| key == gguf::ALIGNMENT_KEY)
        .and_then(|(_, value)| value.as_u64())
        .and_then(|alignment| u32::try_from(alignment).ok())
        .unwrap_or(gguf::DEFAULT_ALIGNMENT)
}
