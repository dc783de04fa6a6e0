//! The error type of this crate.

use std::path::{Path, PathBuf};

/// What can go wrong between data and a trained model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    File(#[from] bitnet_formats::Error),
    /// Training or quantization failed.
    #[error(transparent)]
    Quant(#[from] bitnet_quant::Error),
    /// The packed model cannot be run.
    #[error(transparent)]
    Inference(#[from] bitnet_inference::Error),
    /// candle could not do it.
    #[error(transparent)]
    Candle(Box<candle_core::Error>),
    /// Data are not what they should be.
    #[error("{}: expected {expected}, got {got}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What should be there.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A setting that means nothing, or that contradicts another.
    #[error("{option}: expected {expected}, got {got}")]
    Option {
        /// Its name.
        option: String,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A configuration file is not one.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its line.
        what: String,
    },
    /// The tokenizer cannot be used.
    #[error("{}: tokenizer: {what}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl Error {
    pub(crate) fn data(path: &Path, expected: impl ToString, got: impl ToString) -> Self {
        Self::Data {
            path: path.to_path_buf(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }

    pub(crate) fn option(
        option: impl ToString,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self::Option {
            option: option.to_string(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}

impl From<bitnet_quant::CheckpointError> for Error {
    fn from(error: bitnet_quant::CheckpointError) -> Self {
        Self::Quant(error.into())
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(Box::new(error))
    }
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
