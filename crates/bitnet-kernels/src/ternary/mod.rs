//! W1.58A8: ternary weights times int8 activations, from a private kernel layout.
//!
//! ```text
//! Y[M, N] = s_x[m] · Σ_g s_w[n, g] · Σ_{k in g} q[n, k] · x[m, k]  (+ bias[n])
//! ```
//!
//! The inner sums are exact in i32 and the same on every instruction set; only the two scales are applied in f32. Weights are stored as
//! codes `q + 1` in 0 … 2, so that unsigned × signed byte products can be used, and `Σ x` is subtracted once.
//!
//! # Kernel layout
//!
//! Rows go in panels of [`PANEL`] = 32, columns in steps of [`STEP`] = 16. A panel is a run of steps, a step is 128 bytes: lane r (4 bytes)
//! belongs to row r of the panel, and field f (bits 2f, 2f+1) of its byte b to column 4f + b of the step.
//!
//! ```text
//! byte  4r + b of a step, bits 2f..2f+2  =  code of row r, column 4f + b        r < 32, b < 4, f < 4
//! ```
//!
//! So one load holds 16 rows × 16 columns, an `and` with 0x03, 0x0c, 0x30 or 0xc0 leaves one field in place (the sums of the upper three are
//! shifted down at the end, which is exact because each is a multiple of its power of 4), and the activations that meet a field are the
//! same 4 bytes for every lane. Each scale group begins at a new step; missing rows and columns hold code 1, the value 0.

mod prepacked;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use prepacked::{Activations, Prepacked};

use crate::{Isa, Kernels};

/// Rows of a panel.
pub const PANEL: usize = 32;
/// Columns of a step.
pub const STEP: usize = 16;
/// Bytes of a step: [`PANEL`] rows of [`STEP`] two-bit codes.
pub(crate) const STEP_BYTES: usize = PANEL * STEP / 4;
/// Most steps that are summed before fields are shifted down: beside code 2 · 64 in the top field and |x| = 128, four products a step.
pub(crate) const BLOCK_STEPS: usize = 1 << 14;
/// Most columns of a matrix.
pub const MAX_COLS: usize = 1 << 22;

// The top field holds its code times 64: one step adds at most 4 · (2 · 64) · 128 in magnitude to a lane.
const _: () = assert!(BLOCK_STEPS as i64 * 4 * (2 * 64) * 128 <= i32::MAX as i64);
// Over all columns a code of 2 times 128, and the correction Σx.
const _: () = assert!(MAX_COLS as i64 * 2 * 128 <= i32::MAX as i64);

impl Kernels {
    /// Integer sums `Σ_k q[n, k] · x[m, k]` over all columns, `[M, N]` row-major: what the exactness of every instruction set is judged by.
    ///
    /// # Panics
    /// If `x` was not laid out for `w`, or `out` is not `M · N` long.
    pub fn ternary_sums(&self, w: &Prepacked, x: &Activations, out: &mut [i32]) {
        w.check(x);
        assert_eq!(out.len(), x.rows() * w.rows(), "sums of {} × {}", x.rows(), w.rows());
        out.fill(0);
        let n = w.rows();
        self.each_tile(w, x, 0..w.panels(), |panel, token, _, sums| {
            let first = panel * PANEL;
            let count = PANEL.min(n - first);
            for (out, sum) in out[token * n + first..][..count].iter_mut().zip(sums) {
                *out += sum;
            }
        });
    }

    /// `Y = X · Wᵀ + bias`, `[M, N]` row-major. `bias` has N elements.
    ///
    /// # Panics
    /// If `x` was not laid out for `w`, `bias` is not N long, or `out` is not `M · N` long.
    pub fn ternary_matmul(&self, w: &Prepacked, x: &Activations, bias: Option<&[f32]>, out: &mut [f32]) {
        w.check(x);
        assert_eq!(out.len(), x.rows() * w.rows(), "a product of {} × {}", x.rows(), w.rows());
        assert!(bias.is_none_or(|b| b.len() == w.rows()), "a bias for each of {} rows", w.rows());
        let n = w.rows();
        self.each_tile(w, x, 0..w.panels(), |panel, token, group, sums| {
            let first = panel * PANEL;
            let count = PANEL.min(n - first);
            let out = &mut out[token * n + first..][..count];
            w.scale_into(group, first, sums, out);
            if group + 1 == w.groups() {
                let scale = x.scale(token);
                for (i, out) in out.iter_mut().enumerate() {
                    *out = *out * scale + bias.map_or(0.0, |b| b[first + i]);
                }
            }
        });
    }

    /// Calls `each(panel, token, group, sums)` for every panel, token and scale group, groups of a panel and token in order.
    fn each_tile(
        &self,
        w: &Prepacked,
        x: &Activations,
        panels: std::ops::Range<usize>,
        mut each: impl FnMut(usize, usize, usize, &[i32; PANEL]),
    ) {
        let kernel = match self.isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::avx512_vnni,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => x86::avx_vnni,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::avx2,
            _ => scalar::tile,
        };
        for panel in panels {
            let mut token = 0;
            while token < x.rows() {
                let tokens = scalar::TOKENS.min(x.rows() - token);
                for group in 0..w.groups() {
                    let mut sums = [[0i32; PANEL]; scalar::TOKENS];
                    let weights = w.group_bytes(panel, group);
                    // SAFETY: `Kernels` exists only where the machine runs its instruction set; see each kernel for what else it asks.
                    unsafe { kernel(weights, x.group(token, tokens, group), x.stride(), tokens, &mut sums) };
                    for (i, sums) in sums.iter_mut().enumerate().take(tokens) {
                        let offset = x.sum(token + i, group);
                        sums.iter_mut().for_each(|s| *s -= offset);
                        each(panel, token + i, group, sums);
                    }
                }
                token += tokens;
            }
        }
    }
}
