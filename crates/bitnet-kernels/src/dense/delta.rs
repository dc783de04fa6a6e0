//! The recurrence of a gated delta net, and its convolution.

use super::elementwise::exp;
use super::lanes::{LANES, Lanes};

/// Tokens of one head of a gated delta net, in order. For each, with its query q and key k of
/// `key_dim` elements, its value v of `value_dim`, its decay g and its rate β:
///
/// ```text
/// r = S·k            what the state holds for the key, after the decay: g·r
/// d = β · (v − g·r)
/// S = g·S + d ⊗ k
/// o = S·q
/// ```
///
/// S is `[value_dim, key_dim]`, kept as panels of 16 rows, `[value_dim / 16, key_dim, 16]`, the last
/// one filled up with zeros. Rows do not depend on one another, and each sum runs over the key's
/// elements in order: the bits do not depend on how many tokens are computed together.
#[derive(Debug, Clone, Copy)]
pub struct DeltaTokens<'a> {
    /// Number of tokens.
    pub tokens: usize,
    /// Queries: token t has `key_dim` elements at `t · key_stride`.
    pub q: &'a [f32],
    /// Keys, in the same way.
    pub k: &'a [f32],
    /// Distance of the queries and keys of two tokens.
    pub key_stride: usize,
    /// Values: token t has `value_dim` elements at `t · value_stride`.
    pub v: &'a [f32],
    /// Distance of the values of two tokens.
    pub value_stride: usize,
    /// Decay g and rate β: token t has its pair at `t · gate_stride`.
    pub gates: &'a [(f32, f32)],
    /// Distance of the gates of two tokens.
    pub gate_stride: usize,
    /// Elements of q and k.
    pub key_dim: usize,
    /// Elements of v.
    pub value_dim: usize,
}

impl DeltaTokens<'_> {
    /// Elements of the state of a head.
    pub fn state_len(key_dim: usize, value_dim: usize) -> usize {
        value_dim.div_ceil(LANES) * LANES * key_dim
    }

    pub(super) fn check(&self, state: &[f32], out: &[f32]) {
        let holds = |len: usize, stride: usize, width: usize| {
            self.tokens == 0 || len >= (self.tokens - 1) * stride + width
        };
        assert!(
            holds(self.q.len(), self.key_stride, self.key_dim)
                && holds(self.k.len(), self.key_stride, self.key_dim)
                && holds(self.v.len(), self.value_stride, self.value_dim)
                && holds(self.gates.len(), self.gate_stride, 1),
            "queries, keys, values and gates of {} tokens",
            self.tokens
        );
        assert!(
            state.len() == Self::state_len(self.key_dim, self.value_dim)
                && out.len() == self.tokens * self.value_dim,
            "a state of {} × {} and its outputs",
            self.value_dim,
            self.key_dim
        );
    }
}

/// See [`Kernels::delta_tokens`](crate::Kernels::delta_tokens).
#[inline(always)]
pub(crate) fn delta_tokens<L: Lanes>(
    lanes: L,
    t: &DeltaTokens<'_>,
    state: &mut [f32],
    out: &mut [f32],
) {
    let panels = state.chunks_exact_mut((LANES * t.key_dim).max(1));
    for (panel, state) in panels.enumerate() {
        let rows = state.as_chunks_mut::<LANES>().0;
        let first = panel * LANES;
        let width = LANES.min(t.value_dim - first);
        for token in 0..t.tokens {
            let q = &t.q[token * t.key_stride..][..t.key_dim];
            let k = &t.k[token * t.key_stride..][..t.key_dim];
            let v = &t.v[token * t.value_stride + first..][..width];
            let (decay, rate) = t.gates[token * t.gate_stride];
            let mut held = lanes.zero();
            for (row, &k) in rows.iter().zip(k) {
                held = lanes.add_product(held, lanes.f32(row), lanes.f32(&[k; LANES]));
            }
            let mut change = [0.0; LANES];
            lanes.store(held, &mut change);
            // Past the last value, all is zero and stays so.
            for (change, v) in change.iter_mut().zip(v) {
                *change = rate * (v - decay * *change);
            }
            let (change, decay) = (lanes.f32(&change), lanes.f32(&[decay; LANES]));
            let mut sums = lanes.zero();
            for ((row, &k), &q) in rows.iter_mut().zip(k).zip(q) {
                let kept = lanes.times(decay, lanes.f32(row));
                let next = lanes.add_product(kept, change, lanes.f32(&[k; LANES]));
                lanes.store(next, row);
                sums = lanes.add_product(sums, next, lanes.f32(&[q; LANES]));
            }
            let mut all = [0.0; LANES];
            lanes.store(sums, &mut all);
            out[token * t.value_dim + first..][..width].copy_from_slice(&all[..width]);
        }
    }
}

