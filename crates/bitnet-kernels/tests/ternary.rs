//! The ternary products of every instruction set against the definition.

use bitnet_core::scheme::Threshold;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ZeroPoints};
use bitnet_kernels::Kernels;
use bitnet_kernels::ternary::{Activations, Prepacked};
use proptest::prelude::*;

fn matrix(rows: usize, cols: usize, granularity: Granularity, mut value: impl FnMut(usize) -> i8) -> Matrix {
    let spec = MatrixSpec::new(rows, cols, Precision::Ternary, granularity);
    let scales = (0..spec.scales_len()).map(|i| 0.01 + (i % 13) as f32 * 0.003).collect();
    assert_eq!(spec.zero_points, ZeroPoints::None);
    Matrix { values: (0..rows * cols).map(&mut value).collect(), scales, zero_points: vec![], spec }
}

/// `Σ_k q[n, k] · x[m, k]` as it is written, in i64.
fn sums(w: &Matrix, x: &[i8]) -> Vec<i64> {
    let (n, k) = (w.spec.rows, w.spec.cols);
    let tokens = if k == 0 { 1 } else { x.len() / k };
    (0..tokens * n).map(|i| (0..k).map(|c| i64::from(w.values[i % n * k + c]) * i64::from(x[i / n * k + c])).sum()).collect()
}

fn check(w: &Matrix, x: &[i8], tokens: usize) {
    let prepacked = Prepacked::new(w).unwrap();
    let scales: Vec<f32> = (0..tokens).map(|t| 0.5 + t as f32).collect();
    let activations = Activations::from_values(x, &scales, &prepacked).unwrap();
    let expected = sums(w, x);
    let dequantized = w.dequantize();
    for kernels in Kernels::all() {
        let isa = kernels.isa();
        let mut got = vec![i32::MIN; tokens * w.spec.rows];
        kernels.ternary_sums(&prepacked, &activations, &mut got);
        assert!(got.iter().map(|&s| i64::from(s)).eq(expected.iter().copied()), "{isa}: {tokens} × {} × {}", w.spec.rows, w.spec.cols);
        let mut y = vec![f32::NAN; got.len()];
        let bias: Vec<f32> = (0..w.spec.rows).map(|n| n as f32 * 0.25).collect();
        kernels.ternary_matmul(&prepacked, &activations, Some(&bias), &mut y);
        for (i, &y) in y.iter().enumerate() {
            let (m, n, k) = (i / w.spec.rows, i % w.spec.rows, w.spec.cols);
            let terms = (0..k).map(|c| f64::from(dequantized[n * k + c]) * f64::from(x[m * k + c]) * f64::from(scales[m]));
            let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t: f64| (s + t, a + t.abs()));
            // Each group is rounded twice and added once: a few units in the last place of what is added.
            let bound = (size + f64::from(bias[n])) * 1e-5 + 1e-6;
            assert!(
                (f64::from(y) - sum - f64::from(bias[n])).abs() <= bound,
                "{isa}: y[{m}, {n}] = {y}, expected {}",
                sum + f64::from(bias[n])
            );
        }
    }
}

fn mixed(i: usize) -> i8 {
    (i.wrapping_mul(2654435761) >> 7) as i8 % 2 - (i % 3 == 0) as i8
        + (i % 5 == 1 && i % 3 != 0 && (i.wrapping_mul(2654435761) >> 7) as i8 % 2 == 0) as i8
}

fn trit(i: usize) -> i8 {
    mixed(i).clamp(-1, 1)
}

fn byte(i: usize) -> i8 {
    (i.wrapping_mul(1664525).wrapping_add(1013904223) >> 8) as i8
}

#[test]
fn shapes_around_every_tile() {
    for rows in [1, 31, 32, 33, 65] {
        for cols in [1, 3, 15, 16, 17, 64, 255, 341] {
            for tokens in [1, 2, 5, 6, 7, 13] {
                let w = matrix(rows, cols, Granularity::Channel, trit);
                check(&w, &(0..tokens * cols).map(byte).collect::<Vec<_>>(), tokens);
            }
        }
    }
}

#[test]
fn nothing_times_anything_is_nothing() {
    check(&matrix(0, 16, Granularity::Tensor, trit), &[1; 32], 2);
    check(&matrix(5, 16, Granularity::Tensor, trit), &[], 0);
}

#[test]
fn the_worst_input_does_not_overflow() {
    for (value, x) in [(1, -128), (1, 127), (-1, -128), (-1, 127)] {
        let cols = 1 << 20;
        let w = matrix(2, cols, Granularity::Tensor, |_| value);
        let prepacked = Prepacked::new(&w).unwrap();
        let activations = Activations::from_values(&vec![x; 2 * cols], &[1.0, 1.0], &prepacked).unwrap();
        for kernels in Kernels::all() {
            let mut got = [0; 4];
            kernels.ternary_sums(&prepacked, &activations, &mut got);
            assert_eq!(got, [i32::from(value) * i32::from(x) * cols as i32; 4], "{}", kernels.isa());
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let (a, b) = (matrix(4, 32, Granularity::Channel, trit), matrix(4, 32, Granularity::Group(8), trit));
    let (a, b) = (Prepacked::new(&a).unwrap(), Prepacked::new(&b).unwrap());
    let x = Activations::from_values(&[1; 32], &[1.0], &b).unwrap();
    let refused = std::panic::catch_unwind(|| Kernels::detect().ternary_sums(&a, &x, &mut [0; 4]));
    assert!(refused.is_err(), "laid out for groups of 8, met with one group");
    assert!(Activations::from_values(&[1; 31], &[1.0], &a).is_err());
    let int4 = Matrix {
        spec: MatrixSpec { precision: Precision::Int4, ..matrix(4, 32, Granularity::Channel, trit).spec },
        ..matrix(4, 32, Granularity::Channel, trit)
    };
    assert!(Prepacked::new(&int4).is_err());
    let _ = Threshold::Absmean;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape_and_group(rows in 1usize..70, cols in 1usize..200, group in 1usize..80, tokens in 1usize..9, seed in any::<usize>()) {
        for granularity in [Granularity::Tensor, Granularity::Channel, Granularity::Group(group)] {
            let w = matrix(rows, cols, granularity, |i| trit(i ^ seed));
            check(&w, &(0..tokens * cols).map(|i| byte(i ^ seed)).collect::<Vec<_>>(), tokens);
        }
    }
}
