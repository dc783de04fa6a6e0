//! What to quantize to and how: plain, serialisable data that every crate above shares.

use crate::codes::ZeroPoints;
use crate::{Error, MatrixSpec, Result};
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

/// What `round` does with a number half-way between two integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rounding {
    /// To the even neighbour, as IEEE 754, torch and numpy do.
    #[default]
    HalfEven,
    /// Away from zero, as C's `roundf` and ggml do.
    HalfAway,
    /// Up: `floor(x + 0.5)`, as onebitllms does.
    HalfUp,
}

impl Rounding {
    /// The integer that `x` becomes.
    #[inline(always)]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::HalfEven => x.round_ties_even(),
            Self::HalfAway => x.round(),
            Self::HalfUp => (x + 0.5).floor(),
        }
    }
}

/// Which weights of a granule become ±1. `mean` and `median` are over |w|, zeros included.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Threshold {
    /// `s = mean|W|`, `q = clip(round(W / s), −1, 1)` (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).
    #[default]
    Absmean,
    /// `Δ = 0.7·mean|W|`, `q = sign(W)·[|W| > Δ]`, `s = mean|W|` over the kept (ternary weight networks, Li et al. 2016, arXiv:1605.04711).
    Mean,
    /// `Δ = 0.8·median|W|`, then as [`Threshold::Mean`]: outliers do not move it.
    Median,
    /// `Δ = t(ρ)·mean|W|` with `ρ = mean|W| / rms(W)`, then as [`Threshold::Mean`].
    ///
    /// `t` is the factor that is optimal for the generalised normal distribution with that ρ: 0.667 for uniform weights, 0.767 for normal,
    /// 1.0 for Laplace, more for heavier tails. It follows the shape of the weights with two moments, where `Mean` assumes one shape
    /// for all and `Optimal` needs many passes.
    Adaptive,
    /// The exact minimum of `Σ h·(w − s·q)²` over `Δ` and `s`: the k largest |w|, k maximising `(Σ h|w|)² / Σ h`, and `s = Σ h|w| / Σ h`.
    Optimal,
    /// `Δ = factor·mean|W|`, then as [`Threshold::Mean`].
    Factor(f32),
}

/// Where the scale of a ternary granule comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    /// As the threshold rule says. Every rule but [`Threshold::Absmean`] says least squares.
    #[default]
    Rule,
    /// `s = (W·Q) / (Q·Q)`: the best scale for the codes that the rule chose.
    LeastSquares,
}

/// How two levels are placed for binary weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BinarySplit {
    /// `q = +1 if w ≥ 0 else −1`, `s = mean|W|`: the least squared error that `±s` can reach (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279).
    #[default]
    Zero,
    /// `q = +1 if w ≥ mean(W) else −1` with two free levels, the means of the two sides.
    Mean,
    /// The split with the least squared error for two free levels (exact one-dimensional 2-means).
    Optimal,
}

/// Whether an integer range is symmetric about zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mapping {
    /// `s = max|W| / qmax` with `qmax = 2^(b−1) − 1`, no zero point.
    #[default]
    Symmetric,
    /// `s = (max − min) / (2^b − 1)` over a range that includes 0, with an integer zero point.
    Asymmetric,
}

/// How much of the range of an integer granule is kept; what lies outside saturates.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clip {
    /// All of it.
    #[default]
    None,
    /// At most this many times the granule's root mean square on each side.
    Rms(f32),
    /// The share i/64 of the range, i from 16 to 64, with the least squared error.
    Search,
}

/// What to quantize to, and by which rule.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Method {
    /// {−1, 0, +1}.
    Ternary {
        /// Which weights become ±1.
        threshold: Threshold,
        /// Where the scale comes from.
        scale: ScaleRule,
        /// `W ≈ Σ α_k·T_k`: 1, 2 or 3 planes. Several planes always minimise the squared error and need [`Threshold::Optimal`].
        planes: usize,
    },
    /// {−1, +1}.
    Binary {
        /// Where the two levels are.
        split: BinarySplit,
        /// `Some(seed)`: `q = +1` with probability `clip((w/s + 1)/2, 0, 1)`, reproducible, independent of the number of threads.
        stochastic: Option<u64>,
    },
    /// Two's complement integers.
    Int {
        /// 2, 3, 4 or 8.
        bits: u32,
        /// Symmetric or with a zero point.
        mapping: Mapping,
        /// How much of the range is kept.
        clip: Clip,
    },
}

