//! The product of floats and a weight matrix.

use super::matrix::{Blocks, Brains, Data, Floats, Halves, Matrix, Row, Rows, padded};
use super::{LANES, Step, total};
use std::marker::PhantomData;
use std::ops::Range;

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
        assert_eq!(Some(out.len()), tokens.checked_mul(cols), "the length of a product of {tokens} × {cols}");
        Self { data: out.as_mut_ptr(), tokens, cols, borrowed: PhantomData }
    }

    /// Some columns in the row of one token.
    ///
    /// # Safety
    /// No other thread has these columns, and this one holds no other slice of them.
    #[expect(clippy::mut_from_ref, reason = "threads share the matrix and write different columns")]
    unsafe fn columns(&self, token: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(token < self.tokens && columns.start <= columns.end && columns.end <= self.cols, "columns of the output");
        // SAFETY: they lie inside row `token` of the borrowed slice, whose length `new` checked; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(token * self.cols + columns.start), columns.len()) }
    }
}

/// Rows `rows` of the weights with every token, in tiles of R × T. Each range of rows belongs to one thread.
#[inline(always)]
pub(super) fn product<const R: usize, const T: usize>(
    w: &Matrix,
    x: &[f32],
    bias: Option<&[f32]>,
    rows: Range<usize>,
    out: &Output<'_>,
) {
    let cols = w.cols();
    match w.data() {
        Data::F32(all) => sweep::<_, R, T>(Floats { all, cols }, cols, x, bias, rows, out),
        Data::F16(all) => sweep::<_, R, T>(Halves { all, cols }, cols, x, bias, rows, out),
        Data::Bf16(all) => sweep::<_, R, T>(Brains { all, cols }, cols, x, bias, rows, out),
        Data::Int8 { values, scales } => sweep::<_, R, T>(Blocks { values, scales, cols }, cols, x, bias, rows, out),
    }
}

#[inline(always)]
fn sweep<'a, W: Rows<'a>, const R: usize, const T: usize>(
    w: W,
    cols: usize,
    x: &[f32],
    bias: Option<&[f32]>,
    rows: Range<usize>,
    out: &Output<'_>,
) {
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    let x = |token: usize| &x[token * cols..][..cols];
    let mut row = rows.start;
    while row < rows.end {
        let count = R.min(rows.end - row);
        // A tile that sticks out computes its last row again.
        let tile_rows: [W::Row; R] = std::array::from_fn(|r| w.row(row + r.min(count - 1)));
        let put = |token: usize, sums: [f32; R]| {
            // SAFETY: these rows of the weights are columns of this thread alone, and the slice ends with this call.
            let out = unsafe { out.columns(token, row..row + count) };
            for (r, out) in out.iter_mut().enumerate() {
                *out = sums[r] + bias.map_or(0.0, |b| b[row + r]);
            }
        };
        let mut token = 0;
        while token + T <= tokens {
            let sums = tile::<_, R, T>(tile_rows, std::array::from_fn(|t| x(token + t)), cols);
            sums.into_iter().enumerate().for_each(|(t, sums)| put(token + t, sums));
            token += T;
        }
        while token < tokens {
            put(token, tile::<_, R, 1>(tile_rows, [x(token)], cols)[0]);
            token += 1;
        }
        row += count;
    }
}

/// The sums of R rows with T tokens.
#[inline(always)]
pub(super) fn tile<W: Row, const R: usize, const T: usize>(w: [W; R], x: [&[f32]; T], cols: usize) -> [[f32; R]; T] {
    let mut sums: [[Step; R]; T] = [[[0.0; LANES]; R]; T];
    for step in 0..cols.div_ceil(LANES) {
        let w: [Step; R] = w.map(|w| w.step(step));
        for t in 0..T {
            let x = padded(x[t], step);
            for r in 0..R {
                for lane in 0..LANES {
                    sums[t][r][lane] = w[r][lane].mul_add(x[lane], sums[t][r][lane]);
                }
            }
        }
    }
    sums.map(|sums| sums.map(total))
}
