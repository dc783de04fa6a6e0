//! The time of one optimizer step, compared with candle-nn's AdamW on the same variables and
//! gradients.
//!
//! ```sh
//! cargo run --release -p bitnet-quant --example optimizers
//! ```

use bitnet_quant::qat::{Optimizer, OptimizerConfig, Rates};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer as _;
use std::time::Instant;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

const ROUNDS: usize = 41;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result {
    let mlp = [
        (512, 784),
        (1, 512),
        (512, 512),
        (1, 512),
        (10, 512),
        (1, 10),
    ];
    let layer = [
        (256, 256),
        (128, 256),
        (128, 256),
        (256, 256),
        (704, 256),
        (704, 256),
        (256, 704),
        (1, 256),
        (1, 256),
    ];
    let mut decoder = vec![(256, 256), (1, 256)];
    (0..6).for_each(|_| decoder.extend(layer));
    println!(
        "{:<38}{:>12}{:>12}{:>12}{:>9}",
        "one step of AdamW", "weights", "candle ms", "ours ms", "ratio"
    );
    for (name, shapes) in [
        ("MLP 784-512-512-10", &mlp[..]),
        ("decoder of 6 layers, width 256", &decoder),
        ("one matrix", &[(2048, 2048)]),
    ] {
        let var = |&(n, k): &(usize, usize)| {
            Ok(Var::from_tensor(&Tensor::randn(
                0f32,
                1f32,
                (n, k),
                &Device::Cpu,
            )?)?)
        };
        let vars = shapes.iter().map(var).collect::<Result<Vec<_>>>()?;
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for var in &vars {
            loss = (loss + var.sqr()?.sum_all()?)?;
        }
        let grads = loss.backward()?;
        let weights: usize = vars.iter().map(|v| v.elem_count()).sum();
        let params = candle_nn::ParamsAdamW {
            lr: 1e-5,
            ..Default::default()
        };
        let mut theirs = candle_nn::AdamW::new(vars.clone(), params)?;
        let config = OptimizerConfig {
            learning_rate: 1e-5,
            ..OptimizerConfig::default()
        };
        let named = vars
            .iter()
            .enumerate()
            .map(|(i, v)| (i.to_string(), v.clone()))
            .collect();
        let mut ours = Optimizer::for_variables(named, &config)?;
        let (mut of_theirs, mut of_ours) = (vec![], vec![]);
        for _ in 0..ROUNDS {
            let begin = Instant::now();
            theirs.step(&grads)?;
            of_theirs.push(begin.elapsed().as_secs_f64() * 1e3);
            let begin = Instant::now();
            ours.step(
                &grads,
                Rates {
                    clip: Some(1.0),
                    ..Rates::default()
                },
            )?;
            of_ours.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        let (a, b) = (median(of_theirs), median(of_ours));
        println!("{name:<38}{weights:>12}{a:>12.3}{b:>12.3}{:>9.3}", b / a);
    }
    Ok(())
}
