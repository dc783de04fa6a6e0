//! Mixed precision: chooses a setting for each tensor so that the model fits a budget with the
//! least error.
//!
//! ```text
//! minimise Σ_t error(t, choice_t)   subject to   Σ_t bytes(t, choice_t) ≤ budget
//! ```
//!
//! A multiple-choice knapsack, solved exactly by dynamic programming over the tensors. It keeps the
//! partial selections that no other beats in both bytes and error. It drops a partial selection
//! when the linear relaxation of the remaining tensors shows that it cannot end below the best
//! known solution.

mod job;

pub use job::{grid, resolve};

use crate::recipe::Choices;
use crate::{Error, Result};

/// Most partial selections kept at once. Beyond, the least promising are dropped and the result
/// says so.
const MAX_PARTIAL: usize = 1 << 20;

/// One setting of a tensor with its size and error.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The setting.
    pub choices: Choices,
    /// Real size in bytes, scales and padding included.
    pub bytes: u64,
    /// Error `Σ h·(w − ŵ)²`; h is 1 without calibration.
    pub error: f64,
    /// SQNR of the tensor in dB.
    pub sqnr_db: f64,
}

/// One candidate for each tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// Index of the candidate of each tensor.
    pub picks: Vec<usize>,
    /// Their size.
    pub bytes: u64,
    /// Their error.
    pub error: f64,
    /// Whether the selection is proven optimal. False only if more than a million partial
    /// selections had to be kept.
    pub exact: bool,
}

/// Chooses among the candidates of each tensor: with a budget in bytes the selection of least
/// error, without one the smallest candidates; in either case only those of at least `min_sqnr` dB.
///
/// ```
/// use bitnet_checkpoint::search::{Candidate, select};
/// let one = |bytes, error| Candidate { choices: Default::default(), bytes, error, sqnr_db: 10.0 };
/// let tensors = [vec![one(1, 9.0), one(4, 1.0)], vec![one(1, 5.0), one(4, 2.0)]];
/// let best = select(&tensors, Some(5), None)?;
/// assert_eq!((best.picks, best.bytes, best.error), (vec![1, 0], 5, 6.0));
/// # Ok::<(), bitnet_checkpoint::Error>(())
/// ```
///
/// # Errors
/// [`Error::Recipe`] if no selection fits the budget, or no candidate of a tensor reaches the
/// quality.
pub fn select(
    tensors: &[Vec<Candidate>],
    budget: Option<u64>,
    min_sqnr: Option<f64>,
) -> Result<Selection> {
    let options = tensors
        .iter()
        .map(|all| pareto(all, min_sqnr))
        .collect::<Result<Vec<_>>>()?;
    let least: u64 = options.iter().map(|o| o[0].bytes).sum();
    let Some(budget) = budget else {
        let first = options.iter().map(|o| o[0]);
        return Ok(Selection {
            picks: first.clone().map(|p| p.pick).collect(),
            bytes: least,
            error: first.map(|p| p.error).sum(),
            exact: true,
        });
    };
    if least > budget {
        return Err(Error::Recipe(format!(
            "a budget of {budget} bytes: the smallest settings that are allowed take {least}"
        )));
    }
    let (steps, exact) = partial_selections(&options, budget);
    let end = steps.last().and_then(|last| {
        last.iter()
            .enumerate()
            .min_by(|a, b| a.1.error.total_cmp(&b.1.error))
    });
    let Some((mut at, end)) = end else {
        return Err(Error::Recipe("no selection fits the budget".into()));
    };
    let mut picks = vec![0; options.len()];
    for (i, options) in options.iter().enumerate().rev() {
        let partial = &steps[i + 1][at];
        picks[i] = options[partial.option as usize].pick;
        at = partial.from as usize;
    }
    Ok(Selection {
        picks,
        bytes: end.bytes,
        error: end.error,
        exact,
    })
}

