//! A trained variable with its moments.

use crate::Result;
use crate::tensor::with_host_floats;
use candle_core::{Tensor, Var};

/// One variable with its rates and moments.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) var: Var,
    /// Factor of the learning rate.
    pub(super) rate: f64,
    /// Weight decay.
    pub(super) decay: f64,
    /// Velocity, or first moment.
    pub(crate) first: Option<MomentStorage>,
    /// Second moment.
    pub(crate) second: Option<MomentStorage>,
    /// Gradients of micro-batches before the last.
    pub(super) sum: Option<MomentStorage>,
    /// Whether the fused kernels update it.
    pub(super) fused: bool,
}

/// A number for each element of a variable.
#[derive(Debug)]
pub(crate) enum MomentStorage {
    /// Memory of the CPU, for the fused kernels.
    Host(Vec<f32>),
    /// A tensor on the device of the variable.
    Device(Tensor),
}

impl MomentStorage {
    pub(super) fn zeros(var: &Var, fused: bool) -> Result<Self> {
        Ok(if fused {
            Self::Host(vec![0.0; var.elem_count()])
        } else {
            Self::Device(var.zeros_like()?.detach())
        })
    }

    /// Calls `f` with the numbers.
    pub(crate) fn with_floats<T>(&self, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
        match self {
            Self::Host(x) => f(x),
            Self::Device(x) => with_host_floats(x, f),
        }
    }

    /// Replaces the numbers by the same count of others.
    pub(crate) fn set(&mut self, values: Vec<f32>) -> Result<()> {
        match self {
            Self::Host(x) => *x = values,
            Self::Device(x) => *x = Tensor::from_vec(values, x.shape(), x.device())?,
        }
        Ok(())
    }

    pub(super) fn zero(&mut self) -> Result<()> {
        match self {
            Self::Host(x) => x.fill(0.0),
            Self::Device(x) => *x = x.zeros_like()?,
        }
        Ok(())
    }
}

/// The moments of a fused parameter; empty where the method keeps none.
pub(super) fn host(kept: &mut Option<MomentStorage>) -> &mut [f32] {
    match kept {
        Some(MomentStorage::Host(x)) => x,
        _ => &mut [],
    }
}

/// The moments of a parameter that candle's operations update.
pub(super) fn tensor(kept: &Option<MomentStorage>) -> Option<&Tensor> {
    match kept {
        Some(MomentStorage::Device(x)) => Some(x),
        _ => None,
    }
}
