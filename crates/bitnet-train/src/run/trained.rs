//! The quantized layers of a trained model, on their way into the packed file.

use crate::models::{EMBEDDING, HEAD};
use crate::{Error, Result, folder};
use bitnet_core::scheme::{Method, Threshold};
use bitnet_core::{Matrix, Precision, Scheme};
use bitnet_formats::Content;
use bitnet_formats::arch::Architecture;
use bitnet_formats::hf::{BitnetConfig, LinearClass, Mode};
use bitnet_quant::qat::{Linear, Linears};
use bitnet_quant::{Activations, Source};
use candle_core::Tensor;
use serde_json::Value;
use std::collections::BTreeMap;

/// The quantized layers of a trained model.
pub(super) struct TrainedLayers {
    pub(super) layers: Vec<TrainedLayer>,
    /// Biases that include a dead-zone bias, by name, `[N]`.
    pub(super) biases: BTreeMap<String, Tensor>,
    /// Values and scales of integer layers with learned scales. Ŵ does not determine the scale if
    /// no weight reaches the outer levels.
    pub(super) given: BTreeMap<String, Matrix>,
    /// Names of the linear layers in floats.
    floats: Vec<String>,
    /// Whether transformers computes the same from the latent weights, as b1.58 does.
    online: bool,
}

pub(super) struct TrainedLayer {
    /// Name of the weights.
    pub(super) name: String,
    /// Ŵ `[N, K]`.
    pub(super) weight: Tensor,
    /// Whether packing starts from Ŵ instead of the latent weights: quantizing Ŵ gives the same
    /// values in every container, and it contains learned scales.
    pub(super) pack_rounded: bool,
}

impl TrainedLayers {
    /// Collects the layers of a model after training.
    pub(super) fn collect(model: Option<&mut dyn Linears>) -> Result<Self> {
        let mut trained = Self {
            layers: vec![],
            biases: BTreeMap::new(),
            given: BTreeMap::new(),
            floats: vec![HEAD.into()],
            online: true,
        };
        if let Some(model) = model {
            model.visit_linears(&mut |name, linear| {
                let Linear::Qat(layer) = linear else {
                    // Only layers are on the list of modules; an embedding is none in transformers.
                    if name != EMBEDDING {
                        trained.floats.push(name.into());
                    }
                    return Ok(());
                };
                let (scheme, learned) = (layer.scheme(), layer.learned_scale().is_some());
                let dead_zone = layer.dead_zone_bias() != 0.0;
                trained.online &= *scheme == Scheme::ternary(Threshold::Absmean)
                    && !learned
                    && layer.activations() == Activations::Int8;
                // transformers quantizes neither embedding nor head.
                trained.online &= !dead_zone && ![EMBEDDING, HEAD].contains(&name);
                if let Some(bias) = layer.packed_bias()?.filter(|_| dead_zone) {
                    trained.biases.insert(format!("{name}.bias"), bias);
                }
                let planes = matches!(scheme.method, Method::Ternary { planes, .. } if planes > 1);
                let pack_rounded =
                    learned || (scheme.precision()? == Precision::Ternary && !planes);
                if learned && !matches!(scheme.precision()?, Precision::Ternary | Precision::Binary)
                {
                    trained
                        .given
                        .insert(format!("{name}.weight"), layer.quantized_weights()?);
                }
                trained.layers.push(TrainedLayer {
                    name: format!("{name}.weight"),
                    weight: layer.dequantized_weights()?,
                    pack_rounded,
                });
                Ok(())
            })?;
        }
        trained.floats.sort();
        trained.floats.dedup();
        Ok(trained)
    }

    /// config.json of the latent weights. If transformers can, the config makes it quantize them in
    /// each forward pass.
    pub(super) fn config_json(&self, mut json: Value) -> Value {
        let decoder = json["model_type"]
            .as_str()
            .is_some_and(|name| Architecture::by_name(name).is_some());
        if self.online
            && decoder
            && let Some(object) = json.as_object_mut()
        {
            let bitnet = BitnetConfig {
                linear_class: LinearClass::AutoBitLinear,
                mode: Mode::Online,
            };
            object.insert("quantization_config".into(), bitnet.to_json(&self.floats));
        }
        json
    }
}

impl TrainedLayer {
    /// Checks that a checkpoint holds these weights, up to the rounding of scales to 16 bits.
    pub(super) fn check(&self, source: &Source) -> Result<()> {
        let bad = |got: String| {
            Error::from(bitnet_formats::Error::tensor(
                source.path(),
                &self.name,
                "the weights of the last step",
                got,
            ))
        };
        let tensor = source.find(&self.name).ok_or_else(|| bad("none".into()))?;
        let expected = self.weight.flatten_all()?.to_vec1::<f32>()?;
        let got = match &tensor.content {
            Content::Quantized(q) => source.matrix(&self.name, q)?.dequantize(),
            _ => folder::read(source, &self.name, self.weight.dims())?
                .flatten_all()?
                .to_vec1::<f32>()?,
        };
        // bf16 keeps 8 bits of a scale.
        match expected
            .iter()
            .zip(&got)
            .position(|(e, g)| (e - g).abs() > e.abs() / 128.0)
        {
            Some(at) => Err(bad(format!(
                "{} instead of {} at index {at}: this recipe cannot hold them",
                got[at], expected[at]
            ))),
            None => Ok(()),
        }
    }
}
