//! A register tile: some rows of weights times some tokens.

use super::lanes::{LANES, Lanes};
use super::rows::{RowSteps, tail};
use crate::parallel::ColumnsMut;
use std::ops::Range;

/// Writes the sums of one token with some rows.
#[inline(always)]
pub(super) fn write_sums(
    sums: &[f32],
    bias: Option<&[f32]>,
    rows: Range<usize>,
    token: usize,
    out: &mut ColumnsMut<'_, f32>,
) {
    let out = out.row(token, rows.clone());
    match bias {
        None => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum),
        Some(bias) => out
            .iter_mut()
            .zip(sums)
            .zip(&bias[rows])
            .for_each(|((out, &sum), &bias)| *out = sum + bias),
    }
}

/// The sums of R rows with T tokens, all of the same number of columns. Beside step i, bytes
/// `ahead.1 · i` to `ahead.1 · (i + 1)` after `ahead.0` are prefetched.
///
/// # Panics
/// If rows and tokens have different numbers of columns.
#[inline(always)]
pub(super) fn tile<L: Lanes, W: RowSteps, const R: usize, const T: usize>(
    lanes: L,
    w: [W; R],
    x: [&[f32]; T],
    ahead: (*const u8, usize),
) -> [[f32; R]; T] {
    let cols = x[0].len();
    let steps = cols / LANES;
    for w in w {
        assert!(w.cols() == cols, "weights of {cols} columns");
    }
    let mut floats: [&[[f32; LANES]]; T] = [&[]; T];
    for t in 0..T {
        assert!(x[t].len() == cols, "activations of {cols} columns");
        floats[t] = x[t].as_chunks().0;
    }
    let mut totals = [[0.0; R]; T];
    let mut sums = [[lanes.zero(); R]; T];
    for pair in 0..steps / 2 {
        for line in 0..(2 * ahead.1).div_ceil(64) {
            let at = ahead.0.wrapping_add(2 * pair * ahead.1 + 64 * line);
            lanes.prefetch::<false>(at);
        }
        // SAFETY: both steps are below `steps`, and the assertions above give every row and every
        // token `steps` full ones.
        unsafe {
            add_step(lanes, w, floats, 2 * pair, &mut sums);
            add_step(lanes, w, floats, 2 * pair + 1, &mut sums);
        }
    }
    if steps % 2 == 1 {
        // SAFETY: the assertions above give every row and every token `steps` full steps.
        unsafe { add_step(lanes, w, floats, steps - 1, &mut sums) };
    }
    if !cols.is_multiple_of(LANES) {
        let mut rows = [lanes.zero(); R];
        for r in 0..R {
            rows[r] = w[r].tail(lanes);
        }
        for t in 0..T {
            let x = lanes.f32(&tail(x[t]));
            for r in 0..R {
                sums[t][r] = lanes.add_product(sums[t][r], rows[r], x);
            }
        }
    }
    if R * T == 16 {
        let mut all = [lanes.zero(); 16];
        for (i, sum) in all.iter_mut().enumerate() {
            *sum = sums[i / R][i % R];
        }
        for (i, total) in lanes.totals(&all).into_iter().enumerate() {
            totals[i / R][i % R] = total;
        }
    } else {
        for t in 0..T {
            for r in 0..R {
                totals[t][r] = lanes.total(sums[t][r]);
            }
        }
    }
    totals
}

/// One full step of a tile.
///
/// # Safety
/// Every row and every token has the step in full.
#[inline(always)]
unsafe fn add_step<L: Lanes, W: RowSteps, const R: usize, const T: usize>(
    lanes: L,
    w: [W; R],
    x: [&[[f32; LANES]]; T],
    step: usize,
    sums: &mut [[L::Floats; R]; T],
) {
    let mut rows = [lanes.zero(); R];
    for r in 0..R {
        // SAFETY: the function's contract: every row has the step in full.
        rows[r] = unsafe { w[r].full(lanes, step) };
    }
    for t in 0..T {
        // SAFETY: the function's contract: every token has the step in full.
        let x = lanes.f32(unsafe { x[t].get_unchecked(step) });
        for r in 0..R {
            sums[t][r] = lanes.add_product(sums[t][r], rows[r], x);
        }
    }
}
