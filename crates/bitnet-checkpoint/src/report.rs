//! Options of a run, its progress, and its results.

use bitnet_core::Granularity;
use bitnet_core::stats::ErrorStats;
use bitnet_formats::output::Existing;
use bitnet_kernels::Kernels;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Receives the progress of a job.
pub trait Progress: Sync {
    /// A tensor starts.
    fn tensor(&self, _name: &str) {}
    /// `_bytes` more bytes of the input are done.
    fn advance(&self, _bytes: u64) {}
}

impl Progress for () {}

/// Options of a run.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Threads that quantize; 0 for one on each core.
    pub threads: usize,
    /// The loops.
    pub kernels: Kernels,
    /// Receives the progress.
    pub progress: &'a dyn Progress,
    /// Set to stop at the next strip; the next run resumes.
    pub interrupt: &'a AtomicBool,
    /// Whether an existing target is replaced.
    pub existing: Existing,
}

/// The result for one tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TensorReport {
    /// Its name in the output.
    pub name: String,
    /// The result: a precision, a float type, or `copied`.
    pub became: String,
    /// Wire layout, if it is quantized.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub layout: Option<String>,
    /// Granularity, if it is quantized.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub granularity: Option<Granularity>,
    /// Number of weights.
    pub weights: u64,
    /// Bytes in the output, scales and padding included.
    pub bytes: u64,
    /// Quantization error, if this run quantized it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<ErrorStats>,
    /// Order-0 entropy of the values in bits, if this run quantized it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub entropy: Option<f64>,
    /// A note for the user.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
}

impl TensorReport {
    /// Bits per weight, scales and padding included.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.weights.max(1) as f64
    }
}

/// The result of a job.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Tensors, in the order of the source.
    pub tensors: Vec<TensorReport>,
    /// What stays of a replaced folder, because this program did not write it.
    pub kept: Vec<String>,
    /// The written files of weights: one, or a set of shards and, in a folder, their index.
    pub files: Vec<PathBuf>,
    /// Size of the written file, or of all shards.
    pub file_bytes: u64,
    /// Bytes of all tensors of the source.
    pub input_bytes: u64,
    /// Tensors that an earlier, interrupted run had done.
    pub resumed: usize,
    /// Wall-clock time.
    pub elapsed: Duration,
}
