//! Containers: safetensors, GGUF and HF `bitnet` folders; bounded readers, atomic and resumable
//! writers.
//!
//! ```no_run
//! use bitnet_formats::Source;
//! let source = Source::open("model.gguf".as_ref())?;
//! for tensor in &source.tensors {
//!     println!("{} {:?} {} bytes", tensor.name, tensor.shape, tensor.bytes(&source));
//! }
//! # Ok::<(), bitnet_formats::Error>(())
//! ```
#![forbid(unsafe_code)]

mod error;
mod io;

pub mod arch;
pub mod document;
pub mod dtype;
pub mod gguf;
pub mod hf;
pub mod logical;
pub mod output;
pub mod replace;
pub mod safetensors;
pub mod source;

pub use dtype::StoredType;
pub use error::{Error, Result};
pub use logical::{Content, Quantized, Scales, Tensor};
pub use source::{Kind, Source, Stored};
