//! What to quantize to and how: plain, serialisable data that every crate above shares.

use crate::codes::ZeroPoints;
use crate::{Error, MatrixSpec, Result, named};
use serde::{Deserialize, Serialize};

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

named!(Precision, "precision", { Binary = "binary", Ternary = "ternary", Int2 = "int2", Int3 = "int3", Int4 = "int4", Int8 = "int8" });

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

/// What one scale covers.
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

/// How a scale is stored. Codes are chosen knowing the scale after this rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleDtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

named!(ScaleDtype, "scale type", { F32 = "f32", F16 = "f16", Bf16 = "bf16" });

impl ScaleDtype {
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
}

/// What `round` does with a number half-way between two integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Rounding {
    /// To the even neighbour, as IEEE 754, torch and numpy do.
    #[default]
    HalfEven,
    /// Away from zero, as C's `roundf` and ggml do.
    HalfAway,
    /// Up: `floor(x + 0.5)`, as onebitllms does.
    HalfUp,
}

named!(Rounding, "rounding", { HalfEven = "half-even", HalfAway = "half-away", HalfUp = "half-up" });

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
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Threshold {
    /// `s = mean|W|`, `q = clip(round(W / s), −1, 1)` (BitNet b1.58, Ma et al. 2024,
    /// arXiv:2402.17764).
    #[default]
    Absmean,
    /// `Δ = 0.7·mean|W|`, `q = sign(W)·[|W| > Δ]`, `s = mean|W|` over the kept (ternary weight
    /// networks, Li et al. 2016, arXiv:1605.04711).
    Mean,
    /// `Δ = 0.8·median|W|`, then as [`Threshold::Mean`]: outliers do not move it.
    Median,
    /// `Δ = t(ρ)·mean|W|` with `ρ = mean|W| / rms(W)`, then as [`Threshold::Mean`].
    ///
    /// `t` is the factor that is optimal for the generalised normal distribution with that ρ: 0.667
    /// for uniform weights, 0.767 for normal, 1.0 for Laplace, more for heavier tails. It follows
    /// the shape of the weights with two moments, where `Mean` assumes one shape for all and
    /// `Optimal` needs many passes.
    Adaptive,
    /// The exact minimum of `Σ h·(w − s·q)²` over `Δ` and `s`: the k largest |w|, k maximising `(Σ
    /// h|w|)² / Σ h`, and `s = Σ h|w| / Σ h`.
    Optimal,
    /// `Δ = factor·mean|W|`, then as [`Threshold::Mean`].
    Factor(f32),
}

named!(
    Threshold, "threshold",
    {
        Absmean = "absmean",
        Mean = "mean",
        Median = "median",
        Adaptive = "adaptive",
        Optimal = "optimal",
    },
    { Factor { 0: f32 } = "factor": "X" }
);

/// Where the scale of a ternary granule comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScaleRule {
    /// As the threshold rule says. Every rule but [`Threshold::Absmean`] says least squares.
    #[default]
    Rule,
    /// `s = (W·Q) / (Q·Q)`: the best scale for the codes that the rule chose.
    LeastSquares,
}

named!(ScaleRule, "scale rule", { Rule = "rule", LeastSquares = "least-squares" });

/// Whether the container stores a scale or its inverse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScaleForm {
    /// The scale.
    #[default]
    Direct,
    /// 1/scale, as HF `bitlinear` folders do. The scale that counts is then `1/x` in f32 for the
    /// stored x.
    Inverse,
}

named!(ScaleForm, "scale form", { Direct = "direct", Inverse = "inverse" });

/// Everything about the storage of a scale: what it becomes between the quantizer and a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScaleStorage {
    /// Type of the stored number.
    pub dtype: ScaleDtype,
    /// What the number is.
    pub form: ScaleForm,
}

impl ScaleStorage {
    /// What is stored for the scale of an all-zero granule where inverses are stored: finite in
    /// every type, as 1/0 is not.
    pub const DEAD_INVERSE: f32 = 32768.0;

    /// The number that is stored for a scale: itself, or the f32 whose inverse it is.
    ///
    /// Inverting twice may be off by one in the last place, so a neighbour whose inverse is exactly
    /// `scale` is taken where there is one.
    pub fn to_stored(self, scale: f32) -> f32 {
        match self.form {
            ScaleForm::Direct => scale,
            ScaleForm::Inverse if scale == 0.0 => Self::DEAD_INVERSE,
            ScaleForm::Inverse => {
                let near = scale.recip();
                let candidates = [
                    self.dtype.round(near),
                    near,
                    near.next_up(),
                    near.next_down(),
                ];
                candidates
                    .into_iter()
                    .find(|x| x.recip() == scale)
                    .unwrap_or(near)
            }
        }
    }

