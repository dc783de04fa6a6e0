//! One training under way: the loop of steps, evaluations and checkpoints.

use super::checkpoint::{
    self, CheckpointConfig, ExactFloat, LayerRounding, OpenCheckpoint, TrainingState,
};
use super::config::QATConfig;
use super::events::{Callback, Evaluation, Event, LogRecord, Outcome, Stopped, TrainingStep};
use super::linear::{Linear, Linears};
use super::optimizer::Optimizer;
use super::prepare::scale_name;
use super::recompute::backward;
use super::regularization::level_distance;
use super::task::Task;
use super::telemetry::{Log, Telemetry};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The state of a training between two steps.
#[derive(Debug)]
pub(super) struct Training<'a> {
    config: &'a QATConfig,
    /// Latent weights, whose gradients are scaled.
    latent: &'a [Tensor],
    optimizer: Optimizer,
    telemetry: Telemetry,
    log: Option<Log>,
    /// Steps taken.
    step: u64,
    loss: f64,
    evaluation: Option<Evaluation>,
    best: Option<Evaluation>,
    /// Variables of the best evaluation, where no checkpoint holds them.
    variables: Vec<Tensor>,
    /// Evaluations since the best one.
    worse: u64,
    /// The newest checkpoint.
    checkpoint: Option<PathBuf>,
    /// Why the training ended, once it has.
    stopped: Option<Stopped>,
    /// Break, once a callback has asked for it.
    flow: ControlFlow<()>,
}

impl<'a> Training<'a> {
    /// A training that has taken no step.
    pub(super) fn begin(
        config: &'a QATConfig,
        latent: &'a [Tensor],
        task: &dyn Task,
    ) -> Result<Self> {
        Ok(Self {
            config,
            latent,
            optimizer: Optimizer::new(task.vars(), &config.optimizer)?,
            telemetry: Telemetry::new(config.telemetry.every)?,
            log: None,
            step: 0,
            loss: 0.0,
            evaluation: None,
            best: None,
            variables: vec![],
            worse: 0,
            checkpoint: None,
            stopped: None,
            flow: ControlFlow::Continue(()),
        })
    }

    /// Continues from a checkpoint in `folder`.
    pub(super) fn restore(
        &mut self,
        folder: &Path,
        path: PathBuf,
        task: &mut dyn Task,
    ) -> Result<()> {
        let found = OpenCheckpoint::new(&path, &self.optimizer, &self.config.numbers()?)?;
        let state = &found.state;
        let best = state.best.filter(|_| self.config.evaluate_every > 0);
        let best = best.map(|(step, ExactFloat(value))| Evaluation {
            step,
            value,
            best: value,
        });
        if let Some(missing) = best
            .map(|best| checkpoint::path(folder, best.step))
            .filter(|path| !path.exists())
        {
            let expected = "the checkpoint of the best evaluation";
            return Err(bitnet_formats::Error::file(&missing, expected, "none").into());
        }
        task.restore(&state.task)?;
        if let Some(model) = task.linears() {
            restore_rounding(model, &state.layers)?;
        }
        found.load(&mut self.optimizer)?;
        if self.telemetry.is_on() {
            self.telemetry.restore(&found.telemetry()?);
        }
        self.step = state.step;
        self.loss = state.loss.0;
        self.evaluation = state.evaluation.map(|(step, value, best)| Evaluation {
            step,
            value: value.0,
            best: best.0,
        });
        self.best = best;
        self.worse = state.worse;
        self.checkpoint = Some(path);
        // A training that was interrupted has steps left to take.
        self.stopped = state.stopped.filter(|s| *s != Stopped::Interrupted);
        Ok(())
    }

