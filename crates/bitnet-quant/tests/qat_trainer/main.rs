//! The trainer: results, errors, and that a resumed training has the bits of an uninterrupted one.
#![cfg(feature = "qat")]

mod best;

use bitnet_core::random::Random;
use bitnet_quant::CheckpointError;
use bitnet_quant::qat::{
    CheckpointConfig, EarlyStopping, Event, LayerRecord, Linear, Linears, LogRecord,
    OptimizerConfig, OptimizerMethod, Outcome, Progressive, QATConfig, QATTrainer, Schedule,
    ScheduleShape, Stage, Stopped, StraightThroughEstimator, Task, TelemetryConfig, TrainingStep,
    backward, checkpoints, read_log, recompute,
};
use bitnet_quant::{Error, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{VarBuilder, VarMap};
use std::ops::ControlFlow;
use std::path::Path;

/// Numbers in (−1, 1) that depend on the seed alone.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n)
        .map(|_| (2.0 * random.uniform() - 1.0) as f32)
        .collect()
}

/// Two layers that learn a fixed map of 16 numbers to 4.
struct Mlp {
    vars: VarMap,
    layers: [Linear; 2],
    truth: Tensor,
    seed: u64,
    /// The step whose loss is not a number.
    broken: Option<u64>,
}

impl Mlp {
    fn new(width: usize) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let layers = [
            Linear::new(16, width, true, &vb.pp("first"))?,
            Linear::new(width, 4, true, &vb.pp("second"))?,
        ];
        let mut names: Vec<_> = vars
            .data()
            .lock()
            .unwrap()
            .iter()
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        for (i, (_, var)) in names.iter().enumerate() {
            var.set(
                &(Tensor::from_vec(
                    numbers(i as u64, var.elem_count()),
                    var.shape(),
                    &Device::Cpu,
                )? * 0.4)?,
            )?;
        }
        let truth = Tensor::from_vec(numbers(99, 64), (16, 4), &Device::Cpu)?;
        Ok(Self {
            vars,
            layers,
            truth,
            seed: 1,
            broken: None,
        })
    }

    fn batch(&self, index: u64) -> Result<(Tensor, Tensor)> {
        let x = Tensor::from_vec(
            numbers(1000 * self.seed + index, 32 * 16),
            (32, 16),
            &Device::Cpu,
        )?;
        let y = x.matmul(&self.truth)?.tanh()?;
        Ok((x, y))
    }

    fn error(&self, index: u64) -> Result<Tensor> {
        let (x, y) = self.batch(index)?;
        let out = self.layers[1].forward(&self.layers[0].forward(&x)?.relu()?)?;
        Ok((out - y)?.sqr()?.mean_all()?)
    }

    fn bits(&self) -> Vec<(String, Vec<u32>)> {
        let mut all: Vec<_> = self
            .vars
            .data()
            .lock()
            .unwrap()
            .iter()
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let bits = |t: &Tensor| {
            t.flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .map(|x| x.to_bits())
                .collect()
        };
        all.iter().map(|(n, v)| (n.clone(), bits(v))).collect()
    }
}

impl Linears for Mlp {
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>,
    ) -> Result<()> {
        visit("first", &mut self.layers[0])?;
        visit("second", &mut self.layers[1])
    }
}

impl Task for Mlp {
    fn vars(&self) -> &VarMap {
        &self.vars
    }

    fn loss(&mut self, step: u64, micro: u64) -> Result<Tensor> {
        let loss = self.error(2 * step + micro)?;
        if self.broken == Some(step) {
            Ok((loss * f64::NAN)?)
        } else {
            Ok(loss)
        }
    }

    fn evaluate(&mut self) -> Result<f64> {
        Ok(self.error(1 << 40)?.to_scalar::<f32>()?.into())
    }

    fn linears(&mut self) -> Option<&mut dyn Linears> {
        Some(self)
    }

