//! The four loops that an instruction set provides, and their plain form.

use super::{PANEL, STEP, STEP_BYTES, STEP_CODES};

/// Most tokens that a tile takes at once.
pub(crate) const TOKENS: usize = 6;

/// The sums of one token with the rows of a panel.
pub(crate) type Sums = [i32; PANEL];

/// The same columns of some tokens, each row `stride` after the one before.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub(crate) values: &'a [i8],
    pub(crate) stride: usize,
}

impl Columns<'_> {
    /// The bound that every tile rests on: `tokens` rows hold `columns` values each, and there are sums for all of them.
    #[inline(always)]
    pub(crate) fn check(&self, columns: usize, tokens: usize) {
        assert!(
            tokens <= TOKENS && (tokens == 0 || (tokens - 1) * self.stride + columns <= self.values.len()),
            "a tile inside the activations"
        );
    }
}

/// The loops of one instruction set. Each is safe to call where the machine has it; bounds are checked once in a call.
pub(crate) struct Tiles {
    /// `sums[t][r] += Σ_k code[r, k] · x[t, k]` from whole steps of the kernel layout, for at most [`TOKENS`] tokens.
    pub(crate) direct: unsafe fn(&[u8], Columns<'_>, &mut [Sums]),
    /// The same from steps that `unpack` made.
    pub(crate) dense: unsafe fn(&[u8], Columns<'_>, &mut [Sums]),
    /// Whole steps, a code in each byte: see [`STEP_CODES`].
    pub(crate) unpack: unsafe fn(&[u8], &mut [u8]),
    /// See [`finish`].
    pub(crate) finish: unsafe fn(&Term<'_>, &Sums, &mut [f32]),
}

/// How the sums of a scale group become outputs.
pub(crate) struct Term<'a> {
    /// The group's scale of each row of the panel.
    pub(crate) scales: &'a [f32; PANEL],
    /// Whether nothing was added to the outputs before.
    pub(crate) first: bool,
    /// In the last group: the token's scale, and the bias of the rows.
    pub(crate) last: Option<(f32, Option<&'a [f32]>)>,
}

/// The plain form.
pub(crate) const SCALAR: Tiles = Tiles { direct, dense, unpack, finish };

fn direct(weights: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
    for (step, weights) in weights.as_chunks::<STEP_BYTES>().0.iter().enumerate() {
        let mut codes = [0; STEP_CODES];
        unpack(weights, &mut codes);
        dense(&codes, Columns { values: &x.values[step * STEP..], ..x }, sums);
    }
}

fn dense(codes: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
    for (token, sums) in sums.iter_mut().enumerate() {
        let x = x.values[token * x.stride..].as_chunks().0;
        for (codes, x) in codes.as_chunks::<{ 4 * PANEL }>().0.iter().zip(x) {
            quad(codes, x, sums);
        }
    }
}

/// Four columns of a panel.
#[inline(always)]
fn quad(codes: &[u8; 4 * PANEL], x: &[i8; 4], sums: &mut Sums) {
    for (codes, sum) in codes.as_chunks::<4>().0.iter().zip(sums) {
        *sum += codes.iter().zip(x).map(|(&c, &x)| i32::from(c) * i32::from(x)).sum::<i32>();
    }
}

#[inline(always)]
pub(crate) fn unpack(weights: &[u8], out: &mut [u8]) {
    for (weights, out) in weights.as_chunks::<STEP_BYTES>().0.iter().zip(out.as_chunks_mut::<STEP_CODES>().0) {
        for (field, out) in out.as_chunks_mut::<STEP_BYTES>().0.iter_mut().enumerate() {
            for (out, &byte) in out.iter_mut().zip(weights) {
                *out = byte >> (2 * field) & 3;
            }
        }
    }
}

/// `out (+)= sum · scale`, and after the last group `out · s_x + bias`: two roundings a group and two at the end.
#[inline(always)]
pub(crate) fn finish(term: &Term<'_>, sums: &Sums, out: &mut [f32]) {
    if term.first {
        out.iter_mut().zip(sums).zip(term.scales).for_each(|((out, &sum), &scale)| *out = sum as f32 * scale);
    } else {
        out.iter_mut().zip(sums).zip(term.scales).for_each(|((out, &sum), &scale)| *out += sum as f32 * scale);
    }
    match term.last {
        None => {}
        Some((scale, None)) => out.iter_mut().for_each(|out| *out *= scale),
        Some((scale, Some(bias))) => out.iter_mut().zip(bias).for_each(|(out, &bias)| *out = *out * scale + bias),
    }
}
