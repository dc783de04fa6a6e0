//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod layer;
mod linear;
mod prepare;
mod ste;

pub use layer::{QatLinear, Stage};
pub use linear::{Linear, Linears};
pub use prepare::{convert, prepare};
pub use ste::StraightThroughEstimator;
