//! The examples of the project's specification, with the differences that docs/spec-differences.md
//! lists, and tests of their results.
#![cfg(all(feature = "tensor", feature = "advanced"))]

use bitnet_quant::Quantizer;
use candle_core::{Device, Module, Tensor};

/// Every path that the specification imports, except `create_enhanced_config`, which it does not
/// use.
#[allow(unused_imports, reason = "the test is that they resolve")]
mod specified_paths {
    use bitnet_core::memory::{BitNetTensor, HybridMemoryPool};
    use bitnet_core::mixed_precision::{ComponentType, LayerPrecisionSpec, LayerType};
    use bitnet_quant::prelude::*;
    use bitnet_quant::{
        BinaryThresholdMethod, BitLinear, BitLinearConfig, BitNetQuantizer,
        ConfigurableQuantizationScheme, ConfigurationPreset, MixedPrecisionQuantizationConfig,
        OneBitParams, OneFiveEightBitParams, PrecisionControlConfig, QuantizationConfig,
        QuantizationScheme, QuantizationSchemeFactory, QuantizerFactory, absmean_quantize_weights,
        create_mixed_precision_quantizer, create_precision_controller,
    };
    #[cfg(feature = "qat")]
    use bitnet_quant::{QATConfig, QATTrainer, StraightThroughEstimator};
}

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The largest |a − b|.
fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

#[test]
fn basic_158_bit_quantization() -> Result {
    use bitnet_quant::{
        BitNetQuantizer, OptimizationLevel, QuantizationConfig, QuantizationScheme,
    };

    let config = QuantizationConfig::builder()
        .scheme(QuantizationScheme::BitNet158)
        .enable_simd(true)
        .optimization_level(OptimizationLevel::Aggressive)
        .build()?;

    let quantizer = BitNetQuantizer::new(config)?;

    let weights = Tensor::randn(0f32, 1f32, (1024, 1024), &Device::Cpu)?;
    let (mut quantized_weights, scale_factor) = quantizer.quantize_weights_absmean(&weights)?;

    println!(
        "Compression ratio: {}x",
        quantized_weights.compression_ratio()
    );
    println!("Scale factor: {scale_factor:.6}");

    let mean: f32 = weights.abs()?.mean_all()?.to_scalar()?;
    assert!((scale_factor - mean).abs() < 1e-5 * mean);
    // A value takes a byte until it is packed, then the size of the layout.
    assert!((quantized_weights.compression_ratio() - 4.0).abs() < 1e-3);
    quantized_weights.pack_weights()?;
    assert!((quantized_weights.compression_ratio() - 16.0).abs() < 1e-3);
    assert!(
        quantizer.quantize(&weights)?.compression_ratio() > 16.0,
        "the smallest layout"
    );
    Ok(())
}

#[test]
fn production_bitlinear_layer_usage() -> Result {
    use bitnet_quant::{BitLinear, BitLinearConfig, QuantizationScheme};

    let config = BitLinearConfig::builder()
        .input_features(768)
        .output_features(3072)
        .quantization_scheme(QuantizationScheme::BitNet158)
        .enable_bias(true)
        .memory_optimization(true)
        .build()?;

    let bitlinear = BitLinear::new(config)?;

    // Forward pass: Y = (A_q ⊗ W_q) * α + bias
    let input = Tensor::randn(0f32, 1f32, (32, 768), &Device::Cpu)?;
    let output = bitlinear.forward(&input)?;

    println!(
        "Memory reduction: {:.1}%",
        bitlinear.memory_reduction_percentage()
    );
    println!("Speedup: {:.1}x", bitlinear.measure_speedup(32)?.factor());

    assert_eq!(output.dims(), [32, 3072]);
    assert!(
        bitlinear.memory_reduction_percentage() >= 93.0,
        "{}",
        bitlinear.memory_reduction_percentage()
    );
    // The formula, by hand: integers times scales.
    let w = bitlinear.quantized_weights()?;
    let x: Vec<f32> = input.get(5)?.to_vec1()?;
    let top = x.iter().fold(0f32, |m, x| m.max(x.abs()));
    let sum: f64 = x
        .iter()
        .zip(&w.values)
        .map(|(x, &q)| f64::from((x * (127.0 / top)).round_ties_even()) * f64::from(q))
        .sum();
    let expected = sum * f64::from(top) / 127.0 * f64::from(w.scales[0]);
    let got: f32 = output.get(5)?.get(0)?.to_scalar()?;
    assert!(
        (f64::from(got) - expected).abs() < 1e-5 * expected.abs().max(1.0),
        "{got} {expected}"
    );
    Ok(())
}

