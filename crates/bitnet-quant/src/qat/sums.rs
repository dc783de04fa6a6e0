//! Sums of squares, whose bits do not depend on the number of threads.

use crate::Result;
use crate::tensor::with_floats;
use bitnet_kernels::Kernels;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Elements that one thread takes at a time.
pub(super) const PART: usize = 1 << 15;

/// Σ x² on any device.
pub(super) fn squares(kernels: Kernels, x: &Tensor) -> Result<f64> {
    if x.device().is_cpu() {
        with_floats(x, |x| Ok(sum_squares(kernels, x)))
    } else {
        device_sum_squares(x)
    }
}

/// Σ g², in parts that do not depend on the threads.
pub(super) fn sum_squares(kernels: Kernels, g: &[f32]) -> f64 {
    let parts: Vec<f64> = g.par_chunks(PART).map(|g| kernels.sum_squares(g)).collect();
    parts.iter().sum()
}

/// Σ x² of a tensor on another device than the CPU.
pub(super) fn device_sum_squares(x: &Tensor) -> Result<f64> {
    let x = x.detach();
    let x = if x.device().is_metal() {
        x
    } else {
        x.to_dtype(DType::F64)?
    };
    Ok(x.sqr()?
        .sum_all()?
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .to_scalar::<f64>()?)
}
