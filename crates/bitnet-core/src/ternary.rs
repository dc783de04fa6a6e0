//! Ternary threshold rules: which weights become ±1, and by how much to multiply.

use crate::cut::{above_both, best_cut};
use crate::fitted::{Encoder, Fitted};
use crate::granule::{Granule, Importance};
use crate::ops::{Above, Cuts, Extent, Key, Magnitudes, Moments, Ops};
use crate::scheme::{Rounding, ScaleRule, Threshold};
use crate::{Error, Result, ScaleStorage};

/// Chooses threshold and scale of one granule. The rules and their sources are at [`Threshold`].
pub(crate) fn fit<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    sizes: &Magnitudes,
    (threshold, scale_rule): (Threshold, ScaleRule),
    storage: ScaleStorage,
    rounding: Rounding,
    importance: Option<Importance<'_>>,
) -> Result<Fitted, G::Error> {
    if importance.is_some() && threshold != Threshold::Optimal {
        return Err(Error::Scheme(format!(
            "importance with threshold {threshold}; only optimal uses it"
        ))
        .into());
    }
    if sizes.ternary {
        return Ok(Fitted::one(
            storage.round(f64::from(sizes.max))?,
            Encoder::Cut(Cuts::symmetric(0.0)),
        ));
    }
    let mean = sizes.mean();
    let cut = match threshold {
        Threshold::Absmean => {
            if scale_rule == ScaleRule::LeastSquares {
                let cuts = Cuts::rounding(mean as f32, rounding);
                let kept = granule.fold(|_, w| kept_by(ops, w, cuts), Above::merge)?;
                return Ok(Fitted::one(storage.round(kept.mean())?, Encoder::Cut(cuts)));
            }
            let (scale, cuts) = absmean(mean, storage, rounding)?;
            return Ok(Fitted::one(scale, Encoder::Cut(cuts)));
        }
        Threshold::Optimal => {
            return fit_optimal(ops, granule, &sizes.extent(), storage, importance);
        }
        Threshold::Mean => 0.7 * mean,
        Threshold::Median => 0.8 * median(granule, sizes.count)?,
        Threshold::Adaptive => {
            let moments = granule.fold(|_, w| ops.moments(w), Moments::merge)?;
            adaptive_factor(mean / moments.rms()) * mean
        }
        Threshold::Factor(factor) => f64::from(factor) * mean,
    } as f32;
    let kept = granule.fold(|_, w| ops.above(w, None, Key::Magnitude, cut), Above::merge)?;
    Ok(Fitted::one(
        storage.round(kept.mean())?,
        Encoder::Cut(Cuts::symmetric(cut)),
    ))
}

/// Scale and cuts of a granule from its mean |w|.
#[inline]
pub(crate) fn absmean(mean: f64, storage: ScaleStorage, rounding: Rounding) -> Result<(f32, Cuts)> {
    let scale = storage.round(mean)?;
    Ok((scale, Cuts::rounding(scale, rounding)))
}

/// Count and Σ|w| of the weights outside the cuts, i.e. with a value of ±1.
fn kept_by(ops: &impl Ops, w: &[f32], cuts: Cuts) -> Above {
    let mut values = [0i8; 1024];
    let mut kept = Above::default();
    for w in w.chunks(values.len()) {
        let values = &mut values[..w.len()];
        ops.encode_cut(w, cuts, values);
        for (&w, &q) in w.iter().zip(&*values) {
            kept.count += u64::from(q != 0);
            kept.sum += f64::from(w) * f64::from(q);
        }
    }
    kept.weight = kept.count as f64;
    kept
}

