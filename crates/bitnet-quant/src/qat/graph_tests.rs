//! The layer, losses and optimizers in candle's operations against those of the CPU, both run on
//! the CPU.

use super::distillation::logits_loss;
use super::optimizer::{Optimizer, Rates, sorted};
use super::regularization::{level_distance, on_device};
use super::{
    Betas, Linear, Linears, OptimizerConfig, OptimizerMethod, QatLinear, Stage,
    StraightThroughEstimator, distillation,
};
use crate::recipe::Choices;
use crate::{Activations, QuantizationConfig, Result};
use bitnet_core::random::Random;
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, Rounding, Scheme, Threshold};
use bitnet_core::{Granularity, ScaleDtype};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;

/// Numbers around 0 with a variance of `size`²/3 that depend on the seed alone.
fn numbers(seed: u64, shape: &[usize], size: f32) -> Tensor {
    let mut random = Random::new(seed);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| (2.0 * random.uniform() - 1.0) as f32 * size)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Within `bound` of the largest.
#[track_caller]
fn near(what: &str, got: &Tensor, expected: &Tensor, bound: f32) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (flat(got), flat(expected));
    let largest = expected.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!(
            (g - e).abs() <= bound * largest,
            "{what}[{i}]: {g} and {e}, of at most {largest}"
        );
    }
}

fn schemes() -> Vec<Scheme> {
    let mut all: Vec<Scheme> = [Threshold::Absmean, Threshold::Mean, Threshold::Factor(0.9)]
        .into_iter()
        .map(Scheme::ternary)
        .collect();
    let bf16 = Scheme::ternary(Threshold::Absmean).with_scale_dtype(ScaleDtype::Bf16);
    all.extend([
        bf16,
        Scheme::binary(BinarySplit::Zero),
        Scheme {
            rounding: Rounding::HalfAway,
            ..Scheme::int(3)
        },
    ]);
    all.extend([2, 3, 4, 8].map(Scheme::int));
    all.push(Scheme {
        method: rms(4),
        ..Scheme::int(4)
    });
    all
}

fn rms(bits: u32) -> bitnet_core::scheme::Method {
    bitnet_core::scheme::Method::Int {
        bits,
        mapping: Mapping::Symmetric,
        clip: Clip::Rms(1.3),
    }
}

fn layer(
    w: &Var,
    bias: Option<&Var>,
    scheme: &Scheme,
    activations: Activations,
    estimator: StraightThroughEstimator,
) -> Result<QatLinear> {
    let config = QuantizationConfig {
        default: Choices::from(*scheme),
        activations: Some(activations),
        ..QuantizationConfig::default()
    };
    QatLinear::new(
        w.as_tensor().clone(),
        bias.map(|b| b.as_tensor().clone()),
        None,
        &config,
        estimator,
    )
}

/// Compares output, gradients of the sum of y·r and codes.
fn same(what: &str, layer: &QatLinear, x: &Var, vars: &[&Var]) -> Result<()> {
    let (_, rounded) = layer.rounded()?;
    let matrix = layer.quantized_weights()?;
    let values: Vec<i8> = flat(&rounded.values).iter().map(|&q| q as i8).collect();
    assert_eq!(values, matrix.values, "{what}: codes");
    assert_eq!(flat(&rounded.step), matrix.scales, "{what}: scales");
    let (expected, got) = (layer.apply(x)?, layer.apply_graph(x)?);
    // Sums of 48 products in another order.
    near(what, &got, &expected, 48.0 * f32::EPSILON);
    let r = numbers(77, expected.dims(), 1.0);
    let back = |y: &Tensor| -> Result<GradStore> { Ok((y * &r)?.sum_all()?.backward()?) };
    let (expected, got) = (back(&expected)?, back(&got)?);
    let scale = layer.learned_scale();
    for (i, var) in vars.iter().copied().chain(scale).enumerate() {
        let (e, g) = (
            expected.get(var).expect(what),
            got.get(var)
                .unwrap_or_else(|| panic!("{what}: no gradient of {i}")),
        );
        // Sums over 15 tokens or 33 rows; of scales over all weights, which are of both signs.
        let terms = if Some(var.id()) == scale.map(|s| s.id()) {
            33.0 * 48.0
        } else {
            64.0
        };
        near(&format!("{what}: gradient {i}"), g, e, terms * f32::EPSILON);
    }
    same_weights(what, layer, vars[0])
}

