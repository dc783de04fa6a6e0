//! The product of floats and a weight matrix of blocks.

use super::LANES;
use super::blocks::{Blocks, PANEL, RUN};
use super::lanes::Lanes;
use super::product::{Output, put};
use std::ops::Range;

/// Bytes that memory is asked for before they are read: to the second cache, and from there to the
/// first.
const FAR: usize = 12 << 10;
const NEAR: usize = 3 << 10;

/// Rows `rows`, from a panel's first one on, with every token, in tiles of R × T.
///
/// # Safety
/// The machine has the instruction set of `L`, and no other thread has these rows.
#[inline(always)]
pub(super) unsafe fn panels<L: Lanes, const R: usize, const T: usize>(
    w: &Blocks,
    x: &[f32],
    bias: Option<&[f32]>,
    rows: Range<usize>,
    out: &Output<'_>,
) {
    // SAFETY of every call: the caller's.
    #[allow(
        clippy::undocumented_unsafe_blocks,
        reason = "one comment for all of them"
    )]
    match w.kind().codes.bits() {
        2 => unsafe { sweep::<L, 2, R, T>(w, x, bias, rows, out) },
        4 => unsafe { sweep::<L, 4, R, T>(w, x, bias, rows, out) },
        _ => unsafe { sweep::<L, 8, R, T>(w, x, bias, rows, out) },
    }
}

/// # Safety
/// As [`panels`].
#[inline(always)]
unsafe fn sweep<L: Lanes, const BITS: usize, const R: usize, const T: usize>(
    w: &Blocks,
    x: &[f32],
    bias: Option<&[f32]>,
    rows: Range<usize>,
    out: &Output<'_>,
) {
    let cols = w.cols();
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    for first in rows.clone().step_by(PANEL) {
        let end = rows.end.min(first + PANEL);
        let mut token = 0;
        while token + T <= tokens {
            let mut some = [x; T];
            for t in 0..T {
                some[t] = &x[(token + t) * cols..][..cols];
            }
            for from in (0..end - first).step_by(R) {
                // SAFETY: the caller's.
                let sums = unsafe { tile::<L, BITS, R, T>(w, first / PANEL, from, some) };
                for (t, sums) in sums.iter().enumerate() {
                    // SAFETY: the caller's.
                    unsafe {
                        put(
                            sums,
                            bias,
                            first + from..end.min(first + from + R),
                            token + t,
                            out,
                        )
                    };
                }
            }
            token += T;
        }
        while token < tokens {
            // SAFETY: the caller's.
            let sums = unsafe {
                tile::<L, BITS, PANEL, 1>(w, first / PANEL, 0, [&x[token * cols..][..cols]])
            };
            // SAFETY: the caller's.
            unsafe { put(&sums[0], bias, first..end, token, out) };
            token += 1;
        }
    }
}

/// The sums of R rows of a panel, from row `from` of it on, with T tokens.
///
/// # Safety
/// The machine has the instruction set of `L`.
#[inline(always)]
unsafe fn tile<L: Lanes, const BITS: usize, const R: usize, const T: usize>(
    w: &Blocks,
    panel: usize,
    from: usize,
    x: [&[f32]; T],
) -> [[f32; R]; T] {
    let steps = 8 / BITS;
    let ((lines, full), (groups, group_lines)) = (w.lines(), w.groups());
    let mut here = [std::ptr::null::<[f32; LANES]>(); T];
    for t in 0..T {
        assert!(
            x[t].len() == w.cols() && from + R <= PANEL,
            "activations of {} columns",
            w.cols()
        );
        here[t] = x[t].as_ptr().cast();
    }
    // Groups all of whose lines are full; there is at most one after them.
    let whole = full.checked_div(group_lines).unwrap_or(0);
    // Without minima, what is added changes nothing, not even the sign of a zero.
    let mut wide = [[0.0; PANEL * RUN], [-0.0; PANEL * RUN]];
    let mut totals = [[0.0; R]; T];
    // SAFETY: the caller has the instruction set; the panel has `lines` lines, of which the first
    // `full` are of columns that each of `x` has.
    unsafe {
        let mut sums = [[L::zero(); R]; T];
        let mut at = w.place(panel);
        for first in (0..groups).step_by(RUN) {
            w.widen::<L>(panel, first, &mut wide);
            for group in 0..RUN.min(whole.saturating_sub(first)) {
                let tables = tables::<L, BITS, R>(w, &wide, group, from);
                for _ in 0..group_lines {
                    L::ask::<false>(at.wrapping_add(FAR));
                    L::ask::<true>(at.wrapping_add(NEAR));
                    add::<L, BITS, R, T>(at, from, &tables, here, steps, &mut sums);
                    at = at.add(64);
                    for here in &mut here {
                        *here = here.add(steps);
                    }
                }
            }
        }
        if whole < groups {
            let tables = tables::<L, BITS, R>(w, &wide, whole % RUN, from);
            for _ in whole * group_lines..full {
                add::<L, BITS, R, T>(at, from, &tables, here, steps, &mut sums);
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
                add::<L, BITS, R, T>(at, from, &tables, here, rest.div_ceil(LANES), &mut sums);
            }
        }
        for t in 0..T {
            for r in 0..R {
                totals[t][r] = sums[t][r].total();
            }
        }
    }
    totals
}

/// The tables of R rows for a group of those that are widened.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn tables<L: Lanes, const BITS: usize, const R: usize>(
    w: &Blocks,
    wide: &[[f32; PANEL * RUN]; 2],
    group: usize,
    from: usize,
) -> [L::Table; R] {
    // SAFETY: the caller's.
    unsafe {
        let mut tables = [L::table::<BITS>(0, 0.0, 0.0); R];
        for (r, table) in tables.iter_mut().enumerate() {
            let at = group * PANEL + from + r;
            *table = L::table::<BITS>(w.kind().offset(), wide[0][at], wide[1][at]);
        }
        tables
    }
}

/// Some steps of a line, at most as many as it has.
///
/// # Safety
/// As [`tile`], and as many steps of activations are at each of `x`.
#[inline(always)]
unsafe fn add<L: Lanes, const BITS: usize, const R: usize, const T: usize>(
    line: *const u8,
    from: usize,
    tables: &[L::Table; R],
    x: [*const [f32; LANES]; T],
    steps: usize,
    sums: &mut [[L; R]; T],
) {
    // SAFETY: the caller's.
    unsafe {
        for r in 0..R {
            let codes = L::codes::<BITS>(line, from + r);
            for step in 0..steps {
                let weights = L::weights::<BITS>(codes, step, tables[r]);
                for t in 0..T {
                    sums[t][r] = sums[t][r].add_product(weights, L::f32(&*x[t].add(step)));
                }
            }
        }
    }
}
