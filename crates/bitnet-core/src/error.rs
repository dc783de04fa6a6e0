//! The error type of this crate: a variant is a cause, its fields are the numbers a person needs.

/// What can go wrong in quantizing, packing and unpacking a matrix.
///
/// No variant knows a file or a tensor name; the crates above add them.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A weight is NaN or infinite.
    #[error("weight {index} is {value}, and only finite weights can be quantized")]
    NotFinite {
        /// Position in the row-major matrix.
        index: usize,
        /// The offending weight.
        value: f32,
    },
    /// A slice does not have the length its shape asks for.
    #[error("{what}: expected {expected} elements, got {got}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Elements that the shape asks for.
        expected: usize,
        /// Elements in the slice.
        got: usize,
    },
    /// A value cannot be written with the precision or the layout.
    #[error("value {got} at index {index} is outside {expected}")]
    Value {
        /// Position in the row-major matrix.
        index: usize,
        /// The offending value.
        got: i32,
        /// The values allowed, in words.
        expected: &'static str,
    },
    /// Packed bytes hold a pattern that no writer of the layout produces.
    #[error("{layout}: byte {offset} holds {what}")]
    Corrupt {
        /// The layout's name.
        layout: &'static str,
        /// Offset into the packed bytes.
        offset: usize,
        /// What is wrong there.
        what: String,
    },
    /// The layout cannot hold such a matrix.
    #[error("layout {layout} cannot hold this matrix: {why}")]
    Unsupported {
        /// The layout's name.
        layout: &'static str,
        /// The constraint, with the offending number.
        why: String,
    },
    /// A name that is in no registry.
    #[error("unknown {what} '{got}', expected one of {expected}")]
    UnknownName {
        /// What was looked up.
        what: &'static str,
        /// The name given.
        got: String,
        /// The names there are.
        expected: String,
    },
    /// A scheme asks for something that does not exist.
    #[error("invalid scheme: {0}")]
    Scheme(String),
    /// A product of sizes does not fit the address space.
    #[error("a matrix of {rows} × {cols} is too large for this machine")]
    TooLarge {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
