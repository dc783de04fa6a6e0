//! BitLinear beyond the golden cases: the cache, loading, threads, bad input.
#![cfg(feature = "tensor")]

use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_quant::checkpoint::{self, Existing, Options};
use bitnet_quant::prelude::*;
use bitnet_quant::{Error, Job, Source};
use candle_core::{DType, Device, Module, Tensor, Var};
use proptest::prelude::*;
use std::collections::HashMap;

const CPU: Device = Device::Cpu;

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        == b.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

fn normal(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1f32, shape, &CPU).unwrap()
}

#[test]
fn a_weight_update_invalidates_the_cache() {
    let weight = Var::from_tensor(&normal(&[16, 32])).unwrap();
    let layer = BitLinear::from_tensors(
        weight.as_tensor().clone(),
        None,
        &BitLinearConfig::new(32, 16),
    )
    .unwrap();
    let x = normal(&[3, 32]);
    assert!(!layer.is_cached().unwrap());
    let first = layer.forward_t(&x, false).unwrap();
    assert!(layer.is_cached().unwrap() && same(&first, &layer.forward_t(&x, false).unwrap()));
    let cached = layer.memory_footprint();
    assert!(cached > 16 * 32 * 4, "the floats and their packed form");
    weight.set(&normal(&[16, 32])).unwrap();
    assert!(!layer.is_cached().unwrap());
    let second = layer.forward_t(&x, false).unwrap();
    assert!(!same(&first, &second));
    // The same as a fresh layer on the new weights.
    let fresh = BitLinear::from_tensors(
        weight.as_tensor().copy().unwrap(),
        None,
        &BitLinearConfig::new(32, 16),
    )
    .unwrap();
    assert!(same(&second, &fresh.forward_t(&x, false).unwrap()));
}

#[test]
fn optimizers_train_it() {
    use candle_nn::Optimizer;
    let mut layer = BitLinear::new(BitLinearConfig {
        bias: true,
        ..BitLinearConfig::new(16, 4)
    })
    .unwrap();
    let vars =
        [layer.weight().unwrap(), layer.bias().unwrap()].map(|t| Var::from_tensor(t).unwrap());
    layer = BitLinear::from_tensors(
        vars[0].as_tensor().clone(),
        Some(vars[1].as_tensor().clone()),
        &BitLinearConfig {
            bias: true,
            ..BitLinearConfig::new(16, 4)
        },
    )
    .unwrap();
    let (x, target) = (
        normal(&[64, 16]),
        normal(&[64, 16]).matmul(&normal(&[16, 4])).unwrap(),
    );
    let loss = |layer: &BitLinear| {
        (layer.forward(&x).unwrap() - &target)
            .unwrap()
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap()
    };
    let first = loss(&layer).to_scalar::<f32>().unwrap();
    let mut sgd = candle_nn::SGD::new(vars.to_vec(), 0.05).unwrap();
    for _ in 0..50 {
        sgd.backward_step(&loss(&layer)).unwrap();
    }
    let last = loss(&layer).to_scalar::<f32>().unwrap();
    assert!(last < 0.9 * first, "{first} {last}");
}

#[test]
fn threads_share_a_layer() {
    let mut layer = BitLinear::new(BitLinearConfig::new(64, 48)).unwrap();
    layer.pack().unwrap();
    let inputs: Vec<Tensor> = (0..8).map(|i| normal(&[1 + i, 64])).collect();
    let expected: Vec<Tensor> = inputs.iter().map(|x| layer.forward(x).unwrap()).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                inputs
                    .iter()
                    .zip(&expected)
                    .for_each(|(x, y)| assert!(same(&layer.forward(x).unwrap(), y)))
            });
        }
    });
}

