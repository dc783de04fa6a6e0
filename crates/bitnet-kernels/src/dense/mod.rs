//! Products with float activations, attention over a cache, and the elementwise steps between them.
//!
//! ```text
//! Y[M, N] = X[M, K] · Wᵀ (+ bias)      W in f32, f16, bf16 or blocks of integers: see [`Data`] and [`Blocks`]
//! ```
//!
//! Every loop is written once, over 16 lanes or plain Rust, and compiled for each instruction set.
//! A sum runs over [`LANES`] strided partial sums with fused multiply-adds, which are then added in
//! pairs; the order depends on K alone. So the instruction set, the number of threads and the
//! number of tokens computed together change no bit of the result.

mod attention;
mod blocks;
mod causal;
mod elementwise;
mod lanes;
mod matrix;
mod panels;
mod parallel;
mod product;

pub use attention::{Attention, Cached};
pub use blocks::{
    BlockRow, BlockType, Blocks, Codes, SUPER, ScaleType, Strip, quantize_int4, quantize_int8,
};
pub use causal::Heads;
pub use elementwise::Pairing;
pub use matrix::{Data, Matrix, f16_to_f32, zeros};

#[cfg(target_arch = "x86_64")]
use crate::Isa;
use crate::{Kernels, Pool};
use product::Output;
use std::cell::Cell;
use std::ops::Range;

/// Columns of a block that has one binary16 scale.
pub const BLOCK: usize = 32;
/// Strided partial sums of every reduction.
pub const LANES: usize = 16;

