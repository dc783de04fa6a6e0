//! Random numbers that depend on a seed and a name and on nothing else, and variables drawn from
//! them.

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use std::sync::PoisonError;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators",
/// 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The numbers of one purpose under one seed.
    pub fn new(seed: u64, purpose: &str) -> Self {
        Self(xxh3_64_with_seed(purpose.as_bytes(), seed))
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, each as likely within n / 2⁶⁴. `n` is at least 1.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// From 0 on, below 1.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normally distributed with mean 0 and variance 1 (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// 0 … n − 1 in random order (Fisher and Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
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
/// use bitnet_train::random::variables;
/// use candle_nn::{Init, VarMap};
/// let draw = |seed| variables(&VarMap::new(), seed).get_with_hints((2, 3), "w", Init::Randn { mean: 0.0, stdev: 1.0 })?.to_vec2::<f32>();
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
        let mut random = Random::new(self.seed, name);
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
    fn moments_are_those_of_the_distributions() {
        let mut random = Random::new(7, "test");
        let n = 200_000;
        let (mut sum, mut squares, mut uniform) = (0.0, 0.0, 0.0);
        for _ in 0..n {
            let x = random.normal();
            (sum, squares, uniform) = (sum + x, squares + x * x, uniform + random.uniform());
        }
        // Four standard errors of each estimate.
        let bound = 4.0 / f64::from(n).sqrt();
        assert!(
            (sum / f64::from(n)).abs() < bound
                && (squares / f64::from(n) - 1.0).abs() < bound * 2f64.sqrt()
        );
        assert!((uniform / f64::from(n) - 0.5).abs() < bound * 12f64.sqrt().recip());
    }

    #[test]
    fn a_permutation_has_every_number_once_and_depends_on_the_purpose() {
        let order = Random::new(1, "epoch 0").permutation(1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<u32>>());
        assert_ne!(order, Random::new(1, "epoch 1").permutation(1000));
        assert_eq!(order, Random::new(1, "epoch 0").permutation(1000));
        assert!(Random::new(0, "").permutation(0).is_empty());
    }
}
