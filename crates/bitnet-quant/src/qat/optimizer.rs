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

use super::device_sum_squares;
use crate::recipe::compile;
use crate::tensor::with_floats;
use crate::tensor::with_host_floats;
use crate::{Error, Result};
use bitnet_kernels::Kernels;
use bitnet_kernels::update::{Adam, Decay, Sgd};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor, Var};
use candle_nn::VarMap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::sync::PoisonError;

/// Elements that one thread takes at a time.
const PART: usize = 1 << 15;

/// The rule of a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "name", deny_unknown_fields)]
pub enum Method {
    /// Gradient descent with momentum.
    Sgd {
        /// Share of the velocity that remains; 0: none is kept.
        #[serde(default)]
        momentum: f64,
        /// Whether the step looks ahead along the new velocity.
        #[serde(default)]
        nesterov: bool,
    },
    /// Adam (Kingma, Ba 2015): decay goes through the moments.
    Adam(Betas),
    /// Adam with decoupled decay (Loshchilov, Hutter 2019).
    AdamW(Betas),
}

/// The constants of Adam.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Betas {
    /// Share of the first moment that remains.
    pub beta1: f64,
    /// Share of the second moment that remains.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for Betas {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

impl Default for Method {
    fn default() -> Self {
        Self::AdamW(Betas::default())
    }
}

/// Variables that are treated alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Names of variables, as a glob.
    #[serde(rename = "match")]
    pub glob: String,
    /// Their learning rate, as a multiple; 0 keeps them as they are.
    #[serde(default = "one")]
    pub learning_rate: f64,
    /// Their decay λ, where it is not that of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

fn one() -> f64 {
    1.0
}

/// An optimizer by its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The rule of a step.
    pub method: Method,
    /// Learning rate η.
    pub learning_rate: f64,
    /// Decay λ of matrices. Tensors of at most one dimension (biases, norms, scales) and names with
    /// `norm` or `scale` at the end have none.
    pub weight_decay: f64,
    /// Exceptions; the first that matches a name holds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub group: Vec<Group>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            method: Method::default(),
            learning_rate: 1e-3,
            weight_decay: 0.01,
            group: vec![],
        }
    }
}

impl OptimizerConfig {
    pub(crate) fn problems(&self, wrong: &mut Vec<String>) {
        let mut number = |name: &str, x: f64, ok: bool, expected: &str| {
            if !ok {
                wrong.push(format!("optimizer.{name}: expected {expected}, got {x}"));
            }
        };
        let positive = |x: f64| x.is_finite() && x >= 0.0;
        number(
            "learning_rate",
            self.learning_rate,
            positive(self.learning_rate),
            "a number of at least 0",
        );
        number(
            "weight_decay",
            self.weight_decay,
            positive(self.weight_decay),
            "a number of at least 0",
        );
        match self.method {
            Method::Sgd { momentum, .. } => number(
                "momentum",
                momentum,
                (0.0..1.0).contains(&momentum),
                "a number in [0, 1)",
            ),
            Method::Adam(betas) | Method::AdamW(betas) => {
                number(
                    "beta1",
                    betas.beta1,
                    (0.0..1.0).contains(&betas.beta1),
                    "a number in [0, 1)",
                );
                number(
                    "beta2",
                    betas.beta2,
                    (0.0..1.0).contains(&betas.beta2),
                    "a number in [0, 1)",
                );
                number(
                    "eps",
                    betas.eps,
                    betas.eps.is_finite() && betas.eps > 0.0,
                    "a number above 0",
                );
            }
        }
        for (i, group) in self.group.iter().enumerate() {
            let decay = group.weight_decay.unwrap_or(0.0);
            number(
                &format!("group[{i}].learning_rate"),
                group.learning_rate,
                positive(group.learning_rate),
                "a number of at least 0",
            );
            number(
                &format!("group[{i}].weight_decay"),
                decay,
                positive(decay),
                "a number of at least 0",
            );
        }
        for (i, group) in self.group.iter().enumerate() {
            wrong.extend(
                compile(&group.glob)
                    .err()
                    .map(|e| format!("optimizer.group[{i}].match: {e}")),
            );
        }
    }
}

