//! Language models with ternary and other low-bit weights: load, generate, measure.
//!
//! ```
//! use bitnet_inference::{GenerateOptions, Model};
//! let model = Model::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/glassllm-en"))?;
//! let options = GenerateOptions { max_tokens: 16, ..Default::default() };
//! let mut text = String::new();
//! for token in model.generate("Alice was beginning to", &options)? {
//!     text += &token?.text;
//! }
//! assert!(!text.is_empty());
//! # Ok::<(), bitnet_inference::Error>(())
//! ```
//!
//! Start with [`Model::load`]: it opens a Hugging Face folder or a GGUF and copies the weights into
//! the layouts of the kernels, so the files may change or vanish afterwards. Its options are in
//! [`LoadOptions`]. An entry of the config ([`Config`]) that the graphs do not support is an error.
//! - [`Model::generate`] continues a text; [`Session`] keeps the cache between calls.
//! - [`Model::chat_tokens`] applies the chat template to a conversation.
//! - [`Model::forward`] computes logits of batches of sequences.
//! - [`Embedder`] gives texts vectors: encoders, and decoders whose hidden states are pooled.
//! - [`perplexity`] measures a model on a text, or compares two models.
//!
//! Logits depend on weights and tokens only: the number of threads, the instruction set and the
//! other sequences of a batch change no bit.
#![forbid(unsafe_code)]

mod arch;
mod blocks;
mod cache;
mod chat;
mod config;
mod embed;
mod error;
mod experts;
mod forward;
mod generate;
mod hostile;
mod linear;
mod load;
mod model;
pub mod perplexity;
mod projections;
mod sample;
mod synthetic;
mod tokenizer;

pub use bitnet_formats::arch::{Activation, Pooling};
pub use cache::{CacheType, KvCache};
pub use chat::{ChatMessage, Tools};
pub use config::{Config, Rope, ValueHeads};
pub use embed::{EmbedOptions, Embedder, EncodedText, Normalization};
pub use error::{Error, Result};
pub use forward::{ForwardBuffers, ForwardStep, WantedLogits};
pub use generate::{Finish, GenerateOptions, Generation, Session, Timings, Token};
pub use load::{ActivationType, FloatType};
pub use model::{LoadOptions, Model};
pub use sample::{Sampler, Sampling};
pub use tokenizer::{TextStream, Tokenizer};
