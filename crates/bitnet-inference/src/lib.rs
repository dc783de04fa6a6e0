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
//! [`Model::load`] takes a Hugging Face folder or a GGUF and follows the facts in its config
//! ([`Config`]); what it does not know is an error. Weights are copied into the layouts of the
//! kernels, so the files may change or vanish once it returns. [`Model::forward`] is the graph over
//! batches of sequences; [`Session`] generates on one of them; [`perplexity`] measures.
//!
//! Logits depend on weights and tokens alone: the number of threads, the instruction set, and what
//! else is computed together change no bit.
#![forbid(unsafe_code)]

mod arch;
mod blocks;
mod cache;
mod chat;
mod config;
mod error;
mod generate;
mod linear;
mod load;
mod model;
pub mod perplexity;
mod run;
mod sample;
mod shape;
mod tokenizer;

pub use bitnet_formats::arch::Activation;
pub use cache::{CacheType, KvCache};
pub use chat::Message;
pub use config::{Config, Rope};
pub use error::{Error, Result};
pub use generate::{Finish, GenerateOptions, Generation, Session, Timings, Token};
pub use load::{ActivationType, FloatType};
pub use model::{LoadOptions, Model};
pub use run::{Scratch, Step, Want};
pub use sample::{Sampler, Sampling};
pub use tokenizer::{TextStream, Tokenizer};
