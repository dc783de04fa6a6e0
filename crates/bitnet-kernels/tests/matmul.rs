//! The products of every instruction set against the definition, computed from the matrix and not
//! from the kernel layout.

use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::random::nth;
use bitnet_core::scheme::Rounding;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ScaleDtype, ZeroPoints, pack};
use bitnet_kernels::matmul::{
    MAX_COLS, MatrixParameters, PANEL, Prepacked, PrepackedActivations, Stream,
};
use bitnet_kernels::{Isa, Kernels, Pool};
use proptest::prelude::*;

/// Random bits that depend on `i` alone.
fn mix(i: usize) -> u64 {
    nth(i as u64, 0)
}

fn byte(i: usize) -> i8 {
    mix(i) as i8
}

/// What weights there are.
#[derive(Debug, Clone, Copy)]
struct Kind {
    precision: Precision,
    planes: usize,
    stream: Stream,
    zero_points: ZeroPoints,
    columns_of_a_step: usize,
}

fn kinds() -> Vec<Kind> {
    use Precision::*;
    let kind = |precision, columns_of_a_step| Kind {
        precision,
        planes: 1,
        stream: Stream::TwoBit,
        zero_points: ZeroPoints::None,
        columns_of_a_step,
    };
    let ternary = kind(Ternary, 16);
    let trits = Kind {
        stream: Stream::Trits,
        columns_of_a_step: 20,
        ..ternary
    };
    let mut all = vec![
        ternary,
        trits,
        Kind {
            planes: 2,
            ..ternary
        },
        Kind { planes: 3, ..trits },
    ];
    for (precision, step, zero_points) in [
        (Binary, 32, ZeroPoints::F32),
        (Int2, 16, ZeroPoints::I8),
        (Int3, 8, ZeroPoints::I8),
        (Int4, 8, ZeroPoints::I8),
        (Int8, 4, ZeroPoints::I8),
    ] {
        all.extend([
            kind(precision, step),
            Kind {
                zero_points,
                ..kind(precision, step)
            },
        ]);
    }
    all
}

/// A value of the alphabet.
fn value(precision: Precision, i: usize) -> i8 {
    let (low, high) = precision.range();
    match precision {
        Precision::Binary => [-1, 1][(mix(i) % 2) as usize],
        _ => {
            (i64::from(low) + (mix(i) % (i64::from(high) - i64::from(low) + 1) as u64) as i64) as i8
        }
    }
}

fn matrix(kind: Kind, rows: usize, cols: usize, granularity: Granularity, seed: usize) -> Matrix {
    let spec = MatrixSpec {
        planes: kind.planes,
        zero_points: kind.zero_points,
        ..MatrixSpec::new(rows, cols, kind.precision, granularity)
    };
    let n = spec.scales_len();
    let zero_points = match kind.zero_points {
        ZeroPoints::None => vec![],
        ZeroPoints::I8 => (0..n)
            .map(|i| f32::from(value(kind.precision, i ^ seed ^ 77)))
            .collect(),
        ZeroPoints::F32 => (0..n).map(|i| (i % 7) as f32 * 0.25 - 0.6).collect(),
    };
    Matrix {
        values: (0..spec.values_len())
            .map(|i| value(kind.precision, i ^ seed))
            .collect(),
        scales: (0..n).map(|i| 0.01 + (i % 13) as f32 * 0.003).collect(),
        zero_points,
        spec,
    }
}

/// `Σ_k (v[p, n, k] − z) · x[m, k]` as it is written, `[planes, M, N]`, in i64; float zero points
/// are left out.
fn sums(w: &Matrix, x: &[i8], tokens: usize) -> Vec<i64> {
    let spec = &w.spec;
    let (n, k) = (spec.rows, spec.cols);
    let of = |plane: usize, token: usize, row: usize| {
        let term = |c: usize| {
            let zero = match spec.zero_points {
                ZeroPoints::I8 => w.zero_points[spec.scale_index(plane, row, c)] as i64,
                _ => 0,
            };
            (i64::from(w.values[(plane * n + row) * k + c]) - zero) * i64::from(x[token * k + c])
        };
        (0..k).map(term).sum()
    };
    (0..spec.planes * tokens * n)
        .map(|i| of(i / n / tokens.max(1), i / n % tokens.max(1), i % n))
        .collect()
}

