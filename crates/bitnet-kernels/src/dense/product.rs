//! The product of floats and a weight matrix of floats.

use super::LANES;
use super::lanes::Lanes;
use super::matrix::{Brains, Data, Floats, Halves, Matrix, Row, Rows, tail};
use super::panels::panels;
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes that memory is asked for beyond the tile after this one's beginning.
const AHEAD: usize = 4 << 10;

/// A matrix `[M, N]`, of whose rows each thread writes other columns.
pub(super) struct Output<'a> {
    data: *mut f32,
    tokens: usize,
    cols: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: `Output::columns`, the only access, is for one thread a column.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub(super) fn new(out: &'a mut [f32], tokens: usize, cols: usize) -> Self {
        assert_eq!(
            Some(out.len()),
            tokens.checked_mul(cols),
            "the length of a product of {tokens} × {cols}"
        );
        Self {
            data: out.as_mut_ptr(),
            tokens,
            cols,
            borrowed: PhantomData,
        }
    }

    /// Some columns in the row of one token.
    ///
    /// # Safety
    /// No other thread has these columns, and this one holds no other slice of them.
    #[expect(
        clippy::mut_from_ref,
        reason = "threads share the matrix and write different columns"
    )]
    unsafe fn columns(&self, token: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(
            token < self.tokens && columns.start <= columns.end && columns.end <= self.cols,
            "columns of the output"
        );
        // SAFETY: they lie inside row `token` of the borrowed slice, whose length `new` checked;
        // the caller vouches for the rest.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.data.add(token * self.cols + columns.start),
                columns.len(),
            )
        }
    }
}

/// Rows `rows` of the weights with every token, in tiles of R × T.
///
/// # Safety
/// The machine has the instruction set of `L`, and no other thread has these rows.
#[inline(always)]
pub(super) unsafe fn product<L: Lanes, const R: usize, const T: usize>(
    w: &Matrix,
    x: &[f32],
    bias: Option<&[f32]>,
    rows: Range<usize>,
    out: &Output<'_>,
) {
    let cols = w.cols();
    // SAFETY of every call: the caller's.
    #[allow(
        clippy::undocumented_unsafe_blocks,
        reason = "one comment for all of them"
    )]
    match w.data() {
        Data::F32(all) => unsafe {
            sweep::<L, _, R, T>(Floats { all, cols }, cols, x, bias, rows, out)
        },
        Data::F16(all) => unsafe {
            sweep::<L, _, R, T>(Halves { all, cols }, cols, x, bias, rows, out)
        },
        Data::Bf16(all) => unsafe {
            sweep::<L, _, R, T>(Brains { all, cols }, cols, x, bias, rows, out)
        },
        Data::Blocks(blocks) => unsafe { panels::<L, R, T>(blocks, x, bias, rows, out) },
    }
}

/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn sweep<'a, L: Lanes, W: Rows<'a>, const R: usize, const T: usize>(
    w: W,
    cols: usize,
    x: &[f32],
    bias: Option<&[f32]>,
    rows: Range<usize>,
    out: &Output<'_>,
) {
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    let mut row = rows.start;
    while row < rows.end {
        let count = R.min(rows.end - row);
        // A tile that sticks out computes its last row again.
        let mut tile_rows = [w.row(row); R];
        for (r, tile_row) in tile_rows.iter_mut().enumerate() {
            *tile_row = w.row(row + r.min(count - 1));
        }
        // The rows of a tile lie side by side: what it reads, in whatever order, is as long as what
        // is asked for meanwhile.
        let (place, bytes) = w.place(row);
        let ahead = (place.wrapping_add(R * bytes + AHEAD), R * W::STEP);
        let mut token = 0;
        while token + T <= tokens {
            let mut some = [x; T];
            for t in 0..T {
                some[t] = &x[(token + t) * cols..][..cols];
            }
            // SAFETY: the caller's.
            let sums = unsafe { tile::<L, _, R, T>(tile_rows, some, cols, ahead) };
            for (t, sums) in sums.iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { put(sums, bias, row..row + count, token + t, out) };
            }
            token += T;
        }
        while token < tokens {
            // SAFETY: the caller's.
            let sums =
                unsafe { tile::<L, _, R, 1>(tile_rows, [&x[token * cols..][..cols]], cols, ahead) };
            // SAFETY: the caller's.
            unsafe { put(&sums[0], bias, row..row + count, token, out) };
            token += 1;
        }
        row += count;
    }
}

