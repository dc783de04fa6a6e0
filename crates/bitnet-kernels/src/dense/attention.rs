//! Causal attention over a cache, one token at a time.

use super::LANES;
use super::elementwise::exp;
use super::lanes::Lanes;
use super::matrix::{Bytes, Floats, Halves, Row, Rows};
use super::product::tile;

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

/// # Safety
/// The machine has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn attend<L: Lanes>(a: &Attention<'_>, q: &[f32], out: &mut [f32]) {
    for (q, out) in q.chunks_exact(a.head_dim).zip(out.chunks_exact_mut(a.head_dim)) {
        // SAFETY: the caller's.
        unsafe { head::<L>(a, q, out) };
    }
}

/// One query head.
///
/// # Safety
/// As [`attend`].
#[inline(always)]
unsafe fn head<L: Lanes>(a: &Attention<'_>, q: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    let (mut top, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    let mut scores = [0.0; BLOCK];
    for first in (0..a.len).step_by(BLOCK) {
        let scores = &mut scores[..BLOCK.min(a.len - first)];
        // SAFETY of every call: the caller's.
        #[allow(clippy::undocumented_unsafe_blocks, reason = "one comment for all of them")]
        match a.keys {
            Cached::F32(all) => unsafe { dots::<L, _>(Floats { all, cols: a.head_dim }, first, q, scores) },
            Cached::F16(all) => unsafe { dots::<L, _>(Halves { all, cols: a.head_dim }, first, q, scores) },
            Cached::Int8(all, scales) => {
                unsafe { dots::<L, _>(Bytes { all, cols: a.head_dim }, first, q, scores) };
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
        // SAFETY of every call: the caller's.
        #[allow(clippy::undocumented_unsafe_blocks, reason = "one comment for all of them")]
        match a.values {
            Cached::F32(all) => unsafe { mix::<L, _>(Floats { all, cols: a.head_dim }, first, scores, out) },
            Cached::F16(all) => unsafe { mix::<L, _>(Halves { all, cols: a.head_dim }, first, scores, out) },
            Cached::Int8(all, scales) => {
                scores.iter_mut().zip(&scales[first..]).for_each(|(s, scale)| *s *= scale);
                unsafe { mix::<L, _>(Bytes { all, cols: a.head_dim }, first, scores, out) };
            }
        }
    }
    out.iter_mut().for_each(|o| *o /= sum);
}

/// `scores[j] = q · key[first + j]`.
///
/// # Safety
/// As [`attend`].
#[inline(always)]
unsafe fn dots<'a, L: Lanes, K: Rows<'a>>(keys: K, first: usize, q: &[f32], scores: &mut [f32]) {
    let (fours, rest) = scores.as_chunks_mut::<4>();
    let mut at = first;
    for four in fours {
        let rows = [keys.row(at), keys.row(at + 1), keys.row(at + 2), keys.row(at + 3)];
        // SAFETY: the caller's.
        [*four] = unsafe { tile::<L, _, 4, 1>(rows, [q], q.len()) };
        at += 4;
    }
    for score in rest {
        // SAFETY: the caller's.
        [[*score]] = unsafe { tile::<L, _, 1, 1>([keys.row(at)], [q], q.len()) };
        at += 1;
    }
}

/// `out += Σ_j weights[j] · value[first + j]`, positions in order.
///
/// # Safety
/// As [`attend`].
#[inline(always)]
unsafe fn mix<'a, L: Lanes, V: Rows<'a>>(values: V, first: usize, weights: &[f32], out: &mut [f32]) {
    let (steps, rest) = out.as_chunks_mut::<LANES>();
    // SAFETY: the caller's.
    unsafe {
        for (step, sums) in steps.iter_mut().enumerate() {
            let mut kept = L::f32(sums);
            for (j, &weight) in weights.iter().enumerate() {
                kept = kept.add_product(L::f32(&[weight; LANES]), values.row(first + j).full(step));
            }
            kept.store(sums);
        }
        if !rest.is_empty() {
            let mut padded = [0.0; LANES];
            padded[..rest.len()].copy_from_slice(rest);
            let mut kept = L::f32(&padded);
            for (j, &weight) in weights.iter().enumerate() {
                kept = kept.add_product(L::f32(&[weight; LANES]), values.row(first + j).tail());
            }
            kept.store(&mut padded);
            rest.copy_from_slice(&padded[..rest.len()]);
        }
    }
}
