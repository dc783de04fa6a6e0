//! Sensitivities and progressive quantization.

use super::*;
use bitnet_quant::CheckpointError;
use bitnet_quant::qat::Progressive;
use bitnet_quant::qat::sensitivity::{self, Fisher};

fn prepared(sizes: &[usize]) -> (Mlp, VarMap) {
    let vars = VarMap::new();
    let mut model = Mlp::new(sizes, &vars);
    let config = config(Precision::Ternary, Granularity::Channel, Activations::Int8);
    prepare(&mut model, &config, StraightThroughEstimator::Plain, &vars).unwrap();
    (model, vars)
}

fn strengths(model: &mut Mlp) -> Vec<f32> {
    model
        .0
        .iter_mut()
        .map(|l| l.as_qat().unwrap().lambda())
        .collect()
}

#[test]
fn one_layer_at_a_time() {
    let (mut model, _) = prepared(&[16, 24, 24, 4]);
    model.0[1].as_qat().unwrap().set_lambda(0.5);
    let (x, target) = (normal(&[32, 16]), normal(&[32, 4]));
    let loss = |model: &mut Mlp| -> Result<f64> {
        Ok((model.forward(&x) - &target)?
            .sqr()?
            .mean_all()?
            .to_scalar::<f32>()?
            .into())
    };
    let found = sensitivity::one_at_a_time(&mut model, loss).unwrap();
    assert_eq!(strengths(&mut model), [1.0, 0.5, 1.0], "as they were");
    assert_eq!(
        found
            .iter()
            .map(|s| (s.name.as_str(), s.weights))
            .collect::<Vec<_>>(),
        [("0", 384), ("1", 576), ("2", 96)]
    );
    for (i, s) in found.iter().enumerate() {
        let mut with = |strength: [f32; 3]| {
            model
                .0
                .iter_mut()
                .zip(strength)
                .for_each(|(l, s)| l.as_qat().unwrap().set_lambda(s));
            loss(&mut model).unwrap()
        };
        let mut only = [0.0; 3];
        only[i] = 1.0;
        assert_eq!(s.loss_change, with(only) - with([0.0; 3]));
    }
    let order = sensitivity::order(&found);
    assert!(order.windows(2).all(|o| {
        let of = |name: &str| found.iter().find(|s| s.name == name).unwrap().loss_change;
        of(&o[0]) <= of(&o[1])
    }));
    // A failing loss also leaves the layers unchanged.
    model
        .0
        .iter_mut()
        .for_each(|l| l.as_qat().unwrap().set_lambda(0.75));
    sensitivity::one_at_a_time(&mut model, |_| Err(CheckpointError::Interrupted.into()))
        .unwrap_err();
    assert_eq!(strengths(&mut model), [0.75; 3]);
}

/// One linear layer and the loss ½|y − t|² of one sample at a time: the Fisher matrix at the
/// optimum of a model with unit noise is the Hessian, Σ x², so that ½ΣF·Δw² is the expected loss of
/// independent roundings, up to the noise of the estimate.
#[test]
fn fisher_predicts_the_loss_of_rounding() {
    let (k, n, samples) = (24, 8, 40_000);
    let vars = VarMap::new();
    let mut model = Mlp::new(&[k, n], &vars);
    let x = normal(&[samples, k]);
    let target = (model.forward(&x).detach() + normal(&[samples, n])).unwrap();
    let config = config(Precision::Int4, Granularity::Channel, Activations::Float);
    prepare(&mut model, &config, StraightThroughEstimator::Plain, &vars).unwrap();
    model.0[0].as_qat().unwrap().set_lambda(0.0);
    let loss = |model: &Mlp, x: &Tensor, t: &Tensor| {
        ((model.forward(x) - t)
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            * (0.5 / x.dims()[0] as f64))
            .unwrap()
    };
    let mut fisher = Fisher::new();
    assert!(
        fisher.sensitivities(&mut model).is_err(),
        "nothing was added"
    );
    for batch in 0..samples / 40 {
        let part = |t: &Tensor| t.narrow(0, batch * 40, 40).unwrap();
        let gradients = loss(&model, &part(&x), &part(&target)).backward().unwrap();
        fisher.add(&mut model, &gradients, 40).unwrap();
    }
    let predicted = fisher.sensitivities(&mut model).unwrap()[0].loss_change;
    let floats = loss(&model, &x, &target).to_scalar::<f32>().unwrap();
    model.0[0].as_qat().unwrap().set_lambda(1.0);
    let change = f64::from(loss(&model, &x, &target).to_scalar::<f32>().unwrap() - floats);
    assert!(
        (0.7..1.4).contains(&(predicted / change)),
        "{predicted} {change}"
    );
}