#[test]
fn enhanced_configuration_system() -> Result {
    use bitnet_quant::prelude::*;

    let config = QuantizationConfigBuilder::new()
        .precision(QuantizationPrecision::FourBit)
        .strategy(QuantizationStrategy::Symmetric)
        .per_channel(false)
        .clip_threshold(3.0)
        .build()?;
    assert_eq!(config.default.precision(), Some(Precision::Int4));

    let weight_config = WeightQuantizationConfigBuilder::new()
        .base(QuantizationConfig::new(
            QuantizationPrecision::OneFiveEightBit,
        ))
        .group_size(128)
        .ternary_method(TernaryMethod::OptimalThreshold)
        .packing(PackingConfig::bitnet())
        .build()?;
    weight_config.validate()?;
    assert_eq!(
        weight_config.default.granularity,
        Some(Granularity::Group(128))
    );
    assert_eq!(weight_config.default.layout.as_deref(), Some("two-bit"));

    // The parameters of the text contradict one another; the error names each.
    let contradiction = QuantizationConfigBuilder::new()
        .precision(QuantizationPrecision::OneFiveEightBit)
        .strategy(QuantizationStrategy::Symmetric)
        .clip_threshold(3.0)
        .ternary_method(TernaryMethod::OptimalThreshold)
        .custom_threshold_factor(0.8)
        .build();
    let message = contradiction.unwrap_err().to_string();
    for field in ["default.mapping", "default.clip", "custom_threshold_factor"] {
        assert!(message.contains(field), "{field}: {message}");
    }
    Ok(())
}

#[test]
fn configuration_presets() -> Result {
    use bitnet_quant::{
        BitNetQuantizer, ConfigurationPreset, QuantizationPrecision, create_custom_enhanced_config,
    };

    let bitnet_config = ConfigurationPreset::BitNetOptimized.build()?;
    let performance_config = ConfigurationPreset::PerformanceOptimized.build()?;
    let accuracy_config = ConfigurationPreset::AccuracyOptimized.build()?;

    let custom_config = create_custom_enhanced_config(|builder| {
        builder
            .precision(QuantizationPrecision::TwoBit)
            .auto_optimization(true)
            .adaptive_thresholds(false)
            .real_time_monitoring(true)
    })?;
    assert_eq!(
        custom_config.default.precision(),
        Some(bitnet_core::Precision::Int2)
    );

    let weights = Tensor::randn(0f32, 1f32, (64, 512), &Device::Cpu)?;
    let measure = |config| -> Result<(f32, usize)> {
        let mut quantized = BitNetQuantizer::new(config)?.quantize(&weights)?;
        if quantized.packed().is_none() {
            quantized.pack_weights()?;
        }
        Ok((
            quantized.stats(&weights)?.quantization_error,
            quantized.memory_footprint(),
        ))
    };
    let (bitnet, performance, accuracy) = (
        measure(bitnet_config)?,
        measure(performance_config)?,
        measure(accuracy_config)?,
    );
    let (memory, balanced) = (
        measure(ConfigurationPreset::MemoryOptimized.build()?)?,
        measure(ConfigurationPreset::Balanced.build()?)?,
    );
    // They differ in error and size.
    assert!(
        accuracy.0 < balanced.0 && balanced.0 < performance.0 && performance.0 < bitnet.0,
        "{accuracy:?} {balanced:?} {performance:?}"
    );
    assert!(
        memory.1 < bitnet.1
            && bitnet.1 < performance.1
            && performance.1 < balanced.1
            && balanced.1 < accuracy.1
    );
    Ok(())
}

