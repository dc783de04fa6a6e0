//! Allocations: a controller makes none, a forward pass only its output.
#![cfg(feature = "tensor")]

use bitnet_quant::prelude::*;
use candle_core::{Device, Module, Tensor};

/// Allocations of `f` on this thread.
fn count(f: impl FnOnce()) -> u64 {
    allocation_counter::measure(f).count_total
}

#[test]
fn an_adjustment_allocates_nothing() {
    let mut controller = PrecisionController::new(PrecisionControlConfig::balanced()).unwrap();
    let stats = |error| QuantizationStats {
        elements_count: 1,
        quantization_error: error,
        compression_ratio: 8.0,
        min_value: -1.0,
        max_value: 1.0,
        scale_factor: 1.0,
        zero_point: None,
    };
    let mut changes = 0;
    let allocations = count(|| {
        for i in 0..1000u16 {
            let error = if i / 10 % 2 == 0 { 0.5 } else { 0.001 };
            changes += u32::from(
                controller
                    .adjust_precision_dynamically(&stats(error))
                    .unwrap()
                    .is_some(),
            );
        }
    });
    assert!(changes > 0);
    assert_eq!(allocations, 0);
}

#[test]
fn a_forward_pass_allocates_its_output_and_nothing_else() {
    for activations in [Activations::Int8, Activations::Int4, Activations::Sign] {
        for norm in [None, Some(SubNorm::Rms), Some(SubNorm::Layer)] {
            let mut config = QuantizationConfig::bitnet_158();
            config.activations = Some(activations);
            let config = BitLinearConfig {
                bias: true,
                packed: true,
                norm,
                config,
                ..BitLinearConfig::new(256, 192)
            };
            let layer = BitLinear::new(config).unwrap();
            for shape in [vec![1, 256], vec![7, 256], vec![2, 3, 256]] {
                let x = Tensor::randn(0f32, 1f32, &shape[..], &Device::Cpu).unwrap();
                let expected = layer.forward(&x).unwrap();
                let dims = expected.dims().to_vec();
                let output = count(|| {
                    let y = match dims[..] {
                        [a, b] => Tensor::from_vec(vec![0f32; a * b], (a, b), &Device::Cpu),
                        _ => Tensor::from_vec(
                            vec![0f32; dims.iter().product()],
                            (dims[0], dims[1], dims[2]),
                            &Device::Cpu,
                        ),
                    };
                    drop(y.unwrap());
                });
                let forward = count(|| drop(layer.forward(&x).unwrap()));
                assert_eq!(forward, output, "{activations:?}, {norm:?}, {shape:?}");
            }
        }
    }
}
