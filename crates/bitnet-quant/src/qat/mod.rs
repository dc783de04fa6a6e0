//! Quantization-aware training: latent float weights that the forward pass quantizes.

pub mod distillation;
mod layer;
mod linear;
mod prepare;
mod progressive;
pub mod regularization;
pub mod sensitivity;
mod ste;

pub use layer::{QatLinear, Stage};
pub use linear::{Linear, Linears};
pub use prepare::{convert, prepare};
pub use progressive::Progressive;
pub use ste::StraightThroughEstimator;

use crate::Error;
use candle_core::{CpuStorage, Layout};

fn candle(error: Error) -> candle_core::Error {
    match error {
        Error::Candle(error) => *error,
        other => candle_core::Error::wrap(other),
    }
}

/// The elements of an argument of an operation.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| candle_core::Error::msg("training needs contiguous tensors"))?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}
