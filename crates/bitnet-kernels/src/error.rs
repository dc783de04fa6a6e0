//! Why there are no kernels for a name, or why a matrix does not fit them.

use crate::isa::Isa;
use std::str::FromStr;

/// Why there are no kernels for a name, or why a matrix does not fit them.
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
    /// The matrix or the activations are not what the kernels take.
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
