//! Events of a training (steps, evaluations, records of layers) and the callbacks that receive
//! them.

use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The report of one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingStep {
    /// Counted from 1.
    pub step: u64,
    /// Steps of the whole training.
    pub steps: u64,
    /// Mean loss of the micro-batches before the update, regularization included.
    pub loss: f64,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Amount of data, in the unit of [`Task::batch`](super::Task::batch).
    pub units: u64,
    /// Duration in seconds.
    pub seconds: f64,
}

/// The report of one evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps taken before.
    pub step: u64,
    /// The result of [`Task::evaluate`](super::Task::evaluate).
    pub value: f64,
    /// The lowest value so far, this one included. Evaluations before
    /// [`Progressive::settled`](super::Progressive::settled) do not count, because the model is not
    /// yet quantized as it will be packed.
    pub best: f64,
}

/// An event that a [`Callback`] receives.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The training begins or resumes.
    Begin {
        /// Steps taken before.
        step: u64,
        /// Steps of the whole training.
        steps: u64,
    },
    /// A step was taken.
    Step(&'a TrainingStep),
    /// The model was evaluated.
    Evaluated(&'a Evaluation),
    /// A layer was recorded.
    Layer(&'a LayerRecord),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Receives every event. [`ControlFlow::Break`] stops the training at the end of the step.
///
/// `()` ignores events, a closure is a callback, and a tuple passes each event to both its members.
pub trait Callback {
    /// Handles an event.
    fn on(&mut self, event: &Event<'_>) -> ControlFlow<()>;
}

impl Callback for () {
    fn on(&mut self, _: &Event<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl<F: FnMut(&Event<'_>) -> ControlFlow<()>> Callback for F {
    fn on(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        self(event)
    }
}

impl<A: Callback, B: Callback> Callback for (A, B) {
    fn on(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        match (self.0.on(event), self.1.on(event)) {
            (ControlFlow::Continue(()), ControlFlow::Continue(())) => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}

/// Why a training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stopped {
    /// All steps were taken.
    Finished,
    /// Evaluations no longer improved.
    Early,
    /// A callback asked for it.
    Interrupted,
}

/// The result of a training.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Steps taken.
    pub step: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// The last evaluation; `None` if the training was interrupted before the first.
    pub evaluation: Option<Evaluation>,
    /// The evaluation of the model that the variables now hold. After a complete training with
    /// [`evaluate_every`](super::QATConfig::evaluate_every) it is the best one. `None` if the
    /// training was interrupted at a step without an evaluation.
    pub kept: Option<Evaluation>,
    /// Why it ended.
    pub stopped: Stopped,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Duration of this run in seconds.
    pub seconds: f64,
}

/// One layer at one step. Shares are between 0 and 1. Changes are relative to the previous record
/// of the layer, and 0 in the first one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Steps taken.
    pub step: u64,
    /// The name of the layer.
    pub name: String,
    /// λ, the strength of its quantization.
    pub lambda: f32,
    /// Share of weights whose value has changed.
    pub flips: f64,
    /// Share of weights whose value has changed in the direction opposite to its previous change
    /// (Nagel et al. 2022).
    pub oscillation: f64,
    /// Share of weights whose value is 0.
    pub dead_zone: f64,
    /// Mean scale.
    pub scale: f64,
    /// Relative change of the mean scale.
    pub scale_drift: f64,
    /// Norm of the gradient of the latent weights in the last micro-batch.
    pub gradient_norm: f64,
    /// Variance of that gradient over the steps since the previous record, averaged over at most
    /// 1024 evenly spaced weights.
    pub gradient_variance: f64,
}

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
#[non_exhaustive]
pub enum LogRecord {
    /// A step.
    Step(TrainingStep),
    /// An evaluation.
    Evaluation(Evaluation),
    /// A layer.
    Layer(LayerRecord),
}

impl LogRecord {
    /// The step of the record.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Evaluation(evaluation) => evaluation.step,
            Self::Layer(layer) => layer.step,
        }
    }
}
