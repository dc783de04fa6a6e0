//! Operations with gradients, each in one pass over its tensors.
//!
//! candle composes these of many operations, each of which keeps a tensor and adds two passes to
//! the backward pass. Its fused operations (`rms_norm`, `softmax_last_dim`, `rope`) have no
//! gradient, and its `relu` passes the gradient at 0. The operations here take f32 on the CPU;
//! their results do not depend on the number of threads.

mod attention;
mod conv;
mod gate;
mod loss;
mod norm;

pub use attention::{Angles, causal_softmax, heads_first, heads_last};
pub use conv::{max_pool, patches};
pub use gate::{relu, relu2_gate, silu_gate};
pub use loss::cross_entropy;
pub use norm::rms_norm;

use candle_core::{CpuStorage, Error, Layout, Result, Storage, Tensor};

/// Number of elements in one task of a thread.
const CHUNK: usize = 1 << 13;

/// The elements of a contiguous f32 storage.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| Error::msg("expected a contiguous tensor"))?;
    match storage {
        CpuStorage::F32(all) => Ok(&all[start..end]),
        _ => Err(Error::msg("expected an f32 tensor")),
    }
}

/// Calls `f` with the elements of an f32 tensor on the CPU, in order.
fn with_elements<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(slice(storage, layout)?)),
        _ => Err(Error::msg("expected a tensor on the CPU")),
    }
}

/// `Σ a·b` in 16 partial sums, so that it vectorizes.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// The last dimension of a shape, and the number of rows.
fn rows(layout: &Layout) -> Result<(usize, usize)> {
    match layout.dims() {
        [rest @ .., k] if *k > 0 => Ok((rest.iter().product(), *k)),
        dims => Err(Error::msg(format!(
            "expected rows of at least one element, got shape {dims:?}"
        ))),
    }
}
