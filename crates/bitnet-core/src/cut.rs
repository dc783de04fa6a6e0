//! The best place to cut a granule in two: exact one-dimensional clustering by closing in on fixed
//! points.

use crate::Result;
use crate::granule::{Granule, Importance};
use crate::ops::{Above, Extent, Key, Ops};

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
                |part| all = all.merge(part),
            );
            all
        }
    }
}

/// [`above`] for two thresholds.
pub(crate) fn above_both(
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

/// The two sides of a cut and their levels, computed from the side above it.
struct Clusters {
    key: Key,
    extent: Extent,
    /// All weights; only `Key::Signed` needs it.
    all: Above,
}

impl Clusters {
    fn below(&self, above: Above) -> Above {
        Above {
            count: self.all.count.saturating_sub(above.count),
            weight: self.all.weight - above.weight,
            sum: self.all.sum - above.sum,
        }
    }

    fn level_below(&self, above: Above) -> f64 {
        match self.key {
            Key::Magnitude => 0.0,
            Key::Signed if self.below(above).weight <= 0.0 || above.count == self.all.count => {
                f64::from(self.extent.min)
            }
            Key::Signed => self.below(above).mean(),
        }
    }

    fn level_above(&self, above: Above) -> f64 {
        if above.weight > 0.0 {
            above.mean()
        } else {
            f64::from(self.extent.max.max(-self.extent.min))
        }
    }

    /// T: half-way between the levels of the two sides.
    fn middle(&self, above: Above) -> f32 {
        ((self.level_above(above) + self.level_below(above)) / 2.0) as f32
    }

    /// The reduction of the squared error by the levels.
    fn gain(&self, above: Above) -> f64 {
        let share = |side: Above| {
            if side.weight > 0.0 {
                side.sum * side.sum / side.weight
            } else {
                0.0
            }
        };
        match self.key {
            Key::Magnitude => share(above),
            Key::Signed => share(above) + share(self.below(above)),
        }
    }
}

/// The keys of a bracket, and the weights above all of them.
type Held = Option<(Vec<f32>, Above)>;

/// The cut with the least squared error, and the side above it.
///
/// With `Key::Magnitude` one level serves the weights above the cut and 0 the rest; with
/// `Key::Signed` each side has its own level. Both are one-dimensional clustering, so the best cut
/// is half-way between the levels it makes: a fixed point of `T(t) = (mean above t + level below t)
/// / 2`. Means of upper and lower parts grow with the cut, hence T grows too, and iterating it from
/// below all weights and from above all weights closes in on the least and on the greatest fixed
/// point ([`close_in`]). If many keys remain in between, one more pass finds the parts of the
/// bracket that can hold a fixed point at all ([`narrow`]). The remaining keys are sorted and tried
/// one by one ([`best_of`]), so the result is exact, and memory holds about 2^20 keys, or the keys
/// of one narrow part.
pub(crate) fn best_cut<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    extent: &Extent,
    importance: Option<Importance<'_>>,
    key: Key,
) -> Result<(f32, Above), G::Error> {
    let all = match key {
        Key::Magnitude => Above::default(),
        Key::Signed => granule.fold(
            |i, w| above(ops, i, w, importance, key, f32::NEG_INFINITY),
            Above::merge,
        )?,
    };
    let clusters = Clusters {
        key,
        extent: *extent,
        all,
    };
    let ((low, high, above, count), held) = close_in(ops, granule, importance, &clusters)?;
    let mut best = (high, above, clusters.gain(above));
    // Brackets that may hold the best cut, and how often each was narrowed.
    let mut brackets = vec![((low, high, above, count), 0)];
    while let Some(((low, high, above, count), depth)) = brackets.pop() {
        if clusters.gain(above) > best.2 {
            best = (high, above, clusters.gain(above));
        }
        if count == 0 {
            continue;
        }
        if count > MOST_SORTED && depth < 4 {
            let parts = narrow(granule, importance, &clusters, (low, high, above))?;
            brackets.extend(parts.into_iter().map(|part| (part, depth + 1)));
            continue;
        }
        let weighted = |keys: Vec<f32>| keys.into_iter().map(|u| (u, 1.0)).collect();
        let inside = match (&held, importance) {
            (Some((keys, _)), _) => {
                let mut inside = vec![];
                ops.inside(keys, Key::Signed, low, high, &mut inside);
                weighted(inside)
            }
            (None, None) => weighted(keys_inside(ops, granule, key, low, high)?),
            (None, Some(_)) => weighted_keys_inside(granule, importance, key, low, high)?,
        };
        best_of(&clusters, inside, (low, above), &mut best);
    }
    Ok((best.0, best.1))
}

