//! Containers: safetensors, GGUF and HF `bitnet` folders; bounded readers, atomic and resumable
//! writers.
//!
//! ```no_run
//! use bitnet_formats::Source;
//! let source = Source::open("model.gguf".as_ref())?;
//! for tensor in source.tensors() {
//!     println!("{} {:?} {} bytes", tensor.name, tensor.shape, source.bytes_of(tensor));
//! }
//! # Ok::<(), bitnet_formats::Error>(())
//! ```
#![forbid(unsafe_code)]

mod error;
mod foreign;
mod gguf_parts;
mod grouping;
mod io;
mod parts;
mod prefixes;
mod pytorch;
mod resolve;
mod storage;
mod strided;

pub mod arch;
pub mod container;
pub mod document;
pub mod dtype;
pub mod gguf;
pub mod hf;
pub mod hints;
pub mod onnx;
pub mod output;
pub mod python_json;
pub mod replace;
pub mod safetensors;
pub mod source;
pub mod tensor;

pub use dtype::StoredType;
pub use error::{Error, Result};
pub use foreign::{ForeignMethod, ForeignType};
pub use parts::PackedPart;
pub use source::{Kind, Source};
pub use tensor::{Content, ScaleSource, StoredId, StoredMatrix, StoredTensor, Tensor, TensorId};
