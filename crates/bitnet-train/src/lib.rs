//! Training and fine-tuning of models with low-bit weights on the CPU.
//!
//! Start with [`run::run`]: it trains a full-precision twin and a quantized model of a
//! [`run::Workload`], packs and measures them. [`ImageWorkload`] classifies images, [`LmWorkload`]
//! models text.
//! - [`config`]: the settings of a run, as TOML.
//! - [`data`]: images in idx files, and text as tokens.
//! - [`models`]: perceptron, convolutional network and decoders, over the operations with gradients
//!   in [`ops`].
//! - [`folder`]: checkpoints in the format of Hugging Face.
//!
//! The quantized layers and the trainer are in [`bitnet_quant::qat`].
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
pub mod plot;
pub mod run;
pub mod variables;

pub use error::{Error, Result};
pub use image::ImageWorkload;
pub use lm::LmWorkload;
