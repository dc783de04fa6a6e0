//! The error type of this crate: a variant for each cause, with the numbers that explain it.

/// Errors of quantizing, packing and unpacking a matrix.
///
/// Files and tensor names are unknown here; the crates above add them.
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
    /// The length of a slice does not fit the shape.
    #[error("{what}: expected {expected} elements, got {got}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Length by the shape.
        expected: usize,
        /// Length of the slice.
        got: usize,
    },
    /// A value cannot be written with the precision or the layout.
    #[error("value {got} at index {index} is outside {expected}")]
    Value {
        /// Position in the row-major matrix.
        index: usize,
        /// The offending value.
        got: i32,
        /// The allowed values.
        expected: &'static str,
    },
    /// The packed bytes are invalid: no writer of the layout produces them.
    #[error("{layout}: byte {offset} holds {what}")]
    Corrupt {
        /// The layout's name.
        layout: &'static str,
        /// Offset into the packed bytes.
        offset: usize,
        /// The invalid pattern.
        what: String,
    },
    /// The layout cannot hold the matrix.
    #[error("layout {layout} cannot hold this matrix: {why}")]
    Unsupported {
        /// The layout's name.
        layout: &'static str,
        /// The constraint, with the offending number.
        why: String,
    },
    /// An unknown name.
    #[error("unknown {what} '{got}', expected one of {expected}")]
    UnknownName {
        /// The kind of name.
        what: &'static str,
        /// The unknown name.
        got: String,
        /// The known names.
        expected: String,
    },
    /// The scheme is invalid.
    #[error("invalid scheme: {0}")]
    Scheme(String),
    /// Blocks or signs of a rotation are invalid.
    #[error("invalid rotation: {0}")]
    Rotation(String),
    /// The matrix does not fit the address space.
    #[error("a matrix of {rows} × {cols} is too large for this machine")]
    TooLarge {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
