//! Which operations to measure, and on which shapes.

use bitnet_core::named;
use std::fmt;
use std::str::FromStr;

/// A group of operations, by the name that `--operations` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

named!(OperationGroup, "operation", {
    Quantization = "quantization",
    Packing = "packing",
    Simd = "simd",
    Gemv = "gemv",
    Gemm = "gemm",
});

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
