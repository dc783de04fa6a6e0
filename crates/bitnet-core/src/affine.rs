//! Integers of 2, 3, 4 and 8 bits: `q = clip(round(w / s) + z, −2^(b−1), 2^(b−1) − 1)`, `w ≈ s·(q −
//! z)`.

use crate::fitted::{Encoder, Fitted};
use crate::granule::{Granule, Importance};
use crate::ops::{Moments, Ops, Uniform};
use crate::scheme::{Clip, Mapping, Rounding};
use crate::{Precision, Result, ScaleStorage};

/// Shares of the range that [`Clip::Search`] tries, in 64ths.
const SHARES: std::ops::RangeInclusive<u32> = 16..=64;

/// The quantizer of a granule whose weights lie in min … max.
fn quantizer(
    (min, max): (f64, f64),
    (precision, mapping): (Precision, Mapping),
    (storage, rounding): (ScaleStorage, Rounding),
) -> Result<Uniform> {
    let (low, high) = precision.range();
    let mut uniform = Uniform {
        scale: 0.0,
        zero: 0.0,
        low,
        high,
        rounding,
    };
    match mapping {
        Mapping::Symmetric => uniform.scale = storage.round(max.max(-min) / f64::from(high))?,
        Mapping::Asymmetric => {
            let (min, max) = (min.min(0.0), max.max(0.0));
            uniform.scale =
                storage.round((max - min) / f64::from(i32::from(high) - i32::from(low)))?;
            if uniform.scale > 0.0 {
                let zero = (f64::from(low) - min / f64::from(uniform.scale)).round_ties_even();
                uniform.zero = zero.clamp(f64::from(low), f64::from(high)) as f32;
            }
        }
    }
    // The largest value must not dequantize to infinity.
    let reach = f32::from(high).max(-f32::from(low)) + uniform.zero.abs();
    while !(uniform.scale * reach).is_finite() {
        uniform.scale = storage.round(f64::from(uniform.scale) * 0.99)?;
    }
    Ok(uniform)
}

/// Chooses scale and zero point of one granule.
pub(crate) fn fit<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    moments: &Moments,
    (precision, mapping, clip): (Precision, Mapping, Clip),
    stored: (ScaleStorage, Rounding),
    importance: Option<Importance<'_>>,
) -> Result<Fitted, G::Error> {
    if importance.is_some() && clip != Clip::Search {
        return Err(crate::Error::Scheme(format!(
            "importance with clip {clip}; only search uses it"
        ))
        .into());
    }
    let quantizer = |min, max| quantizer((min, max), (precision, mapping), stored);
    let (min, max) = (f64::from(moments.min), f64::from(moments.max));
    let uniform = match clip {
        Clip::None => quantizer(min, max)?,
        Clip::Rms(times) => {
            let limit = f64::from(times) * moments.rms();
            quantizer(min.max(-limit), max.min(limit))?
        }
        Clip::Search => {
            let candidates = SHARES
                .map(|i| f64::from(i) / 64.0)
                .map(|share| quantizer(share * min, share * max))
                .collect::<Result<Vec<_>>>()?;
            search(ops, granule, &candidates, importance)?
        }
    };
    Ok(Fitted {
        scales: [uniform.scale, 0.0, 0.0],
        zero_point: uniform.zero,
        encoder: Encoder::Uniform(uniform),
    })
}

/// The candidate with the least squared error.
fn search<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    candidates: &[Uniform],
    importance: Option<Importance<'_>>,
) -> Result<Uniform, G::Error> {
    let errors = granule.fold(
        |offset, w| {
            candidates
                .iter()
                .map(|q| error(ops, offset, w, importance, q))
                .collect::<Vec<_>>()
        },
        |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        },
    )?;
    // The widest range wins a tie: it saturates least.
    let best = (0..errors.len())
        .rev()
        .min_by(|&a, &b| errors[a].total_cmp(&errors[b]))
        .unwrap_or(errors.len() - 1);
    Ok(candidates[best])
}

fn error(
    ops: &impl Ops,
    offset: usize,
    w: &[f32],
    importance: Option<Importance<'_>>,
    quantizer: &Uniform,
) -> f64 {
    match importance {
        None => ops.uniform_error(w, None, quantizer),
        Some(h) => {
            let mut sum = 0.0;
            h.rows(
                offset,
                w,
                |w, h| ops.uniform_error(w, Some(h), quantizer),
                |part| sum += part,
            );
            sum
        }
    }
}
