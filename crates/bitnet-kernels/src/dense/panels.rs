//! The product of floats and a weight matrix of blocks.

use super::blocks::{Blocks, PANEL, RUN};
use super::lanes::{LANES, Lanes};
use super::tile::write_sums;
use crate::parallel::ColumnsMut;

/// Bytes by which prefetches are ahead of the codes: into the second cache, and from there into the
/// first.
const FAR: usize = 12 << 10;
const NEAR: usize = 3 << 10;

/// Every token times the rows of weights that are the columns of `out`, whole panels but for the
/// last rows, in tiles of R × T.
#[inline(always)]
pub(super) fn panels<L: Lanes, const R: usize, const T: usize>(
    lanes: L,
    w: &Blocks,
    x: &[f32],
    bias: Option<&[f32]>,
    out: &mut ColumnsMut<'_, f32>,
) {
    match w.kind().codes.bits() {
        2 => sweep::<L, 2, R, T>(lanes, w, x, bias, out),
        4 => sweep::<L, 4, R, T>(lanes, w, x, bias, out),
        _ => sweep::<L, 8, R, T>(lanes, w, x, bias, out),
    }
}

#[inline(always)]
fn sweep<L: Lanes, const BITS: usize, const R: usize, const T: usize>(
    lanes: L,
    w: &Blocks,
    x: &[f32],
    bias: Option<&[f32]>,
    out: &mut ColumnsMut<'_, f32>,
) {
    let (rows, cols) = (out.columns(), w.cols());
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    for first in rows.clone().step_by(PANEL) {
        let end = rows.end.min(first + PANEL);
        let panel = first / PANEL;
        let mut token = 0;
        while token + T <= tokens {
            let mut some = [x; T];
            for t in 0..T {
                some[t] = &x[(token + t) * cols..][..cols];
            }
            for from in (0..end - first).step_by(R) {
                let sums = tile::<L, BITS, R, T>(lanes, w, panel, from, some);
                let rows = first + from..end.min(first + from + R);
                for (t, sums) in sums.iter().enumerate() {
                    write_sums(sums, bias, rows.clone(), token + t, out);
                }
            }
            token += T;
        }
        while token < tokens {
            let here = [&x[token * cols..][..cols]];
            let sums = tile::<L, BITS, PANEL, 1>(lanes, w, panel, 0, here);
            write_sums(&sums[0], bias, first..end, token, out);
            token += 1;
        }
    }
}

/// The sums of R rows of a panel, from row `from` of it on, with T tokens.
#[inline(always)]
fn tile<L: Lanes, const BITS: usize, const R: usize, const T: usize>(
    lanes: L,
    w: &Blocks,
    panel: usize,
    from: usize,
    x: [&[f32]; T],
) -> [[f32; R]; T] {
    assert!(
        w.kind().codes.bits() == BITS && from + R <= PANEL,
        "rows of a panel"
    );
    let steps = 8 / BITS;
    let ((lines, full), (groups, group_lines)) = (w.lines(), w.groups());
    let mut here = [std::ptr::null::<[f32; LANES]>(); T];
    for t in 0..T {
        assert!(
            x[t].len() == w.cols(),
            "activations of {} columns",
            w.cols()
        );
        here[t] = x[t].as_ptr().cast();
    }
    // Groups all of whose lines are full; there is at most one after them.
    let whole = full.checked_div(group_lines).unwrap_or(0);
    // Without minima −0 is added, which changes nothing, not even the sign of a zero.
    let mut wide = [[0.0; PANEL * RUN], [-0.0; PANEL * RUN]];
    let mut totals = [[0.0; R]; T];
    // SAFETY: `at` goes through the lines of the panel, after which `Blocks` keeps one more. The
    // loops over whole groups and then over the rest add up to `full` lines, whose columns each of
    // `x` has by the assertion above; the last line reads `padded`, which has all its steps.
    unsafe {
        let mut sums = [[lanes.zero(); R]; T];
        let mut at = w.panel_start(panel);
        for first in (0..groups).step_by(RUN) {
            w.widen(lanes, panel, first, &mut wide);
            for group in 0..RUN.min(whole.saturating_sub(first)) {
                let tables = tables::<L, BITS, R>(lanes, w, &wide, group, from);
                for _ in 0..group_lines {
                    lanes.prefetch::<false>(at.wrapping_add(FAR));
                    lanes.prefetch::<true>(at.wrapping_add(NEAR));
                    add_line::<L, BITS, R, T>(lanes, at, from, &tables, here, steps, &mut sums);
                    at = at.add(64);
                    for here in &mut here {
                        *here = here.add(steps);
                    }
                }
            }
        }
        if whole < groups {
            let tables = tables::<L, BITS, R>(lanes, w, &wide, whole % RUN, from);
            for _ in whole * group_lines..full {
                add_line::<L, BITS, R, T>(lanes, at, from, &tables, here, steps, &mut sums);
                at = at.add(64);
                for here in &mut here {
                    *here = here.add(steps);
                }
            }
            // The line in which a row ends.
            if full < lines {
                let rest = w.cols() - full * steps * LANES;
                let mut padded = [[[0.0; LANES]; 8]; T];
                for t in 0..T {
                    padded[t].as_flattened_mut()[..rest]
                        .copy_from_slice(&x[t][full * steps * LANES..]);
                    here[t] = padded[t].as_ptr();
                }
                add_line::<L, BITS, R, T>(
                    lanes,
                    at,
                    from,
                    &tables,
                    here,
                    rest.div_ceil(LANES),
                    &mut sums,
                );
            }
        }
        for t in 0..T {
            for r in 0..R {
                totals[t][r] = lanes.total(sums[t][r]);
            }
        }
    }
    totals
}

/// The tables of R rows for one of the widened groups.
#[inline(always)]
fn tables<L: Lanes, const BITS: usize, const R: usize>(
    lanes: L,
    w: &Blocks,
    wide: &[[f32; PANEL * RUN]; 2],
    group: usize,
    from: usize,
) -> [L::Table; R] {
    let mut tables = [lanes.table::<BITS>(0, 0.0, 0.0); R];
    for (r, table) in tables.iter_mut().enumerate() {
        let at = group * PANEL + from + r;
        *table = lanes.table::<BITS>(w.kind().offset(), wide[0][at], wide[1][at]);
    }
    tables
}

/// Adds the first `steps` steps of a line.
///
/// # Safety
/// `from + R` is at most 4, 67 bytes at `line` are readable, and `steps` steps of activations at
/// each of `x`.
#[inline(always)]
unsafe fn add_line<L: Lanes, const BITS: usize, const R: usize, const T: usize>(
    lanes: L,
    line: *const u8,
    from: usize,
    tables: &[L::Table; R],
    x: [*const [f32; LANES]; T],
    steps: usize,
    sums: &mut [[L::Floats; R]; T],
) {
    for r in 0..R {
        // SAFETY: the function's contract: the row is below 4, and 67 bytes are readable.
        let codes = unsafe { lanes.codes::<BITS>(line, from + r) };
        for step in 0..steps {
            let weights = lanes.weights::<BITS>(codes, step, tables[r]);
            for t in 0..T {
                // SAFETY: the function's contract: `step < steps`.
                let x = lanes.f32(unsafe { &*x[t].add(step) });
                sums[t][r] = lanes.add_product(sums[t][r], weights, x);
            }
        }
    }
}
