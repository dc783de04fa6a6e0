//! The loop: losses, gradients, steps, evaluations.

use super::checkpoint::{self, Checked, CheckpointConfig, Exact, Rounding, State};
use super::config::QATConfig;
use super::linear::{Linear, Linears};
use super::optimizer::Optimizer;
use super::prepare::scale_name;
use super::recompute::backward;
use super::regularization::level_distance;
use super::telemetry::{LayerRecord, Line, Log, Telemetry};
use crate::{CheckpointError, Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What is trained: a model with its data.
///
/// Equal `(step, micro)` must give equal losses for equal variables, so that a training that was
/// interrupted goes on with the same bits: draw batches, dropout and other randomness from the seed
/// and these two numbers.
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

    /// The model's linear layers, where it shows them: for telemetry and the schedule of
    /// quantization.
    fn linears(&mut self) -> Option<&mut dyn Linears> {
        None
    }

    /// What, beside the variables and the step, decides the losses: the seed, which data. It is
    /// kept in checkpoints.
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
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
    /// Units of data, as [`Task::batch`] counts them.
    pub units: u64,
    /// Seconds that it took.
    pub seconds: f64,
}

/// One evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps taken before.
    pub step: u64,
    /// What [`Task::evaluate`] said.
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
    Step(&'a Step),
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
    /// ([`QATConfig::evaluate_every`]) the best of a training that has ended. None where the
    /// training was interrupted at a step without one.
    pub kept: Option<Evaluation>,
    /// Why it ended.
    pub stopped: Stopped,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Seconds of this run.
    pub seconds: f64,
}

/// Trains as its configuration says.
///
/// ```
/// # use bitnet_quant::{Result, qat::{Linear, Linears, QATConfig, QATTrainer, StraightThroughEstimator, Task}};
/// # use candle_core::{DType, Device, Module, Tensor};
/// # use candle_nn::{Init, VarBuilder, VarMap};
/// struct Line { vars: VarMap, layer: Linear }
///
/// impl Linears for Line {
///     fn visit_linears(&mut self, visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>) -> Result<()> {
///         visit("layer", &mut self.layer)
///     }
/// }
///
/// impl Task for Line {
///     fn vars(&self) -> &VarMap {
///         &self.vars
///     }
///     fn loss(&mut self, step: u64, _: u64) -> Result<Tensor> {
///         let x = Tensor::new(&[[1f32, (step % 7) as f32]], &Device::Cpu)?;
///         Ok((self.layer.forward(&x)? - x.sum_all()?.to_scalar::<f32>()? as f64)?.sqr()?.sum_all()?)
///     }
///     fn evaluate(&mut self) -> Result<f64> {
///         Ok(self.loss(3, 0)?.to_scalar::<f32>()?.into())
///     }
///     fn linears(&mut self) -> Option<&mut dyn Linears> {
///         Some(self)
///     }
/// }
///
/// let vars = VarMap::new();
/// vars.get((1, 2), "layer.weight", Init::Const(0.1), DType::F32, &Device::Cpu)?;
/// let layer = Linear::new(2, 1, false, &VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("layer"))?;
/// let mut task = Line { vars: vars.clone(), layer };
/// let mut trainer = QATTrainer::new(QATConfig::builder().steps(200).learning_rate(0.02).build()?)?;
/// trainer.prepare(&mut task, &vars)?;
/// let outcome = trainer.run(&mut task, &mut ())?;
/// assert_eq!(outcome.step, 200);
/// assert!(outcome.evaluation.is_some_and(|e| e.value < 1.0), "{outcome:?}");
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug)]
pub struct QATTrainer {
    config: QATConfig,
    /// Latent weights, whose gradients are scaled.
    latent: Vec<Tensor>,
}

/// A training under way.
#[derive(Debug)]
struct Training {
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
    checkpoint: Option<PathBuf>,
}

