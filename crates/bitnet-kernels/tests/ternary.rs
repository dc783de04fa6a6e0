//! The ternary products of every instruction set against the definition, computed from the matrix and not from the kernel layout.

use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_kernels::ternary::{Activations, PANEL, Prepacked, STEP};
use bitnet_kernels::{Isa, Kernels, Pool};
use proptest::prelude::*;

fn matrix(rows: usize, cols: usize, granularity: Granularity, value: impl FnMut(usize) -> i8) -> Matrix {
    let spec = MatrixSpec::new(rows, cols, Precision::Ternary, granularity);
    let scales = (0..spec.scales_len()).map(|i| 0.01 + (i % 13) as f32 * 0.003).collect();
    Matrix { values: (0..rows * cols).map(value).collect(), scales, zero_points: vec![], spec }
}

/// Thoroughly mixed bits of `i` (the finaliser of splitmix64).
fn mix(i: usize) -> u64 {
    let i = (i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let i = (i ^ (i >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let i = (i ^ (i >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    i ^ (i >> 31)
}

fn trit(i: usize) -> i8 {
    (mix(i) % 3) as i8 - 1
}

fn byte(i: usize) -> i8 {
    mix(i) as i8
}

/// `Σ_k q[n, k] · x[m, k]` as it is written, in i64.
fn sums(w: &Matrix, x: &[i8], tokens: usize) -> Vec<i64> {
    let (n, k) = (w.spec.rows, w.spec.cols);
    (0..tokens * n).map(|i| (0..k).map(|c| i64::from(w.values[i % n * k + c]) * i64::from(x[i / n * k + c])).sum()).collect()
}

fn check(w: &Matrix, x: &[i8], tokens: usize, pools: &[Pool]) {
    let (rows, cols) = (w.spec.rows, w.spec.cols);
    let expected = sums(w, x, tokens);
    let dequantized = w.dequantize();
    let bias: Vec<f32> = (0..rows).map(|n| n as f32 * 0.25 - 3.0).collect();
    let scales: Vec<f32> = (0..tokens).map(|t| 0.5 + t as f32).collect();
    let mut first: Option<Vec<u32>> = None;
    for pool in pools {
        let packed = Prepacked::new(w, pool).unwrap();
        let activations = Activations::from_values(x, &scales, &packed).unwrap();
        for kernels in Kernels::all() {
            let what = format!("{} on {} threads: {tokens} × {rows} × {cols}, {:?}", kernels.isa(), pool.threads(), w.spec.granularity);
            let mut got = vec![i32::MIN; tokens * rows];
            kernels.ternary_sums(pool, &packed, &activations, &mut got);
            assert!(got.iter().map(|&s| i64::from(s)).eq(expected.iter().copied()), "{what}");
            let mut y = vec![f32::NAN; got.len()];
            kernels.ternary_matmul(pool, &packed, &activations, None, &mut y);
            for (i, &y) in y.iter().enumerate() {
                let (m, n) = (i / rows, i % rows);
                let terms = (0..cols).map(|c| f64::from(dequantized[n * cols + c]) * f64::from(x[m * cols + c]) * f64::from(scales[m]));
                let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t: f64| (s + t, a + t.abs()));
                // Two roundings a group, one a sum and one at the end, of at most what the terms add up to.
                let bound = size * (w.spec.granules_per_row() + 3) as f64 * f64::from(f32::EPSILON);
                assert!((f64::from(y) - sum).abs() <= bound, "{what}: y[{m}, {n}] = {y}, expected {sum}");
            }
            let mut biased = vec![f32::NAN; got.len()];
            kernels.ternary_matmul(pool, &packed, &activations, Some(&bias), &mut biased);
            assert!(biased.iter().zip(&y).enumerate().all(|(i, (&b, &y))| b.to_bits() == (y + bias[i % rows]).to_bits()), "{what}: bias");
            let bits: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
            assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits, "{what}: other bits than the first");
        }
    }
}

/// WebAssembly has one thread.
fn pool(threads: usize) -> Pool {
    Pool::new(if cfg!(target_family = "wasm") { 1 } else { threads }).unwrap()
}

fn pools() -> Vec<Pool> {
    (1..=if cfg!(target_family = "wasm") { 1 } else { 3 }).map(pool).collect()
}

#[test]
fn shapes_around_every_tile() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        println!("skipped: this machine does not run {isa}");
    }
    let pools = pools();
    for rows in [1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 3] {
        for cols in [1, 3, STEP - 1, STEP, STEP + 1, 16 * STEP - 1, 16 * STEP + 1] {
            for tokens in [1, 2, 3, 4, 5, 6, 7, 12, 13] {
                let w = matrix(rows, cols, Granularity::Channel, trit);
                check(&w, &(0..tokens * cols).map(byte).collect::<Vec<_>>(), tokens, &pools);
            }
        }
    }
}

#[test]
fn shapes_around_every_block() {
    let pools = pools();
    // Blocks of unpacked steps, of tokens, and parts for threads.
    for (rows, cols, tokens) in
        [(PANEL + 1, 32 * STEP + 1, 14), (3, 64 * STEP - 1, 192 + 7), (20 * PANEL + 5, 33 * STEP, 15), (40 * PANEL, 1024, 1)]
    {
        for granularity in [Granularity::Tensor, Granularity::Group(130), Granularity::Group(600)] {
            check(&matrix(rows, cols, granularity, trit), &(0..tokens * cols).map(byte).collect::<Vec<_>>(), tokens, &pools);
        }
    }
}

#[test]
fn nothing_times_anything_is_nothing() {
    let pools = pools();
    check(&matrix(0, 16, Granularity::Tensor, trit), &[1; 32], 2, &pools);
    check(&matrix(5, 16, Granularity::Tensor, trit), &[], 0, &pools);
}

#[test]
fn the_worst_input_does_not_overflow() {
    let (cols, pool) = (1 << 20, pool(2));
    for value in [1, -1] {
        let w = matrix(2, cols, Granularity::Tensor, |_| value);
        let packed = Prepacked::new(&w, &pool).unwrap();
        for x in [-128, 127] {
            for tokens in [1, 2, 4, 13] {
                let activations = Activations::from_values(&vec![x; tokens * cols], &vec![1.0; tokens], &packed).unwrap();
                for kernels in Kernels::all() {
                    let mut got = vec![0; 2 * tokens];
                    kernels.ternary_sums(&pool, &packed, &activations, &mut got);
                    let expected = i32::from(value) * i32::from(x) * cols as i32;
                    assert!(got.iter().all(|&s| s == expected), "{}: {value} times {x}, {tokens} tokens: {got:?}", kernels.isa());
                }
            }
        }
    }
}

#[test]
fn matrices_that_are_not_ternary_are_refused() {
    let pool = Pool::single();
    let good = matrix(70, 32, Granularity::Channel, trit);
    let mut int4 = good.clone();
    int4.spec.precision = Precision::Int4;
    assert!(Prepacked::new(&int4, &pool).is_err());
    let mut short = good.clone();
    short.values.pop();
    assert!(Prepacked::new(&short, &pool).is_err());
    for value in [2, -2, 127, -128] {
        let mut broken = good.clone();
        broken.values[65 * 32 + 5] = value;
        let error = Prepacked::new(&broken, &pool).unwrap_err().to_string();
        assert!(error.contains(&format!("value {value} at {}", 65 * 32 + 5)), "{error}");
    }
    assert!(Prepacked::new(&matrix(0, bitnet_kernels::ternary::MAX_COLS + 1, Granularity::Tensor, trit), &pool).is_err());
}

#[test]
#[cfg_attr(panic = "abort", ignore = "a panic ends the program")]
fn operands_that_do_not_fit_are_refused() {
    let pool = Pool::single();
    let packed = |granularity| Prepacked::new(&matrix(4, 32, granularity, trit), &pool).unwrap();
    let (whole, grouped) = (packed(Granularity::Channel), packed(Granularity::Group(8)));
    assert!(Activations::from_values(&[1; 31], &[1.0], &whole).is_err());
    assert!(Activations::quantize(&[f32::NAN; 32], &whole).is_err());
    let panics = |f: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
    let (good, other) = ([&whole, &grouped]).map(|w| Activations::from_values(&[1; 32], &[1.0], w).unwrap()).into();
    for kernels in Kernels::all() {
        assert!(panics(&|| kernels.ternary_sums(&pool, &whole, &other, &mut [0; 4])), "laid out for groups of 8");
        assert!(panics(&|| kernels.ternary_sums(&pool, &whole, &good, &mut [0; 3])), "sums too short");
        assert!(panics(&|| kernels.ternary_matmul(&pool, &whole, &good, None, &mut [0.0; 5])), "product too long");
        assert!(panics(&|| kernels.ternary_matmul(&pool, &whole, &good, Some(&[0.0; 3]), &mut [0.0; 4])), "bias too short");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape_and_group(rows in 1usize..150, cols in 1usize..200, group in 1usize..80, tokens in 1usize..9, seed in any::<usize>()) {
        let pools = [pool(2)];
        for granularity in [Granularity::Tensor, Granularity::Channel, Granularity::Group(group)] {
            let w = matrix(rows, cols, granularity, |i| trit(i ^ seed));
            check(&w, &(0..tokens * cols).map(|i| byte(i ^ seed)).collect::<Vec<_>>(), tokens, &pools);
        }
    }
}
