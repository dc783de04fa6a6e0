//! Optimizer steps on every instruction set: the bits of the plain loops, which follow the
//! equations in f64.

use bitnet_core::random::Random;
use bitnet_kernels::update::{Adam, Decay, Sgd};
use bitnet_kernels::{Isa, Kernels};

const LENGTHS: [usize; 9] = [0, 1, 7, 15, 16, 17, 33, 255, 1025];

/// Numbers of several magnitudes.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut next = || random.uniform() as f32;
    (0..n)
        .map(|_| (next() - 0.5) * 10f32.powf(next() * 6.0 - 4.0))
        .collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_plain_loops() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        println!("skipped: this machine does not run {isa}");
    }
    let scalar = Kernels::new(Isa::Scalar).unwrap();
    let decay = Decay {
        scale: 0.75,
        coupled: 0.01,
        decay: 0.999,
    };
    let sgd = Sgd {
        decay,
        rate: 0.1,
        momentum: 0.9,
        nesterov: true,
    };
    let adam = Adam {
        decay,
        rate: 0.01,
        root: 1.7,
        new1: 0.1,
        beta2: 0.999,
        new2: 0.001,
        eps: 1e-8,
    };
    for n in LENGTHS {
        let (w, g, m, v) = (
            numbers(1, n),
            numbers(2, n),
            numbers(3, n),
            numbers(4, n).iter().map(|x| x.abs()).collect::<Vec<_>>(),
        );
        let run = |kernels: Kernels| {
            let (mut a, mut b, mut c) = (w.clone(), w.clone(), w.clone());
            let (mut velocity, mut first, mut second) = (m.clone(), m.clone(), v.clone());
            kernels.sgd(&mut a, &g, &mut velocity, &sgd);
            kernels.sgd(&mut b, &g, &mut [], &sgd);
            kernels.adam(&mut c, &g, &mut first, &mut second, &adam);
            (
                [a, b, c, velocity, first, second].map(|x| bits(&x)),
                kernels.sum_squares(&g).to_bits(),
            )
        };
        let expected = run(scalar);
        for kernels in Kernels::all() {
            assert!(run(kernels) == expected, "{} of {n}", kernels.isa());
        }
    }
}

/// The equations, in f64. A result is a handful of operations on numbers no greater than the terms,
/// each rounded once.
#[test]
fn plain_loops_follow_the_equations() {
    let n = 1025;
    let (w, g, m, v) = (
        numbers(5, n),
        numbers(6, n),
        numbers(7, n),
        numbers(8, n).iter().map(|x| x.abs()).collect::<Vec<_>>(),
    );
    let (scale, coupled, decay, rate, root, beta2, eps) = (
        0.5f32, 0.125f32, 0.75f32, 0.25f32, 1.5f32, 0.875f32, 0.001f32,
    );
    let terms = Decay {
        scale,
        coupled,
        decay,
    };
    let kernels = Kernels::detect();
    let (mut a, mut first, mut second) = (w.clone(), m.clone(), v.clone());
    kernels.adam(
        &mut a,
        &g,
        &mut first,
        &mut second,
        &Adam {
            decay: terms,
            rate,
            root,
            new1: 0.25,
            beta2,
            new2: 0.125,
            eps,
        },
    );
    let (mut b, mut velocity) = (w.clone(), m.clone());
    kernels.sgd(
        &mut b,
        &g,
        &mut velocity,
        &Sgd {
            decay: terms,
            rate,
            momentum: 0.5,
            nesterov: false,
        },
    );
    let mut squares = 0.0;
    for i in 0..n {
        let [w, g, m, v] = [w[i], g[i], m[i], v[i]].map(f64::from);
        squares += g * g;
        let d = 0.5 * g + 0.125 * w;
        let near = |what: &str, got: f32, expected: f64, size: f64| {
            assert!(
                (f64::from(got) - expected).abs() <= 8.0 * f64::from(f32::EPSILON) * size,
                "{what}[{i}]: {got} {expected}"
            );
        };
        let size = (0.5 * g).abs() + (0.125 * w).abs();
        let (m1, v1) = (m + 0.25 * (d - m), 0.875 * v + 0.125 * d * d);
        near("m", first[i], m1, m.abs() + size);
        near("v", second[i], v1, v + size * size);
        let step = m1 / (v1.sqrt() * 1.5 + f64::from(eps));
        // The change is as exact as its numerator and its denominator.
        let loss = (m.abs() + size) / m1.abs().max(f64::MIN_POSITIVE) + (v + size * size) / v1;
        near(
            "w of adam",
            a[i],
            0.75 * w - 0.25 * step,
            w.abs() + step.abs() * loss,
        );
        near("velocity", velocity[i], 0.5 * m + d, m.abs() + size);
        near(
            "w of sgd",
            b[i],
            0.75 * w - 0.25 * (0.5 * m + d),
            w.abs() + m.abs() + size,
        );
    }
    assert!((kernels.sum_squares(&g) - squares).abs() <= 1e-12 * squares);
}