impl QATTrainer {
    /// A trainer of any number of tasks, one after another.
    ///
    /// # Errors
    /// As [`QATConfig::validate`].
    pub fn new(config: QATConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            latent: vec![],
        })
    }

    /// The configuration.
    pub fn config(&self) -> &QATConfig {
        &self.config
    }

    /// [`prepare`](super::prepare) by the configuration: the linear layers that it quantizes become
    /// layers in training, with a dead-zone bias where that is configured. Returns their names.
    ///
    /// # Errors
    /// As [`prepare`](super::prepare); [`Error::Input`] for a dead-zone bias that no layer can
    /// have.
    pub fn prepare(&mut self, model: &mut dyn Linears, vars: &VarMap) -> Result<Vec<String>> {
        let names = super::prepare(
            model,
            &self.config.quantization,
            self.config.estimator,
            vars,
        )?;
        let (beta, mut without) = (self.config.dead_zone_bias, true);
        if beta != 0.0 {
            model.visit_linears(&mut |_, linear| match linear {
                Linear::Qat(layer) if layer.has_dead_zone() => {
                    without = false;
                    layer.set_dead_zone_bias(beta)
                }
                _ => Ok(()),
            })?;
            if without {
                return Err(Error::input(
                    "dead-zone bias",
                    "layers of ternary weights of one plane",
                    "none",
                ));
            }
        }
        self.look_for_latent(model)?;
        Ok(names)
    }

    fn look_for_latent(&mut self, model: &mut dyn Linears) -> Result<()> {
        self.latent.clear();
        model.visit_linears(&mut |_, linear| {
            if let Linear::Qat(layer) = linear {
                self.latent.push(layer.weight().clone());
            }
            Ok(())
        })
    }

    /// The gradients of a scalar loss, those of latent weights times `gradient_scaling`. For loops
    /// of one's own; [`QATTrainer::run`] does it by itself.
    ///
    /// # Errors
    /// [`Error::Input`] for a loss that is no scalar, or no number.
    pub fn backward_with_ste(&self, loss: &Tensor) -> Result<GradStore> {
        let value = scalar(loss)?;
        if !value.is_finite() {
            return Err(Error::input("loss", "a number", value));
        }
        self.gradients(loss)
    }

    /// Puts every layer of a model where the schedule of quantization has it at `step`, 0 being the
    /// first. A loop of one's own counts in what it likes, epochs for instance, with that many
    /// `steps` in the configuration. Returns the names of the layers that changed their stage.
    ///
    /// # Errors
    /// As [`Progressive::apply`](super::Progressive::apply).
    pub fn update_quantization_schedule(
        &self,
        step: u64,
        model: &mut dyn Linears,
    ) -> Result<Vec<String>> {
        self.config
            .progressive
            .as_ref()
            .map_or(Ok(vec![]), |progressive| progressive.apply(model, step))
    }

    fn gradients(&self, loss: &Tensor) -> Result<GradStore> {
        let mut grads = backward(loss)?;
        if self.config.gradient_scaling != 1.0 {
            for latent in &self.latent {
                if let Some(grad) = grads.remove(latent) {
                    grads.insert(latent, (grad * self.config.gradient_scaling)?);
                }
            }
        }
        Ok(grads)
    }

    /// Trains from the beginning. Where checkpoints are configured, their folder must not hold any
    /// yet.
    ///
    /// # Errors
    /// [`Error::Diverged`] where loss or gradients are no numbers; [`Error::Exists`] for a folder
    /// with checkpoints; whatever the task says.
    pub fn run(&mut self, task: &mut dyn Task, callback: &mut dyn Callback) -> Result<Outcome> {
        if let Some(config) = &self.config.checkpoint
            && let Some((_, path)) = checkpoint::checkpoints(&config.folder)?.pop()
        {
            return Err(CheckpointError::Exists { path }.into());
        }
        let training = self.begin(task)?;
        self.go_on(task, callback, training, None)
    }

    /// Goes on from the newest checkpoint with the same bits as if the training had never stopped.
    ///
    /// # Errors
    /// As [`QATTrainer::run`]; [`Error::Mismatch`] for a checkpoint of another model or
    /// configuration, [`Error::File`] for a folder without checkpoints and for one that is damaged.
    pub fn resume(&mut self, task: &mut dyn Task, callback: &mut dyn Callback) -> Result<Outcome> {
        let Some(config) = self.config.checkpoint.clone() else {
            return Err(Error::input("checkpoint", "a folder to go on from", "none"));
        };
        let Some((_, path)) = checkpoint::checkpoints(&config.folder)?.pop() else {
            return Err(bitnet_formats::Error::file(
                &config.folder,
                "a checkpoint to go on from",
                "none",
            )
            .into());
        };
        let mut training = self.begin(task)?;
        let found = Checked::open(&path, &training.optimizer, &self.config.numbers()?)?;
        let State {
            step,
            loss: Exact(loss),
            worse,
            stopped,
            ref layers,
            task: ref of_task,
            ..
        } = found.state;
        let evaluation = found
            .state
            .evaluation
            .map(|(step, value, best)| Evaluation {
                step,
                value: value.0,
                best: best.0,
            });
        let best = found.state.best.filter(|_| self.config.evaluate_every > 0);
        let best = best.map(|(step, Exact(value))| Evaluation {
            step,
            value,
            best: value,
        });
        if let Some(gone) = best
            .map(|best| checkpoint::path(&config.folder, best.step))
            .filter(|path| !path.exists())
        {
            return Err(bitnet_formats::Error::file(
                &gone,
                "the checkpoint of the best evaluation",
                "none",
            )
            .into());
        }
        task.restore(of_task)?;
        if let Some(model) = task.linears() {
            restore_rounding(model, layers)?;
        }
        found.load(&mut training.optimizer)?;
        if training.telemetry.is_on() {
            training.telemetry.restore(&found.telemetry()?);
        }
        training = Training {
            step,
            loss,
            evaluation,
            best,
            worse,
            checkpoint: Some(path),
            ..training
        };
        self.go_on(task, callback, training, stopped)
    }

    fn begin(&mut self, task: &mut dyn Task) -> Result<Training> {
        if let Some(model) = task.linears() {
            self.look_for_latent(model)?;
        }
        Ok(Training {
            optimizer: Optimizer::new(task.vars(), &self.config.optimizer)?,
            telemetry: Telemetry::new(self.config.telemetry.every)?,
            log: None,
            step: 0,
            loss: 0.0,
            evaluation: None,
            best: None,
            variables: vec![],
            worse: 0,
            checkpoint: None,
        })
    }

    fn go_on(
        &self,
        task: &mut dyn Task,
        callback: &mut dyn Callback,
        mut now: Training,
        stopped: Option<Stopped>,
    ) -> Result<Outcome> {
        let begin = Instant::now();
        let (steps, every) = (self.config.steps, self.config.evaluate_every);
        if let Some(path) = &self.config.telemetry.file {
            now.log = Some(Log::open(path, now.step)?);
        }
        let mut flow = callback.on(&Event::Begin {
            step: now.step,
            steps,
        });
        // One that was interrupted has more to do.
        let mut stopped = stopped.filter(|s| *s != Stopped::Interrupted);
        while stopped.is_none() {
            let report = self.step(task, callback, &mut now, &mut flow)?;
            break_if(&mut flow, callback.on(&Event::Step(&report)));
            now.log(|| Line::Step(report))?;
            let mut best = false;
            if now.step == steps || (every > 0 && now.step.is_multiple_of(every)) {
                let evaluation = self.evaluate(task, &mut now)?;
                break_if(&mut flow, callback.on(&Event::Evaluated(&evaluation)));
                now.log(|| Line::Evaluation(evaluation))?;
                best = now.best.is_some_and(|best| best.step == now.step);
                if best && self.config.checkpoint.is_none() && now.step < steps {
                    now.variables = now
                        .optimizer
                        .parameters
                        .iter()
                        .map(|p| p.var.copy())
                        .collect::<candle_core::Result<_>>()?;
                }
            }
            stopped = if now.step == steps {
                Some(Stopped::Finished)
            } else if self
                .config
                .early_stopping
                .is_some_and(|stop| now.worse >= stop.patience)
            {
                Some(Stopped::Early)
            } else {
                flow.is_break().then_some(Stopped::Interrupted)
            };
            if let Some(config) = &self.config.checkpoint
                && (stopped.is_some()
                    || best
                    || (config.every > 0 && now.step.is_multiple_of(config.every)))
            {
                let path = self.save(config, task, &now, stopped)?;
                break_if(&mut flow, callback.on(&Event::Saved(&path)));
                now.checkpoint = Some(path);
            }
        }
        let stopped = stopped.unwrap_or(Stopped::Interrupted);
        let mut kept = now.evaluation.filter(|e| e.step == now.step);
        if stopped != Stopped::Interrupted
            && let Some(best) = now.best
        {
            self.restore_best(&mut now, best.step)?;
            kept = Some(best);
        }
        let Training {
            step,
            loss,
            evaluation,
            checkpoint,
            ..
        } = now;
        Ok(Outcome {
            step,
            loss,
            evaluation,
            kept,
            stopped,
            checkpoint,
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    /// Variables as they were after `step`, where the best evaluation was.
    fn restore_best(&self, now: &mut Training, step: u64) -> Result<()> {
        match &self.config.checkpoint {
            _ if step == now.step => Ok(()),
            Some(config) => {
                let path = checkpoint::path(&config.folder, step);
                Checked::open(&path, &now.optimizer, &self.config.numbers()?)?
                    .load(&mut now.optimizer)
            }
            None => Ok(now
                .optimizer
                .parameters
                .iter()
                .zip(&now.variables)
                .try_for_each(|(p, value)| p.var.set(value))?),
        }
    }

    fn step(
        &self,
        task: &mut dyn Task,
        callback: &mut dyn Callback,
        now: &mut Training,
        flow: &mut ControlFlow<()>,
    ) -> Result<Step> {
        let begin = Instant::now();
        let (config, step, mut loss, mut norm) = (&self.config, now.step + 1, 0.0, 0.0);
        let diverged = |what, got, now: &Training| Error::Diverged {
            step,
            what,
            got,
            checkpoint: now.checkpoint.clone(),
        };
        let mut rates = config.schedule.rates(now.step, config.steps);
        rates.clip = config.clip;
        if let Some(model) = task.linears() {
            for name in self.update_quantization_schedule(now.step, model)? {
                now.optimizer.forget(&scale_name(&name))?;
            }
        }
        for micro in 0..config.accumulate {
            let mut value = task.loss(now.step, micro)?;
            if config.level_regularization > 0.0
                && let Some(model) = task.linears()
            {
                value = (value + (level_distance(model)? * config.level_regularization)?)?;
            }
            let number = scalar(&value)?;
            if !number.is_finite() {
                return Err(diverged("loss", number, now));
            }
            loss += number / config.accumulate as f64;
            let grads = self.gradients(&value)?;
            drop(value);
            if micro + 1 < config.accumulate {
                now.optimizer.accumulate(&grads)?;
                continue;
            }
            if now.telemetry.is_on()
                && let Some(model) = task.linears()
            {
                now.telemetry.gradients(model, &grads)?;
            }
            norm = now.optimizer.step(&grads, rates)?;
            if !norm.is_finite() {
                return Err(diverged("norm of the gradients", norm, now));
            }
        }
        (now.step, now.loss) = (step, loss);
        if now.telemetry.is_on()
            && let Some(model) = task.linears()
        {
            for record in now.telemetry.records(model, step)? {
                break_if(flow, callback.on(&Event::Layer(&record)));
                now.log(|| Line::Layer(record))?;
            }
        }
        Ok(Step {
            step,
            steps: config.steps,
            loss,
            gradient_norm: norm,
            learning_rate: config.optimizer.learning_rate * rates.learning_rate,
            units: task.batch().0 * config.accumulate,
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    fn evaluate(&self, task: &mut dyn Task, now: &mut Training) -> Result<Evaluation> {
        let value = task.evaluate()?;
        if !value.is_finite() {
            return Err(Error::Diverged {
                step: now.step,
                what: "evaluation",
                got: value,
                checkpoint: now.checkpoint.clone(),
            });
        }
        let before = now.best.map(|best| best.value);
        let settled = self
            .config
            .progressive
            .as_ref()
            .is_none_or(|progressive| now.step > progressive.settled());
        let delta = self
            .config
            .early_stopping
            .map_or(0.0, |stop| stop.min_delta);
        now.worse = if before.is_none_or(|best| value < best - delta) {
            0
        } else {
            now.worse + 1
        };
        let evaluation = Evaluation {
            step: now.step,
            value,
            best: before.map_or(value, |best| best.min(value)),
        };
        now.evaluation = Some(evaluation);
        if settled && before.is_none_or(|best| value < best) {
            now.best = Some(evaluation);
        }
        Ok(evaluation)
    }

    fn save(
        &self,
        config: &CheckpointConfig,
        task: &mut dyn Task,
        now: &Training,
        stopped: Option<Stopped>,
    ) -> Result<PathBuf> {
        if !now.optimizer.is_finite()? {
            return Err(Error::Diverged {
                step: now.step,
                what: "norm of the weights",
                got: f64::NAN,
                checkpoint: now.checkpoint.clone(),
            });
        }
        let mut layers = BTreeMap::new();
        if let Some(model) = task.linears() {
            model.visit_linears(&mut |name, linear| {
                if let Linear::Qat(layer) = linear {
                    layers.insert(
                        name.to_string(),
                        Rounding {
                            stage: layer.stage(),
                            lambda: layer.lambda(),
                        },
                    );
                }
                Ok(())
            })?;
        }
        let state = State {
            version: checkpoint::VERSION,
            step: now.step,
            loss: Exact(now.loss),
            evaluation: now
                .evaluation
                .map(|e| (e.step, Exact(e.value), Exact(e.best))),
            best: now.best.map(|e| (e.step, Exact(e.value))),
            worse: now.worse,
            stopped,
            config: self.config.numbers()?,
            layers,
            task: task.state(),
            checksums: BTreeMap::new(),
        };
        checkpoint::write(config, &now.optimizer, &now.telemetry, state)
    }
}

impl Training {
    fn log(&mut self, line: impl FnOnce() -> Line) -> Result<()> {
        self.log.as_mut().map_or(Ok(()), |log| log.line(&line()))
    }
}

fn break_if(flow: &mut ControlFlow<()>, said: ControlFlow<()>) {
    if said.is_break() {
        *flow = said;
    }
}

/// Layers round as they did.
fn restore_rounding(model: &mut dyn Linears, layers: &BTreeMap<String, Rounding>) -> Result<()> {
    model.visit_linears(&mut |name, linear| {
        if let (Linear::Qat(layer), Some(rounding)) = (linear, layers.get(name)) {
            layer.set_stage(rounding.stage)?;
            layer.set_lambda(rounding.lambda);
        }
        Ok(())
    })
}

/// The value of a loss.
fn scalar(loss: &Tensor) -> Result<f64> {
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
