//! Quantization-aware training: latent float weights that the forward pass quantizes.

mod linear;

pub use linear::{Linear, Linears};