#[test]
fn precision_control_system() -> Result {
    use bitnet_quant::{
        PrecisionControlConfig, QuantizationPrecision, QuantizationStats,
        create_precision_controller,
    };

    let precision_config = PrecisionControlConfig::conservative();
    let device = Device::Cpu;
    let mut controller = create_precision_controller(precision_config, device)?;

    controller.validate_precision_bounds(
        QuantizationPrecision::OneFiveEightBit,
        0.7, // threshold
        1.0, // scale
    )?;
    let outside = controller
        .validate_precision_bounds(QuantizationPrecision::OneFiveEightBit, -0.7, f32::NAN)
        .unwrap_err()
        .to_string();
    assert!(
        outside.contains("threshold") && outside.contains("scale"),
        "{outside}"
    );

    let stats = QuantizationStats {
        elements_count: 1000,
        quantization_error: 0.05,
        compression_ratio: 20.0,
        min_value: -1.0,
        max_value: 1.0,
        scale_factor: 1.0,
        zero_point: None,
    };

    // 26 dB is within the bounds of the conservative policy.
    assert_eq!(controller.adjust_precision_dynamically(&stats)?, None);
    let poor = QuantizationStats {
        quantization_error: 0.00001,
        ..stats
    };
    if let Some(adjustment) = controller.adjust_precision_dynamically(&poor)? {
        println!(
            "Precision adjusted: {:?} -> {:?}",
            adjustment.from_precision, adjustment.to_precision
        );
        assert!(adjustment.to_precision.levels() < adjustment.from_precision.levels());
    } else {
        panic!("100 dB are more than conservative asks for");
    }

    let summary = controller.get_performance_summary();
    println!("Average error: {:.4}", summary.average_error);
    println!(
        "Average compression: {:.1}x",
        summary.average_compression_ratio
    );
    assert!((summary.average_error - 0.025005).abs() < 1e-6);
    assert_eq!(
        (
            summary.average_compression_ratio,
            summary.observations,
            summary.lowered
        ),
        (20.0, 2, 1)
    );
    Ok(())
}

#[test]
fn configurable_quantization_schemes() -> Result {
    use bitnet_quant::prelude::{
        OptimizationConfig, OptimizationLevel, QuantizationConfig, QuantizationPrecision,
        SchemeParameters,
    };
    use bitnet_quant::{BinaryThresholdMethod, OneBitParams, QuantizationSchemeConfig};
    use bitnet_quant::{ConfigurableQuantizationScheme, QuantizationSchemeFactory};

    let device = Device::Cpu;
    let one_bit_scheme: ConfigurableQuantizationScheme =
        QuantizationSchemeFactory::create_one_bit_scheme(device.clone())?;
    let ternary_scheme =
        QuantizationSchemeFactory::create_one_five_eight_bit_scheme(device.clone())?;

    let custom_config = QuantizationSchemeConfig {
        base: QuantizationConfig::new(QuantizationPrecision::OneBit),
        scheme_params: SchemeParameters {
            one_bit: OneBitParams {
                threshold_method: BinaryThresholdMethod::Optimal,
                ..Default::default()
            },
            ..Default::default()
        },
        adaptive_threshold: true,
        optimization: OptimizationConfig {
            enable_simd: true,
            parallel_processing: true,
            memory_optimization_level: OptimizationLevel::Aggressive,
        },
    };

    let custom_scheme =
        QuantizationSchemeFactory::create_custom_scheme(custom_config, device.clone())?;

    let input = Tensor::randn(0f32, 1f32, &[64, 128], &device)?;
    let quantized = custom_scheme.quantize_tensor(&input)?;
    let dequantized = custom_scheme.dequantize_tensor(&quantized)?;

    assert_eq!(dequantized.dims(), [64, 128]);
    let error = |scheme: &ConfigurableQuantizationScheme| -> Result<f32> {
        Ok(scheme.quantize(&input)?.stats(&input)?.quantization_error)
    };
    // Two levels lose more than three; the best two lose no more than ±mean.
    assert!(error(&ternary_scheme)? < error(&one_bit_scheme)?);
    assert!(error(&custom_scheme)? <= error(&one_bit_scheme)?);
    assert!(quantized.packed().is_some());
    Ok(())
}