/// Compares W̃ as a tensor of its own, and its gradients for elements that count differently, as the
/// rows of an embedding do.
fn same_weights(what: &str, layer: &QatLinear, w: &Var) -> Result<()> {
    let (got, expected) = (
        layer.fake_quantized_weights()?,
        layer.fake_quantized_graph()?,
    );
    near(&format!("{what}: weights"), &got, &expected, f32::EPSILON);
    if layer.lambda() == 1.0 {
        assert_eq!(flat(&got), flat(&layer.dequantized_weights()?), "{what}");
    }
    let r = numbers(78, got.dims(), 1.0);
    let back = |w: &Tensor| -> Result<GradStore> { Ok((w * &r)?.sum_all()?.backward()?) };
    let (got, expected) = (back(&got)?, back(&expected)?);
    for var in [Some(w), layer.learned_scale()].into_iter().flatten() {
        let (g, e) = (got.get(var).expect(what), expected.get(var).expect(what));
        let bound = 33.0 * 48.0 * f32::EPSILON;
        near(&format!("{what}: gradient of W̃"), g, e, bound);
    }
    Ok(())
}

#[test]
fn the_graph_is_the_operation() -> Result<()> {
    use StraightThroughEstimator::*;
    let (w, b, x) = (
        numbers(1, &[33, 48], 0.4),
        numbers(2, &[33], 1.0),
        numbers(3, &[3, 5, 48], 2.0),
    );
    let (w, b, x) = (
        Var::from_tensor(&w)?,
        Var::from_tensor(&b)?,
        Var::from_tensor(&x)?,
    );
    let mut count = 0;
    for estimator in [
        Plain,
        Clipped { range: 0.8 },
        LearnedScale,
        Stretched,
        Soft { temperature: 0.4 },
    ] {
        for (i, scheme) in schemes().iter().enumerate() {
            let granularities = [
                Granularity::Tensor,
                Granularity::Channel,
                Granularity::Group(16),
            ];
            for (j, granularity) in granularities.into_iter().enumerate() {
                let scheme = scheme.with_granularity(granularity);
                let activations = [
                    Activations::Int8,
                    Activations::Float,
                    Activations::Int4,
                    Activations::Sign,
                ][(i + j) % 4];
                let bias = (j != 1).then_some(&b);
                let what = format!("{estimator} {scheme:?} {activations:?}");
                // Combinations that the layer rejects.
                let Ok(mut layer) = layer(&w, bias, &scheme, activations, estimator) else {
                    continue;
                };
                count += 1;
                let vars: Vec<&Var> = [&w, &x].into_iter().chain(bias).collect();
                same(&what, &layer, &x, &vars)?;
                layer.set_lambda(0.25);
                same(&format!("{what}, λ 0.25"), &layer, &x, &vars)?;
                if layer.set_dead_zone_bias(0.05).is_ok() {
                    layer.set_lambda(1.0);
                    same(&format!("{what}, dead zone"), &layer, &x, &vars)?;
                }
                near(
                    &what,
                    &on_device(&layer)?,
                    &(level_distance(&mut One(Linear::Qat(Box::new(layer))))? * (33.0 * 48.0))?,
                    1e-5,
                );
            }
        }
    }
    assert!(count > 100, "{count}");
    Ok(())
}

struct One(Linear);

impl Linears for One {
    fn visit_linears(
        &mut self,
        visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>,
    ) -> Result<()> {
        visit("one", &mut self.0)
    }
}

