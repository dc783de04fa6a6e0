//! Model folders of Hugging Face as GGUF files of llama.cpp, and back: names, row order, metadata
//! and tokenizers of each [`Architecture`].
//!
//! Everything but the tensors' bytes. To write a GGUF: [`gguf_metadata`] gives the keys,
//! [`Architecture::gguf_tensor`] the names and [`Architecture::gguf_rows`] the rows that have to
//! change places; [`GgufMetadata::rope_freqs`] is one more tensor where there is one. The way back
//! is [`hf_config`], [`hf_tokenizer`], [`Architecture::hf_tensor`] and [`Architecture::hf_rows`].

mod architecture;
mod end_ids;
mod keys;
mod metadata;
mod names;
mod rope;
mod rotation;
mod rows;
mod tokenizer;
mod values;

pub use architecture::{
    ARCHITECTURES, Activation, Architecture, BITNET, DecoderGraph, GgufName, HfDefaults, LLAMA,
    strip_prefix,
};
pub use end_ids::eos_ids;
pub use metadata::{GgufMetadata, ROPE_FREQS, gguf_metadata, hf_config};
pub use rope::HfRope;
pub use rotation::{ROTATION_PREFIX, Rotation, RotationError, RotationFacts};
pub use rows::HeadCounts;
pub use tokenizer::{GgufTokenizer, hf_tokenizer, hf_tokenizer_settings};
pub use values::HfConfig;