    /// Takes the remaining steps.
    pub(super) fn run(
        mut self,
        task: &mut dyn Task,
        callback: &mut dyn Callback,
    ) -> Result<Outcome> {
        let begin = Instant::now();
        if let Some(path) = &self.config.telemetry.file {
            self.log = Some(Log::open(path, self.step)?);
        }
        self.tell(
            callback,
            &Event::Begin {
                step: self.step,
                steps: self.config.steps,
            },
        );
        let stopped = loop {
            if let Some(stopped) = self.stopped {
                break stopped;
            }
            let report = self.take_step(task, callback)?;
            self.tell(callback, &Event::Step(&report));
            self.write_log(|| LogRecord::Step(report))?;
            let best = self.evaluate_if_due(task, callback)?;
            self.stopped = self.reason_to_stop();
            self.save_if_due(task, callback, best)?;
        };
        let mut kept = self.evaluation.filter(|e| e.step == self.step);
        if stopped != Stopped::Interrupted
            && let Some(best) = self.best
        {
            self.restore_best(best.step)?;
            kept = Some(best);
        }
        Ok(Outcome {
            step: self.step,
            loss: self.loss,
            evaluation: self.evaluation,
            kept,
            stopped,
            checkpoint: self.checkpoint,
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    fn tell(&mut self, callback: &mut dyn Callback, event: &Event<'_>) {
        if callback.on(event).is_break() {
            self.flow = ControlFlow::Break(());
        }
    }

    fn write_log(&mut self, record: impl FnOnce() -> LogRecord) -> Result<()> {
        match &mut self.log {
            Some(log) => log.append(&record()),
            None => Ok(()),
        }
    }

    fn reason_to_stop(&self) -> Option<Stopped> {
        let early = self.config.early_stopping;
        if self.step == self.config.steps {
            Some(Stopped::Finished)
        } else if early.is_some_and(|stop| self.worse >= stop.patience) {
            Some(Stopped::Early)
        } else {
            self.flow.is_break().then_some(Stopped::Interrupted)
        }
    }

    /// Variables as they were after `step`, where the best evaluation was.
    fn restore_best(&mut self, step: u64) -> Result<()> {
        match &self.config.checkpoint {
            _ if step == self.step => Ok(()),
            Some(config) => {
                let path = checkpoint::path(&config.folder, step);
                OpenCheckpoint::new(&path, &self.optimizer, &self.config.numbers()?)?
                    .load(&mut self.optimizer)
            }
            None => {
                let parameters = self.optimizer.parameters.iter();
                Ok(parameters
                    .zip(&self.variables)
                    .try_for_each(|(p, value)| p.var.set(value))?)
            }
        }
    }

    fn diverged(&self, step: u64, what: &'static str, got: f64) -> Error {
        Error::Diverged {
            step,
            what,
            got,
            checkpoint: self.checkpoint.clone(),
        }
    }

    fn take_step(
        &mut self,
        task: &mut dyn Task,
        callback: &mut dyn Callback,
    ) -> Result<TrainingStep> {
        let begin = Instant::now();
        let (config, step, mut loss, mut norm) = (self.config, self.step + 1, 0.0, 0.0);
        let mut rates = config.schedule.rates(self.step, config.steps);
        rates.clip = config.clip;
        if let (Some(progressive), Some(model)) = (&config.progressive, task.linears()) {
            for name in progressive.apply(model, self.step)? {
                self.optimizer.reset_moments(&scale_name(&name))?;
            }
        }
        for micro in 0..config.accumulate {
            let value = self.loss(task, micro)?;
            let number = scalar(&value)?;
            if !number.is_finite() {
                return Err(self.diverged(step, "loss", number));
            }
            loss += number / config.accumulate as f64;
            let grads = gradients(config, self.latent, &value)?;
            drop(value);
            if micro + 1 < config.accumulate {
                self.optimizer.accumulate(&grads)?;
                continue;
            }
            if self.telemetry.is_on()
                && let Some(model) = task.linears()
            {
                self.telemetry.gradients(model, &grads)?;
            }
            norm = self.optimizer.step(&grads, rates)?;
            if !norm.is_finite() {
                return Err(self.diverged(step, "norm of the gradients", norm));
            }
        }
        (self.step, self.loss) = (step, loss);
        if self.telemetry.is_on()
            && let Some(model) = task.linears()
        {
            for record in self.telemetry.records(model, step)? {
                self.tell(callback, &Event::Layer(&record));
                self.write_log(|| LogRecord::Layer(record))?;
            }
        }
        Ok(TrainingStep {
            step,
            steps: config.steps,
            loss,
            gradient_norm: norm,
            learning_rate: config.optimizer.learning_rate * rates.learning_rate,
            units: task.batch().0 * config.accumulate,
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    /// The loss of a micro-batch with its regularization.
    fn loss(&self, task: &mut dyn Task, micro: u64) -> Result<Tensor> {
        let mut loss = task.loss(self.step, micro)?;
        let factor = self.config.level_regularization;
        if factor > 0.0
            && let Some(model) = task.linears()
        {
            loss = (loss + (level_distance(model)? * factor)?)?;
        }
        Ok(loss)
    }

    /// Evaluates at the last step and every [`QATConfig::evaluate_every`]. Returns whether this
    /// evaluation is the best so far.
    fn evaluate_if_due(
        &mut self,
        task: &mut dyn Task,
        callback: &mut dyn Callback,
    ) -> Result<bool> {
        let (steps, every) = (self.config.steps, self.config.evaluate_every);
        if self.step != steps && (every == 0 || !self.step.is_multiple_of(every)) {
            return Ok(false);
        }
        let evaluation = self.evaluate(task)?;
        self.tell(callback, &Event::Evaluated(&evaluation));
        self.write_log(|| LogRecord::Evaluation(evaluation))?;
        let best = self.best.is_some_and(|best| best.step == self.step);
        if best && self.config.checkpoint.is_none() && self.step < steps {
            let parameters = self.optimizer.parameters.iter();
            self.variables = parameters
                .map(|p| p.var.copy())
                .collect::<candle_core::Result<_>>()?;
        }
        Ok(best)
    }

    fn evaluate(&mut self, task: &mut dyn Task) -> Result<Evaluation> {
        let value = task.evaluate()?;
        if !value.is_finite() {
            return Err(self.diverged(self.step, "evaluation", value));
        }
        let before = self.best.map(|best| best.value);
        let progressive = self.config.progressive.as_ref();
        let settled = progressive.is_none_or(|progressive| self.step > progressive.settled());
        let stop = self.config.early_stopping;
        let delta = stop.map_or(0.0, |stop| stop.min_delta);
        self.worse = if before.is_none_or(|best| value < best - delta) {
            0
        } else {
            self.worse + 1
        };
        let evaluation = Evaluation {
            step: self.step,
            value,
            best: before.map_or(value, |best| best.min(value)),
        };
        self.evaluation = Some(evaluation);
        if settled && before.is_none_or(|best| value < best) {
            self.best = Some(evaluation);
        }
        Ok(evaluation)
    }

    /// Writes a checkpoint where one is due: at the end, after the `best` evaluation and every
    /// [`CheckpointConfig::every`] steps.
    fn save_if_due(
        &mut self,
        task: &mut dyn Task,
        callback: &mut dyn Callback,
        best: bool,
    ) -> Result<()> {
        let Some(config) = &self.config.checkpoint else {
            return Ok(());
        };
        let regular = config.every > 0 && self.step.is_multiple_of(config.every);
        if self.stopped.is_some() || best || regular {
            let path = self.save(config, task)?;
            self.tell(callback, &Event::Saved(&path));
            self.checkpoint = Some(path);
        }
        Ok(())
    }

    fn save(&self, config: &CheckpointConfig, task: &mut dyn Task) -> Result<PathBuf> {
        if !self.optimizer.is_finite()? {
            return Err(self.diverged(self.step, "norm of the weights", f64::NAN));
        }
        let mut layers = BTreeMap::new();
        if let Some(model) = task.linears() {
            model.visit_linears(&mut |name, linear| {
                if let Linear::Qat(layer) = linear {
                    let (stage, lambda) = (layer.stage(), layer.lambda());
                    layers.insert(name.to_string(), LayerRounding { stage, lambda });
                }
                Ok(())
            })?;
        }
        let evaluation = self.evaluation;
        let state = TrainingState {
            version: checkpoint::VERSION,
            step: self.step,
            loss: ExactFloat(self.loss),
            evaluation: evaluation.map(|e| (e.step, ExactFloat(e.value), ExactFloat(e.best))),
            best: self.best.map(|e| (e.step, ExactFloat(e.value))),
            worse: self.worse,
            stopped: self.stopped,
            config: self.config.numbers()?,
            layers,
            task: task.state(),
            checksums: BTreeMap::new(),
        };
        checkpoint::write(config, &self.optimizer, &self.telemetry, state)
    }
}

/// The gradients of a loss, those of latent weights times [`QATConfig::gradient_scaling`].
pub(super) fn gradients(config: &QATConfig, latent: &[Tensor], loss: &Tensor) -> Result<GradStore> {
    let mut grads = backward(loss)?;
    if config.gradient_scaling != 1.0 {
        for weight in latent {
            if let Some(grad) = grads.remove(weight) {
                grads.insert(weight, (grad * config.gradient_scaling)?);
            }
        }
    }
    Ok(grads)
}

/// Sets stage and strength of each layer as they were saved.
fn restore_rounding(
    model: &mut dyn Linears,
    layers: &BTreeMap<String, LayerRounding>,
) -> Result<()> {
    model.visit_linears(&mut |name, linear| {
        if let (Linear::Qat(layer), Some(rounding)) = (linear, layers.get(name)) {
            layer.set_stage(rounding.stage)?;
            layer.set_lambda(rounding.lambda);
        }
        Ok(())
    })
}

/// The value of a loss.
pub(super) fn scalar(loss: &Tensor) -> Result<f64> {
    if loss.elem_count() != 1 {
        return Err(Error::input(
            "loss",
            "a scalar",
            format!("shape {:?}", loss.dims()),
        ));
    }
    Ok(loss
        .detach()
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1::<f64>()?[0])
}