/// The product in f64 and the sum of its terms' magnitudes, `[M, N]`.
fn product(w: &Matrix, x: &[f64], tokens: usize) -> Vec<(f64, f64)> {
    let (n, k) = (w.spec.rows, w.spec.cols);
    let mut terms = vec![(0.0, 0.0); tokens * n];
    for plane in 0..w.spec.planes {
        for (i, (sum, size)) in terms.iter_mut().enumerate() {
            let (m, row) = (i / n, i % n);
            for c in 0..k {
                let at = w.spec.scale_index(plane, row, c);
                let (v, z) = (
                    f64::from(w.values[(plane * n + row) * k + c]),
                    w.zero_points.get(at).map_or(0.0, |&z| f64::from(z)),
                );
                let (s, x) = (f64::from(w.scales[at]), x[m * k + c]);
                *sum += s * (v - z) * x;
                *size += s.abs() * (v.abs() + z.abs()) * x.abs();
            }
        }
    }
    terms
}

/// Every instruction set and pool against the definition, and against one another bit for bit.
fn check(kind: Kind, w: &Matrix, x: &[i8], tokens: usize, pools: &[Pool]) {
    let rows = w.spec.rows;
    let expected = sums(w, x, tokens);
    let bias: Vec<f32> = (0..rows).map(|n| n as f32 * 0.25 - 3.0).collect();
    let scales: Vec<f32> = (0..tokens).map(|t| 0.5 + t as f32).collect();
    let cols = w.spec.cols;
    let real: Vec<f64> = x
        .iter()
        .enumerate()
        .map(|(i, &x)| f64::from(x) * f64::from(scales[i / cols]))
        .collect();
    let terms = product(w, &real, tokens);
    // Four roundings a group and plane, and two at the end, of at most what the terms add up to.
    let rounding =
        (4 * w.spec.planes * w.spec.granules_per_row() + 2) as f64 * f64::from(f32::EPSILON);
    let mut first: Option<Vec<u32>> = None;
    for pool in pools {
        let packed = Prepacked::with_stream(w, kind.stream, pool).unwrap();
        assert_eq!(packed.unpack(pool), w.values, "{kind:?}");
        let activations = PrepackedActivations::from_values(x, &scales, &packed).unwrap();
        for kernels in Kernels::all() {
            let name = packed.kernel_name(&kernels);
            let what = format!(
                "{name} on {} threads: {tokens} × {rows} × {cols}, {:?}, {kind:?}",
                pool.threads(),
                w.spec.granularity
            );
            let mut got = vec![i32::MIN; w.spec.planes * tokens * rows];
            kernels.matmul_sums(pool, &packed, &activations, &mut got);
            assert!(
                got.iter()
                    .map(|&s| i64::from(s))
                    .eq(expected.iter().copied()),
                "{what}"
            );
            let mut y = vec![f32::NAN; tokens * rows];
            kernels.matmul(pool, &packed, &activations, None, &mut y);
            for (i, (&y, (sum, size))) in y.iter().zip(&terms).enumerate() {
                assert!(
                    (f64::from(y) - sum).abs() <= size * rounding,
                    "{what}: y[{i}] = {y}, expected {sum}"
                );
            }
            let mut biased = vec![f32::NAN; y.len()];
            kernels.matmul(pool, &packed, &activations, Some(&bias), &mut biased);
            assert!(
                biased
                    .iter()
                    .zip(&y)
                    .enumerate()
                    .all(|(i, (&b, &y))| b.to_bits() == (y + bias[i % rows]).to_bits()),
                "{what}: bias"
            );
            let bits: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
            assert_eq!(
                first.get_or_insert_with(|| bits.clone()),
                &bits,
                "{what}: other bits than the first"
            );
        }
    }
}

/// Whether `scripts/cross-test` emulates this machine: sizes and numbers of cases are then small.
fn emulated() -> bool {
    std::env::var_os("BITNET_EMULATED").is_some()
}

/// WebAssembly has one thread.
fn pool(threads: usize) -> Pool {
    Pool::new(if cfg!(target_family = "wasm") {
        1
    } else {
        threads
    })
    .unwrap()
}

fn pools() -> Vec<Pool> {
    let most = if cfg!(target_family = "wasm") { 1 } else { 3 };
    (1..=most).map(pool).collect()
}

fn bytes(n: usize) -> Vec<i8> {
    (0..n).map(byte).collect()
}

