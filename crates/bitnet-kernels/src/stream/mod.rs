//! Elementwise work at the speed of memory: floats to packed codes, packed codes to values and to
//! floats, activations to int8.
//!
//! Each function returns what its counterpart in bitnet-core returns, bit for bit, on every
//! instruction set and every number of threads.

mod layout;
mod loops;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plain;
mod quantize;
mod token;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use layout::{dequantize, pack, unpack};
pub use quantize::{Packed, Weights, quantize, quantize_into};
pub use token::quantize_token;

use crate::{Kernels, Pool};
use bitnet_core::ops::{Key, Magnitudes};
use std::sync::{Mutex, PoisonError};

/// Calls `each` once with each of `parts`, on the threads of the pool.
fn each<T: Send>(pool: &Pool, parts: impl IntoIterator<Item = T>, each: impl Fn(T) + Sync) {
    let parts: Vec<Mutex<Option<T>>> = parts
        .into_iter()
        .map(|part| Mutex::new(Some(part)))
        .collect();
    pool.run(parts.len(), |i| {
        if let Some(part) = parts[i]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            each(part);
        }
    });
}

/// [`bitnet_core::ops::Ops::inside`].
pub(crate) fn inside(
    kernels: Kernels,
    w: &[f32],
    key: Key,
    low: f32,
    high: f32,
    out: &mut Vec<f32>,
) {
    // SAFETY: the loops come from `Kernels::loops`.
    unsafe { (kernels.loops().inside)(w, key, low, high, out) }
}

/// [`bitnet_core::ops::Ops::magnitudes`].
pub(crate) fn magnitudes(kernels: Kernels, w: &[f32]) -> Magnitudes {
    // SAFETY: as above.
    unsafe { (kernels.loops().magnitudes)(w) }
}

/// [`bitnet_core::ops::Ops::magnitudes_each`].
pub(crate) fn magnitudes_each(
    kernels: Kernels,
    w: &[f32],
    width: usize,
    out: &mut Vec<Magnitudes>,
) {
    // SAFETY: as above.
    unsafe { (kernels.loops().magnitudes_each)(w, width, out) }
}
