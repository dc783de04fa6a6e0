//! Optimizers that update weights in place: one pass over weight, gradient and moments, without
//! temporaries.
//!
//! ```text
//! SGD:    b ← μb + g;                                       w ← w − ηb                                        g contains λw
//! Adam:   m ← m + (1 − β₁)(g − m);  v ← β₂v + (1 − β₂)g²;   w ← w − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)   g contains λw
//! AdamW:  as Adam, with w ← (1 − ηλ)w first and no λw in g
//! ```
//!
//! These are the equations of PyTorch, in f32.

mod config;
mod parameter;
mod update;

pub use config::{Betas, OptimizerConfig, OptimizerMethod, ParameterGroup, Rates};
pub(crate) use parameter::MomentStorage;

use super::sums::{PART, device_sum_squares, squares, sum_squares};
use crate::recipe::compile;
use crate::tensor::with_floats;
use crate::{Error, Result};
use bitnet_kernels::Kernels;
use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use candle_nn::VarMap;
use parameter::Parameter;
use rayon::prelude::*;
use std::sync::PoisonError;

/// A fused optimizer of f32 variables on the CPU; on other devices the same equations run as
/// candle's operations. It implements [`candle_nn::Optimizer`].
///
/// ```
/// use bitnet_quant::qat::{Optimizer, OptimizerConfig, Rates};
/// use candle_core::{DType, Device};
/// use candle_nn::{Init, VarMap};
/// let vars = VarMap::new();
/// let w = vars.get((2, 2), "weight", Init::Const(1.0), DType::F32, &Device::Cpu)?;
/// let mut optimizer = Optimizer::new(&vars, &OptimizerConfig::default())?;
/// let norm = optimizer.step(&w.sqr()?.sum_all()?.backward()?, Rates::default())?;
/// assert_eq!(norm, 4.0); // √(4 · 2²)
/// assert!((w.to_vec2::<f32>()?[0][0] - 0.99899).abs() < 1e-6); // 1 − η(λ + 1)
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    pub(crate) parameters: Vec<Parameter>,
    /// Steps taken.
    pub(crate) steps: u64,
    /// Micro-batches in the sums.
    pending: u64,
    kernels: Kernels,
}

impl Optimizer {
    /// An optimizer of all variables of a map.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) for invalid numbers,
    /// [`Error::Input`] if there is no variable or one that is not contiguous f32.
    pub fn new(vars: &VarMap, config: &OptimizerConfig) -> Result<Self> {
        Self::for_variables(sorted(vars), config)
    }