#[test]
fn shapes_around_every_tile() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        println!("skipped: this machine does not run {isa}");
    }
    let pools = [pool(2)];
    for kind in kinds() {
        let step = kind.columns_of_a_step;
        for rows in [1, PANEL - 1, PANEL + 1] {
            for cols in [1, step - 1, step, 17 * step + 1] {
                for tokens in [1, 2, 3, 4, 6, 7, 13]
                    .into_iter()
                    .filter(|t| !emulated() || [1, 4, 13].contains(t))
                {
                    check(
                        kind,
                        &matrix(kind, rows, cols, Granularity::Channel, 0),
                        &bytes(tokens * cols),
                        tokens,
                        &pools,
                    );
                }
            }
        }
    }
}

#[test]
fn shapes_around_every_block() {
    let pools = pools();
    // Blocks of unpacked steps, of tokens, and parts for threads.
    let shapes = [
        (PANEL + 1, 515, 14),
        (3, 1023, 192 + 7),
        (20 * PANEL + 5, 528, 15),
        (40 * PANEL, 1024, 1),
    ];
    for (rows, cols, tokens) in shapes.into_iter().take(if emulated() { 1 } else { 4 }) {
        for kind in kinds()
            .into_iter()
            .take(if rows * tokens > 10_000 { 2 } else { 99 })
        {
            for granularity in [
                Granularity::Tensor,
                Granularity::Group(130),
                Granularity::Group(600),
            ] {
                check(
                    kind,
                    &matrix(kind, rows, cols, granularity, 1),
                    &bytes(tokens * cols),
                    tokens,
                    &pools,
                );
            }
        }
    }
}

#[test]
fn nothing_times_anything_is_nothing() {
    let pools = pools();
    for kind in kinds() {
        check(
            kind,
            &matrix(kind, 0, 16, Granularity::Tensor, 0),
            &[1; 32],
            2,
            &pools,
        );
        check(
            kind,
            &matrix(kind, 5, 16, Granularity::Tensor, 0),
            &[],
            0,
            &pools,
        );
    }
}

/// All weights at one end of the alphabet, all zero points at the other, all activations at an end
/// of int8.
#[test]
fn the_worst_input_does_not_overflow() {
    let pool = pool(2);
    for kind in kinds() {
        let (low, high) = kind.precision.range();
        let span = i64::from(if kind.zero_points == ZeroPoints::I8 {
            2
        } else {
            1
        }) * i64::from(low).abs();
        // The ternary sums of 2^20 columns, and every other in a time that a test may take.
        let cols = (if emulated() {
            1 << 12
        } else if kind.planes == 1 && kind.precision == Precision::Ternary {
            1 << 20
        } else {
            1 << 17
        })
        .min((i64::from(i32::MAX) / 128 / span) as usize);
        for (value, zero) in [(low, high), (high, low)] {
            let mut w = matrix(kind, 2, cols, Granularity::Tensor, 0);
            w.values.fill(value);
            if kind.zero_points == ZeroPoints::I8 {
                w.zero_points.fill(f32::from(zero));
            }
            let packed = Prepacked::with_stream(&w, kind.stream, &pool).unwrap();
            let each = i64::from(value)
                - if kind.zero_points == ZeroPoints::I8 {
                    i64::from(zero)
                } else {
                    0
                };
            for x in [-128, 127] {
                for tokens in [1, 2, 13] {
                    let activations = PrepackedActivations::from_values(
                        &vec![x; tokens * cols],
                        &vec![1.0; tokens],
                        &packed,
                    )
                    .unwrap();
                    for kernels in Kernels::all() {
                        let mut got = vec![0; kind.planes * 2 * tokens];
                        kernels.matmul_sums(&pool, &packed, &activations, &mut got);
                        let expected = each * i64::from(x) * cols as i64;
                        let what = packed.kernel_name(&kernels);
                        assert!(
                            got.iter().all(|&s| i64::from(s) == expected),
                            "{what}: {value} times {x}, {tokens} tokens: {got:?}, {expected}"
                        );
                    }
                }
            }
        }
        // One column more than the sums hold is refused before it is looked at.
        let most = (i32::MAX as usize / 128 / span as usize).min(MAX_COLS);
        for (cols, good) in [(most, true), (most + 1, false)] {
            assert_eq!(
                Prepacked::with_stream(
                    &matrix(kind, 0, cols, Granularity::Tensor, 0),
                    kind.stream,
                    &pool
                )
                .is_ok(),
                good,
                "{kind:?}"
            );
        }
    }
}

