//! A training on another device compared with the same training on the CPU. Skipped if candle was
//! built without such a device or the machine has none. On a machine with CUDA:
//!
//! ```sh
//! cargo test -p bitnet-quant --test qat_device --features candle-core/cuda,candle-nn/cuda
//! ```
//!
//! `src/qat/graph_tests.rs` tests the results of these operations on the CPU.
#![cfg(feature = "qat")]

use bitnet_core::random::Random;
use bitnet_quant::qat::{
    CheckpointConfig, Linear, Linears, Optimizer, QATConfig, QATTrainer, Rates,
    StraightThroughEstimator, Task,
};
use bitnet_quant::{Error, QuantizationConfig, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{VarBuilder, VarMap};

fn device() -> Option<Device> {
    let there = [Device::cuda_if_available(0), Device::metal_if_available(0)]
        .into_iter()
        .flatten()
        .find(|device| !device.is_cpu());
    if there.is_none() {
        println!("skipped: no device but the CPU");
    }
    there
}

/// Numbers in (−1, 1).
fn numbers(seed: u64, shape: &[usize], device: &Device) -> Result<Tensor> {
    let mut random = Random::new(seed);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| (2.0 * random.uniform() - 1.0) as f32)
        .collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// One layer that learns a fixed map.
struct LineTask {
    vars: VarMap,
    layer: Linear,
    device: Device,
}

impl LineTask {
    fn new(device: &Device) -> Result<Self> {
        let vars = VarMap::new();
        let layer = Linear::new(
            64,
            16,
            true,
            &VarBuilder::from_varmap(&vars, DType::F32, device).pp("layer"),
        )?;
        vars.data().lock().unwrap()["layer.weight"]
            .set(&(numbers(1, &[16, 64], device)? * 0.2)?)?;
        Ok(Self {
            vars,
            layer,
            device: device.clone(),
        })
    }
}

impl Linears for LineTask {
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>,
    ) -> Result<()> {
        visit("layer", &mut self.layer)
    }
}

impl Task for LineTask {
    fn vars(&self) -> &VarMap {
        &self.vars
    }

    fn loss(&mut self, step: u64, _: u64) -> Result<Tensor> {
        let x = numbers(100 + step, &[32, 64], &self.device)?;
        let y = x.matmul(&numbers(7, &[64, 16], &self.device)?)?;
        Ok((self.layer.forward(&x)? - y)?.sqr()?.mean_all()?)
    }

    fn evaluate(&mut self) -> Result<f64> {
        Ok(self
            .loss(1 << 30, 0)?
            .to_device(&Device::Cpu)?
            .to_scalar::<f32>()?
            .into())
    }

    fn linears(&mut self) -> Option<&mut dyn Linears> {
        Some(self)
    }
}

#[test]
fn one_step_is_that_of_the_cpu() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for estimator in ["plain", "clipped:1.5", "lsq", "stretched", "soft:0.5"] {
        let estimator: StraightThroughEstimator = estimator.parse()?;
        let step = |device: &Device| -> Result<(f32, Vec<f32>)> {
            let mut task = LineTask::new(device)?;
            let vars = task.vars.clone();
            let config = QATConfig {
                estimator,
                ..QATConfig::default()
            };
            QATTrainer::new(config.clone())?.prepare(&mut task, &vars)?;
            let loss = task.loss(0, 0)?;
            let gradients = loss.backward()?;
            let weight = vars.data().lock().unwrap()["layer.weight"].clone();
            let gradient = gradients
                .get(&weight)
                .unwrap()
                .to_device(&Device::Cpu)?
                .flatten_all()?
                .to_vec1::<f32>()?;
            Optimizer::new(&vars, &config.optimizer)?.step(&gradients, Rates::default())?;
            Ok((loss.to_device(&Device::Cpu)?.to_scalar()?, gradient))
        };
        let ((loss, gradient), (there, of_device)) = (step(&Device::Cpu)?, step(&device)?);
        // Sums of 512 squares of 64 products each.
        assert!(
            (loss - there).abs() < 1e-4 * loss,
            "{estimator}: {loss} and {there}"
        );
        let largest = gradient.iter().fold(0f32, |m, g| m.max(g.abs()));
        for (i, (g, d)) in gradient.iter().zip(&of_device).enumerate() {
            assert!(
                (g - d).abs() < 1e-4 * largest,
                "{estimator}: gradient {i} is {g} and {d}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_training_with_checkpoints_learns_and_packs() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let folder = tempfile::tempdir().unwrap();
    let mut config = QATConfig {
        steps: 60,
        evaluate_every: 20,
        estimator: StraightThroughEstimator::LearnedScale,
        ..QATConfig::default()
    };
    config.optimizer.learning_rate = 0.02;
    config.telemetry.every = 20;
    config.checkpoint = Some(CheckpointConfig {
        folder: folder.path().join("checkpoints"),
        every: 20,
        keep: 1,
    });
    let mut trainer = QATTrainer::new(config)?;
    let mut task = LineTask::new(&device)?;
    let (vars, before) = (task.vars.clone(), task.evaluate()?);
    trainer.prepare(&mut task, &vars)?;
    let outcome = trainer.run(&mut task, &mut ())?;
    let after = outcome.kept.unwrap().value;
    assert!(after < 0.9 * before, "{before} and then {after}");
    let again = trainer.resume(&mut task, &mut ())?;
    assert_eq!(again.kept, outcome.kept);
    // The packed layer is on the CPU and multiplies integers.
    let x = numbers(5, &[4, 64], &Device::Cpu)?;
    let packed = task
        .layer
        .as_qat()
        .unwrap()
        .convert()?
        .forward(&x)?
        .to_vec2::<f32>()?;
    let latent = task
        .layer
        .forward(&x.to_device(&device)?)?
        .to_device(&Device::Cpu)?
        .to_vec2::<f32>()?;
    for (p, l) in packed.iter().flatten().zip(latent.iter().flatten()) {
        assert!((p - l).abs() < 1e-4, "{p} and {l}");
    }
    Ok(())
}

#[test]
fn what_has_no_form_there_is_an_error() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let mut task = LineTask::new(&device)?;
    let vars = task.vars.clone();
    let mut quantization = QuantizationConfig::bitnet_158();
    quantization.default.threshold = Some(bitnet_core::scheme::Threshold::Optimal);
    let error = QATTrainer::new(QATConfig {
        quantization,
        ..QATConfig::default()
    })?
    .prepare(&mut task, &vars)
    .unwrap_err();
    assert!(
        matches!(&error, Error::Input { what: "scheme", .. }),
        "{error}"
    );
    Ok(())
}
