//! Every instruction set of this machine returns the bits of the scalar oracle.

use bitnet_core::ops::{Cuts, Key, LANES, Moments, Ops, Scalar, Uniform};
use bitnet_core::scheme::Rounding;
use bitnet_kernels::{Isa, Kernels};
use proptest::prelude::*;

fn check(w: &[f32], h: &[f32], t: f32) {
    let bits = |m: Moments| {
        (
            m.count,
            [m.sum, m.sum_abs, m.sum_sq].map(f64::to_bits),
            [m.min, m.max, m.min_nonzero].map(f32::to_bits),
            m.finite,
        )
    };
    for kernels in Kernels::all() {
        let isa = kernels.isa();
        assert_eq!(
            bits(kernels.moments(w)),
            bits(Scalar.moments(w)),
            "moments on {isa}"
        );
        let (got, expected) = (kernels.magnitudes(w), Scalar.moments(w));
        assert_eq!(
            (got.count, got.sum.to_bits(), got.max),
            (
                expected.count,
                expected.sum_abs.to_bits(),
                expected.max_abs()
            ),
            "{isa}"
        );
        assert_eq!(
            got.ternary,
            expected.max_abs() == 0.0 || expected.ternary_magnitude().is_some(),
            "ternary on {isa}"
        );
        for key in [Key::Magnitude, Key::Signed] {
            assert_eq!(
                kernels.above(w, None, key, t),
                Scalar.above(w, None, key, t),
                "above on {isa}"
            );
            for other in [0.0, -t, 2.0 * t] {
                let expected = [
                    Scalar.above(w, None, key, t),
                    Scalar.above(w, None, key, other),
                ];
                assert_eq!(
                    kernels.above_both(w, key, [t, other]),
                    expected,
                    "above_both on {isa}"
                );
            }
            let (mut got, mut expected) = (vec![7.0], vec![7.0]);
            kernels.inside(w, key, t - 0.5, t, &mut got);
            Scalar.inside(w, key, t - 0.5, t, &mut expected);
            assert_eq!(got, expected, "inside on {isa}");
            let (mut got, mut expected) = (vec![], vec![]);
            kernels.magnitudes_each(w, 40, &mut got);
            Scalar.magnitudes_each(w, 40, &mut expected);
            assert_eq!(got, expected, "magnitudes_each on {isa}");
            assert_eq!(
                kernels.above(w, Some(h), key, t),
                Scalar.above(w, Some(h), key, t),
                "weighted above on {isa}"
            );
        }
        let (mut got, mut expected) = (vec![99; w.len()], vec![-99; w.len()]);
        let cuts = Cuts {
            low: t - 0.5,
            high: t.abs(),
        };
        kernels.encode_cut(w, cuts, &mut got);
        Scalar.encode_cut(w, cuts, &mut expected);
        assert_eq!(got, expected, "encode_cut on {isa}");
        for rounding in [Rounding::HalfEven, Rounding::HalfAway, Rounding::HalfUp] {
            for (scale, zero, low, high) in [
                (0.25, 0.0, -1, 1),
                (0.1, 3.0, -8, 7),
                (0.01, -5.0, -128, 127),
                (0.0, 0.0, -2, 1),
            ] {
                let q = Uniform {
                    scale,
                    zero,
                    low,
                    high,
                    rounding,
                };
                kernels.encode_uniform(w, &q, &mut got);
                Scalar.encode_uniform(w, &q, &mut expected);
                assert_eq!(got, expected, "encode_uniform {q:?} on {isa}");
                for h in [None, Some(h)] {
                    let (got, expected) = (
                        kernels.uniform_error(w, h, &q),
                        Scalar.uniform_error(w, h, &q),
                    );
                    assert_eq!(
                        got.to_bits(),
                        expected.to_bits(),
                        "uniform_error {q:?} on {isa}"
                    );
                }
            }
        }
    }
}

#[test]
fn lengths_around_the_lane_count() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        println!("skipped: this machine does not run {isa}");
    }
    for n in [
        0,
        1,
        LANES - 1,
        LANES,
        LANES + 1,
        4 * LANES - 1,
        4 * LANES + 3,
        1000,
    ] {
        let w: Vec<f32> = (0..n)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0)
            .collect();
        let h: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
        check(&w, &h, 0.125);
    }
}

#[test]
fn a_broken_weight_is_seen_in_every_lane() {
    for kernels in Kernels::all() {
        for i in 0..3 * LANES {
            for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut w = vec![1.0; 3 * LANES];
                w[i] = broken;
                assert!(
                    !kernels.moments(&w).finite,
                    "{broken} at {i} on {}",
                    kernels.isa()
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn any_weights(pairs in prop::collection::vec((-4.0f32..4.0, 0.0f32..2.0), 0..300), t in -2.0f32..2.0) {
        let (w, h): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
        check(&w, &h, t);
    }
}
