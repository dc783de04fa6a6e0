//! Quantizers on tensors: overrides, custom quantizers and layouts, statistics, calibration.
#![cfg(all(feature = "tensor", feature = "advanced"))]

use bitnet_core::pack::{Layout, PackedLen, Unpacked};
use bitnet_core::{Matrix, MatrixSpec};
use bitnet_quant::CheckpointError;
use bitnet_quant::prelude::*;
use bitnet_quant::recipe::{Choices, Target};
use bitnet_quant::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

const CPU: Device = Device::Cpu;

fn normal(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1f32, shape, &CPU).unwrap()
}

#[test]
fn layers_differ_by_glob() {
    let int8 = Choices {
        precision: Some(Target::Quantized(Precision::Int8)),
        ..Choices::default()
    };
    let keep = Choices {
        precision: Some(Target::Keep),
        ..Choices::default()
    };
    let config = QuantizationConfig::builder()
        .group_size(32)
        .layer("*.down.*", int8)
        .layer("head*", keep)
        .build()
        .unwrap();
    let quantizer = BitNetQuantizer::new(config).unwrap();
    let w = normal(&[8, 64]);
    let spec = |name| quantizer.quantize_weights(name, &w).unwrap().spec().clone();
    assert_eq!(
        spec("layers.0.up.weight"),
        MatrixSpec::new(8, 64, Precision::Ternary, Granularity::Group(32))
    );
    assert_eq!(
        spec("layers.0.down.weight"),
        MatrixSpec::new(8, 64, Precision::Int8, Granularity::Group(32))
    );
    assert!(matches!(
        quantizer.quantize_weights("head.weight", &w),
        Err(Error::Input { .. })
    ));
}

/// A custom quantizer that keeps only signs.
struct Signs;

impl Quantizer for Signs {
    fn quantize(&self, x: &Tensor) -> Result<QuantizedTensor> {
        let values: Vec<i8> = x
            .flatten_all()?
            .to_vec1::<f32>()?
            .iter()
            .map(|&x| if x < 0.0 { -1 } else { 1 })
            .collect();
        let spec = MatrixSpec::new(1, values.len(), Precision::Binary, Granularity::Tensor);
        QuantizedTensor::from_matrix(
            Matrix {
                spec,
                values,
                scales: vec![1.0],
                zero_points: vec![],
            },
            x.shape().clone(),
            x.dtype(),
        )
    }
}

/// A character for each trit.
#[derive(Debug)]
struct Text;

impl TernaryPacker for Text {
    fn name(&self) -> &'static str {
        "text"
    }
    fn summary(&self) -> &'static str {
        "a character for each trit"
    }
    fn check(&self, _: &MatrixSpec) -> bitnet_core::Result<()> {
        Ok(())
    }
    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen {
        PackedLen::Exact(spec.values_len())
    }
    fn chunk_rows(&self, _: &MatrixSpec) -> Option<usize> {
        Some(1)
    }
    fn pack_into(
        &self,
        _: &MatrixSpec,
        values: &[i8],
        _: &[f32],
        out: &mut Vec<u8>,
    ) -> bitnet_core::Result<()> {
        out.extend(values.iter().map(|v| b"-0+"[(v + 1) as usize]));
        Ok(())
    }
    fn unpack(&self, _: &MatrixSpec, bytes: &[u8]) -> bitnet_core::Result<Unpacked> {
        let value = |b: &u8| {
            b"-0+"
                .iter()
                .position(|x| x == b)
                .map_or(0, |i| i as i8 - 1)
        };
        Ok(Unpacked {
            values: bytes.iter().map(value).collect(),
            scales: None,
        })
    }
}

