//! The error type of this crate.

use std::path::PathBuf;

/// Errors of loading and running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A checkpoint has a wrong config, tensor or byte.
    #[error(transparent)]
    File(#[from] bitnet_formats::Error),
    /// The kernels reject a matrix.
    #[error("{}: tensor '{tensor}': {source}", path.display())]
    Matrix {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The reason.
        source: bitnet_kernels::Error,
    },
    /// The requested instruction set is not available.
    #[error(transparent)]
    Kernels(#[from] bitnet_kernels::Error),
    /// The system did not start the threads.
    #[error("cannot start {threads} threads: {source}")]
    Threads {
        /// The requested number.
        threads: usize,
        /// The reason.
        source: std::io::Error,
    },
    /// The tokenizer cannot be used.
    #[error("{}: tokenizer: {what}", path.display())]
    Tokenizer {
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        what: String,
    },
    /// The chat template cannot be used.
    #[error("chat template: {0}")]
    Template(String),
    /// The text exceeds the context.
    #[error("{got} tokens do not fit the context of {context}")]
    Context {
        /// Number of tokens of the text.
        got: usize,
        /// Size of the context in tokens.
        context: usize,
    },
    /// A token outside the vocabulary.
    #[error("token {got} is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        got: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The prompt has no token.
    #[error("an empty prompt: it has no token, and the tokenizer adds none")]
    EmptyPrompt,
    /// A text to embed has no characters but white space.
    #[error("an empty text: it has nothing to embed")]
    EmptyText,
    /// Activations became NaN or infinite.
    #[error("{at}: the activations are not finite numbers")]
    NotFinite {
        /// The layer, or the output.
        at: String,
    },
    /// An option has an invalid value.
    #[error("{option}: expected {expected}, got {got}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// The accepted values.
        expected: &'static str,
        /// The given value.
        got: String,
    },
    /// The caller interrupted the computation.
    #[error("interrupted")]
    Interrupted,
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
