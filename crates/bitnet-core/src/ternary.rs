//! Ternary threshold rules: which weights become ±1, and by how much to multiply.

use crate::granule::{Granule, Importance};
use crate::ops::{Above, Cuts, Extent, Key, Magnitudes, Moments, Ops};
use crate::quantize::{Coder, Fitted};
use crate::scheme::{Rounding, ScaleRule, ScaleStorage, Threshold};
use crate::{Error, Result};

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
            "importance with threshold {threshold:?}; only Optimal uses it"
        ))
        .into());
    }
    if sizes.ternary {
        return Ok(Fitted::one(
            storage.round(f64::from(sizes.max))?,
            Coder::Cut(Cuts::symmetric(0.0)),
        ));
    }
    let mean = sizes.mean();
    let cut = match threshold {
        Threshold::Absmean => {
            if scale_rule == ScaleRule::LeastSquares {
                let cuts = Cuts::rounding(mean as f32, rounding);
                let kept = granule.fold(|_, w| kept_by(ops, w, cuts), Above::then)?;
                return Ok(Fitted::one(storage.round(kept.mean())?, Coder::Cut(cuts)));
            }
            let (scale, cuts) = absmean(mean, storage, rounding)?;
            return Ok(Fitted::one(scale, Coder::Cut(cuts)));
        }
        Threshold::Optimal => {
            return fit_optimal(ops, granule, &sizes.extent(), storage, importance);
        }
        Threshold::Mean => 0.7 * mean,
        Threshold::Median => 0.8 * median(granule, sizes.count)?,
        Threshold::Adaptive => {
            let moments = granule.fold(|_, w| ops.moments(w), Moments::then)?;
            adaptive_factor(mean / moments.rms()) * mean
        }
        Threshold::Factor(factor) => f64::from(factor) * mean,
    } as f32;
    let kept = granule.fold(|_, w| ops.above(w, None, Key::Magnitude, cut), Above::then)?;
    Ok(Fitted::one(
        storage.round(kept.mean())?,
        Coder::Cut(Cuts::symmetric(cut)),
    ))
}

/// Scale and cuts of a granule whose mean of |w| this is.
#[inline]
pub(crate) fn absmean(mean: f64, storage: ScaleStorage, rounding: Rounding) -> Result<(f32, Cuts)> {
    let scale = storage.round(mean)?;
    Ok((scale, Cuts::rounding(scale, rounding)))
}

/// Count and Σ|w| of the weights that the cuts do not send to 0.
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

/// The median of |w|; the mean of the two middle ones where their number is even.
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
        return Ok(Fitted::one(nearest, Coder::Cut(Cuts::symmetric(cut))));
    }
    // Of the two storable scales around the exact one, the better, each with the codes that are
    // nearest to it.
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
        |x, y| (x.0.then(y.0), x.1.then(y.1)),
    )?;
    let scale = if other > 0.0 && gain(other, b) > gain(nearest, a) {
        other
    } else {
        nearest
    };
    Ok(Fitted::one(scale, Coder::Cut(Cuts::symmetric(scale / 2.0))))
}

/// [`Ops::above`] with the importance of the strip that starts at `offset`.
pub(crate) fn above(
    ops: &impl Ops,
    offset: usize,
    w: &[f32],
    importance: Option<Importance<'_>>,
    key: Key,
    t: f32,
) -> Above {
    match importance {
        None => ops.above(w, None, key, t),
        Some(h) => {
            let mut all = Above::default();
            h.rows(
                offset,
                w,
                |w, h| ops.above(w, Some(h), key, t),
                |part| all = all.then(part),
            );
            all
        }
    }
}

/// [`above`] for two thresholds.
fn above_both(
    ops: &impl Ops,
    offset: usize,
    w: &[f32],
    importance: Option<Importance<'_>>,
    key: Key,
    t: [f32; 2],
) -> (Above, Above) {
    match importance {
        None => ops.above_both(w, key, t).into(),
        Some(_) => (
            above(ops, offset, w, importance, key, t[0]),
            above(ops, offset, w, importance, key, t[1]),
        ),
    }
}

