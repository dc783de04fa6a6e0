//! Quantizers against figures and brute force that do not come from this crate.

use bitnet_core::ops::{Cuts, Scalar, Uniform};
use bitnet_core::quantize::quantize;
use bitnet_core::random::Random;
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, Method, Rounding, ScaleRule, Threshold};
use bitnet_core::stats::ErrorStats;
use bitnet_core::{Error, Granularity, Matrix, ScaleDtype, ScaleForm, Scheme};
use proptest::prelude::*;

const SAMPLES: usize = 1 << 20;

fn samples(n: usize, mut draw: impl FnMut(&mut Random) -> f64) -> Vec<f32> {
    let mut random = Random::new(1);
    (0..n).map(|_| draw(&mut random) as f32).collect()
}

fn normal(n: usize) -> Vec<f32> {
    samples(n, Random::normal)
}

fn laplace(n: usize) -> Vec<f32> {
    samples(n, |r| {
        -(1.0 - r.uniform()).ln() * if r.uniform() < 0.5 { 1.0 } else { -1.0 }
    })
}

/// Student's t with 4 degrees of freedom at `n` evenly spaced probabilities (Shaw's closed
/// quantile): its fourth moment does not exist, so the figures of independent draws wander by more
/// than the bound.
fn student4(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| {
            let p = (i as f64 + 0.5) / n as f64;
            let a = (4.0 * p * (1.0 - p)).sqrt();
            let q = (a.acos() / 3.0).cos() / a;
            ((q - 1.0).max(0.0).sqrt() * 2.0 * (p - 0.5).signum()) as f32
        })
        .collect()
}

fn uniform(n: usize) -> Vec<f32> {
    samples(n, |r| 2.0 * r.uniform() - 1.0)
}

fn run(w: &[f32], cols: usize, scheme: &Scheme) -> Matrix {
    quantize(&Scalar, w, w.len() / cols, cols, scheme, None).unwrap()
}

fn sqnr(w: &[f32], cols: usize, scheme: &Scheme) -> f64 {
    ErrorStats::measure(w, &run(w, cols, scheme).dequantize()).sqnr_db()
}

#[test]
fn optimal_reaches_the_known_sqnr_of_four_densities() {
    let optimal = Scheme::ternary(Threshold::Optimal);
    for (name, w, expected) in [
        ("normal", normal(SAMPLES), 7.208),
        ("laplace", laplace(SAMPLES), 5.774),
        ("uniform", uniform(SAMPLES), 9.538),
        ("student t4", student4(SAMPLES), 5.070),
    ] {
        let got = sqnr(&w, SAMPLES, &optimal);
        assert!(
            (got - expected).abs() < 0.03,
            "{name}: {got} dB, expected {expected}"
        );
    }
}

#[test]
fn absmean_reaches_the_known_sqnr_of_the_normal_density() {
    let got = sqnr(
        &normal(SAMPLES),
        SAMPLES,
        &Scheme::ternary(Threshold::Absmean),
    );
    assert!((got - 5.80).abs() < 0.03, "{got} dB");
}

#[test]
fn optimal_is_at_least_as_good_as_every_rule_on_every_density() {
    for w in [
        normal(1 << 14),
        laplace(1 << 14),
        uniform(1 << 14),
        student4(1 << 14),
    ] {
        for granularity in [
            Granularity::Tensor,
            Granularity::Channel,
            Granularity::Group(100),
        ] {
            let error = |threshold| {
                ErrorStats::measure(
                    &w,
                    &run(
                        &w,
                        1024,
                        &Scheme::ternary(threshold).with_granularity(granularity),
                    )
                    .dequantize(),
                )
                .noise
            };
            let best = error(Threshold::Optimal);
            for &rule in Threshold::PLAIN.iter().chain(&[Threshold::Factor(0.9)]) {
                assert!(
                    best <= error(rule) * (1.0 + 1e-6),
                    "{rule:?} at {granularity}: {} < {best}",
                    error(rule)
                );
            }
        }
    }
}

#[test]
fn adaptive_stays_close_to_optimal_where_a_fixed_factor_does_not() {
    let w = laplace(1 << 16);
    let of = |threshold| sqnr(&w, w.len(), &Scheme::ternary(threshold));
    assert!(of(Threshold::Optimal) - of(Threshold::Adaptive) < 0.01);
    assert!(of(Threshold::Optimal) - of(Threshold::Mean) > 0.1);
}

