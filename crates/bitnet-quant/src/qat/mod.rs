//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod checkpoint;
mod config;
mod layer;
mod linear;
mod optimizer;
mod prepare;
mod recompute;
mod schedule;
mod ste;
mod telemetry;
mod trainer;

pub use checkpoint::{CheckpointConfig, checkpoints};
pub use config::{EarlyStopping, QATConfig, QATConfigBuilder};
pub use layer::{QatLinear, Stage};
pub use linear::{Linear, Linears};
pub use optimizer::{Betas, Group, Method, Optimizer, OptimizerConfig, Rates};
pub use prepare::{convert, prepare};
pub use recompute::{backward, recompute};
pub use schedule::{Schedule, Shape};
pub use ste::StraightThroughEstimator;
pub use telemetry::{LayerRecord, Line, TelemetryConfig, read_log};
pub use trainer::{Callback, Evaluation, Event, Outcome, QATTrainer, Step, Stopped, Task};
