//! Layers in training against torch (tests/golden/qat.json, written by generate_qat.py there),
//! against graphs on dequantized weights, and against the packed layer.
#![cfg(feature = "qat")]

mod losses;
mod schedule;

use bitnet_core::random::Random;
use bitnet_core::{Granularity, Precision};
use bitnet_quant::qat::{
    Linear, Linears, QatLinear, Stage, StraightThroughEstimator, convert, prepare,
};
use bitnet_quant::recipe::Target;
use bitnet_quant::{Activations, QuantizationConfig, Result};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{Optimizer, VarBuilder, VarMap};
use serde_json::Value;
use std::cell::RefCell;

const CPU: Device = Device::Cpu;

thread_local!(static RANDOM: RefCell<Random> = const { RefCell::new(Random::new(158)) });

/// Uniform in (0, 1], the same in each run.
fn uniform() -> f64 {
    RANDOM.with_borrow_mut(|random| ((random.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64)
}

/// Normally distributed (Box and Muller).
fn normal(shape: &[usize]) -> Tensor {
    let one =
        |_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    Tensor::from_vec(
        (0..shape.iter().product()).map(one).collect::<Vec<f32>>(),
        shape,
        &CPU,
    )
    .unwrap()
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Layers with ReLU between them.
struct Mlp(Vec<Linear>);

impl Mlp {
    fn new(sizes: &[usize], vars: &VarMap) -> Self {
        let vb = VarBuilder::from_varmap(vars, DType::F32, &CPU);
        let layer = |(i, s): (usize, &[usize])| {
            let layer = Linear::new(s[0], s[1], true, &vb.pp(i.to_string())).unwrap();
            let weight = vars.data().lock().unwrap()[&format!("{i}.weight")].clone();
            weight
                .set(&(normal(&[s[1], s[0]]) * (s[0] as f64).sqrt().recip()).unwrap())
                .unwrap();
            layer
        };
        Self(sizes.windows(2).enumerate().map(layer).collect())
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let last = self.0.len() - 1;
        self.0.iter().enumerate().fold(x.clone(), |x, (i, layer)| {
            let y = layer.forward(&x).unwrap();
            if i < last { y.relu().unwrap() } else { y }
        })
    }
}

impl Linears for Mlp {
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>,
    ) -> Result<()> {
        self.0
            .iter_mut()
            .enumerate()
            .try_for_each(|(i, layer)| visit(&i.to_string(), layer))
    }
}

fn config(
    precision: Precision,
    granularity: Granularity,
    activations: Activations,
) -> QuantizationConfig {
    let mut config = QuantizationConfig::new(precision);
    config.default.granularity = Some(granularity);
    config.activations = Some(activations);
    config
}

fn floats(v: &Value) -> Vec<f32> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

/// f32 sums of at most 20 terms of three layers, against f64; `over` steps of training multiply
/// what the first one was wrong by.
fn close(what: &str, got: &Tensor, expected: &[f32], tolerance: f32) {
    let got = flat(got);
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            (g - e).abs() <= tolerance * largest,
            "{what}[{i}]: got {g}, torch has {e}"
        );
    }
}

