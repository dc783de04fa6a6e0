//! The backward pass of rounding: the slope of the estimator and the gradient of learned scales.

use super::codes::WeightCodes;
use super::estimator::StraightThroughEstimator;
use super::rounding::WeightRounding;
use crate::Result;
use bitnet_core::ops::LANES;
use bitnet_core::{Granularity, MatrixSpec, Precision};
use rayon::prelude::*;
use std::borrow::Cow;

/// The slope The slope The slope The slope The slope The slope m over one granule.
#[derive(Clone, Copy)]
enum Slope {
    /// 1 for weights between the two numbers, else 0.
    Range(f32, f32),
    Soft(Staircase),
}

impl Slope {
    /// Multiplies the gradient of each weight by `1 − λ + λ·m`.
    fn scale_gradient(self, w: &[f32], lambda: f32, grad: &mut [f32]) {
        let weights = grad.iter_mut().zip(w);
        match self {
            Self::Range(from, to) => {
                let outside = 1.0 - lambda;
                weights.for_each(|(g, &w)| {
                    *g *= if from <= w && w <= to { 1.0 } else { outside };
                });
            }
            Self::Soft(stairs) => {
                weights.for_each(|(g, &w)| *g *= 1.0 - lambda + lambda * stairs.slope(w));
            }
        }
    }
}

/// The staircase of tanh: levels from `low` to `high` in units of `step`, `2·half` apart.
#[derive(Clone, Copy)]
struct Staircase {
    step: f32,
    low: f32,
    high: f32,
    half: f32,
    temperature: f32,
}

impl Staircase {
    fn slope(self, w: f32) -> f32 {
        let Self {
            step,
            low,
            high,
            half,
            temperature: t,
        } = self;
        let v = w / step;
        // The lower of the two levels around v.
        let below = low
            + ((v - low) / (2.0 * half))
                .floor()
                .clamp(0.0, (high - low) / (2.0 * half) - 1.0)
                * 2.0
                * half;
        let tanh = ((v - below - half) / half / t).tanh();
        if low <= v && v <= high {
            (1.0 - tanh * tanh) / (t * t.recip().tanh())
        } else {
            0.0
        }
    }
}

/// `Σ g·q` and `Σ g·w` over the weights from `range.0` to `range.1`.
fn scale_sums(grad: &[f32], w: &[f32], q: &[i8], range: (f32, f32)) -> (f64, f64) {
    let (mut of_values, mut of_weights) = ([0f32; LANES], [0f32; LANES]);
    for ((grad, w), q) in grad.chunks(LANES).zip(w.chunks(LANES)).zip(q.chunks(LANES)) {
        for (lane, ((&g, &w), &q)) in grad.iter().zip(w).zip(q).enumerate() {
            of_values[lane] += g * f32::from(q);
            of_weights[lane] += if range.0 <= w && w <= range.1 {
                g * w
            } else {
                0.0
            };
        }
    }
    let total = |lanes: [f32; LANES]| lanes.into_iter().map(f64::from).sum();
    (total(of_values), total(of_weights))
}