    /// The scale that a reader will find.
    ///
    /// # Errors
    /// [`Error::Scheme`] if the type cannot hold it.
    pub fn round(self, scale: f64) -> Result<f32> {
        let nearest = self.back(self.nearest(self.exact(scale)));
        if nearest.is_finite() {
            Ok(nearest)
        } else {
            Err(self.too_large(scale))
        }
    }

    /// The storable scale nearest to `scale`, and its neighbour on the other side of `scale` (f32
    /// scales have none: both are the same). A scale that is too small for the type becomes 0, and
    /// the granule then holds only zeros; one that is too large is an error.
    ///
    /// # Errors
    /// [`Error::Scheme`] if the type cannot hold it.
    pub fn around(self, scale: f64) -> Result<(f32, f32)> {
        let exact = self.exact(scale);
        let nearest = self.nearest(exact);
        let other = match self.dtype {
            ScaleDtype::F32 => nearest,
            ScaleDtype::F16 | ScaleDtype::Bf16 => {
                // Neighbours of a positive number differ by one in the last bit that the type
                // keeps; rounding repairs subnormals.
                let step = if self.dtype == ScaleDtype::F16 {
                    1 << 13
                } else {
                    1 << 16
                };
                let bits = nearest.to_bits();
                let bits = if f64::from(nearest) < exact {
                    bits.saturating_add(step)
                } else {
                    bits.saturating_sub(step)
                };
                self.dtype.round(f32::from_bits(bits))
            }
        };
        let (nearest, other) = (self.back(nearest), self.back(other));
        if !nearest.is_finite() {
            return Err(self.too_large(scale));
        }
        Ok((nearest, if other.is_finite() { other } else { nearest }))
    }

    /// What would be stored if the type held every number.
    fn exact(self, scale: f64) -> f64 {
        match self.form {
            ScaleForm::Direct => scale,
            ScaleForm::Inverse if scale == 0.0 => f64::from(Self::DEAD_INVERSE),
            ScaleForm::Inverse => scale.recip(),
        }
    }

    /// What is stored.
    fn nearest(self, exact: f64) -> f32 {
        let nearest = self.dtype.round(exact as f32);
        if self.form == ScaleForm::Direct || nearest.is_finite() {
            return nearest;
        }
        // The inverse of a tiny scale: the largest number of the type stands for the smallest scale
        // there is.
        match self.dtype {
            ScaleDtype::F32 => f32::MAX,
            ScaleDtype::F16 => half::f16::MAX.to_f32(),
            ScaleDtype::Bf16 => half::bf16::MAX.to_f32(),
        }
    }

    /// The scale that a stored number stands for.
    fn back(self, stored: f32) -> f32 {
        match self.form {
            ScaleForm::Direct => stored,
            ScaleForm::Inverse => stored.recip(),
        }
    }

    fn too_large(self, scale: f64) -> Error {
        Error::Scheme(format!(
            "a scale of {scale:e} does not fit {} ({})",
            self.dtype, self.form
        ))
    }
}

/// How two levels are placed for binary weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BinarySplit {
    /// `q = +1 if w ≥ 0 else −1`, `s = mean|W|`: the least squared error that `±s` can reach
    /// (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279).
    #[default]
    Zero,
    /// `q = +1 if w ≥ mean(W) else −1` with two free levels, the means of the two sides.
    Mean,
    /// The split with the least squared error for two free levels (exact one-dimensional 2-means).
    Optimal,
}

named!(BinarySplit, "binary split", { Zero = "zero", Mean = "mean", Optimal = "optimal" });

/// Whether an integer range is symmetric about zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mapping {
    /// `s = max|W| / qmax` with `qmax = 2^(b−1) − 1`, no zero point.
    #[default]
    Symmetric,
    /// `s = (max − min) / (2^b − 1)` over a range that includes 0, with an integer zero point.
    Asymmetric,
}

named!(Mapping, "mapping", { Symmetric = "symmetric", Asymmetric = "asymmetric" });

/// How much of the range of an integer granule is kept; what lies outside saturates.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Clip {
    /// All of it.
    #[default]
    None,
    /// At most this many times the granule's root mean square on each side.
    Rms(f32),
    /// The share i/64 of the range, i from 16 to 64, with the least squared error.
    Search,
}