#[test]
fn half_precision_and_strides() {
    let mut layer = BitLinear::new(BitLinearConfig {
        bias: true,
        ..BitLinearConfig::new(32, 8)
    })
    .unwrap();
    let x = normal(&[6, 32]);
    let strided = x.t().unwrap().contiguous().unwrap().t().unwrap();
    assert!(!strided.is_contiguous());
    for _ in 0..2 {
        let y = layer.forward(&x).unwrap();
        assert!(same(&y, &layer.forward(&strided).unwrap()));
        for dtype in [DType::F16, DType::BF16] {
            let half = layer.forward(&x.to_dtype(dtype).unwrap()).unwrap();
            assert_eq!(half.dtype(), dtype);
            let half = half.to_dtype(DType::F32).unwrap();
            let largest = (half - &y)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            // Inputs and outputs are rounded to 8 bits; a sum has 32 terms.
            assert!(largest < 0.1, "{dtype:?} {largest}");
        }
        layer.pack().unwrap();
    }
}

#[test]
fn a_layer_of_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (floats, packed) = (
        folder.path().join("floats.safetensors"),
        folder.path().join("packed.safetensors"),
    );
    let tensors: HashMap<_, _> =
        [("fc.weight", normal(&[12, 64])), ("fc.bias", normal(&[12]))].into();
    candle_core::safetensors::save(&tensors, &floats).unwrap();
    let config = QuantizationConfig::bitnet_158();
    let x = normal(&[2, 3, 64]);

    let source = Source::open(&floats).unwrap();
    let mut latent = BitLinear::open(&source, "fc", &config).unwrap();
    assert!(same(latent.weight().unwrap(), &tensors["fc.weight"]));
    let job = Job::quantize(&source, &config, &packed).unwrap();
    let kernels = bitnet_kernels::Kernels::detect();
    let options = Options {
        threads: 1,
        kernels,
        progress: &(),
        interrupt: &Default::default(),
        existing: Existing::Refuse,
    };
    checkpoint::run(&job, &packed, &options).unwrap();

    // The file has the values of the layer, so both compute the same bits.
    let layer = BitLinear::open(&Source::open(&packed).unwrap(), "fc", &config).unwrap();
    assert!(layer.weight().is_none());
    latent.pack().unwrap();
    assert_eq!(
        layer.quantized_weights().unwrap(),
        latent.quantized_weights().unwrap()
    );
    assert!(same(
        &layer.forward(&x).unwrap(),
        &latent.forward(&x).unwrap()
    ));
    assert!(matches!(
        BitLinear::open(&source, "fd", &config),
        Err(Error::Input { .. })
    ));
}

#[test]
fn each_mistake_has_its_message() {
    let config = BitLinearConfig::new(8, 4);
    let layer = BitLinear::new(config.clone()).unwrap();
    let message = |r: candle_core::Result<Tensor>| r.unwrap_err().to_string();
    assert!(
        message(layer.forward(&normal(&[2, 7])))
            .contains("input: expected 8 features, got shape [2, 7]")
    );
    assert!(
        message(layer.forward(&Tensor::ones((2, 8), DType::U8, &CPU).unwrap()))
            .contains("expected f32, f16 or bf16, got u8")
    );
    assert!(message(layer.forward(&normal(&[0, 8]))).contains("at least 1 element"));
    let nan = (normal(&[2, 8]) * f64::NAN).unwrap();
    assert!(message(layer.forward(&nan)).contains("NaN"));
    assert!(
        layer
            .forward_t(&nan, false)
            .unwrap_err()
            .to_string()
            .contains("NaN")
    );

    let error = |r: bitnet_quant::Result<BitLinear>| r.unwrap_err().to_string();
    assert!(
        error(BitLinear::from_tensors(normal(&[8, 4]), None, &config))
            .contains("expected shape [4, 8], got [8, 4]")
    );
    assert!(
        error(BitLinear::from_tensors(
            normal(&[4, 8]),
            Some(normal(&[8])),
            &config
        ))
        .contains("bias: expected shape [4], got [8]")
    );
    assert!(
        error(BitLinear::from_tensors(
            normal(&[4, 8]),
            Some(normal(&[4])),
            &config
        ))
        .contains("bias: expected none, got one")
    );
    let normed = BitLinearConfig {
        norm: Some(SubNorm::Rms),
        ..config.clone()
    };
    assert!(error(BitLinear::from_tensors(normal(&[4, 8]), None, &normed)).contains("norm"));
    assert!(error(BitLinear::new(BitLinearConfig::new(0, 4))).contains("in_features"));
    let spec = MatrixSpec::new(4, 8, Precision::Ternary, Granularity::Channel);
    let short = Matrix {
        spec,
        values: vec![0; 31],
        scales: vec![1.0; 4],
        zero_points: vec![],
    };
    assert!(
        error(BitLinear::from_matrix(
            &short,
            None,
            &QuantizationConfig::bitnet_158()
        ))
        .contains("expected 32 elements, got 31")
    );
    let vb = candle_nn::VarBuilder::zeros(DType::F32, &CPU);
    assert!(BitLinear::load(vb.pp("layer"), &config).is_ok());
    let empty = candle_nn::VarBuilder::from_tensors(HashMap::new(), DType::F32, &CPU);
    assert!(error(BitLinear::load(empty, &config)).contains("weight"));
    assert!(matches!(
        absmean_quantize_weights(&Tensor::new(1f32, &CPU).unwrap(), &CPU),
        Err(Error::Input { .. })
    ));
}

