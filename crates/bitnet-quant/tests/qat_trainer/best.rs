//! The model of the best evaluation, telemetry over interruptions, and the dead-zone bias of a
//! configuration.

use super::*;
use bitnet_core::Precision;
use bitnet_quant::QuantizationConfig;
use bitnet_quant::qat::regularization::level_distance;

/// A task whose evaluations are written down: the best one is after step 15, but for one after step
/// 6, when layers are not at their target.
struct Scored {
    task: Mlp,
    step: u64,
    /// The variables at each evaluation.
    seen: Vec<(u64, Bits)>,
}

type Bits = Vec<(String, Vec<u32>)>;

impl Scored {
    fn new() -> Result<Self> {
        Ok(Self {
            task: Mlp::new(24)?,
            step: 0,
            seen: vec![],
        })
    }

    fn score(step: u64) -> f64 {
        if step == 6 {
            -5.0
        } else {
            step.abs_diff(15) as f64
        }
    }
}

impl Task for Scored {
    fn vars(&self) -> &VarMap {
        self.task.vars()
    }

    fn loss(&mut self, step: u64, micro: u64) -> Result<Tensor> {
        self.step = step + 1;
        self.task.loss(step, micro)
    }

    fn evaluate(&mut self) -> Result<f64> {
        self.seen.push((self.step, self.task.bits()));
        Ok(Self::score(self.step))
    }

    fn linears(&mut self) -> Option<&mut dyn Linears> {
        Some(&mut self.task)
    }
}

fn scored(
    task: &mut Scored,
    config: &QATConfig,
    stop_after: Option<u64>,
    resume: bool,
) -> Result<(Outcome, Vec<LayerRecord>)> {
    let mut trainer = QATTrainer::new(config.clone())?;
    let vars = task.task.vars.clone();
    if matches!(task.task.layers[0], Linear::Full(_)) {
        trainer.prepare(&mut task.task, &vars)?;
    }
    let mut records = vec![];
    let mut hear = |event: &Event<'_>| {
        match event {
            Event::Step(step) if Some(step.step) == stop_after => return ControlFlow::Break(()),
            Event::Layer(record) => records.push((*record).clone()),
            _ => {}
        }
        ControlFlow::Continue(())
    };
    let outcome = if resume {
        trainer.resume(task, &mut hear)?
    } else {
        trainer.run(task, &mut hear)?
    };
    Ok((outcome, records))
}

/// Evaluations every three steps; layers are at their target, and at full strength, from the
/// thirteenth step on. One checkpoint is kept.
fn evaluated(folder: &Path) -> QATConfig {
    let mut config = QATConfig {
        evaluate_every: 3,
        ..config(folder)
    };
    assert_eq!(config.progressive.as_ref().unwrap().settled(), 12);
    config.checkpoint.as_mut().unwrap().keep = 1;
    config
}

fn steps_kept(config: &QATConfig) -> Result<Vec<u64>> {
    Ok(checkpoints(&config.checkpoint.as_ref().unwrap().folder)?
        .iter()
        .map(|c| c.0)
        .collect())
}

#[test]
fn the_best_model_remains() -> Result<()> {
    let whole = tempfile::tempdir().unwrap();
    let config = evaluated(whole.path());
    let mut reference = Scored::new()?;
    let (outcome, records) = scored(&mut reference, &config, None, false)?;
    assert_eq!((outcome.step, outcome.stopped), (24, Stopped::Finished));
    assert_eq!(
        outcome.evaluation.map(|e| (e.step, e.value, e.best)),
        Some((24, 9.0, 0.0))
    );
    assert_eq!(
        outcome.kept.map(|e| (e.step, e.value, e.best)),
        Some((15, 0.0, 0.0))
    );
    assert_eq!(steps_kept(&config)?, [15, 24], "the newest, and the best");
    let after = |step: u64| {
        reference
            .seen
            .iter()
            .find(|(s, _)| *s == step)
            .unwrap()
            .1
            .clone()
    };
    let best = after(15);
    assert_eq!(reference.task.bits(), best);
    assert_ne!(best, after(24), "the test would see nothing");

    // Without checkpoints the best model is kept in memory.
    let mut task = Scored::new()?;
    let (outcome, _) = scored(
        &mut task,
        &QATConfig {
            checkpoint: None,
            ..config.clone()
        },
        None,
        false,
    )?;
    assert_eq!(
        (outcome.kept.map(|e| e.step), task.task.bits() == best),
        (Some(15), true)
    );

    // Before, at, after and long after the best evaluation.
    for stop in [4, 14, 15, 16, 22] {
        let folder = tempfile::tempdir().unwrap();
        let config = evaluated(folder.path());
        let (outcome, _) = scored(&mut Scored::new()?, &config, Some(stop), false)?;
        let evaluated = stop.is_multiple_of(3).then_some(stop);
        assert_eq!(
            (outcome.stopped, outcome.kept.map(|e| e.step)),
            (Stopped::Interrupted, evaluated)
        );
        for rest in [24 - stop, 0] {
            let mut task = Scored::new()?;
            let (outcome, again) = scored(&mut task, &config, None, true)?;
            assert_eq!(
                (outcome.step, outcome.kept.map(|e| e.step)),
                (24, Some(15)),
                "stopped after {stop}"
            );
            assert_eq!(task.task.bits(), best, "stopped after {stop}");
            // Telemetry counts from the previous record, across the interruption.
            let expected: Vec<_> = records
                .iter()
                .filter(|r| r.step > 24 - rest)
                .cloned()
                .collect();
            assert_eq!(again, expected, "stopped after {stop}");
        }
    }
    assert!(
        records.iter().any(|r| r.step > 6 && r.flips > 0.0)
            && records.iter().any(|r| r.oscillation > 0.0),
        "{records:?}"
    );

    // Without further evaluations only the last one counts, and the folder of the best one is not
    // kept.
    let last = QATConfig {
        evaluate_every: 0,
        ..config.clone()
    };
    let mut task = Scored::new()?;
    let (outcome, _) = scored(&mut task, &last, None, true)?;
    assert_eq!(
        (outcome.kept.map(|e| e.step), task.task.bits() == after(24)),
        (Some(24), true)
    );
    std::fs::remove_dir_all(
        config
            .checkpoint
            .as_ref()
            .unwrap()
            .folder
            .join("step-000000015"),
    )
    .unwrap();
    let error = scored(&mut Scored::new()?, &config, None, true)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("step-000000015: expected the checkpoint of the best evaluation, got none"),
        "{error}"
    );
    Ok(())
}

