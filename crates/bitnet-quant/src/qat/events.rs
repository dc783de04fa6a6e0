//! What happens in a training: steps, evaluations, records of layers, and who hears of them.

use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// One step that was taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingStep {
    /// Counted from 1.
    pub step: u64,
    /// How many there will be.
    pub steps: u64,
    /// Mean loss of its micro-batches, before the update, with what is added to it.
    pub loss: f64,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Units of data, as [`Task::batch`](super::Task::batch) counts them.
    pub units: u64,
    /// Seconds that it took.
    pub seconds: f64,
}

/// One evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps taken before.
    pub step: u64,
    /// What [`Task::evaluate`](super::Task::evaluate) said.
    pub value: f64,
    /// The lowest so far, this one included. Those before quantization has settled, see
    /// [`Progressive::settled`](super::Progressive::settled), say nothing about what will be
    /// packed, and count for nothing.
    pub best: f64,
}

/// What a [`Callback`] hears of.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The training begins or goes on.
    Begin {
        /// Steps that were taken before.
        step: u64,
        /// How many there will be.
        steps: u64,
    },
    /// A step was taken.
    Step(&'a TrainingStep),
    /// The model was evaluated.
    Evaluated(&'a Evaluation),
    /// A layer was looked at.
    Layer(&'a LayerRecord),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Hears of everything that happens, and may stop the training at the next step's end by
/// [`ControlFlow::Break`].
///
/// `()` hears nothing; a closure is a callback; of two in a tuple both hear everything.
pub trait Callback {
    /// Something happened.
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
    /// A callback said so.
    Interrupted,
}

/// What a training came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Steps taken.
    pub step: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// The last evaluation; none where the training was interrupted before it.
    pub evaluation: Option<Evaluation>,
    /// The evaluation of the model as the variables now hold it: where evaluations were asked for
    /// ([`QATConfig::evaluate_every`](super::QATConfig::evaluate_every)) the best of a training that has ended. None where the
    /// training was interrupted at a step without one.
    pub kept: Option<Evaluation>,
    /// Why it ended.
    pub stopped: Stopped,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Seconds of this run.
    pub seconds: f64,
}

/// One layer at one step. Shares are between 0 and 1, and "before" is the record before this one;
/// the first has zeros there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Steps taken.
    pub step: u64,
    /// The layer.
    pub name: String,
    /// λ, the strength of its quantization.
    pub lambda: f32,
    /// Share of weights whose value is another one than before.
    pub flips: f64,
    /// Share of weights whose value changed since, in the direction opposite to their change before
    /// that (Nagel et al. 2022).
    pub oscillation: f64,
    /// Share of weights whose value is 0.
    pub dead_zone: f64,
    /// Mean scale.
    pub scale: f64,
    /// Its relative change since.
    pub scale_drift: f64,
    /// Norm of the gradient of the latent weights in the last micro-batch.
    pub gradient_norm: f64,
    /// Variance of that gradient over the steps since, the mean of at most 1024 weights that stand
    /// at equal distances.
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
    /// The step that it is about.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Evaluation(evaluation) => evaluation.step,
            Self::Layer(layer) => layer.step,
        }
    }
}