#[cfg(feature = "advanced")]
#[test]
fn fisher_chooses_precisions_within_a_budget() {
    use bitnet_quant::recipe::Choices;
    let (mut model, vars) = prepared(&[32, 64, 64, 8]);
    model
        .0
        .iter_mut()
        .for_each(|l| l.as_qat().unwrap().set_lambda(0.0));
    let (x, target) = (normal(&[64, 32]), normal(&[64, 8]));
    let mut fisher = Fisher::new();
    let loss = (model.forward(&x) - &target)
        .unwrap()
        .sqr()
        .unwrap()
        .mean_all()
        .unwrap();
    fisher
        .add(&mut model, &loss.backward().unwrap(), 64)
        .unwrap();
    let settings = [Precision::Ternary, Precision::Int4, Precision::Int8].map(|p| Choices {
        precision: Some(Target::Quantized(p)),
        granularity: Some(Granularity::Channel),
        ..Choices::default()
    });
    let rules = fisher.rules(&mut model, &settings, 5.5).unwrap();
    assert_eq!(
        rules.iter().map(|r| r.glob.as_str()).collect::<Vec<_>>(),
        ["0.weight", "1.weight", "2.weight"]
    );
    let shapes = [(64, 32), (64, 64), (8, 64)];
    let bits: usize = rules
        .iter()
        .zip(shapes)
        .map(|(r, (n, k))| n * k * r.choices.precision().unwrap().code_bits() as usize + 32 * n)
        .sum();
    let weights: usize = shapes.iter().map(|(n, k)| n * k).sum();
    assert!(
        bits as f64 <= 5.5 * weights as f64 && bits as f64 > 3.5 * weights as f64,
        "{bits}"
    );
    let mut model = Mlp::new(&[32, 64, 64, 8], &vars);
    let config = QuantizationConfig {
        rules,
        ..QuantizationConfig::default()
    };
    prepare(&mut model, &config, StraightThroughEstimator::Plain, &vars).unwrap();
    assert!(
        fisher.rules(&mut model, &settings, 0.5).is_err(),
        "no such budget"
    );
}

#[test]
fn stages_follow_the_steps() {
    let (mut model, _) = prepared(&[16, 24, 24, 4]);
    let schedule = Progressive {
        warmup: 4,
        order: vec!["2".into(), "0".into()],
        stagger: 10,
        ..Progressive::halving(8, 20)
    };
    schedule.validate().unwrap();
    assert_eq!(schedule.apply(&mut model, 0).unwrap(), ["0", "1", "2"]);
    assert_eq!(strengths(&mut model), [0.0; 3]);
    assert!(schedule.apply(&mut model, 2).unwrap().is_empty());
    assert_eq!(
        strengths(&mut model),
        [0.0, 0.5, 0.5],
        "layer 0 is the second"
    );
    schedule.apply(&mut model, 11).unwrap();
    assert_eq!(strengths(&mut model), [0.25, 1.0, 1.0]);
    assert_eq!(schedule.apply(&mut model, 20).unwrap(), ["1", "2"]);
    let stages: Vec<Stage> = model
        .0
        .iter_mut()
        .map(|l| l.as_qat().unwrap().stage())
        .collect();
    assert_eq!(stages, [Stage::Bits(8), Stage::Bits(4), Stage::Bits(4)]);
    schedule.apply(&mut model, schedule.settled()).unwrap();
    assert!(model.0.iter_mut().all(
        |l| l.as_qat().unwrap().stage() == Stage::Target && l.as_qat().unwrap().lambda() == 1.0
    ));
    // A target of 4 bits follows the stage of 8 bits.
    let vars = VarMap::new();
    let mut model = Mlp::new(&[16, 4], &vars);
    prepare(
        &mut model,
        &config(Precision::Int4, Granularity::Channel, Activations::Int8),
        StraightThroughEstimator::Plain,
        &vars,
    )
    .unwrap();
    assert_eq!(schedule.apply(&mut model, 19).unwrap(), ["0"]);
    assert_eq!(schedule.apply(&mut model, 30).unwrap(), ["0"]);
    assert_eq!(model.0[0].as_qat().unwrap().stage(), Stage::Target);
    for wrong in [
        Progressive {
            stages: vec![(5, Stage::Target), (5, Stage::Bits(7))],
            ..Default::default()
        },
        Progressive {
            stagger: 1,
            ..Default::default()
        },
    ] {
        assert!(wrong.validate().is_err());
    }
}