    fn state(&self) -> serde_json::Value {
        self.seed.into()
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<()> {
        if state.as_u64() == Some(self.seed) {
            return Ok(());
        }
        Err(Error::Input {
            what: "seed",
            expected: state.to_string(),
            got: self.seed.to_string(),
        })
    }

    fn batch(&self) -> (u64, &'static str) {
        (32, "vectors")
    }
}

/// All features together: two micro-batches, clipping, stages, learned scales, checkpoints every
/// five steps, telemetry.
fn config(folder: &Path) -> QATConfig {
    QATConfig {
        steps: 24,
        accumulate: 2,
        clip: Some(0.5),
        estimator: StraightThroughEstimator::LearnedScale,
        progressive: Some(Progressive {
            warmup: 9,
            ..Progressive::halving(8, 4)
        }),
        gradient_scaling: 0.5,
        optimizer: OptimizerConfig {
            learning_rate: 0.02,
            ..OptimizerConfig::default()
        },
        schedule: Schedule {
            warmup: 3,
            shape: ScheduleShape::TWO_STAGE,
            floor: 0.01,
        },
        checkpoint: Some(CheckpointConfig {
            folder: folder.join("checkpoints"),
            every: 5,
            keep: 2,
        }),
        telemetry: TelemetryConfig {
            every: 6,
            file: Some(folder.join("log.jsonl")),
        },
        evaluate_every: 8,
        ..QATConfig::default()
    }
}

/// Trains or resumes; returns also the steps that callbacks received.
fn train(
    task: &mut Mlp,
    config: &QATConfig,
    stop_after: Option<u64>,
    resume: bool,
) -> Result<(Outcome, Vec<TrainingStep>)> {
    let mut trainer = QATTrainer::new(config.clone())?;
    let vars = task.vars.clone();
    if matches!(task.layers[0], Linear::Full(_)) {
        trainer.prepare(task, &vars)?;
    }
    let mut steps = vec![];
    let mut hear = |event: &Event<'_>| {
        if let Event::Step(step) = event {
            steps.push((*step).clone());
            if Some(step.step) == stop_after {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    };
    let outcome = if resume {
        trainer.resume(task, &mut hear)?
    } else {
        trainer.run(task, &mut hear)?
    };
    Ok((outcome, steps))
}

fn losses(steps: &[TrainingStep]) -> Vec<(u64, u64, u64)> {
    steps
        .iter()
        .map(|s| (s.step, s.loss.to_bits(), s.gradient_norm.to_bits()))
        .collect()
}

#[test]
fn stopped_and_resumed_anywhere_it_has_the_same_bits() -> Result<()> {
    let whole = tempfile::tempdir().unwrap();
    let mut reference = Mlp::new(24)?;
    let (outcome, expected) = train(&mut reference, &config(whole.path()), None, false)?;
    assert_eq!((outcome.step, outcome.stopped), (24, Stopped::Finished));
    assert_eq!(
        checkpoints(&whole.path().join("checkpoints"))?
            .iter()
            .map(|c| c.0)
            .collect::<Vec<_>>(),
        [20, 24]
    );
    let Linear::Qat(layer) = &reference.layers[0] else {
        panic!("in training")
    };
    assert_eq!((layer.stage(), layer.lambda()), (Stage::Target, 1.0));

    // Within a stage and the warm-up, at the end of a stage, at a checkpoint, at an evaluation.
    for stop in [2, 4, 5, 8, 11, 23] {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let (outcome, mut steps) = train(&mut Mlp::new(24)?, &config, Some(stop), false)?;
        assert_eq!(
            (outcome.step, outcome.stopped),
            (stop, Stopped::Interrupted)
        );
        // Another process: other variables until the checkpoint is read.
        let mut task = Mlp::new(24)?;
        let bias = task.vars.data().lock().unwrap()["first.bias"].clone();
        bias.set(&bias.ones_like()?)?;
        let (outcome, rest) = train(&mut task, &config, None, true)?;
        assert_eq!(
            (rest[0].step, outcome.step, outcome.stopped),
            (stop + 1, 24, Stopped::Finished)
        );
        steps.extend(rest);
        assert_eq!(losses(&steps), losses(&expected), "stopped after {stop}");
        assert_eq!(task.bits(), reference.bits(), "stopped after {stop}");
    }
    Ok(())
}

/// A killed training resumes from an earlier step: its log has every step once.
#[test]
fn killed_between_checkpoints() -> Result<()> {
    let (whole, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut reference = Mlp::new(24)?;
    train(&mut reference, &config(whole.path()), None, false)?;
    let config = config(folder.path());
    train(&mut Mlp::new(24)?, &config, Some(13), false)?;
    // As if steps 11 to 13 had been taken and nothing written since: the folder of step 13 was
    // being written.
    let folder_of = |step: u64| {
        config
            .checkpoint
            .as_ref()
            .unwrap()
            .folder
            .join(format!("step-{step:09}"))
    };
    std::fs::rename(folder_of(13), folder_of(13).with_extension("partial")).unwrap();
    std::fs::remove_file(folder_of(13).with_extension("partial").join("state.json")).unwrap();
    let mut log = std::fs::OpenOptions::new()
        .append(true)
        .open(folder.path().join("log.jsonl"))
        .unwrap();
    std::io::Write::write_all(&mut log, b"{\"kind\":\"step\",\"st").unwrap();
    let mut task = Mlp::new(24)?;
    let (_, steps) = train(&mut task, &config, None, true)?;
    assert_eq!(steps[0].step, 11);
    assert_eq!(task.bits(), reference.bits());
    let of_steps = |path: &Path| -> Result<Vec<u64>> {
        Ok(read_log(path)?
            .iter()
            .filter(|l| matches!(l, LogRecord::Step(_)))
            .map(LogRecord::step)
            .collect())
    };
    assert_eq!(
        of_steps(&folder.path().join("log.jsonl"))?,
        (1..=24).collect::<Vec<_>>()
    );
    // Resuming a finished training takes no step and returns the same outcome.
    let (outcome, steps) = train(&mut task, &config, None, true)?;
    assert_eq!(
        (outcome.step, outcome.stopped, steps.len()),
        (24, Stopped::Finished, 0)
    );
    assert!(outcome.evaluation.is_some());
    Ok(())
}

#[test]
fn checkpoints_of_something_else_are_refused_in_one_line() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.estimator = StraightThroughEstimator::Plain;
    train(&mut Mlp::new(24)?, &config, Some(6), false)?;
    let refused = |config: &QATConfig, task: &mut Mlp| {
        let before = task.bits();
        let error = train(task, config, None, true).unwrap_err().to_string();
        assert_eq!(before, task.bits(), "nothing is changed");
        assert!(!error.contains('\n'), "{error}");
        error
    };
    let error = refused(&config, &mut Mlp::new(25)?);
    assert!(error.ends_with("a checkpoint of another model: variable 'first.bias' has shape [24] there and [25] here"), "{error}");
    let mut more = Mlp::new(24)?;
    more.vars.get(
        3,
        "extra",
        candle_nn::Init::Const(0.0),
        DType::F32,
        &Device::Cpu,
    )?;
    assert!(refused(&config, &mut more).ends_with("it has no variable 'extra'"));
    let mut fewer = Mlp::new(24)?;
    fewer.vars.data().lock().unwrap().remove("second.bias");
    assert!(
        refused(&config, &mut fewer)
            .ends_with("it has a variable 'second.bias', which the model has not")
    );
    let mut rate = config.clone();
    rate.optimizer.learning_rate = 0.5;
    let error = refused(&rate, &mut Mlp::new(24)?);
    assert!(
        error.ends_with(
            "optimizer.learning_rate is 0.02 there and 0.5 here; a resumed training keeps its configuration"
        ),
        "{error}"
    );
    let mut sgd = config.clone();
    sgd.optimizer.method = OptimizerMethod::Sgd {
        momentum: 0.0,
        nesterov: false,
    };
    assert!(refused(&sgd, &mut Mlp::new(24)?).contains("optimizer.method"));
    let mut seed = Mlp::new(24)?;
    seed.seed = 2;
    assert!(refused(&config, &mut seed).ends_with("seed: expected 1, got 2"));
    // Settings that do not change results may differ.
    let mut other = config.clone();
    (other.evaluate_every, other.telemetry) = (0, TelemetryConfig::default());
    train(&mut Mlp::new(24)?, &other, Some(7), true)?;
    // A new training does not start in a folder with checkpoints.
    let error = train(&mut Mlp::new(24)?, &config, None, false).unwrap_err();
    assert!(
        matches!(&error, Error::Checkpoint(CheckpointError::Exists { path }) if path.ends_with("step-000000007")),
        "{error}"
    );
    let empty = QATConfig {
        checkpoint: Some(CheckpointConfig {
            folder: folder.path().join("none"),
            every: 0,
            keep: 1,
        }),
        ..config
    };
    assert!(
        refused(&empty, &mut Mlp::new(24)?)
            .ends_with("expected a checkpoint to resume from, got none")
    );
    Ok(())
}

#[test]
fn damaged_checkpoints_are_refused() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let (outcome, _) = train(&mut Mlp::new(24)?, &config, Some(5), false)?;
    let path = outcome.checkpoint.unwrap();
    for file in [
        "model.safetensors",
        "optimizer.safetensors",
        "telemetry.safetensors",
        "state.json",
    ] {
        let good = std::fs::read(path.join(file)).unwrap();
        let mut bad = good.clone();
        let last = bad.len() - 3;
        bad[last] ^= 0x11;
        std::fs::write(path.join(file), &bad).unwrap();
        let mut task = Mlp::new(24)?;
        let error = train(&mut task, &config, None, true)
            .unwrap_err()
            .to_string();
        assert!(error.contains(file), "{file}: {error}");
        for len in [0, 7, good.len() / 2] {
            std::fs::write(path.join(file), &good[..len]).unwrap();
            assert!(
                train(&mut task, &config, None, true).is_err(),
                "{file} of {len} bytes"
            );
        }
        std::fs::write(path.join(file), &good).unwrap();
    }
    train(&mut Mlp::new(24)?, &config, None, true)?;
    Ok(())
}

/// A checkpoint that is written again, as after a resume, replaces its folder by two renames. A
/// kill between them leaves the old folder under its temporary name.
#[test]
fn killed_while_a_checkpoint_is_replaced() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    train(&mut Mlp::new(24)?, &config, Some(13), false)?;
    let checkpoints = &config.checkpoint.as_ref().unwrap().folder;
    let path = checkpoints.join("step-000000013");
    let replaced = checkpoints.join("step-000000013.partial-replaced");
    std::fs::rename(&path, &replaced).unwrap();
    let (_, steps) = train(&mut Mlp::new(24)?, &config, None, true)?;
    assert_eq!(steps[0].step, 14);
    assert!(!replaced.exists());
    Ok(())
}

