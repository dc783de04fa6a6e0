//! The product of floats and a weight matrix of floats.

use super::lanes::Lanes;
use super::matrix::{DenseData, DenseMatrix};
use super::panels::panels;
use super::rows::{Brains, Floats, Halves, RowSource};
use super::tile::{tile, write_sums};
use crate::parallel::ColumnsMut;

/// Bytes by which prefetches are ahead of the beginning of the next tile.
const AHEAD: usize = 4 << 10;

/// Every token times the rows of weights that are the columns of `out`, in tiles of R × T.
#[inline(always)]
pub(crate) fn product<L: Lanes, const R: usize, const T: usize>(
    lanes: L,
    w: &DenseMatrix,
    x: &[f32],
    bias: Option<&[f32]>,
    out: &mut ColumnsMut<'_, f32>,
) {
    let cols = w.cols();
    match w.data() {
        DenseData::F32(all) => sweep::<L, _, R, T>(lanes, Floats { all, cols }, x, bias, out),
        DenseData::F16(all) => sweep::<L, _, R, T>(lanes, Halves { all, cols }, x, bias, out),
        DenseData::Bf16(all) => sweep::<L, _, R, T>(lanes, Brains { all, cols }, x, bias, out),
        DenseData::Blocks(blocks) => panels::<L, R, T>(lanes, blocks, x, bias, out),
    }
}

#[inline(always)]
fn sweep<'a, L: Lanes, W: RowSource<'a>, const R: usize, const T: usize>(
    lanes: L,
    w: W,
    x: &[f32],
    bias: Option<&[f32]>,
    out: &mut ColumnsMut<'_, f32>,
) {
    let (rows, cols) = (out.columns(), w.cols());
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    let mut row = rows.start;
    while row < rows.end {
        let count = R.min(rows.end - row);
        // A tile that sticks out computes its last row again.
        let mut tile_rows = [w.row(row); R];
        for (r, tile_row) in tile_rows.iter_mut().enumerate() {
            *tile_row = w.row(row + r.min(count - 1));
        }
        // The rows of a tile lie side by side: a tile reads and prefetches the same number of
        // bytes.
        let (place, bytes) = w.place(row);
        let ahead = (place.wrapping_add(R * bytes + AHEAD), R * W::STEP);
        let mut token = 0;
        while token + T <= tokens {
            let mut some = [x; T];
            for t in 0..T {
                some[t] = &x[(token + t) * cols..][..cols];
            }
            let sums = tile::<L, _, R, T>(lanes, tile_rows, some, ahead);
            for (t, sums) in sums.iter().enumerate() {
                write_sums(sums, bias, row..row + count, token + t, out);
            }
            token += T;
        }
        while token < tokens {
            let here = [&x[token * cols..][..cols]];
            let sums = tile::<L, _, R, 1>(lanes, tile_rows, here, ahead);
            write_sums(&sums[0], bias, row..row + count, token, out);
            token += 1;
        }
        row += count;
    }
}