#[test]
fn a_quantizer_and_a_packing_of_ones_own() {
    static TEXT: Text = Text;
    let x = Tensor::new(&[[0.5f32, -2.0], [3.0, -0.25]], &CPU).unwrap();
    let quantizers: Vec<Box<dyn Quantizer>> = vec![
        Box::new(Signs),
        Box::new(BitNetQuantizer::new(QuantizationConfig::bitnet_158()).unwrap()),
    ];
    let signs = quantizers[0].quantize(&x).unwrap();
    assert_eq!(
        signs.dequantize().unwrap().to_vec2::<f32>().unwrap(),
        [[1.0, -1.0], [1.0, -1.0]]
    );
    let mut ternary = quantizers[1].quantize(&x).unwrap();
    let before = ternary.dequantize().unwrap().to_vec2::<f32>().unwrap();
    ternary
        .pack_with(Some(&TEXT as &'static dyn Layout))
        .unwrap();
    assert_eq!(ternary.packed().unwrap().bytes(), b"0-+0");
    assert_eq!(
        quantizers[1]
            .dequantize(&ternary)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap(),
        before
    );
}

#[test]
fn stats_are_what_they_say() {
    let x = Tensor::new(&[[1.0f32, -2.0, 0.5, 0.0], [4.0, 0.25, -1.0, 3.0]], &CPU).unwrap();
    let config = QuantizationConfig::builder()
        .precision(Precision::Int8)
        .strategy(QuantizationStrategy::Asymmetric)
        .per_channel(true);
    let quantized = BitNetQuantizer::new(config.build().unwrap())
        .unwrap()
        .quantize(&x)
        .unwrap();
    let stats = quantized.stats(&x).unwrap();
    let back = quantized.dequantize().unwrap();
    let noise = (&back - &x)
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    let signal = x
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!((stats.quantization_error - (noise / signal).sqrt()).abs() < 1e-6);
    assert_eq!(
        (stats.elements_count, stats.min_value, stats.max_value),
        (8, -2.0, 4.0)
    );
    assert!((stats.scale_factor - (3.0 / 255.0 + 5.0 / 255.0) / 2.0).abs() < 1e-7);
    assert!(stats.zero_point.is_some());
    assert_eq!(stats.compression_ratio, 32.0 / (8 + 2 * 4 + 2) as f32);
    assert!(quantized.stats(&normal(&[4, 2])).is_err());
    let half = BitNetQuantizer::new(QuantizationConfig::bitnet_158())
        .unwrap()
        .quantize(&x.to_dtype(DType::F16).unwrap())
        .unwrap();
    assert_eq!(
        (half.dequantize().unwrap().dtype(), half.compression_ratio()),
        (DType::F16, 16.0 / 12.0)
    );
}

#[test]
fn calibration_makes_the_outputs_better() {
    // A few channels carry nearly all of the output.
    let x = (normal(&[64, 128])
        * Tensor::from_vec(
            (0..128)
                .map(|i| if i % 16 == 0 { 5f32 } else { 0.1 })
                .collect(),
            (1, 128),
            &CPU,
        )
        .unwrap()
        .broadcast_as((64, 128))
        .unwrap())
    .unwrap();
    let w = normal(&[32, 128]);
    let mut calibration = Calibration::default();
    bitnet_quant::tensor::observe::observe_tensor(&mut calibration, "w", &x).unwrap();
    let calibration = Arc::new(calibration);
    let output_error = |q: &QuantizedTensor| {
        let e = (q.dequantize().unwrap() - &w).unwrap();
        x.matmul(&e.t().unwrap())
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
    };
    for builder in [
        QuantizationConfig::builder().ternary_method(TernaryMethod::OptimalThreshold),
        QuantizationConfig::builder().planes(2),
        QuantizationConfig::builder()
            .precision(Precision::Int3)
            .clip(bitnet_core::scheme::Clip::Search),
        QuantizationConfig::builder()
            .precision(Precision::Binary)
            .binary_threshold(BinaryThresholdMethod::Optimal),
    ] {
        let plain = BitNetQuantizer::new(builder.build().unwrap()).unwrap();
        let weighed = plain.clone().with_calibration(calibration.clone());
        let (a, b) = (
            output_error(&plain.quantize_weights("w", &w).unwrap()),
            output_error(&weighed.quantize_weights("w", &w).unwrap()),
        );
        assert!(b < a, "{:?}: {b} {a}", plain.config().default);
        // A name that was not observed.
        assert_eq!(output_error(&weighed.quantize_weights("v", &w).unwrap()), a);
    }
    let quantizer =
        MixedPrecisionQuantizer::new(MixedPrecisionQuantizationConfig::default()).unwrap();
    let found = quantizer
        .search(&[("w", &w)], Search::within(3.0), Some(&calibration))
        .unwrap();
    assert!(found.bytes as usize * 8 <= 3 * 32 * 128);
    assert!(matches!(
        quantizer.search(&[("v", &w)], Search::within(3.0), Some(&calibration)),
        Err(Error::Checkpoint(CheckpointError::NotCalibrated(_)))
    ));
    assert!(
        quantizer
            .search(&[("w", &w)], Search::default(), None)
            .is_err()
    );
}

#[test]
fn streams_change_precision_with_their_quality() {
    let mut stream = StreamingQuantizer::new(PrecisionControlConfig::balanced()).unwrap();
    let mut run = |make: &dyn Fn() -> Tensor| {
        for _ in 0..12 {
            stream.push(&make()).unwrap();
        }
        stream.controller().precision()
    };
    // Four bits are enough for uniform numbers; outliers need eight.
    assert_eq!(
        run(&|| Tensor::rand(-1f32, 1f32, (4, 256), &CPU).unwrap()),
        Precision::Int4
    );
    let outliers = || {
        Tensor::cat(
            &[
                Tensor::rand(-1f32, 1f32, (4, 255), &CPU).unwrap(),
                Tensor::full(10f32, (4, 1), &CPU).unwrap(),
            ],
            1,
        )
        .unwrap()
    };
    assert_eq!(run(&outliers), Precision::Int8);
}

#[test]
fn all_of_it_goes_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<BitNetQuantizer>();
    check::<QuantizedTensor>();
    check::<BitLinear>();
    check::<StreamingQuantizer>();
    check::<MixedPrecisionQuantizer>();
    check::<Box<dyn WeightQuantizer>>();
}

#[test]
fn mixed_layers_and_their_mistakes() {
    use bitnet_core::mixed_precision::{LayerPrecisionSpec, LayerType};
    let budget = PrecisionAdjustmentParams {
        accuracy_threshold: 0.999,
        memory_pressure_threshold: 0.5,
        memory_budget: Some(2000),
    };
    let config = MixedPrecisionQuantizationConfig::bitnet().with_auto_adjustment(budget);
    let mut quantizer = MixedPrecisionQuantizer::new(config).unwrap();
    let layer = |id: &str, kind, shape: &[usize]| LayerPrecisionSpec {
        layer_id: id.into(),
        layer_type: kind,
        weight_shape: shape.to_vec(),
        ..Default::default()
    };
    quantizer
        .register_layer(layer("fc", LayerType::Linear, &[16, 64]))
        .unwrap();
    quantizer
        .register_layer(layer("norm", LayerType::Normalization, &[64]))
        .unwrap();
    assert!(
        quantizer
            .register_layer(layer("fc", LayerType::Linear, &[16, 64]))
            .is_err()
    );
    assert!(
        quantizer
            .register_layer(layer("conv", LayerType::Convolution, &[16, 64]))
            .is_err()
    );
    let (w, bias) = (normal(&[16, 64]), normal(&[16]));
    let fc = quantizer
        .quantize_layer("fc", &w, Some(&normal(&[4, 64])), Some(&bias))
        .unwrap();
    // A similarity of 0.999 needs eight bits; half of 2000 bytes is less.
    assert!(!fc.adjustments.is_empty() && fc.weights.unwrap().memory_footprint() <= 1000);
    let norm = quantizer
        .quantize_layer("norm", &normal(&[64]), None, None)
        .unwrap();
    assert!(norm.weights.is_none() && norm.compression_ratio == 1.0);
    assert!(quantizer.quantize_layer("fd", &w, None, None).is_err());
    assert!(
        quantizer
            .quantize_layer("fc", &w.t().unwrap(), None, None)
            .is_err()
    );
}
