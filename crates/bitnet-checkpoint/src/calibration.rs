//! Statistics of layer inputs: ranges, a histogram and the second moment of each channel, saved to
//! a file and used by quantizers.
//!
//! The second moments `h_k = E[x_k²]` are the importance of input channels: `Σ_k h_k·(w_k − ŵ_k)²`
//! is the expected squared error of the output that the error of a row of weights causes, if
//! channels are uncorrelated.
//!
//! The file is JSON. Another program may write it, with zeros for unknown fields:
//!
//! ```text
//! {"version": 1, "layers": {"fc.weight": {"tokens": 2, "min": -2.0, "max": 3.0, "sum_squares": [10.0, 4.25],
//!                                         "reach": 4.0, "bins": [2048 counts from -reach to reach]}}}
//! ```

use crate::{Error, Result};
use bitnet_core::Precision;
use bitnet_formats::replace;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Version of the file.
pub const VERSION: u32 = 1;
/// Bins of a histogram.
const BINS: usize = 2048;

/// The rule that chooses a range from the statistics.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Observer {
    /// ± the greatest magnitude.
    Absmax,
    /// From the smallest to the greatest.
    MinMax,
    /// Without this share of the numbers, half of it at each end: 0.001 keeps 99.9 %.
    Percentile(f64),
    /// ± the share i/64 of the greatest magnitude, i from 1 to 64, that has the least squared error
    /// in this precision.
    Mse(Precision),
}

/// Statistics of the input of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerStatistics {
    /// Tokens, i.e. rows.
    pub tokens: u64,
    /// Smallest number.
    pub min: f32,
    /// Greatest number.
    pub max: f32,
    /// Σ x² of each channel.
    sum_squares: Vec<f64>,
    /// The histogram covers −reach to reach, a power of two; 0 before the first number that is not
    /// 0.
    reach: f32,
    bins: Vec<u64>,
}

impl LayerStatistics {
    /// Empty statistics of an input with `channels` features.
    pub fn new(channels: usize) -> Self {
        Self {
            tokens: 0,
            min: f32::INFINITY,
            max: f32::NEG_INFINITY,
            sum_squares: vec![0.0; channels],
            reach: 0.0,
            bins: vec![0; BINS],
        }
    }

    /// Adds tokens, `x` of `[M, K]`.
    ///
    /// # Errors
    /// [`Error::Core`] for a length that is not whole rows, and with the position for NaN or
    /// infinity; nothing is added then.
    pub fn observe(&mut self, x: &[f32]) -> Result<()> {
        let k = self.sum_squares.len();
        if k == 0 || !x.len().is_multiple_of(k) {
            let expected = x.len().next_multiple_of(k.max(1)).max(k);
            return Err(bitnet_core::Error::Length {
                what: "activations",
                expected,
                got: x.len(),
            }
            .into());
        }
        let moments = crate::rows::moments(bitnet_kernels::Kernels::detect(), x)?;
        if x.is_empty() {
            return Ok(());
        }
        self.tokens += (x.len() / k) as u64;
        self.min = self.min.min(moments.min);
        self.max = self.max.max(moments.max);
        for row in x.chunks(k) {
            self.sum_squares
                .iter_mut()
                .zip(row)
                .for_each(|(sum, &x)| *sum += f64::from(x).powi(2));
        }
        self.widen(moments.max_abs());
        let per_unit = BINS as f64 / 2.0 / f64::from(self.reach.max(f32::MIN_POSITIVE));
        for &x in x {
            let bin = (BINS / 2) as f64 + (f64::from(x) * per_unit).floor();
            self.bins[(bin.max(0.0) as usize).min(BINS - 1)] += 1;
        }
        Ok(())
    }

    /// Doubles the reach of the histogram until it holds ±`magnitude`, two bins becoming one.
    fn widen(&mut self, magnitude: f32) {
        if magnitude == 0.0 {
            return;
        }
        if self.reach == 0.0 {
            // Only zeros were counted so far; they lie in the middle of every reach.
            self.reach = 2f32.powi(magnitude.log2().ceil().clamp(-120.0, 127.0) as i32);
        }
        while self.reach < magnitude && self.reach < 2f32.powi(127) {
            let mut wider = vec![0; BINS];
            self.bins
                .iter()
                .enumerate()
                .for_each(|(i, n)| wider[BINS / 4 + i / 2] += n);
            self.bins = wider;
            self.reach *= 2.0;
        }
    }