#[test]
fn two_planes_beat_15_3_db_in_groups_of_128() {
    let w = normal(1 << 16);
    let scheme = |s: Scheme| {
        s.with_granularity(Granularity::Group(128))
            .with_scale_dtype(ScaleDtype::F16)
    };
    let two = sqnr(&w, 1024, &scheme(Scheme::planes(2)));
    let three = sqnr(&w, 1024, &scheme(Scheme::planes(3)));
    let int3 = sqnr(&w, 1024, &scheme(Scheme::int(3)));
    assert!(two >= 15.3, "two planes: {two} dB");
    assert!(three >= two + 5.0, "three planes: {three} dB");
    assert!((int3 - 11.2).abs() < 0.15, "int3 absmax: {int3} dB");
}

/// The definition, by brute force: every number of kept weights.
fn brute_force_optimal(w: &[f32], h: &[f32]) -> f64 {
    let mut order: Vec<usize> = (0..w.len()).collect();
    order.sort_by(|&a, &b| w[b].abs().total_cmp(&w[a].abs()));
    let (mut sum, mut weight, mut gain) = (0.0f64, 0.0f64, 0.0f64);
    for i in order {
        sum += f64::from(h[i]) * f64::from(w[i].abs());
        weight += f64::from(h[i]);
        if weight > 0.0 {
            gain = gain.max(sum * sum / weight);
        }
    }
    let signal: f64 = w
        .iter()
        .zip(h)
        .map(|(&w, &h)| f64::from(h) * f64::from(w).powi(2))
        .sum();
    signal - gain
}

fn weighted_error(w: &[f32], h: &[f32], m: &Matrix) -> f64 {
    let back = m.dequantize();
    w.iter()
        .zip(back)
        .zip(h)
        .map(|((&w, v), &h)| f64::from(h) * (f64::from(w) - f64::from(v)).powi(2))
        .sum()
}

/// The definition of two free levels, by brute force: every split of the sorted weights.
fn brute_force_two_levels(w: &[f32]) -> f64 {
    let mut sorted = w.to_vec();
    sorted.sort_by(f32::total_cmp);
    (1..=sorted.len())
        .map(|k| {
            [&sorted[..k], &sorted[k..]]
                .iter()
                .map(|part| {
                    let mean =
                        part.iter().map(|&x| f64::from(x)).sum::<f64>() / part.len().max(1) as f64;
                    part.iter()
                        .map(|&x| (f64::from(x) - mean).powi(2))
                        .sum::<f64>()
                })
                .sum::<f64>()
        })
        .fold(f64::INFINITY, f64::min)
}

fn weights() -> impl Strategy<Value = Vec<f32>> {
    // A mixture: continuous, with many ties, and with far outliers.
    prop_oneof![
        prop::collection::vec(-1.0f32..1.0, 1..700),
        prop::collection::vec((-8i32..8).prop_map(|i| i as f32 * 0.25), 1..700),
        prop::collection::vec(
            prop_oneof![9 => -0.01f32..0.01, 1 => -100.0f32..100.0],
            1..700
        ),
    ]
}