#[test]
fn every_scheme_packs_and_computes_what_it_fakes() {
    let builder = QuantizationConfig::builder;
    let schemes = [
        builder().precision(Precision::Binary),
        builder()
            .precision(Precision::Binary)
            .binary_threshold(BinaryThresholdMethod::Optimal)
            .group_size(32),
        builder()
            .ternary_method(TernaryMethod::OptimalThreshold)
            .group_size(20),
        builder().planes(2).group_size(32),
        builder().planes(3),
        builder()
            .precision(Precision::Int2)
            .strategy(QuantizationStrategy::Asymmetric)
            .group_size(32),
        builder().precision(Precision::Int3),
        builder().precision(Precision::Int4).group_size(64),
        builder()
            .precision(Precision::Int4)
            .strategy(QuantizationStrategy::Asymmetric)
            .group_size(32),
        builder().precision(Precision::Int8),
        builder()
            .precision(Precision::Int8)
            .strategy(QuantizationStrategy::Asymmetric),
    ];
    let (w, x) = (normal(&[70, 100]), normal(&[3, 100]));
    for scheme in schemes {
        for activations in [
            Activations::Int8,
            Activations::Int4,
            Activations::Sign,
            Activations::Float,
        ] {
            let config = scheme.clone().activations(activations).build().unwrap();
            let one_plane_of_trits = config.default.precision() == Some(Precision::Ternary)
                && config.default.planes.is_none();
            let mut layer = BitLinear::from_tensors(
                w.clone(),
                None,
                &BitLinearConfig {
                    config,
                    ..BitLinearConfig::new(100, 70)
                },
            )
            .unwrap();
            let faked = layer.forward_t(&x, true).unwrap();
            let before = layer.quantized_weights().unwrap();
            layer.pack().unwrap();
            assert_eq!(
                layer.quantized_weights().unwrap(),
                before,
                "{:?}",
                before.spec
            );
            match layer.forward_t(&x, false) {
                Ok(packed) => {
                    // Sums of 100 terms in another order: f32 has 24 bits.
                    let largest = (packed - &faked)
                        .unwrap()
                        .abs()
                        .unwrap()
                        .max_all()
                        .unwrap()
                        .to_scalar::<f32>()
                        .unwrap();
                    let size = faked
                        .abs()
                        .unwrap()
                        .max_all()
                        .unwrap()
                        .to_scalar::<f32>()
                        .unwrap();
                    assert!(
                        largest <= 1e-5 * size,
                        "{:?} {activations:?}: {largest} of {size}",
                        before.spec
                    );
                }
                Err(error) => {
                    assert!(
                        activations == Activations::Float && !one_plane_of_trits,
                        "{:?} {activations:?}: {error}",
                        before.spec
                    );
                    assert!(error.to_string().contains("float activations"), "{error}");
                }
            }
        }
    }
}

