//! A small convolutional network.

use super::{EPS, gain};
use crate::{Error, Result, ops};
use bitnet_quant::qat::{Linear, Linears};
use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

/// Sizes of a [`Cnn`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CnnConfig {
    /// Height of an image in pixels.
    pub height: usize,
    /// Width of an image in pixels.
    pub width: usize,
    /// Channels of each convolution, which halves height and width; both must be even before it.
    pub channels: Vec<usize>,
    /// Elements of the layer between the convolutions and the logits.
    pub dense: usize,
    /// Number of classes.
    pub classes: usize,
    /// Whether an RMS norm precedes every layer but the first.
    pub norm: bool,
}

/// `x ← max_pool(relu(conv3×3(norm(x)) + b))` for each convolution, then a hidden layer and the
/// logits. Convolutions are named `conv.0`, …, with weights `[out, 3·3·in]` in the order row,
/// column, channel; the other layers `dense.0` and `dense.1`.
#[derive(Debug)]
pub struct Cnn {
    size: (usize, usize),
    /// Each with the norm of its input channels.
    convolutions: Vec<(Linear, Option<Tensor>)>,
    dense: [(Linear, Option<Tensor>); 2],
}

impl Cnn {
    /// A network with the variables of `vb`.
    ///
    /// # Errors
    /// [`Error::Option`] for a size that is 0 or cannot be halved, and variables of another shape.
    pub fn new(config: &CnnConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let (mut height, mut width, mut inputs) = (config.height, config.width, 1);
        let norm = |first: bool, name: String, len| {
            if config.norm && !first {
                gain(&vb.pp(name), len).map(Some)
            } else {
                Ok(None)
            }
        };
        let mut convolutions = vec![];
        for (i, &channels) in config.channels.iter().enumerate() {
            if channels == 0
                || !height.is_multiple_of(2)
                || !width.is_multiple_of(2)
                || height * width == 0
            {
                let got = format!("{channels} channels of {height} × {width}");
                return Err(Error::option(
                    "model.channels",
                    "channels, of images that can be halved once for each",
                    got,
                ));
            }
            let layer = Linear::new(9 * inputs, channels, true, &vb.pp("conv").pp(i))?;
            convolutions.push((layer, norm(i == 0, format!("norms.{i}"), inputs)?));
            (height, width, inputs) = (height / 2, width / 2, channels);
        }
        let flat = height * width * inputs;
        if flat == 0 || config.dense == 0 || config.classes == 0 {
            return Err(Error::option(
                "model.dense",
                "at least 1 element",
                config.dense,
            ));
        }
        let dense = |i: usize, inputs, outputs| -> Result<_> {
            let layer = Linear::new(inputs, outputs, true, &vb.pp("dense").pp(i))?;
            Ok((
                layer,
                norm(
                    false,
                    format!("norms.{}", config.channels.len() + i),
                    inputs,
                )?,
            ))
        };
        let dense = [
            dense(0, flat, config.dense)?,
            dense(1, config.dense, config.classes)?,
        ];
        Ok(Self {
            size: (config.height, config.width),
            convolutions,
            dense,
        })
    }

    /// Logits `[B, classes]` of images `[B, H·W]`.
    ///
    /// # Errors
    /// For images of another size.
    pub fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let batch = images.dim(0)?;
        let apply = |(layer, norm): &(Linear, Option<Tensor>), x: &Tensor, size: Option<usize>| {
            let mut x = norm
                .as_ref()
                .map_or_else(|| Ok(x.clone()), |gain| ops::rms_norm(x, gain, EPS))?;
            if let Some(size) = size {
                x = ops::patches(&x, size)?;
            }
            layer.forward(&x)
        };
        let mut x = images.reshape((batch, self.size.0, self.size.1, 1))?;
        for layer in &self.convolutions {
            x = ops::max_pool(&ops::relu(&apply(layer, &x, Some(3))?)?)?;
        }
        let x = x.reshape((batch, ()))?;
        apply(
            &self.dense[1],
            &ops::relu(&apply(&self.dense[0], &x, None)?)?,
            None,
        )
    }
}

impl Linears for Cnn {
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> bitnet_quant::Result<()>,
    ) -> bitnet_quant::Result<()> {
        let layers = self
            .convolutions
            .iter_mut()
            .enumerate()
            .map(|(i, layer)| (format!("conv.{i}"), layer));
        let mut layers = layers.chain(
            self.dense
                .iter_mut()
                .enumerate()
                .map(|(i, layer)| (format!("dense.{i}"), layer)),
        );
        layers.try_for_each(|(name, (layer, _))| visit(&name, layer))
    }
}
