//! Precision control: raises or lowers the precision of a stream of tensors when its measured
//! quality leaves its bounds.
//!
//! ```text
//! quality  q = SQNR in dB of each observation, and any metric of the caller
//! raise    after `patience` observations in a row with q < min_sqnr_db, or a metric outside its bounds
//! lower    after `patience` observations in a row with q > max_sqnr_db, if the precision below is expected to hold min_sqnr_db:
//!              expected = quality when it was left + (quality now − quality on arrival here)  ≥  min_sqnr_db + margin_db
//!          a precision that was never tried is tried once
//! ```
//!
//! So for a stream with constant statistics the controller tries each lower precision at most once,
//! then settles.

use crate::recipe::PrecisionControlConfig;
use crate::{Error, Result};
use bitnet_core::Precision;
use std::collections::{BTreeMap, VecDeque};

/// Statistics of one call of a quantizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantizationStats {
    /// Number of elements.
    pub elements_count: usize,
    /// Relative error `√(Σ(x − x̂)² / Σx²)`: 0 is exact, 1 is the error of all zeros.
    pub quantization_error: f32,
    /// Bytes before by bytes after, scales included.
    pub compression_ratio: f32,
    /// Smallest number.
    pub min_value: f32,
    /// Largest number.
    pub max_value: f32,
    /// The scale, or the mean of several.
    pub scale_factor: f32,
    /// The zero point of the mapping, or the mean of several.
    pub zero_point: Option<f32>,
}

impl QuantizationStats {
    /// `−20·log10(quantization_error)` in dB; +∞ for an exact result.
    ///
    /// ```
    /// use bitnet_quant::QuantizationStats;
    /// let stats = QuantizationStats {
    ///     elements_count: 1, quantization_error: 0.1, compression_ratio: 4.0,
    ///     min_value: 0.0, max_value: 1.0, scale_factor: 1.0, zero_point: None,
    /// };
    /// assert!((stats.sqnr_db() - 20.0).abs() < 1e-5);
    /// ```
    pub fn sqnr_db(&self) -> f32 {
        -20.0 * self.quantization_error.log10()
    }
}

/// The reason of a change.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum AdjustmentReason {
    /// The SQNR in dB, which is below the bound.
    LowQuality(f32),
    /// The SQNR in dB, which is above the bound.
    Surplus(f32),
    /// A metric of the caller, outside its bounds.
    Metric(f32),
}

/// A change of precision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecisionAdjustment {
    /// The precision before.
    pub from_precision: Precision,
    /// The precision from now on.
    pub to_precision: Precision,
    /// Why.
    pub reason: AdjustmentReason,
}

/// A summary of observations and changes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PerformanceSummary {
    /// Observations since the beginning.
    pub observations: u64,
    /// Mean of [`QuantizationStats::quantization_error`] over all observations.
    pub average_error: f32,
    /// The same over the remembered observations.
    pub recent_error: f32,
    /// Mean compression ratio over all observations.
    pub average_compression_ratio: f32,
    /// How often the precision was raised.
    pub raised: u64,
    /// How often it was lowered.
    pub lowered: u64,
    /// The precision now.
    pub precision: Precision,
}

/// What the controller has measured at one precision.
#[derive(Debug, Clone, Copy, Default)]
struct Level {
    /// Mean quality in dB over the observations that made the controller leave it upwards.
    left: Option<f32>,
    /// Sum and number of the first observations at this precision.
    arrived: (f32, u32),
}

#[derive(Debug, Clone, Copy)]
struct Metric {
    bounds: [f32; 2],
    last: f32,
}