#[test]
fn a_folder_that_cannot_be_written_leaves_earlier_checkpoints() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let checkpoints_of = config.checkpoint.as_ref().unwrap().folder.clone();
    std::fs::create_dir_all(&checkpoints_of).unwrap();
    // A file where the unfinished folder of step 10 would be: creating it fails as it would on a
    // full disk.
    std::fs::write(checkpoints_of.join("step-000000010.partial"), b"").unwrap();
    let error = train(&mut Mlp::new(24)?, &config, None, false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("step-000000010.partial"), "{error}");
    std::fs::remove_file(checkpoints_of.join("step-000000010.partial")).ok();
    let (outcome, steps) = train(&mut Mlp::new(24)?, &config, None, true)?;
    assert_eq!((steps[0].step, outcome.step), (6, 24));
    Ok(())
}

#[test]
fn no_number_stops_with_the_last_good_checkpoint_named() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let mut task = Mlp::new(24)?;
    task.broken = Some(11);
    let error = train(&mut task, &config, None, false).unwrap_err();
    let Error::Diverged {
        step: 12,
        what: "loss",
        got,
        checkpoint: Some(path),
    } = &error
    else {
        panic!("{error}")
    };
    assert!(got.is_nan() && path.ends_with("step-000000010"));
    assert!(
        error
            .to_string()
            .starts_with("step 12: the loss is NaN; the last good checkpoint is "),
        "{error}"
    );
    let mut task = Mlp::new(24)?;
    task.broken = Some(0);
    let none = QATConfig {
        checkpoint: None,
        ..config
    };
    let error = train(&mut task, &none, None, false)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "step 1: the loss is NaN; no checkpoint was written before"
    );
    Ok(())
}

