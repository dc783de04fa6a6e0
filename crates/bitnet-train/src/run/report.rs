//! The result of a run.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The result of a run. Losses and errors are measured by [`Workload::measure`] on the files that
/// the run wrote.
///
/// [`Workload::measure`]: super::Workload::measure
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// Name of the metric; less is better.
    pub metric: String,
    /// Number of parameters of the model.
    pub parameters: u64,
    /// Metric of the full-precision twin.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub full: Option<f64>,
    /// Metric of the twin quantized after training (PTQ).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ptq: Option<f64>,
    /// Metric of the model trained quantized (QAT), packed.
    pub qat: f64,
    /// Metric of that model before packing: the best evaluation during training.
    pub qat_in_training: f64,
    /// Step of that evaluation.
    pub qat_step: u64,
    /// Number of steps of each training.
    pub steps: u64,
    /// Seconds of training of the twin and of the quantized model, since the last resume.
    pub seconds: [f64; 2],
    /// Size of the packed file in bytes.
    pub packed_bytes: u64,
    /// Bits per weight of the packed layers, scales included.
    pub packed_bits: f64,
    /// The packed file or folder.
    pub packed: PathBuf,
}

impl RunReport {
    /// Share of the loss of PTQ that QAT recovers; none if PTQ lost nothing.
    pub fn recovered(&self) -> Option<f64> {
        let (full, ptq) = (self.full?, self.ptq?);
        (ptq > full).then(|| (ptq - self.qat) / (ptq - full))
    }
}
