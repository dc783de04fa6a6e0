//! A multilayer perceptron.

use super::{EPS, gain};
use crate::{Error, Result, ops};
use bitnet_quant::qat::{Linear, Linears};
use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

/// Sizes of an [`Mlp`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpConfig {
    /// Number of pixels of an image.
    pub inputs: usize,
    /// Elements of each hidden layer.
    pub hidden: Vec<usize>,
    /// Number of classes.
    pub classes: usize,
    /// Whether an RMS norm precedes every layer but the first.
    pub norm: bool,
}

/// `x ← relu(W·norm(x) + b)` for each hidden layer, then the logits `W·norm(x) + b`. Layers are
/// `layers.0`, `layers.1`, …, norms `norms.1`, ….
#[derive(Debug)]
pub struct Mlp {
    layers: Vec<Linear>,
    /// Norms of the inputs of all layers after the first, `[inputs]`.
    norms: Vec<Option<Tensor>>,
}

impl Mlp {
    /// A perceptron with the variables of `vb`.
    ///
    /// # Errors
    /// [`Error::Option`] for a size of 0, and variables of another shape.
    pub fn new(config: &MlpConfig, vb: &VarBuilder<'_>) -> Result<Self> {
        let sizes: Vec<usize> = [config.inputs]
            .into_iter()
            .chain(config.hidden.iter().copied())
            .chain([config.classes])
            .collect();
        if sizes.contains(&0) {
            return Err(Error::option(
                "model.hidden",
                "sizes of at least 1",
                format!("{sizes:?}"),
            ));
        }
        let (mut layers, mut norms) = (vec![], vec![]);
        for (i, size) in sizes.windows(2).enumerate() {
            layers.push(Linear::new(size[0], size[1], true, &vb.pp("layers").pp(i))?);
            norms.push(if config.norm && i > 0 {
                Some(gain(&vb.pp("norms").pp(i), size[0])?)
            } else {
                None
            });
        }
        Ok(Self { layers, norms })
    }

    /// Logits `[B, classes]` of images `[B, pixels]`.
    ///
    /// # Errors
    /// For images of another size.
    pub fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = images.clone();
        for (i, (layer, norm)) in self.layers.iter().zip(&self.norms).enumerate() {
            if let Some(gain) = norm {
                x = ops::rms_norm(&x, gain, EPS)?;
            }
            x = layer.forward(&x)?;
            if i + 1 < self.layers.len() {
                x = ops::relu(&x)?;
            }
        }
        Ok(x)
    }
}

impl Linears for Mlp {
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> bitnet_quant::Result<()>,
    ) -> bitnet_quant::Result<()> {
        self.layers
            .iter_mut()
            .enumerate()
            .try_for_each(|(i, layer)| visit(&format!("layers.{i}"), layer))
    }
}
