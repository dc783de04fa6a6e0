//! How much quantization of each layer increases the loss.

use super::{Linear, Linears};
use crate::tensor::with_host_floats;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_core::backprop::GradStore;

/// The effect of quantizing one layer on the loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// The name of the layer.
    pub name: String,
    /// Number of its weights.
    pub weights: usize,
    /// The increase of the loss.
    pub loss_change: f64,
}

/// The names, least sensitive first, as [`Progressive::order`](super::Progressive::order).
pub fn order(sensitivities: &[Sensitivity]) -> Vec<String> {
    let mut sorted: Vec<&Sensitivity> = sensitivities.iter().collect();
    sorted.sort_by(|a, b| a.loss_change.total_cmp(&b.loss_change));
    sorted.into_iter().map(|s| s.name.clone()).collect()
}

/// For each layer in training, the loss with only this layer quantized (activations included) minus
/// the loss with none. Takes one evaluation more than there are layers. Restores the layers
/// afterwards.
///
/// # Errors
/// [`Error::Input`] if no layer is in training; what `loss` returns.
pub fn one_at_a_time<M: Linears>(
    model: &mut M,
    mut loss: impl FnMut(&mut M) -> Result<f64>,
) -> Result<Vec<Sensitivity>> {
    let mut layers = vec![];
    model.visit_linears(&mut |name, linear| {
        if let Linear::Qat(layer) = linear {
            layers.push((name.to_owned(), layer.weight().elem_count(), layer.lambda()));
        }
        Ok(())
    })?;
    if layers.is_empty() {
        return Err(Error::input("model", "layers in training", "none"));
    }
    let measured = measure(model, &layers, &mut loss);
    let mut before = layers.iter();
    model.visit_linears(&mut |_, linear| {
        if let Linear::Qat(layer) = linear
            && let Some((.., lambda)) = before.next()
        {
            layer.set_lambda(*lambda);
        }
        Ok(())
    })?;
    measured
}

fn measure<M: Linears>(
    model: &mut M,
    layers: &[(String, usize, f32)],
    loss: &mut impl FnMut(&mut M) -> Result<f64>,
) -> Result<Vec<Sensitivity>> {
    // λ = 1 for the layer at that index, 0 for all others.
    let mut only = |model: &mut M, which: Option<usize>| {
        let mut index = 0;
        model.visit_linears(&mut |_, linear| {
            if let Linear::Qat(layer) = linear {
                layer.set_lambda(if Some(index) == which { 1.0 } else { 0.0 });
                index += 1;
            }
            Ok(())
        })?;
        loss(model)
    };
    let none = only(model, None)?;
    let each = layers.iter().enumerate().map(|(i, (name, weights, _))| {
        Ok(Sensitivity {
            name: name.clone(),
            weights: *weights,
            loss_change: only(model, Some(i))? - none,
        })
    });
    each.collect()
}

/// Gradient-based sensitivities of all layers in one pass over the data: `½·Σ F·(ŵ − w)²`, where F
/// is the diagonal of the Fisher matrix, the mean squared gradient of the loss of one sample (as in
/// LeCun et al. 1990, Optimal Brain Damage).
///
/// F is estimated from mean gradients of batches: with independent samples their squares are
/// smaller by the size of the batch.
#[derive(Debug, Default)]
pub struct Fisher {
    /// Name and `Σ samples·g²` of each layer, `[N, K]`.
    layers: Vec<(String, Vec<f32>)>,
    batches: u64,
}

impl Fisher {
    /// An estimate without data.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the gradients of the mean loss of a batch of `samples`. They must be gradients of the
    /// float model: full layers, or λ = 0.
    ///
    /// # Errors
    /// [`Error::Input`] if a linear layer has no gradient, or the layers differ from those of the
    /// earlier batches.
    pub fn add(
        &mut self,
        model: &mut dyn Linears,
        gradients: &GradStore,
        samples: usize,
    ) -> Result<()> {
        let (mut index, first) = (0, self.batches == 0);
        model.visit_linears(&mut |name, linear| {
            let Some(weight) = float_weight(linear) else {
                return Ok(());
            };
            let missing = |got: &str| Error::input("gradients", format!("one of '{name}'"), got);
            let gradient = gradients.get(weight).ok_or_else(|| missing("none"))?;
            if first {
                self.layers
                    .push((name.to_owned(), vec![0.0; weight.elem_count()]));
            }
            let Some((_, sums)) = self
                .layers
                .get_mut(index)
                .filter(|(of, sums)| of == name && sums.len() == gradient.elem_count())
            else {
                return Err(missing("another model"));
            };
            index += 1;
            with_host_floats(gradient, |g| {
                sums.iter_mut()
                    .zip(g)
                    .for_each(|(sum, g)| *sum += samples as f32 * g * g);
                Ok(())
            })
        })?;
        self.batches += 1;
        Ok(())
    }

