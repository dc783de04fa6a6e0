//! Tiles of integer sums in plain Rust, and what goes into and comes out of one.

use super::coding::{Coding, unpack};
use super::shape::{PANEL, STEP_BYTES};

/// Most tokens that a tile takes at once.
pub(crate) const TOKENS: usize = 6;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Prefetches the cache line at an address, which may be out of bounds.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE, and a prefetch of any address is allowed.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The sums of one token with the rows of a panel.
pub(crate) type PanelSums = [i32; PANEL];

/// The same columns of some tokens, each row `stride` after the one before.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub(crate) values: &'a [i8],
    pub(crate) stride: usize,
}

impl Columns<'_> {
    /// Checks what every tile rests on: at most [`TOKENS`] tokens, `columns` values for each.
    ///
    /// # Panics
    /// If there are fewer values.
    #[inline(always)]
    pub(crate) fn check(&self, columns: usize, tokens: usize) {
        assert!(
            tokens <= TOKENS
                && (tokens == 0 || (tokens - 1) * self.stride + columns <= self.values.len()),
            "a tile inside the activations"
        );
    }
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

/// `sums[t][r] += Σ_k factor · code[r, k] · x[t, k]` from whole steps of the kernel layout, for at
/// most [`TOKENS`] tokens.
pub(crate) fn packed_sums(coding: Coding, weights: &[u8], x: Columns<'_>, sums: &mut [PanelSums]) {
    unpack_and_sum(coding, weights, x, sums, |codes, x, sums| {
        unpacked_sums(coding.most(), codes, x, sums)
    });
}

/// Unpacks some steps at a time and hands the codes to `add`.
#[inline(always)]
pub(crate) fn unpack_and_sum(
    coding: Coding,
    weights: &[u8],
    x: Columns<'_>,
    sums: &mut [PanelSums],
    mut add: impl FnMut(&[u8], Columns<'_>, &mut [PanelSums]),
) {
    const STEPS: usize = 4;
    let mut codes = [0; STEPS * 8 * STEP_BYTES];
    for (i, weights) in weights.chunks(STEPS * STEP_BYTES).enumerate() {
        let codes = &mut codes[..weights.len() * coding.fields()];
        unpack(coding, weights, codes);
        add(
            codes,
            Columns {
                values: &x.values[i * STEPS * coding.step()..],
                ..x
            },
            sums,
        );
    }
}

/// `sums[t][r] += Σ_k code[r, k] · x[t, k]` from bytes that [`unpack`] made, none above the number.
pub(crate) fn unpacked_sums(_: usize, codes: &[u8], x: Columns<'_>, sums: &mut [PanelSums]) {
    x.check(codes.len() / STEP_BYTES * 4, sums.len());
    for (token, sums) in sums.iter_mut().enumerate() {
        let x = x.values[token * x.stride..].as_chunks().0;
        for (codes, x) in codes.as_chunks::<STEP_BYTES>().0.iter().zip(x) {
            quad(codes, x, sums);
        }
    }
}

/// Four columns of a panel. On the way to a sum that fits, the numbers may wrap.
#[inline(always)]
fn quad(codes: &[u8; STEP_BYTES], x: &[i8; 4], sums: &mut PanelSums) {
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
pub(crate) fn finish(term: &Term<'_>, sums: &PanelSums, out: &mut [f32]) {
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
