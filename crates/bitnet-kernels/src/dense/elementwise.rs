//! Norm, rotation and activation functions of one token.

use super::lanes::{LANES, Lanes};
use super::rows::tail;

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryPairing {
    /// i with i + d/2: Hugging Face's rotate-half, ggml's NEOX.
    Halves,
    /// 2i with 2i + 1: the interleaved original, ggml's NORM.
    Adjacent,
}

/// `1 / √(mean(x²) + eps)`.
#[inline(always)]
fn inverse_rms<L: Lanes>(lanes: L, x: &[f32], eps: f32) -> f32 {
    let (steps, rest) = x.as_chunks::<LANES>();
    let mut squares = lanes.zero();
    for step in steps {
        let x = lanes.f32(step);
        squares = lanes.add_product(squares, x, x);
    }
    if !rest.is_empty() {
        let x = lanes.f32(&tail(x));
        squares = lanes.add_product(squares, x, x);
    }
    1.0 / (lanes.total(squares) / x.len() as f32 + eps).sqrt()
}

/// See [`Kernels::rms_norm`](crate::Kernels::rms_norm).
#[inline(always)]
pub(crate) fn rms_norm<L: Lanes>(lanes: L, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let inverse = inverse_rms(lanes, x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = weight * (x * inverse);
    }
}

/// See [`Kernels::rms_norm_in_place`](crate::Kernels::rms_norm_in_place).
#[inline(always)]
pub(crate) fn rms_norm_in_place<L: Lanes>(lanes: L, x: &mut [f32], weight: &[f32], eps: f32) {
    let inverse = inverse_rms(lanes, x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = weight * (*x * inverse);
    }
}

/// See [`Kernels::layer_norm`](crate::Kernels::layer_norm).
#[inline(always)]
pub(crate) fn layer_norm<L: Lanes>(
    lanes: L,
    x: &[f32],
    [weight, bias]: [&[f32]; 2],
    eps: f32,
    out: &mut [f32],
) {
    let ones = lanes.f32(&[1.0; LANES]);
    let (steps, rest) = x.as_chunks::<LANES>();
    let mut sums = lanes.zero();
    for step in steps {
        sums = lanes.add_product(sums, lanes.f32(step), ones);
    }
    if !rest.is_empty() {
        sums = lanes.add_product(sums, lanes.f32(&tail(x)), ones);
    }
    let mean = lanes.total(sums) / x.len() as f32;
    for (out, x) in out.iter_mut().zip(x) {
        *out = x - mean;
    }
    // Of deviations, the mean square is the variance.
    let inverse = inverse_rms(lanes, out, eps);
    for ((out, weight), bias) in out.iter_mut().zip(weight).zip(bias) {
        *out = weight * (*out * inverse) + bias;
    }
}

/// See [`Kernels::rotate`](crate::Kernels::rotate).
#[inline(always)]
pub(crate) fn rotate(x: &mut [f32], angles: &[(f32, f32)], pairing: RotaryPairing) {
    let half = angles.len();
    for head in x.chunks_exact_mut((2 * half).max(1)) {
        match pairing {
            RotaryPairing::Halves => {
                let (a, b) = head.split_at_mut(half);
                for ((a, b), &(cos, sin)) in a.iter_mut().zip(b).zip(angles) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
            RotaryPairing::Adjacent => {
                for ([a, b], &(cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}

/// See [`Kernels::silu_mul`](crate::Kernels::silu_mul).
#[inline(always)]
pub(crate) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// See [`Kernels::relu2_mul`](crate::Kernels::relu2_mul).
#[inline(always)]
pub(crate) fn relu2_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        let positive = if gate > 0.0 { gate } else { 0.0 };
        *out = positive * positive * up;
    }
}

/// See [`Kernels::gelu_tanh_mul`](crate::Kernels::gelu_tanh_mul).
#[inline(always)]
pub(crate) fn gelu_tanh_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    // (1 + tanh u) / 2 = 1 / (1 + e^−2u).
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769_2;
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        let u = TWICE_SQRT_2_OVER_PI * (gate + 0.044_715 * (gate * gate * gate));
        *out = gate / (1.0 + exp(-u)) * up;
    }
}

/// See [`Kernels::gelu`](crate::Kernels::gelu).
#[inline(always)]
pub(crate) fn gelu(x: &mut [f32]) {
    for x in x {
        *x *= normal_cdf(*x);
    }
}

/// Φ(x), the share of the normal distribution below x, within 2⁻²² of it, relative where x > 0.
///
/// With z = |x|/√2, the part beyond |x| is `erfc(z) / 2`. Below z = 1, `erf(z) = z · P(z²)`; from
/// there on, `erfc(z) = e^−z² · t · Q(t)` with `t = 1 / (1 + z)`. P and Q are least-squares fits at
/// Chebyshev points, of relative errors below 2⁻²⁶.
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    const P: [f32; 7] = [
        7.882_497_4e-5,
        -8.018_855e-4,
        5.189_312e-3,
        -2.685_432_9e-2,
        1.128_359_7e-1,
        -3.761_262_6e-1,
        std::f32::consts::FRAC_2_SQRT_PI,
    ];
    const Q: [f32; 9] = [
        1.913_775,
        -4.347_945,
        3.097_579,
        1.804_225_6e-1,
        -9.604_05e-1,
        -2.193_691_3e-1,
        2.741_514_4e-1,
        5.647_096_6e-1,
        5.641_756_7e-1,
    ];
    #[inline(always)]
    fn polynomial(coefficients: &[f32], x: f32) -> f32 {
        let mut sum = 0.0;
        for c in coefficients {
            sum = x.mul_add(sum, *c);
        }
        sum
    }
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let square = z * z;
    let near = 1.0 - z * polynomial(&P, square);
    let t = 1.0 / (1.0 + z);
    let far = exp(-square) * t * polynomial(&Q, t);
    let beyond = 0.5 * if z < 1.0 { near } else { far };
    if x < 0.0 { beyond } else { 1.0 - beyond }
}

/// See [`Kernels::add`](crate::Kernels::add).
#[inline(always)]
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// e^x within two units in the last place; 0 below −87.3, where the result would be subnormal, and
/// 2^127 · e^… at most above 88.
///
/// `x = n·ln 2 + r` with |r| ≤ ln 2 / 2, and the Taylor polynomial of degree 7 of e^r, whose rest
/// is below 2^−29.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // 1.5 · 2^23: adding and subtracting it rounds to an integer.
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let bounded = if x < 88.0 { x } else { 88.0 };
    let bounded = if bounded > -87.3 { bounded } else { -87.3 };
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, bounded));
    let mut sum = 1.0 / 5040.0;
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        sum = r.mul_add(sum, c);
    }
    // The last bits of the shifted number are n: a conversion, which saturates, would be done lane
    // by lane.
    let power = f32::from_bits(
        shifted
            .to_bits()
            .wrapping_sub(MAGIC.to_bits())
            .wrapping_add(127)
            << 23,
    );
    if x < -87.3 { 0.0 } else { sum * power }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_near_and_ends_well() {
        let mut worst = 0.0f64;
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let truth = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - truth).abs() / truth);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::INFINITY).is_finite() && exp(1000.0) > 1e38);
    }
}