/// The factor t of [`Threshold::Adaptive`] for `ρ = mean|W| / rms(W)`.
///
/// Between the points it is linear; outside it is constant. The points belong to the generalised
/// normal density `exp(−|x|^β)` with β = 0.4, 0.5, 0.6, 0.7, 0.8, 1 (Laplace), 1.25, 1.5, 2
/// (normal), 3, 6, ∞ (uniform): `ρ = Γ(2/β) / √(Γ(1/β)·Γ(3/β))`, and t is the maximum of `(E[|x|;
/// |x|>Δ])² / P(|x|>Δ)` over Δ, divided by E|x|.
fn adaptive_factor(rho: f64) -> f64 {
    #[allow(
        clippy::approx_constant,
        reason = "0.7071 is the ratio of the Laplace density, to the digits of its neighbours"
    )]
    const POINTS: [(f64, f64); 12] = [
        (0.4812, 2.5717),
        (0.5477, 1.8555),
        (0.5969, 1.5),
        (0.6344, 1.2927),
        (0.6639, 1.1594),
        (0.7071, 1.0),
        (0.743, 0.8936),
        (0.7674, 0.8324),
        (0.7979, 0.767),
        (0.8273, 0.715),
        (0.8529, 0.6798),
        (0.866, 0.6667),
    ];
    let after = POINTS
        .iter()
        .position(|&(r, _)| r >= rho)
        .unwrap_or(POINTS.len());
    match after {
        0 => POINTS[0].1,
        n if n == POINTS.len() => POINTS[n - 1].1,
        n => {
            let ((r0, t0), (r1, t1)) = (POINTS[n - 1], POINTS[n]);
            t0 + (t1 - t0) * (rho - r0) / (r1 - r0)
        }
    }
}

/// The median of |w|; for an even count the mean of the two in the middle.
fn median<G: Granule + ?Sized>(granule: &G, n: u64) -> Result<f64, G::Error> {
    let (first, second) = ((n - 1) / 2, n / 2);
    // |w| as an integer keeps the order of |w|; its upper half names one of 2^15 buckets.
    let bucket = |w: f32| (w.abs().to_bits() >> 16) as usize;
    let (mut low, mut high, mut before) = (0, 1 << 15, 0u64);
    if n > 1 << 16 {
        let counts = granule.fold(
            |_, w| {
                let mut counts = vec![0u64; 1 << 15];
                w.iter().for_each(|&w| counts[bucket(w)] += 1);
                counts
            },
            |mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                a
            },
        )?;
        let mut seen = 0;
        for (i, &count) in counts.iter().enumerate() {
            if seen <= first && first < seen + count {
                (low, before) = (i, seen);
            }
            if seen <= second && second < seen + count {
                high = i + 1;
            }
            seen += count;
        }
    }
    let mut middle = granule.fold(
        |_, w| {
            w.iter()
                .filter(|&&w| (low..high).contains(&bucket(w)))
                .map(|w| w.abs())
                .collect::<Vec<_>>()
        },
        |mut a, b| {
            a.extend(b);
            a
        },
    )?;
    let (left, &mut upper, _) =
        middle.select_nth_unstable_by((second - before) as usize, f32::total_cmp);
    let lower = if first == second {
        upper
    } else {
        left.iter().copied().fold(0.0, f32::max)
    };
    Ok((f64::from(lower) + f64::from(upper)) / 2.0)
}

/// [`Threshold::Optimal`].
fn fit_optimal<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    extent: &Extent,
    storage: ScaleStorage,
    importance: Option<Importance<'_>>,
) -> Result<Fitted, G::Error> {
    let (cut, kept) = best_cut(ops, granule, extent, importance, Key::Magnitude)?;
    let (nearest, other) = storage.around(kept.mean())?;
    if nearest == other || nearest == 0.0 {
        return Ok(Fitted::one(nearest, Encoder::Cut(Cuts::symmetric(cut))));
    }
    // The better of the two storable scales around the exact one, each with the codes nearest to
    // it.
    let gain = |s: f32, a: Above| f64::from(s) * (2.0 * a.sum - f64::from(s) * a.weight);
    let (a, b) = granule.fold(
        |i, w| {
            above_both(
                ops,
                i,
                w,
                importance,
                Key::Magnitude,
                [nearest / 2.0, other / 2.0],
            )
        },
        |x, y| (x.0.merge(y.0), x.1.merge(y.1)),
    )?;
    let scale = if other > 0.0 && gain(other, b) > gain(nearest, a) {
        other
    } else {
        nearest
    };
    Ok(Fitted::one(
        scale,
        Encoder::Cut(Cuts::symmetric(scale / 2.0)),
    ))
}
