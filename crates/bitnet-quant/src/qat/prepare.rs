//! Prepare and convert: float layers to layers in training, and those to packed layers.

use super::{Linear, Linears, QatLinear, StraightThroughEstimator};
use crate::{BitLinear, QuantizationConfig};
use crate::{Error, Result};
use candle_nn::VarMap;

/// Replaces the linear layers that the configuration quantizes (`include`, `exclude` and the rules
/// match `NAME.weight`) by layers in training on the same variables. Returns their names. Learned
/// scales are the variables `NAME.learned_scale`; existing ones in `vars` keep their values.
///
/// Layers already in training, and packed layers, are not changed.
///
/// ```
/// use bitnet_quant::qat::{Linear, Linears, StraightThroughEstimator, convert, prepare};
/// use bitnet_quant::{QuantizationConfig, Result};
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{Optimizer, VarBuilder, VarMap};
///
/// struct Model(Linear);
///
/// impl Linears for Model {
///     fn visit_linears(&mut self, visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>) -> Result<()> {
///         visit("layer", &mut self.0)
///     }
/// }
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let mut model = Model(Linear::new(64, 8, true, &vb.pp("layer"))?);
/// prepare(&mut model, &QuantizationConfig::bitnet_158(), StraightThroughEstimator::Plain, &vars)?;
/// let mut sgd = candle_nn::SGD::new(vars.all_vars(), 0.01)?;
/// let x = Tensor::randn(0f32, 1f32, (16, 64), &Device::Cpu)?;
/// for _ in 0..10 {
///     sgd.backward_step(&model.0.forward(&x)?.sqr()?.mean_all()?)?;
/// }
/// let before = model.0.forward(&x)?;
/// convert(&mut model)?;
/// assert_eq!(model.0.forward(&x)?.to_vec2::<f32>()?, before.to_vec2::<f32>()?);
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
///
/// # Errors
/// [`CheckpointError::Recipe`](crate::CheckpointError::Recipe) if the configuration quantizes no
/// linear layer, [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) if it is wrong,
/// [`Error::Input`] for an estimator that does not fit a scheme. The model is not changed then.
pub fn prepare(
    model: &mut dyn Linears,
    config: &QuantizationConfig,
    estimator: StraightThroughEstimator,
    vars: &VarMap,
) -> Result<Vec<String>> {
    config.validate()?;
    let mut prepared = vec![];
    model.visit_linears(&mut |name, linear| {
        let Linear::Full(full) = linear else {
            return Ok(());
        };
        if let Some(choices) = config.matrix_choices(&format!("{name}.weight"))? {
            let config = QuantizationConfig {
                default: choices,
                rules: vec![],
                search: None,
                ..config.clone()
            };
            let scale = vars
                .data()
                .lock()
                .ok()
                .and_then(|vars| vars.get(&scale_name(name)).cloned());
            prepared.push((
                name.to_owned(),
                QatLinear::new(
                    full.weight().clone(),
                    full.bias().cloned(),
                    scale,
                    &config,
                    estimator,
                )?,
            ));
        }
        Ok(())
    })?;
    if prepared.is_empty() {
        return Err(Error::recipe(
            "the configuration quantizes no linear layer of the model",
        ));
    }
    let names = prepared.iter().map(|(name, _)| name.clone()).collect();
    let mut next = prepared.into_iter().peekable();
    model.visit_linears(&mut |name, linear| {
        if let Some((_, layer)) = next.next_if(|(of, _)| of == name) {
            if let (Some(scale), Ok(mut vars)) = (layer.learned_scale(), vars.data().lock()) {
                vars.insert(scale_name(name), scale.clone());
            }
            *linear = Linear::Qat(Box::new(layer));
        }
        Ok(())
    })?;
    Ok(names)
}

pub(super) fn scale_name(name: &str) -> String {
    format!("{name}.learned_scale")
}

impl QatLinear {
    /// The packed layer, on the CPU: with λ = 1 it computes the same.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among the weights,
    /// [`CheckpointError::Kernels`](crate::CheckpointError::Kernels) for a scheme that has no
    /// product.
    pub fn convert(&self) -> Result<BitLinear> {
        let bias = self.packed_bias()?;
        BitLinear::from_matrix(&self.quantized_weights()?, bias, self.config())
    }
}

/// Replaces layers in training by packed layers with the codes and scales of a forward pass with λ
/// = 1.
///
/// # Errors
/// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among the weights,
/// [`CheckpointError::Kernels`](crate::CheckpointError::Kernels) for a scheme that has no product.
pub fn convert(model: &mut dyn Linears) -> Result<()> {
    model.visit_linears(&mut |_, linear| {
        if let Linear::Qat(layer) = linear {
            *linear = Linear::Packed(Box::new(layer.convert()?));
        }
        Ok(())
    })
}
