//! Errors of this crate.

use crate::isa::Isa;
use std::str::FromStr;

/// Errors of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no instruction set of that name.
    #[error(
        "unknown instruction set '{got}', expected one of {}",
        Isa::ALL.map(|isa| isa.to_string()).join(", ")
    )]
    UnknownIsa {
        /// The name given.
        got: String,
    },
    /// The kernels do not support the matrix or the activations.
    #[error(transparent)]
    Matrix(#[from] bitnet_core::Error),
    /// The machine does not have it.
    #[error("this machine does not run {isa}")]
    Unavailable {
        /// The instruction set.
        isa: Isa,
    },
}

impl FromStr for Isa {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.to_string() == s)
            .ok_or_else(|| Error::UnknownIsa { got: s.into() })
    }
}
