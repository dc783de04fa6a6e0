//! The values of a quantized weight, and the weights that share a scale.

use crate::named;

/// Alphabet of the quantized values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

named!(Precision, "precision", {
    Binary = "binary",
    Ternary = "ternary",
    Int2 = "int2",
    Int3 = "int3",
    Int4 = "int4",
    Int8 = "int8",
});

impl Precision {
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
}

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// One scale for the matrix.
    Tensor,
    /// One scale for each row of W (output channel).
    Channel,
    /// One scale for each run of this many columns of a row; the last run of a row may be shorter.
    Group(usize),
}

named!(
    Granularity, "granularity",
    { Tensor = "tensor", Channel = "channel" },
    { Group { 0: usize } = "group": "N with N ≥ 1" if |&g| g > 0 }
);