#[test]
fn mixed_precision_integration() -> Result {
    use bitnet_core::mixed_precision::{ComponentType, LayerPrecisionSpec, LayerType};
    use bitnet_quant::{
        MixedPrecisionQuantizationConfig, PrecisionAdjustmentParams,
        create_mixed_precision_quantizer,
    };

    let mixed_config = MixedPrecisionQuantizationConfig::bitnet().with_auto_adjustment(
        PrecisionAdjustmentParams {
            accuracy_threshold: 0.95,
            memory_pressure_threshold: 0.8,
            ..Default::default()
        },
    );

    let device = Device::Cpu;
    let mut quantizer = create_mixed_precision_quantizer(mixed_config, device.clone())?;

    let layer_spec = LayerPrecisionSpec {
        layer_id: "conv1".to_string(),
        layer_type: LayerType::Convolution,
        input_shape: vec![1, 3, 224, 224],
        output_shape: vec![1, 64, 112, 112],
        weight_shape: vec![64, 3, 7, 7],
        ..Default::default()
    };
    assert_eq!(
        layer_spec.precision(ComponentType::Weights),
        Some(bitnet_core::Precision::Ternary)
    );
    quantizer.register_layer(layer_spec)?;

    let weights = Tensor::randn(0f32, 0.1f32, (64, 3, 7, 7), &device)?;
    let activations = Tensor::randn(0f32, 1f32, (1, 3, 224, 224), &device)?;

    let result = quantizer.quantize_layer("conv1", &weights, Some(&activations), None)?;

    println!("Layer quantization completed:");
    println!("  Compression ratio: {:.1}x", result.compression_ratio);
    println!("  Original size: {} bytes", result.original_size_bytes);
    println!("  Quantized size: {} bytes", result.quantized_size_bytes);

    assert_eq!(
        result.original_size_bytes,
        4 * (64 * 3 * 49 + 3 * 224 * 224)
    );
    let (left, acts) = (
        result.weights.expect("weights"),
        result.activations.expect("activations"),
    );
    assert_eq!(
        result.quantized_size_bytes,
        left.memory_footprint() + acts.memory_footprint()
    );
    // Ternary has a cosine similarity of 0.9 on normal weights, so the precision was raised to
    // reach 0.95.
    assert!(!result.adjustments.is_empty());
    assert!(left.stats(&weights)?.quantization_error <= (1.0f32 - 0.95 * 0.95).sqrt());
    Ok(())
}

#[test]
fn basic_weight_and_activation_quantization() -> Result {
    use bitnet_quant::prelude::*;

    let device = Device::Cpu;
    let weights = Tensor::randn(0f32, 1.0, (256, 512), &device)?;

    let quantized = absmean_quantize_weights(&weights, &device)?;

    println!("Compression: {:.1}x", quantized.compression_ratio());
    println!(
        "Memory saved: {:.1} MB",
        (weights.elem_count() * 4 - quantized.memory_footprint()) as f32 / 1024.0 / 1024.0
    );

    let activations = Tensor::randn(0f32, 1.0, (32, 256), &device)?;
    let quantized_activations = absmax_quantize_activations(&activations, &device)?;

    assert_eq!(quantized.memory_footprint(), 256 * 512 + 4);
    let matrix = quantized_activations.matrix()?;
    assert_eq!((matrix.values.len(), matrix.scales.len()), (32 * 256, 32));
    let largest: f32 = activations.abs()?.flatten_all()?.max(0)?.to_scalar()?;
    assert!(
        distance(&quantized_activations.dequantize()?, &activations)?
            <= largest / 127.0 / 2.0 * 1.001
    );
    Ok(())
}

#[test]
fn integration_with_bitnet_core() -> Result {
    use bitnet_core::memory::{BitNetTensor, HybridMemoryPool};
    use bitnet_quant::{Runtime, absmean_quantize_weights};

    let device = Device::Cpu;
    let weights = Tensor::randn(0f32, 1.0, (128, 256), &device)?;

    let mut quantized = absmean_quantize_weights(&weights, &device)?;
    let before = quantized.dequantize()?;
    quantized.pack_weights()?;

    let dequantized = quantized.unpack_weights()?;

    assert_eq!(distance(&dequantized, &before)?, 0.0);
    let packed: &BitNetTensor = quantized.packed().expect("packed");
    assert_eq!(packed.bytes().len(), 128 * 256 / 4);
    let runtime = Runtime::shared(&Default::default())?;
    let pool: &HybridMemoryPool = &runtime.memory;
    assert_eq!(pool.take(100).as_ptr() as usize % 64, 0);
    Ok(())
}

#[test]
fn quick_start() -> Result {
    use bitnet_quant::prelude::*;

    let device = Device::Cpu;
    let config = ConfigurationPreset::BitNetOptimized.build()?;

    let weights = Tensor::randn(0f32, 1.0, (256, 512), &device)?;
    let quantized = absmean_quantize_weights(&weights, &device)?;

    println!("Compression: {:.1}x", quantized.compression_ratio());

    let mut controller = create_precision_controller(config.control.unwrap_or_default(), device)?;

    assert_eq!(
        controller.adjust_precision_dynamically(&quantized.stats(&weights)?)?,
        None,
        "one observation is not enough"
    );
    assert_eq!(controller.get_performance_summary().observations, 1);
    Ok(())
}

