//! Attention of tokens that follow one another: a block of keys or of values is widened to f32 once
//! for all of them.

use super::attention::{Attention, BLOCK, Cached, dots, mix, multiply, softmax};
use super::lanes::Lanes;
use super::rows::{Bytes, Floats, Halves, RowSource, RowSteps};
use std::ops::Range;

/// Position of the heads of tokens: token t has `width` elements from `t · stride` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenHeads {
    /// How many tokens.
    pub tokens: usize,
    /// Elements of the heads that share one key and value head.
    pub width: usize,
    /// Elements from a token to the next.
    pub stride: usize,
}

impl TokenHeads {
    pub(super) fn check(&self, q: &[f32], out: &[f32]) {
        let end = self
            .tokens
            .checked_sub(1)
            .and_then(|last| last.checked_mul(self.stride)?.checked_add(self.width));
        let inside =
            end.is_some_and(|end| self.width <= self.stride && end <= q.len() && end <= out.len());
        assert!(inside, "{} tokens of {} elements", self.tokens, self.width);
    }

    fn range(&self, token: usize) -> Range<usize> {
        token * self.stride..token * self.stride + self.width
    }
}

/// Buffers of a thread.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    /// A block of keys, then of values, `[BLOCK, head_dim]`.
    block: Vec<f32>,
    /// Of each token and head.
    scores: Vec<[f32; BLOCK]>,
    /// Largest score so far and sum of exponentials, of each token and head.
    tops: Vec<(f32, f32)>,
}

/// [`attend`](super::attention::attend) for each token: the bits are the same.
#[inline(always)]
pub(crate) fn attend_run<L: Lanes, const S: usize, const G: usize>(
    lanes: L,
    a: &Attention<'_>,
    at: TokenHeads,
    q: &[f32],
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let (cols, heads) = (a.head_dim, at.width / a.head_dim);
    let longest = a.len + at.tokens - 1;
    scratch.block.resize(BLOCK * cols, 0.0);
    scratch.scores.resize(at.tokens * heads, [0.0; BLOCK]);
    scratch.tops.clear();
    scratch
        .tops
        .resize(at.tokens * heads, (f32::NEG_INFINITY, 0.0));
    (0..at.tokens).for_each(|token| out[at.range(token)].fill(0.0));
    for first in (a.start(0) / BLOCK * BLOCK..longest).step_by(BLOCK) {
        // Tokens that see a position of the block at least.
        let from = (first + 1).saturating_sub(a.len);
        let to = a.window.map_or(at.tokens, |window| {
            let end = window.saturating_add(first + BLOCK);
            at.tokens.min(end.saturating_sub(a.len))
        });
        let seen = |token: usize| {
            let hidden = a.start(token).saturating_sub(first);
            hidden..BLOCK.min(a.len + token - first)
        };
        let block = first..longest.min(first + BLOCK);
        for token in from..to {
            if token == from {
                widen(lanes, a.keys, block.clone(), cols, &mut scratch.block);
            }
            let (q, out) = (&q[at.range(token)], &mut out[at.range(token)]);
            score_token::<L, G>(lanes, a, scratch, token * heads, first, seen(token), q, out);
        }
        for token in from..to {
            if token == from {
                widen(lanes, a.values, block.clone(), cols, &mut scratch.block);
            }
            let values = Floats {
                all: &scratch.block,
                cols,
            };
            let scores = &scratch.scores[token * heads..][..heads];
            let (count, out) = (seen(token).end, &mut out[at.range(token)]);
            for (scores, out) in scores.chunks(G).zip(out.chunks_mut(G * cols)) {
                match scores.len().min(G) {
                    1 => add_values::<L, S, 1>(lanes, values, count, scores, out),
                    2 if G > 2 => add_values::<L, S, 2>(lanes, values, count, scores, out),
                    3 if G > 3 => add_values::<L, S, 3>(lanes, values, count, scores, out),
                    _ => add_values::<L, S, G>(lanes, values, count, scores, out),
                }
            }
        }
    }
    for token in 0..at.tokens {
        for (out, (_, sum)) in out[at.range(token)]
            .chunks_exact_mut(cols)
            .zip(&scratch.tops[token * heads..])
        {
            out.iter_mut().for_each(|o| *o /= sum);
        }
    }
}

