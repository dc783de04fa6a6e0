//! Attention of tokens that follow one another: a block of keys or of values is widened to f32 once
//! for all of them.

use super::LANES;
use super::attention::{Attention, BLOCK, Cached, by, dots, mix, softmax};
use super::lanes::Lanes;
use super::matrix::{Bytes, Floats, Halves, Row, Rows};
use std::ops::Range;

/// Where the heads of tokens lie: those of token t are `width` elements from `t · stride` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// How many tokens.
    pub tokens: usize,
    /// Elements of the heads that share one key and value head.
    pub width: usize,
    /// Elements from a token to the next.
    pub stride: usize,
}

impl Heads {
    pub(super) fn check(&self, q: &[f32], out: &[f32]) {
        let end = self
            .tokens
            .checked_sub(1)
            .and_then(|last| last.checked_mul(self.stride)?.checked_add(self.width));
        let inside =
            end.is_some_and(|end| self.width <= self.stride && end <= q.len() && end <= out.len());
        assert!(inside, "{} tokens of {} elements", self.tokens, self.width);
    }

    fn of(&self, token: usize) -> Range<usize> {
        token * self.stride..token * self.stride + self.width
    }
}

/// Memory of a thread.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// A block of keys, then of values, `[BLOCK, head_dim]`.
    block: Vec<f32>,
    /// Of each token and head.
    scores: Vec<[f32; BLOCK]>,
    /// Largest score so far and sum of exponentials, of each token and head.
    tops: Vec<(f32, f32)>,
}

/// [`attend`](super::attention::attend) for each token: the bits are the same.
///
/// # Safety
/// The machine has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn attend_run<L: Lanes, const S: usize, const G: usize>(
    a: &Attention<'_>,
    at: Heads,
    q: &[f32],
    out: &mut [f32],
    room: &mut Room,
) {
    let (cols, heads) = (a.head_dim, at.width / a.head_dim);
    let longest = a.len + at.tokens - 1;
    room.block.resize(BLOCK * cols, 0.0);
    room.scores.resize(at.tokens * heads, [0.0; BLOCK]);
    room.tops.clear();
    room.tops
        .resize(at.tokens * heads, (f32::NEG_INFINITY, 0.0));
    (0..at.tokens).for_each(|token| out[at.of(token)].fill(0.0));
    for first in (0..longest).step_by(BLOCK) {
        // Tokens that see a position of the block at least.
        let from = (first + 1).saturating_sub(a.len);
        let seen = |token: usize| BLOCK.min(a.len + token - first);
        let block = first..longest.min(first + BLOCK);
        // SAFETY of every call: the caller's.
        #[allow(
            clippy::undocumented_unsafe_blocks,
            reason = "one comment for all of them"
        )]
        for token in from..at.tokens {
            if token == from {
                unsafe { widen::<L>(a.keys, block.clone(), cols, &mut room.block) };
            }
            let count = seen(token);
            let scores = &mut room.scores[token * heads..][..heads];
            for (q, scores) in q[at.of(token)].chunks(G * cols).zip(scores.chunks_mut(G)) {
                match scores.len().min(G) {
                    1 => unsafe { scored::<L, 1>(&room.block, cols, count, q, scores) },
                    2 => unsafe { scored::<L, 2>(&room.block, cols, count, q, scores) },
                    3 => unsafe { scored::<L, 3>(&room.block, cols, count, q, scores) },
                    _ => unsafe { scored::<L, G>(&room.block, cols, count, q, scores) },
                }
            }
            let out = out[at.of(token)].chunks_exact_mut(cols);
            for ((scores, (top, sum)), out) in scores
                .iter_mut()
                .zip(&mut room.tops[token * heads..])
                .zip(out)
            {
                if let Cached::Int8(_, scales) = a.keys {
                    by(&mut scores[..count], &scales[first..]);
                }
                scores[..count].iter_mut().for_each(|s| *s *= a.scale);
                scores[count..].fill(f32::NEG_INFINITY);
                let shrink = softmax(scores, top, sum);
                out.iter_mut().for_each(|o| *o *= shrink);
                if let Cached::Int8(_, scales) = a.values {
                    by(&mut scores[..count], &scales[first..]);
                }
            }
        }
        // SAFETY of every call: the caller's.
        #[allow(
            clippy::undocumented_unsafe_blocks,
            reason = "one comment for all of them"
        )]
        for token in from..at.tokens {
            if token == from {
                unsafe { widen::<L>(a.values, block.clone(), cols, &mut room.block) };
            }
            let scores = &room.scores[token * heads..][..heads];
            for (scores, out) in scores.chunks(G).zip(out[at.of(token)].chunks_mut(G * cols)) {
                match scores.len().min(G) {
                    1 => unsafe { mixed::<L, S, 1>(&room.block, cols, seen(token), scores, out) },
                    2 => unsafe { mixed::<L, S, 2>(&room.block, cols, seen(token), scores, out) },
                    3 => unsafe { mixed::<L, S, 3>(&room.block, cols, seen(token), scores, out) },
                    _ => unsafe { mixed::<L, S, G>(&room.block, cols, seen(token), scores, out) },
                }
            }
        }
    }
    for token in 0..at.tokens {
        for (out, (_, sum)) in out[at.of(token)]
            .chunks_exact_mut(cols)
            .zip(&room.tops[token * heads..])
        {
            out.iter_mut().for_each(|o| *o /= sum);
        }
    }
}