#[test]
fn configuration_first_approach() -> Result {
    use bitnet_quant::prelude::*;

    // 1. Choose or build configuration
    let config = WeightQuantizationConfigBuilder::new()
        .base(QuantizationConfig::bitnet_158())
        .group_size(128)
        .ternary_method(TernaryMethod::OptimalThreshold)
        .packing(PackingConfig::max_compression())
        .build()?;

    // 2. Validate configuration
    config.validate()?;

    // 3. Create quantizer
    let quantizer = QuantizerFactory::create_weight_quantizer(config)?;

    // 4. Use quantizer
    let weights = Tensor::randn(0f32, 1.0, (64, 256), &Device::Cpu)?;
    let quantized = quantizer.quantize(&weights)?;

    assert_eq!(quantized.spec().scales_len(), 64 * 2);
    // Two bits and a scale for each group would be 2.25; the best ternary SQNR on normal weights is
    // 7.2 dB.
    assert!((quantized.memory_footprint() as f32) < 2.25 / 8.0 * 64.0 * 256.0);
    assert!((quantized.stats(&weights)?.sqnr_db() - 7.3).abs() < 0.4);
    Ok(())
}

#[cfg(feature = "qat")]
#[test]
fn quantization_aware_training() -> Result {
    use bitnet_quant::qat::{Linear, Linears, Optimizer, OptimizerConfig};
    use bitnet_quant::{QATConfig, QATTrainer, QuantizationScheme};
    use candle_nn::{Optimizer as _, VarBuilder, VarMap};

    struct Model(Linear, Linear);
    impl Model {
        fn forward_quantized(&self, input: &Tensor) -> candle_core::Result<Tensor> {
            self.1.forward(&self.0.forward(input)?.relu()?)
        }
    }
    impl Linears for Model {
        fn visit_linears(
            &mut self,
            visit: &mut dyn FnMut(&str, &mut Linear) -> bitnet_quant::Result<()>,
        ) -> bitnet_quant::Result<()> {
            visit("up", &mut self.0)?;
            visit("down", &mut self.1)
        }
    }
    struct Batch {
        input: Tensor,
        target: Tensor,
    }
    let (num_epochs, vars) = (24, VarMap::new());
    let vb = VarBuilder::from_varmap(&vars, candle_core::DType::F32, &Device::Cpu);
    let mut model = Model(
        Linear::new(8, 64, true, &vb.pp("up"))?,
        Linear::new(64, 1, true, &vb.pp("down"))?,
    );
    let mut dataloader = vec![];
    for _ in 0..16 {
        let input = Tensor::randn(0f32, 1f32, (64, 8), &Device::Cpu)?;
        dataloader.push(Batch {
            target: input.abs()?.sum_keepdim(1)?,
            input,
        });
    }
    let loss_fn = candle_nn::loss::mse;

    // Configure QAT training with progressive quantization
    let qat_config = QATConfig::builder()
        .steps(num_epochs)
        .quantization_scheme(QuantizationScheme::BitNet158)
        .progressive_quantization(true)
        .initial_bit_width(8)
        .target_bit_width(2) // 1.58-bit equivalent
        .gradient_scaling(1.0)
        .build()?;

    let mut trainer = QATTrainer::new(qat_config)?;
    trainer.prepare(&mut model, &vars)?;
    let mut optimizer = Optimizer::new(
        &vars,
        &OptimizerConfig {
            learning_rate: 0.01,
            ..OptimizerConfig::default()
        },
    )?;

    // Train with Straight-Through Estimator
    let mut losses = vec![];
    for epoch in 0..num_epochs {
        trainer.update_quantization_schedule(epoch, &mut model)?;
        for batch in &dataloader {
            let output = model.forward_quantized(&batch.input)?;
            let loss = loss_fn(&output, &batch.target)?;

            // Backward pass with STE gradient preservation
            let gradients = trainer.backward_with_ste(&loss)?;
            candle_nn::Optimizer::step(&mut optimizer, &gradients)?;
            losses.push(loss.to_scalar::<f32>()?);
        }
    }

    let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
    let (first, last) = (mean(&losses[..16]), mean(&losses[losses.len() - 16..]));
    assert!(last < 0.25 * first, "{first} {last}");
    assert_eq!(optimizer.learning_rate(), 0.01);
    // 8, 4 and 2 bits over the first half, ternary at the end: three values and one scale.
    let Linear::Qat(layer) = &model.0 else {
        panic!("in training")
    };
    let weights = layer.quantized_weights()?;
    assert!(weights.values.iter().all(|q| (-1..=1).contains(q)) && weights.scales.len() == 1);
    Ok(())
}