#[test]
fn stops_early_where_nothing_improves() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let stop = EarlyStopping {
        patience: 2,
        min_delta: 0.0,
    };
    let mut config = QATConfig {
        evaluate_every: 3,
        early_stopping: Some(stop),
        ..config(folder.path())
    };
    // Nothing changes, so no evaluation is better than the first.
    config.optimizer = OptimizerConfig {
        learning_rate: 0.0,
        ..OptimizerConfig::default()
    };
    config.progressive = None;
    let (outcome, _) = train(&mut Mlp::new(24)?, &config, None, false)?;
    assert_eq!((outcome.step, outcome.stopped), (9, Stopped::Early));
    let (again, steps) = train(&mut Mlp::new(24)?, &config, None, true)?;
    assert_eq!(
        (again.step, again.stopped, steps.len()),
        (9, Stopped::Early, 0)
    );
    Ok(())
}

/// Two micro-batches are one batch of both; scaled gradients of latent weights are those times the
/// factor.
#[test]
fn accumulation_and_gradient_scaling() -> Result<()> {
    let sgd = OptimizerConfig {
        method: OptimizerMethod::Sgd {
            momentum: 0.0,
            nesterov: false,
        },
        learning_rate: 0.1,
        weight_decay: 0.0,
        group: vec![],
    };
    let schedule = Schedule {
        shape: ScheduleShape::Constant,
        ..Schedule::default()
    };
    let config = QATConfig {
        steps: 1,
        accumulate: 2,
        gradient_scaling: 0.25,
        optimizer: sgd,
        schedule,
        ..QATConfig::default()
    };
    let mut task = Mlp::new(24)?;
    let mut trainer = QATTrainer::new(config)?;
    let vars = task.vars.clone();
    trainer.prepare(&mut task, &vars)?;
    let before = ["first.weight", "first.bias"]
        .map(|name| vars.data().lock().unwrap()[name].copy().unwrap());
    let both = ((task.error(0)? + task.error(1)?)? / 2.0)?;
    let grads = both.backward()?;
    let expected = ["first.weight", "first.bias"].map(|name| {
        grads
            .get(vars.data().lock().unwrap()[name].as_tensor())
            .unwrap()
            .clone()
    });
    trainer.run(&mut task, &mut ())?;
    for (i, factor) in [(0, 0.25), (1, 1.0)] {
        let name = ["first.weight", "first.bias"][i];
        let moved = (&before[i] - vars.data().lock().unwrap()[name].as_tensor())?;
        let wrong = (moved - (&expected[i] * (0.1 * factor))?)?
            .abs()?
            .flatten_all()?
            .max(0)?
            .to_scalar::<f32>()?;
        // One rounding of weights below 1, and a few of gradients that are smaller still.
        assert!(wrong <= 2.0 * f32::EPSILON, "{name}: {wrong}");
    }
    Ok(())
}