/// A complete recipe for one matrix.
///
/// ```
/// use bitnet_core::scheme::{Scheme, Threshold};
/// use bitnet_core::{Granularity, ops::Scalar, quantize::quantize};
///
/// let scheme = Scheme::ternary(Threshold::Absmean).with_granularity(Granularity::Channel);
/// let matrix = quantize(&Scalar, &[0.9, -0.1, 0.2, -0.8], 1, 4, &scheme, None)?;
/// assert_eq!(matrix.values, [1, 0, 0, -1]);
/// assert_eq!(matrix.scales, [0.5]); // mean|W|
/// # Ok::<(), bitnet_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// Alphabet and rule.
    pub method: Method,
    /// What one scale covers.
    pub granularity: Granularity,
    /// How scales are stored.
    pub scale_dtype: ScaleDtype,
    /// What happens at ties.
    pub rounding: Rounding,
}

impl Scheme {
    fn new(method: Method) -> Self {
        Self { method, granularity: Granularity::Tensor, scale_dtype: ScaleDtype::F32, rounding: Rounding::HalfEven }
    }

    /// Ternary with one plane, per tensor, f32 scales, half to even.
    pub fn ternary(threshold: Threshold) -> Self {
        Self::new(Method::Ternary { threshold, scale: ScaleRule::Rule, planes: 1 })
    }

    /// Several trit planes.
    pub fn planes(planes: usize) -> Self {
        Self::new(Method::Ternary { threshold: Threshold::Optimal, scale: ScaleRule::Rule, planes })
    }

    /// Binary.
    pub fn binary(split: BinarySplit) -> Self {
        Self::new(Method::Binary { split, stochastic: None })
    }

    /// Symmetric integers of 2, 3, 4 or 8 bits over the whole range.
    pub fn int(bits: u32) -> Self {
        Self::new(Method::Int { bits, mapping: Mapping::Symmetric, clip: Clip::None })
    }

    /// The same with another granularity.
    pub fn with_granularity(self, granularity: Granularity) -> Self {
        Self { granularity, ..self }
    }

    /// The same with another scale type.
    pub fn with_scale_dtype(self, scale_dtype: ScaleDtype) -> Self {
        Self { scale_dtype, ..self }
    }

    /// Alphabet of the values.
    ///
    /// # Errors
    /// [`Error::Scheme`] for a number of bits that does not exist.
    pub fn precision(&self) -> Result<Precision> {
        match self.method {
            Method::Ternary { .. } => Ok(Precision::Ternary),
            Method::Binary { .. } => Ok(Precision::Binary),
            Method::Int { bits: 2, .. } => Ok(Precision::Int2),
            Method::Int { bits: 3, .. } => Ok(Precision::Int3),
            Method::Int { bits: 4, .. } => Ok(Precision::Int4),
            Method::Int { bits: 8, .. } => Ok(Precision::Int8),
            Method::Int { bits, .. } => Err(Error::Scheme(format!("integers of {bits} bits; 2, 3, 4 and 8 exist"))),
        }
    }

    /// The spec of a matrix that this scheme makes.
    ///
    /// # Errors
    /// [`Error::Scheme`] for a combination that does not exist, [`Error::TooLarge`] for sizes that overflow.
    pub fn spec(&self, rows: usize, cols: usize) -> Result<MatrixSpec> {
        let precision = self.precision()?;
        let factor = |what, x: f32| {
            if x.is_finite() && x > 0.0 { Ok(()) } else { Err(Error::Scheme(format!("{what} {x}; it must be a positive number"))) }
        };
        let mut planes = 1;
        let mut zero_points = ZeroPoints::None;
        match self.method {
            Method::Ternary { threshold, planes: n, .. } => {
                if let Threshold::Factor(x) = threshold {
                    factor("a threshold factor of", x)?;
                }
                if n > 1 && threshold != Threshold::Optimal {
                    return Err(Error::Scheme(format!("{n} trit planes with threshold {threshold:?}; several planes need Optimal")));
                }
                planes = n;
            }
            Method::Binary { split: BinarySplit::Zero, .. } => {}
            Method::Binary { stochastic: Some(_), split } => {
                return Err(Error::Scheme(format!("stochastic binary with split {split:?}; it needs Zero")));
            }
            Method::Binary { .. } => zero_points = ZeroPoints::F32,
            Method::Int { mapping, clip, .. } => {
                if let Clip::Rms(x) = clip {
                    factor("a clip of", x)?;
                }
                if mapping == Mapping::Asymmetric {
                    zero_points = ZeroPoints::I8;
                }
            }
        }
        let spec = MatrixSpec { rows, cols, precision, planes, granularity: self.granularity, scale_dtype: self.scale_dtype, zero_points };
        spec.validate()?;
        Ok(spec)
    }
}