#[test]
fn early_stopping_leaves_the_best_model() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = QATConfig {
        early_stopping: Some(EarlyStopping {
            patience: 2,
            min_delta: 0.0,
        }),
        ..evaluated(folder.path())
    };
    let mut task = Scored::new()?;
    let (outcome, _) = scored(&mut task, &config, None, false)?;
    assert_eq!(
        (outcome.step, outcome.stopped, outcome.kept.map(|e| e.step)),
        (21, Stopped::Early, Some(15))
    );
    assert_eq!(steps_kept(&config)?, [15, 21]);
    let best = task
        .seen
        .iter()
        .find(|(step, _)| *step == 15)
        .unwrap()
        .1
        .clone();
    assert_eq!(task.task.bits(), best);
    let mut again = Scored::new()?;
    let (outcome, _) = scored(&mut again, &config, None, true)?;
    assert_eq!(
        (outcome.step, outcome.stopped, again.seen.len()),
        (21, Stopped::Early, 0)
    );
    assert_eq!(again.task.bits(), best);
    Ok(())
}

/// The loss contains the distance to the levels, and weights come closer to them with a larger
/// factor.
#[test]
fn regularization_by_configuration() -> Result<()> {
    let run = |factor: f64| -> Result<(f64, f64)> {
        let mut config = QATConfig {
            steps: 100,
            level_regularization: factor,
            ..QATConfig::default()
        };
        config.optimizer.learning_rate = 0.01;
        let mut task = Mlp::new(24)?;
        let vars = task.vars.clone();
        let mut trainer = QATTrainer::new(config)?;
        trainer.prepare(&mut task, &vars)?;
        let expected = task.error(0)?.to_scalar::<f32>()? as f64
            + factor * level_distance(&mut task)?.to_scalar::<f32>()? as f64;
        let mut first = None;
        let mut hear = |event: &Event<'_>| {
            if let Event::Step(step) = event {
                first.get_or_insert(step.loss);
            }
            ControlFlow::Continue(())
        };
        trainer.run(&mut task, &mut hear)?;
        Ok((
            (first.unwrap() - expected).abs(),
            level_distance(&mut task)?.to_scalar::<f32>()?.into(),
        ))
    };
    let ((wrong, free), (also_wrong, drawn)) = (run(0.0)?, run(0.5)?);
    assert!(wrong < 1e-6 && also_wrong < 1e-6, "{wrong} {also_wrong}");
    assert!(drawn < 0.9 * free, "{drawn} of {free}");
    assert!(
        QATConfig::from_toml("level_regularization = -1.0")
            .unwrap_err()
            .to_string()
            .contains("level_regularization")
    );
    Ok(())
}

#[test]
fn a_dead_zone_bias_by_configuration() -> Result<()> {
    let config = QATConfig::from_toml("steps = 8\ndead_zone_bias = 0.01")?;
    assert_eq!(QATConfig::from_toml(&config.to_toml()?)?, config);
    let mut task = Mlp::new(24)?;
    let vars = task.vars.clone();
    let mut trainer = QATTrainer::new(config.clone())?;
    trainer.prepare(&mut task, &vars)?;
    trainer.run(&mut task, &mut ())?;
    for layer in &mut task.layers {
        let layer = layer.as_qat().unwrap();
        assert_eq!(layer.dead_zone_bias(), 0.01);
        let (codes, w) = (layer.quantized_weights()?, layer.weight().to_vec2::<f32>()?);
        let (bias, packed) = (
            layer.bias().unwrap().to_vec1::<f32>()?,
            layer.packed_bias()?.unwrap().to_vec1::<f32>()?,
        );
        assert_eq!(layer.convert()?.bias().unwrap().to_vec1::<f32>()?, packed);
        let mut moved = 0.0f32;
        for (n, row) in w.iter().enumerate() {
            let dead = row
                .iter()
                .zip(&codes.values[n * row.len()..])
                .filter(|(_, q)| **q == 0)
                .map(|(w, _)| 0.01 * w)
                .sum::<f32>();
            // A sum of at most 24 weights below 1, and one addition.
            assert!(
                (packed[n] - bias[n] - dead).abs() < 1e-6,
                "row {n}: {} and {}",
                packed[n] - bias[n],
                dead
            );
            moved = moved.max(dead.abs());
        }
        assert!(moved > 1e-4, "no dead weights: {moved}");
    }
    let int4 = QATConfig {
        quantization: QuantizationConfig::new(Precision::Int4),
        ..config
    };
    let mut task = Mlp::new(24)?;
    let vars = task.vars.clone();
    let error = QATTrainer::new(int4)?
        .prepare(&mut task, &vars)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("ternary weights of one plane, got none"),
        "{error}"
    );
    assert!(
        QATConfig::from_toml("dead_zone_bias = inf")
            .unwrap_err()
            .to_string()
            .contains("dead_zone_bias")
    );
    Ok(())
}
