//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod checkpoint;
mod config;
pub mod distillation;
mod graph;
#[cfg(test)]
mod graph_tests;
mod layer;
mod linear;
mod optimizer;
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

use crate::tensor::with_floats;
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Layout, Tensor};

fn candle(error: Error) -> candle_core::Error {
    match error {
        Error::Candle(error) => *error,
        other => candle_core::Error::wrap(other),
    }
}

/// Calls `f` with the elements of a tensor of any device.
fn with_host_floats<T>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    if x.device().is_cpu() {
        with_floats(x, f)
    } else {
        with_floats(&x.detach().to_device(&Device::Cpu)?, f)
    }
}

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

/// The elements of an argument of an operation.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::msg("training needs contiguous tensors"))?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}
