//! Causal attention over a cache, one token at a time.

use super::elementwise::exp;
use super::lanes::{LANES, Lanes, total};
use super::rows::{Bytes, Floats, Halves, RowSource, RowSteps};
use super::tile::tile;
use std::ops::Range;

/// Tiles that prefetch nothing.
const NO_PREFETCH: (*const u8, usize) = (std::ptr::null(), 0);
/// Positions whose scores are kept at once.
pub(super) const BLOCK: usize = 64;

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

/// `out = softmax(q · Kᵀ · scale) · V` over the first `len` positions of one key and value head, or
/// over the last `window` of them.
///
/// The softmax runs over blocks of 64 positions with a running maximum, so that no buffer depends
/// on the length and the result is the same whether a token is computed alone or among others.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Keys, `[positions, head_dim]`.
    pub keys: Cached<'a>,
    /// Values, `[positions, head_dim]`.
    pub values: Cached<'a>,
    /// Positions that the token sees, itself included.
    pub len: usize,
    /// Largest number of positions that a token sees, itself included; none for all.
    pub window: Option<usize>,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplier of the scores, usually `1/√head_dim`.
    pub scale: f32,
}

impl Attention<'_> {
    pub(super) fn check(&self, q: &[f32], out: &[f32]) {
        assert!(
            self.head_dim > 0 && q.len().is_multiple_of(self.head_dim) && q.len() == out.len(),
            "whole heads of {}",
            self.head_dim
        );
        let held =
            self.keys.holds(self.len, self.head_dim) && self.values.holds(self.len, self.head_dim);
        assert!(held, "a cache of {} positions", self.len);
        assert!(self.window != Some(0), "a window of positions");
    }

    /// First position that a token sees; `token` counts from the one that sees `len` positions.
    pub(super) fn start(&self, token: usize) -> usize {
        let before = |window| (self.len + token).saturating_sub(window);
        self.window.map_or(0, before)
    }
}

/// Heads, up to G at once, so that each key and each value is widened once for all of them; values
/// in S steps at once.
#[inline(always)]
pub(crate) fn attend<L: Lanes, const S: usize, const G: usize>(
    lanes: L,
    a: &Attention<'_>,
    q: &[f32],
    out: &mut [f32],
) {
    for (q, out) in q.chunks(G * a.head_dim).zip(out.chunks_mut(G * a.head_dim)) {
        match (q.len() / a.head_dim).min(G) {
            1 => heads::<L, S, 1>(lanes, a, q, out),
            2 if G > 2 => heads::<L, S, 2>(lanes, a, q, out),
            3 if G > 3 => heads::<L, S, 3>(lanes, a, q, out),
            _ => heads::<L, S, G>(lanes, a, q, out),
        }
    }
}

/// G query heads.
#[inline(always)]
fn heads<L: Lanes, const S: usize, const G: usize>(
    lanes: L,
    a: &Attention<'_>,
    q: &[f32],
    out: &mut [f32],
) {
    let cols = a.head_dim;
    let queries: [&[f32]; G] = std::array::from_fn(|g| &q[g * cols..][..cols]);
    let (mut tops, mut sums) = ([f32::NEG_INFINITY; G], [0.0f32; G]);
    let mut scores = [[0.0; BLOCK]; G];
    out.fill(0.0);
    let start = a.start(0);
    for first in (start / BLOCK * BLOCK..a.len).step_by(BLOCK) {
        let count = BLOCK.min(a.len - first);
        let hidden = start.saturating_sub(first);
        let positions = first..first + count;
        match a.keys {
            Cached::F32(all) => dots(
                lanes,
                Floats { all, cols },
                positions.clone(),
                queries,
                &mut scores,
            ),
            Cached::F16(all) => dots(
                lanes,
                Halves { all, cols },
                positions.clone(),
                queries,
                &mut scores,
            ),
            Cached::Int8(all, scales) => {
                dots(
                    lanes,
                    Bytes { all, cols },
                    positions.clone(),
                    queries,
                    &mut scores,
                );
                scores
                    .iter_mut()
                    .for_each(|scores| multiply(&mut scores[..count], &scales[first..]));
            }
        }
        for (((scores, top), sum), out) in scores
            .iter_mut()
            .zip(&mut tops)
            .zip(&mut sums)
            .zip(out.chunks_exact_mut(cols))
        {
            scores[..count].iter_mut().for_each(|s| *s *= a.scale);
            scores[..hidden].fill(f32::NEG_INFINITY);
            scores[count..].fill(f32::NEG_INFINITY);
            let shrink = softmax(scores, top, sum);
            out.iter_mut().for_each(|o| *o *= shrink);
        }
        match a.values {
            Cached::F32(all) => {
                mix::<L, _, S, G>(lanes, Floats { all, cols }, positions, &scores, out)
            }
            Cached::F16(all) => {
                mix::<L, _, S, G>(lanes, Halves { all, cols }, positions, &scores, out)
            }
            Cached::Int8(all, scales) => {
                scores
                    .iter_mut()
                    .for_each(|scores| multiply(&mut scores[..count], &scales[first..]));
                mix::<L, _, S, G>(lanes, Bytes { all, cols }, positions, &scores, out);
            }
        }
    }
    for (out, sum) in out.chunks_exact_mut(cols).zip(sums) {
        out.iter_mut().for_each(|o| *o /= sum);
    }
}

/// Multiplies each score by its scale.
#[inline(always)]
pub(super) fn multiply(scores: &mut [f32], scales: &[f32]) {
    scores
        .iter_mut()
        .zip(scales)
        .for_each(|(s, scale)| *s *= scale);
}

