//! Straight-through estimators: how a gradient passes the rounding of weights.

use crate::{Error, Result};
use bitnet_core::named;

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
    /// `m = 1` (Bengio et al. 2013, arXiv:1308.3432; as b1.58 is trained). The scale comes from the
    /// scheme and gets no gradient.
    #[default]
    Plain,
    /// `m = [range·low ≤ v ≤ range·high]`: weights far outside the levels get no gradient. `range`
    /// is positive.
    Clipped {
        /// Multiple of the outermost levels.
        range: f32,
    },
    /// LSQ (Esser et al. 2020, arXiv:1902.08153): s is a variable, `m = [low < v < high]`, and
    /// `∂ŵ/∂s = q − v` where that holds, else q. The gradient of s is multiplied by `1/√(n·Qp)`,
    /// where n is the number of weights under one s and Qp the greatest value. Binary: `∂ŵ/∂s = q`.
    /// Needs a scheme of one plane without zero points.
    LearnedScale,
    /// Stretched elastic (SEQ of ParetoQ, Liu et al. 2025, arXiv:2502.02631): α is a variable,
    /// levels are the middles of k equal parts of `[−α, α]`: `ŵ ∈ {−2α/3, 0, 2α/3}` for ternary,
    /// `{−3α/4, −α/4, α/4, 3α/4}` for 2 bits, `±α` for binary; `m = [|w| < α]`, and `∂ŵ/∂α = ŵ/α −
    /// w/α` where that holds, else `ŵ/α`. The gradient of α has the same factor as in LSQ.
    ///
    /// The four levels of 2 bits become the values ±1 and ±3 of int3 with the scale α/4: int2 has a
    /// zero, these levels do not.
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

named!(
    StraightThroughEstimator, "estimator",
    { Plain = "plain", LearnedScale = "lsq", Stretched = "stretched" },
    {
        Clipped { range: f32 } = "clipped": "X" if |x| x.is_finite() && *x > 0.0,
        Soft { temperature: f32 } = "soft": "X" if |x| x.is_finite() && *x > 0.0,
    }
);
