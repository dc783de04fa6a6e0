//! Learning rate and weight decay over the steps of a training.

use super::optimizer::Rates;
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Factors of learning rate and weight decay at each step t of T, counted from 0.
///
/// ```text
/// t < W             (t + 1)/W                                       warm-up
/// constant          1
/// linear            1 − (1 − floor)·u                               u = (t − W)/(T − W)
/// cosine            floor + (1 − floor)·(1 + cos πu)/2
/// two-stage         as cosine with floor 0 while t < M; then, with u' = (t − M)/(T − M),
///                   floor + (drop − floor)·(1 + cos πu')/2, and no decay of weights
/// ```
///
/// Two stages follow the reports on b1.58: a high rate that is cut midway, and weight decay only
/// until then.
///
/// ```
/// use bitnet_quant::qat::{Schedule, ScheduleShape};
/// let schedule = Schedule { warmup: 2, shape: ScheduleShape::Cosine, ..Schedule::default() };
/// let rates: Vec<f64> = (0..6).map(|t| schedule.rates(t, 6).learning_rate).collect();
/// assert_eq!(rates[..3], [0.5, 1.0, 1.0]);
/// assert!((rates[4] - 0.5).abs() < 1e-12);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// W, the number of warm-up steps.
    pub warmup: u64,
    /// The shape after the warm-up.
    pub shape: ScheduleShape,
    /// Factor at the end.
    pub floor: f64,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleShape {
    /// Not at all.
    Constant,
    /// Linearly.
    Linear,
    /// Along half a cosine.
    Cosine,
    /// Along a cosine until midway, then along another one from `drop`.
    #[serde(untagged)]
    TwoStage {
        /// M/T, where the second stage begins.
        midway: f64,
        /// Factor at the beginning of the second stage.
        drop: f64,
    },
}

impl ScheduleShape {
    /// Two stages of equal length. The second begins with a third of the rate: 1.5e-3 falls to
    /// about 8e-4, then 5e-4 to 0.
    pub const TWO_STAGE: Self = Self::TwoStage {
        midway: 0.5,
        drop: 1.0 / 3.0,
    };
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            warmup: 0,
            shape: ScheduleShape::Cosine,
            floor: 0.0,
        }
    }
}

/// From 1 to 0 along half a cosine, at `t` of `len`.
fn cosine(t: u64, len: u64) -> f64 {
    0.5 * (1.0 + (PI * t as f64 / len.max(1) as f64).cos())
}

impl Schedule {
    /// The factors at step `t` of `steps`, without clipping.
    pub fn rates(&self, t: u64, steps: u64) -> Rates {
        let (since, len) = (
            t.saturating_sub(self.warmup),
            steps.saturating_sub(self.warmup).max(1),
        );
        let between = |from: f64, share: f64| self.floor + (from - self.floor) * share;
        let (rate, decay) = match self.shape {
            ScheduleShape::Constant => (1.0, 1.0),
            ScheduleShape::Linear => (between(1.0, 1.0 - since as f64 / len as f64), 1.0),
            ScheduleShape::Cosine => (between(1.0, cosine(since, len)), 1.0),
            ScheduleShape::TwoStage { midway, drop } => {
                let middle = (midway * steps as f64).round() as u64;
                if t < middle {
                    (cosine(since, len), 1.0)
                } else {
                    (
                        between(drop, cosine(t - middle, steps.saturating_sub(middle))),
                        0.0,
                    )
                }
            }
        };
        let warm = if t < self.warmup {
            (t + 1) as f64 / self.warmup as f64
        } else {
            1.0
        };
        Rates {
            learning_rate: rate * warm,
            weight_decay: decay,
            clip: None,
        }
    }

    pub(crate) fn problems(&self, wrong: &mut Vec<String>) {
        let mut share = |name: &str, x: f64| {
            if !(0.0..=1.0).contains(&x) {
                wrong.push(format!(
                    "schedule.{name}: expected a number in [0, 1], got {x}"
                ));
            }
        };
        share("floor", self.floor);
        if let ScheduleShape::TwoStage { midway, drop } = self.shape {
            share("midway", midway);
            share("drop", drop);
        }
    }
}
