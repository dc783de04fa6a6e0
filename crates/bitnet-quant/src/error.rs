//! The error type of this crate.

#[cfg(feature = "qat")]
use std::path::PathBuf;

/// Errors of tensors, layers and training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file, a recipe, a quantizer or a kernel refused.
    #[error(transparent)]
    Checkpoint(#[from] bitnet_checkpoint::Error),
    /// The operation does not accept a tensor or number.
    #[error("{what}: expected {expected}, got {got}")]
    Input {
        /// Which tensor or number.
        what: &'static str,
        /// What the operation accepts.
        expected: String,
        /// What it got.
        got: String,
    },
    /// candle returned an error.
    #[cfg(feature = "tensor")]
    #[error(transparent)]
    Candle(Box<candle_core::Error>),
    /// The loss or the gradients of a training are not finite.
    #[cfg(feature = "qat")]
    #[error("step {step}: the {what} is {got}; {}", last_good(checkpoint.as_deref()))]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// Loss or norm of the gradients.
        what: &'static str,
        /// Its value.
        got: f64,
        /// The newest checkpoint.
        checkpoint: Option<PathBuf>,
    },
}

#[cfg(feature = "qat")]
fn last_good(checkpoint: Option<&std::path::Path>) -> String {
    match checkpoint {
        Some(path) => format!("the last good checkpoint is {}", path.display()),
        None => "no checkpoint was written before".into(),
    }
}

#[cfg(feature = "tensor")]
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(Box::new(error))
    }
}

macro_rules! from_lower_crates {
    ($($error:ty),+) => {$(
        impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::Checkpoint(error.into())
            }
        }
    )+};
}
from_lower_crates!(
    bitnet_core::Error,
    bitnet_formats::Error,
    bitnet_kernels::Error
);

impl Error {
    /// [`bitnet_checkpoint::Error::Invalid`] if `wrong` names a field.
    pub(crate) fn unless_empty(wrong: Vec<String>) -> Result<()> {
        Ok(bitnet_checkpoint::Error::unless_empty(wrong)?)
    }

    /// One wrong field, or several.
    pub(crate) fn invalid(wrong: Vec<String>) -> Self {
        bitnet_checkpoint::Error::Invalid(wrong).into()
    }

    /// A recipe or a document that cannot be read, written or applied.
    #[cfg(feature = "qat")]
    pub(crate) fn recipe(what: impl ToString) -> Self {
        bitnet_checkpoint::Error::Recipe(what.to_string()).into()
    }

    #[cfg(feature = "tensor")]
    pub(crate) fn input(what: &'static str, expected: impl ToString, got: impl ToString) -> Self {
        Self::Input {
            what,
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
