//! Train and fine-tune models with low-bit weights: data, models, runs.
#![forbid(unsafe_code)]

mod distill;
mod error;
mod image;
mod lm;

pub mod config;
pub mod data;
pub mod folder;
pub mod models;
pub mod ops;
pub mod run;
pub mod variables;

pub use error::{Error, Result};
pub use image::ImageWork;
pub use lm::LmWork;
