//! The error type of this crate.

use std::path::PathBuf;

/// Errors of jobs on checkpoints.
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
        /// The reason.
        source: bitnet_core::Error,
    },
    /// An invalid scheme or matrix, without a tensor name.
    #[error(transparent)]
    Core(#[from] bitnet_core::Error),
    /// The recipe names something that does not exist or does not apply.
    #[error("recipe: {0}")]
    Recipe(String),
    /// All wrong fields of a configuration.
    #[error("{} wrong: {}", if .0.len() == 1 { "one field is".into() } else { format!("{} fields are", .0.len()) }, .0.join("; "))]
    Invalid(Vec<String>),
    /// An unavailable instruction set, or a matrix that no kernel multiplies.
    #[error(transparent)]
    Kernels(#[from] bitnet_kernels::Error),
    /// The calibration has no statistics of this layer.
    #[error("no calibration for '{0}': observe its input first")]
    NotCalibrated(String),
    /// The target exists.
    #[error("{} exists already", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The target is the input, or a parent folder of it.
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
        /// The difference.
        what: String,
    },
    /// The caller stopped the job. The same job resumes from the partial result.
    #[error("interrupted; run the same command to resume")]
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
