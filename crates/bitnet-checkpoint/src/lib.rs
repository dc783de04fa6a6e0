//! Whole checkpoints: what `bitnet quantize`, `convert`, `dequantize`, `compare`, `inspect` and
//! `verify` do.
//!
//! Start with [`Source::open`], plan a [`Job`] from a [`Recipe`], and [`run`](job::run) it. Models
//! are processed tensor by tensor in bounded memory; the bytes do not depend on the number of
//! threads.
//!
//! ```no_run
//! use bitnet_checkpoint::{Job, Recipe, Source, job};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let source = Source::open("model-folder".as_ref())?;
//! let recipe = Recipe::from_toml("[default]\nthreshold = 'optimal'")?;
//! let out = std::path::Path::new("model-ternary");
//! let job = Job::quantize(&source, &recipe, out)?;
//! let summary = job::run(&job, out, &job::Options {
//!     threads: 0,
//!     kernels: bitnet_kernels::Kernels::detect(),
//!     progress: &(),
//!     interrupt: &Default::default(),
//!     existing: job::Existing::Refuse,
//! })?;
//! for tensor in &summary.tensors {
//!     println!("{} {} {:.3} bits", tensor.name, tensor.became, tensor.bits_per_weight());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`recipe`] | which tensors become what: one configuration for flags, files and metadata |
//! | [`search`] | turns a budget of bits into rules of the recipe |
//! | [`calibration`] | statistics of activations, for importance and ranges |
//! | [`job`] | runs a planned job and writes the result |
//! | [`compare`], [`inspect`], [`verify`] | look at checkpoints |
//! | [`forms`] | which tensors are weight matrices, and which way round they are stored |
//! | [`matrix`], [`rows`] | matrices in memory, and rows of stored tensors |
#![forbid(unsafe_code)]

mod error;
pub mod forms;
mod onnx;
mod plan;
mod report;
mod target;
mod worker;

pub mod calibration;
pub mod compare;
pub mod inspect;
pub mod job;
pub mod matrix;
pub mod recipe;
pub mod rows;
pub mod search;
pub mod verify;

pub use bitnet_formats::Source;
pub use bitnet_formats::output::ShardSize;
pub use error::{Error, Result};
pub use plan::{DEFAULT_SHARD_BYTES, FloatShare, GENERATOR, Job};
pub use recipe::{Format, Recipe};
