//! Training steps of small decoders against torch (golden/decoder.json, by golden/generate.py) and
//! transformers (golden/qwen3.json, by golden/generate_qwen3.py).

use bitnet_core::{Granularity, ScaleDtype};
use bitnet_quant::qat::{
    Betas, Optimizer, OptimizerConfig, OptimizerMethod, Rates, StraightThroughEstimator, prepare,
};
use bitnet_quant::recipe::Preset;
use bitnet_quant::{Activations, QuantizationConfig};
use bitnet_train::models::{DecoderModel, DecoderShape};
use bitnet_train::ops::cross_entropy;
use bitnet_train::variables::variables;
use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use serde_json::Value;
use std::collections::BTreeSet;

fn floats(v: &Value) -> Vec<f32> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

fn tokens(v: &Value) -> Tensor {
    let rows: Vec<Vec<u32>> = serde_json::from_value(v.clone()).unwrap();
    Tensor::new(rows, &Device::Cpu).unwrap()
}

/// Every element within `bound` of the largest one.
fn close(what: &str, got: &Tensor, expected: &[f32], bound: f32) {
    let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            (g - e).abs() <= bound * largest,
            "{what}[{i}]: {g}, expected {e} of at most {largest}"
        );
    }
}

/// The decoder of a case with its initial weights, and the names of the layers in training.
fn model(case: &Value, positions: usize, vars: &VarMap) -> (DecoderModel, Vec<String>) {
    let size = |name: &str| case["shape"][name].as_u64().map(|n| n as usize);
    let shape = DecoderShape {
        architecture: case["architecture"].as_str().unwrap().into(),
        hidden: size("hidden").unwrap(),
        ffn: size("ffn").unwrap(),
        layers: size("layers").unwrap(),
        heads: size("heads").unwrap(),
        kv_heads: size("kv_heads").unwrap(),
        head_dim: size("head_dim"),
        tied: case["tied"].as_bool().unwrap(),
        ..DecoderShape::default()
    };
    let json = shape.config_json(size("vocab").unwrap(), positions);
    let vb = variables(vars, 0);
    let mut decoder = DecoderModel::new("golden".as_ref(), &json.unwrap(), positions, &vb).unwrap();
    let all = bitnet_train::folder::sorted(vars);
    let initial = case["initial"].as_object().unwrap();
    let expected: BTreeSet<_> = initial.keys().collect();
    assert!(all.keys().eq(expected), "{:?}", all.keys());
    for (name, var) in &all {
        let weights = Tensor::from_vec(floats(&initial[name]), var.shape(), &Device::Cpu);
        var.set(&weights.unwrap()).unwrap();
    }
    let config = match case["group"].as_u64() {
        None => QuantizationConfig::bitnet_158(),
        Some(_) if case["quantized"] == false => return (decoder, vec![]),
        Some(group) => {
            let mut config = Preset::Bonsai.build().unwrap();
            config.default.granularity = Some(Granularity::Group(group as usize));
            config.default.scale_dtype = Some(ScaleDtype::F32);
            config.activations = Some(Activations::Float);
            config
        }
    };
    let plain = StraightThroughEstimator::Plain;
    let names = prepare(&mut decoder, &config, plain, vars).unwrap();
    (decoder, names)
}

/// Trains the model of a case and compares losses, first gradients and final weights.
fn check_steps(case: &Value) {
    let (x, targets) = (tokens(&case["tokens"]), tokens(&case["targets"]));
    let vars = VarMap::new();
    let (decoder, names) = model(case, x.dim(1).unwrap(), &vars);
    let tied = case["tied"].as_bool().unwrap();
    let layers = 7 * case["shape"]["layers"].as_u64().unwrap() as usize;
    let expected = match (case["group"].is_null(), case["quantized"] == false) {
        // By default embedding and head stay in floats.
        (true, _) => layers,
        (false, true) => 0,
        (false, false) => layers + 2 - usize::from(tied),
    };
    assert_eq!(names.len(), expected);
    let all = bitnet_train::folder::sorted(&vars);
    let betas = Betas {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-6,
    };
    let config = OptimizerConfig {
        method: OptimizerMethod::AdamW(betas),
        learning_rate: 0.004,
        weight_decay: 0.1,
        ..OptimizerConfig::default()
    };
    let mut optimizer = Optimizer::new(&vars, &config).unwrap();
    let tied = if tied { "tied" } else { "untied" };
    let name = format!("{} {tied} {}", case["architecture"], case["quantized"]);
    for (step, expected) in floats(&case["losses"]).iter().enumerate() {
        let loss = cross_entropy(&decoder.forward(&x).unwrap(), &targets).unwrap();
        // About 60 consecutive operations in f32.
        close(&format!("{name}: loss {step}"), &loss, &[*expected], 2e-5);
        let gradients = loss.backward().unwrap();
        if step == 0 {
            for (of, var) in &all {
                let gradient = gradients
                    .get(var)
                    .unwrap_or_else(|| panic!("{of} has no gradient"));
                let what = format!("{name}: gradient of {of}");
                close(&what, gradient, &floats(&case["first"][of]), 2e-5);
            }
        }
        optimizer.step(&gradients, Rates::default()).unwrap();
    }
    for (of, var) in &all {
        // Adam divides by the size of a gradient, which enlarges the error of a small one: ten steps
        // of 0.004 against weights around 1.
        let (what, last) = (format!("{name}: {of}"), floats(&case["final"][of]));
        close(&what, var.as_tensor(), &last, 5e-4);
    }
}

#[test]
fn ten_steps_of_decoders_are_those_of_torch() {
    let golden: Value = serde_json::from_str(include_str!("golden/decoder.json")).unwrap();
    golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .for_each(check_steps);
}

/// In floats, and with every matrix ternary, embedding and output matrix too.
#[test]
fn three_steps_of_qwen3_are_those_of_transformers() {
    let golden: Value = serde_json::from_str(include_str!("golden/qwen3.json")).unwrap();
    golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .for_each(check_steps);
}