#[test]
fn stages_without_strength_and_numbers_that_are_none() -> Result<()> {
    let (w, x) = (
        Var::from_tensor(&numbers(1, &[33, 48], 0.4))?,
        Var::from_tensor(&numbers(3, &[7, 48], 2.0))?,
    );
    for estimator in [
        StraightThroughEstimator::Plain,
        StraightThroughEstimator::Stretched,
    ] {
        let mut layer = layer(
            &w,
            None,
            &Scheme::ternary(Threshold::Absmean),
            Activations::Int8,
            estimator,
        )?;
        for bits in [8, 4, 3, 2] {
            layer.set_stage(Stage::Bits(bits))?;
            same(
                &format!("{estimator}, stage of {bits} bits"),
                &layer,
                &x,
                &[&w, &x],
            )?;
        }
        layer.set_stage(Stage::Target)?;
        layer.set_lambda(0.0);
        let exact = x.matmul(&w.t()?)?;
        assert_eq!(flat(&layer.apply_graph(&x)?), flat(&exact));
        layer.set_lambda(1.0);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut token = flat(&x);
            token[50] = bad;
            let y = layer
                .apply_graph(&Tensor::from_vec(token, (7, 48), &Device::Cpu)?)?
                .to_vec2::<f32>()?;
            assert!(
                y[1].iter().all(|y| y.is_nan()) && y[0].iter().all(|y| y.is_finite()),
                "the token shows it: {y:?}"
            );
        }
    }
    // A row of zeros has a scale of 0: weights and gradients pass unchanged.
    let mut zeros = flat(&w);
    zeros[..48].fill(0.0);
    let zeros = Var::from_tensor(&Tensor::from_vec(zeros, (33, 48), &Device::Cpu)?)?;
    for scheme in [
        Scheme::ternary(Threshold::Absmean),
        Scheme::ternary(Threshold::Mean),
        Scheme::int(4),
    ] {
        for estimator in [
            StraightThroughEstimator::Clipped { range: 1.0 },
            StraightThroughEstimator::Soft { temperature: 1.0 },
        ] {
            let layer = layer(
                &zeros,
                None,
                &scheme.with_granularity(Granularity::Channel),
                Activations::Int8,
                estimator,
            )?;
            same(
                &format!("zeros {estimator} {scheme:?}"),
                &layer,
                &x,
                &[&zeros, &x],
            )?;
        }
    }
    Ok(())
}

#[test]
fn what_the_graph_cannot_say_is_refused() -> Result<()> {
    let w = Var::from_tensor(&numbers(1, &[8, 48], 0.4))?;
    let refused = |scheme: Scheme| {
        let layer = layer(
            &w,
            None,
            &scheme,
            Activations::Int8,
            StraightThroughEstimator::Plain,
        )
        .unwrap();
        layer
            .apply_graph(&numbers(2, &[2, 48], 1.0))
            .unwrap_err()
            .to_string()
    };
    for scheme in [
        Scheme::ternary(Threshold::Optimal),
        Scheme::planes(2),
        Scheme::binary(BinarySplit::Mean),
    ] {
        let error = refused(scheme);
        assert!(error.contains("devices other than the CPU"), "{error}");
    }
    let error =
        refused(Scheme::ternary(Threshold::Absmean).with_granularity(Granularity::Group(32)));
    assert!(error.contains("divisor of the 48 columns"), "{error}");
    Ok(())
}

#[test]
fn ties_go_to_even_in_the_graph() -> Result<()> {
    let mut w = vec![0f32; 16];
    (w[0], w[5], w[10], w[15]) = (1.0, 1.0, 1.0, 1.0);
    let w = Var::from_vec(w, (4, 4), &Device::Cpu)?;
    let layer = layer(
        &w,
        None,
        &Scheme::int(8),
        Activations::Int8,
        StraightThroughEstimator::Plain,
    )?;
    let x = Tensor::new(&[[127f32, 0.5, 1.5, -2.5]], &Device::Cpu)?;
    assert_eq!(flat(&layer.apply_graph(&x)?), [127.0, 0.0, 2.0, -2.0]);
    Ok(())
}

