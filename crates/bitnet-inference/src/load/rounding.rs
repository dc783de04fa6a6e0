//! The error of weights that were rounded by choice.

use super::options::FloatType;

/// Σ w² and Σ (w − rounded)² of rounded weights.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RoundingError {
    power: f64,
    error: f64,
}

impl RoundingError {
    pub(super) fn between(w: &[f32], rounded: impl Iterator<Item = f32>) -> Self {
        let square = |x: f32| f64::from(x).powi(2);
        let sums = |(power, error), (&w, r)| (power + square(w), error + square(w - r));
        let (power, error) = w.iter().zip(rounded).fold((0.0, 0.0), sums);
        Self { power, error }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.power += other.power;
        self.error += other.error;
    }

    /// A sentence on the weights `what`, held as `held`; none if nothing was rounded.
    pub(crate) fn note(&self, what: &str, held: FloatType) -> Option<String> {
        let sqnr = 10.0 * (self.power / self.error).log10();
        match (self.power > 0.0, self.error > 0.0) {
            (false, _) => None,
            (true, true) => Some(format!(
                "{what} rounded to {held}: {sqnr:.1} dB above the error"
            )),
            (true, false) => Some(format!("{what} held in {held} without loss")),
        }
    }
}
