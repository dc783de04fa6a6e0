//! The linear layers of a model in training.

use super::QatLinear;
use crate::{BitLinear, Result};
use candle_core::{Device, Module, Tensor};
use candle_nn::{Init, VarBuilder};

/// A linear layer, `y = x · Wᵀ + b` with x `[…, K]`, W `[N, K]`, y `[…, N]`, in one of the states
/// of training.
#[derive(Debug)]
pub enum Linear {
    /// Floats.
    Full(candle_nn::Linear),
    /// Floats that the forward pass quantizes; see [`QatLinear`].
    Qat(Box<QatLinear>),
    /// Packed weights; see [`BitLinear`].
    Packed(Box<BitLinear>),
}

impl Linear {
    /// A float layer from the variables `weight` `[out, in]` and `bias` `[out]`. New weights are
    /// normally distributed with variance `1 / in`, new biases 0.
    ///
    /// # Errors
    /// [`crate::Error::Candle`] for variables that are missing or of another shape.
    pub fn new(
        in_features: usize,
        out_features: usize,
        bias: bool,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let init = Init::Randn {
            mean: 0.0,
            stdev: (in_features as f64).recip().sqrt(),
        };
        let weight = vb.get_with_hints((out_features, in_features), "weight", init)?;
        let bias = if bias {
            Some(vb.get_with_hints(out_features, "bias", Init::Const(0.0))?)
        } else {
            None
        };
        Ok(Self::Full(candle_nn::Linear::new(weight, bias)))
    }

    /// The weights `[out, in]` as the layer multiplies with them, with gradients where it is
    /// trained: those of a float layer, the fake-quantized ones of a layer in training
    /// ([`QatLinear::fake_quantized_weights`]), the dequantized ones of a packed layer. A table of
    /// embeddings is a layer whose rows are looked up in these.
    ///
    /// # Errors
    /// As [`QatLinear::fake_quantized_weights`] and [`BitLinear::quantized_weights`].
    pub fn weights(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Full(linear) => linear.weight().clone(),
            Self::Qat(layer) => layer.fake_quantized_weights()?,
            Self::Packed(layer) => {
                let matrix = layer.quantized_weights()?;
                let shape = (matrix.spec.rows, matrix.spec.cols);
                Tensor::from_vec(matrix.dequantize(), shape, &Device::Cpu)?
            }
        })
    }

    /// The layer in training; `None` in another state.
    pub fn as_qat(&mut self) -> Option<&mut QatLinear> {
        match self {
            Self::Qat(layer) => Some(layer),
            Self::Full(_) | Self::Packed(_) => None,
        }
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Full(linear) => linear.forward(x),
            Self::Qat(linear) => linear.forward(x),
            Self::Packed(linear) => linear.forward(x),
        }
    }
}

/// A model whose linear layers can be visited, and replaced, by name.
pub trait Linears {
    /// Calls `visit` for each linear layer in the order of the forward pass, with its name (that of
    /// its weight without `.weight`) and the layer itself, which may be replaced.
    ///
    /// # Errors
    /// What `visit` returns.
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>,
    ) -> Result<()>;
}