#[test]
fn float_activations_are_not_rounded() {
    let pools = pools();
    let shapes = [
        (1, 1, 1),
        (63, 15, 2),
        (65, 17, 3),
        (65, 40, 9),
        (130, 640, 9),
        (640, 1030, 1),
    ];
    for (rows, cols, tokens) in shapes.into_iter().take(if emulated() { 4 } else { 6 }) {
        for kind in kinds()
            .into_iter()
            .filter(|k| k.precision == Precision::Ternary && k.stream == Stream::TwoBit)
        {
            for granularity in [
                Granularity::Tensor,
                Granularity::Channel,
                Granularity::Group(24),
            ] {
                let w = matrix(kind, rows, cols, granularity, 5);
                let x: Vec<f32> = (0..tokens * cols)
                    .map(|i| f32::from(byte(i)) * 0.37 + 1e-3)
                    .collect();
                let terms = product(
                    &w,
                    &x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
                    tokens,
                );
                // A rounding for each pair and for each addition to a half of the sum, and four for
                // each group and plane.
                let roundings = cols / 2 + 4 * kind.planes * w.spec.granules_per_row() + 8;
                let mut first: Option<Vec<u32>> = None;
                for pool in &pools {
                    let packed = Prepacked::new(&w, pool).unwrap();
                    let activations = PrepackedActivations::floats(&x, &packed).unwrap();
                    for kernels in Kernels::all() {
                        let mut y = vec![f32::NAN; tokens * rows];
                        kernels.matmul(pool, &packed, &activations, None, &mut y);
                        for (i, (&y, (sum, size))) in y.iter().zip(&terms).enumerate() {
                            let bound = size * roundings as f64 * f64::from(f32::EPSILON) / 2.0;
                            assert!(
                                (f64::from(y) - sum).abs() <= bound,
                                "{} y[{i}] = {y}, expected {sum} ± {bound:e}",
                                kernels.isa()
                            );
                        }
                        let bits: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                        assert_eq!(
                            first.get_or_insert_with(|| bits.clone()),
                            &bits,
                            "{}: other bits than the first",
                            kernels.isa()
                        );
                        let mut biased = vec![f32::NAN; y.len()];
                        kernels.matmul(
                            pool,
                            &packed,
                            &activations,
                            Some(&vec![1.5; rows]),
                            &mut biased,
                        );
                        assert!(biased.iter().zip(&y).all(|(b, y)| *b == y + 1.5));
                    }
                }
            }
        }
    }
    let kind = Kind {
        stream: Stream::Trits,
        ..kinds()[0]
    };
    let trits = Prepacked::with_stream(
        &matrix(kind, 4, 20, Granularity::Tensor, 0),
        kind.stream,
        &pools[0],
    )
    .unwrap();
    let error = PrepackedActivations::floats(&[1.0; 20], &trits)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("two-bit stream") && error.contains("w1.6"),
        "{error}"
    );
}

/// Every wire layout that holds a matrix leads to the same products as the matrix itself.
#[test]
fn wire_layouts_prepack_to_the_same() {
    let pool = pool(2);
    let kernels = Kernels::detect();
    let mut tried = std::collections::BTreeSet::new();
    for kind in kinds() {
        for (rows, cols) in [(256, 512), (512, 256), (100, 256), (64, 129), (3, 5)] {
            let groups = [32, 64, 128, 256].map(Granularity::Group);
            for granularity in [Granularity::Tensor, Granularity::Channel]
                .into_iter()
                .chain(groups)
            {
                let mut w = matrix(kind, rows, cols, granularity, 3);
                w.spec.scale_dtype = if matches!(granularity, Granularity::Group(_)) {
                    ScaleDtype::F16
                } else {
                    ScaleDtype::F32
                };
                // Powers of two are exact in every scale type.
                w.scales
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, s)| *s = [0.25, 0.5, 2.0][i % 3]);
                for layout in pack::layouts().iter().filter(|l| l.check(&w.spec).is_ok()) {
                    let mut packed = vec![];
                    if layout
                        .pack_into(&w.spec, &w.values, &w.scales, &mut packed)
                        .is_err()
                    {
                        continue;
                    }
                    tried.insert(layout.name());
                    let scales = if layout.stores_scales() {
                        &[][..]
                    } else {
                        &w.scales
                    };
                    let parts = MatrixParameters {
                        spec: &w.spec,
                        scales,
                        zero_points: &w.zero_points,
                    };
                    let [wire, direct] = [
                        Prepacked::from_wire(&kernels, &pool, *layout, parts, &packed, kind.stream)
                            .unwrap_or_else(|e| panic!("{}: {e}", layout.name())),
                        Prepacked::with_stream(&w, kind.stream, &pool).unwrap(),
                    ]
                    .map(|w| {
                        let x =
                            PrepackedActivations::from_values(&bytes(cols), &[0.5], &w).unwrap();
                        let mut y = vec![f32::NAN; rows];
                        kernels.matmul(&pool, &w, &x, None, &mut y);
                        y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                    });
                    assert_eq!(
                        wire,
                        direct,
                        "{} {rows} × {cols} {granularity} {kind:?}",
                        layout.name()
                    );
                    packed.pop();
                    assert!(
                        Prepacked::from_wire(&kernels, &pool, *layout, parts, &packed, kind.stream)
                            .is_err(),
                        "{}: a byte too few",
                        layout.name()
                    );
                }
            }
        }
    }
    let all: std::collections::BTreeSet<_> = pack::layouts().iter().map(|l| l.name()).collect();
    assert_eq!(tried, all, "layouts that no matrix above fits");
}