    /// These tokens and those of `other`.
    ///
    /// # Errors
    /// [`Error::Core`] for another number of channels.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        let (expected, got) = (self.sum_squares.len(), other.sum_squares.len());
        if expected != got {
            return Err(bitnet_core::Error::Length {
                what: "channels",
                expected,
                got,
            }
            .into());
        }
        self.tokens += other.tokens;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.sum_squares
            .iter_mut()
            .zip(&other.sum_squares)
            .for_each(|(a, b)| *a += b);
        self.widen(other.reach);
        let mut other = other.clone();
        other.widen(self.reach);
        self.bins
            .iter_mut()
            .zip(&other.bins)
            .for_each(|(a, b)| *a += b);
        Ok(())
    }

    /// Number of features.
    pub fn channels(&self) -> usize {
        self.sum_squares.len()
    }

    /// `E[x_k²]` of each channel: the importance of the columns of the weights that meet it.
    pub fn second_moments(&self) -> Vec<f32> {
        self.sum_squares
            .iter()
            .map(|s| (s / self.tokens.max(1) as f64) as f32)
            .collect()
    }

    /// Middle and count of each bin that is not empty.
    pub fn histogram(&self) -> impl Iterator<Item = (f32, u64)> {
        let width = f64::from(self.reach) * 2.0 / BINS as f64;
        let middle = move |i: usize| ((i as f64 + 0.5 - (BINS / 2) as f64) * width) as f32;
        self.bins
            .iter()
            .enumerate()
            .filter(|(_, n)| **n > 0)
            .map(move |(i, &n)| (middle(i), n))
    }

    /// A range for static quantization.
    ///
    /// # Errors
    /// [`Error::NotCalibrated`] if nothing was observed, [`Error::Invalid`] for a share of a
    /// percentile that is not in 0 … 1.
    pub fn range(&self, observer: Observer) -> Result<(f32, f32)> {
        if self.tokens == 0 {
            return Err(Error::NotCalibrated("this layer".into()));
        }
        let most = self.max.max(-self.min);
        match observer {
            Observer::Absmax => Ok((-most, most)),
            Observer::MinMax => Ok((self.min, self.max)),
            Observer::Percentile(share) => {
                if !(0.0..1.0).contains(&share) {
                    return Err(Error::Invalid(vec![format!(
                        "percentile: expected a share in 0 to 1, got {share}"
                    )]));
                }
                let beyond = (self.bins.iter().sum::<u64>() as f64 * share / 2.0).floor() as u64;
                let edge = |bins: &mut dyn Iterator<Item = (f32, u64)>| {
                    let mut seen = 0;
                    for (middle, count) in bins {
                        seen += count;
                        if seen > beyond {
                            return middle;
                        }
                    }
                    0.0
                };
                let all: Vec<_> = self.histogram().collect();
                let (low, high) = (
                    edge(&mut all.iter().copied()),
                    edge(&mut all.iter().rev().copied()),
                );
                // A bin's middle may lie beyond the numbers in it.
                Ok((low.max(self.min), high.min(self.max)))
            }
            Observer::Mse(precision) => {
                let top = f64::from(precision.range().1);
                let bins: Vec<_> = self
                    .histogram()
                    .map(|(x, n)| (f64::from(x), n as f64))
                    .collect();
                let error = |limit: f64| -> f64 {
                    let scale = (limit / top).max(f64::MIN_POSITIVE);
                    let hat = |x: f64| (x / scale).round_ties_even().clamp(-top - 1.0, top) * scale;
                    bins.iter().map(|&(x, n)| n * (x - hat(x)).powi(2)).sum()
                };
                let limits = (1..=64).map(|i| f64::from(most) * f64::from(i) / 64.0);
                let best = limits
                    .min_by(|&a, &b| error(a).total_cmp(&error(b)))
                    .unwrap_or(f64::from(most)) as f32;
                Ok((-best, best))
            }
        }
    }

    fn check(&self, name: &str) -> Result<()> {
        let sound = self.bins.len() == BINS
            && self.reach >= 0.0
            && self.reach.is_finite()
            && self.sum_squares.iter().all(|s| s.is_finite() && *s >= 0.0)
            && (self.tokens == 0
                || (self.min.is_finite() && self.max.is_finite() && self.min <= self.max));
        if sound {
            Ok(())
        } else {
            Err(Error::Recipe(format!(
                "calibration of '{name}': {BINS} bins and finite numbers expected"
            )))
        }
    }
}