/// Writes the sums of one token with some rows.
///
/// # Safety
/// No other thread has these rows.
#[inline(always)]
pub(super) unsafe fn put(
    sums: &[f32],
    bias: Option<&[f32]>,
    rows: Range<usize>,
    token: usize,
    out: &Output<'_>,
) {
    // SAFETY: the caller's, and the slice ends with this call.
    let out = unsafe { out.columns(token, rows.clone()) };
    match bias {
        None => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum),
        Some(bias) => out
            .iter_mut()
            .zip(sums)
            .zip(&bias[rows])
            .for_each(|((out, &sum), &bias)| *out = sum + bias),
    }
}

/// The sums of R rows with T tokens. Beside step i, bytes `ahead.1 · i` to `ahead.1 · (i + 1)`
/// after `ahead.0` are asked for.
///
/// # Safety
/// The machine has the instruction set of `L`, and the rows have `cols` columns.
#[inline(always)]
pub(super) unsafe fn tile<L: Lanes, W: Row, const R: usize, const T: usize>(
    w: [W; R],
    x: [&[f32]; T],
    cols: usize,
    ahead: (*const u8, usize),
) -> [[f32; R]; T] {
    let steps = cols / LANES;
    let mut floats: [&[[f32; LANES]]; T] = [&[]; T];
    for t in 0..T {
        assert!(x[t].len() == cols, "activations of {cols} columns");
        floats[t] = x[t].as_chunks().0;
    }
    let mut totals = [[0.0; R]; T];
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[L::zero(); R]; T];
        for pair in 0..steps / 2 {
            for line in 0..(2 * ahead.1).div_ceil(64) {
                L::ask::<false>(ahead.0.wrapping_add(2 * pair * ahead.1 + 64 * line));
            }
            add::<L, W, R, T>(w, floats, 2 * pair, &mut sums);
            add::<L, W, R, T>(w, floats, 2 * pair + 1, &mut sums);
        }
        if steps % 2 == 1 {
            add::<L, W, R, T>(w, floats, steps - 1, &mut sums);
        }
        if !cols.is_multiple_of(LANES) {
            let mut rows = [L::zero(); R];
            for r in 0..R {
                rows[r] = w[r].tail();
            }
            for t in 0..T {
                let x = L::f32(&tail(x[t]));
                for r in 0..R {
                    sums[t][r] = sums[t][r].add_product(rows[r], x);
                }
            }
        }
        if R * T == 16 {
            let mut all = [L::zero(); 16];
            for (i, sum) in all.iter_mut().enumerate() {
                *sum = sums[i / R][i % R];
            }
            for (i, total) in L::totals(&all).into_iter().enumerate() {
                totals[i / R][i % R] = total;
            }
        } else {
            for t in 0..T {
                for r in 0..R {
                    totals[t][r] = sums[t][r].total();
                }
            }
        }
    }
    totals
}

/// One full step of a tile.
///
/// # Safety
/// As [`tile`], and every row and every token has the step in full.
#[inline(always)]
unsafe fn add<L: Lanes, W: Row, const R: usize, const T: usize>(
    w: [W; R],
    x: [&[[f32; LANES]]; T],
    step: usize,
    sums: &mut [[L; R]; T],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut rows = [L::zero(); R];
        for r in 0..R {
            rows[r] = w[r].full(step);
        }
        for t in 0..T {
            let x = L::f32(x[t].get_unchecked(step));
            for r in 0..R {
                sums[t][r] = sums[t][r].add_product(rows[r], x);
            }
        }
    }
}
