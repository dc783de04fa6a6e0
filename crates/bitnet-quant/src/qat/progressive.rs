//! Progressive quantization: stages with decreasing bits, strength that grows, layer after layer.

use super::{Linear, Linears, Stage};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Stage and strength of each layer as a function of the step alone, so that a resumed training
/// needs only its step.
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
    /// Stages in order, each with the step at which it begins. Before the first stage layers have
    /// their target scheme. So they have in a stage that has no more bits than the target.
    pub stages: Vec<(u64, Stage)>,
    /// Steps over which λ rises from 0 to 1; 0 begins with λ = 1.
    pub warmup: u64,
    /// Layers in the order in which they begin. Other layers begin with the first.
    pub order: Vec<String>,
    /// Steps between the beginnings of two layers. A layer computes in floats until it begins.
    pub stagger: u64,
}

impl Progressive {
    /// Stages of `initial_bits`, half of that, and so on down to 2 bits, `steps` steps each, then
    /// the target.
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
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) for stages out of order and
    /// unsupported bits.
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

    /// The step after which stage and strength no longer change.
    pub fn settled(&self) -> u64 {
        let last = self.stages.last().map_or(0, |s| s.0).max(self.warmup);
        last.saturating_add(
            self.stagger
                .saturating_mul(self.order.len().saturating_sub(1) as u64),
        )
    }

    /// Sets stage and strength of every layer in training for this step. Returns the names of the
    /// layers that changed their stage. A change of stage resets learned scales, so load a
    /// checkpoint after this call.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among the weights.
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