#[test]
fn values_outside_the_alphabet_are_refused() {
    let pool = Pool::single();
    for kind in kinds() {
        let good = matrix(kind, 70, 32, Granularity::Channel, 0);
        let mut short = good.clone();
        short.values.pop();
        assert!(Prepacked::new(&short, &pool).is_err());
        for value in (-128..=127).filter(|&v| !kind.precision.contains(v)) {
            let mut broken = good.clone();
            broken.values[65 * 32 + 5] = value;
            let error = Prepacked::with_stream(&broken, kind.stream, &pool).unwrap_err();
            assert!(
                matches!(error, bitnet_kernels::Error::Matrix(bitnet_core::Error::Value { index: 2085, got, .. }) if got == i32::from(value)),
                "{error}"
            );
        }
    }
    let mut odd = matrix(kinds().pop().unwrap(), 4, 8, Granularity::Channel, 0);
    odd.zero_points[2] = 0.5;
    assert!(
        Prepacked::new(&odd, &pool)
            .unwrap_err()
            .to_string()
            .contains("zero point 0.5")
    );
}

#[test]
#[cfg_attr(panic = "abort", ignore = "a panic ends the program")]
fn operands_that_do_not_fit_are_refused() {
    let pool = Pool::single();
    let packed =
        |granularity| Prepacked::new(&matrix(kinds()[0], 4, 32, granularity, 0), &pool).unwrap();
    let (whole, grouped) = (packed(Granularity::Channel), packed(Granularity::Group(8)));
    assert!(PrepackedActivations::from_values(&[1; 31], &[1.0], &whole).is_err());
    let mut x = [0.5; 96];
    (x[70], x[90]) = (f32::NAN, f32::INFINITY);
    for kernels in Kernels::all() {
        let error = PrepackedActivations::quantize(&kernels, &x, &whole).unwrap_err();
        assert!(
            matches!(
                error,
                bitnet_kernels::Error::Matrix(bitnet_core::Error::NotFinite { index: 70, .. })
            ),
            "{error}"
        );
    }
    assert!(PrepackedActivations::floats(&[1.0; 33], &whole).is_err());
    let panics = |f: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
    let (good, other) = ([&whole, &grouped])
        .map(|w| PrepackedActivations::from_values(&[1; 32], &[1.0], w).unwrap())
        .into();
    for kernels in Kernels::all() {
        assert!(
            panics(&|| kernels.matmul_sums(&pool, &whole, &other, &mut [0; 4])),
            "prepacked for groups of 8"
        );
        assert!(
            panics(&|| kernels.matmul_sums(&pool, &whole, &good, &mut [0; 3])),
            "sums too short"
        );
        assert!(
            panics(&|| kernels.matmul(&pool, &whole, &good, None, &mut [0.0; 5])),
            "product too long"
        );
        assert!(
            panics(&|| kernels.matmul(&pool, &whole, &good, Some(&[0.0; 3]), &mut [0.0; 4])),
            "bias too short"
        );
    }
}