/// The undominated choices for the first tensors, after each tensor; and whether none was dropped
/// that could have led to the best selection.
fn partial_selections(
    options: &[Vec<ParetoPoint>],
    budget: u64,
) -> (Vec<Vec<PartialSelection>>, bool) {
    let mut rest = Relaxation::new(options);
    let bound = rest.rounded(options, budget);
    // Sums of the same errors in another order differ in the last bits; that drops nothing.
    let limit = bound + 1e-9 * bound.abs();
    let mut steps = vec![vec![PartialSelection {
        bytes: 0,
        error: 0.0,
        from: 0,
        option: 0,
    }]];
    let mut exact = true;
    for (i, options) in options.iter().enumerate() {
        rest.remove(i);
        let mut next = vec![];
        for (from, partial) in steps[i].iter().enumerate() {
            for (option, point) in options.iter().enumerate() {
                let (bytes, error) = (partial.bytes + point.bytes, partial.error + point.error);
                if bytes + rest.least <= budget {
                    next.push(PartialSelection {
                        bytes,
                        error,
                        from: from as u32,
                        option: option as u32,
                    });
                }
            }
        }
        next.sort_unstable_by(|a, b| a.bytes.cmp(&b.bytes).then(a.error.total_cmp(&b.error)));
        let mut lowest = f64::INFINITY;
        next.retain(|s| {
            let better = s.error < lowest;
            lowest = lowest.min(s.error);
            better
        });
        next.retain(|s| s.error + rest.error(budget - s.bytes) <= limit);
        if next.len() > MAX_PARTIAL {
            exact = false;
            next.sort_by_cached_key(|s| (s.error + rest.error(budget - s.bytes)).to_bits());
            next.truncate(MAX_PARTIAL);
            next.sort_unstable_by_key(|s| s.bytes);
        }
        steps.push(next);
    }
    (steps, exact)
}

/// Choices for the first tensors.
#[derive(Debug, Clone, Copy)]
struct PartialSelection {
    bytes: u64,
    error: f64,
    /// Index of the partial selection before it.
    from: u32,
    /// Index of the point chosen for the last tensor.
    option: u32,
}

/// A candidate that no other beats in both size and error.
#[derive(Debug, Clone, Copy)]
struct ParetoPoint {
    bytes: u64,
    error: f64,
    pick: usize,
}

/// The candidates worth considering, small to large.
fn pareto(all: &[Candidate], min_sqnr: Option<f64>) -> Result<Vec<ParetoPoint>> {
    let mut points: Vec<ParetoPoint> = all
        .iter()
        .enumerate()
        .filter(|(_, c)| min_sqnr.is_none_or(|least| c.sqnr_db >= least) && c.error.is_finite())
        .map(|(pick, c)| ParetoPoint {
            bytes: c.bytes,
            error: c.error,
            pick,
        })
        .collect();
    points.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.error.total_cmp(&b.error)));
    let mut lowest = f64::INFINITY;
    points.retain(|p| {
        let better = p.error < lowest;
        lowest = lowest.min(p.error);
        better
    });
    if points.is_empty() {
        let best = all
            .iter()
            .map(|c| c.sqnr_db)
            .fold(f64::NEG_INFINITY, f64::max);
        return Err(Error::Recipe(format!(
            "min_sqnr {}: the best setting of a tensor reaches {best:.2} dB",
            min_sqnr.unwrap_or_default()
        )));
    }
    Ok(points)
}

/// A step along the lower convex hull of a tensor's points.
#[derive(Debug, Clone, Copy)]
struct HullStep {
    tensor: usize,
    bytes: u64,
    gain: f64,
    /// The point that it leads to.
    point: usize,
}

impl HullStep {
    fn slope(&self) -> f64 {
        self.gain / self.bytes as f64
    }
}

/// The linear relaxation of some tensors: convex hulls instead of points.
struct Relaxation {
    /// Steepest first.
    segments: Vec<HullStep>,
    /// Bytes and gain of the segments before each, and of all.
    before: Vec<(u64, f64)>,
    /// Size and error of the smallest point of each tensor, and their sums.
    smallest: Vec<(u64, f64)>,
    least: u64,
    error: f64,
}

impl Relaxation {
    fn new(options: &[Vec<ParetoPoint>]) -> Self {
        let mut segments = vec![];
        for (tensor, points) in options.iter().enumerate() {
            let mut hull = vec![0];
            for (i, p) in points.iter().enumerate().skip(1) {
                let slope = |a: usize, b: &ParetoPoint| {
                    (points[a].error - b.error) / (b.bytes - points[a].bytes) as f64
                };
                while let [.., a, b] = hull[..]
                    && slope(a, &points[b]) <= slope(b, p)
                {
                    hull.pop();
                }
                hull.push(i);
            }
            segments.extend(hull.windows(2).map(|w| {
                let (a, b) = (&points[w[0]], &points[w[1]]);
                HullStep {
                    tensor,
                    bytes: b.bytes - a.bytes,
                    gain: a.error - b.error,
                    point: w[1],
                }
            }));
        }
        // Stable, so that equally steep segments of a tensor stay in order.
        segments.sort_by(|a, b| b.slope().total_cmp(&a.slope()));
        let smallest: Vec<_> = options.iter().map(|o| (o[0].bytes, o[0].error)).collect();
        let (least, error) = smallest
            .iter()
            .fold((0, 0.0), |sum, s| (sum.0 + s.0, sum.1 + s.1));
        let mut new = Self {
            segments,
            before: vec![],
            smallest,
            least,
            error,
        };
        new.sum();
        new
    }

