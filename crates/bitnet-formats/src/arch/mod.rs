//! Model folders of Hugging Face as GGUF files of llama.cpp, and back: names, row order, metadata
//! and tokenizers of each [`Architecture`].
//!
//! Everything but the tensors' bytes. To write a GGUF: [`gguf_metadata`] gives the keys,
//! [`Architecture::gguf_tensor`] the names and [`Architecture::gguf_rows`] the rows that have to
//! change places; [`GgufMetadata::rope_tensors`] are more tensors where there are any. The way back
//! is [`hf_config`], [`hf_tokenizer`], [`Architecture::hf_tensor`] and [`Architecture::hf_rows`].

mod architecture;
mod decoder;
mod delta;
mod delta_keys;
mod encoder;
mod end_ids;
mod experts;
mod keys;
mod known;
mod layers;
mod metadata;
mod names;
mod rope;
mod rotation;
mod rows;
mod sentence;
mod tokenizer;
mod values;

pub use architecture::{
    Activation, Architecture, BiasRule, DecoderGraph, GgufName, HfDefaults, LayerRule, ModelKind,
    ScaleRule, strip_prefix,
};
pub use decoder::{Biases, HfDecoder, Scales};
pub use delta::DeltaShape;
pub use encoder::{HfEncoder, gguf_pooling};
pub use end_ids::eos_ids;
pub use experts::{ExpertRule, ExpertTensor, Experts};
pub use known::{
    ARCHITECTURES, BERT, BITNET, GEMMA3, LLAMA, MINICPM, MISTRAL, PHI3, QWEN2, QWEN2_MOE, QWEN3,
    QWEN3_MOE, QWEN35, SMOLLM3,
};
pub use layers::{LayerAttention, LayerRope, TokenMixer};
pub use metadata::{GgufMetadata, ROPE_FREQS, gguf_metadata, hf_config, is_rope_tensor};
pub use names::ElementForm;
pub use rope::{HfRope, RopeScaling};
pub use rotation::{InputRotation, ROTATION_PREFIX, Rotation, RotationError, RotationFacts};
pub use rows::{HeadCounts, TensorOrder};
pub use sentence::{Pooling, SentenceFiles};
pub use tokenizer::{GgufTokenizer, hf_tokenizer, hf_tokenizer_settings};
pub use values::HfConfig;