/// Observes a stream of quantized tensors and chooses its precision by the rule of [this
/// module](self).
///
/// ```
/// use bitnet_quant::{PrecisionControlConfig, PrecisionController, QuantizationStats};
/// use bitnet_core::Precision;
/// let mut controller = PrecisionController::new(PrecisionControlConfig::aggressive())?;
/// let bad = QuantizationStats {
///     elements_count: 1000, quantization_error: 0.8, compression_ratio: 16.0,
///     min_value: -1.0, max_value: 1.0, scale_factor: 1.0, zero_point: None,
/// };
/// assert_eq!(controller.adjust_precision_dynamically(&bad)?, None);
/// let change = controller.adjust_precision_dynamically(&bad)?.expect("two in a row");
/// assert_eq!((change.from_precision, change.to_precision), (Precision::Ternary, Precision::Int2));
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PrecisionController {
    config: PrecisionControlConfig,
    at: usize,
    levels: Vec<Level>,
    /// Sum of the quality and length of the present streak below, and above, the bounds.
    below: (f32, u32),
    above: (f32, u32),
    metrics: BTreeMap<String, Metric>,
    recent: VecDeque<QuantizationStats>,
    observations: u64,
    error_sum: f64,
    compression_sum: f64,
    raised: u64,
    lowered: u64,
}

impl PrecisionController {
    /// A controller at its initial precision.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each wrong field.
    pub fn new(config: PrecisionControlConfig) -> Result<Self> {
        let mut wrong = vec![];
        config.problems(&mut wrong);
        Error::unless_empty(wrong)?;
        let at = config
            .precisions
            .iter()
            .position(|&p| p == config.initial)
            .unwrap_or(0);
        Ok(Self {
            at,
            levels: vec![Level::default(); config.precisions.len()],
            below: (0.0, 0),
            above: (0.0, 0),
            metrics: BTreeMap::new(),
            recent: VecDeque::with_capacity(config.window),
            observations: 0,
            error_sum: 0.0,
            compression_sum: 0.0,
            raised: 0,
            lowered: 0,
            config,
        })
    }

    /// The precision now.
    pub fn precision(&self) -> Precision {
        self.config.precisions[self.at]
    }

    /// Checks precision, threshold and scale against the bounds of the configuration.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each value that is
    /// outside.
    pub fn validate_precision_bounds(
        &self,
        precision: impl Into<Precision>,
        threshold: f32,
        scale: f32,
    ) -> Result<()> {
        let (precision, mut wrong) = (precision.into(), vec![]);
        if !self.config.precisions.contains(&precision) {
            let names: Vec<_> = self.config.precisions.iter().map(|p| p.name()).collect();
            wrong.push(format!(
                "precision: expected one of {}, got {precision}",
                names.join(", ")
            ));
        }
        for (name, [low, high], got) in [
            ("threshold", self.config.threshold, threshold),
            ("scale", self.config.scale, scale),
        ] {
            if !(low <= got && got <= high) {
                wrong.push(format!("{name}: expected {low} to {high}, got {got}"));
            }
        }
        Error::unless_empty(wrong)
    }

    /// Declares a metric of the caller. While its last value is outside `bounds`, quality counts as
    /// too low.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) for bounds that are not `low
    /// <= high`.
    pub fn add_metric(&mut self, name: &str, bounds: [f32; 2]) -> Result<()> {
        if bounds.iter().any(|b| b.is_nan()) || bounds[0] > bounds[1] {
            return Err(Error::invalid(vec![format!(
                "metric '{name}': expected bounds [low, high], got {bounds:?}"
            )]));
        }
        self.metrics.insert(
            name.into(),
            Metric {
                bounds,
                last: bounds[0],
            },
        );
        Ok(())
    }

    /// Reports the latest value of a metric.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) for a metric that was not
    /// declared by [`PrecisionController::add_metric`], and for NaN.
    pub fn record_metric(&mut self, name: &str, value: f32) -> Result<()> {
        match self.metrics.get_mut(name) {
            Some(metric) if !value.is_nan() => {
                metric.last = value;
                Ok(())
            }
            Some(_) => Err(Error::invalid(vec![format!(
                "metric '{name}': expected a number, got NaN"
            )])),
            None => Err(Error::invalid(vec![format!(
                "metric '{name}' was not added"
            )])),
        }
    }