/// One variable and what the optimizer remembers about it.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) var: Var,
    /// Learning rate and decay, as multiples of, and instead of, those of all.
    rate: f64,
    decay: f64,
    /// Velocity, or first moment.
    pub(crate) first: Option<Kept>,
    /// Second moment.
    pub(crate) second: Option<Kept>,
    /// Gradients of micro-batches before the last.
    sum: Option<Kept>,
    /// Whether its steps are those of our kernels.
    fused: bool,
}

/// A number for each element of a variable.
#[derive(Debug)]
pub(crate) enum Kept {
    /// For our kernels.
    Host(Vec<f32>),
    /// On the variable's device, for operations of candle.
    Device(Tensor),
}

impl Kept {
    fn zeros(var: &Var, fused: bool) -> Result<Self> {
        Ok(if fused {
            Self::Host(vec![0.0; var.elem_count()])
        } else {
            Self::Device(var.zeros_like()?.detach())
        })
    }

    /// Calls `f` with the numbers.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
        match self {
            Self::Host(x) => f(x),
            Self::Device(x) => with_host_floats(x, f),
        }
    }

    /// Takes over numbers, as many as it has.
    pub(crate) fn set(&mut self, values: Vec<f32>) -> Result<()> {
        match self {
            Self::Host(x) => *x = values,
            Self::Device(x) => *x = Tensor::from_vec(values, x.shape(), x.device())?,
        }
        Ok(())
    }

    fn zero(&mut self) -> Result<()> {
        match self {
            Self::Host(x) => x.fill(0.0),
            Self::Device(x) => *x = x.zeros_like()?,
        }
        Ok(())
    }
}

/// The numbers of a fused parameter, which are none where none are kept.
fn host(kept: &mut Option<Kept>) -> &mut [f32] {
    match kept {
        Some(Kept::Host(x)) => x,
        _ => &mut [],
    }
}

/// Those of another one.
fn tensor(kept: &Option<Kept>) -> Option<&Tensor> {
    match kept {
        Some(Kept::Device(x)) => Some(x),
        _ => None,
    }
}

/// What the schedules say about one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Factor of the learning rate.
    pub learning_rate: f64,
    /// Factor of the decay.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; longer ones are scaled down to it.
    pub clip: Option<f64>,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            learning_rate: 1.0,
            weight_decay: 1.0,
            clip: None,
        }
    }
}

