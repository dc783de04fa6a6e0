//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod checkpoint;
mod config;
pub mod distillation;
mod layer;
mod linear;
mod optimizer;
#[cfg(feature = "plot")]
pub mod plot;
mod prepare;
mod product;
mod progressive;
mod recompute;
pub mod regularization;
mod schedule;
pub mod sensitivity;
mod ste;
mod telemetry;
mod trainer;

pub use checkpoint::{CheckpointConfig, checkpoints};
pub use config::{EarlyStopping, QATConfig, QATConfigBuilder};
pub use layer::{QatLinear, Stage};
pub use linear::{Linear, Linears};
pub use optimizer::{Betas, Group, Method, Optimizer, OptimizerConfig, Rates};
pub use prepare::{convert, prepare};
pub use progressive::Progressive;
pub use recompute::{backward, recompute};
pub use schedule::{Schedule, Shape};
pub use ste::StraightThroughEstimator;
pub use telemetry::{LayerRecord, Line, TelemetryConfig, read_log};
pub use trainer::{Callback, Evaluation, Event, Outcome, QATTrainer, Step, Stopped, Task};

use crate::Error;
use candle_core::{CpuStorage, Layout};

fn candle(error: Error) -> candle_core::Error {
    match error {
        Error::Candle(error) => *error,
        other => candle_core::Error::wrap(other),
    }
}

/// The elements of an argument of an operation.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| candle_core::Error::msg("training needs contiguous tensors"))?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}
