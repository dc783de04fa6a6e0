//! The levels of several trit planes: every sum of ±α_k and 0.

/// Largest number of planes.
pub(crate) const MAX_PLANES: usize = 3;
/// Levels ≥ 0 of [`MAX_PLANES`] planes: (3³ + 1) / 2.
pub(crate) const MAX_LEVELS: usize = 14;

/// The levels ≥ 0 of a set of αs, in ascending order, and the trits of each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct PlaneLevels {
    pub(crate) len: usize,
    pub(crate) planes: usize,
    pub(crate) level: [f32; MAX_LEVELS],
    pub(crate) trits: [[i8; MAX_PLANES]; MAX_LEVELS],
}

impl PlaneLevels {
    /// Only the level 0: a granule of zeros.
    pub(crate) const ZERO: Self = Self {
        len: 1,
        planes: MAX_PLANES,
        level: [0.0; MAX_LEVELS],
        trits: [[0; MAX_PLANES]; MAX_LEVELS],
    };

    pub(crate) fn new(alpha: &[f32]) -> Self {
        let combinations = 3usize.pow(alpha.len() as u32);
        let mut all: Vec<(f32, [i8; MAX_PLANES])> = (0..combinations)
            .map(|i| {
                let mut trits = [0i8; MAX_PLANES];
                let mut sum = 0.0f32;
                for (k, &a) in alpha.iter().enumerate() {
                    trits[k] = (i / 3usize.pow(k as u32) % 3) as i8 - 1;
                    sum = if k == 0 {
                        a * f32::from(trits[k])
                    } else {
                        sum + a * f32::from(trits[k])
                    };
                }
                (sum, trits)
            })
            .filter(|(sum, _)| *sum >= 0.0)
            .collect();
        // Equal sums: the fewest non-zero trits, so that zero is all zeros.
        let cost =
            |t: &[i8; MAX_PLANES]| t.iter().map(|t| u32::from(t.unsigned_abs())).sum::<u32>();
        all.sort_by(|a, b| {
            a.0.total_cmp(&b.0)
                .then(cost(&a.1).cmp(&cost(&b.1)))
                .then(b.1.cmp(&a.1))
        });
        all.dedup_by(|later, first| later.0 == first.0);
        let mut levels = Self {
            len: all.len().min(MAX_LEVELS),
            planes: alpha.len(),
            level: [0.0; MAX_LEVELS],
            trits: [[0; MAX_PLANES]; MAX_LEVELS],
        };
        for (i, (level, trits)) in all.into_iter().take(MAX_LEVELS).enumerate() {
            levels.level[i] = level;
            levels.trits[i] = trits;
        }
        levels
    }

    /// Midpoint between level `i` and level `i + 1`: |w| above it belongs to the upper one.
    pub(crate) fn midpoint(&self, i: usize) -> f32 {
        self.level[i] + (self.level[i + 1] - self.level[i]) / 2.0
    }

    /// Writes the trits of each weight, one slice for each plane.
    pub(crate) fn encode(&self, w: &[f32], out: &mut [&mut [i8]]) {
        let mut midpoints = [f32::INFINITY; MAX_LEVELS];
        for (i, midpoint) in midpoints.iter_mut().enumerate().take(self.len - 1) {
            *midpoint = self.midpoint(i);
        }
        for (i, &w) in w.iter().enumerate() {
            let level = midpoints
                .iter()
                .map(|&m| usize::from(w.abs() > m))
                .sum::<usize>();
            for (k, out) in out.iter_mut().enumerate() {
                let trit = self.trits[level][k];
                out[i] = if w < 0.0 { -trit } else { trit };
            }
        }
    }
}
