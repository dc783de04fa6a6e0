//! How the weights of a model are held in memory, and what they are multiplied with.

use crate::{Error, Result};
use bitnet_kernels::dense::BlockType;
use std::fmt;
use std::str::FromStr;

/// Type of the inputs of ternary layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActivationType {
    /// int8 in models whose files say that they were trained with it (architecture `bitnet`, a
    /// `quantization_config` of `bitnet`, or our recipe in the file), floats in others.
    #[default]
    Auto,
    /// 8-bit integers with one absmax scale per token.
    Int8,
    /// Floats.
    Float,
}

impl FromStr for ActivationType {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "int8" => Ok(Self::Int8),
            "float" => Ok(Self::Float),
            _ => Err(Error::Option {
                option: "activations",
                expected: "auto, int8 or float",
                got: format!("'{s}'"),
            }),
        }
    }
}

/// Type in memory of weights with float activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FloatType {
    /// Lossless. f32, f16 and bf16 stay as stored. Block types of GGUF, and quantized layers of one
    /// plane without zero points, stay integers (ternary layers in 2 bits). Other weights become
    /// f32.
    #[default]
    Exact,
    /// Rounded to bf16: an error of 2⁻⁹ of each weight, 56 dB.
    Bf16,
    /// 8-bit integers with one f16 scale per 32 columns (Q8_0): about 44 dB for normal weights.
    /// Weights stored with codes of 8 bits or fewer stay exact.
    Int8,
    /// 4-bit integers with one f16 scale per 32 columns (Q4_0): about 20 dB for normal weights.
    /// Weights stored with codes of 4 bits or fewer stay exact.
    Int4,
}

impl FloatType {
    /// Whether weights that are stored in blocks of `kind` keep them.
    pub(super) fn keeps(self, kind: BlockType) -> bool {
        match self {
            Self::Exact => true,
            Self::Bf16 => false,
            Self::Int8 => kind.codes.bits() <= 8,
            Self::Int4 => kind.codes.bits() <= 4,
        }
    }
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Exact => "exact",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

impl FromStr for FloatType {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "exact" => Ok(Self::Exact),
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            _ => Err(Error::Option {
                option: "type of weights",
                expected: "exact, bf16, int8 or int4",
                got: format!("'{s}'"),
            }),
        }
    }
}