/// Telemetry against a count of the codes by hand.
#[test]
fn telemetry_by_hand() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let telemetry = TelemetryConfig {
        every: 1,
        file: Some(folder.path().join("log.jsonl")),
    };
    let mut config = QATConfig {
        steps: 12,
        telemetry,
        ..QATConfig::default()
    };
    config.optimizer.learning_rate = 0.05;
    let mut task = Mlp::new(24)?;
    let vars = task.vars.clone();
    let mut trainer = QATTrainer::new(config)?;
    trainer.prepare(&mut task, &vars)?;
    let weight = vars.data().lock().unwrap()["first.weight"].clone();
    let (mut codes, mut records): (Vec<Vec<i8>>, Vec<LayerRecord>) = (vec![], vec![]);
    let mut hear = |event: &Event<'_>| {
        if let Event::Layer(record) = event {
            records.extend((record.name == "first").then(|| (*record).clone()));
        }
        if let Event::Step(_) = event {
            let w = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mean = w.iter().map(|x| f64::from(x.abs())).sum::<f64>() / w.len() as f64;
            codes.push(
                w.iter()
                    .map(|x| (f64::from(*x) / mean).round_ties_even().clamp(-1.0, 1.0) as i8)
                    .collect(),
            );
        }
        ControlFlow::Continue(())
    };
    trainer.run(&mut task, &mut hear)?;
    let log = read_log(&folder.path().join("log.jsonl"))?;
    assert_eq!(
        log.iter()
            .filter(|line| matches!(line, LogRecord::Layer(_)))
            .count(),
        24
    );
    assert_eq!(records.len(), 12);
    let (n, mut direction) = (codes[0].len(), vec![0i32; codes[0].len()]);
    let (mut flips, mut turns) = (0, 0);
    for (t, record) in records.iter().enumerate() {
        let (mut flipped, mut turned) = (0, 0);
        for i in 0..n {
            let change = i32::from(codes[t][i]) - i32::from(codes[t.saturating_sub(1)][i]);
            if change != 0 {
                flipped += 1;
                turned += usize::from(change.signum() == -direction[i]);
                direction[i] = change.signum();
            }
        }
        let zeros = codes[t].iter().filter(|&&q| q == 0).count();
        let share = |k: usize| k as f64 / n as f64;
        assert_eq!(
            (record.flips, record.oscillation, record.dead_zone),
            (share(flipped), share(turned), share(zeros)),
            "step {}",
            t + 1
        );
        assert!(record.gradient_norm > 0.0 && record.lambda == 1.0 && record.scale > 0.0);
        (flips, turns) = (flips + flipped, turns + turned);
    }
    assert!(
        flips > 0 && turns > 0,
        "{flips} flips, {turns} back: the test would count nothing"
    );
    Ok(())
}

