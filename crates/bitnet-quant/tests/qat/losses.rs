//! Additional losses: distillation against torch, regularization against its definition.

use super::*;
use bitnet_quant::qat::distillation::{Distance, hidden_loss, logits_loss, relation_loss};
use bitnet_quant::qat::regularization::level_distance;

#[test]
fn distillation_as_torch() {
    for case in golden()["distillation"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let tensor = |data: &str, shape: &str| {
            let shape: Vec<usize> = case[shape]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| v.as_u64().unwrap() as usize)
                .collect();
            Var::from_tensor(&Tensor::from_vec(floats(&case[data]), shape, &CPU).unwrap()).unwrap()
        };
        let (student, teacher) = (
            tensor("student", "shape"),
            tensor("teacher", "teacher_shape"),
        );
        let loss = match name {
            "logits" => logits_loss(&student, &teacher, case["temperature"].as_f64().unwrap()),
            "mse" => hidden_loss(&student, &teacher, Distance::Mse),
            "cosine" => hidden_loss(&student, &teacher, Distance::Cosine),
            _ => relation_loss(&student, &teacher, case["heads"].as_u64().unwrap() as usize),
        };
        let loss = loss.unwrap();
        close(name, &loss, &[case["loss"].as_f64().unwrap() as f32], 1e-6);
        // A loss inside another one passes its gradient on.
        let gradients = (&loss * 3.0).unwrap().backward().unwrap();
        let expected: Vec<f32> = floats(&case["gradient"]).iter().map(|g| 3.0 * g).collect();
        close(name, gradients.get(&student).unwrap(), &expected, 4e-6);
        assert!(
            gradients.get(&teacher).is_none(),
            "{name}: the teacher stands still"
        );
    }
}

#[test]
fn distillation_of_equals_is_nothing_and_zeros_are_no_nan() {
    let x = Var::from_tensor(&normal(&[2, 3, 8])).unwrap();
    let zeros = Var::zeros((2, 3, 8), DType::F32, &CPU).unwrap();
    for (student, teacher) in [(&x, &x), (&zeros, &x), (&x, &zeros), (&zeros, &zeros)] {
        let losses = [
            logits_loss(student, teacher, 3.0),
            hidden_loss(student, teacher, Distance::Mse),
            hidden_loss(student, teacher, Distance::Cosine),
            relation_loss(student, teacher, 2),
        ];
        for (i, loss) in losses.into_iter().enumerate() {
            let loss = loss.unwrap();
            let value = loss.to_scalar::<f32>().unwrap();
            let same = std::ptr::eq(student, teacher) && (i != 2 || !std::ptr::eq(student, &zeros));
            assert!(
                value.is_finite() && (!same || value.abs() < 1e-6),
                "{i}: {value}"
            );
            let gradients = loss.backward().unwrap();
            assert!(
                flat(gradients.get(student).unwrap())
                    .iter()
                    .all(|g| g.is_finite()),
                "{i}"
            );
        }
    }
    assert!(
        logits_loss(&x, &normal(&[2, 3, 9]), 1.0)
            .unwrap_err()
            .to_string()
            .contains("[2, 3, 8]")
    );
    assert!(
        logits_loss(&x, &x, 0.0)
            .unwrap_err()
            .to_string()
            .contains("temperature")
    );
    assert!(
        relation_loss(&x, &x, 3)
            .unwrap_err()
            .to_string()
            .contains("3 heads")
    );
}

#[test]
fn level_distance_is_its_definition() {
    let vars = VarMap::new();
    let mut model = Mlp::new(&[10, 12, 6], &vars);
    assert!(
        level_distance(&mut model)
            .unwrap_err()
            .to_string()
            .contains("layers in training")
    );
    let config = config(Precision::Ternary, Granularity::Tensor, Activations::Int8);
    prepare(&mut model, &config, StraightThroughEstimator::Plain, &vars).unwrap();
    let loss = level_distance(&mut model).unwrap();
    let gradients = (&loss * 5.0).unwrap().backward().unwrap();
    let (mut sum, count) = (0.0, (10 * 12 + 12 * 6) as f32);
    for (i, layer) in model.0.iter_mut().enumerate() {
        let layer = layer.as_qat().unwrap();
        let scale = layer.quantized_weights().unwrap().scales[0];
        let far: Vec<f32> = flat(layer.weight())
            .iter()
            .zip(flat(&layer.dequantized_weights().unwrap()))
            .map(|(w, v)| w - v)
            .collect();
        sum += far.iter().map(|d| (d / scale).powi(2)).sum::<f32>();
        let expected: Vec<f32> = far
            .iter()
            .map(|d| 10.0 * d / scale.powi(2) / count)
            .collect();
        let weight = vars.data().lock().unwrap()[&format!("{i}.weight")].clone();
        close("gradient", gradients.get(&weight).unwrap(), &expected, 1e-5);
    }
    close("distance", &loss, &[sum / count], 1e-5);
}