/// Adds the partial sums in pairs: 16 → 8 → 4 → 2 → 1.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The loops under the target features of one instruction set, with the tile of rows × tokens that
/// fits its registers.
macro_rules! compiled {
    ($isa:ident, $lanes:ty, $rows:literal, $tokens:literal $(, $features:literal)?) => {
        mod $isa {
            use super::*;

            $(#[target_feature(enable = $features)])?
            /// # Safety
            /// No other thread has these rows.
            pub(super) unsafe fn product(w: &Matrix, x: &[f32], bias: Option<&[f32]>, rows: Range<usize>, out: &Output<'_>) {
                // SAFETY: the features of this function are those of the lanes; the caller vouches
                // for the rows.
                unsafe { product::product::<$lanes, $rows, $tokens>(w, x, bias, rows, out) };
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn attend(a: &Attention<'_>, q: &[f32], out: &mut [f32]) {
                // SAFETY: the features of this function are those of the lanes.
                unsafe { attention::attend::<$lanes, $rows, $tokens>(a, q, out) };
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn attend_run(a: &Attention<'_>, at: Heads, q: &[f32], out: &mut [f32], room: &mut causal::Room) {
                // SAFETY: the features of this function are those of the lanes.
                unsafe { causal::attend_run::<$lanes, $rows, $tokens>(a, at, q, out, room) };
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                // SAFETY: the features of this function are those of the lanes.
                unsafe { elementwise::rms_norm::<$lanes>(x, weight, eps, out) };
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
                // SAFETY: the features of this function are those of the lanes.
                unsafe { elementwise::rms_norm_in_place::<$lanes>(x, weight, eps) };
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn rotate(x: &mut [f32], angles: &[(f32, f32)], pairing: Pairing) {
                elementwise::rotate(x, angles, pairing);
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                elementwise::silu_mul(gate, up, out);
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn relu2_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                elementwise::relu2_mul(gate, up, out);
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn add(x: &mut [f32], y: &[f32]) {
                elementwise::add(x, y);
            }
        }
    };
}

compiled!(scalar, lanes::Plain, 2, 2);
#[cfg(target_arch = "x86_64")]
compiled!(avx2, lanes::Avx2, 2, 2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
compiled!(
    avx512,
    lanes::Avx512,
    4,
    4,
    "avx512f,avx512bw,avx512dq,avx512vl"
);

/// Whether the AVX2 loops, which multiply and add at once and widen binary16, run on an AVX2
/// machine: on all that were ever sold.
#[cfg(target_arch = "x86_64")]
fn has_fma() -> bool {
    is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

macro_rules! dispatch {
    ($self:ident, $loop:ident($($argument:expr),*)) => {
        match $self.isa() {
            // SAFETY: `Kernels::new` made this value after it found AVX2, the others are found in
            // the guard; more is said at the call.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni if has_fma() => unsafe { avx2::$loop($($argument),*) },
            // SAFETY: `Kernels::new` made this value after `Isa::is_available` found every feature
            // that the loop enables; more is said at the call.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Vbmi => unsafe { avx512::$loop($($argument),*) },
            // SAFETY: as is said at the call.
            #[allow(unused_unsafe, reason = "most loops ask for nothing here")]
            _ => unsafe { scalar::$loop($($argument),*) },
        }
    };
}

/// Products that are worth a fork, some microseconds of one thread.
const WORTH: usize = 1 << 16;
/// Parts for each thread, so that a slow core does not keep the others waiting.
const PARTS: usize = 4;

impl Kernels {
    /// `out[m, n] = Σ_k x[m, k] · w[n, k] (+ bias[n])`, with `x` of `[M, K]` and `out` of `[M, N]`,
    /// row-major.
    ///
    /// ```
    /// use bitnet_kernels::{Kernels, Pool, dense::{Data, Matrix}};
    /// let w = Matrix::new(2, 3, Data::F32(vec![1.0, 2.0, 3.0, 0.0, -1.0, 0.5]))?;
    /// let mut out = [0.0; 2];
    /// Kernels::detect().dense_matmul(&Pool::single(), &w, &[1.0, 1.0, 2.0], None, &mut out);
    /// assert_eq!(out, [9.0, 0.0]);
    /// # Ok::<(), bitnet_kernels::Error>(())
    /// ```
    ///
    /// # Panics
    /// If `x` is not whole rows of K, or `bias` or `out` has another length than the product.
    pub fn dense_matmul(
        &self,
        pool: &Pool,
        w: &Matrix,
        x: &[f32],
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let tokens = x.len().checked_div(w.cols()).unwrap_or(0);
        assert_eq!(
            x.len(),
            tokens * w.cols(),
            "activations of whole rows of {} columns",
            w.cols()
        );
        assert!(
            bias.is_none_or(|b| b.len() == w.rows()),
            "a bias of {} rows",
            w.rows()
        );
        let out = Output::new(out, tokens, w.rows());
        let work = w.rows() * w.cols() * tokens;
        let most = if pool.threads() > 1 {
            pool.threads() * PARTS
        } else {
            1
        };
        // Whole tiles and panels for every part but the last.
        let panels = w.rows().div_ceil(8);
        let parts = (work / WORTH).clamp(1, most).min(panels.max(1));
        pool.run(parts, |part| {
            let rows = part * panels / parts * 8..((part + 1) * panels / parts * 8).min(w.rows());
            // Each range of rows is in one part: no other thread has them.
            dispatch!(self, product(w, x, bias, rows, &out));
        });
    }

    /// Attention of the heads that share one key and value head, for one token: see [`Attention`].
    ///
    /// # Panics
    /// If `q` and `out` are not the same number of whole heads, or the cache holds fewer than `len`
    /// positions.
    pub fn attend(&self, attention: &Attention<'_>, q: &[f32], out: &mut [f32]) {
        attention.check(q, out);
        dispatch!(self, attend(attention, q, out));
    }

    /// Attention of the heads that share one key and value head, for tokens that follow one
    /// another: `attention.len` is what the first one sees, and each sees one position more than
    /// the one before. The bits are those of [`Kernels::attend`] for each.
    ///
    /// # Panics
    /// If `q` and `out` do not hold these heads, all of them whole, or the cache holds fewer
    /// positions than the last token sees.
    pub fn attend_run(&self, attention: &Attention<'_>, at: Heads, q: &[f32], out: &mut [f32]) {
        thread_local! {
            static ROOM: Cell<causal::Room> = Cell::default();
        }
        if at.tokens == 0 {
            return;
        }
        at.check(q, out);
        Attention {
            len: attention.len.saturating_add(at.tokens - 1),
            ..*attention
        }
        .check(&q[..at.width], &out[..at.width]);
        let mut room = ROOM.take();
        dispatch!(self, attend_run(attention, at, q, out, &mut room));
        ROOM.set(room);
    }

    /// `out = weight · x / √(mean(x²) + eps)` of one token.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(
            x.len() == weight.len() && x.len() == out.len(),
            "a norm of {} elements",
            weight.len()
        );
        dispatch!(self, rms_norm(x, weight, eps, out));
    }

    /// `x = weight · x / √(mean(x²) + eps)` of one token.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        assert!(
            x.len() == weight.len(),
            "a norm of {} elements",
            weight.len()
        );
        dispatch!(self, rms_norm_in_place(x, weight, eps));
    }

    /// Rotates pair i of every head of a token by the angle with cosine and sine `angles[i]`.
    ///
    /// # Panics
    /// If `x` is not whole heads of `2 · angles.len()` elements.
    pub fn rotate(&self, x: &mut [f32], angles: &[(f32, f32)], pairing: Pairing) {
        assert!(
            x.len().is_multiple_of((2 * angles.len()).max(1)),
            "whole heads of {} pairs",
            angles.len()
        );
        dispatch!(self, rotate(x, angles, pairing));
    }

    /// `out = gate / (1 + exp(−gate)) · up`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(
            gate.len() == up.len() && gate.len() == out.len(),
            "as many gates as values"
        );
        dispatch!(self, silu_mul(gate, up, out));
    }

    /// `out = max(gate, 0)² · up`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn relu2_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(
            gate.len() == up.len() && gate.len() == out.len(),
            "as many gates as values"
        );
        dispatch!(self, relu2_mul(gate, up, out));
    }

    /// `x += y`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "as many terms as sums");
        dispatch!(self, add(x, y));
    }
}
