//! The oracle of the tile kernels, in plain Rust.

use super::{PANEL, STEP, STEP_BYTES};

/// Most tokens that a tile kernel takes at once.
pub(crate) const TOKENS: usize = 6;

/// `sums[t][r] += Σ_k code[r, k] · x[t, k]` for the 32 rows of a panel.
///
/// `weights` holds whole steps; `x` holds `tokens` ≤ [`TOKENS`] rows, `stride` bytes apart, each with the columns of those steps.
///
/// # Safety
/// None here: it is `unsafe` to have the type of its faster siblings.
pub(crate) unsafe fn tile(weights: &[u8], x: &[i8], stride: usize, tokens: usize, sums: &mut [[i32; PANEL]; TOKENS]) {
    for (step, weights) in weights.as_chunks::<STEP_BYTES>().0.iter().enumerate() {
        for (token, sums) in sums.iter_mut().enumerate().take(tokens) {
            let x = &x[token * stride + step * STEP..][..STEP];
            for (row, sum) in sums.iter_mut().enumerate() {
                for (i, &x) in x.iter().enumerate() {
                    let code = weights[4 * row + i % 4] >> (2 * (i / 4)) & 3;
                    *sum += i32::from(code) * i32::from(x);
                }
            }
        }
    }
}
