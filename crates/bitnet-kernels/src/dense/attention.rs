//! Causal attention over a cache, one token at a time.

use super::elementwise::exp;
use super::matrix::{Bytes, Floats, Halves, Row, Rows};
use super::product::tile;
use super::{LANES, Step};

/// Positions whose scores are kept at once.
const BLOCK: usize = 64;

/// Keys or values of one head: rows of `head_dim` elements, one for each position.
#[derive(Debug, Clone, Copy)]
pub enum Cached<'a> {
    /// f32.
    F32(&'a [f32]),
    /// The bits of binary16.
    F16(&'a [u16]),
    /// `scale · value`, one scale for each position.
    Int8(&'a [i8], &'a [f32]),
}

impl Cached<'_> {
    fn holds(&self, positions: usize, head_dim: usize) -> bool {
        let elements = positions.saturating_mul(head_dim);
        match self {
            Self::F32(all) => all.len() >= elements,
            Self::F16(all) => all.len() >= elements,
            Self::Int8(all, scales) => all.len() >= elements && scales.len() >= positions,
        }
    }
}

/// `out = softmax(q · Kᵀ · scale) · V` over the first `len` positions of one key and value head.
///
/// The softmax runs over blocks of 64 positions with a running maximum, so that no buffer depends on the length and the result is the same
/// whether a token is computed alone or among others.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Keys, `[positions, head_dim]`.
    pub keys: Cached<'a>,
    /// Values, `[positions, head_dim]`.
    pub values: Cached<'a>,
    /// Positions that the token sees, itself included.
    pub len: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplier of the scores, usually `1/√head_dim`.
    pub scale: f32,
}

impl Attention<'_> {
    pub(super) fn check(&self, q: &[f32], out: &[f32]) {
        assert!(self.head_dim > 0 && q.len().is_multiple_of(self.head_dim) && q.len() == out.len(), "whole heads of {}", self.head_dim);
        let held = self.keys.holds(self.len, self.head_dim) && self.values.holds(self.len, self.head_dim);
        assert!(held, "a cache of {} positions", self.len);
    }
}

#[inline(always)]
pub(super) fn attend(a: &Attention<'_>, q: &[f32], out: &mut [f32]) {
    for (q, out) in q.chunks_exact(a.head_dim).zip(out.chunks_exact_mut(a.head_dim)) {
        head(a, q, out);
    }
}

/// One query head.
#[inline(always)]
fn head(a: &Attention<'_>, q: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    let (mut top, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    let mut scores = [0.0; BLOCK];
    for first in (0..a.len).step_by(BLOCK) {
        let scores = &mut scores[..BLOCK.min(a.len - first)];
        match a.keys {
            Cached::F32(all) => dots(Floats { all, cols: a.head_dim }, first, q, scores),
            Cached::F16(all) => dots(Halves { all, cols: a.head_dim }, first, q, scores),
            Cached::Int8(all, scales) => {
                dots(Bytes { all, cols: a.head_dim }, first, q, scores);
                scores.iter_mut().zip(&scales[first..]).for_each(|(s, scale)| *s *= scale);
            }
        }
        let before = top;
        for s in scores.iter_mut() {
            *s *= a.scale;
            top = if *s > top { *s } else { top };
        }
        let shrink = exp(before - top);
        sum *= shrink;
        out.iter_mut().for_each(|o| *o *= shrink);
        scores.iter_mut().for_each(|s| *s = exp(*s - top));
        for s in scores.iter() {
            sum += s;
        }
        match a.values {
            Cached::F32(all) => mix(Floats { all, cols: a.head_dim }, first, scores, out),
            Cached::F16(all) => mix(Halves { all, cols: a.head_dim }, first, scores, out),
            Cached::Int8(all, scales) => {
                scores.iter_mut().zip(&scales[first..]).for_each(|(s, scale)| *s *= scale);
                mix(Bytes { all, cols: a.head_dim }, first, scores, out);
            }
        }
    }
    out.iter_mut().for_each(|o| *o /= sum);
}

/// `scores[j] = q · key[first + j]`.
#[inline(always)]
fn dots<'a, K: Rows<'a>>(keys: K, first: usize, q: &[f32], scores: &mut [f32]) {
    let (fours, rest) = scores.as_chunks_mut::<4>();
    let tail = first + 4 * fours.len();
    for (i, four) in fours.iter_mut().enumerate() {
        [*four] = tile::<_, 4, 1>(std::array::from_fn(|r| keys.row(first + 4 * i + r)), [q], q.len());
    }
    for (i, score) in rest.iter_mut().enumerate() {
        [[*score]] = tile::<_, 1, 1>([keys.row(tail + i)], [q], q.len());
    }
}

/// `out += Σ_j weights[j] · value[first + j]`, positions in order.
#[inline(always)]
fn mix<'a, V: Rows<'a>>(values: V, first: usize, weights: &[f32], out: &mut [f32]) {
    for (step, out) in out.chunks_mut(LANES).enumerate() {
        let mut sums: Step = [0.0; LANES];
        sums[..out.len()].copy_from_slice(out);
        for (j, &weight) in weights.iter().enumerate() {
            let v = values.row(first + j).step(step);
            for lane in 0..LANES {
                sums[lane] = weight.mul_add(v[lane], sums[lane]);
            }
        }
        out.copy_from_slice(&sums[..out.len()]);
    }
}