/// The weights of one token's heads over the positions `seen` of the block that begins at position
/// `first`; its outputs so far shrink as the softmax of the new scores says. `head` is the
/// index of its first head in the buffers.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "one loop, taken out of its function"
)]
fn score_token<L: Lanes, const G: usize>(
    lanes: L,
    a: &Attention<'_>,
    scratch: &mut AttentionScratch,
    head: usize,
    first: usize,
    seen: Range<usize>,
    q: &[f32],
    out: &mut [f32],
) {
    let (cols, count) = (a.head_dim, seen.end);
    let keys = Floats {
        all: &scratch.block,
        cols,
    };
    let scores = &mut scratch.scores[head..][..q.len() / cols];
    for (q, scores) in q.chunks(G * cols).zip(scores.chunks_mut(G)) {
        match scores.len().min(G) {
            1 => score::<L, 1>(lanes, keys, count, q, scores),
            2 if G > 2 => score::<L, 2>(lanes, keys, count, q, scores),
            3 if G > 3 => score::<L, 3>(lanes, keys, count, q, scores),
            _ => score::<L, G>(lanes, keys, count, q, scores),
        }
    }
    let out = out.chunks_exact_mut(cols);
    for ((scores, (top, sum)), out) in scores.iter_mut().zip(&mut scratch.tops[head..]).zip(out) {
        if let Cached::Int8(_, scales) = a.keys {
            multiply(&mut scores[..count], &scales[first..]);
        }
        scores[..count].iter_mut().for_each(|s| *s *= a.scale);
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[count..].fill(f32::NEG_INFINITY);
        let shrink = softmax(scores, top, sum);
        out.iter_mut().for_each(|o| *o *= shrink);
        if let Cached::Int8(_, scales) = a.values {
            multiply(&mut scores[..count], &scales[first..]);
        }
    }
}

/// The scores of G heads of one token with the first `count` keys.
#[inline(always)]
fn score<L: Lanes, const G: usize>(
    lanes: L,
    keys: Floats<'_>,
    count: usize,
    q: &[f32],
    scores: &mut [[f32; BLOCK]],
) {
    let mut queries: [&[f32]; G] = [&[]; G];
    for (query, q) in queries.iter_mut().zip(q.chunks_exact(keys.cols)) {
        *query = q;
    }
    if let Some(scores) = scores.first_chunk_mut::<G>() {
        dots::<L, _, G>(lanes, keys, 0..count, queries, scores);
    }
}

/// Adds the first `count` values, weighted, to the outputs of G heads of one token.
#[inline(always)]
fn add_values<L: Lanes, const S: usize, const G: usize>(
    lanes: L,
    values: Floats<'_>,
    count: usize,
    scores: &[[f32; BLOCK]],
    out: &mut [f32],
) {
    if let Some(scores) = scores.first_chunk::<G>() {
        mix::<L, _, S, G>(lanes, values, 0..count, scores, out);
    }
}

/// Positions of a cache as floats, without the scales of int8.
#[inline(always)]
fn widen<L: Lanes>(
    lanes: L,
    from: Cached<'_>,
    positions: Range<usize>,
    cols: usize,
    to: &mut [f32],
) {
    match from {
        Cached::F32(all) => widen_rows(lanes, Floats { all, cols }, positions, to),
        Cached::F16(all) => widen_rows(lanes, Halves { all, cols }, positions, to),
        Cached::Int8(all, _) => widen_rows(lanes, Bytes { all, cols }, positions, to),
    }
}

#[inline(always)]
fn widen_rows<'a, L: Lanes>(
    lanes: L,
    rows: impl RowSource<'a>,
    positions: Range<usize>,
    to: &mut [f32],
) {
    for (position, to) in positions.zip(to.chunks_exact_mut(rows.cols())) {
        rows.row(position).widen(lanes, to);
    }
}
