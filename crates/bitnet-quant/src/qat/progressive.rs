//! Quantization that sets in by and by: fewer bits from stage to stage, more strength from step to
//! step, layer after layer.

use super::{Linear, Linears, Stage};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What each layer rounds to, and how strongly, as a function of the step alone: a resumed training
/// needs nothing but its step.
///
/// ```
/// use bitnet_quant::qat::{Progressive, Stage};
/// let schedule = Progressive { warmup: 50, ..Progressive::halving(8, 100) };
/// assert_eq!(schedule.at("any", 0), (Stage::Bits(8), 0.0));
/// assert_eq!(schedule.at("any", 25), (Stage::Bits(8), 0.5));
/// assert_eq!(schedule.at("any", 100), (Stage::Bits(4), 1.0));
/// assert_eq!(schedule.at("any", 200), (Stage::Bits(2), 1.0));
/// assert_eq!(schedule.at("any", 300), (Stage::Target, 1.0));
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Progressive {
    /// Stages with the step at which each begins, in order. Before the first one, and if there is
    /// none, layers are at their target. A stage of no more bits than a layer's target is its
    /// target.
    pub stages: Vec<(u64, Stage)>,
    /// Steps over which λ goes from 0 to 1; 0 for full strength at once.
    pub warmup: u64,
    /// Layers in the order in which they begin. One that is not among them begins with the first.
    pub order: Vec<String>,
    /// Steps from the beginning of one layer to that of the next. A layer that has not begun
    /// computes in floats.
    pub stagger: u64,
}

impl Progressive {
    /// From so many bits over half as many, and so on to 2, to the target, each for `steps` steps.
    pub fn halving(initial_bits: u32, steps: u64) -> Self {
        let mut stages: Vec<(u64, Stage)> = vec![];
        let mut bits = initial_bits;
        while bits >= 2 {
            stages.push((stages.len() as u64 * steps, Stage::Bits(bits)));
            bits /= 2;
        }
        stages.push((stages.len() as u64 * steps, Stage::Target));
        Self {
            stages,
            ..Self::default()
        }
    }

    /// [`Progressive::halving`] with stages that fill the first half of `steps`.
    pub fn first_half(initial_bits: u32, steps: u64) -> Self {
        let stages = Self::halving(initial_bits, 1).stages.len() as u64 - 1;
        Self::halving(initial_bits, (steps / 2 / stages.max(1)).max(1))
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Invalid`] for stages out of order and for bits that do not exist.
    pub fn validate(&self) -> Result<()> {
        let mut wrong = vec![];
        if !self.stages.is_sorted_by(|a, b| a.0 < b.0) {
            wrong.push(format!(
                "progressive.stages: expected steps in order, got {:?}",
                self.stages.iter().map(|s| s.0).collect::<Vec<_>>()
            ));
        }
        for (_, stage) in &self.stages {
            if let Stage::Bits(bits) = stage
                && ![2, 3, 4, 8].contains(bits)
            {
                wrong.push(format!(
                    "progressive.stages: expected 2, 3, 4 or 8 bits, got {bits}"
                ));
            }
        }
        if self.stagger > 0 && self.order.is_empty() {
            wrong.push(
                "progressive.order: expected the names of layers where stagger is not 0, got none"
                    .into(),
            );
        }
        Error::unless_empty(wrong)
    }

    /// Stage and λ of a layer at a step.
    pub fn at(&self, name: &str, step: u64) -> (Stage, f32) {
        let place = self.order.iter().position(|n| n == name).unwrap_or(0) as u64;
        let begun = step.checked_sub(place.saturating_mul(self.stagger));
        let stage = self
            .stages
            .iter()
            .rev()
            .find(|(from, _)| *from <= begun.unwrap_or(0))
            .map_or(Stage::Target, |s| s.1);
        let lambda = match begun {
            None => 0.0,
            Some(begun) if begun >= self.warmup => 1.0,
            Some(begun) => begun as f32 / self.warmup as f32,
        };
        (stage, lambda)
    }

    /// The step from which on nothing changes, for a model of these layers.
    pub fn settled(&self) -> u64 {
        let last = self.stages.last().map_or(0, |s| s.0).max(self.warmup);
        last.saturating_add(
            self.stagger
                .saturating_mul(self.order.len().saturating_sub(1) as u64),
        )
    }

    /// Puts every layer in training where it is to be at this step, and returns the names of those
    /// that changed their stage: their learned scales begin anew, so a checkpoint is loaded after
    /// this, and not before.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN among the weights.
    pub fn apply(&self, model: &mut dyn Linears, step: u64) -> Result<Vec<String>> {
        let mut changed = vec![];
        model.visit_linears(&mut |name, linear| {
            let Linear::Qat(layer) = linear else {
                return Ok(());
            };
            let (mut stage, lambda) = self.at(name, step);
            if let Stage::Bits(bits) = stage
                && 1 << bits <= layer.target().precision()?.levels()
            {
                stage = Stage::Target;
            }
            if stage != layer.stage() {
                layer.set_stage(stage)?;
                changed.push(name.to_owned());
            }
            layer.set_lambda(lambda);
            Ok(())
        })?;
        Ok(changed)
    }
}