#[test]
fn optimizers_step_alike() -> Result<()> {
    let betas = Betas {
        beta1: 0.8,
        ..Betas::default()
    };
    let sgd = |momentum, nesterov| OptimizerMethod::Sgd { momentum, nesterov };
    for method in [
        sgd(0.0, false),
        sgd(0.9, false),
        sgd(0.9, true),
        OptimizerMethod::Adam(betas),
        OptimizerMethod::AdamW(betas),
    ] {
        let config = OptimizerConfig {
            method,
            learning_rate: 0.01,
            weight_decay: 0.1,
            group: vec![],
        };
        let start = || -> Result<(VarMap, Vec<Var>)> {
            let vars = VarMap::new();
            for (name, seed, shape) in [("bias", 1, &[9][..]), ("weight", 2, &[9, 7])] {
                vars.data()
                    .lock()
                    .unwrap()
                    .insert(name.into(), Var::from_tensor(&numbers(seed, shape, 1.0))?);
            }
            let all = sorted(&vars).into_iter().map(|(_, var)| var).collect();
            Ok((vars, all))
        };
        let ((a, ours), (b, theirs)) = (start()?, start()?);
        let (mut fused, mut plain) = (
            Optimizer::new(&a, &config)?,
            Optimizer::build(sorted(&b), &config, |_| false)?,
        );
        for step in 0..10 {
            let rates = Rates {
                learning_rate: 1.0 / (1.0 + step as f64),
                clip: Some(0.7),
                ..Rates::default()
            };
            let grads = |vars: &[Var], micro: u64| -> Result<GradStore> {
                let losses = [0, 1].map(|i| {
                    (vars[i].as_tensor()
                        * numbers(10 * step + 2 * micro + i as u64, vars[i].dims(), 1.0))?
                    .sqr()?
                    .sum_all()
                });
                let [one, two] = losses;
                Ok((one? + two?)?.backward()?)
            };
            for micro in 0..step % 3 {
                fused.accumulate(&grads(&ours, micro)?)?;
                plain.accumulate(&grads(&theirs, micro)?)?;
            }
            let norms = (
                fused.step(&grads(&ours, 9)?, rates)?,
                plain.step(&grads(&theirs, 9)?, rates)?,
            );
            assert!(
                (norms.0 - norms.1).abs() <= 1e-6 * norms.0,
                "{method:?}: {norms:?}"
            );
        }
        for (x, y) in ours.iter().zip(&theirs) {
            // Ten steps of a few roundings each.
            near(&format!("{method:?}"), y, x, 1e-5);
        }
        plain.reset_moments("weight")?;
        assert!(plain.is_finite()?);
        let moved = theirs[0]
            .sub(&numbers(1, &[9], 1.0))?
            .abs()?
            .min(0)?
            .to_scalar::<f32>()?;
        assert!(moved > 1e-4, "nothing happened");
    }
    Ok(())
}

#[test]
fn distillation_is_the_same() -> Result<()> {
    let (student, teacher) = (
        Var::from_tensor(&numbers(5, &[3, 4, 17], 6.0))?,
        numbers(6, &[3, 4, 17], 6.0),
    );
    for temperature in [1.0, 2.5] {
        let (a, b) = (
            logits_loss(&student, &teacher, temperature)?,
            distillation::on_device(&student, &teacher, temperature)?,
        );
        near("loss", &b, &a, 1e-5);
        let (a, b) = (a.backward()?, b.backward()?);
        near(
            "gradient",
            b.get(&student).unwrap(),
            a.get(&student).unwrap(),
            1e-5,
        );
    }
    assert_eq!(student.dtype(), DType::F32);
    Ok(())
}
