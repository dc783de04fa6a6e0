//! The tensor API against torch, transformers and numpy. The expected values are
//! tests/golden/*.json, written by tests/golden/generate.py.
#![cfg(feature = "tensor")]

use bitnet_quant::prelude::*;
use candle_core::{Device, Tensor, Var};
use serde_json::Value;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn read(name: &str) -> Value {
    let path = format!("{}/tests/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn floats(v: &Value) -> Vec<f32> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

fn shape(v: &Value) -> Vec<usize> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_u64().unwrap() as usize)
        .collect()
}

fn var(data: &Value, shape: &[usize]) -> Result<Var> {
    Ok(Var::from_tensor(&Tensor::from_vec(
        floats(data),
        shape,
        &Device::Cpu,
    )?)?)
}

/// Equal up to the rounding of sums: at most 64 terms, each as large as the largest result, in f32
/// of 24 bits.
fn close(what: &str, got: &Tensor, expected: &Value) -> Result {
    let (got, expected) = (got.flatten_all()?.to_vec1::<f32>()?, floats(expected));
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!(
            (g - e).abs() <= 2e-6 * 8.0 * largest.max(1e-3),
            "{what}[{i}]: {g} {e}"
        );
    }
    Ok(())
}

#[test]
fn bitlinear_forward_and_gradients_as_torch() -> Result {
    for case in read("bitlinear")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let x_shape = shape(&case["x_shape"]);
        let (k, n) = (
            *x_shape.last().unwrap(),
            case["n"].as_u64().unwrap() as usize,
        );
        let norm = match case["norm"].as_str() {
            Some("rms") => Some(SubNorm::Rms),
            Some("layer") => Some(SubNorm::Layer),
            _ => None,
        };
        let activations = serde_json::from_value(case["activations"].clone())?;
        let mut config = QuantizationConfig::bitnet_158();
        config.activations = Some(activations);
        let config = BitLinearConfig {
            bias: case.get("b").is_some(),
            norm,
            config,
            ..BitLinearConfig::new(k, n)
        };
        // Through a VarMap, as a model is loaded for training.
        let variables = candle_nn::VarMap::new();
        let put = |name: &str, key: &str, shape: &[usize]| -> Result<Option<Var>> {
            let Some(data) = case.get(key) else {
                return Ok(None);
            };
            let var = var(data, shape)?;
            variables
                .data()
                .lock()
                .unwrap()
                .insert(name.into(), var.clone());
            Ok(Some(var))
        };
        let norm_name = if norm == Some(SubNorm::Layer) {
            "layer_norm"
        } else {
            "rms_norm"
        };
        let w = put("weight", "w", &[n, k])?.unwrap();
        let b = put("bias", "b", &[n])?;
        let g = put(&format!("{norm_name}.weight"), "g", &[k])?;
        let c = put(&format!("{norm_name}.bias"), "c", &[k])?;
        let vb =
            candle_nn::VarBuilder::from_varmap(&variables, candle_core::DType::F32, &Device::Cpu);
        let mut layer = BitLinear::load(vb, &config)?;

        let x = var(&case["x"], &x_shape)?;
        let y = candle_core::Module::forward(&layer, x.as_tensor())?;
        close(&format!("{name}: y"), &y, &case["y"])?;
        let r = Tensor::from_vec(floats(&case["r"]), y.dims(), &Device::Cpu)?;
        let gradients = (&y * &r)?.sum_all()?.backward()?;
        for (what, var) in [
            ("dx", Some(x.clone())),
            ("dw", Some(w)),
            ("db", b),
            ("dg", g),
            ("dc", c),
        ] {
            if let Some(var) = var {
                close(
                    &format!("{name}: {what}"),
                    gradients.get(&var).expect(what),
                    &case[what],
                )?;
            }
        }
        // Without gradients, and packed: the same in integers.
        close(
            &format!("{name}: lazily packed"),
            &layer.forward_t(x.as_tensor(), false)?,
            &case["y"],
        )?;
        let before = layer.quantized_weights()?;
        layer.pack()?;
        close(
            &format!("{name}: packed, apart from the graph"),
            &layer.forward_t(x.as_tensor(), false)?,
            &case["y"],
        )?;
        let y = candle_core::Module::forward(&layer, x.as_tensor())?;
        close(&format!("{name}: packed"), &y, &case["y"])?;
        let gradients = (&y * &r)?.sum_all()?.backward()?;
        close(
            &format!("{name}: packed dx"),
            gradients.get(&x).expect("dx"),
            &case["dx"],
        )?;
        assert_eq!(layer.quantized_weights()?, before, "{name}");
        layer.unpack()?;
        assert_eq!(layer.quantized_weights()?.values, before.values, "{name}");
    }
    Ok(())
}

#[test]
fn quantizers_as_numpy_and_transformers() -> Result {
    let golden = read("quantizers");
    for case in golden["weights"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let w = Tensor::from_vec(floats(&case["w"]), shape(&case["shape"]), &Device::Cpu)?;
        let quantized = absmean_quantize_weights(&w, &Device::Cpu)?;
        let matrix = quantized.matrix()?;
        let expected: Vec<i8> = case["q"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_i64().unwrap() as i8)
            .collect();
        assert_eq!(matrix.values, expected, "{name}");
        assert_eq!(
            matrix.scales,
            [case["scale"].as_f64().unwrap() as f32],
            "{name}"
        );
        assert_eq!(quantized.dequantize()?.dims(), w.dims(), "{name}");
        // Any strides: the transpose of the transpose, without a copy in between.
        if w.rank() == 2 {
            let strided = w.t()?.contiguous()?.t()?;
            assert!(!strided.is_contiguous() || w.dims().contains(&1), "{name}");
            assert_eq!(
                absmean_quantize_weights(&strided, &Device::Cpu)?
                    .matrix()?
                    .values,
                expected,
                "{name}"
            );
        }
    }
    let case = &golden["activations"];
    let x = Tensor::from_vec(floats(&case["x"]), shape(&case["shape"]), &Device::Cpu)?;
    let expected: Vec<i8> = case["q"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_i64().unwrap() as i8)
        .collect();
    assert_eq!(
        absmax_quantize_activations(&x, &Device::Cpu)?
            .matrix()?
            .values,
        expected
    );
    Ok(())
}