/// The cut with the least squared error, and what lies above it.
///
/// With `Key::Magnitude` one level serves the weights above the cut and 0 the rest; with
/// `Key::Signed` each side has its own level. Both are one-dimensional clustering, so the best cut
/// is half-way between the levels it makes: a fixed point of `T(t) = (mean above t + level below t)
/// / 2`. Means of upper and lower parts grow with the cut, hence T grows too, and iterating it from
/// below all weights and from above all weights closes in on the least and on the greatest fixed
/// point. If many keys remain in between, one more pass finds the parts of the bracket that can
/// hold a fixed point at all. What is left is sorted and tried one by one, so the result is exact,
/// and memory holds about 2^20 keys, or those of one narrow part.
pub(crate) fn best_cut<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    extent: &Extent,
    importance: Option<Importance<'_>>,
    key: Key,
) -> Result<(f32, Above), G::Error> {
    let (mut low, mut high) = match key {
        Key::Magnitude => (0.0, extent.max.max(-extent.min) / 2.0),
        Key::Signed => (extent.min, extent.max),
    };
    // The keys of a bracket and what lies above them, once they are few: from then on nothing else
    // is looked at.
    let mut held: Option<(Vec<f32>, Above)> = None;
    let pass = |held: &Option<(Vec<f32>, Above)>, low: f32, high: f32| match held {
        Some((keys, over)) => Ok(ops
            .above_both(keys, Key::Signed, [low, high])
            .map(|part| over.then(part))
            .into()),
        None => granule.fold(
            |i, w| above_both(ops, i, w, importance, key, [low, high]),
            |x, y| (x.0.then(y.0), x.1.then(y.1)),
        ),
    };
    let all = match key {
        Key::Magnitude => Above::default(),
        Key::Signed => granule.fold(
            |i, w| above(ops, i, w, importance, key, f32::NEG_INFINITY),
            Above::then,
        )?,
    };
    let below = |a: Above| Above {
        count: all.count.saturating_sub(a.count),
        weight: all.weight - a.weight,
        sum: all.sum - a.sum,
    };
    let level_below = |a: Above| match key {
        Key::Magnitude => 0.0,
        Key::Signed if below(a).weight <= 0.0 || a.count == all.count => f64::from(extent.min),
        Key::Signed => below(a).mean(),
    };
    let level_above = |a: Above| {
        if a.weight > 0.0 {
            a.mean()
        } else {
            f64::from(extent.max.max(-extent.min))
        }
    };
    let middle = |a: Above| ((level_above(a) + level_below(a)) / 2.0) as f32;
    let enough = (extent.count / 64).max(8);
    let (mut a, mut b) = pass(&held, low, high)?;
    for _ in 0..32 {
        if a.count - b.count <= enough {
            break;
        }
        // Rounding to f32 may step over a fixed point by half an ulp; one ulp of slack keeps it
        // inside.
        let (next_low, next_high) = (
            middle(a).next_down().max(low),
            middle(b).next_up().min(high),
        );
        if next_low <= low && next_high >= high {
            break;
        }
        (low, high) = (next_low, next_high.max(next_low));
        (a, b) = pass(&held, low, high)?;
        let inside = a.count - b.count;
        if importance.is_none() && held.is_none() && inside <= MOST_SORTED.min(extent.count / 2) {
            let keys = keys_inside(ops, granule, key, low, high)?;
            held = Some((keys, b));
        }
    }
    let share = |a: Above| {
        if a.weight > 0.0 {
            a.sum * a.sum / a.weight
        } else {
            0.0
        }
    };
    let gain = |a: Above| match key {
        Key::Magnitude => share(a),
        Key::Signed => share(a) + share(below(a)),
    };
    let mut best = (high, b, gain(b));
    // Brackets that may hold the best cut, with what lies above each.
    let mut brackets = vec![(low, high, b, a.count - b.count, 0)];
    while let Some((low, high, above, count, depth)) = brackets.pop() {
        if gain(above) > best.2 {
            best = (high, above, gain(above));
        }
        if count == 0 {
            continue;
        }
        if count > MOST_SORTED && depth < 4 {
            brackets.extend(
                narrow(granule, importance, key, (low, high, above), &middle)?
                    .into_iter()
                    .map(|(l, h, a, n)| (l, h, a, n, depth + 1)),
            );
            continue;
        }
        let mut inside = match (&held, importance) {
            (Some((keys, _)), _) => {
                let mut inside = vec![];
                ops.inside(keys, Key::Signed, low, high, &mut inside);
                inside.into_iter().map(|u| (u, 1.0)).collect()
            }
            (None, None) => keys_inside(ops, granule, key, low, high)?
                .into_iter()
                .map(|u| (u, 1.0))
                .collect(),
            (None, Some(_)) => weighted_keys_inside(granule, importance, key, low, high)?,
        };
        inside.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1)));
        // Go down one distinct key at a time.
        let mut kept = above;
        let mut i = 0;
        while i < inside.len() {
            let u = inside[i].0;
            while i < inside.len() && inside[i].0 == u {
                let h = f64::from(inside[i].1);
                kept = Above {
                    count: kept.count + 1,
                    weight: kept.weight + h,
                    sum: kept.sum + h * f64::from(u),
                };
                i += 1;
            }
            if gain(kept) > best.2 {
                best = (inside.get(i).map_or(low, |next| next.0), kept, gain(kept));
            }
        }
    }
    Ok((best.0, best.1))
}

