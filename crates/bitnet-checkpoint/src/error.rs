//! The error type of this crate.

use std::path::PathBuf;

/// What can go wrong with a job on a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] bitnet_formats::Error),
    /// A tensor cannot be quantized or packed as asked.
    #[error("{}: tensor '{tensor}': {source}", path.display())]
    Tensor {
        /// The file that holds the tensor.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// Why not.
        source: bitnet_core::Error,
    },
    /// Something is wrong with a scheme or a matrix, apart from any tensor.
    #[error(transparent)]
    Core(#[from] bitnet_core::Error),
    /// The recipe asks for something that does not exist or does not apply.
    #[error("recipe: {0}")]
    Recipe(String),
    /// Wrong fields of a configuration, all of them.
    #[error("{} wrong: {}", if .0.len() == 1 { "one field is".into() } else { format!("{} fields are", .0.len()) }, .0.join("; "))]
    Invalid(Vec<String>),
    /// No kernels for the instruction set asked for, or no product of such a matrix.
    #[error(transparent)]
    Kernels(#[from] bitnet_kernels::Error),
    /// Statistics of activations that were never observed.
    #[error("no calibration for '{0}': observe its input first")]
    NotCalibrated(String),
    /// The target exists.
    #[error("{} exists already", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The target is what is read, or a folder around it.
    #[error("{} is the input or holds it; the output needs another path", path.display())]
    SameFile {
        /// The target.
        path: PathBuf,
    },
    /// The two checkpoints do not describe the same model.
    #[error("{}: {what}", path.display())]
    Mismatch {
        /// The second checkpoint.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// The caller asked to stop. What is done stays, and the same job goes on from there.
    #[error("interrupted; the same command goes on from here")]
    Interrupted,
}

impl Error {
    /// [`Error::Invalid`] if something is wrong.
    pub fn unless_empty(wrong: Vec<String>) -> Result<()> {
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(Self::Invalid(wrong))
        }
    }
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