/// Tensors of any shape, type and contents.
fn any_tensor() -> impl Strategy<Value = Tensor> {
    let number = prop_oneof![
        8 => -3.0f32..3.0,
        1 => prop::sample::select(vec![0.0, -0.0, 1e-40, 3e38, -3e38, f32::NAN, f32::INFINITY, 1e-8]),
    ];
    let dtype = prop::sample::select(vec![
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::F64,
        DType::U8,
    ]);
    (prop::collection::vec(0usize..7, 0..5), dtype, any::<bool>()).prop_flat_map(
        move |(shape, dtype, transposed)| {
            let n: usize = shape.iter().product();
            prop::collection::vec(number.clone(), n).prop_map(move |data| {
                let tensor = Tensor::from_vec(data, &shape[..], &CPU)
                    .unwrap()
                    .to_dtype(dtype)
                    .unwrap();
                if transposed && tensor.rank() >= 2 {
                    tensor.t().unwrap()
                } else {
                    tensor
                }
            })
        },
    )
}

fn any_config() -> impl Strategy<Value = QuantizationConfigBuilder> {
    let precision = prop::sample::select(vec![
        QuantizationPrecision::OneBit,
        QuantizationPrecision::OneFiveEightBit,
        QuantizationPrecision::TwoBit,
        QuantizationPrecision::ThreeBit,
        QuantizationPrecision::FourBit,
        QuantizationPrecision::EightBit,
    ]);
    let methods = prop::sample::select(vec![
        None,
        Some(TernaryMethod::MedianThreshold),
        Some(TernaryMethod::OptimalThreshold),
        Some(TernaryMethod::AdaptiveThreshold),
    ]);
    let activations = prop::sample::select(vec![
        Activations::Float,
        Activations::Int8,
        Activations::Int4,
        Activations::Sign,
    ]);
    let numbers = (
        prop::option::of(0usize..9),
        prop::option::of(0usize..5),
        prop::option::of(-1.0f32..4.0),
    );
    (precision, methods, activations, numbers, any::<bool>()).prop_map(
        |(precision, method, activations, (group, planes, clip), asymmetric)| {
            let mut builder = QuantizationConfig::builder()
                .precision(precision)
                .activations(activations);
            if let Some(method) = method {
                builder = builder.ternary_method(method);
            }
            if let Some(group) = group {
                builder = builder.group_size(group);
            }
            if let Some(planes) = planes {
                builder = builder.planes(planes);
            }
            if let Some(clip) = clip {
                builder = builder.clip_threshold(clip);
            }
            if asymmetric {
                builder = builder.strategy(QuantizationStrategy::Asymmetric);
            }
            builder
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any input gives a result or an error, and a result has the right shape.
    #[test]
    fn nothing_panics(config in any_config(), w in any_tensor(), x in any_tensor(), (n, k) in (0usize..7, 0usize..7)) {
        let _ = absmean_quantize_weights(&w, &CPU);
        let _ = absmax_quantize_activations(&x, &CPU);
        let _ = sign_quantize_activations(&x, &CPU);
        let Ok(config) = config.build() else { return Ok(()) };
        if let Ok(mut quantized) = BitNetQuantizer::new(config.clone()).unwrap().quantize(&w) {
            let back = quantized.dequantize().unwrap();
            prop_assert_eq!(back.dims(), w.dims());
            let before = quantized.matrix().unwrap().into_owned();
            quantized.pack_weights().unwrap();
            prop_assert_eq!(quantized.matrix().unwrap().into_owned(), before);
            prop_assert!(quantized.stats(&w).is_ok());
            let _ = quantized.stats(&x);
        }
        let layer = BitLinearConfig { config, ..BitLinearConfig::new(k, n) };
        if let Ok(mut layer) = BitLinear::from_tensors(w, None, &layer) {
            let check = |y: candle_core::Result<Tensor>| {
                if let Ok(y) = y {
                    assert_eq!(y.dims().last(), Some(&n));
                    assert_eq!(y.elem_count() / n, x.elem_count() / k);
                }
            };
            check(layer.forward_t(&x, true).map_err(candle_core::Error::wrap));
            check(layer.forward(&x));
            if layer.pack().is_ok() {
                check(layer.forward(&x));
                let _ = layer.unpack();
            }
        }
    }
}