/// The estimator adds no noise to gradients: over batches they vary as the gradients of dequantized
/// weights do.
#[test]
fn gradients_scatter_as_those_of_dequantized_leaves() {
    let (mut model, vars) = prepared(&[16, 8]);
    let layer = model.0[0].as_qat().unwrap().clone();
    let leaf = Var::from_tensor(&layer.dequantized_weights().unwrap()).unwrap();
    let (mut latent, mut leaves) = (vec![], vec![]);
    for _ in 0..32 {
        let (x, target) = (normal(&[8, 16]), normal(&[8, 8]));
        let loss = |y: Tensor| {
            (y - &target)
                .unwrap()
                .sqr()
                .unwrap()
                .mean_all()
                .unwrap()
                .backward()
                .unwrap()
        };
        let weight = vars.data().lock().unwrap()["0.weight"].clone();
        latent.push(flat(loss(layer.forward(&x).unwrap()).get(&weight).unwrap()));
        let hat = bitnet_quant::absmax_quantize_activations(&x, &CPU)
            .unwrap()
            .dequantize()
            .unwrap();
        let y = hat
            .matmul(&leaf.t().unwrap())
            .unwrap()
            .broadcast_add(layer.bias().unwrap())
            .unwrap();
        leaves.push(flat(loss(y).get(&leaf).unwrap()));
    }
    let variance = |all: &[Vec<f32>]| -> f64 {
        let n = all.len() as f64;
        let of = |i: usize| {
            let mean = all.iter().map(|g| f64::from(g[i])).sum::<f64>() / n;
            all.iter()
                .map(|g| (f64::from(g[i]) - mean).powi(2))
                .sum::<f64>()
                / n
        };
        (0..all[0].len()).map(of).sum()
    };
    let ratio = variance(&latent) / variance(&leaves);
    assert!((ratio - 1.0).abs() < 0.01, "{ratio}");
}

/// A model rounded to ternary is trained towards the original: every estimator recovers most of the
/// loss.
#[test]
fn training_wins_back_what_rounding_lost() {
    let estimators = ["plain", "clipped:2", "lsq", "stretched", "soft:1"];
    for estimator in estimators {
        let vars = VarMap::new();
        let mut model = Mlp::new(&[16, 64, 64, 5], &vars);
        let x = normal(&[512, 16]);
        let target = model.forward(&x).detach();
        let config = config(Precision::Ternary, Granularity::Channel, Activations::Int8);
        prepare(&mut model, &config, estimator.parse().unwrap(), &vars).unwrap();
        let loss = |model: &Mlp| {
            (model.forward(&x) - &target)
                .unwrap()
                .sqr()
                .unwrap()
                .mean_all()
                .unwrap()
        };
        let rounded = loss(&model).to_scalar::<f32>().unwrap();
        let mut adamw = candle_nn::AdamW::new_lr(vars.all_vars(), 3e-3).unwrap();
        for _ in 0..200 {
            adamw.backward_step(&loss(&model)).unwrap();
        }
        let trained = loss(&model).to_scalar::<f32>().unwrap();
        assert!(
            trained < 0.4 * rounded,
            "{estimator}: {rounded} before, {trained} after"
        );
        convert(&mut model).unwrap();
        assert_eq!(
            loss(&model).to_scalar::<f32>().unwrap(),
            trained,
            "{estimator}: packed"
        );
    }
}
