//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod config;
mod linear;
mod optimizer;
mod schedule;
mod trainer;

pub use config::{EarlyStopping, QATConfig, QATConfigBuilder};
pub use linear::{Linear, Linears};
pub use optimizer::{Betas, Group, Method, Optimizer, OptimizerConfig, Rates};
pub use schedule::{Schedule, Shape};
pub use trainer::{Callback, Evaluation, Event, Outcome, QATTrainer, Step, Stopped, Task};
