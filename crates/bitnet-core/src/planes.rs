//! Trit planes: `W ≈ Σ_k α_k·T_k`, each `T_k` ternary, by alternating least squares.
//!
//! With p planes a weight takes one of 3^p sums of ±α_k and 0. For fixed αs the best codes are the
//! nearest level; for fixed codes the best αs solve a p × p linear system. Neither step raises the
//! squared error, so the two alternate until they converge. The levels are symmetric about 0: only
//! |w| matters, and the sums that the system needs are counts and sums of |w| between neighbouring
//! midpoints.

use crate::cut::{above, best_cut};
use crate::fitted::{Encoder, Fitted};
use crate::granule::{Granule, Importance};
use crate::levels::{MAX_LEVELS, MAX_PLANES, PlaneLevels};
use crate::ops::{Above, Key, Moments, Ops};
use crate::{Error, Result, ScaleStorage};

/// Squared error, up to the constant Σh·w², and the normal equations `A·α = b` of the codes nearest
/// to `levels`.
struct Normal {
    a: [[f64; MAX_PLANES]; MAX_PLANES],
    b: [f64; MAX_PLANES],
    error: f64,
}

fn normal<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    importance: Option<Importance<'_>>,
    levels: &PlaneLevels,
) -> Result<Normal, G::Error> {
    // Above each midpoint; index 0 stands for everything.
    let sides = granule.fold(
        |offset, w| {
            let mut sides = [Above::default(); MAX_LEVELS];
            for (i, side) in sides.iter_mut().enumerate().take(levels.len) {
                let t = if i == 0 { -1.0 } else { levels.midpoint(i - 1) };
                *side = above(ops, offset, w, importance, Key::Magnitude, t);
            }
            sides
        },
        |mut x, y| {
            x.iter_mut().zip(y).for_each(|(x, y)| *x = x.merge(y));
            x
        },
    )?;
    let mut normal = Normal {
        a: [[0.0; MAX_PLANES]; MAX_PLANES],
        b: [0.0; MAX_PLANES],
        error: 0.0,
    };
    for i in 0..levels.len {
        let next = if i + 1 < levels.len {
            sides[i + 1]
        } else {
            Above::default()
        };
        let (weight, sum) = (sides[i].weight - next.weight, sides[i].sum - next.sum);
        let level = f64::from(levels.level[i]);
        normal.error += level * (level * weight - 2.0 * sum);
        let trits = levels.trits[i];
        for k in 0..levels.planes {
            normal.b[k] += f64::from(trits[k]) * sum;
            for l in 0..levels.planes {
                normal.a[k][l] += f64::from(trits[k]) * f64::from(trits[l]) * weight;
            }
        }
    }
    Ok(normal)
}

/// Solves the p × p system by elimination with pivoting; `None` if it is singular (a plane without
/// a trit).
fn solve(
    mut a: [[f64; MAX_PLANES]; MAX_PLANES],
    mut b: [f64; MAX_PLANES],
    p: usize,
) -> Option<[f64; MAX_PLANES]> {
    for i in 0..p {
        let pivot = (i..p).max_by(|&x, &y| a[x][i].abs().total_cmp(&a[y][i].abs()))?;
        if a[pivot][i].abs() < 1e-9 * a.iter().flatten().fold(0.0, |m: f64, x| m.max(x.abs()))
            || a[pivot][i] == 0.0
        {
            return None;
        }
        a.swap(i, pivot);
        b.swap(i, pivot);
        let row = a[i];
        for j in i + 1..p {
            let f = a[j][i] / row[i];
            for k in i..p {
                a[j][k] -= f * row[k];
            }
            b[j] -= f * b[i];
        }
    }
    let mut x = [0.0; MAX_PLANES];
    for i in (0..p).rev() {
        let rest: f64 = (i + 1..p).map(|k| a[i][k] * x[k]).sum();
        x[i] = (b[i] - rest) / a[i][i];
    }
    Some(x)
}

/// Chooses the αs of one granule.
///
/// The alternation finds a local minimum, so it starts from several places and keeps the best: from
/// the optimal single plane with smaller planes added at several ratios (the error never exceeds
/// that of one plane), and from evenly spaced levels (`α_k = 3^k·step`).
pub(crate) fn fit<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    moments: &Moments,
    planes: usize,
    storage: ScaleStorage,
    importance: Option<Importance<'_>>,
) -> Result<Fitted, G::Error> {
    if !(1..=MAX_PLANES).contains(&planes) {
        return Err(Error::Scheme(format!("{planes} trit planes; 1 to {MAX_PLANES} exist")).into());
    }
    if let Some(s) = moments.ternary_magnitude() {
        let scales = [storage.round(f64::from(s))?, 0.0, 0.0];
        return Ok(Fitted {
            scales,
            zero_point: 0.0,
            encoder: Encoder::Levels(PlaneLevels::new(&scales[..planes])),
        });
    }
    let (_, kept) = best_cut(ops, granule, &moments.extent(), importance, Key::Magnitude)?;
    let (one, rms) = (kept.mean() as f32, moments.rms() as f32);
    let mut starts = vec![];
    for ratio in [0.3, 0.42, 0.55] {
        starts.push([one, one * ratio, one * ratio * ratio]);
    }
    for steps in [2.2, 3.0] {
        // The largest level, (3^p − 1)/2 steps, lies at this many rms.
        let step = rms * steps / ((3usize.pow(planes as u32) - 1) / 2) as f32;
        let power = |k: usize| step * 3f32.powi(k as i32);
        let mut alpha = [0.0; MAX_PLANES];
        (0..planes).for_each(|k| alpha[k] = power(planes - 1 - k));
        starts.push(alpha);
    }
    let mut best: Option<([f32; MAX_PLANES], f64)> = None;
    for mut alpha in starts {
        let mut last = f64::INFINITY;
        for _ in 0..40 {
            let n = normal(
                ops,
                granule,
                importance,
                &PlaneLevels::new(&alpha[..planes]),
            )?;
            if best.is_none_or(|(_, error)| n.error < error) {
                best = Some((alpha, n.error));
            }
            if n.error >= last - 1e-6 * last.abs() {
                break;
            }
            last = n.error;
            match solve(n.a, n.b, planes) {
                Some(x) => (0..planes).for_each(|k| alpha[k] = x[k].abs() as f32),
                None => break,
            }
        }
    }
    let mut scales = best.map_or([0.0; MAX_PLANES], |(alpha, _)| alpha);
    scales[..planes].sort_unstable_by(|a, b| b.total_cmp(a));
    for scale in &mut scales[..planes] {
        *scale = storage.round(f64::from(*scale))?;
    }
    scales[planes..].fill(0.0);
    Ok(Fitted {
        scales,
        zero_point: 0.0,
        encoder: Encoder::Levels(PlaneLevels::new(&scales[..planes])),
    })
}