/// A fused optimizer of f32 variables on the CPU; on other devices the same equations are
/// operations of candle. It serves wherever candle takes a [`candle_nn::Optimizer`].
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
    /// For all variables of a map, by name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for numbers that make no sense, [`Error::Input`] for variables that are
    /// not f32 or that do not exist.
    pub fn new(vars: &VarMap, config: &OptimizerConfig) -> Result<Self> {
        Self::of(sorted(vars), config)
    }

    /// For variables with names.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn of(vars: Vec<(String, Var)>, config: &OptimizerConfig) -> Result<Self> {
        Self::build(vars, config, |var| var.device().is_cpu())
    }

    /// `fused` says for which variables our kernels step.
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
                    Kept::zeros(&var, fused).map(Some)
                } else {
                    Ok(None)
                }
            };
            let adam = !matches!(config.method, Method::Sgd { .. });
            let (first, second) = (
                keep(!matches!(config.method, Method::Sgd { momentum: 0.0, .. }))?,
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

    /// The numbers it was made from.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Moments of a variable begin anew, because it means something else from now on.
    pub(crate) fn forget(&mut self, name: &str) -> Result<()> {
        let of_name = self.parameters.iter_mut().filter(|p| p.name == name);
        of_name
            .flat_map(|p| [&mut p.first, &mut p.second])
            .flatten()
            .try_for_each(Kept::zero)
    }

    /// Whether every weight is a number.
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

    /// Keeps the gradients of one micro-batch for the next [`Optimizer::step`], which uses the mean
    /// of these and its own.
    ///
    /// # Errors
    /// [`Error::Candle`] for gradients that cannot be read.
    pub fn accumulate(&mut self, grads: &GradStore) -> Result<()> {
        let kernels = self.kernels;
        for p in &mut self.parameters {
            let Some(g) = grads.get(&p.var) else { continue };
            match &mut p.sum {
                None if p.fused => p.sum = Some(Kept::Host(with_floats(g, |g| Ok(g.to_vec()))?)),
                None => p.sum = Some(Kept::Device(g.detach())),
                Some(Kept::Host(sum)) => with_floats(g, |g| {
                    sum.par_chunks_mut(PART)
                        .zip(g.par_chunks(PART))
                        .for_each(|(sum, g)| kernels.add(sum, g));
                    Ok(())
                })?,
                Some(Kept::Device(sum)) => *sum = (&*sum + g.detach())?,
            }
        }
        self.pending += 1;
        Ok(())
    }

    /// One step along the mean of these gradients and the accumulated ones. Returns the norm of all
    /// of them together, before clipping; where it is not finite, nothing is updated. Variables
    /// without a gradient stay as they are.
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
                    (Some(Kept::Host(sum)), _) => sum_squares(self.kernels, sum),
                    (Some(Kept::Device(sum)), _) => device_sum_squares(sum)?,
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
            for i in 0..self.parameters.len() {
                self.update(i, grads, rates, mean * clip)?;
            }
        }
        self.pending = 0;
        self.parameters.iter_mut().for_each(|p| p.sum = None);
        Ok(norm)
    }

    fn update(&mut self, i: usize, grads: &GradStore, rates: Rates, scale: f64) -> Result<()> {
        let (kernels, config, t) = (self.kernels, &self.config, self.steps as i32);
        let p = &mut self.parameters[i];
        let (rate, lambda) = (
            config.learning_rate * rates.learning_rate * p.rate,
            p.decay * rates.weight_decay,
        );
        let scale = scale as f32;
        let coupled = Decay {
            scale,
            coupled: lambda as f32,
            decay: 1.0,
        };
        let rule = match config.method {
            Method::Sgd { momentum, nesterov } => Rule::Sgd(Sgd {
                decay: coupled,
                rate: rate as f32,
                momentum: momentum as f32,
                nesterov,
            }),
            Method::Adam(b) => Rule::Adam(b.step(t, rate, coupled)),
            Method::AdamW(b) => Rule::Adam(b.step(
                t,
                rate,
                Decay {
                    scale,
                    coupled: 0.0,
                    decay: (1.0 - rate * lambda) as f32,
                },
            )),
        };
        let (sum, gradient) = (p.sum.take(), grads.get(&p.var));
        if !p.fused {
            return match tensor(&sum).or(gradient) {
                Some(g) => rule.on_device(p, &g.detach()),
                None => Ok(()),
            };
        }
        let (var, first, second) = (p.var.clone(), host(&mut p.first), host(&mut p.second));
        let mut run = |g: &[f32]| {
            Ok(var.inplace_op1(&Step(RefCell::new(Update {
                kernels,
                rule,
                g,
                first,
                second,
            })))?)
        };
        match (&sum, gradient) {
            (Some(Kept::Host(sum)), _) => run(sum),
            (_, Some(g)) => with_floats(g, run),
            (_, None) => Ok(()),
        }
    }
}

/// Σ x² on any device.
fn squares(kernels: Kernels, x: &Tensor) -> Result<f64> {
    if x.device().is_cpu() {
        with_floats(x, |x| Ok(sum_squares(kernels, x)))
    } else {
        device_sum_squares(x)
    }
}

/// Σ g², in parts that do not depend on the threads.
pub(crate) fn sum_squares(kernels: Kernels, g: &[f32]) -> f64 {
    let parts: Vec<f64> = g.par_chunks(PART).map(|g| kernels.sum_squares(g)).collect();
    parts.iter().sum()
}

