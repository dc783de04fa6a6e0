//! Trainable models. Their linear layers are [`bitnet_quant::qat::Linear`]s.

mod cnn;
mod decoder;
mod mlp;

pub use cnn::{Cnn, CnnConfig};
pub use decoder::{DecoderModel, DecoderShape, Trace};
pub(crate) use decoder::{EMBEDDING, HEAD};
pub use mlp::{Mlp, MlpConfig};

use bitnet_quant::qat::{Linear, Linears};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// ε of the norms of image models.
const EPS: f64 = 1e-6;

/// The gain of a norm, `[len]`; a new one is all ones.
fn gain(vb: &VarBuilder<'_>, len: usize) -> Result<Tensor> {
    vb.get_with_hints(len, "weight", Init::Const(1.0))
}

/// Kind and sizes of an image classifier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "model_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum ImageShape {
    /// See [`Mlp`].
    Mlp(MlpConfig),
    /// See [`Cnn`].
    Cnn(CnnConfig),
}

/// An image classifier.
#[derive(Debug)]
pub enum ImageModel {
    /// See [`Mlp`].
    Mlp(Mlp),
    /// See [`Cnn`].
    Cnn(Box<Cnn>),
}

impl ImageModel {
    /// A model with the variables of `vb`.
    ///
    /// # Errors
    /// For an invalid shape, and variables of another shape.
    pub fn new(shape: &ImageShape, vb: &VarBuilder<'_>) -> crate::Result<Self> {
        Ok(match shape {
            ImageShape::Mlp(config) => Self::Mlp(Mlp::new(config, vb)?),
            ImageShape::Cnn(config) => Self::Cnn(Box::new(Cnn::new(config, vb)?)),
        })
    }

    /// Logits `[B, classes]` of images `[B, H·W]`.
    ///
    /// # Errors
    /// For images of another size.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        match self {
            Self::Mlp(mlp) => mlp.forward(images),
            Self::Cnn(cnn) => cnn.forward(images),
        }
    }
}

impl Linears for ImageModel {
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> bitnet_quant::Result<()>,
    ) -> bitnet_quant::Result<()> {
        match self {
            Self::Mlp(mlp) => mlp.visit_linears(visit),
            Self::Cnn(cnn) => cnn.visit_linears(visit),
        }
    }
}