proptest! {
    #[test]
    fn optimal_equals_brute_force(w in weights(), seed in any::<u64>()) {
        let m = run(&w, w.len(), &Scheme::ternary(Threshold::Optimal));
        let ones = vec![1.0; w.len()];
        let signal: f64 = w.iter().map(|&w| f64::from(w).powi(2)).sum();
        let (got, expected) = (weighted_error(&w, &ones, &m), brute_force_optimal(&w, &ones));
        prop_assert!(got <= expected + 1e-6 * signal, "{got} > {expected}");
        let mut random = Random::new(seed);
        let h: Vec<f32> = w.iter().map(|_| if random.uniform() < 0.2 { 0.0 } else { random.uniform() as f32 }).collect();
        prop_assume!(h.iter().any(|&h| h > 0.0));
        let m = quantize(&Scalar, &w, 1, w.len(), &Scheme::ternary(Threshold::Optimal), Some(&h)).unwrap();
        let (got, expected) = (weighted_error(&w, &h, &m), brute_force_optimal(&w, &h));
        prop_assert!(got <= expected + 1e-6 * signal, "with importance: {got} > {expected}");
    }

    #[test]
    fn two_free_levels_equal_brute_force(w in weights()) {
        let m = run(&w, w.len(), &Scheme::binary(BinarySplit::Optimal));
        let signal: f64 = w.iter().map(|&w| f64::from(w).powi(2)).sum();
        let got = weighted_error(&w, &vec![1.0; w.len()], &m);
        let expected = brute_force_two_levels(&w);
        prop_assert!(got <= expected + 1e-5 * signal, "{got} > {expected}");
    }

    #[test]
    fn two_free_levels_with_importance_equal_brute_force(w in weights(), seed in any::<u64>()) {
        let mut random = Random::new(seed);
        // A third of the columns do not count at all.
        let h: Vec<f32> = w.iter().map(|_| if random.uniform() < 0.33 { 0.0 } else { random.uniform() as f32 }).collect();
        prop_assume!(h.iter().any(|&h| h > 0.0));
        let m = quantize(&Scalar, &w, 1, w.len(), &Scheme::binary(BinarySplit::Optimal), Some(&h)).unwrap();
        let mut order: Vec<usize> = (0..w.len()).collect();
        order.sort_by(|&a, &b| w[a].total_cmp(&w[b]));
        let part = |part: &[usize]| {
            let weight: f64 = part.iter().map(|&i| f64::from(h[i])).sum();
            let mean = part.iter().map(|&i| f64::from(h[i]) * f64::from(w[i])).sum::<f64>() / weight.max(1e-300);
            part.iter().map(|&i| f64::from(h[i]) * (f64::from(w[i]) - mean).powi(2)).sum::<f64>()
        };
        let expected = (0..=w.len()).map(|k| part(&order[..k]) + part(&order[k..])).fold(f64::INFINITY, f64::min);
        let signal: f64 = w.iter().zip(&h).map(|(&w, &h)| f64::from(h) * f64::from(w).powi(2)).sum();
        let got = weighted_error(&w, &h, &m);
        prop_assert!(got <= expected + 1e-5 * signal, "{got} > {expected}");
    }

    #[test]
    fn the_median_is_the_median(w in weights()) {
        let mut sorted: Vec<f64> = w.iter().map(|w| f64::from(w.abs())).collect();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let cut = (0.8 * (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0) as f32;
        let already_ternary = { let mut m: Vec<_> = w.iter().map(|w| w.abs()).filter(|&w| w > 0.0).collect(); m.dedup(); m.len() <= 1 };
        prop_assume!(!already_ternary);
        let m = run(&w, n, &Scheme::ternary(Threshold::Median));
        let expected: Vec<i8> = w.iter().map(|&w| i8::from(w > cut) - i8::from(w < -cut)).collect();
        prop_assert_eq!(m.values, expected);
    }

    #[test]
    fn quantizing_dequantized_ternary_and_binary_changes_nothing(
        w in prop::collection::vec(-1.0f32..1.0, 60),
        granularity in prop_oneof![Just(Granularity::Tensor), Just(Granularity::Channel), (1usize..20).prop_map(Granularity::Group)],
        dtype in prop_oneof![Just(ScaleDtype::F32), Just(ScaleDtype::F16), Just(ScaleDtype::Bf16)],
        which in 0..=Threshold::PLAIN.len(),
    ) {
        let scheme = Threshold::PLAIN.get(which).map_or(Scheme::binary(BinarySplit::Zero), |&t| Scheme::ternary(t));
        let scheme = scheme.with_granularity(granularity).with_scale_dtype(dtype);
        let once = run(&w, 12, &scheme);
        let twice = run(&once.dequantize(), 12, &scheme);
        // A ternary granule of only zeros has no scale to remember.
        let scales: Vec<f32> = (0..once.scales.len())
            .map(|i| {
                let dead = (0..once.values.len()).filter(|&v| once.spec.scale_index(0, v / 12, v % 12) == i).all(|v| once.values[v] == 0);
                if dead { 0.0 } else { once.scales[i] }
            })
            .collect();
        prop_assert_eq!(&once.values, &twice.values);
        prop_assert_eq!(&scales, &twice.scales);
    }

    #[test]
    fn int_codes_survive_dequantize_and_quantize(w in prop::collection::vec(-1.0f32..1.0, 64), bits in prop_oneof![Just(3u32), Just(4), Just(8)]) {
        let scheme = Scheme::int(bits).with_granularity(Granularity::Group(16));
        let once = run(&w, 32, &scheme);
        let twice = run(&once.dequantize(), 32, &scheme);
        prop_assert_eq!(once.values, twice.values);
    }

    #[test]
    fn permuting_rows_commutes_with_per_channel_quantization(
        rows in prop::collection::vec(prop::collection::vec(-1.0f32..1.0, 17), 1..8),
        planes in 1usize..3,
        shift in 0usize..8,
    ) {
        for granularity in [Granularity::Channel, Granularity::Group(5)] {
            let scheme = Scheme::planes(planes).with_granularity(granularity);
            let mut turned = rows.clone();
            turned.rotate_left(shift % rows.len());
            let a = run(&rows.concat(), 17, &scheme).dequantize();
            let b = run(&turned.concat(), 17, &scheme).dequantize();
            let mut a: Vec<&[f32]> = a.chunks(17).collect();
            a.rotate_left(shift % rows.len());
            prop_assert_eq!(a.concat(), b);
        }
    }

    #[test]
    fn codes_know_the_stored_scale(w in prop::collection::vec(-1.0f32..1.0, 40), f16 in any::<bool>()) {
        let dtype = if f16 { ScaleDtype::F16 } else { ScaleDtype::Bf16 };
        for scheme in [Scheme::ternary(Threshold::Absmean), Scheme::ternary(Threshold::Optimal), Scheme::planes(2), Scheme::int(4), Scheme::int(8)] {
            let m = run(&w, 20, &scheme.with_granularity(Granularity::Channel).with_scale_dtype(dtype));
            let back = m.dequantize();
            let (low, high) = m.spec.precision.range();
            for (row, (w, v)) in w.chunks(20).zip(back.chunks(20)).enumerate() {
                for (&w, &v) in w.iter().zip(v) {
                    // No other value of the alphabet is closer, given the scales as stored.
                    let s = m.scales[row];
                    prop_assert_eq!(dtype.round(s), s);
                    if m.spec.planes == 1 {
                        for q in low..=high {
                            prop_assert!((w - v).abs() <= (w - s * f32::from(q)).abs() + 1e-6, "{w} became {v}, {q} × {s} is closer");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_tail_group_has_its_own_scale() {
    let w = [1.0, -1.0, 1.0, 0.05, 0.2];
    let m = run(
        &w,
        5,
        &Scheme::ternary(Threshold::Optimal).with_granularity(Granularity::Group(3)),
    );
    assert_eq!(m.values, [1, -1, 1, 0, 1]);
    assert_eq!(m.scales, [1.0, 0.2]);
}

#[test]
fn a_dead_granule_has_scale_zero_and_no_nan() {
    for scheme in [
        Scheme::ternary(Threshold::Absmean),
        Scheme::ternary(Threshold::Median),
        Scheme::ternary(Threshold::Optimal),
        Scheme::planes(3),
        Scheme::binary(BinarySplit::Zero),
        Scheme::binary(BinarySplit::Optimal),
        Scheme::int(4),
    ] {
        let m = run(&[0.0; 6], 3, &scheme.with_granularity(Granularity::Channel));
        assert!(m.scales.iter().all(|&s| s == 0.0), "{scheme:?}");
        assert_eq!(m.dequantize(), [0.0; 6], "{scheme:?}");
    }
}

#[test]
fn nan_and_infinity_are_named_by_index() {
    for granularity in [
        Granularity::Tensor,
        Granularity::Channel,
        Granularity::Group(2),
    ] {
        let mut w = vec![0.5f32; 12];
        w[7] = f32::NEG_INFINITY;
        let scheme = Scheme::ternary(Threshold::Absmean).with_granularity(granularity);
        let error = quantize(&Scalar, &w, 3, 4, &scheme, None).unwrap_err();
        assert_eq!(
            error,
            Error::NotFinite {
                index: 7,
                value: f32::NEG_INFINITY
            }
        );
        assert_eq!(
            error.to_string(),
            "weight 7 is -inf, and only finite weights can be quantized"
        );
    }
}

#[test]
fn a_scale_outside_its_type_is_an_error() {
    let error = quantize(
        &Scalar,
        &[1e6, 2e6],
        1,
        2,
        &Scheme::int(8).with_scale_dtype(ScaleDtype::F16),
        None,
    );
    assert!(error.is_ok());
    let error = quantize(
        &Scalar,
        &[1e9, 2e9],
        1,
        2,
        &Scheme::int(8).with_scale_dtype(ScaleDtype::F16),
        None,
    )
    .unwrap_err();
    assert!(error.to_string().contains("does not fit f16"), "{error}");
}

#[test]
fn importance_is_refused_by_rules_that_ignore_it() {
    let h = [1.0, 2.0];
    for scheme in [
        Scheme::ternary(Threshold::Absmean),
        Scheme::binary(BinarySplit::Zero),
        Scheme::int(4),
    ] {
        let error = quantize(&Scalar, &[0.3, 0.7], 1, 2, &scheme, Some(&h)).unwrap_err();
        assert!(matches!(error, Error::Scheme(_)), "{error}");
    }
}

#[test]
fn least_squares_is_the_best_scale_for_absmean_codes() {
    let w = normal(4096);
    let scheme = |scale| Scheme {
        method: Method::Ternary {
            threshold: Threshold::Absmean,
            scale,
            planes: 1,
        },
        ..Scheme::ternary(Threshold::Absmean)
    };
    let (rule, best) = (
        run(&w, 4096, &scheme(ScaleRule::Rule)),
        run(&w, 4096, &scheme(ScaleRule::LeastSquares)),
    );
    assert_eq!(rule.values, best.values);
    let (wq, qq) = w
        .iter()
        .zip(&best.values)
        .fold((0.0f64, 0.0f64), |(a, b), (&w, &q)| {
            (a + f64::from(w) * f64::from(q), b + f64::from(q).powi(2))
        });
    assert!((f64::from(best.scales[0]) - wq / qq).abs() < 1e-6);
}

#[test]
fn rounding_modes_differ_at_ties_only() {
    let w = [-1.5, -0.5, 0.5, 1.5, 2.5, 3.0];
    let with = |rounding| {
        // int3 absmax with max 3: the step is 1.
        run(
            &w,
            6,
            &Scheme {
                rounding,
                ..Scheme::int(3)
            },
        )
        .values
    };
    assert_eq!(with(Rounding::HalfEven), [-2, 0, 0, 2, 2, 3]);
    assert_eq!(with(Rounding::HalfAway), [-2, -1, 1, 2, 3, 3]);
    assert_eq!(with(Rounding::HalfUp), [-1, 0, 1, 2, 3, 3]);
}

#[test]
fn clip_search_and_asymmetric_ranges_pay() {
    let w = normal(1 << 14);
    let int = |mapping, clip| {
        Scheme {
            method: Method::Int {
                bits: 2,
                mapping,
                clip,
            },
            ..Scheme::int(2)
        }
        .with_granularity(Granularity::Group(128))
    };
    let (plain, search) = (
        sqnr(&w, 1024, &int(Mapping::Symmetric, Clip::None)),
        sqnr(&w, 1024, &int(Mapping::Symmetric, Clip::Search)),
    );
    assert!(search > plain + 3.0, "{plain} {search}");
    let shifted: Vec<f32> = w.iter().map(|w| w.abs()).collect();
    let (symmetric, asymmetric) = (
        sqnr(&shifted, 1024, &int(Mapping::Symmetric, Clip::Search)),
        sqnr(&shifted, 1024, &int(Mapping::Asymmetric, Clip::Search)),
    );
    assert!(asymmetric > symmetric + 3.0, "{symmetric} {asymmetric}");
    let clipped = run(
        &[1.0, -1.0, 1.0, 100.0],
        4,
        &Scheme {
            method: Method::Int {
                bits: 8,
                mapping: Mapping::Symmetric,
                clip: Clip::Rms(0.1),
            },
            ..Scheme::int(8)
        },
    );
    assert_eq!(clipped.values[3], 127);
}

#[test]
fn stochastic_binary_is_seeded_and_unbiased() {
    let w: Vec<f32> = (0..4096)
        .map(|i| if i % 2 == 0 { 0.25 } else { 1.75 })
        .collect();
    let scheme = |seed| Scheme {
        method: Method::Binary {
            split: BinarySplit::Zero,
            stochastic: Some(seed),
        },
        ..Scheme::binary(BinarySplit::Zero)
    };
    let m = run(&w, 4096, &scheme(7));
    assert_eq!(m, run(&w, 4096, &scheme(7)));
    assert_ne!(m.values, run(&w, 4096, &scheme(8)).values);
    let mean = m.dequantize().iter().step_by(2).sum::<f32>() / 2048.0;
    assert!((mean - 0.25).abs() < 0.07, "{mean}");
    assert!(
        m.dequantize().iter().skip(1).step_by(2).all(|&v| v == 1.0),
        "1.75 clips to probability 1"
    );
}

#[test]
fn every_invalid_combination_is_a_typed_error() {
    let planes = |planes, threshold| Scheme {
        method: Method::Ternary {
            threshold,
            scale: ScaleRule::Rule,
            planes,
        },
        ..Scheme::planes(1)
    };
    for scheme in [
        planes(4, Threshold::Optimal),
        planes(0, Threshold::Optimal),
        planes(2, Threshold::Absmean),
        Scheme::ternary(Threshold::Factor(-1.0)),
        Scheme::ternary(Threshold::Factor(f32::NAN)),
        Scheme::int(5),
        Scheme::int(4).with_granularity(Granularity::Group(0)),
        Scheme {
            method: Method::Int {
                bits: 4,
                mapping: Mapping::Symmetric,
                clip: Clip::Rms(0.0),
            },
            ..Scheme::int(4)
        },
        Scheme {
            method: Method::Binary {
                split: BinarySplit::Mean,
                stochastic: Some(1),
            },
            ..Scheme::binary(BinarySplit::Mean)
        },
    ] {
        assert!(
            matches!(
                quantize(&Scalar, &[1.0, 0.5], 1, 2, &scheme, None),
                Err(Error::Scheme(_))
            ),
            "{scheme:?}"
        );
    }
}

/// Bytes of the packed values and of the scales, for each weight.
fn bits_per_weight(m: &Matrix, layout: &str) -> f64 {
    let mut bytes = vec![];
    bitnet_core::pack::by_name(layout)
        .unwrap()
        .pack_into(&m.spec, &m.values, &m.scales, &mut bytes)
        .unwrap();
    (bytes.len() + m.scales.len() * m.spec.scale_dtype.bytes()) as f64 * 8.0
        / m.spec.weights_len() as f64
}

#[test]
fn entropy_coded_ternary_is_under_1_56_bits_and_under_log2_3() {
    let m = run(
        &normal(256 * 4096),
        4096,
        &Scheme::ternary(Threshold::Optimal).with_granularity(Granularity::Channel),
    );
    let bits = bits_per_weight(&m, "entropy");
    assert!(bits <= 1.56, "{bits}");
    let m = run(
        &laplace(256 * 4096),
        4096,
        &Scheme::ternary(Threshold::Optimal).with_granularity(Granularity::Channel),
    );
    assert!(
        bits_per_weight(&m, "entropy") < bits,
        "heavier tails have more zeros"
    );
}

#[test]
fn two_planes_take_at_most_3_5_bits() {
    let scheme = Scheme::planes(2)
        .with_granularity(Granularity::Group(128))
        .with_scale_dtype(ScaleDtype::F16);
    let bits = bits_per_weight(&run(&normal(1 << 16), 1024, &scheme), "base-3");
    assert!(bits <= 3.5, "{bits}");
}

#[test]
fn the_median_of_many_weights_is_exact_too() {
    // More than fit the direct selection, and an even number of them.
    let w = laplace(200_000);
    let mut sorted: Vec<f64> = w.iter().map(|w| f64::from(w.abs())).collect();
    sorted.sort_by(f64::total_cmp);
    let cut = (0.8 * (sorted[99_999] + sorted[100_000]) / 2.0) as f32;
    let m = run(&w, w.len(), &Scheme::ternary(Threshold::Median));
    let kept = w.iter().filter(|w| w.abs() > cut).count();
    assert_eq!(m.values.iter().filter(|&&q| q != 0).count(), kept);
}

#[test]
fn inverse_scales_survive_storage_in_every_type() {
    let w = normal(4096);
    for dtype in [ScaleDtype::F32, ScaleDtype::F16, ScaleDtype::Bf16] {
        for threshold in [Threshold::Absmean, Threshold::Optimal] {
            let scheme = Scheme {
                scale_form: ScaleForm::Inverse,
                ..Scheme::ternary(threshold).with_scale_dtype(dtype)
            };
            let m = run(&w, 4096, &scheme);
            let stored = scheme.scale_storage().to_stored(m.scales[0]);
            assert_eq!(dtype.round(stored), stored, "{stored} is no {dtype}");
            assert_eq!(stored.recip(), m.scales[0], "read back from {dtype}");
            assert_eq!(m.spec.scale_dtype, ScaleDtype::F32);
            let again = run(&m.dequantize(), 4096, &scheme);
            assert_eq!(
                (&again.values, &again.scales),
                (&m.values, &m.scales),
                "{dtype} {threshold}"
            );
            let dead = run(&[0.0; 8], 8, &scheme);
            assert_eq!(dead.dequantize(), [0.0; 8]);
            assert!(
                dtype
                    .round(scheme.scale_storage().to_stored(dead.scales[0]))
                    .is_finite()
            );
        }
    }
}

#[test]
fn granularity_changes_only_where_nothing_is_lost() {
    let w = [1.0, -1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0];
    let channel = run(
        &w,
        4,
        &Scheme::ternary(Threshold::Optimal).with_granularity(Granularity::Channel),
    );
    let groups = channel
        .clone()
        .with_granularity(Granularity::Group(2))
        .unwrap();
    assert_eq!(groups.dequantize(), w);
    assert_eq!(
        groups
            .clone()
            .with_granularity(Granularity::Channel)
            .unwrap(),
        channel
    );
    let error = groups
        .with_granularity(Granularity::Tensor)
        .unwrap_err()
        .to_string();
    assert!(error.contains("5e-1") && error.contains("1e0"), "{error}");
}

#[test]
fn selected_rows_take_their_scales_along() {
    let w: Vec<f32> = (0..12).map(|i| (i as f32 - 5.0) * 0.3).collect();
    for scheme in [
        Scheme::planes(2),
        Scheme::int(4),
        Scheme::ternary(Threshold::Mean),
    ] {
        for granularity in [
            Granularity::Tensor,
            Granularity::Channel,
            Granularity::Group(3),
        ] {
            let m = run(&w, 4, &scheme.with_granularity(granularity));
            let back = m.dequantize();
            let turned = m.select_rows(&[2, 0, 1]).dequantize();
            assert_eq!(
                turned,
                [&back[8..], &back[..8]].concat(),
                "{scheme:?} {granularity}"
            );
        }
    }
}

#[test]
fn optimal_is_exact_where_two_fixed_points_hold_most_of_many_weights() {
    // Nine tenths near 1, one tenth near 3: cuts below 1 and near 2 are both fixed points, with
    // most keys in between.
    let w = samples(1 << 22, |r| {
        if r.uniform() < 0.9 {
            1.0 + 0.2 * r.normal()
        } else {
            3.0 + 0.2 * r.normal()
        }
    });
    let m = run(&w, w.len(), &Scheme::ternary(Threshold::Optimal));
    let mut sorted: Vec<f64> = w.iter().map(|w| f64::from(w.abs())).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut best) = (0.0, (0.0, 0));
    for (i, w) in sorted.iter().enumerate() {
        sum += w;
        let gain = sum * sum / (i + 1) as f64;
        if gain > best.0 {
            best = (gain, i + 1);
        }
    }
    let kept = m.values.iter().filter(|&&q| q != 0).count();
    assert!(
        kept.abs_diff(best.1) <= 1,
        "{kept} kept, the best is {}",
        best.1
    );
}

#[test]
fn a_scale_too_small_for_its_type_makes_zeros_and_nothing_else() {
    let tiny = [1e-9f32, -1e-9, 0.0, 1e-9];
    for scheme in [
        Scheme::ternary(Threshold::Absmean),
        Scheme::ternary(Threshold::Optimal),
        Scheme::planes(2),
        Scheme::int(4),
    ] {
        let m = run(&tiny, 4, &scheme.with_scale_dtype(ScaleDtype::F16));
        assert!(
            m.values.iter().all(|&q| q == 0) && m.scales.iter().all(|&s| s == 0.0),
            "{scheme:?}: {m:?}"
        );
    }
    let row = [0.01f32, 0.01 + 1e-9, 0.01, 0.01];
    for split in [BinarySplit::Mean, BinarySplit::Optimal] {
        let back = run(
            &row,
            4,
            &Scheme::binary(split).with_scale_dtype(ScaleDtype::F16),
        )
        .dequantize();
        assert!(
            back.iter().all(|v| (v - 0.01).abs() < 1e-5),
            "{split}: {back:?}"
        );
    }
    let inverse = Scheme {
        scale_form: ScaleForm::Inverse,
        ..Scheme::ternary(Threshold::Absmean).with_scale_dtype(ScaleDtype::F16)
    };
    let m = run(&tiny, 4, &inverse);
    assert!(inverse.scale_storage().to_stored(m.scales[0]).is_finite() && m.scales[0] > 0.0);
}

#[test]
fn no_reconstruction_is_infinite() {
    let w = [f32::MAX, -f32::MAX, 1.0, 0.0];
    for mapping in [Mapping::Symmetric, Mapping::Asymmetric] {
        for bits in [2, 3, 4, 8] {
            let scheme = Scheme {
                method: Method::Int {
                    bits,
                    mapping,
                    clip: Clip::None,
                },
                ..Scheme::int(bits)
            };
            assert!(
                run(&w, 4, &scheme)
                    .dequantize()
                    .iter()
                    .all(|v| v.is_finite()),
                "{bits} bits {mapping}"
            );
        }
    }
}

#[test]
fn zeros_under_a_zero_scale_stay_zeros_in_a_coarser_granularity() {
    // As another writer may store it: codes that are not 0 under a scale that is.
    let spec =
        bitnet_core::MatrixSpec::new(1, 4, bitnet_core::Precision::Ternary, Granularity::Group(2));
    let m = Matrix {
        spec,
        values: vec![1, -1, -1, -1],
        scales: vec![1.0, 0.0],
        zero_points: vec![],
    };
    let merged = m.clone().with_granularity(Granularity::Tensor).unwrap();
    assert_eq!(merged.dequantize(), [1.0, -1.0, 0.0, 0.0]);
}

/// The cuts of a rounding quantizer change the value exactly where the division and the rounding
/// do.
#[test]
fn cuts_are_where_rounding_changes_the_value() {
    let mut random = Random::new(7);
    let tiny = [
        f32::from_bits(1),
        f32::from_bits(2),
        f32::from_bits(3),
        f32::from_bits(0x7f_ffff),
        f32::MIN_POSITIVE,
    ];
    let others = [
        2.0 * f32::MIN_POSITIVE,
        1.0,
        1.0f32.next_down(),
        1.0f32.next_up(),
        65504.0,
        f32::MAX,
        0.0,
    ];
    let drawn = (0..2000).map(|_| (random.normal() * 40.0).clamp(-148.0, 127.0).exp2() as f32);
    for scale in tiny.into_iter().chain(others).chain(drawn) {
        for rounding in [Rounding::HalfEven, Rounding::HalfAway, Rounding::HalfUp] {
            let (cuts, uniform) = (
                Cuts::rounding(scale, rounding),
                Uniform {
                    scale,
                    zero: 0.0,
                    low: -1,
                    high: 1,
                    rounding,
                },
            );
            for edge in [
                scale / 2.0,
                -scale / 2.0,
                1.5 * scale,
                -scale,
                0.0,
                f32::MAX,
                f32::MIN,
            ] {
                let (mut below, mut above) = (edge, edge);
                for _ in 0..6 {
                    for w in [below, above].into_iter().filter(|w| w.is_finite()) {
                        let value = f32::from(i8::from(w > cuts.high) - i8::from(w < cuts.low));
                        assert_eq!(
                            value,
                            uniform.value(w),
                            "w = {w:e}, scale = {scale:e}, {rounding}, {cuts:?}"
                        );
                    }
                    (below, above) = (below.next_down(), above.next_up());
                }
            }
        }
    }
}

/// Rows as long as real ones, with ties, tails and repeated steps: the values are those of the best
/// of all cuts, found by sorting.
#[test]
fn optimal_rows_keep_what_sorting_says() {
    let mut random = Random::new(11);
    let mut kinds: Vec<Vec<f32>> = vec![];
    for n in [17, 300, 4096, 5000] {
        kinds.push((0..n).map(|_| random.normal() as f32 * 0.02).collect());
        kinds.push(
            (0..n)
                .map(|_| (random.normal() * 4.0).round() as f32 / 64.0)
                .collect(),
        );
        kinds.push((0..n).map(|_| random.normal().powi(5) as f32).collect());
        kinds.push(
            (0..n)
                .map(|i| {
                    if i % 3 == 0 {
                        10.0 + random.normal() as f32
                    } else {
                        random.normal() as f32
                    }
                })
                .collect(),
        );
    }
    for w in kinds {
        let matrix = run(&w, w.len(), &Scheme::ternary(Threshold::Optimal));
        let mut sorted: Vec<f64> = w.iter().map(|w| f64::from(w.abs())).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let (mut sum, mut best, mut cut) = (0.0, 0.0, f64::INFINITY);
        for (k, u) in sorted.iter().enumerate() {
            sum += u;
            // Equal magnitudes are kept or dropped together.
            if sorted.get(k + 1) != Some(u) && sum * sum / (k + 1) as f64 > best {
                (best, cut) = (sum * sum / (k + 1) as f64, *u);
            }
        }
        let expected: Vec<i8> = w
            .iter()
            .map(|w| {
                if f64::from(w.abs()) >= cut {
                    w.signum() as i8
                } else {
                    0
                }
            })
            .collect();
        assert!(matrix.values == expected, "{} weights, cut {cut}", w.len());
    }
}