fn golden() -> Value {
    let path = format!("{}/tests/golden/qat.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn ten_steps_as_torch() {
    for case in golden()["cases"].as_array().unwrap() {
        let word = |key: &str| case[key].as_str().unwrap();
        let name = format!(
            "{} {} {} {} {}",
            word("estimator"),
            word("precision"),
            word("granularity"),
            word("activations"),
            word("optimizer")
        );
        let sizes: Vec<usize> = case["sizes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as usize)
            .collect();
        let vars = VarMap::new();
        let mut model = Mlp::new(&sizes, &vars);
        for (var, data) in case["initial"].as_object().unwrap() {
            let mut map = vars.data().lock().unwrap();
            match map.get(var) {
                Some(there) => there
                    .set(&Tensor::from_vec(floats(data), there.shape(), &CPU).unwrap())
                    .unwrap(),
                None => {
                    map.insert(
                        var.clone(),
                        Var::from_vec(floats(data), data.as_array().unwrap().len(), &CPU).unwrap(),
                    );
                }
            }
        }
        let activations = serde_json::from_value(case["activations"].clone()).unwrap();
        let config = config(
            word("precision").parse().unwrap(),
            word("granularity").parse().unwrap(),
            activations,
        );
        let estimator: StraightThroughEstimator = word("estimator").parse().unwrap();
        prepare(&mut model, &config, estimator, &vars).unwrap();
        let x = Tensor::from_vec(
            floats(&case["x"]),
            (case["batch"].as_u64().unwrap() as usize, sizes[0]),
            &CPU,
        )
        .unwrap();
        let target: Vec<u32> = case["target"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as u32)
            .collect();
        let target = Tensor::from_vec(target, x.dims()[0], &CPU).unwrap();
        let all = vars.all_vars();
        let parameters = candle_nn::ParamsAdamW {
            lr: 0.01,
            weight_decay: 0.01,
            ..Default::default()
        };
        let mut adamw = candle_nn::AdamW::new(all.clone(), parameters).unwrap();
        let mut sgd = candle_nn::SGD::new(all, 0.05).unwrap();
        let losses = floats(&case["losses"]);
        for (step, expected) in losses.iter().enumerate() {
            let loss = candle_nn::loss::cross_entropy(&model.forward(&x), &target).unwrap();
            close(&format!("{name}: loss {step}"), &loss, &[*expected], 1e-5);
            let gradients = loss.backward().unwrap();
            let which = if step == 0 { "first" } else { "last" };
            if step == 0 || step + 1 == losses.len() {
                for (var, expected) in case[which].as_object().unwrap() {
                    let var_of = vars.data().lock().unwrap()[var].clone();
                    let gradient = gradients
                        .get(&var_of)
                        .unwrap_or_else(|| panic!("{name}: no gradient of {var}"));
                    close(
                        &format!("{name}: {which} gradient of {var}"),
                        gradient,
                        &floats(expected),
                        if step == 0 { 4e-6 } else { 4e-5 },
                    );
                }
            }
            if word("optimizer") == "sgd" {
                sgd.step(&gradients).unwrap()
            } else {
                adamw.step(&gradients).unwrap()
            }
        }
        for (var, expected) in case["final"].as_object().unwrap() {
            close(
                &format!("{name}: {var} after"),
                &vars.data().lock().unwrap()[var],
                &floats(expected),
                2e-5,
            );
        }
    }
}

/// Every estimator with every precision that it supports.
fn all_kinds() -> Vec<(StraightThroughEstimator, Precision)> {
    use StraightThroughEstimator::*;
    let precisions = [
        Precision::Ternary,
        Precision::Binary,
        Precision::Int2,
        Precision::Int3,
        Precision::Int4,
        Precision::Int8,
    ];
    let mut all = vec![];
    for estimator in [
        Plain,
        Clipped { range: 1.25 },
        LearnedScale,
        Stretched,
        Soft { temperature: 0.4 },
    ] {
        for precision in precisions {
            if estimator != Stretched
                || !matches!(
                    precision,
                    Precision::Int3 | Precision::Int4 | Precision::Int8
                )
            {
                all.push((estimator, precision));
            }
        }
    }
    all
}

#[test]
fn packed_layers_give_the_same_bits() {
    for (estimator, precision) in all_kinds() {
        for granularity in [
            Granularity::Tensor,
            Granularity::Channel,
            Granularity::Group(24),
        ] {
            for (activations, bias) in [
                (Activations::Int8, true),
                (Activations::Int8, false),
                (Activations::Int4, false),
                (Activations::Sign, true),
            ] {
                let what =
                    format!("{estimator} {precision} {granularity} {activations:?} bias {bias}");
                let config = config(precision, granularity, activations);
                let bias = bias.then(|| normal(&[33]));
                let layer =
                    QatLinear::new(normal(&[33, 70]), bias, None, &config, estimator).expect(&what);
                let x = normal(&[2, 5, 70]);
                let packed = layer.convert().unwrap();
                assert_eq!(
                    flat(&layer.forward(&x).unwrap()),
                    flat(&packed.forward(&x).unwrap()),
                    "{what}"
                );
                assert_eq!(
                    layer.quantized_weights().unwrap(),
                    packed.quantized_weights().unwrap(),
                    "{what}"
                );
            }
        }
    }
}

/// The surrogate gradients are the gradients of the same graph on dequantized weights, times the
/// slope.
#[test]
fn gradients_are_those_of_dequantized_leaves() {
    for (estimator, precision) in all_kinds() {
        for (granularity, lambda) in [
            (Granularity::Tensor, 1.0),
            (Granularity::Channel, 1.0),
            (Granularity::Group(16), 0.25),
        ] {
            let what = format!("{estimator} {precision} {granularity} λ {lambda}");
            let config = config(precision, granularity, Activations::Int8);
            let (w, b, x) = (
                Var::from_tensor(&normal(&[24, 40])).unwrap(),
                Var::from_tensor(&normal(&[24])).unwrap(),
                normal(&[3, 4, 40]),
            );
            let x = Var::from_tensor(&x).unwrap();
            let mut layer = QatLinear::new(
                w.as_tensor().clone(),
                Some(b.as_tensor().clone()),
                None,
                &config,
                estimator,
            )
            .unwrap();
            layer.set_lambda(lambda as f32);
            let mix = |x: &Tensor, hat: &Tensor| {
                (x.affine(1.0 - lambda, 0.0).unwrap() + hat.affine(lambda, 0.0).unwrap()).unwrap()
            };
            let q = bitnet_quant::absmax_quantize_activations(&x, &CPU)
                .unwrap()
                .dequantize()
                .unwrap();
            let (x_leaf, w_leaf) = (mix(&x, &q), mix(&w, &layer.dequantized_weights().unwrap()));
            let (x_leaf, w_leaf) = (
                Var::from_tensor(&x_leaf).unwrap(),
                Var::from_tensor(&w_leaf).unwrap(),
            );
            let expected = x_leaf
                .reshape(((), 40))
                .unwrap()
                .matmul(&w_leaf.t().unwrap())
                .unwrap()
                .broadcast_add(&b)
                .unwrap();
            let y = layer.forward(&x).unwrap();
            assert_eq!(y.dims(), [3, 4, 24], "{what}");
            let expected = expected.reshape((3, 4, 24)).unwrap();
            // Sums of 40 products in another order.
            close(&what, &y, &flat(&expected), 1e-6 * 40.0);
            let r = normal(&[3, 4, 24]);
            let got = (&y * &r).unwrap().sum_all().unwrap().backward().unwrap();
            let leaves = (&expected * &r)
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap();
            close(
                &format!("{what}: dx"),
                got.get(&x).unwrap(),
                &flat(leaves.get(&x_leaf).unwrap()),
                1e-5,
            );
            close(
                &format!("{what}: db"),
                got.get(&b).unwrap(),
                &flat(leaves.get(&b).unwrap()),
                1e-5,
            );
            let of_leaf = flat(leaves.get(&w_leaf).unwrap());
            let slopes = slopes(&layer, estimator);
            let expected: Vec<f32> = of_leaf
                .iter()
                .zip(&slopes)
                .map(|(g, m)| g * (1.0 - lambda as f32 + lambda as f32 * m))
                .collect();
            close(
                &format!("{what}: dw"),
                got.get(&w).unwrap(),
                &expected,
                1e-5,
            );
            if let Some(scale) = layer.learned_scale() {
                assert!(
                    flat(got.get(scale).expect(&what)).iter().any(|&g| g != 0.0),
                    "{what}: the scale stands still"
                );
            }
        }
    }
}

/// The slope m of each weight by its definition.
fn slopes(layer: &QatLinear, estimator: StraightThroughEstimator) -> Vec<f32> {
    let matrix = layer.quantized_weights().unwrap();
    let (w, spec) = (flat(layer.weight()), &matrix.spec);
    let binary = spec.precision == Precision::Binary;
    let (low, high) = (
        f32::from(spec.precision.range().0),
        f32::from(spec.precision.range().1),
    );
    let slope = |(i, w): (usize, &f32)| {
        let v = w / matrix.scales[spec.scale_index(0, i / spec.cols, i % spec.cols)];
        let yes = |inside: bool| if inside { 1.0 } else { 0.0 };
        match estimator {
            StraightThroughEstimator::Plain => 1.0,
            StraightThroughEstimator::Clipped { range } => {
                yes(range * low <= v && v <= range * high)
            }
            StraightThroughEstimator::LearnedScale => yes(low < v && v < high),
            StraightThroughEstimator::Stretched if binary => yes(v.abs() < 1.0),
            StraightThroughEstimator::Stretched if spec.precision == Precision::Ternary => {
                yes(v.abs() < 1.5)
            }
            StraightThroughEstimator::Stretched => yes(v.abs() < 4.0),
            StraightThroughEstimator::Soft { .. } if v < low || v > high => 0.0,
            StraightThroughEstimator::Soft { temperature: t } => {
                // The difference quotient of the staircase itself, in f64.
                let h = if binary { 1.0 } else { 0.5 };
                let below = if binary {
                    -1.0
                } else {
                    f64::from(v.floor().clamp(low, high - 1.0))
                };
                let stair = |v: f64| {
                    let u = (v - below - h) / h;
                    below + h + h * (u / f64::from(t)).tanh() / (1.0 / f64::from(t)).tanh()
                };
                let d = 1e-6;
                ((stair(f64::from(v) + d) - stair(f64::from(v) - d)) / (2.0 * d)) as f32
            }
        }
    };
    w.iter().enumerate().map(slope).collect()
}

/// ∂L/∂scale against the difference quotient of the fake-quantized weights with the codes held as
/// the estimators prescribe: inside the range w moves with them; the sum is over the granule.
#[test]
fn gradients_of_learned_scales() {
    for (estimator, precision) in all_kinds().into_iter().filter(|(e, _)| e.learns_scale()) {
        for granularity in [
            Granularity::Tensor,
            Granularity::Channel,
            Granularity::Group(16),
        ] {
            let what = format!("{estimator} {precision} {granularity}");
            let config = config(precision, granularity, Activations::Float);
            let w = Var::from_tensor(&normal(&[6, 40])).unwrap();
            let layer =
                QatLinear::new(w.as_tensor().clone(), None, None, &config, estimator).unwrap();
            let x = normal(&[9, 40]);
            let r = normal(&[9, 6]);
            let y = layer.forward(&x).unwrap();
            let gradients = (&y * &r).unwrap().sum_all().unwrap().backward().unwrap();
            let got = flat(gradients.get(layer.learned_scale().unwrap()).unwrap());
            let of_w_hat = flat(&r.t().unwrap().matmul(&x).unwrap());
            let matrix = layer.quantized_weights().unwrap();
            let spec = &matrix.spec;
            let (values, slopes) = (
                flat(&layer.dequantized_weights().unwrap()),
                slopes(&layer, estimator),
            );
            let alpha = flat(layer.learned_scale().unwrap());
            // Sum, sum of magnitudes, and number of terms.
            let mut expected = vec![(0f64, 0f64, 0f64); alpha.len()];
            for (i, w) in flat(&w).iter().enumerate() {
                let at = spec.scale_index(0, i / 40, i % 40);
                let inside =
                    f64::from(slopes[i]) * f64::from(u8::from(precision != Precision::Binary));
                let factor = f64::from(of_w_hat[i]) / f64::from(alpha[at]);
                let (hat, w) = (f64::from(values[i]), inside * f64::from(*w));
                let (sum, size, count) = &mut expected[at];
                (*sum, *size, *count) = (
                    *sum + factor * (hat - w),
                    *size + factor.abs() * (hat.abs() + w.abs()),
                    *count + 1.0,
                );
            }
            let qp = f64::from(precision.range().1);
            for (got, (sum, size, n)) in got.into_iter().zip(expected) {
                let (expected, bound) = (sum / (n * qp).sqrt(), 4e-7 * size / (n * qp).sqrt());
                assert!(
                    (f64::from(got) - expected).abs() <= bound,
                    "{what}: {got} {expected}, which differ by more than {bound}"
                );
            }
        }
    }
}

#[test]
fn prepare_follows_the_configuration_and_convert_packs() {
    let vars = VarMap::new();
    let mut model = Mlp::new(&[16, 32, 32, 8], &vars);
    let mut config = config(Precision::Ternary, Granularity::Channel, Activations::Int8);
    config = QuantizationConfig::builder()
        .base(config)
        .layer(
            "1.weight",
            bitnet_quant::recipe::Choices {
                precision: Some(Target::Quantized(Precision::Int4)),
                ..Default::default()
            },
        )
        .layer(
            "2.weight",
            bitnet_quant::recipe::Choices {
                precision: Some(Target::Keep),
                ..Default::default()
            },
        )
        .build()
        .unwrap();
    let names = prepare(
        &mut model,
        &config,
        StraightThroughEstimator::LearnedScale,
        &vars,
    )
    .unwrap();
    assert_eq!(names, ["0", "1"]);
    assert!(matches!(model.0[2], Linear::Full(_)));
    assert_eq!(
        vars.data().lock().unwrap().len(),
        6 + 2,
        "weights, biases and two learned scales"
    );
    let x = normal(&[7, 16]);
    let y = model.forward(&x);
    let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for (name, var) in vars.data().lock().unwrap().iter() {
        let gradient = gradients
            .get(var)
            .unwrap_or_else(|| panic!("no gradient of {name}"));
        assert!(
            flat(gradient).iter().any(|&g| g != 0.0),
            "the gradient of {name} is 0"
        );
    }
    convert(&mut model).unwrap();
    assert!(matches!(
        (&model.0[0], &model.0[1]),
        (Linear::Packed(_), Linear::Packed(_))
    ));
    assert_eq!(flat(&model.forward(&x)), flat(&y));
    let none = QuantizationConfig {
        include: vec!["other".into()],
        ..QuantizationConfig::default()
    };
    let mut model = Mlp::new(&[4, 4], &VarMap::new());
    assert!(
        prepare(&mut model, &none, StraightThroughEstimator::Plain, &vars)
            .unwrap_err()
            .to_string()
            .contains("no linear layer")
    );
}

#[test]
fn stages_and_strength() {
    let w = Var::from_tensor(&normal(&[32, 64])).unwrap();
    let config = config(Precision::Ternary, Granularity::Channel, Activations::Int8);
    let x = normal(&[4, 64]);
    for estimator in [
        StraightThroughEstimator::Plain,
        StraightThroughEstimator::Stretched,
    ] {
        let mut layer =
            QatLinear::new(w.as_tensor().clone(), None, None, &config, estimator).unwrap();
        let target = layer.quantized_weights().unwrap();
        let exact = x.matmul(&w.t().unwrap()).unwrap();
        let error = |layer: &QatLinear| {
            (layer.forward(&x).unwrap() - &exact)
                .unwrap()
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
        };
        let mut errors = vec![error(&layer)];
        for bits in [2, 3, 4, 8] {
            layer.set_stage(Stage::Bits(bits)).unwrap();
            errors.push(error(&layer));
        }
        // Ternary and 2 bits are close; each further bit is much better.
        assert!(
            errors[1] < 1.2 * errors[0]
                && errors[2] < 0.6 * errors[1]
                && errors[3] < 0.6 * errors[2]
                && errors[4] < 0.1 * errors[3],
            "{errors:?}"
        );
        layer.set_stage(Stage::Target).unwrap();
        assert_eq!(layer.quantized_weights().unwrap(), target);
        layer.set_lambda(0.0);
        close(
            "floats",
            &layer.forward(&x).unwrap(),
            &flat(&exact),
            1e-6 * 64.0,
        );
        assert!(layer.set_stage(Stage::Bits(5)).is_err());
    }
}

/// The dead-zone bias acts as a bias, and its weights get the gradient of the bias times β.
#[test]
fn the_dead_zone_is_a_bias() {
    for estimator in [
        StraightThroughEstimator::Plain,
        StraightThroughEstimator::Stretched,
    ] {
        for bias in [None, Some(Var::from_tensor(&normal(&[6])).unwrap())] {
            let config = config(Precision::Ternary, Granularity::Channel, Activations::Int8);
            let (w, x, r) = (
                Var::from_tensor(&normal(&[6, 40])).unwrap(),
                normal(&[5, 40]),
                normal(&[5, 6]),
            );
            let bias_of = bias.as_ref().map(|b| b.as_tensor().clone());
            let mut layer =
                QatLinear::new(w.as_tensor().clone(), bias_of, None, &config, estimator).unwrap();
            let gradients = |layer: &QatLinear| {
                let y = layer.forward(&x).unwrap();
                let gradients = (&y * &r).unwrap().sum_all().unwrap().backward().unwrap();
                (
                    y,
                    flat(gradients.get(&w).unwrap()),
                    bias.as_ref().map(|b| flat(gradients.get(b).unwrap())),
                )
            };
            let (plain, before, of_bias) = gradients(&layer);
            layer.set_dead_zone_bias(0.01).unwrap();
            let (y, after, still_of_bias) = gradients(&layer);
            assert_eq!(of_bias, still_of_bias);
            assert_eq!(
                flat(&y),
                flat(&layer.convert().unwrap().forward(&x).unwrap()),
                "packed"
            );
            let values = layer.quantized_weights().unwrap().values;
            let (w, r) = (flat(&w), r.to_vec2::<f32>().unwrap());
            let dead = |n: usize| {
                (0..40)
                    .filter(|k| values[n * 40 + k] == 0)
                    .map(|k| 0.01 * w[n * 40 + k])
                    .sum::<f32>()
            };
            let expected: Vec<f32> = flat(&plain)
                .iter()
                .enumerate()
                .map(|(i, y)| y + dead(i % 6))
                .collect();
            close("y", &y, &expected, 1e-6);
            let of_row = |n: usize| r.iter().map(|r| r[n]).sum::<f32>();
            let expected: Vec<f32> = before
                .iter()
                .enumerate()
                .map(|(i, g)| {
                    g + if values[i] == 0 {
                        0.01 * of_row(i / 40)
                    } else {
                        0.0
                    }
                })
                .collect();
            close(
                "dw",
                &Tensor::from_vec(after, expected.len(), &CPU).unwrap(),
                &expected,
                1e-6,
            );
        }
    }
    let int4 = config(Precision::Int4, Granularity::Channel, Activations::Int8);
    let mut layer = QatLinear::new(
        normal(&[4, 4]),
        None,
        None,
        &int4,
        StraightThroughEstimator::Plain,
    )
    .unwrap();
    assert!(
        layer
            .set_dead_zone_bias(1e-3)
            .unwrap_err()
            .to_string()
            .contains("ternary")
    );
}

/// Behaviour of candle's operations that the layer must not have.
mod traps {
    use super::*;

    fn layer(w: &Var, estimator: StraightThroughEstimator) -> QatLinear {
        let config = config(Precision::Ternary, Granularity::Tensor, Activations::Int8);
        QatLinear::new(w.as_tensor().clone(), None, None, &config, estimator).unwrap()
    }

    #[test]
    fn rounding_has_a_gradient() {
        let w = Var::from_tensor(&normal(&[3, 4])).unwrap();
        assert!(
            w.round()
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap()
                .get(&w)
                .is_none(),
            "candle: none"
        );
        let y = layer(&w, StraightThroughEstimator::Plain)
            .forward(&normal(&[2, 4]))
            .unwrap();
        assert!(y.sum_all().unwrap().backward().unwrap().get(&w).is_some());
    }

    #[test]
    fn the_edge_of_the_range_passes_the_whole_gradient() {
        let one = Var::new(&[1f32, -1.0], &CPU).unwrap();
        let clamped = one
            .clamp(-1f32, 1f32)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        assert_eq!(flat(clamped.get(&one).unwrap()), [0.5, 0.5], "candle: half");
        // mean|W| = 1, so every weight is at the edge.
        let w = Var::new(&[[1f32, -1.0], [-1.0, 1.0]], &CPU).unwrap();
        let x = Tensor::new(&[[127f32, 127.0]], &CPU).unwrap();
        let y = layer(&w, StraightThroughEstimator::Clipped { range: 1.0 })
            .forward(&x)
            .unwrap();
        let gradients = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(flat(gradients.get(&w).unwrap()), [127.0; 4]);
    }

    #[test]
    fn ties_go_to_even() {
        assert_eq!(
            flat(&Tensor::new(&[0.5f32, 2.5], &CPU).unwrap().round().unwrap()),
            [1.0, 3.0],
            "candle: away from zero"
        );
        let w = Var::new(&[[1f32, 0.0], [0.0, 1.0]], &CPU).unwrap();
        let x = Tensor::new(&[[127f32, 0.5], [127.0, 2.5]], &CPU).unwrap();
        let config = config(Precision::Int8, Granularity::Tensor, Activations::Int8);
        let layer = QatLinear::new(
            w.as_tensor().clone(),
            None,
            None,
            &config,
            StraightThroughEstimator::Plain,
        )
        .unwrap();
        let y = flat(&layer.forward(&x).unwrap());
        assert!(
            (y[1] - 0.0).abs() < 1e-6 && (y[3] - 2.0).abs() < 1e-5,
            "{y:?}"
        );
    }

    #[test]
    fn zeros_are_no_nan() {
        for estimator in [
            StraightThroughEstimator::Plain,
            StraightThroughEstimator::LearnedScale,
            StraightThroughEstimator::Soft { temperature: 1.0 },
        ] {
            let w = Var::zeros((3, 4), DType::F32, &CPU).unwrap();
            let x = Var::zeros((2, 4), DType::F32, &CPU).unwrap();
            let layer = layer(&w, estimator);
            let y = layer.forward(&x).unwrap();
            let gradients = y.sum_all().unwrap().backward().unwrap();
            for t in [&y, gradients.get(&w).unwrap(), gradients.get(&x).unwrap()] {
                assert!(flat(t).iter().all(|x| *x == 0.0), "{estimator}: {t}");
            }
        }
    }

    #[test]
    fn nan_is_nan_and_not_a_code() {
        for bad in [f32::NAN, f32::INFINITY] {
            for estimator in [
                StraightThroughEstimator::Plain,
                StraightThroughEstimator::Stretched,
            ] {
                let good = normal(&[3, 2]);
                let (w, x) = (
                    Var::from_tensor(&good).unwrap(),
                    Var::new(&[[1f32, bad], [0.0, 1.0]], &CPU).unwrap(),
                );
                let of_input = layer(&w, estimator);
                let mut of_weights = layer(&w, estimator);
                w.set(&Tensor::new(&[[1f32, bad], [0.0, 1.0], [1.0, 1.0]], &CPU).unwrap())
                    .unwrap();
                assert!(
                    of_weights
                        .quantized_weights()
                        .unwrap_err()
                        .to_string()
                        .contains("finite"),
                    "{estimator}"
                );
                assert!(of_weights.convert().is_err());
                for lambda in [1.0, 0.5] {
                    of_weights.set_lambda(lambda);
                    let y = of_weights.forward(&normal(&[1, 2])).unwrap();
                    assert!(
                        flat(&y).iter().all(|y| y.is_nan()),
                        "{estimator} {bad} {lambda}"
                    );
                }
                w.set(&good).unwrap();
                let y = of_input.forward(&x).unwrap();
                let gradients = y.sum_all().unwrap().backward().unwrap();
                for t in [&y, gradients.get(&w).unwrap(), gradients.get(&x).unwrap()] {
                    assert!(flat(t).iter().all(|y| y.is_nan()), "{estimator} {bad}");
                }
            }
        }
    }
}

#[test]
fn bad_input() {
    let config = config(Precision::Int4, Granularity::Tensor, Activations::Int8);
    let new = |w: Tensor, bias: Option<Tensor>, estimator| {
        QatLinear::new(w, bias, None, &config, estimator)
            .unwrap_err()
            .to_string()
    };
    let plain = StraightThroughEstimator::Plain;
    assert!(new(normal(&[4]), None, plain).contains("2 dimensions"));
    assert!(new(normal(&[4, 4]), Some(normal(&[3])), plain).contains("[4]"));
    assert!(new(normal(&[4, 4]).to_dtype(DType::F64).unwrap(), None, plain).contains("f32"));
    assert!(new(normal(&[4, 4]), None, StraightThroughEstimator::Stretched).contains("2 bits"));
    assert!(
        new(
            normal(&[4, 4]),
            None,
            StraightThroughEstimator::Soft { temperature: 0.0 }
        )
        .contains("positive")
    );
    let layer = QatLinear::new(normal(&[4, 4]), None, None, &config, plain).unwrap();
    assert!(
        layer
            .forward(&normal(&[2, 5]))
            .unwrap_err()
            .to_string()
            .contains("4 features")
    );
    for wrong in ["plane", "clipped", "clipped:x", "soft:-1", "plain:1"] {
        assert!(
            wrong.parse::<StraightThroughEstimator>().is_err(),
            "{wrong}"
        );
    }
}
