//! Initial values of variables: random numbers that depend on a seed and the variable's name alone.

use bitnet_core::random::Random;
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use std::sync::PoisonError;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The random numbers of one purpose under one seed.
pub fn stream(seed: u64, purpose: &str) -> Random {
    Random::new(xxh3_64_with_seed(purpose.as_bytes(), seed))
}

/// Variables of a map; one that is not there yet is drawn from (seed, its name), so that neither
/// the order in which layers are made nor other layers change it.
struct Seeded {
    vars: VarMap,
    seed: u64,
}

/// Builds layers from the variables in `vars`, to which new ones are added.
///
/// ```
/// use bitnet_train::variables::variables;
/// use candle_nn::{Init, VarMap};
/// let normal = Init::Randn { mean: 0.0, stdev: 1.0 };
/// let draw = |seed| {
///     let vars = variables(&VarMap::new(), seed);
///     vars.get_with_hints((2, 3), "w", normal)?.to_vec2::<f32>()
/// };
/// assert_eq!(draw(1)?, draw(1)?);
/// assert_ne!(draw(1)?, draw(2)?);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn variables(vars: &VarMap, seed: u64) -> VarBuilder<'static> {
    VarBuilder::from_backend(
        Box::new(Seeded {
            vars: vars.clone(),
            seed,
        }),
        DType::F32,
        Device::Cpu,
    )
}

impl SimpleBackend for Seeded {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut all = self
            .vars
            .data()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(var) = all.get(name) {
            return if var.shape() == &shape {
                Ok(var.as_tensor().clone())
            } else {
                candle_core::bail!(
                    "variable '{name}': expected shape {shape:?}, got {:?}",
                    var.shape()
                )
            };
        }
        let mut random = stream(self.seed, name);
        let mut fill = |draw: &mut dyn FnMut(&mut Random) -> f64| {
            let values: Vec<f32> = (0..shape.elem_count())
                .map(|_| draw(&mut random) as f32)
                .collect();
            Tensor::from_vec(values, &shape, device)
        };
        let tensor = match init {
            Init::Const(value) => fill(&mut |_| value)?,
            Init::Uniform { lo, up } => fill(&mut |r| lo + (up - lo) * r.uniform())?,
            Init::Randn { mean, stdev } => fill(&mut |r| mean + stdev * r.normal())?,
            Init::Kaiming {
                fan, non_linearity, ..
            } => {
                let stdev = non_linearity.gain() / (fan.for_shape(&shape) as f64).sqrt();
                fill(&mut |r| stdev * r.normal())?
            }
        };
        let var = Var::from_tensor(&tensor.to_dtype(dtype)?)?;
        let tensor = var.as_tensor().clone();
        all.insert(name.to_string(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        let all = self
            .vars
            .data()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match all.get(name) {
            Some(var) => Ok(var.as_tensor().clone()),
            None => candle_core::bail!("no variable '{name}'"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vars
            .data()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_seed_and_purpose() {
        let first = |seed, purpose| stream(seed, purpose).bits();
        assert_eq!(first(1, "epoch 0"), first(1, "epoch 0"));
        assert_ne!(first(1, "epoch 0"), first(1, "epoch 1"));
        assert_ne!(first(1, "epoch 0"), first(2, "epoch 0"));
    }
}
