//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod checkpoint;
mod config;
pub mod distillation;
mod events;
#[cfg(test)]
mod graph_tests;
mod linear;
mod optimizer;
mod prepare;
mod progressive;
mod recompute;
pub mod regularization;
mod schedule;
pub mod sensitivity;
mod sums;
mod task;
mod telemetry;
mod tensor_file;
mod trainer;
mod training;

pub use crate::tensor::latent::{QatLinear, Stage, StraightThroughEstimator};
pub use checkpoint::{CheckpointConfig, checkpoints};
pub use config::{EarlyStopping, QATConfig, QATConfigBuilder};
pub use events::{
    Callback, Evaluation, Event, LayerRecord, LogRecord, Outcome, Stopped, TrainingStep,
};
pub use linear::{Linear, Linears};
pub use optimizer::{Betas, Optimizer, OptimizerConfig, OptimizerMethod, ParameterGroup, Rates};
pub use prepare::{convert, prepare};
pub use progressive::Progressive;
pub use recompute::{backward, recompute};
pub use schedule::{Schedule, ScheduleShape};
pub use task::Task;
pub use telemetry::{TelemetryConfig, read_log};
pub use trainer::QATTrainer;