/// Keys that are sorted at a time: 8 MiB of them.
const MOST_SORTED: u64 = 1 << 20;
/// Parts that a bracket with more keys is cut into.
const PARTS: usize = 4096;

/// The keys in `(low, high]`.
fn keys_inside<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    key: Key,
    low: f32,
    high: f32,
) -> Result<Vec<f32>, G::Error> {
    let keys = |_, w: &[f32]| {
        let mut keys = vec![];
        ops.inside(w, key, low, high, &mut keys);
        keys
    };
    granule.fold(keys, joined)
}

/// The keys in `(low, high]` with their importance.
fn weighted_keys_inside<G: Granule + ?Sized>(
    granule: &G,
    importance: Option<Importance<'_>>,
    key: Key,
    low: f32,
    high: f32,
) -> Result<Vec<(f32, f32)>, G::Error> {
    let keys = |offset, w: &[f32]| {
        let mut keys = vec![];
        each_key(offset, w, importance, key, |u, h| {
            if low < u && u <= high {
                keys.push((u, h));
            }
        });
        keys
    };
    granule.fold(keys, joined)
}

fn joined<T>(mut a: Vec<T>, b: Vec<T>) -> Vec<T> {
    a.extend(b);
    a
}

/// Calls `f` with the key and the importance of each weight.
fn each_key(
    offset: usize,
    w: &[f32],
    importance: Option<Importance<'_>>,
    key: Key,
    mut f: impl FnMut(f32, f32),
) {
    match importance {
        None => w.iter().for_each(|&w| f(key.of(w), 1.0)),
        Some(h) => h.rows(
            offset,
            w,
            |w, h| w.iter().zip(h).for_each(|(&w, &h)| f(key.of(w), h)),
            drop,
        ),
    }
}

/// A bracket, what lies above it, and the number of keys in it.
type Bracket = (f32, f32, Above, u64);

/// The parts of a bracket that may hold a fixed point, by one pass that sums each part. `middle` is
/// T of what lies above a cut; as T grows with the cut, a part can hold a fixed point only if it
/// meets the values of T between its two ends.
fn narrow<G: Granule + ?Sized>(
    granule: &G,
    importance: Option<Importance<'_>>,
    key: Key,
    (low, high, above): (f32, f32, Above),
    middle: &impl Fn(Above) -> f32,
) -> Result<Vec<Bracket>, G::Error> {
    let edge = |i: usize| {
        (f64::from(low) + (f64::from(high) - f64::from(low)) * i as f64 / PARTS as f64) as f32
    };
    let edges: Vec<f32> = (0..=PARTS)
        .map(|i| if i == PARTS { high } else { edge(i) })
        .collect();
    let width = (f64::from(high) - f64::from(low)) / PARTS as f64;
    let parts = granule.fold(
        |offset, w| {
            let mut parts = vec![Above::default(); PARTS];
            each_key(offset, w, importance, key, |u, h| {
                if low < u && u <= high {
                    // Part i holds the keys in (edges[i], edges[i + 1]]; the division may be off by
                    // one.
                    let mut i = (((f64::from(u) - f64::from(low)) / width) as usize).min(PARTS - 1);
                    while i > 0 && u <= edges[i] {
                        i -= 1;
                    }
                    while i + 1 < PARTS && u > edges[i + 1] {
                        i += 1;
                    }
                    parts[i] = parts[i].then(Above {
                        count: 1,
                        weight: f64::from(h),
                        sum: f64::from(h) * f64::from(u),
                    });
                }
            });
            parts
        },
        |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a = a.then(b));
            a
        },
    )?;
    let mut found = vec![];
    let mut over = above;
    for i in (0..PARTS).rev() {
        let with = over.then(parts[i]);
        let (least, most) = (middle(with).next_down(), middle(over).next_up());
        if least <= edges[i + 1] && most >= edges[i] {
            found.push((edges[i], edges[i + 1], over, parts[i].count));
        }
        over = with;
    }
    Ok(found)
}