    /// An optimizer of named variables.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn for_variables(vars: Vec<(String, Var)>, config: &OptimizerConfig) -> Result<Self> {
        Self::build(vars, config, |var| var.device().is_cpu())
    }

    /// `fused` tells which variables the fused kernels update.
    pub(super) fn build(
        vars: Vec<(String, Var)>,
        config: &OptimizerConfig,
        fused: impl Fn(&Var) -> bool,
    ) -> Result<Self> {
        let mut wrong = vec![];
        config.problems(&mut wrong);
        Error::unless_empty(wrong)?;
        if vars.is_empty() {
            return Err(Error::input("variables", "at least one to train", "none"));
        }
        let globs = config
            .group
            .iter()
            .map(|g| compile(&g.glob))
            .collect::<Result<Vec<_>, _>>()?;
        let mut parameters = vec![];
        for (name, var) in vars {
            if var.dtype() != DType::F32 || !var.is_contiguous() {
                return Err(Error::input(
                    "variable",
                    "contiguous f32",
                    format!("'{name}' in {}", var.dtype().as_str()),
                ));
            }
            let group = globs
                .iter()
                .position(|glob| glob.is_match(&name))
                .map(|i| &config.group[i]);
            let plain = var.rank() <= 1 || name.ends_with("scale") || name.ends_with("norm");
            let decay = group.and_then(|g| g.weight_decay).unwrap_or(if plain {
                0.0
            } else {
                config.weight_decay
            });
            let fused = fused(&var);
            let keep = |yes: bool| {
                if yes {
                    MomentStorage::zeros(&var, fused).map(Some)
                } else {
                    Ok(None)
                }
            };
            let adam = !matches!(config.method, OptimizerMethod::Sgd { .. });
            let (first, second) = (
                keep(!matches!(
                    config.method,
                    OptimizerMethod::Sgd { momentum: 0.0, .. }
                ))?,
                keep(adam)?,
            );
            parameters.push(Parameter {
                name,
                var,
                rate: group.map_or(1.0, |g| g.learning_rate),
                decay,
                first,
                second,
                sum: None,
                fused,
            });
        }
        let config = config.clone();
        Ok(Self {
            config,
            parameters,
            steps: 0,
            pending: 0,
            kernels: Kernels::from_env()?,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the moments of a variable to 0, because its meaning has changed.
    pub(crate) fn reset_moments(&mut self, name: &str) -> Result<()> {
        let of_name = self.parameters.iter_mut().filter(|p| p.name == name);
        of_name
            .flat_map(|p| [&mut p.first, &mut p.second])
            .flatten()
            .try_for_each(MomentStorage::zero)
    }

    /// Whether every weight is finite.
    pub(crate) fn is_finite(&self) -> Result<bool> {
        for p in &self.parameters {
            if !squares(self.kernels, &p.var)?.is_finite() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Variables without a gradient in `grads`.
    pub fn without_gradient<'a>(&'a self, grads: &'a GradStore) -> impl Iterator<Item = &'a str> {
        self.parameters
            .iter()
            .filter(|p| grads.get(&p.var).is_none())
            .map(|p| p.name.as_str())
    }

    /// Adds the gradients of one micro-batch for the next [`Optimizer::step`], which uses the mean
    /// of all micro-batches.
    ///
    /// # Errors
    /// [`Error::Candle`] for gradients that cannot be read.
    pub fn accumulate(&mut self, grads: &GradStore) -> Result<()> {
        let kernels = self.kernels;
        for p in &mut self.parameters {
            let Some(g) = grads.get(&p.var) else { continue };
            match &mut p.sum {
                None if p.fused => {
                    p.sum = Some(MomentStorage::Host(with_floats(g, |g| Ok(g.to_vec()))?))
                }
                None => p.sum = Some(MomentStorage::Device(g.detach())),
                Some(MomentStorage::Host(sum)) => with_floats(g, |g| {
                    sum.par_chunks_mut(PART)
                        .zip(g.par_chunks(PART))
                        .for_each(|(sum, g)| kernels.add(sum, g));
                    Ok(())
                })?,
                Some(MomentStorage::Device(sum)) => *sum = (&*sum + g.detach())?,
            }
        }
        self.pending += 1;
        Ok(())
    }

    /// Takes one step along the mean of these gradients and the accumulated ones. Returns the norm
    /// of all gradients together, before clipping; if it is not finite, nothing is updated.
    /// Variables without a gradient are not changed.
    ///
    /// # Errors
    /// [`Error::Candle`] for gradients that cannot be read.
    pub fn step(&mut self, grads: &GradStore, rates: Rates) -> Result<f64> {
        let mean = if self.pending > 0 {
            self.accumulate(grads)?;
            1.0 / self.pending as f64
        } else {
            1.0
        };
        let mut all = 0.0;
        for p in &self.parameters {
            all += mean.powi(2)
                * match (&p.sum, grads.get(&p.var)) {
                    (Some(MomentStorage::Host(sum)), _) => sum_squares(self.kernels, sum),
                    (Some(MomentStorage::Device(sum)), _) => device_sum_squares(sum)?,
                    (None, Some(g)) => squares(self.kernels, g)?,
                    (None, None) => 0.0,
                };
        }
        let norm = all.sqrt();
        if norm.is_finite() {
            // As PyTorch's clip_grad_norm_: a little is added to the norm.
            let clip = rates
                .clip
                .map_or(1.0, |most| (most / (norm + 1e-6)).min(1.0));
            self.steps += 1;
            for p in &mut self.parameters {
                let decay = p.decay * rates.weight_decay;
                let rate = self.config.learning_rate * rates.learning_rate * p.rate;
                let scale = (mean * clip) as f32;
                let rule = self
                    .config
                    .method
                    .step(self.steps as i32, rate, decay, scale);
                let gradient = grads.get(&p.var);
                rule.update(p, self.kernels, gradient)?;
            }
        }
        self.pending = 0;
        self.parameters.iter_mut().for_each(|p| p.sum = None);
        Ok(norm)
    }
}

/// The variables of a map in the order of their names.
pub(crate) fn sorted(vars: &VarMap) -> Vec<(String, Var)> {
    let map = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut vars: Vec<_> = map
        .iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    vars
}

impl candle_nn::Optimizer for Optimizer {
    type Config = OptimizerConfig;

    /// Variables are named by their index: "0", "1", …
    fn new(vars: Vec<Var>, config: OptimizerConfig) -> candle_core::Result<Self> {
        let named = vars
            .into_iter()
            .enumerate()
            .map(|(i, var)| (i.to_string(), var))
            .collect();
        Self::for_variables(named, &config).map_err(candle_core::Error::wrap)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        self.step(grads, Rates::default())
            .map(|_| ())
            .map_err(candle_core::Error::wrap)
    }

    fn learning_rate(&self) -> f64 {
        self.config.learning_rate
    }

    fn set_learning_rate(&mut self, rate: f64) {
        self.config.learning_rate = rate;
    }
}
