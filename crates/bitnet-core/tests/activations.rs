//! Activations against the equations, written plainly.

use bitnet_core::Error;
use bitnet_core::activation::{ActivationGranularity, ActivationMethod, quantize};
use bitnet_core::scheme::Rounding;
use proptest::prelude::*;

/// `clamp(round(x · top / max(max|x|, 1e-5)), −top − 1, top)` of one row, as HF transformers writes
/// it.
fn reference(x: &[f32], top: f32) -> (Vec<i8>, f32) {
    let max = x.iter().fold(1e-5f32, |m, x| m.max(x.abs()));
    let s = top / max;
    (
        x.iter()
            .map(|&x| (x * s).round_ties_even().clamp(-top - 1.0, top) as i8)
            .collect(),
        max / top,
    )
}

proptest! {
    #[test]
    fn absmax_follows_the_equation(x in prop::collection::vec(-10.0f32..10.0, 24), four_bits in any::<bool>()) {
        let (method, top) = if four_bits { (ActivationMethod::Int4, 7.0) } else { (ActivationMethod::Int8, 127.0) };
        let token = quantize(&x, 8, method, ActivationGranularity::Token, Rounding::HalfEven).unwrap();
        for (row, x) in x.chunks(8).enumerate() {
            let (values, scale) = reference(x, top);
            prop_assert_eq!(&token.values[row * 8..][..8], &values[..]);
            prop_assert_eq!(token.scales[row], scale);
        }
        let tensor = quantize(&x, 8, method, ActivationGranularity::Tensor, Rounding::HalfEven).unwrap();
        let (values, scale) = reference(&x, top);
        prop_assert_eq!((tensor.values, tensor.scales), (values, vec![scale]));
    }
}

#[test]
fn every_negative_activation_keeps_its_sign() {
    let x: Vec<f32> = (-127..=127).map(|i| i as f32).collect();
    let q = quantize(
        &x,
        255,
        ActivationMethod::Int8,
        ActivationGranularity::Token,
        Rounding::HalfEven,
    )
    .unwrap();
    assert_eq!(q.values, (-127..=127).collect::<Vec<i8>>());
    assert_eq!(q.scales, [1.0]);
}

#[test]
fn signs_with_their_least_squares_scale() {
    let q = quantize(
        &[0.5, -1.5, 0.0, 2.0],
        4,
        ActivationMethod::Sign,
        ActivationGranularity::Token,
        Rounding::HalfEven,
    )
    .unwrap();
    assert_eq!((q.values, q.scales), (vec![1, -1, 1, 1], vec![1.0]));
}

#[test]
fn silence_is_not_divided_by_zero() {
    let q = quantize(
        &[0.0; 4],
        2,
        ActivationMethod::Int8,
        ActivationGranularity::Token,
        Rounding::HalfEven,
    )
    .unwrap();
    assert_eq!(q.values, [0; 4]);
    assert!(q.scales.iter().all(|s| s.is_finite() && *s > 0.0));
}

#[test]
fn bad_input_is_named() {
    let of = |x: &[f32], cols| {
        quantize(
            x,
            cols,
            ActivationMethod::Int8,
            ActivationGranularity::Token,
            Rounding::HalfEven,
        )
    };
    assert!(matches!(
        of(&[1.0, f32::NAN], 2),
        Err(Error::NotFinite { index: 1, .. })
    ));
    assert!(matches!(
        of(&[1.0; 5], 2),
        Err(Error::Length {
            expected: 6,
            got: 5,
            ..
        })
    ));
    assert!(of(&[1.0], 0).is_err());
}
