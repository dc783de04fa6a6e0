//! Measures the library: `cargo run --release -p bitnet-quant --example library`.

use bitnet_core::quantize::quantize;
use bitnet_core::scheme::Threshold;
use bitnet_quant::prelude::*;
use bitnet_quant::{Compute, Runtime, quantize_tensor};
use candle_core::{Device, Tensor};
use std::hint::black_box;
use std::time::{Duration, Instant};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

const TURNS: usize = 15;

fn main() -> Result {
    let machine = Compute::default().machine()?;
    println!("{machine:?}; medians of {TURNS} turns, all of a line measured in the same turns\n");
    weights()?;
    for activations in [Activations::Int8, Activations::Int4] {
        layer(activations)?;
    }
    small_things()
}

/// A measured operation; the time includes dropping its result.
fn keep<T>(thing: T) -> Result {
    black_box(thing);
    Ok(())
}

/// Median times of several operations, each run once per repetition.
fn medians<const N: usize>(mut things: [&mut dyn FnMut() -> Result; N]) -> Result<[Duration; N]> {
    let mut times = [const { Vec::new() }; N];
    for turn in 0..=TURNS {
        for (thing, times) in things.iter_mut().zip(&mut times) {
            let start = Instant::now();
            thing()?;
            // The first repetition warms memory up.
            if turn > 0 {
                times.push(start.elapsed());
            }
        }
    }
    Ok(times.map(|mut t| {
        t.sort_unstable();
        t[TURNS / 2]
    }))
}

fn weights() -> Result {
    const N: usize = 4096;
    let w = Tensor::randn(0f32, 1f32, (N, N), &Device::Cpu)?;
    let slice: Vec<f32> = w.flatten_all()?.to_vec1()?;
    let scheme = Scheme::ternary(Threshold::Absmean);
    let one = Runtime::new(&Compute {
        threads: 1,
        ..Compute::default()
    })?;
    let [kernel, single, all] = medians([
        &mut || keep(quantize(&one.machine.kernels, &slice, N, N, &scheme, None)?),
        &mut || keep(quantize_tensor(&one, &w, &scheme, None)?),
        &mut || keep(absmean_quantize_weights(&w, &Device::Cpu)?),
    ])?;
    let speed = |t: Duration| 4.0 * (N * N) as f64 / 1e9 / t.as_secs_f64();
    println!(
        "absmean, {N} x {N} f32: kernel {:.2} GB/s on one thread",
        speed(kernel)
    );
    println!(
        "  on a tensor, one thread  {:.2} GB/s, {:.0} % of the kernel",
        speed(single),
        100.0 * speed(single) / speed(kernel)
    );
    println!(
        "  absmean_quantize_weights {:.2} GB/s, {:.0} % of the kernel",
        speed(all),
        100.0 * speed(all) / speed(kernel)
    );
    Ok(())
}

fn layer(activations: Activations) -> Result {
    const N: usize = 4096;
    let mut config = QuantizationConfig::bitnet_158();
    config.default.granularity = Some(Granularity::Channel);
    config.activations = Some(activations);
    let layer = BitLinear::new(BitLinearConfig {
        packed: true,
        config,
        ..BitLinearConfig::new(N, N)
    })?;
    println!(
        "\nBitLinear {N} -> {N}, a scale for each channel, {activations:?} activations, packed"
    );
    println!(
        "  weights {} bytes, {:.2} % less than f32",
        layer.memory_footprint(),
        layer.memory_reduction_percentage()
    );
    for tokens in [1, 32] {
        let speed = layer.measure_speedup(tokens)?;
        println!(
            "  batch {tokens:>2}: {:>9.1?}, candle f32 Linear {:>9.1?}: {:.1} times faster",
            speed.bitlinear,
            speed.linear,
            speed.factor()
        );
    }
    Ok(())
}

fn small_things() -> Result {
    const MANY: u32 = 1000;
    let config = ConfigurationPreset::AccuracyOptimized.build()?;
    let mut controller = PrecisionController::new(PrecisionControlConfig::balanced())?;
    let mut error = 0.0;
    let [build, validate, preset, adjust] = medians([
        &mut || {
            for _ in 0..MANY {
                black_box(
                    QuantizationConfig::builder()
                        .ternary_method(TernaryMethod::OptimalThreshold)
                        .group_size(128)
                        .build()?,
                );
            }
            Ok(())
        },
        &mut || {
            for _ in 0..MANY {
                black_box(&config).validate()?;
            }
            Ok(())
        },
        &mut || (0..MANY).try_for_each(|_| keep(ConfigurationPreset::AccuracyOptimized.build()?)),
        &mut || {
            for _ in 0..MANY {
                error = (error + 0.013) % 0.5;
                let stats = QuantizationStats {
                    elements_count: 1,
                    quantization_error: error,
                    compression_ratio: 8.0,
                    min_value: -1.0,
                    max_value: 1.0,
                    scale_factor: 1.0,
                    zero_point: None,
                };
                black_box(controller.adjust_precision_dynamically(&stats)?);
            }
            Ok(())
        },
    ])?
    .map(|t| t / MANY);
    println!("\nconfiguration: build {build:?}, validate {validate:?}, preset {preset:?}");
    println!("precision controller, one adjustment: {adjust:?}");
    Ok(())
}
