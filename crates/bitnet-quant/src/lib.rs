//! Quantize, pack, prove and compare checkpoints.
//!
//! ```no_run
//! use bitnet_quant::{Job, Recipe, Source, checkpoint};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let source = Source::open("model-folder".as_ref())?;
//! let recipe = Recipe::from_toml("[default]\nthreshold = 'optimal'")?;
//! let out = std::path::Path::new("model-ternary");
//! let job = Job::quantize(&source, &recipe, out)?;
//! let summary = checkpoint::run(&job, out, &checkpoint::Options {
//!     threads: 0,
//!     kernels: bitnet_kernels::Kernels::detect(),
//!     progress: &(),
//!     interrupt: &Default::default(),
//!     existing: checkpoint::Existing::Refuse,
//! })?;
//! for tensor in &summary.tensors {
//!     println!("{} {} {:.3} bits", tensor.name, tensor.became, tensor.bits_per_weight());
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod error;
mod plan;
mod rows;

pub mod checkpoint;
pub mod compare;
pub mod inspect;
pub mod recipe;
pub mod verify;

pub use bitnet_formats::Source;
pub use error::{Error, Result};
pub use plan::{GENERATOR, Job};
pub use recipe::{Format, Recipe};

/// The examples of the README compile and hold.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
