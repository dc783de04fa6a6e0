//! GGUF: the single-file container of ggml programs.
//!
//! A little-endian file of four parts without padding except where noted:
//!
//! 1. the letters `GGUF`, a u32 version, a u64 number of tensors, a u64 number of metadata pairs;
//! 2. the metadata: each pair is a key, a u32 type id and a value. Strings are a u64 byte count and
//!    UTF-8. Arrays are the u32 type id of their elements, a u64 count and the elements. Numbers
//!    are 1, 2, 4 or 8 bytes, booleans one byte;
//! 3. for each tensor its name, a u32 number of dimensions, the dimensions as u64 with the
//!    *innermost first*, the u32 type id and a u64 offset from the start of part 4. Here shapes are
//!    row-major with the outermost dimension first, as in every other container;
//! 4. padding up to a multiple of the alignment (key `general.alignment`, else 32), then the
//!    tensors' bytes, each on such a multiple.
//!
//! Versions 2 and 3 share this layout. [`GgufHeader::read`] checks all of it before anything is
//! allocated by a length from the file, [`encode_header`] writes it, and [`decode`] turns the bytes
//! of most tensor types into floats.

mod cursor;
mod decode;
mod error;
mod reader;
mod types;
mod value;
mod writer;

pub use decode::{BlockIntegers, decode, has_decoder, integers};
pub use error::{Error, Result};
pub use reader::{GgufHeader, GgufTensor};
pub use types::GgmlType;
pub use value::{Array, Value};
pub use writer::{EncodedHeader, GgufEntry, encode_header};

/// The first four bytes of a file.
pub const MAGIC: &[u8; 4] = b"GGUF";
/// The version that is written.
pub const VERSION: u32 = 3;
/// The key that sets another alignment than [`DEFAULT_ALIGNMENT`]; a u32.
pub const ALIGNMENT_KEY: &str = "general.alignment";
/// The keys of a file that is one part of a model: its index from 0, the number of parts, and the
/// number of tensors in all of them.
pub const SPLIT_KEYS: [&str; 3] = ["split.no", "split.count", "split.tensors.count"];
/// Alignment of tensor data without [`ALIGNMENT_KEY`].
pub const DEFAULT_ALIGNMENT: u32 = 32;
/// Most dimensions that a tensor can have.
pub const MAX_DIMS: usize = 4;
/// Most levels of arrays in arrays; an array of numbers is one level, and the only one that ggml's
/// own loader accepts.
pub const MAX_ARRAY_DEPTH: usize = 4;
/// Most bytes before the data section, many times those of the largest vocabularies: bounds the
/// memory that a hostile file can claim.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;