    /// Records one observation and changes the precision if the rule asks for it. Allocates
    /// nothing.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) for an error or a compression
    /// ratio that is negative or NaN; nothing is recorded then.
    pub fn adjust_precision_dynamically(
        &mut self,
        stats: &QuantizationStats,
    ) -> Result<Option<PrecisionAdjustment>> {
        for (name, got) in [
            ("quantization_error", stats.quantization_error),
            ("compression_ratio", stats.compression_ratio),
        ] {
            if got.is_nan() || got < 0.0 {
                return Err(Error::invalid(vec![format!(
                    "{name}: expected at least 0, got {got}"
                )]));
            }
        }
        self.observations += 1;
        self.error_sum += f64::from(stats.quantization_error);
        self.compression_sum += f64::from(stats.compression_ratio);
        if self.config.window > 0 {
            if self.recent.len() == self.config.window {
                self.recent.pop_front();
            }
            self.recent.push_back(*stats);
        }
        // Means need finite terms; 200 dB, beyond the precision of f32, stands for an exact result.
        let quality = stats.sqnr_db().clamp(-200.0, 200.0);
        let arrived = &mut self.levels[self.at].arrived;
        if arrived.1 < self.config.patience {
            *arrived = (arrived.0 + quality, arrived.1 + 1);
        }
        let metric = self
            .metrics
            .values()
            .find(|m| !(m.bounds[0] <= m.last && m.last <= m.bounds[1]))
            .map(|m| m.last);
        let low = quality < self.config.min_sqnr_db || metric.is_some();
        let high = !low && quality > self.config.max_sqnr_db;
        self.below = if low {
            (self.below.0 + quality, self.below.1 + 1)
        } else {
            (0.0, 0)
        };
        self.above = if high {
            (self.above.0 + quality, self.above.1 + 1)
        } else {
            (0.0, 0)
        };
        if !self.config.adjust {
            return Ok(None);
        }
        let patience = self.config.patience;
        if self.below.1 >= patience && self.at + 1 < self.levels.len() {
            let mean = self.below.0 / self.below.1 as f32;
            // A metric forced the raise: then the quality was not enough, whatever its value.
            self.levels[self.at].left = Some(mean.min(self.config.min_sqnr_db));
            let reason =
                metric.map_or(AdjustmentReason::LowQuality(mean), AdjustmentReason::Metric);
            self.raised += 1;
            return Ok(Some(self.change(self.at + 1, reason)));
        }
        if self.above.1 >= patience && self.at > 0 {
            let mean = self.above.0 / self.above.1 as f32;
            let (sum, count) = self.levels[self.at].arrived;
            let gained = mean - sum / count.max(1) as f32;
            let enough = self.config.min_sqnr_db + self.config.margin_db;
            if self.levels[self.at - 1]
                .left
                .is_none_or(|left| left + gained >= enough)
            {
                self.lowered += 1;
                return Ok(Some(
                    self.change(self.at - 1, AdjustmentReason::Surplus(mean)),
                ));
            }
            // A running mean, which forgets the beginning of the stream.
            self.above = (mean, 1);
        }
        Ok(None)
    }

    fn change(&mut self, to: usize, reason: AdjustmentReason) -> PrecisionAdjustment {
        let from_precision = self.precision();
        self.at = to;
        self.levels[to].arrived = (0.0, 0);
        (self.below, self.above) = ((0.0, 0), (0.0, 0));
        PrecisionAdjustment {
            from_precision,
            to_precision: self.precision(),
            reason,
        }
    }

    /// The remembered observations, oldest first.
    pub fn recent(&self) -> impl ExactSizeIterator<Item = &QuantizationStats> {
        self.recent.iter()
    }

    /// A summary of observations and changes.
    pub fn get_performance_summary(&self) -> PerformanceSummary {
        let n = self.observations.max(1) as f64;
        let recent: f32 = self.recent.iter().map(|s| s.quantization_error).sum();
        PerformanceSummary {
            observations: self.observations,
            average_error: (self.error_sum / n) as f32,
            recent_error: recent / self.recent.len().max(1) as f32,
            average_compression_ratio: (self.compression_sum / n) as f32,
            raised: self.raised,
            lowered: self.lowered,
            precision: self.precision(),
        }
    }
}
