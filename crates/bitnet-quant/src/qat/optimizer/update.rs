//! One step of one variable: in place on the CPU, in candle's operations on other devices.

use super::config::{Betas, OptimizerMethod};
use super::parameter::{MomentStorage, Parameter, host, tensor};
use crate::Result;
use crate::qat::sums::PART;
use crate::tensor::with_floats;
use bitnet_kernels::Kernels;
use bitnet_kernels::update::{Adam, Decay, Sgd};
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};
use rayon::prelude::*;
use std::cell::RefCell;

impl OptimizerMethod {
    /// The rule of step `t`, counted from 1; gradients are multiplied by `scale`.
    pub(super) fn step(self, t: i32, rate: f64, decay: f64, scale: f32) -> StepRule {
        let coupled = Decay {
            scale,
            coupled: decay as f32,
            decay: 1.0,
        };
        match self {
            Self::Sgd { momentum, nesterov } => StepRule::Sgd(Sgd {
                decay: coupled,
                rate: rate as f32,
                momentum: momentum as f32,
                nesterov,
            }),
            Self::Adam(betas) => StepRule::Adam(betas.step(t, rate, coupled)),
            Self::AdamW(betas) => {
                let decoupled = Decay {
                    scale,
                    coupled: 0.0,
                    decay: (1.0 - rate * decay) as f32,
                };
                StepRule::Adam(betas.step(t, rate, decoupled))
            }
        }
    }
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

/// The numbers of one step of one variable.
#[derive(Debug, Clone, Copy)]
pub(super) enum StepRule {
    Sgd(Sgd),
    Adam(Adam),
}

impl StepRule {
    /// Updates a variable along the accumulated gradient, or else along `gradient`.
    pub(super) fn update(
        self,
        p: &mut Parameter,
        kernels: Kernels,
        gradient: Option<&Tensor>,
    ) -> Result<()> {
        let sum = p.sum.take();
        if !p.fused {
            return match tensor(&sum).or(gradient) {
                Some(g) => self.on_device(p, &g.detach()),
                None => Ok(()),
            };
        }
        let (var, first, second) = (p.var.clone(), host(&mut p.first), host(&mut p.second));
        let mut run = |g: &[f32]| {
            Ok(var.inplace_op1(&UpdateInPlace(RefCell::new(FusedUpdate {
                kernels,
                rule: self,
                g,
                first,
                second,
            })))?)
        };
        match (&sum, gradient) {
            (Some(MomentStorage::Host(sum)), _) => run(sum),
            (_, Some(g)) => with_floats(g, run),
            (_, None) => Ok(()),
        }
    }

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
                p.first = Some(MomentStorage::Device(b));
                direction
            }
            (Self::Adam(step), Some(m), Some(v)) => {
                let m = (m + ((&g - m)? * f64::from(step.new1))?)?;
                let v = ((v * f64::from(step.beta2))? + (g.sqr()? * f64::from(step.new2))?)?;
                let direction = (&m
                    / v.sqrt()?
                        .affine(f64::from(step.root), f64::from(step.eps))?)?;
                (p.first, p.second) = (
                    Some(MomentStorage::Device(m)),
                    Some(MomentStorage::Device(v)),
                );
                direction
            }
            _ => g,
        };
        Ok(p.var
            .set(&((w * f64::from(decay.decay))? - (direction * f64::from(rate))?)?)?)
    }
}

#[derive(Debug)]
struct FusedUpdate<'a> {
    kernels: Kernels,
    rule: StepRule,
    g: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
}

/// The operation by which candle writes into a variable.
struct UpdateInPlace<'a>(RefCell<FusedUpdate<'a>>);

impl InplaceOp1 for UpdateInPlace<'_> {
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
            StepRule::Sgd(step) if update.first.is_empty() => {
                parts.for_each(|(w, g)| kernels.sgd(w, g, &mut [], &step))
            }
            StepRule::Sgd(step) => parts
                .zip(update.first.par_chunks_mut(PART))
                .for_each(|((w, g), b)| kernels.sgd(w, g, b, &step)),
            StepRule::Adam(step) => {
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