/// Statistics of the inputs of many layers, by the name of the weights that they meet.
///
/// ```
/// use bitnet_checkpoint::calibration::{Calibration, Observer};
/// let mut calibration = Calibration::default();
/// calibration.observe("fc.weight", 2, &[1.0, -2.0, 3.0, 0.5])?;
/// let layer = calibration.layer("fc.weight")?;
/// assert_eq!(layer.second_moments(), [5.0, 2.125]); // (1 + 9)/2, (4 + 0.25)/2
/// assert_eq!(layer.range(Observer::MinMax)?, (-2.0, 3.0));
/// # Ok::<(), bitnet_checkpoint::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// [`VERSION`].
    pub version: u32,
    /// Statistics by name.
    pub layers: BTreeMap<String, LayerStatistics>,
}

impl Default for Calibration {
    fn default() -> Self {
        Self {
            version: VERSION,
            layers: BTreeMap::new(),
        }
    }
}

impl Calibration {
    /// Adds tokens, `x` of `[M, channels]`, at the input of a layer.
    ///
    /// # Errors
    /// As [`LayerStatistics::observe`], and for another number of channels than before.
    pub fn observe(&mut self, name: &str, channels: usize, x: &[f32]) -> Result<()> {
        match self.layers.get_mut(name) {
            Some(layer) if layer.channels() == channels => layer.observe(x),
            Some(layer) => Err(bitnet_core::Error::Length {
                what: "channels",
                expected: layer.channels(),
                got: channels,
            }
            .into()),
            None => {
                let mut layer = LayerStatistics::new(channels);
                layer.observe(x)?;
                self.layers.insert(name.into(), layer);
                Ok(())
            }
        }
    }

    /// The statistics of a layer.
    ///
    /// # Errors
    /// [`Error::NotCalibrated`] if it was not observed.
    pub fn layer(&self, name: &str) -> Result<&LayerStatistics> {
        self.layers
            .get(name)
            .ok_or_else(|| Error::NotCalibrated(name.into()))
    }

    /// Reads what [`Calibration::save`] wrote.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, [`Error::Recipe`] for another version, unknown fields
    /// or broken numbers.
    pub fn load(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(bitnet_formats::Error::io(path, "read"))?;
        let wrong = |what: String| Error::Recipe(format!("{}: {what}", path.display()));
        let version =
            serde_json::from_str::<serde_json::Value>(&text).map_err(|e| wrong(e.to_string()))?;
        if version["version"] != VERSION {
            return Err(wrong(format!(
                "calibration version {}, expected {VERSION}",
                version["version"]
            )));
        }
        let calibration: Self =
            serde_json::from_value(version).map_err(|e| wrong(e.to_string()))?;
        calibration
            .layers
            .iter()
            .try_for_each(|(name, layer)| layer.check(name))?;
        Ok(calibration)
    }

    /// Writes JSON, or replaces it.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).map_err(|e| Error::Recipe(e.to_string()))?;
        Ok(replace::write_file(path, text.as_bytes())?)
    }
}

