//! The error type of this crate.

use std::path::PathBuf;

/// What can go wrong between a path and a text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file is not what it should be: its config, its tensors, their bytes.
    #[error(transparent)]
    File(#[from] bitnet_formats::Error),
    /// A matrix is not what the kernels take.
    #[error("{}: tensor '{tensor}': {source}", path.display())]
    Matrix {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Why not.
        source: bitnet_kernels::Error,
    },
    /// The instruction set asked for is not there.
    #[error(transparent)]
    Kernels(#[from] bitnet_kernels::Error),
    /// The system starts no more threads.
    #[error("cannot start {threads} threads: {source}")]
    Threads {
        /// The number asked for.
        threads: usize,
        /// Why not.
        source: std::io::Error,
    },
    /// The tokenizer cannot be used.
    #[error("{}: tokenizer: {what}", path.display())]
    Tokenizer {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The chat template cannot be used.
    #[error("chat template: {0}")]
    Template(String),
    /// The text does not fit.
    #[error("{got} tokens do not fit the context of {context}")]
    Context {
        /// Tokens of the text.
        got: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// A token that the vocabulary does not have.
    #[error("token {got} is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        got: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// There is nothing to begin with.
    #[error("an empty prompt: there is no token to begin with, and the tokenizer adds none")]
    EmptyPrompt,
    /// Activations became NaN or infinite.
    #[error("{at}: the activations are not finite numbers")]
    NotFinite {
        /// Where it was noticed.
        at: String,
    },
    /// An option has a value that means nothing.
    #[error("{option}: expected {expected}, got {got}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What it takes.
        expected: &'static str,
        /// What it was given.
        got: String,
    },
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