    /// `½·Σ F·(ŵ − w)²` of each layer in training, with the levels of its present stage.
    ///
    /// # Errors
    /// [`Error::Input`] before the first batch or for another model,
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among the weights.
    pub fn sensitivities(&self, model: &mut dyn Linears) -> Result<Vec<Sensitivity>> {
        let mut all = vec![];
        model.visit_linears(&mut |name, linear| {
            if let Linear::Qat(layer) = linear {
                let loss_change =
                    self.loss_change(name, layer.weight(), &layer.dequantized_weights()?)?;
                all.push(Sensitivity {
                    name: name.to_owned(),
                    weights: layer.weight().elem_count(),
                    loss_change,
                });
            }
            Ok(())
        })?;
        Ok(all)
    }

    fn loss_change(&self, name: &str, weight: &Tensor, quantized: &Tensor) -> Result<f64> {
        let known = self
            .layers
            .iter()
            .find(|(of, f)| of == name && f.len() == weight.elem_count());
        let (_, fisher) =
            known.ok_or_else(|| Error::input("layer", "one whose gradients were added", name))?;
        let sum = with_host_floats(weight, |w| {
            with_host_floats(quantized, |v| {
                Ok(fisher
                    .iter()
                    .zip(w)
                    .zip(v)
                    .map(|((f, w), v)| f64::from(*f) * f64::from(w - v).powi(2))
                    .sum::<f64>())
            })
        })?;
        Ok(0.5 * sum / self.batches as f64)
    }

    /// One rule for each layer in training, chosen to lose least within `bits` bits per weight,
    /// scales included: [`select`](crate::search::select) on the Fisher errors of `settings`. Add
    /// them to a configuration before `prepare`.
    ///
    /// # Errors
    /// [`CheckpointError::Recipe`](crate::CheckpointError::Recipe) if no selection fits the budget
    /// or a setting is not quantized; as [`Fisher::sensitivities`].
    #[cfg(feature = "advanced")]
    pub fn rules(
        &self,
        model: &mut dyn Linears,
        settings: &[crate::recipe::Choices],
        bits: f64,
    ) -> Result<Vec<crate::recipe::Rule>> {
        use crate::search::{Candidate, select};
        let (mut names, mut candidates, mut weights) = (vec![], vec![], 0);
        model.visit_linears(&mut |name, linear| {
            let Some(weight) = float_weight(linear) else {
                return Ok(());
            };
            let one = |choices: &crate::recipe::Choices| -> Result<Candidate> {
                let scheme = choices.plain_scheme()?.ok_or_else(|| {
                    Error::recipe(format!("{} is not quantized", choices.target()))
                })?;
                let runtime = crate::Runtime::shared(&Default::default())?;
                let matrix = crate::quantize_tensor(&runtime, weight, &scheme, None)?;
                let stats = matrix.stats(weight)?;
                let spec = matrix.matrix()?.spec.clone();
                let scale = spec.scale_dtype.bytes()
                    + if spec.zero_points == bitnet_core::ZeroPoints::None {
                        0
                    } else {
                        1
                    };
                let bytes = (spec.values_len() * spec.precision.code_bits() as usize).div_ceil(8)
                    + spec.scales_len() * scale;
                let error = self.loss_change(name, weight, &matrix.dequantize()?)?;
                Ok(Candidate {
                    choices: choices.clone(),
                    bytes: bytes as u64,
                    error,
                    sqnr_db: stats.sqnr_db().into(),
                })
            };
            candidates.push(settings.iter().map(one).collect::<Result<Vec<_>>>()?);
            names.push(format!("{name}.weight"));
            weights += weight.elem_count();
            Ok(())
        })?;
        let best = select(
            &candidates,
            Some((bits * weights as f64 / 8.0).floor() as u64),
            None,
        )?;
        let rule =
            |((name, candidates), pick): ((String, Vec<Candidate>), usize)| crate::recipe::Rule {
                glob: crate::recipe::escape(&name),
                choices: candidates[pick].choices.clone(),
            };
        Ok(names
            .into_iter()
            .zip(candidates)
            .zip(best.picks)
            .map(rule)
            .collect())
    }
}

/// The latent or float weights of a layer.
fn float_weight(linear: &Linear) -> Option<&Tensor> {
    match linear {
        Linear::Full(full) => Some(full.weight()),
        Linear::Qat(layer) => Some(layer.weight()),
        Linear::Packed(_) => None,
    }
}