impl WeightRounding {
    /// Turns ∂L/∂ŵ, `[N, K]`, into ∂L/∂w in place, for `w + λ·(ŵ − w)`. Returns ∂L/∂scale where
    /// scales are learned.
    pub(crate) fn surrogate(
        &self,
        w: &[f32],
        codes: &WeightCodes,
        lambda: f32,
        learned: bool,
        grad: &mut [f32],
    ) -> Result<Option<Vec<f32>>> {
        if self.estimator == StraightThroughEstimator::Plain {
            return Ok(None);
        }
        let spec = codes.spec();
        let (cols, width, granules) = (
            spec.cols.max(1),
            spec.granule_cols(),
            spec.granules_per_row(),
        );
        let values = if learned {
            codes.values(&self.runtime)?
        } else {
            Cow::Borrowed(&[][..])
        };
        let mut of_scales = vec![0f64; if learned { spec.rows * granules } else { 0 }];
        let row = |row: usize, w: &[f32], grad: &mut [f32], of_scales: &mut [f64]| {
            for (i, (grad, w)) in grad.chunks_mut(width).zip(w.chunks(width)).enumerate() {
                let index = spec.scale_index(0, row, i * width);
                let (step, slope) = self.slope(codes, index);
                if step == 0.0 {
                    // A granule of zeros has no range: the gradient passes unchanged.
                    continue;
                }
                if let (Some(sum), Slope::Range(from, to)) = (of_scales.get_mut(i), slope) {
                    let (of_values, of_weights) = scale_sums(
                        grad,
                        w,
                        &values[row * cols + i * width..][..w.len()],
                        (from, to),
                    );
                    let inside = if spec.precision == Precision::Binary {
                        0.0
                    } else {
                        of_weights / f64::from(step)
                    };
                    *sum = f64::from(lambda) * (of_values - inside) / f64::from(self.unit());
                }
                slope.scale_gradient(w, lambda, grad);
            }
        };
        if learned {
            let rows = grad
                .par_chunks_mut(cols)
                .zip(w.par_chunks(cols))
                .zip(of_scales.par_chunks_mut(granules));
            self.runtime.install(|| {
                rows.enumerate()
                    .for_each(|(r, ((grad, w), sums))| row(r, w, grad, sums))
            });
        } else {
            let rows = grad.par_chunks_mut(cols).zip(w.par_chunks(cols));
            self.runtime.install(|| {
                rows.enumerate()
                    .for_each(|(r, (grad, w))| row(r, w, grad, &mut []))
            });
        }
        Ok(learned.then(|| self.scale_gradients(spec, of_scales)))
    }

    /// ∂L/∂scale from the sums over each granule of a row: summed over the tensor if it has one
    /// scale, times the factor `1/√(n·Qp)` of LSQ.
    fn scale_gradients(&self, spec: &MatrixSpec, sums: Vec<f64>) -> Vec<f32> {
        let (width, granules) = (spec.granule_cols(), spec.granules_per_row());
        let qp = f64::from(self.scheme.precision().map_or(1, |p| p.range().1));
        let scaled = |sum: f64, n: usize| (sum / (n as f64 * qp).sqrt()) as f32;
        if spec.granularity == Granularity::Tensor {
            return vec![scaled(sums.iter().sum(), spec.weights_len())];
        }
        let weights = |i: usize| width.min(spec.cols - i % granules * width);
        let sums = sums.into_iter().enumerate();
        sums.map(|(i, sum)| scaled(sum, weights(i))).collect()
    }

    /// The step between two values, and the slope, of the granule whose scale is at `index`.
    fn slope(&self, codes: &WeightCodes, index: usize) -> (f32, Slope) {
        let (spec, scales) = (codes.spec(), codes.scales());
        let step = (0..spec.planes)
            .map(|plane| scales[plane * (scales.len() / spec.planes) + index])
            .sum::<f32>();
        let zero = codes.zero_point(index);
        let (low, high) = spec.precision.range();
        let (low, high) = (f32::from(low) - zero, f32::from(high) - zero);
        let slope = match self.estimator {
            StraightThroughEstimator::Plain => Slope::Range(f32::NEG_INFINITY, f32::INFINITY),
            StraightThroughEstimator::Clipped { range } => {
                Slope::Range(range * low * step, range * high * step)
            }
            StraightThroughEstimator::LearnedScale => {
                Slope::Range((low * step).next_up(), (high * step).next_down())
            }
            StraightThroughEstimator::Stretched => Slope::Range(
                (-self.unit() * step).next_up(),
                (self.unit() * step).next_down(),
            ),
            StraightThroughEstimator::Soft { temperature } => {
                let half = if spec.precision == Precision::Binary {
                    1.0
                } else {
                    0.5
                };
                Slope::Soft(Staircase {
                    step,
                    low,
                    high,
                    half,
                    temperature,
                })
            }
        };
        (step, slope)
    }
}
