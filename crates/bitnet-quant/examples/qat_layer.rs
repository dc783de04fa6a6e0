//! Layers in training compared with candle's f32 linear layers: the time of a forward pass, of a
//! forward and a backward pass, and the peak memory of training a stack of layers.
//!
//! ```sh
//! cargo run --release -p bitnet-quant --example qat_layer
//! ```

use bitnet_quant::QuantizationConfig;
use bitnet_quant::qat::{QatLinear, StraightThroughEstimator};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::Optimizer;
use std::time::{Duration, Instant};

const CPU: Device = Device::Cpu;
const ESTIMATORS: [&str; 3] = ["plain", "lsq", "stretched"];

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    if let Some(kind) = std::env::args().nth(1) {
        println!("{}", peak(&kind)?);
        return Ok(());
    }
    println!(
        "tokens      K      N  estimator     forward     f32   ratio      both     f32   ratio   (µs, medians)"
    );
    for (tokens, k, n) in [
        (64, 784, 512),
        (128, 512, 512),
        (1024, 256, 256),
        (1024, 256, 704),
        (1024, 704, 256),
        (2048, 512, 512),
    ] {
        for estimator in ESTIMATORS {
            let weight = Var::randn(0f32, 0.05f32, (n, k), &CPU)?;
            let x = Var::randn(0f32, 1f32, (tokens, k), &CPU)?;
            let grad = Tensor::randn(0f32, 1f32, (tokens, n), &CPU)?;
            let (full, qat) = (full(&weight), qat(&weight, estimator)?);
            let us = |pair: [Duration; 2]| pair.map(|d| d.as_secs_f64() * 1e6);
            let [a, b] = us(medians(&qat, &full, &x, None)?);
            let [c, d] = us(medians(&qat, &full, &x, Some(&grad))?);
            println!(
                "{tokens:6} {k:6} {n:6}  {estimator:10} {a:10.0} {b:7.0} {:7.2} {c:9.0} {d:7.0} {:7.2}",
                a / b,
                c / d
            );
        }
    }
    println!(
        "\npeak memory of a process that trains 6 × (256 → 704 → 256) on 1024 tokens with AdamW"
    );
    let of = |kind: &str| -> std::result::Result<f64, Box<dyn std::error::Error>> {
        let output = std::process::Command::new(std::env::current_exe()?)
            .arg(kind)
            .output()?;
        Ok(String::from_utf8(output.stdout)?.trim().parse()?)
    };
    let full = of("full")?;
    println!("f32        {full:7.1} MiB");
    for estimator in ESTIMATORS {
        let qat = of(estimator)?;
        println!("{estimator:10} {qat:7.1} MiB {:7.2}", qat / full);
    }
    Ok(())
}

fn full(weight: &Var) -> candle_nn::Linear {
    candle_nn::Linear::new(weight.as_tensor().clone(), None)
}

fn qat(weight: &Var, estimator: &str) -> bitnet_quant::Result<QatLinear> {
    let estimator: StraightThroughEstimator = estimator.parse()?;
    QatLinear::new(
        weight.as_tensor().clone(),
        None,
        None,
        &QuantizationConfig::bitnet_158(),
        estimator,
    )
}

fn medians(
    a: &dyn Module,
    b: &dyn Module,
    x: &Var,
    grad: Option<&Tensor>,
) -> Result<[Duration; 2]> {
    let mut times = [vec![], vec![]];
    for turn in 0..31 {
        for (layer, times) in [a, b].into_iter().zip(&mut times) {
            let start = Instant::now();
            let y = layer.forward(x)?;
            if let Some(grad) = grad {
                (y * grad)?.sum_all()?.backward()?;
            }
            if turn > 0 {
                times.push(start.elapsed());
            }
        }
    }
    Ok(times.map(|mut t| {
        t.sort_unstable();
        t[t.len() / 2]
    }))
}

/// Peak memory of this process in MiB, after some steps.
fn peak(kind: &str) -> std::result::Result<f64, Box<dyn std::error::Error>> {
    let mut vars = vec![];
    let mut layers: Vec<Box<dyn Module>> = vec![];
    for i in 0..12 {
        let (k, n) = if i % 2 == 0 { (256, 704) } else { (704, 256) };
        let weight = Var::randn(0f32, 0.05f32, (n, k), &CPU)?;
        layers.push(match kind {
            "full" => Box::new(full(&weight)),
            estimator => {
                let layer = qat(&weight, estimator)?;
                vars.extend(layer.learned_scale().cloned());
                Box::new(layer)
            }
        });
        vars.push(weight);
    }
    let mut adamw = candle_nn::AdamW::new_lr(vars, 1e-3)?;
    let x = Tensor::zeros((1024, 256), DType::F32, &CPU)?.randn_like(0.0, 1.0)?;
    for _ in 0..4 {
        let y = layers.chunks(2).try_fold(x.clone(), |x, pair| {
            &x + pair[1].forward(&pair[0].forward(&x)?.relu()?)?
        })?;
        adamw.backward_step(&y.sqr()?.mean_all()?)?;
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .ok_or("no VmHWM: this needs Linux")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
