//! The parameters of a granule, and how they turn its weights into values.

use crate::levels::PlaneLevels;
use crate::ops::{Cuts, Ops, Uniform};
use crate::random::nth;

/// The parameters that encode a granule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fitted {
    /// Scale of each plane, as it will be stored.
    pub scales: [f32; 3],
    /// Zero point; 0 where there is none.
    pub zero_point: f32,
    pub(crate) encoder: Encoder,
}

/// How the weights of a granule become values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Encoder {
    /// The same value for every weight: a granule of zeros.
    Constant(i8),
    /// `[w > high] − [w < low]`.
    Cut(Cuts),
    /// `clip(round(w / s) + z)`.
    Uniform(Uniform),
    /// `+1 if w ≥ at else −1`.
    Split(f32),
    /// `+1` with probability `clip((w/scale + 1)/2, 0, 1)`, else −1.
    Stochastic { seed: u64, scale: f32 },
    /// The nearest of the levels that several planes make.
    Levels(PlaneLevels),
}

impl Fitted {
    /// One plane, no zero point.
    pub(crate) fn one(scale: f32, encoder: Encoder) -> Self {
        Self {
            scales: [scale, 0.0, 0.0],
            zero_point: 0.0,
            encoder,
        }
    }

    /// The cuts between −1, 0 and +1, for one trit plane.
    pub fn cuts(&self) -> Option<Cuts> {
        match self.encoder {
            Encoder::Cut(cuts) => Some(cuts),
            Encoder::Constant(0) => Some(Cuts::NONE),
            _ => None,
        }
    }

    /// Writes the values of `w`; `index` is the position of `w[0]` in the matrix, `out` has one
    /// slice for each plane.
    pub fn encode(&self, ops: &impl Ops, w: &[f32], index: usize, out: &mut [&mut [i8]]) {
        let one = &mut *out[0];
        match &self.encoder {
            Encoder::Constant(value) => one.fill(*value),
            Encoder::Cut(cut) => ops.encode_cut(w, *cut, one),
            Encoder::Uniform(uniform) => ops.encode_uniform(w, uniform, one),
            Encoder::Split(at) => one
                .iter_mut()
                .zip(w)
                .for_each(|(q, &w)| *q = if w >= *at { 1 } else { -1 }),
            Encoder::Stochastic { seed, scale } => {
                for (i, (q, &w)) in one.iter_mut().zip(w).enumerate() {
                    let up = uniform(*seed, (index + i) as u64) < (w / scale + 1.0) / 2.0;
                    *q = if up { 1 } else { -1 };
                }
            }
            Encoder::Levels(levels) => levels.encode(w, out),
        }
    }
}

/// A uniform number in [0, 1) for position `index`: independent of order and threads.
fn uniform(seed: u64, index: u64) -> f32 {
    (nth(seed, index) >> 40) as f32 / (1u32 << 24) as f32
}