named!(
    Clip, "clip",
    { None = "none", Search = "search" },
    { Rms { 0: f32 } = "rms": "X" }
);

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
        /// `W ≈ Σ α_k·T_k`: 1, 2 or 3 planes. Several planes always minimise the squared error and
        /// need [`Threshold::Optimal`].
        planes: usize,
    },
    /// {−1, +1}.
    Binary {
        /// Where the two levels are.
        split: BinarySplit,
        /// `Some(seed)`: `q = +1` with probability `clip((w/s + 1)/2, 0, 1)`, reproducible,
        /// independent of the number of threads.
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
    /// Whether the container stores scales or their inverses.
    #[serde(default)]
    pub scale_form: ScaleForm,
    /// What happens at ties.
    pub rounding: Rounding,
}

impl Scheme {
    /// A method with one f32 scale for the matrix and ties to even.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            granularity: Granularity::Tensor,
            scale_dtype: ScaleDtype::F32,
            scale_form: ScaleForm::Direct,
            rounding: Rounding::HalfEven,
        }
    }

    /// How the scales are stored.
    pub fn scale_storage(&self) -> ScaleStorage {
        ScaleStorage {
            dtype: self.scale_dtype,
            form: self.scale_form,
        }
    }

    /// Ternary with one plane, per tensor, f32 scales, half to even.
    pub fn ternary(threshold: Threshold) -> Self {
        Self::new(Method::Ternary {
            threshold,
            scale: ScaleRule::Rule,
            planes: 1,
        })
    }

    /// Several trit planes.
    pub fn planes(planes: usize) -> Self {
        Self::new(Method::Ternary {
            threshold: Threshold::Optimal,
            scale: ScaleRule::Rule,
            planes,
        })
    }

    /// Binary.
    pub fn binary(split: BinarySplit) -> Self {
        Self::new(Method::Binary {
            split,
            stochastic: None,
        })
    }

    /// Symmetric integers of 2, 3, 4 or 8 bits over the whole range.
    pub fn int(bits: u32) -> Self {
        Self::new(Method::Int {
            bits,
            mapping: Mapping::Symmetric,
            clip: Clip::None,
        })
    }

    /// The same with another granularity.
    pub fn with_granularity(self, granularity: Granularity) -> Self {
        Self {
            granularity,
            ..self
        }
    }

    /// The same with another scale type.
    pub fn with_scale_dtype(self, scale_dtype: ScaleDtype) -> Self {
        Self {
            scale_dtype,
            ..self
        }
    }

    /// Whether the rule can weigh errors by the importance of their columns. The others refuse one.
    pub fn uses_importance(&self) -> bool {
        match self.method {
            Method::Ternary {
                threshold, planes, ..
            } => planes > 1 || threshold == Threshold::Optimal,
            Method::Binary { split, .. } => split == BinarySplit::Optimal,
            Method::Int { clip, .. } => clip == Clip::Search,
        }
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
            Method::Int { bits, .. } => Err(Error::Scheme(format!(
                "integers of {bits} bits; 2, 3, 4 and 8 exist"
            ))),
        }
    }

    /// The spec of a matrix that this scheme makes.
    ///
    /// # Errors
    /// [`Error::Scheme`] for a combination that does not exist, [`Error::TooLarge`] for sizes that
    /// overflow.
    pub fn spec(&self, rows: usize, cols: usize) -> Result<MatrixSpec> {
        let precision = self.precision()?;
        let factor = |what, x: f32| {
            if x.is_finite() && x > 0.0 {
                Ok(())
            } else {
                Err(Error::Scheme(format!(
                    "{what} {x}; it must be a positive number"
                )))
            }
        };
        let mut planes = 1;
        let mut zero_points = ZeroPoints::None;
        match self.method {
            Method::Ternary {
                threshold,
                planes: n,
                ..
            } => {
                if let Threshold::Factor(x) = threshold {
                    factor("a threshold factor of", x)?;
                }
                if n > 1 && threshold != Threshold::Optimal {
                    return Err(Error::Scheme(format!(
                        "{n} trit planes with threshold {threshold:?}; several planes need Optimal"
                    )));
                }
                planes = n;
            }
            Method::Binary {
                split: BinarySplit::Zero,
                ..
            } => {}
            Method::Binary {
                stochastic: Some(_),
                split,
            } => {
                return Err(Error::Scheme(format!(
                    "stochastic binary with split {split:?}; it needs Zero"
                )));
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
        // The inverse of a stored number is an f32, whatever the number's own type is.
        let scale_dtype = if self.scale_form == ScaleForm::Inverse {
            ScaleDtype::F32
        } else {
            self.scale_dtype
        };
        let spec = MatrixSpec {
            rows,
            cols,
            precision,
            planes,
            granularity: self.granularity,
            scale_dtype,
            zero_points,
        };
        spec.validate()?;
        Ok(spec)
    }
}
