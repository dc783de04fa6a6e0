//! Ten training steps of small decoders against torch: golden/decoder.json, by golden/generate.py.

use bitnet_quant::QuantizationConfig;
use bitnet_quant::qat::{
    Betas, Optimizer, OptimizerConfig, OptimizerMethod, Rates, StraightThroughEstimator, prepare,
};
use bitnet_train::models::{DecoderModel, DecoderShape};
use bitnet_train::ops::cross_entropy;
use bitnet_train::variables::variables;
use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use serde_json::Value;

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

#[test]
fn ten_steps_of_decoders_are_those_of_torch() {
    let golden: Value = serde_json::from_str(include_str!("golden/decoder.json")).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let size = |name: &str| case["shape"][name].as_u64().unwrap() as usize;
        let shape = DecoderShape {
            architecture: case["architecture"].as_str().unwrap().into(),
            hidden: size("hidden"),
            ffn: size("ffn"),
            layers: size("layers"),
            heads: size("heads"),
            kv_heads: size("kv_heads"),
            tied: case["tied"].as_bool().unwrap(),
            ..DecoderShape::default()
        };
        let (x, targets) = (tokens(&case["tokens"]), tokens(&case["targets"]));
        let vars = VarMap::new();
        let json = shape.config_json(size("vocab"), x.dim(1).unwrap()).unwrap();
        let mut decoder = DecoderModel::new(
            "golden".as_ref(),
            &json,
            x.dim(1).unwrap(),
            &variables(&vars, 0),
        )
        .unwrap();
        let all = bitnet_train::folder::sorted(&vars);
        let initial = case["initial"].as_object().unwrap();
        assert!(
            all.keys()
                .eq(initial.keys().collect::<std::collections::BTreeSet<_>>()),
            "{:?}",
            all.keys()
        );
        for (name, var) in &all {
            var.set(&Tensor::from_vec(floats(&initial[name]), var.shape(), &Device::Cpu).unwrap())
                .unwrap();
        }
        let names = prepare(
            &mut decoder,
            &QuantizationConfig::bitnet_158(),
            StraightThroughEstimator::Plain,
            &vars,
        )
        .unwrap();
        assert_eq!(
            names.len(),
            7 * shape.layers,
            "embedding and head stay in floats"
        );
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
        let name = format!(
            "{} {}",
            shape.architecture,
            if shape.tied { "tied" } else { "untied" }
        );
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
                    close(
                        &format!("{name}: gradient of {of}"),
                        gradient,
                        &floats(&case["first"][of]),
                        2e-5,
                    );
                }
            }
            optimizer.step(&gradients, Rates::default()).unwrap();
        }
        for (of, var) in &all {
            // Adam divides by the size of a gradient, which enlarges the error of a small one: ten
            // steps of 0.004 against weights around 1.
            close(
                &format!("{name}: {of}"),
                var.as_tensor(),
                &floats(&case["final"][of]),
                5e-4,
            );
        }
    }
}
