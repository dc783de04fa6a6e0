//! The error type of the GGUF reader, writer and decoders.

use super::GgmlType;
use std::io;

/// What can be wrong with a GGUF file, or with what should be written to one.
///
/// No variant knows the file's path; the caller adds it. Offsets count from the start of the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading failed.
    #[error("cannot read at offset {offset}")]
    Io {
        /// Where the read started.
        offset: u64,
        /// The cause.
        source: io::Error,
    },
    /// The file does not start with the four letters of a GGUF file.
    #[error("not a GGUF file: starts with bytes {got:02x?}, expected {:02x?}", *super::MAGIC)]
    Magic {
        /// The first four bytes.
        got: [u8; 4],
    },
    /// A version of the format that is not read.
    #[error("GGUF version {got}, expected 1, 2 or 3")]
    Version {
        /// The version found.
        got: u32,
    },
    /// A big-endian file has a tensor whose bytes cannot be put in the usual order.
    #[error(
        "tensor '{tensor}': expected a type that is read from big-endian files ({}), got \
         {ggml_type}; write the model again on a little-endian machine",
        super::byte_order::readable()
    )]
    BigEndian {
        /// The tensor's name.
        tensor: String,
        /// Its type.
        ggml_type: GgmlType,
    },
    /// The file ends too early, or a length in it is wrong.
    #[error("{what} at offset {offset} needs {needed} bytes, the file has {left} left")]
    Truncated {
        /// What was being read.
        what: String,
        /// Where it starts.
        offset: u64,
        /// Bytes that it needs at least.
        needed: u64,
        /// Bytes from there to the end of the file.
        left: u64,
    },
    /// The metadata and tensor infos are longer than any real file's.
    #[error(
        "{what} at offset {offset} needs {needed} bytes and would end beyond the header limit of \
         {limit} bytes"
    )]
    HeaderTooLarge {
        /// What was being read or written.
        what: String,
        /// Where it starts.
        offset: u64,
        /// Bytes that it needs at least.
        needed: u64,
        /// The limit, [`super::MAX_HEADER_BYTES`].
        limit: u64,
    },
    /// A string is not UTF-8.
    #[error("{what} at offset {offset} is not UTF-8")]
    Utf8 {
        /// What was being read.
        what: String,
        /// Where the string's bytes start.
        offset: u64,
        /// The cause.
        source: std::str::Utf8Error,
    },
    /// A metadata value has a type id that does not exist.
    #[error("key '{key}': unknown value type {got} at offset {offset}, expected 0 to 12")]
    ValueType {
        /// The metadata key.
        key: String,
        /// The type id found.
        got: u32,
        /// Where it stands.
        offset: u64,
    },
    /// A boolean is neither 0 nor 1.
    #[error("key '{key}': boolean {got} at offset {offset}, expected 0 or 1")]
    Bool {
        /// The metadata key.
        key: String,
        /// The byte found.
        got: u8,
        /// Where it stands.
        offset: u64,
    },
    /// Arrays are nested too deeply.
    #[error("key '{key}': arrays nested more than {max} deep")]
    ArrayDepth {
        /// The metadata key.
        key: String,
        /// The bound, [`super::MAX_ARRAY_DEPTH`].
        max: usize,
    },
    /// A metadata key occurs twice.
    #[error("duplicate key '{key}'")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// Two tensors have the same name.
    #[error("duplicate tensor '{tensor}'")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },
    /// A metadata value has the wrong type for its key.
    #[error("key '{key}': expected {expected}, got {got}")]
    KeyType {
        /// The metadata key.
        key: String,
        /// The type that the key has by convention.
        expected: &'static str,
        /// The type found.
        got: &'static str,
    },
    /// The alignment is not a power of two.
    #[error("alignment {got}, expected a power of two")]
    Alignment {
        /// The alignment found.
        got: u32,
    },
    /// The metadata to be written does not announce the alignment that the data is to have.
    #[error("alignment {expected} requested, but key 'general.alignment' announces {got}")]
    AlignmentKey {
        /// The requested alignment.
        expected: u32,
        /// The alignment in the metadata, or the default where the key is absent.
        got: u32,
    },
    /// A tensor has too many dimensions.
    #[error("tensor '{tensor}': {got} dimensions, expected at most {max}")]
    Dims {
        /// The tensor's name.
        tensor: String,
        /// Its number of dimensions.
        got: u64,
        /// The bound, [`super::MAX_DIMS`].
        max: usize,
    },
    /// A tensor has a type that is not known.
    #[error("tensor '{tensor}': unknown type id {id}")]
    UnknownType {
        /// The tensor's name.
        tensor: String,
        /// The type id found.
        id: u32,
    },
    /// A row cannot be cut into whole blocks.
    #[error("{cols} values are not a multiple of the {block} values in a block of {ggml_type}")]
    RowLength {
        /// The tensor type.
        ggml_type: GgmlType,
        /// Values in the row.
        cols: usize,
        /// Values in a block.
        block: usize,
    },
    /// A product of dimensions does not fit the address space.
    #[error("shape {shape:?} is too large for this machine")]
    TooLarge {
        /// The dimensions, outermost first.
        shape: Vec<usize>,
    },
    /// Another error, with the name of the tensor in which it occurred.
    #[error("tensor '{tensor}': {cause}")]
    Tensor {
        /// The tensor's name.
        tensor: String,
        /// What is wrong with it. Part of the message, therefore not its `source` as well.
        cause: Box<Error>,
    },
    /// A tensor's data does not start on a multiple of the alignment.
    #[error(
        "tensor '{tensor}': data offset {offset} is not a multiple of the alignment {alignment}"
    )]
    Misaligned {
        /// The tensor's name.
        tensor: String,
        /// Its offset, counted from the start of the data section.
        offset: u64,
        /// The file's alignment.
        alignment: u32,
    },
    /// A tensor's data ends beyond the file.
    #[error(
        "tensor '{tensor}': {len} bytes at offset {offset} of the data section, which has \
         {available}"
    )]
    OutsideFile {
        /// The tensor's name.
        tensor: String,
        /// Its offset, counted from the start of the data section.
        offset: u64,
        /// Its length.
        len: u64,
        /// Bytes from the start of the data section to the end of the file.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error(
        "tensor '{second}' starts at offset {offset}, inside tensor '{first}' which ends at \
         {first_end}"
    )]
    Overlap {
        /// The tensor that starts first.
        first: String,
        /// Where it ends.
        first_end: u64,
        /// The tensor that starts inside it.
        second: String,
        /// Where that starts.
        offset: u64,
    },
    /// The type's elements cannot be turned into floats here.
    #[error("no decoder for tensor type {ggml_type}")]
    NoDecoder {
        /// The tensor type.
        ggml_type: GgmlType,
    },
    /// The offsets of a file do not tell in which of two sizes its Q2_0 tensors are grouped.
    #[error(
        "type 42 (Q2_0) in groups of 64 or of 128 values, which offsets tell: {fit} of them end where \
         the next tensor or the file begins or ends (all {count} tensors: {sums:?} bytes in groups of \
         64 and of 128; '{tensor}' from {start} has room up to {next}, and ends at {ends:?}); ask the \
         writer of the file, or convert it again"
    )]
    Q2Groups {
        /// `both` or `neither`.
        fit: &'static str,
        /// Number of tensors of the type.
        count: usize,
        /// Bytes of them all, in groups of 64 and of 128.
        sums: [u64; 2],
        /// The first that does not fit, or the first of all.
        tensor: String,
        /// Where it begins, from the start of the data section.
        start: u64,
        /// Where the next tensor begins.
        next: u64,
        /// Where it ends with its padding, in groups of 64 and of 128.
        ends: [u64; 2],
    },
    /// A file is to hold Q2_0 tensors in groups of both sizes.
    #[error(
        "tensor '{first}' in groups of 64 and '{second}' in groups of 128 have the same type 42 in \
         GGUF, and no reader could tell them apart: choose one of the layouts q2_0 and q2_0-g128, or \
         pq2_0 beside q2_0"
    )]
    MixedQ2Groups {
        /// A tensor in groups of 64.
        first: String,
        /// A tensor in groups of 128.
        second: String,
    },
    /// A slice, or a tensor's data, does not have the length of its shape.
    #[error("{ggml_type}: expected {expected} bytes, got {got}")]
    Length {
        /// The tensor type.
        ggml_type: GgmlType,
        /// Bytes that the values take.
        expected: u64,
        /// Bytes there are.
        got: u64,
    },
}

/// `std::result::Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Adds the tensor's name.
    pub(super) fn in_tensor(self, tensor: &str) -> Self {
        Self::Tensor {
            tensor: tensor.into(),
            cause: Box::new(self),
        }
    }
}
