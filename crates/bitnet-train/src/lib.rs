//! Train and fine-tune models with low-bit weights: data, models, runs.
#![forbid(unsafe_code)]

mod error;

pub mod data;
pub mod folder;
pub mod models;
pub mod ops;
pub mod random;

pub use error::{Error, Result};