#[test]
fn activations_are_prepacked_again_in_the_same_memory() {
    let pool = Pool::single();
    let w = Prepacked::new(
        &matrix(kinds()[0], 70, 100, Granularity::Group(24), 0),
        &pool,
    )
    .unwrap();
    let rows = |n: usize| {
        (0..n * 100)
            .map(|i| f32::from(byte(i)) * 0.1)
            .collect::<Vec<_>>()
    };
    let kernels = Kernels::detect();
    let mut again = PrepackedActivations::quantize(&kernels, &rows(5), &w).unwrap();
    for tokens in [1, 5, 2] {
        again.requantize(&kernels, &rows(tokens)).unwrap();
        let fresh = PrepackedActivations::quantize(&kernels, &rows(tokens), &w).unwrap();
        let [a, b] = [&again, &fresh].map(|x| {
            let mut y = vec![0.0; tokens * 70];
            kernels.matmul(&pool, &w, x, None, &mut y);
            y
        });
        assert_eq!(a, b);
        assert!(again.requantize(&kernels, &[f32::INFINITY; 100]).is_err());
        assert_eq!(again.rows(), tokens);
    }
}

#[test]
fn activations_are_quantized_as_core_does_it() {
    let pool = Pool::single();
    let (tokens, how) = (3, (ActivationGranularity::Token, Rounding::HalfEven));
    for (cols, granularity) in [
        (100, Granularity::Group(24)),
        (1291, Granularity::Channel),
        (2560, Granularity::Group(128)),
    ] {
        let [w, other] = [0, 1].map(|seed| {
            Prepacked::new(
                &matrix(kinds()[seed], 70, cols + seed, granularity, 0),
                &pool,
            )
            .unwrap()
        });
        // Exponents from 2^-20 to 2^3 and halves of a step, whose rounding is the point; the last
        // token is smaller than the least scale.
        let mut x: Vec<f32> = (0..tokens * cols)
            .map(|i| f32::from(byte(i)) * 0.5 * ((i % 24) as f32 - 20.0).exp2())
            .collect();
        x[..cols]
            .iter_mut()
            .for_each(|x| *x = (*x * 2.0).round() / 2.0);
        x[7] = 127.0;
        x[2 * cols..].iter_mut().for_each(|x| *x *= 1e-9);
        for method in [
            ActivationMethod::Int8,
            ActivationMethod::Int4,
            ActivationMethod::Sign,
        ] {
            let core = activation::quantize(&x, cols, method, how.0, how.1).unwrap();
            let expected =
                PrepackedActivations::from_values(&core.values, &core.scales, &w).unwrap();
            for kernels in Kernels::all() {
                // Begin with another shape, so that its padding would show.
                let mut got =
                    PrepackedActivations::quantize(&kernels, &vec![1.0; 2 * (cols + 1)], &other)
                        .unwrap();
                for _ in 0..3 {
                    got.requantize_for(&kernels, &w, &x, method).unwrap();
                    let [(sums, y), (expected_sums, expected_y)] = [&got, &expected].map(|x| {
                        let (mut sums, mut y) = (vec![0; tokens * 70], vec![0.0; tokens * 70]);
                        kernels.matmul_sums(&pool, &w, x, &mut sums);
                        kernels.matmul(&pool, &w, x, None, &mut y);
                        (sums, y.into_iter().map(f32::to_bits).collect::<Vec<_>>())
                    });
                    assert_eq!(
                        sums,
                        expected_sums,
                        "{method} of {cols} columns on {}",
                        kernels.isa()
                    );
                    assert_eq!(
                        y,
                        expected_y,
                        "{method} of {cols} columns on {}",
                        kernels.isa()
                    );
                }
            }
        }
    }
}

#[test]
fn the_stream_is_measured_once() {
    if emulated() {
        return println!(
            "skipped: this machine's time is not its own, and it takes half a minute of it"
        );
    }
    let (kernels, pool) = (Kernels::detect(), Pool::single());
    let first = Stream::auto(&kernels, &pool);
    let begin = std::time::Instant::now();
    assert!((0..100).all(|_| Stream::auto(&kernels, &pool) == first));
    // A hundred measurements would read 10 GB.
    assert!(begin.elapsed() < std::time::Duration::from_millis(100));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if emulated() { 1 } else { 24 }))]
    #[test]
    fn any_shape_and_group(rows in 1usize..150, cols in 1usize..200, group in 1usize..80, tokens in 1usize..9, seed in any::<usize>()) {
        let pools = [pool(2)];
        for kind in kinds() {
            for granularity in [Granularity::Tensor, Granularity::Channel, Granularity::Group(group)] {
                let w = matrix(kind, rows, cols, granularity, seed);
                check(kind, &w, &(0..tokens * cols).map(|i| byte(i ^ seed)).collect::<Vec<_>>(), tokens, &pools);
            }
        }
    }
}
