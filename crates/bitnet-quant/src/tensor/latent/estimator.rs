//! Straight-through estimators: how a gradient passes the rounding of weights.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How the gradient passes the rounding of weights, and whether the scale is learned.
///
/// With `v = w/s`, and `low` and `high` the least and the greatest level in units of s:
///
/// ```
/// use bitnet_quant::qat::StraightThroughEstimator;
/// let soft: StraightThroughEstimator = "soft:0.5".parse()?;
/// assert_eq!(soft, StraightThroughEstimator::Soft { temperature: 0.5 });
/// assert_eq!(soft.to_string(), "soft:0.5");
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum StraightThroughEstimator {
    /// `m = 1` (Bengio et al. 2013, arXiv:1308.3432; b1.58 trains so). The scale is the scheme's
    /// and a constant of the gradient.
    #[default]
    Plain,
    /// `m = [range·low ≤ v ≤ range·high]`: weights far outside the levels stand still. `range` is
    /// positive.
    Clipped {
        /// Multiple of the outermost levels.
        range: f32,
    },
    /// LSQ (Esser et al. 2020, arXiv:1902.08153): s is a variable, `m = [low < v < high]`, and
    /// `∂ŵ/∂s = q − v` where that holds, else q. The gradient of s is multiplied by `1/√(n·Qp)`, n
    /// being the weights under one s and Qp the greatest value. Binary: `∂ŵ/∂s = q`. For schemes of
    /// one plane without zero points.
    LearnedScale,
    /// Stretched elastic (SEQ of ParetoQ, Liu et al. 2025, arXiv:2502.02631): α is a variable,
    /// levels are the middles of k equal parts of `[−α, α]`: `ŵ ∈ {−2α/3, 0, 2α/3}` for ternary,
    /// `{−3α/4, −α/4, α/4, 3α/4}` for 2 bits, `±α` for binary; `m = [|w| < α]`, and `∂ŵ/∂α = ŵ/α −
    /// w/α` where that holds, else `ŵ/α`; the gradient of α is multiplied as for LSQ.
    ///
    /// The four levels of 2 bits become the values ±1 and ±3 of int3 with the scale α/4: int2 has a
    /// zero and they have not.
    Stretched,
    /// The slope of a staircase of tanh: between two levels with middle c and half distance h, `m =
    /// (1 − tanh²(u/T)) / (T·tanh(1/T))` with `u = (v − c)/h`, and 0 outside the levels (DSQ, Gong
    /// et al. 2019, arXiv:1908.05033). T → ∞ is the clipped estimator with range 1.
    Soft {
        /// T, positive.
        temperature: f32,
    },
}

impl StraightThroughEstimator {
    /// Whether the scale is a variable.
    pub const fn learns_scale(self) -> bool {
        matches!(self, Self::LearnedScale | Self::Stretched)
    }

    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Self::Clipped { range: x } | Self::Soft { temperature: x }
                if !(x.is_finite() && x > 0.0) =>
            {
                Err(Error::input("estimator", "a positive number", self))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for StraightThroughEstimator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.pad("plain"),
            Self::Clipped { range } => f.pad(&format!("clipped:{range}")),
            Self::LearnedScale => f.pad("lsq"),
            Self::Stretched => f.pad("stretched"),
            Self::Soft { temperature } => f.pad(&format!("soft:{temperature}")),
        }
    }
}

impl FromStr for StraightThroughEstimator {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let (name, number) = s
            .split_once(':')
            .map_or((s, None), |(name, number)| (name, Some(number)));
        let estimator = match (name, number.map(str::parse)) {
            ("plain", None) => Self::Plain,
            ("clipped", Some(Ok(range))) => Self::Clipped { range },
            ("lsq", None) => Self::LearnedScale,
            ("stretched", None) => Self::Stretched,
            ("soft", Some(Ok(temperature))) => Self::Soft { temperature },
            _ => {
                return Err(Error::input(
                    "estimator",
                    "plain, clipped:X, lsq, stretched, soft:X",
                    s,
                ));
            }
        };
        estimator.validate()?;
        Ok(estimator)
    }
}

impl Serialize for StraightThroughEstimator {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StraightThroughEstimator {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
