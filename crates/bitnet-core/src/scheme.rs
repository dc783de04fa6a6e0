//! What to quantize to and how: plain, serialisable data that every crate above shares.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Alphabet of the quantized values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// {−1, +1}.
    Binary,
    /// {−1, 0, +1}, log2 3 = 1.585 bits.
    Ternary,
    /// −2 … 1.
    Int2,
    /// −4 … 3.
    Int3,
    /// −8 … 7.
    Int4,
    /// −128 … 127.
    Int8,
}

impl Precision {
    /// All precisions, coarse to fine.
    pub const ALL: [Self; 6] = [Self::Binary, Self::Ternary, Self::Int2, Self::Int3, Self::Int4, Self::Int8];

    /// Smallest and largest value.
    pub const fn range(self) -> (i8, i8) {
        match self {
            Self::Binary | Self::Ternary => (-1, 1),
            Self::Int2 => (-2, 1),
            Self::Int3 => (-4, 3),
            Self::Int4 => (-8, 7),
            Self::Int8 => (-128, 127),
        }
    }

    /// Bits of one code in a fixed-width layout.
    pub const fn code_bits(self) -> u32 {
        match self {
            Self::Binary => 1,
            Self::Ternary | Self::Int2 => 2,
            Self::Int3 => 3,
            Self::Int4 => 4,
            Self::Int8 => 8,
        }
    }

    /// Number of distinct values.
    pub const fn levels(self) -> usize {
        match self {
            Self::Ternary => 3,
            other => 1 << other.code_bits(),
        }
    }

    /// Whether `value` belongs to the alphabet.
    pub const fn contains(self, value: i8) -> bool {
        let (low, high) = self.range();
        low <= value && value <= high && !(matches!(self, Self::Binary) && value == 0)
    }

    /// The alphabet in words, for messages.
    pub const fn alphabet(self) -> &'static str {
        match self {
            Self::Binary => "{-1, 1}",
            Self::Ternary => "{-1, 0, 1}",
            Self::Int2 => "-2..=1",
            Self::Int3 => "-4..=3",
            Self::Int4 => "-8..=7",
            Self::Int8 => "-128..=127",
        }
    }

    /// The name that files and the command line use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Binary => "binary",
            Self::Ternary => "ternary",
            Self::Int2 => "int2",
            Self::Int3 => "int3",
            Self::Int4 => "int4",
            Self::Int8 => "int8",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Precision {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|p| p.name() == s).ok_or_else(|| Error::UnknownName {
            what: "precision",
            got: s.into(),
            expected: Self::ALL.map(Self::name).join(", "),
        })
    }
}

/// What one scale covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Granularity {
    /// One scale for the matrix.
    Tensor,
    /// One scale for each row of W (output channel).
    Channel,
    /// One scale for each run of this many columns of a row; the last run of a row may be shorter.
    Group(usize),
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor => f.pad("tensor"),
            Self::Channel => f.pad("channel"),
            Self::Group(g) => f.pad(&format!("group:{g}")),
        }
    }
}

impl FromStr for Granularity {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let unknown =
            || Error::UnknownName { what: "granularity", got: s.into(), expected: "tensor, channel, group:N with N ≥ 1".into() };
        match s {
            "tensor" => Ok(Self::Tensor),
            "channel" => Ok(Self::Channel),
            _ => match s.strip_prefix("group:").and_then(|g| g.parse().ok()) {
                Some(g) if g > 0 => Ok(Self::Group(g)),
                _ => Err(unknown()),
            },
        }
    }
}

impl From<Granularity> for String {
    fn from(g: Granularity) -> Self {
        g.to_string()
    }
}

impl TryFrom<String> for Granularity {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

/// How a scale is stored. Codes are chosen knowing the scale after this rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl ScaleDtype {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The nearest number that the type holds (ties to even), as f32.
    ///
    /// ```
    /// use bitnet_core::ScaleDtype;
    /// assert_eq!(ScaleDtype::Bf16.round(1.003), 1.0);
    /// assert_eq!(ScaleDtype::F32.round(1.003), 1.003);
    /// ```
    pub fn round(self, scale: f32) -> f32 {
        match self {
            Self::F32 => scale,
            Self::F16 => half::f16::from_f32(scale).to_f32(),
            Self::Bf16 => half::bf16::from_f32(scale).to_f32(),
        }
    }

    /// Bytes of one stored scale.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Appends `scale` as little-endian bytes.
    pub fn write(self, scale: f32, out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(scale.to_le_bytes()),
            Self::F16 => out.extend(half::f16::from_f32(scale).to_le_bytes()),
            Self::Bf16 => out.extend(half::bf16::from_f32(scale).to_le_bytes()),
        }
    }

    /// The name that files and the command line use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for ScaleDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ScaleDtype {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|d| d.name() == s).ok_or_else(|| Error::UnknownName {
            what: "scale type",
            got: s.into(),
            expected: Self::ALL.map(Self::name).join(", "),
        })
    }
}
