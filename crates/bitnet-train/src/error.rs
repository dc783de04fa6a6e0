//! The error type of this crate.

use std::path::{Path, PathBuf};

/// Errors of a training run.
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
    /// An operation of candle failed.
    #[error(transparent)]
    Candle(Box<candle_core::Error>),
    /// A data file has wrong content.
    #[error("{}: expected {expected}, got {got}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The expected content.
        expected: String,
        /// The content.
        got: String,
    },
    /// A setting is invalid or contradicts another.
    #[error("{option}: expected {expected}, got {got}")]
    Option {
        /// Name of the setting.
        option: String,
        /// The accepted values.
        expected: String,
        /// The given value.
        got: String,
    },
    /// A configuration file cannot be read.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The error, with its line.
        what: String,
    },
    /// The tokenizer cannot be used.
    #[error("{}: tokenizer: {what}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// The error.
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