    fn sum(&mut self) {
        self.before.clear();
        self.before.push((0, 0.0));
        let mut sum = (0, 0.0);
        self.before.extend(self.segments.iter().map(|s| {
            sum = (sum.0 + s.bytes, sum.1 + s.gain);
            sum
        }));
    }

    fn remove(&mut self, tensor: usize) {
        self.segments.retain(|s| s.tensor != tensor);
        self.least -= self.smallest[tensor].0;
        self.smallest[tensor] = (0, 0.0);
        self.error = self.smallest.iter().map(|s| s.1).sum();
        self.sum();
    }

    /// The least error that any choice for these tensors could have in `bytes`, which are at least
    /// `self.least`.
    fn error(&self, bytes: u64) -> f64 {
        let left = bytes - self.least;
        let full = self.before.partition_point(|b| b.0 <= left) - 1;
        let part = self
            .segments
            .get(full)
            .map_or(0.0, |s| (left - self.before[full].0) as f64 * s.slope());
        self.error - self.before[full].1 - part
    }

    /// The error of a selection that fits: the steepest segments first, while bytes are left.
    fn rounded(&self, options: &[Vec<ParetoPoint>], budget: u64) -> f64 {
        let mut left = budget - self.least;
        let mut at = vec![0; options.len()];
        let mut full = vec![false; options.len()];
        for s in &self.segments {
            if s.bytes <= left && !full[s.tensor] {
                left -= s.bytes;
                at[s.tensor] = s.point;
            } else {
                full[s.tensor] = true;
            }
        }
        options.iter().zip(at).map(|(o, at)| o[at].error).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_core::random::Random;
    use proptest::prelude::*;

    fn brute(tensors: &[Vec<Candidate>], budget: u64, min_sqnr: f64) -> Option<f64> {
        let mut all = vec![(0u64, 0.0f64)];
        for candidates in tensors {
            let allowed: Vec<_> = candidates
                .iter()
                .filter(|c| c.sqnr_db >= min_sqnr)
                .collect();
            all = all
                .iter()
                .flat_map(|&(b, e)| allowed.iter().map(move |c| (b + c.bytes, e + c.error)))
                .collect();
        }
        all.into_iter()
            .filter(|(b, _)| *b <= budget)
            .map(|(_, e)| e)
            .min_by(f64::total_cmp)
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        (1u64..200, 0.0f64..10.0, 0.0f64..30.0).prop_map(|(bytes, error, sqnr_db)| Candidate {
            choices: Choices::default(),
            bytes,
            error,
            sqnr_db,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn as_brute_force(
            tensors in prop::collection::vec(prop::collection::vec(candidate(), 1..6), 1..6),
            budget in 1u64..900,
            floor in prop::option::of(0.0f64..20.0),
        ) {
            let expected = brute(&tensors, budget, floor.unwrap_or(f64::NEG_INFINITY));
            match (select(&tensors, Some(budget), floor), expected) {
                (Ok(found), Some(error)) => {
                    prop_assert!(found.exact && found.bytes <= budget);
                    let picked = |f: fn(&Candidate) -> f64| tensors.iter().zip(&found.picks).map(|(t, &p)| f(&t[p])).sum::<f64>();
                    prop_assert_eq!(picked(|c| c.bytes as f64), found.bytes as f64);
                    prop_assert!((picked(|c| c.error) - found.error).abs() <= 1e-9);
                    prop_assert!((found.error - error).abs() <= 1e-9 * error.max(1.0), "{} {}", found.error, error);
                }
                (Err(_), None) => {}
                (found, expected) => prop_assert!(false, "{:?} {:?}", found, expected),
            }
        }
    }

    #[test]
    fn many_tensors_of_odd_sizes_stay_exact() {
        let mut random = Random::new(7);
        let mut below = |n| random.below(n) as u64;
        let tensors: Vec<Vec<Candidate>> = (0..200)
            .map(|_| {
                let weights = 1000 + below(100_000);
                let power = (1 + below(1000)) as f64;
                let one = |bits: u64| Candidate {
                    choices: Choices::default(),
                    bytes: weights * bits / 8 + bits % 3,
                    error: power * weights as f64 * 4f64.powi(-(bits as i32)),
                    sqnr_db: 6.0 * bits as f64,
                };
                (1..=8).map(one).collect()
            })
            .collect();
        let weights: u64 = tensors.iter().map(|t| t[7].bytes).sum();
        let best = select(&tensors, Some(weights * 3 / 8), None).unwrap();
        assert!(best.exact && best.bytes <= weights * 3 / 8);
        let uniform: f64 = tensors.iter().map(|t| t[2].error).sum();
        assert!(best.error < uniform);
    }
}
