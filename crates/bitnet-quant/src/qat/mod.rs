//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod config;
mod layer;
mod linear;
mod optimizer;
mod prepare;
mod schedule;
mod ste;
mod trainer;

pub use config::{EarlyStopping, QATConfig, QATConfigBuilder};
pub use layer::{QatLinear, Stage};
pub use linear::{Linear, Linears};
pub use optimizer::{Betas, Group, Method, Optimizer, OptimizerConfig, Rates};
pub use prepare::{convert, prepare};
pub use schedule::{Schedule, Shape};
pub use ste::StraightThroughEstimator;
pub use trainer::{Callback, Evaluation, Event, Outcome, QATTrainer, Step, Stopped, Task};