/// The importance of the columns of a matrix; `None` without a calibration.
///
/// # Errors
/// [`Error::NotCalibrated`] if the matrix is not in it, [`Error::Core`] for another number of
/// columns.
pub fn importance(
    calibration: Option<&Calibration>,
    name: &str,
    shape: Option<(usize, usize)>,
) -> Result<Option<Vec<f32>>> {
    let Some(calibration) = calibration else {
        return Ok(None);
    };
    let h = calibration.layer(name)?.second_moments();
    match shape {
        Some((_, cols)) if cols != h.len() => Err(bitnet_core::Error::Length {
            what: "calibrated channels",
            expected: cols,
            got: h.len(),
        }
        .into()),
        _ => Ok(Some(h)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_core::random::Random;

    /// Normally distributed numbers.
    fn numbers(n: usize, scale: f32) -> Vec<f32> {
        let mut random = Random::new(1);
        (0..n).map(|_| scale * random.normal() as f32).collect()
    }

    #[test]
    fn parts_in_any_order_make_the_whole() {
        let x: Vec<f32> = [numbers(4000, 1.0), numbers(4000, 30.0), vec![0.0; 400]].concat();
        let mut whole = LayerStatistics::new(8);
        whole.observe(&x).unwrap();
        let mut parts = LayerStatistics::new(8);
        for part in x.chunks(80).rev() {
            let mut one = LayerStatistics::new(8);
            one.observe(part).unwrap();
            parts.merge(&one).unwrap();
        }
        assert_eq!(
            (parts.tokens, parts.min, parts.max, parts.reach),
            (whole.tokens, whole.min, whole.max, whole.reach)
        );
        assert_eq!(parts.bins, whole.bins);
        assert_eq!(whole.bins.iter().sum::<u64>(), x.len() as u64);
        for (a, b) in parts.second_moments().iter().zip(whole.second_moments()) {
            assert!((a - b).abs() <= 1e-5 * b, "{a} {b}");
        }
    }

    #[test]
    fn ranges_against_sorting_and_brute_force() {
        let mut x = numbers(20000, 1.0);
        x[17] = 40.0;
        let mut layer = LayerStatistics::new(4);
        layer.observe(&x).unwrap();
        let bin = layer.reach * 2.0 / BINS as f32;
        assert_eq!(layer.range(Observer::Absmax).unwrap(), (-40.0, 40.0));
        let mut sorted = x.clone();
        sorted.sort_by(f32::total_cmp);
        let (low, high) = layer.range(Observer::Percentile(0.01)).unwrap();
        assert!(
            (low - sorted[100]).abs() <= bin && (high - sorted[x.len() - 101]).abs() <= bin,
            "{low} {high}"
        );
        // The outlier costs less than the resolution that keeping it would cost.
        let (_, best) = layer.range(Observer::Mse(Precision::Int4)).unwrap();
        let error = |limit: f32| -> f64 {
            let s = limit / 7.0;
            x.iter()
                .map(|&x| f64::from(x - (x / s).round_ties_even().clamp(-8.0, 7.0) * s).powi(2))
                .sum()
        };
        let brute = (1..=64)
            .map(|i| 40.0 * i as f32 / 64.0)
            .min_by(|&a, &b| error(a).total_cmp(&error(b)))
            .unwrap();
        assert!(
            error(best) <= 1.02 * error(brute) && best < 10.0,
            "{best} {brute}"
        );
    }

    #[test]
    fn a_file_survives_and_a_broken_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calibration.json");
        let mut calibration = Calibration::default();
        calibration
            .observe("a.weight", 3, &numbers(30, 2.0))
            .unwrap();
        calibration.save(&path).unwrap();
        assert_eq!(Calibration::load(&path).unwrap(), calibration);
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to, part) in [
            ("\"version\":1", "\"version\":2", "version 2, expected 1"),
            ("\"tokens\"", "\"tokns\"", "tokns"),
            ("\"bins\":[0,", "\"bins\":[", "2048 bins"),
        ] {
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            let message = Calibration::load(&path).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        assert!(matches!(
            calibration.layer("b"),
            Err(Error::NotCalibrated(_))
        ));
        assert!(calibration.observe("a.weight", 4, &[0.0; 4]).is_err());
        assert!(
            calibration
                .observe("a.weight", 3, &[0.0, f32::NAN, 1.0])
                .is_err()
        );
    }
}
