//! Optimizers and schedules against torch. The expected values are tests/golden/optimizers.json,
//! written by tests/golden/generate_optimizers.py.
#![cfg(feature = "qat")]

use bitnet_quant::CheckpointError;
use bitnet_quant::Error;
use bitnet_quant::qat::{
    Betas, Optimizer, OptimizerConfig, OptimizerMethod, ParameterGroup, Rates, Schedule,
    ScheduleShape,
};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer as _;
use serde_json::Value;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/optimizers.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn floats(v: &Value) -> Vec<f32> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

fn var(data: &Value, shape: &[usize]) -> Result<Var> {
    Ok(Var::from_tensor(&Tensor::from_vec(
        floats(data),
        shape,
        &Device::Cpu,
    )?)?)
}

/// Gradients of Σ g·w.
fn given(pairs: &[(&Var, &Value)]) -> Result<GradStore> {
    let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for (var, g) in pairs {
        loss = (loss
            + (Tensor::from_vec(floats(g), var.dims(), &Device::Cpu)? * var.as_tensor())?
                .sum_all()?)?;
    }
    Ok(loss.backward()?)
}

fn method(name: &str) -> OptimizerMethod {
    let betas = Betas::default();
    match name {
        "sgd" => OptimizerMethod::Sgd {
            momentum: 0.0,
            nesterov: false,
        },
        "sgd momentum" | "sgd clipped and accumulated" => OptimizerMethod::Sgd {
            momentum: 0.9,
            nesterov: false,
        },
        "sgd nesterov" => OptimizerMethod::Sgd {
            momentum: 0.9,
            nesterov: true,
        },
        "adam" => OptimizerMethod::Adam(betas),
        "adamw" | "adamw clipped" => OptimizerMethod::AdamW(betas),
        "adamw betas" => OptimizerMethod::AdamW(Betas {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-6,
        }),
        other => panic!("{other}"),
    }
}

