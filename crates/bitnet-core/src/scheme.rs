//! Schemes: the precision and the rule by which a matrix is quantized, as plain, serialisable data.

use crate::{
    Error, Granularity, MatrixSpec, Precision, Result, ScaleDtype, ScaleForm, ScaleStorage,
    ZeroPoints, named,
};
use serde::{Deserialize, Serialize};

/// How a number half-way between two integers is rounded.
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

named!(Rounding, "rounding", {
    HalfEven = "half-even",
    HalfAway = "half-away",
    HalfUp = "half-up",
});

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
    /// `Δ = 0.8·median|W|`, then as [`Threshold::Mean`]: robust against outliers.
    Median,
    /// `Δ = t(ρ)·mean|W|` with `ρ = mean|W| / rms(W)`, then as [`Threshold::Mean`].
    ///
    /// `t` is the factor that is optimal for the generalised normal distribution with that ρ: 0.667
    /// for uniform weights, 0.767 for normal, 1.0 for Laplace, more for heavier tails. It adapts to
    /// the shape of the distribution with two moments; `Mean` assumes one shape, `Optimal` needs
    /// many passes.
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
    /// The scale of the threshold rule: least squares for every rule but [`Threshold::Absmean`].
    #[default]
    Rule,
    /// `s = (W·Q) / (Q·Q)`: the best scale for the codes that the rule chose.
    LeastSquares,
}

named!(ScaleRule, "scale rule", { Rule = "rule", LeastSquares = "least-squares" });

/// The two levels of binary weights.
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

/// How much of the range of an integer granule is kept; weights outside it saturate.
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

/// The values, and the rule that chooses them.
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
        /// `Some(seed)`: `q = +1` with probability `clip((w/s + 1)/2, 0, 1)`. The result depends
        /// on the seed, not on the number of threads.
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
    /// Which weights share a scale.
    pub granularity: Granularity,
    /// How scales are stored.
    pub scale_dtype: ScaleDtype,
    /// Whether the container stores scales or their inverses.
    #[serde(default)]
    pub scale_form: ScaleForm,
    /// How ties are rounded.
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

    /// Whether the rule can weigh errors by the importance of their columns. With other rules an
    /// importance is an error.
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
                        "{n} trit planes with threshold {threshold}; several planes need optimal"
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
                    "stochastic binary with split {split}; it needs zero"
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
        // The inverse of a stored number of any type is an f32.
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