/// A recomputed segment has the gradients of the plain graph, bit for bit, for variables inside,
/// before and after it.
#[test]
fn recomputed_segments_have_the_same_gradients() -> Result<()> {
    let mut task = Mlp::new(24)?;
    let vars = task.vars.clone();
    QATTrainer::new(QATConfig::default())?.prepare(&mut task, &vars)?;
    let [Linear::Qat(first), Linear::Qat(second)] = &task.layers else {
        panic!("in training")
    };
    let (x, y) = task.batch(0)?;
    let loss = |out: Tensor| -> Result<Tensor> { Ok((out - &y)?.sqr()?.mean_all()?) };
    let plain = loss(second.forward(&first.forward(&x)?.relu()?)?)?.backward()?;
    // x has no gradient, but the first segment must be reached. The second segment is nested.
    let (a, b) = (first.clone(), second.clone());
    let hidden = recompute(move |x| a.forward(x)?.relu(), &x)?;
    let outer = move |x: &Tensor| b.forward(x);
    let lean = loss(recompute(outer, &hidden)?)?;
    let direct = lean.backward().unwrap_err().to_string();
    assert!(direct.contains("bitnet_quant::qat::backward"), "{direct}");
    let lean = backward(&lean)?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        let bits = |grads: &candle_core::backprop::GradStore| -> Vec<u32> {
            let g = grads
                .get(var.as_tensor())
                .unwrap_or_else(|| panic!("no gradient of {name}"));
            g.flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .map(|x| x.to_bits())
                .collect()
        };
        assert_eq!(bits(&plain), bits(&lean), "{name}");
    }
    Ok(())
}

