//! The loops that an instruction set provides, and their plain form.

use super::coding::{Coding, unpack};
use super::float::{self, Float};
use super::{PANEL, STEP_BYTES};

/// Most tokens that a tile takes at once.
pub(crate) const TOKENS: usize = 6;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Asks for the cache line at an address, which may lie anywhere.
#[inline(always)]
pub(crate) fn ask(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE, and a prefetch reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The sums of one token with the rows of a panel.
pub(crate) type Sums = [i32; PANEL];

/// The same columns of some tokens, each row `stride` after the one before.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub(crate) values: &'a [i8],
    pub(crate) stride: usize,
}

impl Columns<'_> {
    /// The bound that every tile rests on: `tokens` rows hold `columns` values each, and there are
    /// sums for all of them.
    #[inline(always)]
    pub(crate) fn check(&self, columns: usize, tokens: usize) {
        assert!(
            tokens <= TOKENS
                && (tokens == 0 || (tokens - 1) * self.stride + columns <= self.values.len()),
            "a tile inside the activations"
        );
    }
}

/// The loops of one instruction set. Each is safe to call where the machine has it; bounds are
/// checked once in a call.
pub(crate) struct Tiles {
    /// `sums[t][r] += Σ_k factor · code[r, k] · x[t, k]` from whole steps of the kernel layout, for
    /// at most [`TOKENS`] tokens.
    pub(crate) direct: unsafe fn(Coding, &[u8], Columns<'_>, &mut [Sums]),
    /// The same from bytes that `unpack` made, none above the number.
    pub(crate) dense: unsafe fn(usize, &[u8], Columns<'_>, &mut [Sums]),
    /// Whole steps, a code in each byte: [`unpack`].
    pub(crate) unpack: unsafe fn(Coding, &[u8], &mut [u8]),
    /// See [`finish`].
    pub(crate) finish: unsafe fn(&Term<'_>, &Sums, &mut [f32]),
    /// Products with float activations: [`float::plain`].
    pub(crate) float: unsafe fn(&[u8], Float<'_>, &mut float::Sums),
}

/// How the sums of a scale group become outputs.
pub(crate) struct Term<'a> {
    /// The group's scale of each row of the panel.
    pub(crate) scales: &'a [f32; PANEL],
    /// Scale times float zero point of each row, and the sum of the group's activations that it
    /// meets.
    pub(crate) shift: Option<(&'a [f32; PANEL], i32)>,
    /// Whether nothing was added to the outputs before.
    pub(crate) first: bool,
    /// In the last group: the token's scale, and the bias of the rows.
    pub(crate) last: Option<(f32, Option<&'a [f32]>)>,
}

/// The plain form.
pub(crate) const SCALAR: Tiles = Tiles {
    direct,
    dense,
    unpack,
    finish,
    float: float::plain,
};

fn direct(coding: Coding, weights: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
    by_unpacking(coding, weights, x, sums, |codes, x, sums| {
        dense(coding.most(), codes, x, sums)
    });
}

/// Unpacks step by step and hands the codes to `dense`.
#[inline(always)]
pub(crate) fn by_unpacking(
    coding: Coding,
    weights: &[u8],
    x: Columns<'_>,
    sums: &mut [Sums],
    mut dense: impl FnMut(&[u8], Columns<'_>, &mut [Sums]),
) {
    const STEPS: usize = 4;
    let mut codes = [0; STEPS * 8 * STEP_BYTES];
    for (i, weights) in weights.chunks(STEPS * STEP_BYTES).enumerate() {
        let codes = &mut codes[..weights.len() * coding.fields()];
        unpack(coding, weights, codes);
        dense(
            codes,
            Columns {
                values: &x.values[i * STEPS * coding.step()..],
                ..x
            },
            sums,
        );
    }
}

fn dense(_: usize, codes: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
    for (token, sums) in sums.iter_mut().enumerate() {
        let x = x.values[token * x.stride..].as_chunks().0;
        for (codes, x) in codes.as_chunks::<STEP_BYTES>().0.iter().zip(x) {
            quad(codes, x, sums);
        }
    }
}

/// Four columns of a panel. On the way to a sum that fits, the numbers may wrap.
#[inline(always)]
fn quad(codes: &[u8; STEP_BYTES], x: &[i8; 4], sums: &mut Sums) {
    for (codes, sum) in codes.as_chunks::<4>().0.iter().zip(sums) {
        *sum = sum.wrapping_add(
            codes
                .iter()
                .zip(x)
                .map(|(&c, &x)| i32::from(c) * i32::from(x))
                .sum::<i32>(),
        );
    }
}

/// `out (+)= sum · scale − shift · Σx`, and after the last group `out · s_x + bias`.
#[inline(always)]
pub(crate) fn finish(term: &Term<'_>, sums: &Sums, out: &mut [f32]) {
    if let (true, None, Some((last, None))) = (term.first, term.shift, term.last) {
        return out
            .iter_mut()
            .zip(sums)
            .zip(term.scales)
            .for_each(|((out, &sum), &scale)| *out = sum as f32 * scale * last);
    }
    match (term.first, term.shift) {
        (true, None) => out
            .iter_mut()
            .zip(sums)
            .zip(term.scales)
            .for_each(|((out, &sum), &scale)| *out = sum as f32 * scale),
        (false, None) => out
            .iter_mut()
            .zip(sums)
            .zip(term.scales)
            .for_each(|((out, &sum), &scale)| *out += sum as f32 * scale),
        (first, Some((shifts, x))) => {
            for (((out, &sum), &scale), &shift) in
                out.iter_mut().zip(sums).zip(term.scales).zip(shifts)
            {
                let value = sum as f32 * scale - shift * x as f32;
                *out = if first { value } else { *out + value };
            }
        }
    }
    match term.last {
        None => {}
        Some((scale, None)) => out.iter_mut().for_each(|out| *out *= scale),
        Some((scale, Some(bias))) => out
            .iter_mut()
            .zip(bias)
            .for_each(|(out, &bias)| *out = *out * scale + bias),
    }
}
