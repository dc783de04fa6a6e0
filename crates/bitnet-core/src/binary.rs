//! Binary weights: two levels, at ±s or anywhere.

use crate::cut::{above, best_cut};
use crate::fitted::{Encoder, Fitted};
use crate::granule::{Granule, Importance};
use crate::ops::{Above, Key, Moments, Ops};
use crate::scheme::BinarySplit;
use crate::{Error, Result, ScaleStorage};

/// Chooses the two levels of one granule. The rules are at [`BinarySplit`].
///
/// Two free levels `low < high` are stored as `scale = (high − low) / 2` and `zero_point = −(low +
/// high) / (high − low)`.
pub(crate) fn fit<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    moments: &Moments,
    (split, stochastic): (BinarySplit, Option<u64>),
    storage: ScaleStorage,
    importance: Option<Importance<'_>>,
) -> Result<Fitted, G::Error> {
    if importance.is_some() && split != BinarySplit::Optimal {
        return Err(Error::Scheme(format!(
            "importance with binary split {split}; only optimal uses it"
        ))
        .into());
    }
    let mut mean = moments.sum / moments.count as f64;
    let (cut, upper, lower) = match split {
        BinarySplit::Zero => {
            let scale = storage.round(moments.mean_abs())?;
            let encoder = match stochastic {
                Some(seed) => Encoder::Stochastic { seed, scale },
                None => Encoder::Split(0.0),
            };
            return Ok(Fitted::one(scale, encoder));
        }
        BinarySplit::Mean => {
            let at = mean as f32;
            // `Above` is strict and a weight at the mean counts as upper.
            let upper = granule.fold(
                |_, w| ops.above(w, None, Key::Signed, at.next_down()),
                Above::merge,
            )?;
            let below = Above {
                count: 0,
                weight: moments.count as f64 - upper.weight,
                sum: moments.sum - upper.sum,
            };
            (at, upper, below)
        }
        BinarySplit::Optimal => {
            let (cut, upper) = best_cut(ops, granule, &moments.extent(), importance, Key::Signed)?;
            let all = granule.fold(
                |i, w| above(ops, i, w, importance, Key::Signed, f32::NEG_INFINITY),
                Above::merge,
            )?;
            let below = Above {
                count: 0,
                weight: all.weight - upper.weight,
                sum: all.sum - upper.sum,
            };
            mean = all.mean();
            (cut.next_up(), upper, below)
        }
    };
    let (low, high) = match (lower.weight > 0.0, upper.weight > 0.0) {
        (true, true) => (lower.mean(), upper.mean()),
        // All weights are one number m: with the levels ±m the zero point is 0.
        _ => (-mean.abs(), mean.abs()),
    };
    let scale = storage.round((high - low) / 2.0)?;
    if scale == 0.0 {
        // Two levels too close together for the type of the scale: one level for all.
        return Ok(Fitted::one(
            storage.round(mean.abs())?,
            Encoder::Constant(if mean < 0.0 { -1 } else { 1 }),
        ));
    }
    let zero_point = (-(low + high) / 2.0 / f64::from(scale)) as f32;
    let at = if lower.weight > 0.0 && upper.weight > 0.0 {
        cut
    } else {
        0.0
    };
    Ok(Fitted {
        scales: [scale, 0.0, 0.0],
        zero_point,
        encoder: Encoder::Split(at),
    })
}