/// See [`Kernels::conv_silu`](crate::Kernels::conv_silu).
#[inline(always)]
pub(crate) fn conv_silu(x: &[f32], w: &[f32], out: &mut [f32]) {
    let width = out.len();
    out.fill(0.0);
    for (x, w) in x
        .chunks_exact(width.max(1))
        .zip(w.chunks_exact(width.max(1)))
    {
        for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
            *out += x * w;
        }
    }
    for out in out {
        *out /= 1.0 + exp(-*out);
    }
}

/// See [`Kernels::sigmoid_mul`](crate::Kernels::sigmoid_mul).
#[inline(always)]
pub(crate) fn sigmoid_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = up / (1.0 + exp(-gate));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernels;
    use bitnet_core::random::Random;

    /// The equations in f64, one element at a time, with S as they have it.
    #[test]
    fn the_state_is_that_of_the_equations() {
        for (key_dim, value_dim) in [(1, 1), (12, 17), (5, 16), (128, 128), (30, 40)] {
            let mut random = Random::new(key_dim as u64);
            let mut floats =
                |n: usize| -> Vec<f32> { (0..n).map(|_| random.uniform() as f32 - 0.5).collect() };
            let (tokens, key_stride, value_stride) = (7, key_dim + 3, value_dim + 2);
            let [q, k] = [0; 2].map(|_| floats(tokens * key_stride));
            let v = floats(tokens * value_stride);
            let gates: Vec<(f32, f32)> = floats(4 * tokens)
                .chunks(2)
                .map(|x| (x[0] + 0.5, x[1] + 0.5))
                .collect();
            let run = DeltaTokens {
                tokens,
                q: &q,
                k: &k,
                key_stride,
                v: &v,
                value_stride,
                gates: &gates,
                gate_stride: 2,
                key_dim,
                value_dim,
            };
            let mut state = vec![0.0; DeltaTokens::state_len(key_dim, value_dim)];
            let mut out = vec![9.0; tokens * value_dim];
            Kernels::detect().delta_tokens(&run, &mut state, &mut out);

            let mut s = vec![vec![0.0f64; key_dim]; value_dim];
            for token in 0..tokens {
                let (decay, rate) = gates[2 * token];
                let (q, k) = (&q[token * key_stride..], &k[token * key_stride..]);
                for (row, s) in s.iter_mut().enumerate() {
                    s.iter_mut().for_each(|s| *s *= f64::from(decay));
                    let held: f64 = s.iter().zip(k).map(|(s, k)| s * f64::from(*k)).sum();
                    let v = f64::from(v[token * value_stride + row]);
                    let change = (v - held) * f64::from(rate);
                    s.iter_mut()
                        .zip(k)
                        .for_each(|(s, k)| *s += f64::from(*k) * change);
                    let expected: f64 = s.iter().zip(q).map(|(s, q)| s * f64::from(*q)).sum();
                    let got = f64::from(out[token * value_dim + row]);
                    assert!(
                        (got - expected).abs() < 1e-5,
                        "{key_dim} × {value_dim}: {got}, {expected}"
                    );
                }
            }
            // One by one, from the state that the others left: the same bits.
            let (mut again, mut one) = (vec![0.0; state.len()], vec![9.0; value_dim]);
            for token in 0..tokens {
                let run = DeltaTokens {
                    tokens: 1,
                    q: &q[token * key_stride..],
                    k: &k[token * key_stride..],
                    v: &v[token * value_stride..],
                    gates: &gates[2 * token..],
                    ..run
                };
                Kernels::detect().delta_tokens(&run, &mut again, &mut one);
                assert_eq!(one, out[token * value_dim..][..value_dim]);
            }
            assert_eq!(state, again);
        }
    }

    #[test]
    fn a_convolution_of_each_channel_and_silu() {
        let (x, w) = (
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            [0.5, -1.0, 1.0, 0.0, 2.0, 1.0],
        );
        let mut out = [9.0; 2];
        Kernels::detect().conv_silu(&x, &w, &mut out);
        let sums: [f32; 2] = [0.5 + 3.0 + 10.0, -2.0 + 6.0];
        for (got, sum) in out.iter().zip(sums) {
            assert!((got - sum / (1.0 + (-sum).exp())).abs() < 1e-5, "{out:?}");
        }
    }

    #[test]
    fn a_gate_multiplies_by_its_sigmoid() {
        let mut out = [9.0; 3];
        Kernels::detect().sigmoid_mul(&[0.0, -200.0, 200.0], &[3.0; 3], &mut out);
        assert!(out[0] == 1.5 && out[1].abs() < 1e-30 && out[2] == 3.0);
    }
}