/// Replaces scores by `exp(score − top)` with the largest score so far as `top`, adds them to
/// `sum`, and returns the factor by which earlier sums and outputs shrink.
#[inline(always)]
pub(super) fn softmax(scores: &mut [f32; BLOCK], top: &mut f32, sum: &mut f32) -> f32 {
    let steps = scores.as_chunks_mut::<LANES>().0;
    let mut tops = [*top; LANES];
    for step in steps.iter() {
        for (top, &s) in tops.iter_mut().zip(step) {
            *top = if s > *top { s } else { *top };
        }
    }
    let before = *top;
    *top = tops
        .into_iter()
        .fold(before, |top, s| if s > top { s } else { top });
    let mut lanes = [0.0; LANES];
    for step in steps {
        for (lane, s) in lanes.iter_mut().zip(step) {
            *s = exp(*s - *top);
            *lane += *s;
        }
    }
    let shrink = exp(before - *top);
    *sum = *sum * shrink + total(lanes);
    shrink
}

/// `scores[g][j] = queries[g] · key[first + j]`.
#[inline(always)]
pub(super) fn dots<'a, L: Lanes, K: RowSource<'a>, const G: usize>(
    lanes: L,
    keys: K,
    positions: Range<usize>,
    queries: [&[f32]; G],
    scores: &mut [[f32; BLOCK]; G],
) {
    let (mut j, count, first) = (0, positions.len(), positions.start);
    while j + 4 <= count {
        let rows = [
            keys.row(first + j),
            keys.row(first + j + 1),
            keys.row(first + j + 2),
            keys.row(first + j + 3),
        ];
        let sums = tile::<L, _, 4, G>(lanes, rows, queries, NO_PREFETCH);
        scores
            .iter_mut()
            .zip(sums)
            .for_each(|(scores, sums)| scores[j..j + 4].copy_from_slice(&sums));
        j += 4;
    }
    while j < count {
        let sums = tile::<L, _, 1, G>(lanes, [keys.row(first + j)], queries, NO_PREFETCH);
        scores
            .iter_mut()
            .zip(sums)
            .for_each(|(scores, [sum])| scores[j] = sum);
        j += 1;
    }
}

/// `out[g] += Σ_j weights[g][j] · value[first + j]`, positions in order.
#[inline(always)]
pub(super) fn mix<'a, L: Lanes, V: RowSource<'a>, const S: usize, const G: usize>(
    lanes: L,
    values: V,
    positions: Range<usize>,
    weights: &[[f32; BLOCK]; G],
    out: &mut [f32],
) {
    let cols = values.cols();
    let (steps, mut step) = (cols / LANES, 0);
    while step + S <= steps {
        // SAFETY: the loop's condition has S steps from `step` on inside the full ones.
        unsafe { mix_steps::<L, V, S, G>(lanes, values, positions.clone(), weights, step, out) };
        step += S;
    }
    while step < steps {
        // SAFETY: the loop's condition has `step` inside the full ones.
        unsafe { mix_steps::<L, V, 1, G>(lanes, values, positions.clone(), weights, step, out) };
        step += 1;
    }
    if !cols.is_multiple_of(LANES) {
        for (out, weights) in out.chunks_exact_mut(cols).zip(weights) {
            let rest = &mut out[steps * LANES..];
            let mut padded = [0.0; LANES];
            padded[..rest.len()].copy_from_slice(rest);
            let mut kept = lanes.f32(&padded);
            for (position, &weight) in positions.clone().zip(weights) {
                let value = values.row(position).tail(lanes);
                kept = lanes.add_product(kept, lanes.f32(&[weight; LANES]), value);
            }
            lanes.store(kept, &mut padded);
            rest.copy_from_slice(&padded[..rest.len()]);
        }
    }
}

/// [`mix`] for S steps from one on.
///
/// # Safety
/// `first + S` is at most the number of full steps of `values`.
#[inline(always)]
unsafe fn mix_steps<'a, L: Lanes, V: RowSource<'a>, const S: usize, const G: usize>(
    lanes: L,
    values: V,
    positions: Range<usize>,
    weights: &[[f32; BLOCK]; G],
    first: usize,
    out: &mut [f32],
) {
    let cols = values.cols();
    let mut kept = [[lanes.zero(); S]; G];
    for (g, kept) in kept.iter_mut().enumerate() {
        let (out, _) = out[g * cols..][..cols].as_chunks();
        for (s, kept) in kept.iter_mut().enumerate() {
            *kept = lanes.f32(&out[first + s]);
        }
    }
    for (j, position) in positions.enumerate() {
        let row = values.row(position);
        let mut value = [lanes.zero(); S];
        for (s, value) in value.iter_mut().enumerate() {
            // SAFETY: s < S, and by the function's contract a row has `first + S` full steps.
            *value = unsafe { row.full(lanes, first + s) };
        }
        for (kept, weights) in kept.iter_mut().zip(weights) {
            let weight = lanes.f32(&[weights[j]; LANES]);
            for (kept, value) in kept.iter_mut().zip(value) {
                *kept = lanes.add_product(*kept, weight, value);
            }
        }
    }
    for (g, kept) in kept.into_iter().enumerate() {
        let (out, _) = out[g * cols..][..cols].as_chunks_mut();
        for (s, kept) in kept.into_iter().enumerate() {
            lanes.store(kept, &mut out[first + s]);
        }
    }
}