#[test]
fn ten_steps_as_torch() -> Result {
    let golden = golden();
    let gradients = golden["gradients"].as_array().unwrap();
    let mut failures = vec![];
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let rate = case["rate"].as_f64().unwrap();
        let config = OptimizerConfig {
            method: method(name),
            learning_rate: rate,
            weight_decay: case["decay"].as_f64().unwrap(),
            ..OptimizerConfig::default()
        };
        let (w, b) = (
            var(&golden["weight"], &[5, 7])?,
            var(&golden["bias"], &[7])?,
        );
        let mut optimizer = Optimizer::for_variables(
            vec![
                ("layer.weight".into(), w.clone()),
                ("layer.bias".into(), b.clone()),
            ],
            &config,
        )?;
        let accumulate = case["accumulate"].as_u64().unwrap() as usize;
        let rates = Rates {
            clip: case["clip"].as_f64(),
            ..Rates::default()
        };
        for (t, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            let mut norm = f64::NAN;
            for (micro, g) in gradients[t * accumulate..][..accumulate].iter().enumerate() {
                let grads = given(&[(&w, &g[0]), (&b, &g[1])])?;
                if micro + 1 < accumulate {
                    optimizer.accumulate(&grads)?;
                } else {
                    norm = optimizer.step(&grads, rates)?;
                }
            }
            let expected = step["norm"].as_f64().unwrap();
            if (norm - expected).abs() > 1e-6 * expected {
                failures.push(format!("{name}, step {t}: norm {norm} {expected}"));
            }
            for (what, var) in [("weight", &w), ("bias", &b)] {
                let expected = floats(&step[what]);
                // Each step rounds the weight twice. It rounds the change, at most ten times the
                // rate, in about ten operations.
                let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
                let bound = (t + 1) as f32 * f32::EPSILON * (largest + 100.0 * rate as f32);
                for (i, (got, expected)) in var
                    .flatten_all()?
                    .to_vec1::<f32>()?
                    .iter()
                    .zip(&expected)
                    .enumerate()
                {
                    if (got - expected).abs() > bound || got.is_nan() {
                        failures.push(format!(
                            "{name}, step {t}: {what}[{i}] {got} {expected}, bound {bound}"
                        ));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[test]
fn schedules_as_torch_and_by_hand() {
    let golden = golden();
    for case in golden["schedules"].as_array().unwrap() {
        let shape = if case["name"] == "cosine" {
            ScheduleShape::Cosine
        } else {
            ScheduleShape::Linear
        };
        let schedule = Schedule {
            warmup: 0,
            shape,
            floor: 0.1,
        };
        for (t, rate) in case["rates"].as_array().unwrap().iter().enumerate() {
            let got = schedule.rates(t as u64, 20).learning_rate;
            assert!(
                (got - rate.as_f64().unwrap()).abs() < 1e-12,
                "{} at {t}: {got} {rate}",
                case["name"]
            );
        }
    }
    let two = Schedule {
        warmup: 10,
        shape: ScheduleShape::TWO_STAGE,
        floor: 0.0,
    };
    let at = |t| two.rates(t, 100);
    assert_eq!(
        (
            at(0).learning_rate,
            at(4).learning_rate,
            at(9).learning_rate,
            at(10).learning_rate
        ),
        (0.1, 0.5, 1.0, 1.0)
    );
    assert!(
        (at(49).learning_rate - 0.5 * (1.0 + (std::f64::consts::PI * 39.0 / 90.0).cos())).abs()
            < 1e-12
    );
    assert_eq!((at(49).weight_decay, at(50).weight_decay), (1.0, 0.0));
    assert!(
        (at(50).learning_rate - 1.0 / 3.0).abs() < 1e-12
            && (at(75).learning_rate - 1.0 / 6.0).abs() < 1e-12
    );
    assert!(at(99).learning_rate > 0.0 && at(99).learning_rate < 0.001);
    // The numbers of b1.58 2B4T from notes on its report: rates 1.5e-3 to 8e-4, then 5e-4 to 0;
    // decay 0.1, then 0. Half a cosine has fallen to one half in the middle, 7.5e-4; after a
    // warm-up it is a little higher.
    let steps = 10_000;
    let of = |t| {
        Schedule {
            warmup: 375,
            shape: ScheduleShape::TWO_STAGE,
            floor: 0.0,
        }
        .rates(t, steps)
    };
    let rate = |t| 1.5e-3 * of(t).learning_rate;
    assert!(
        (rate(375) - 1.5e-3).abs() < 1e-9 && (rate(4999) - 8e-4).abs() < 5e-5,
        "{} {}",
        rate(375),
        rate(4999)
    );
    assert!(
        (rate(5000) - 5e-4).abs() < 1e-9 && rate(9999) < 1e-9,
        "{} {}",
        rate(5000),
        rate(9999)
    );
    assert_eq!(
        (0.1 * of(4999).weight_decay, 0.1 * of(5000).weight_decay),
        (0.1, 0.0)
    );
    // No division by zero without steps or with a warm-up beyond the end.
    assert!(two.rates(0, 0).learning_rate.is_finite() && two.rates(5, 3).learning_rate.is_finite());
}

/// Large tensors are split between threads: no bit depends on the number of threads or the
/// instruction set.
#[test]
fn threads_change_no_bit() -> Result {
    let n = 3 * (1 << 15) + 77;
    let start: Vec<f32> = (0..n)
        .map(|i| ((i * 7919) % 1013) as f32 / 500.0 - 1.0)
        .collect();
    let slope: Vec<f32> = (0..n)
        .map(|i| ((i * 104_729) % 997) as f32 / 300.0 - 1.5)
        .collect();
    let run = |threads: usize,
               method: OptimizerMethod|
     -> bitnet_quant::Result<(Vec<f32>, Vec<u64>)> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("threads start");
        pool.install(|| {
            let w = Var::from_slice(&start, (n / 7, 7), &Device::Cpu)
                .or_else(|_| Var::from_slice(&start, n, &Device::Cpu))?;
            let slope = Tensor::from_slice(&slope, w.dims(), &Device::Cpu)?;
            let config = OptimizerConfig {
                method,
                ..OptimizerConfig::default()
            };
            let mut optimizer = Optimizer::for_variables(vec![("w".into(), w.clone())], &config)?;
            let mut norms = vec![];
            for _ in 0..3 {
                let grads = ((&slope * w.as_tensor())? * w.as_tensor())?
                    .sum_all()?
                    .backward()?;
                optimizer.accumulate(&grads)?;
                norms.push(
                    optimizer
                        .step(
                            &grads,
                            Rates {
                                clip: Some(2.0),
                                ..Rates::default()
                            },
                        )?
                        .to_bits(),
                );
            }
            Ok((w.flatten_all()?.to_vec1()?, norms))
        })
    };
    for method in [
        OptimizerMethod::default(),
        OptimizerMethod::Sgd {
            momentum: 0.5,
            nesterov: true,
        },
        OptimizerMethod::Sgd {
            momentum: 0.0,
            nesterov: false,
        },
    ] {
        let (one, three) = (run(1, method)?, run(3, method)?);
        assert!(
            one.0
                .iter()
                .zip(&three.0)
                .all(|(a, b)| a.to_bits() == b.to_bits())
                && one.1 == three.1,
            "{method:?}"
        );
        assert_ne!(one.0, start);
    }
    Ok(())
}

#[test]
fn groups_and_defaults_decide_rate_and_decay() -> Result {
    // The gradient is zero, so only weight decay changes a weight, to 1 − rate · decay.
    let names = [
        "a.weight",
        "a.bias",
        "norm",
        "a.learned_scale",
        "a.weight_scale",
        "frozen.weight",
        "fast.weight",
        "bare.weight",
    ];
    let ones = |name: &str| {
        if ["a.bias", "norm"].contains(&name) {
            Tensor::ones(4, DType::F32, &Device::Cpu)
        } else {
            Tensor::ones((2, 2), DType::F32, &Device::Cpu)
        }
    };
    let vars = names
        .iter()
        .map(|n| Ok((n.to_string(), Var::from_tensor(&ones(n)?)?)))
        .collect::<Result<Vec<_>>>()?;
    let group = |glob: &str, learning_rate, weight_decay| ParameterGroup {
        glob: glob.into(),
        learning_rate,
        weight_decay,
    };
    let config = OptimizerConfig {
        learning_rate: 0.5,
        weight_decay: 0.1,
        group: vec![
            group("frozen*", 0.0, None),
            group("fast*", 1.5, None),
            group("bare*", 1.0, Some(0.2)),
        ],
        ..OptimizerConfig::default()
    };
    let mut optimizer = Optimizer::for_variables(vars.clone(), &config)?;
    let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for (_, var) in &vars {
        loss = (loss + (Tensor::zeros_like(var)? * var.as_tensor())?.sum_all()?)?;
    }
    optimizer.step(&loss.backward()?, Rates::default())?;
    let first = |i: usize| vars[i].1.flatten_all()?.get(0)?.to_scalar::<f32>();
    let got = (0..names.len())
        .map(first)
        .collect::<candle_core::Result<Vec<_>>>()?;
    assert_eq!(got, [0.95, 1.0, 1.0, 1.0, 1.0, 1.0, 0.925, 0.9]);
    Ok(())
}

#[test]
fn serves_as_an_optimizer_of_candle_and_leaves_alone_what_has_no_gradient() -> Result {
    let (used, unused) = (
        Var::new(&[[1f32, 2.0]], &Device::Cpu)?,
        Var::new(&[[3f32]], &Device::Cpu)?,
    );
    let mut ours = <Optimizer as candle_nn::Optimizer>::new(
        vec![used.clone(), unused.clone()],
        OptimizerConfig::default(),
    )?;
    let theirs_used = Var::new(&[[1f32, 2.0]], &Device::Cpu)?;
    let params = candle_nn::ParamsAdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
    };
    let mut theirs = candle_nn::AdamW::new(vec![theirs_used.clone()], params)?;
    ours.set_learning_rate(1e-3);
    for _ in 0..5 {
        let grads = used.sqr()?.sum_all()?.backward()?;
        assert_eq!(ours.without_gradient(&grads).collect::<Vec<_>>(), ["1"]);
        candle_nn::Optimizer::step(&mut ours, &grads)?;
        theirs.backward_step(&theirs_used.sqr()?.sum_all()?)?;
    }
    let (a, b) = (used.to_vec2::<f32>()?, theirs_used.to_vec2::<f32>()?);
    for (a, b) in a[0].iter().zip(&b[0]) {
        assert!((a - b).abs() <= 5.0 * 4.0 * f32::EPSILON, "{a} {b}");
    }
    assert_eq!(unused.to_vec2::<f32>()?, [[3.0]]);
    Ok(())
}

#[test]
fn a_norm_that_is_no_number_updates_nothing() -> Result {
    let w = Var::new(&[[1f32, 2.0]], &Device::Cpu)?;
    let mut optimizer =
        Optimizer::for_variables(vec![("w".into(), w.clone())], &OptimizerConfig::default())?;
    let grads = (w.as_tensor() * f64::INFINITY)?.sum_all()?.backward()?;
    assert!(!optimizer.step(&grads, Rates::default())?.is_finite());
    assert_eq!(
        (w.to_vec2::<f32>()?, optimizer.steps()),
        (vec![vec![1.0, 2.0]], 0)
    );
    Ok(())
}

#[test]
fn wrong_numbers_and_variables_are_refused_together() -> Result {
    let config = OptimizerConfig {
        method: OptimizerMethod::AdamW(Betas {
            beta1: 1.0,
            beta2: -0.1,
            eps: 0.0,
        }),
        learning_rate: f64::NAN,
        weight_decay: -1.0,
        group: vec![ParameterGroup {
            glob: "[".into(),
            learning_rate: -1.0,
            weight_decay: None,
        }],
    };
    let error = Optimizer::for_variables(vec![], &config).unwrap_err();
    let Error::Checkpoint(CheckpointError::Invalid(fields)) = &error else {
        panic!("{error}")
    };
    assert_eq!(fields.len(), 7, "{error}");
    let half = Var::zeros(3, DType::F16, &Device::Cpu)?;
    let error = Optimizer::for_variables(vec![("h".into(), half)], &OptimizerConfig::default())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "variable: expected contiguous f32, got 'h' in f16");
    let error = Optimizer::for_variables(vec![], &OptimizerConfig::default())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "variables: expected at least one to train, got none");
    Ok(())
}
