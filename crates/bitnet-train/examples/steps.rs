//! Time and memory of training steps: quantized layers against the full-precision twin, on the same
//! data, in turns.
//!
//! ```sh
//! # Prints a table in Markdown; --rounds N, default 15.
//! cargo run --release -p bitnet-train --example steps
//! ```

use bitnet_quant::QuantizationConfig;
use bitnet_quant::qat::{
    Linears, Optimizer, OptimizerConfig, Rates, StraightThroughEstimator, prepare,
};
use bitnet_train::folder;
use bitnet_train::models::{
    CnnConfig, DecoderModel, DecoderShape, ImageModel, ImageShape, MlpConfig,
};
use bitnet_train::ops::cross_entropy;
use bitnet_train::variables::{stream, variables};
use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW, VarMap};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const MODELS: [&str; 4] = ["mlp", "cnn", "decoder-1m", "decoder-4.8m"];

/// Steps before peak memory is read.
const STEPS: usize = 4;

/// A model with one batch.
enum Case {
    Image(ImageModel, Tensor, Tensor),
    Text(Box<DecoderModel>, Tensor, Tensor),
}

impl Case {
    /// A model with the same weights and data in every call.
    fn new(name: &str) -> Result<(Self, VarMap)> {
        let vars = VarMap::new();
        let vb = variables(&vars, 1);
        let mut random = stream(1, "data");
        let mut image = |shape: ImageShape, batch: usize| -> Result<Self> {
            let pixels: Vec<f32> = (0..batch * 784).map(|_| random.normal() as f32).collect();
            let labels: Vec<u32> = (0..batch).map(|_| random.below(10) as u32).collect();
            let (pixels, labels) = (
                Tensor::from_vec(pixels, (batch, 784), &Device::Cpu)?,
                Tensor::new(labels, &Device::Cpu)?,
            );
            Ok(Self::Image(ImageModel::new(&shape, &vb)?, pixels, labels))
        };
        let case = match name {
            "mlp" => image(
                ImageShape::Mlp(MlpConfig {
                    inputs: 784,
                    hidden: vec![512, 512],
                    classes: 10,
                    norm: true,
                }),
                128,
            )?,
            "cnn" => {
                let config = CnnConfig {
                    height: 28,
                    width: 28,
                    channels: vec![32, 64],
                    dense: 128,
                    classes: 10,
                    norm: true,
                };
                image(ImageShape::Cnn(config), 64)?
            }
            _ => {
                let small = DecoderShape::default();
                let large = DecoderShape {
                    hidden: 256,
                    ffn: 768,
                    layers: 6,
                    heads: 8,
                    kv_heads: 4,
                    ..DecoderShape::default()
                };
                let shape = if name == "decoder-1m" { small } else { large };
                let (batch, context) = (16, 128);
                let decoder = DecoderModel::new(
                    Path::new(name),
                    &shape.config_json(256, context)?,
                    context,
                    &vb,
                )?;
                let mut tokens = || -> Result<Tensor> {
                    let all: Vec<u32> = (0..batch * context)
                        .map(|_| random.below(256) as u32)
                        .collect();
                    Ok(Tensor::from_vec(all, (batch, context), &Device::Cpu)?)
                };
                Self::Text(Box::new(decoder), tokens()?, tokens()?)
            }
        };
        Ok((case, vars))
    }

    fn linears(&mut self) -> &mut dyn Linears {
        match self {
            Self::Image(model, ..) => model,
            Self::Text(decoder, ..) => &mut **decoder,
        }
    }

    fn loss(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Image(model, x, y) => cross_entropy(&model.forward(x)?, y)?,
            Self::Text(decoder, x, y) => cross_entropy(&decoder.forward(x)?, y)?,
        })
    }
}

/// The optimizer that updates the weights.
enum Update {
    Candle(AdamW),
    Ours(Box<Optimizer>),
}

/// A model in training.
struct Runner {
    case: Case,
    update: Update,
}

impl Runner {
    fn new(name: &str, quantized: bool, ours: bool) -> Result<Self> {
        let (mut case, vars) = Case::new(name)?;
        if quantized {
            prepare(
                case.linears(),
                &QuantizationConfig::bitnet_158(),
                StraightThroughEstimator::Plain,
                &vars,
            )?;
        }
        let update = if ours {
            Update::Ours(Box::new(Optimizer::new(
                &vars,
                &OptimizerConfig::default(),
            )?))
        } else {
            let all = folder::sorted(&vars).into_values().collect();
            Update::Candle(AdamW::new(
                all,
                ParamsAdamW {
                    lr: 1e-3,
                    ..ParamsAdamW::default()
                },
            )?)
        };
        Ok(Self { case, update })
    }

    /// Seconds of one step.
    fn step(&mut self) -> Result<f64> {
        let begin = Instant::now();
        let gradients = self.case.loss()?.backward()?;
        match &mut self.update {
            Update::Candle(adam) => adam.step(&gradients)?,
            Update::Ours(optimizer) => {
                optimizer.step(&gradients, Rates::default())?;
            }
        }
        drop(gradients);
        Ok(begin.elapsed().as_secs_f64())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Peak memory of this process so far, in MB.
fn peak() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .ok_or("no VmHWM: memory is measured on Linux only")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1e3)
}

/// Peak memory of a process that trains this model only.
fn measured(name: &str, kind: &str) -> Result<f64> {
    let output = Command::new(std::env::current_exe()?)
        .args(["memory", name, kind])
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    text.trim()
        .parse()
        .map_err(|_| format!("{name} {kind}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, name, kind] = &args[..]
        && mode == "memory"
    {
        let mut runner = Runner::new(name, kind == "quantized", true)?;
        for _ in 0..STEPS {
            runner.step()?;
        }
        println!("{}", peak()?);
        return Ok(());
    }
    let rounds: usize = match &args[..] {
        [] => 15,
        [flag, n] if flag == "--rounds" => n.parse()?,
        _ => return Err("expected nothing, or --rounds N".into()),
    };
    println!(
        "| model | twin, candle's AdamW | twin, our AdamW | quantized | to candle's | to ours \
         | memory of twin | quantized | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for name in MODELS {
        let mut runners = [
            Runner::new(name, false, false)?,
            Runner::new(name, false, true)?,
            Runner::new(name, true, true)?,
        ];
        let mut times = [vec![], vec![], vec![]];
        for round in 0..=rounds {
            for (runner, times) in runners.iter_mut().zip(&mut times) {
                let seconds = runner.step()?;
                // The first round warms up caches and pages.
                if round > 0 {
                    times.push(seconds);
                }
            }
        }
        drop(runners);
        let [candle, ours, quantized] = times.map(median);
        let (full_memory, memory) = (measured(name, "full")?, measured(name, "quantized")?);
        println!(
            "| {name} | {:.1} ms | {:.1} ms | {:.1} ms | {:.2} x | {:.2} x \
             | {full_memory:.0} MB | {memory:.0} MB | {:.2} x |",
            candle * 1e3,
            ours * 1e3,
            quantized * 1e3,
            quantized / candle,
            quantized / ours,
            memory / full_memory
        );
    }
    Ok(())
}
