//! Forward and backward pass of layers in training beside candle's f32 linear layer on the same threads, and what the process holds meanwhile.
//!
//! ```sh
//! cargo run --release -p bitnet-quant --example qat_layer
//! ```

use bitnet_quant::QuantizationConfig;
use bitnet_quant::qat::{QatLinear, StraightThroughEstimator};
use candle_core::{Device, Module, Result, Tensor, Var};
use std::time::{Duration, Instant};

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    println!("tokens      K      N  estimator   forward   f32     ratio   step      f32     ratio   (µs, medians)");
    for (tokens, k, n) in
        [(64, 784, 512), (128, 512, 512), (128, 512, 10), (1024, 256, 256), (1024, 256, 704), (1024, 704, 256), (2048, 512, 512)]
    {
        for estimator in ["plain", "stretched"] {
            let weight = Var::randn(0f32, 0.05f32, (n, k), &Device::Cpu)?;
            let x = Var::randn(0f32, 1f32, (tokens, k), &Device::Cpu)?;
            let grad = Tensor::randn(0f32, 1f32, (tokens, n), &Device::Cpu)?;
            let full = candle_nn::Linear::new(weight.as_tensor().clone(), None);
            let estimator: StraightThroughEstimator = estimator.parse()?;
            let qat = QatLinear::new(weight.as_tensor().clone(), None, None, &QuantizationConfig::bitnet_158(), estimator)?;
            let [a, b] = medians(&qat, &full, &x, None)?;
            let [c, d] = medians(&qat, &full, &x, Some(&grad))?;
            let us = |d: Duration| d.as_secs_f64() * 1e6;
            println!(
                "{tokens:6} {k:6} {n:6}  {:9} {:8.0} {:8.0}   {:5.2} {:8.0} {:8.0}   {:5.2}",
                estimator.to_string(),
                us(a),
                us(b),
                us(a) / us(b),
                us(c),
                us(d),
                us(c) / us(d)
            );
        }
    }
    Ok(())
}

fn medians(a: &dyn Module, b: &dyn Module, x: &Var, grad: Option<&Tensor>) -> Result<[Duration; 2]> {
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
