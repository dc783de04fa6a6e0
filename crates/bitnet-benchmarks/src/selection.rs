//! Which operations to measure, and on which shapes.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A group of operations, by the name that `--operations` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OperationGroup {
    /// Floats to values, packed or not.
    Quantization,
    /// Values to packed bytes.
    Packing,
    /// Packed bytes to values.
    Simd,
    /// A matrix times one token.
    Gemv,
    /// A matrix times several tokens.
    Gemm,
}

impl OperationGroup {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Quantization,
        Self::Packing,
        Self::Simd,
        Self::Gemv,
        Self::Gemm,
    ];
}

impl fmt::Display for OperationGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Quantization => "quantization",
            Self::Packing => "packing",
            Self::Simd => "simd",
            Self::Gemv => "gemv",
            Self::Gemm => "gemm",
        })
    }
}

impl FromStr for OperationGroup {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(|g| g.to_string()).join(", ");
        Self::ALL
            .into_iter()
            .find(|g| g.to_string() == s)
            .ok_or_else(|| format!("unknown operation '{s}', expected {}", names()))
    }
}

/// Shape of a weight matrix, N × K: out_features × in_features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightShape {
    /// Rows N.
    pub n: usize,
    /// Columns K.
    pub k: usize,
}

/// Limit on the weights of a shape: its copies in f32 must fit into memory.
const MAX_WEIGHTS: usize = 1 << 28;

impl WeightShape {
    /// The shape `n` × `k`. Both must be at least 1.
    pub const fn new(n: usize, k: usize) -> Self {
        Self { n, k }
    }
}

impl fmt::Display for WeightShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}×{}", self.n, self.k))
    }
}

impl FromStr for WeightShape {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let sides = s
            .split_once(['x', '×'])
            .and_then(|(n, k)| Some((n.parse().ok()?, k.parse().ok()?)));
        match sides {
            Some((n @ 1.., k @ 1..))
                if usize::checked_mul(n, k).is_some_and(|w| w <= MAX_WEIGHTS) =>
            {
                Ok(Self { n, k })
            }
            _ => Err(format!(
                "'{s}' is no shape, expected N×K such as 6912x2560, of 1 to {MAX_WEIGHTS} weights"
            )),
        }
    }
}

/// The cases to measure.
#[derive(Debug, Clone)]
pub struct CaseSelection {
    /// Groups, in the order in which they run.
    pub groups: Vec<OperationGroup>,
    /// Shapes of the weights in [`OperationGroup::Gemv`].
    pub gemv: Vec<WeightShape>,
    /// Shapes of the weights in [`OperationGroup::Gemm`].
    pub gemm: Vec<WeightShape>,
    /// Numbers of tokens M in [`OperationGroup::Gemm`].
    pub tokens: Vec<usize>,
    /// The contenders beside our widest kernels.
    pub rivals: Rivals,
}

/// The contenders beside our widest kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rivals {
    /// Other engines, our scalar code and the narrower instruction sets.
    All,
    /// No other contender.
    None,
}