impl Betas {
    fn step(self, t: i32, rate: f64, decay: Decay) -> Adam {
        Adam {
            decay,
            rate: (rate / (1.0 - self.beta1.powi(t))) as f32,
            root: (1.0 / (1.0 - self.beta2.powi(t)).sqrt()) as f32,
            new1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            new2: (1.0 - self.beta2) as f32,
            eps: self.eps as f32,
        }
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

#[derive(Debug, Clone, Copy)]
enum Rule {
    Sgd(Sgd),
    Adam(Adam),
}

impl Rule {
    /// The step of [`bitnet_kernels::update`] as operations of candle.
    fn on_device(self, p: &mut Parameter, g: &Tensor) -> Result<()> {
        let (Self::Sgd(Sgd { decay, rate, .. }) | Self::Adam(Adam { decay, rate, .. })) = self;
        let w = p.var.as_tensor().detach();
        let mut g = (g * f64::from(decay.scale))?;
        if decay.coupled != 0.0 {
            g = (g + (&w * f64::from(decay.coupled))?)?;
        }
        let direction = match (self, tensor(&p.first), tensor(&p.second)) {
            (Self::Sgd(step), Some(b), _) => {
                let b = ((b * f64::from(step.momentum))? + &g)?;
                let direction = if step.nesterov {
                    (g + (&b * f64::from(step.momentum))?)?
                } else {
                    b.clone()
                };
                p.first = Some(Kept::Device(b));
                direction
            }
            (Self::Adam(step), Some(m), Some(v)) => {
                let m = (m + ((&g - m)? * f64::from(step.new1))?)?;
                let v = ((v * f64::from(step.beta2))? + (g.sqr()? * f64::from(step.new2))?)?;
                let direction = (&m
                    / v.sqrt()?
                        .affine(f64::from(step.root), f64::from(step.eps))?)?;
                (p.first, p.second) = (Some(Kept::Device(m)), Some(Kept::Device(v)));
                direction
            }
            _ => g,
        };
        Ok(p.var
            .set(&((w * f64::from(decay.decay))? - (direction * f64::from(rate))?)?)?)
    }
}

#[derive(Debug)]
struct Update<'a> {
    kernels: Kernels,
    rule: Rule,
    g: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
}

/// candle's way to write into a variable.
struct Step<'a>(RefCell<Update<'a>>);

impl InplaceOp1 for Step<'_> {
    fn name(&self) -> &'static str {
        "optimizer-step"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(all), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            return Err(candle_core::Error::msg(
                "an optimizer takes contiguous f32 variables",
            ));
        };
        let (w, update) = (&mut all[start..end], &mut *self.0.borrow_mut());
        let (kernels, g) = (update.kernels, update.g);
        if w.len() != g.len() {
            return Err(candle_core::Error::msg(format!(
                "a variable of {} elements has a gradient of {}",
                w.len(),
                g.len()
            )));
        }
        let parts = w.par_chunks_mut(PART).zip(g.par_chunks(PART));
        match update.rule {
            Rule::Sgd(step) if update.first.is_empty() => {
                parts.for_each(|(w, g)| kernels.sgd(w, g, &mut [], &step))
            }
            Rule::Sgd(step) => parts
                .zip(update.first.par_chunks_mut(PART))
                .for_each(|((w, g), b)| kernels.sgd(w, g, b, &step)),
            Rule::Adam(step) => {
                let moments = update
                    .first
                    .par_chunks_mut(PART)
                    .zip(update.second.par_chunks_mut(PART));
                parts
                    .zip(moments)
                    .for_each(|((w, g), (m, v))| kernels.adam(w, g, m, v, &step));
            }
        }
        Ok(())
    }
}

impl candle_nn::Optimizer for Optimizer {
    type Config = OptimizerConfig;

    /// Variables are named by their place: "0", "1", …
    fn new(vars: Vec<Var>, config: OptimizerConfig) -> candle_core::Result<Self> {
        let named = vars
            .into_iter()
            .enumerate()
            .map(|(i, var)| (i.to_string(), var))
            .collect();
        Self::of(named, &config).map_err(candle_core::Error::wrap)
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
