//! The error type of this crate. Each message names the file, the tensor if there is one, and what
//! was found.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The action, as a verb.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The file as a whole is invalid.
    #[error("{}: expected {expected}, got {got}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was expected.
        expected: String,
        /// What was found.
        got: String,
    },
    /// One tensor of the file is invalid.
    #[error("{}: tensor '{tensor}': expected {expected}, got {got}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What was expected.
        expected: String,
        /// What was found.
        got: String,
    },
    /// One key of a config.json or of a file's metadata is invalid.
    #[error("{}: {key}: expected {expected}, got {got}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: String,
        /// What was expected.
        expected: String,
        /// What was found.
        got: String,
    },
    /// The file is not a GGUF that this reader takes.
    #[error("{}: {source}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: crate::gguf::Error,
    },
    /// The numbers of a tensor do not fit its layout.
    #[error("{}: tensor '{tensor}': {source}", path.display())]
    Matrix {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong.
        source: bitnet_core::Error,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// [`Error::Io`] for `map_err`.
    pub fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }

    /// [`Error::File`].
    pub fn file(path: &Path, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::File {
            path: path.to_path_buf(),
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// [`Error::Tensor`].
    pub fn tensor(
        path: &Path,
        tensor: &str,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Tensor {
            path: path.to_path_buf(),
            tensor: tensor.into(),
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// [`Error::Config`].
    pub fn config(
        path: &Path,
        key: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Config {
            path: path.to_path_buf(),
            key: key.into(),
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// [`Error::Matrix`] for `map_err`.
    pub fn matrix(path: &Path, tensor: &str) -> impl FnOnce(bitnet_core::Error) -> Self + use<> {
        let (path, tensor) = (path.to_path_buf(), tensor.to_string());
        move |source| Self::Matrix {
            path,
            tensor,
            source,
        }
    }
}
