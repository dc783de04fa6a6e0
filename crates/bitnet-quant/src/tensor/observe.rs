//! Observation of a candle model for calibration.

use super::{token_shape, with_floats};
use crate::Result;
use crate::calibration::Calibration;
use candle_core::{Module, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// Adds the tokens of a tensor `[…, K]` at the input of the layer `name` to a calibration.
///
/// # Errors
/// As [`Calibration::observe`]; [`crate::Error::Input`] for another device or type.
pub fn observe_tensor(calibration: &mut Calibration, name: &str, x: &Tensor) -> Result<()> {
    let (_, channels) = token_shape(x)?;
    with_floats(x, |x| Ok(calibration.observe(name, channels, x)?))
}

/// A module whose input is added to a calibration.
///
/// ```
/// use bitnet_quant::calibration::Calibration;
/// use bitnet_quant::prelude::*;
/// use candle_core::{Device, Module, Tensor};
/// use std::sync::{Arc, Mutex};
/// let calibration = Arc::new(Mutex::new(Calibration::default()));
/// let layer = Observed::new("fc.weight", BitLinear::new(BitLinearConfig::new(8, 4))?, calibration.clone());
/// layer.forward(&Tensor::ones((3, 8), candle_core::DType::F32, &Device::Cpu)?)?;
/// assert_eq!(calibration.lock().unwrap().layer("fc.weight")?.tokens, 3);
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Observed<M> {
    name: String,
    inner: M,
    calibration: Arc<Mutex<Calibration>>,
}

impl<M> Observed<M> {
    /// Wraps Wraps Wraps Wraps Wraps Wraps `inner`, observed under the name of its weights.
    pub fn new(name: impl Into<String>, inner: M, calibration: Arc<Mutex<Calibration>>) -> Self {
        Self {
            name: name.into(),
            inner,
            calibration,
        }
    }

    /// The module inside.
    pub fn into_inner(self) -> M {
        self.inner
    }
}

impl<M: Module> Module for Observed<M> {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut calibration = self
            .calibration
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        observe_tensor(&mut calibration, &self.name, x).map_err(candle_core::Error::wrap)?;
        drop(calibration);
        self.inner.forward(x)
    }
}
