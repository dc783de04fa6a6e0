//! The library on candle tensors: quantizers, the layer that trains ([`latent`]), the layer that
//! runs ([`bitlinear`]) and observers. CPU; f32, f16 and bf16; any strides.

pub mod bitlinear;
pub mod latent;
#[cfg(feature = "calibration")]
pub mod observe;
pub(crate) mod packed;
pub mod quantizer;
pub mod runtime;

use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Layout, Storage, Tensor};

/// The error of an operation of the graph.
pub(crate) fn into_candle(error: Error) -> candle_core::Error {
    match error {
        Error::Candle(error) => *error,
        other => candle_core::Error::wrap(other),
    }
}

/// The elements of an argument of an operation.
pub(crate) fn contiguous_floats<'a>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [f32]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::msg("the operation needs contiguous tensors"))?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Calls `f` with the elements of a tensor of any device.
pub(crate) fn with_host_floats<T>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    if x.device().is_cpu() {
        with_floats(x, f)
    } else {
        with_floats(&x.detach().to_device(&Device::Cpu)?, f)
    }
}

/// Calls `f` with the elements of `x` in row-major order as f32: in place where `x` is f32 without
/// gaps, else from a converted copy.
pub(crate) fn with_floats<T>(x: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    check_kind(x)?;
    let converted;
    let x = if x.dtype() == DType::F32 && x.is_contiguous() {
        x
    } else {
        converted = x.detach().to_dtype(DType::F32)?.contiguous()?;
        &converted
    };
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(all)), Some((start, end))) => f(&all[start..end]),
        _ => Err(Error::input(
            "tensor",
            "contiguous f32 on the CPU",
            format!("{:?}", x.device()),
        )),
    }
}

/// Refuses devices and types that nothing here computes with.
pub(crate) fn check_kind(x: &Tensor) -> Result<()> {
    check_device(x.device())?;
    match x.dtype() {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        other => Err(Error::input("dtype", "f32, f16 or bf16", other.as_str())),
    }
}

/// Only the CPU computes.
pub(crate) fn check_device(device: &Device) -> Result<()> {
    if device.is_cpu() {
        Ok(())
    } else {
        Err(Error::input(
            "device",
            "the CPU",
            format!("{:?}", device.location()),
        ))
    }
}

/// Rows and columns of a tensor as weights: a vector is one row, a convolution has a row for each
/// output channel.
pub(crate) fn matrix_shape(x: &Tensor) -> Result<(usize, usize)> {
    match x.dims() {
        [n] => Ok((1, *n)),
        [n, rest @ ..] if rest.len() <= 3 => Ok((*n, rest.iter().product())),
        dims => Err(Error::input(
            "tensor",
            "1 to 4 dimensions",
            format!("shape {dims:?}"),
        )),
    }
}

/// Rows and columns of a tensor as activations: the last dimension is one token.
pub(crate) fn token_shape(x: &Tensor) -> Result<(usize, usize)> {
    match x.dims() {
        [] => Err(Error::input(
            "activations",
            "at least 1 dimension",
            "a scalar",
        )),
        [rest @ .., k] => Ok((rest.iter().product(), *k)),
    }
}

/// Refuses tensors without elements.
pub(crate) fn not_empty(x: &Tensor) -> Result<()> {
    if x.elem_count() > 0 {
        Ok(())
    } else {
        Err(Error::input(
            "tensor",
            "at least 1 element",
            format!("shape {:?}", x.dims()),
        ))
    }
}