/// # Safety
/// As [`attend_run`].
#[inline(always)]
unsafe fn scored<L: Lanes, const G: usize>(
    block: &[f32],
    cols: usize,
    count: usize,
    q: &[f32],
    scores: &mut [[f32; BLOCK]],
) {
    let mut queries: [&[f32]; G] = [&[]; G];
    for (query, q) in queries.iter_mut().zip(q.chunks_exact(cols)) {
        *query = q;
    }
    if let Some(scores) = scores.first_chunk_mut::<G>() {
        // SAFETY: the caller's.
        unsafe { dots::<L, _, G>(Floats { all: block, cols }, 0..count, queries, scores) };
    }
}

/// # Safety
/// As [`attend_run`].
#[inline(always)]
unsafe fn mixed<L: Lanes, const S: usize, const G: usize>(
    block: &[f32],
    cols: usize,
    count: usize,
    scores: &[[f32; BLOCK]],
    out: &mut [f32],
) {
    if let Some(scores) = scores.first_chunk::<G>() {
        // SAFETY: the caller's.
        unsafe { mix::<L, _, S, G>(Floats { all: block, cols }, 0..count, scores, cols, out) };
    }
}

/// Positions of a cache as floats, without the scales of int8.
///
/// # Safety
/// As [`attend_run`].
#[inline(always)]
unsafe fn widen<L: Lanes>(from: Cached<'_>, positions: Range<usize>, cols: usize, to: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe {
        match from {
            Cached::F32(all) => widen_rows::<L, _>(Floats { all, cols }, positions, cols, to),
            Cached::F16(all) => widen_rows::<L, _>(Halves { all, cols }, positions, cols, to),
            Cached::Int8(all, _) => widen_rows::<L, _>(Bytes { all, cols }, positions, cols, to),
        }
    }
}

/// # Safety
/// As [`attend_run`].
#[inline(always)]
unsafe fn widen_rows<'a, L: Lanes, R: Rows<'a>>(
    rows: R,
    positions: Range<usize>,
    cols: usize,
    to: &mut [f32],
) {
    for (position, to) in positions.zip(to.chunks_exact_mut(cols)) {
        let (row, (steps, rest)) = (rows.row(position), to.as_chunks_mut::<LANES>());
        // SAFETY: the caller's.
        unsafe {
            for (step, to) in steps.iter_mut().enumerate() {
                row.full::<L>(step).store(to);
            }
            if !rest.is_empty() {
                let mut padded = [0.0; LANES];
                row.tail::<L>().store(&mut padded);
                rest.copy_from_slice(&padded[..rest.len()]);
            }
        }
    }
}