/// The bracket between the least and the greatest fixed point, as far as 32 passes find them. If it
/// has few keys, they are returned too.
fn close_in<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    importance: Option<Importance<'_>>,
    clusters: &Clusters,
) -> Result<(Bracket, Held), G::Error> {
    let (key, extent) = (clusters.key, &clusters.extent);
    let (mut low, mut high) = match key {
        Key::Magnitude => (0.0, extent.max.max(-extent.min) / 2.0),
        Key::Signed => (extent.min, extent.max),
    };
    // Once it holds keys, the passes go over them and not over the granule.
    let mut held: Held = None;
    let pass = |held: &Held, low: f32, high: f32| match held {
        Some((keys, over)) => Ok(ops
            .above_both(keys, Key::Signed, [low, high])
            .map(|part| over.merge(part))
            .into()),
        None => granule.fold(
            |i, w| above_both(ops, i, w, importance, key, [low, high]),
            |x, y| (x.0.merge(y.0), x.1.merge(y.1)),
        ),
    };
    let enough = (extent.count / 64).max(8);
    let (mut a, mut b) = pass(&held, low, high)?;
    for _ in 0..32 {
        if a.count - b.count <= enough {
            break;
        }
        // Rounding to f32 may step over a fixed point by half an ulp; one ulp of slack keeps it
        // inside.
        let (next_low, next_high) = (
            clusters.middle(a).next_down().max(low),
            clusters.middle(b).next_up().min(high),
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
    Ok(((low, high, b, a.count - b.count), held))
}

/// Tries a cut below each of the keys `inside`, which lie in a bracket that ends at `low`, with
/// `above` above it.
fn best_of(
    clusters: &Clusters,
    mut inside: Vec<(f32, f32)>,
    (low, above): (f32, Above),
    best: &mut (f32, Above, f64),
) {
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
        let gain = clusters.gain(kept);
        if gain > best.2 {
            *best = (inside.get(i).map_or(low, |next| next.0), kept, gain);
        }
    }
}

/// Largest number of keys that are sorted at once: 8 MiB.
const MOST_SORTED: u64 = 1 << 20;
/// Parts into which a bracket with more keys is cut.
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
        None => w.iter().for_each(|&w| f(key.apply(w), 1.0)),
        Some(h) => h.rows(
            offset,
            w,
            |w, h| w.iter().zip(h).for_each(|(&w, &h)| f(key.apply(w), h)),
            drop,
        ),
    }
}

/// A bracket (low, high], the side above it, and the number of keys in it.
type Bracket = (f32, f32, Above, u64);

/// The parts of a bracket that may hold a fixed point, by one pass that sums each part. As T grows
/// with the cut, a part can hold a fixed point only if it meets the values of T between its two
/// ends.
fn narrow<G: Granule + ?Sized>(
    granule: &G,
    importance: Option<Importance<'_>>,
    clusters: &Clusters,
    (low, high, above): (f32, f32, Above),
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
            each_key(offset, w, importance, clusters.key, |u, h| {
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
                    parts[i] = parts[i].merge(Above {
                        count: 1,
                        weight: f64::from(h),
                        sum: f64::from(h) * f64::from(u),
                    });
                }
            });
            parts
        },
        |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a = a.merge(b));
            a
        },
    )?;
    let mut found = vec![];
    let mut over = above;
    for i in (0..PARTS).rev() {
        let with = over.merge(parts[i]);
        let (least, most) = (
            clusters.middle(with).next_down(),
            clusters.middle(over).next_up(),
        );
        if least <= edges[i + 1] && most >= edges[i] {
            found.push((edges[i], edges[i + 1], over, parts[i].count));
        }
        over = with;
    }
    Ok(found)
}
