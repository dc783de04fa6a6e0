//! The loop: losses, gradients, steps, evaluations.

use super::config::QATConfig;
use super::linear::Linears;
use super::optimizer::Optimizer;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use candle_nn::VarMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What is trained: a model with its data.
///
/// Equal `(step, micro)` must give equal losses for equal variables, so that a training that was interrupted goes on with the same bits: draw
/// batches, dropout and other randomness from the seed and these two numbers.
pub trait Task {
    /// The variables that are trained.
    fn vars(&self) -> &VarMap;

    /// The scalar loss of micro-batch `micro` of `step`, both counted from 0.
    ///
    /// # Errors
    /// Whatever keeps the model from computing it.
    fn loss(&mut self, step: u64, micro: u64) -> Result<Tensor>;

    /// How good the model is on data that it is not trained on; lower is better.
    ///
    /// # Errors
    /// As [`Task::loss`].
    fn evaluate(&mut self) -> Result<f64>;

    /// The model's linear layers, where it shows them: for telemetry and the schedule of quantization.
    fn linears(&mut self) -> Option<&mut dyn Linears> {
        None
    }

    /// What, beside the variables and the step, decides the losses: the seed, which data. It is kept in checkpoints.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// A checkpoint with this state goes on: refuse what does not fit.
    ///
    /// # Errors
    /// One line that names what differs.
    fn restore(&mut self, state: &serde_json::Value) -> Result<()> {
        let _ = state;
        Ok(())
    }

    /// How much a micro-batch holds, and of what: 64 images, 2048 tokens.
    fn batch(&self) -> (u64, &'static str) {
        (1, "batches")
    }
}

/// One step that was taken.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Step {
    /// Counted from 1.
    pub step: u64,
    /// How many there will be.
    pub steps: u64,
    /// Mean loss of its micro-batches, before the update.
    pub loss: f64,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Units of data, as [`Task::batch`] counts them.
    pub units: u64,
    /// Seconds that it took.
    pub seconds: f64,
}

/// One evaluation.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// Steps taken before.
    pub step: u64,
    /// What [`Task::evaluate`] said.
    pub value: f64,
    /// The lowest so far, this one included.
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
    Step(&'a Step),
    /// The model was evaluated.
    Evaluated(&'a Evaluation),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Hears of everything that happens, and may stop the training at the next step's end by [`ControlFlow::Break`].
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
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
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// Steps taken.
    pub step: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// The last evaluation; none where the training was interrupted before it.
    pub evaluation: Option<Evaluation>,
    /// Why it ended.
    pub stopped: Stopped,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Seconds of this run.
    pub seconds: f64,
}

/// Trains as its configuration says.
#[derive(Debug)]
pub struct QATTrainer {
    config: QATConfig,
}

/// Where a training stands.
#[derive(Debug, Clone, PartialEq)]
struct Progress {
    /// Steps taken.
    step: u64,
    loss: f64,
    evaluation: Option<Evaluation>,
    /// Evaluations since the best one.
    worse: u64,
}

impl QATTrainer {
    /// # Errors
    /// As [`QATConfig::validate`].
    pub fn new(config: QATConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// The configuration.
    pub fn config(&self) -> &QATConfig {
        &self.config
    }

    /// The gradients of a loss.
    ///
    /// # Errors
    /// [`Error::Diverged`] for a loss that is no number, [`Error::Input`] for one that is no scalar.
    pub fn backward_with_ste(&self, loss: &Tensor) -> Result<GradStore> {
        finite(loss, 0, &None)?;
        Ok(loss.backward()?)
    }

    /// Trains from the beginning.
    ///
    /// # Errors
    /// [`Error::Diverged`] where loss or gradients are no numbers; whatever the task says.
    pub fn run(&mut self, task: &mut dyn Task, callback: &mut dyn Callback) -> Result<Outcome> {
        let begin = Instant::now();
        let mut optimizer = Optimizer::new(task.vars(), &self.config.optimizer)?;
        let mut progress = Progress { step: 0, loss: f64::NAN, evaluation: None, worse: 0 };
        let mut stopped = Stopped::Finished;
        let mut flow = callback.on(&Event::Begin { step: progress.step, steps: self.config.steps });
        while progress.step < self.config.steps {
            if flow.is_break() {
                stopped = Stopped::Interrupted;
                break;
            }
            let report = self.step(task, &mut optimizer, progress.step)?;
            (progress.step, progress.loss) = (report.step, report.loss);
            flow = callback.on(&Event::Step(&report));
            let every = self.config.evaluate_every;
            if progress.step == self.config.steps || (every > 0 && progress.step.is_multiple_of(every)) {
                let evaluation = self.evaluate(task, &mut progress)?;
                if callback.on(&Event::Evaluated(&evaluation)).is_break() {
                    flow = ControlFlow::Break(());
                }
                if self.config.early_stopping.is_some_and(|stop| progress.worse >= stop.patience) {
                    stopped = Stopped::Early;
                    break;
                }
            }
        }
        let Progress { step, loss, evaluation, .. } = progress;
        Ok(Outcome { step, loss, evaluation, stopped, checkpoint: None, seconds: begin.elapsed().as_secs_f64() })
    }

    fn step(&self, task: &mut dyn Task, optimizer: &mut Optimizer, t: u64) -> Result<Step> {
        let begin = Instant::now();
        let (config, mut loss, mut norm) = (&self.config, 0.0, 0.0);
        let mut rates = config.schedule.rates(t, config.steps);
        rates.clip = config.clip;
        for micro in 0..config.accumulate {
            let value = task.loss(t, micro)?;
            loss += finite(&value, t + 1, &None)? / config.accumulate as f64;
            let grads = value.backward()?;
            if micro + 1 < config.accumulate {
                optimizer.accumulate(&grads)?;
            } else {
                norm = optimizer.step(&grads, rates)?;
            }
        }
        if !norm.is_finite() {
            return Err(Error::Diverged { step: t + 1, what: "norm of the gradients", got: norm, checkpoint: None });
        }
        Ok(Step {
            step: t + 1,
            steps: config.steps,
            loss,
            gradient_norm: norm,
            learning_rate: config.optimizer.learning_rate * rates.learning_rate,
            units: task.batch().0 * config.accumulate,
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    fn evaluate(&self, task: &mut dyn Task, progress: &mut Progress) -> Result<Evaluation> {
        let value = task.evaluate()?;
        let before = progress.evaluation.map_or(f64::INFINITY, |e| e.best);
        let delta = self.config.early_stopping.map_or(0.0, |stop| stop.min_delta);
        progress.worse = if value < before - delta { 0 } else { progress.worse + 1 };
        let evaluation = Evaluation { step: progress.step, value, best: value.min(before) };
        progress.evaluation = Some(evaluation);
        Ok(evaluation)
    }
}

/// The value of a loss.
fn finite(loss: &Tensor, step: u64, checkpoint: &Option<PathBuf>) -> Result<f64> {
    if loss.elem_count() != 1 {
        return Err(Error::input("loss", "a scalar", format!("shape {:?}", loss.dims())));
    }
    let got = f64::from(loss.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?[0]);
    if got.is_finite() { Ok(got) } else { Err(Error::Diverged { step, what: "loss", got, checkpoint: checkpoint.clone() }) }
}