/// Intermediate results of a segment are not kept for the backward pass.
#[test]
fn recomputed_segments_take_less_memory() -> Result<()> {
    let weights: Vec<_> = (0..8)
        .map(|i| Tensor::from_vec(numbers(i, 64 * 64), (64, 64), &Device::Cpu))
        .collect::<candle_core::Result<_>>()?;
    let weights = weights
        .iter()
        .map(candle_core::Var::from_tensor)
        .collect::<candle_core::Result<Vec<_>>>()?;
    let x = Tensor::from_vec(numbers(100, 2048 * 64), (2048, 64), &Device::Cpu)?;
    let deep = |w: &candle_core::Var, x: &Tensor| x.matmul(w)?.tanh()?.sqr()?.tanh()?.sqr()?.tanh();
    let plain = || -> Result<()> {
        let y = weights.iter().try_fold(x.clone(), |x, w| deep(w, &x))?;
        backward(&y.sum_all()?)?;
        Ok(())
    };
    let lean = || -> Result<()> {
        let segment = |x: Tensor, w: &candle_core::Var| {
            let w = w.clone();
            recompute(move |x| deep(&w, x), &x)
        };
        backward(&weights.iter().try_fold(x.clone(), segment)?.sum_all()?)?;
        Ok(())
    };
    let peak = |run: &dyn Fn() -> Result<()>| -> Result<u64> {
        run()?; // what threads allocate once
        let mut result = Ok(());
        let info = allocation_counter::measure(|| result = run());
        result.map(|()| info.bytes_max)
    };
    let (plain, lean) = (peak(&plain)?, peak(&lean)?);
    assert!(2 * lean < plain, "{lean} of {plain} bytes");
    Ok(())
}

#[test]
fn configurations_survive_toml_and_json() -> Result<()> {
    let mut config = config(Path::new("run"));
    config.early_stopping = Some(EarlyStopping::default());
    config.optimizer.method = OptimizerMethod::Sgd {
        momentum: 0.5,
        nesterov: true,
    };
    assert_eq!(QATConfig::from_toml(&config.to_toml()?)?, config);
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<QATConfig>(&text).unwrap(), config);
    let text = "[schedule]\nwarmup = 5\nshape = { midway = 0.5, drop = 0.25 }\n[optimizer]\nmethod = { name = 'adamw', beta2 = 0.95 }";
    let config = QATConfig::from_toml(text)?;
    assert_eq!(
        config.schedule.shape,
        ScheduleShape::TwoStage {
            midway: 0.5,
            drop: 0.25
        }
    );
    let OptimizerMethod::AdamW(betas) = config.optimizer.method else {
        panic!("{config:?}")
    };
    assert_eq!((betas.beta1, betas.beta2), (0.9, 0.95));
    assert!(
        QATConfig::from_toml("step = 5")
            .unwrap_err()
            .to_string()
            .contains("step")
    );
    Ok(())
}

#[test]
fn wrong_fields_of_a_configuration_are_named_together() {
    let mut config = QATConfig {
        steps: 0,
        accumulate: 0,
        clip: Some(-1.0),
        gradient_scaling: 0.0,
        early_stopping: Some(EarlyStopping {
            patience: 0,
            min_delta: -1.0,
        }),
        progressive: Some(Progressive::halving(8, 10)),
        ..QATConfig::default()
    };
    config.schedule.floor = 2.0;
    config.optimizer.learning_rate = f64::INFINITY;
    config.quantization.default.planes = Some(7);
    let error = QATTrainer::new(config).unwrap_err();
    let Error::Checkpoint(CheckpointError::Invalid(fields)) = &error else {
        panic!("{error}")
    };
    let expected = [
        "steps",
        "accumulate",
        "clip",
        "gradient_scaling",
        "early_stopping.patience",
        "early_stopping.min_delta",
    ];
    let more = [
        "early_stopping: ",
        "progressive: ",
        "optimizer.learning_rate",
        "schedule.floor",
        "quantization.default.planes",
    ];
    for field in expected.iter().chain(&more) {
        assert!(
            fields.iter().any(|f| f.starts_with(field)),
            "{field}: {error}"
        );
    }
    let builder = || QATConfig::builder().steps(100);
    let error = builder()
        .target_bit_width(4)
        .initial_bit_width(8)
        .build()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("target_bit_width: expected 2, as the scheme has, got 4")
            && error.contains("initial_bit_width"),
        "{error}"
    );
    assert!(
        builder()
            .progressive_quantization(true)
            .initial_bit_width(5)
            .build()
            .is_err()
    );
    let both = builder()
        .progressive_quantization(true)
        .progressive(Progressive::halving(4, 10))
        .build();
    assert!(
        both.unwrap_err()
            .to_string()
            .contains("progressive_quantization")
    );
}
