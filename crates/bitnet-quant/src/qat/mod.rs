//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod checkpoint;
mod config;
pub mod distillation;
#[cfg(test)]
mod graph_tests;
mod linear;
mod optimizer;
#[cfg(feature = "plot")]
pub mod plot;
mod prepare;
mod progressive;
mod recompute;
pub mod regularization;
mod schedule;
pub mod sensitivity;
mod telemetry;
mod trainer;

pub use crate::tensor::latent::{QatLinear, Stage, StraightThroughEstimator};
pub use checkpoint::{CheckpointConfig, checkpoints};
pub use config::{EarlyStopping, QATConfig, QATConfigBuilder};
pub use linear::{Linear, Linears};
pub use optimizer::{Betas, Group, Method, Optimizer, OptimizerConfig, Rates};
pub use prepare::{convert, prepare};
pub use progressive::Progressive;
pub use recompute::{backward, recompute};
pub use schedule::{Schedule, Shape};
pub use telemetry::{LayerRecord, Line, TelemetryConfig, read_log};
pub use trainer::{Callback, Evaluation, Event, Outcome, QATTrainer, Step, Stopped, Task};

use crate::Result;
use candle_core::{DType, Device, Tensor};

/// Σ x² of a tensor of another device than the CPU.
fn device_sum_squares(x: &Tensor) -> Result<f64> {
    let x = x.detach();
    let x = if x.device().is_metal() {
        x
    } else {
        x.to_dtype(DType::F64)?
    };
    Ok(x.sqr()?
        .sum_all()?
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .to_scalar::<f64>()?)
}
