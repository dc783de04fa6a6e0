//! The methods of [`Kernels`] for products of floats and the steps between them.

use super::attention::Attention;
use super::attention_run::{AttentionScratch, TokenHeads};
use super::delta::DeltaTokens;
use super::elementwise::RotaryPairing;
use super::matrix::DenseMatrix;
use crate::kernels::Kernels;
use crate::pool::Pool;
use std::cell::Cell;

/// Products that are worth a fork, some microseconds of one thread.
const WORTH: usize = 1 << 16;
/// Parts for each thread, so that a slow core does not keep the others waiting.
const PARTS: usize = 4;

impl Kernels {
    /// `out[m, n] = Σ_k x[m, k] · w[n, k] (+ bias[n])`, with `x` of `[M, K]` and `out` of `[M, N]`,
    /// row-major.
    ///
    /// ```
    /// use bitnet_kernels::{Kernels, Pool, dense::{DenseData, DenseMatrix}};
    /// let w = DenseMatrix::new(2, 3, DenseData::F32(vec![1.0, 2.0, 3.0, 0.0, -1.0, 0.5]))?;
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
        w: &DenseMatrix,
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
        let work = w.rows() * w.cols() * tokens;
        let most = if pool.threads() > 1 {
            pool.threads() * PARTS
        } else {
            1
        };
        // Whole tiles and panels for every part but the last.
        const UNIT: usize = 8;
        let parts = (work / WORTH)
            .clamp(1, most)
            .min(w.rows().div_ceil(UNIT).max(1));
        pool.for_columns(out, (tokens, w.rows()), UNIT, parts, |mut columns| {
            self.table.dense_product(w, x, bias, &mut columns);
        });
    }

    /// Attention of the heads that share one key and value head, for one token: see [`Attention`].
    ///
    /// # Panics
    /// If `q` and `out` are not the same number of whole heads, or the cache holds fewer than `len`
    /// positions.
    pub fn attend(&self, attention: &Attention<'_>, q: &[f32], out: &mut [f32]) {
        attention.check(q, out);
        self.table.attend(attention, q, out);
    }

    /// Attention of the heads that share one key and value head, for tokens that follow one
    /// another: the first one sees `attention.len` positions, and each later one sees one more. The
    /// bits are those of [`Kernels::attend`] for each token.
    ///
    /// # Panics
    /// If `q` and `out` do not hold these heads, all of them whole, or the cache holds fewer
    /// positions than the last token sees.
    pub fn attend_run(
        &self,
        attention: &Attention<'_>,
        at: TokenHeads,
        q: &[f32],
        out: &mut [f32],
    ) {
        thread_local! {
            static SCRATCH: Cell<AttentionScratch> = Cell::default();
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
        let mut scratch = SCRATCH.take();
        self.table.attend_run(attention, at, q, out, &mut scratch);
        SCRATCH.set(scratch);
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
        self.table.rms_norm(x, weight, eps, out);
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
        self.table.rms_norm_in_place(x, weight, eps);
    }

    /// `out = weight · (x − mean(x)) / √(mean((x − mean(x))²) + eps) + bias` of one token.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        assert!(
            [weight.len(), bias.len(), out.len()] == [x.len(); 3],
            "a norm of {} elements",
            weight.len()
        );
        self.table.layer_norm(x, [weight, bias], eps, out);
    }

    /// Rotates pair i of every head of a token by the angle with cosine and sine `angles[i]`.
    ///
    /// # Panics
    /// If `x` is not whole heads of `2 · angles.len()` elements.
    pub fn rotate(&self, x: &mut [f32], angles: &[(f32, f32)], pairing: RotaryPairing) {
        assert!(
            x.len().is_multiple_of((2 * angles.len()).max(1)),
            "whole heads of {} pairs",
            angles.len()
        );
        self.table.rotate(x, angles, pairing);
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
        self.table.silu_mul(gate, up, out);
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
        self.table.relu2_mul(gate, up, out);
    }

    /// `out = gate · (1 + tanh(√(2/π) · (gate + 0.044715 · gate³))) / 2 · up`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn gelu_tanh_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(
            gate.len() == up.len() && gate.len() == out.len(),
            "as many gates as values"
        );
        self.table.gelu_tanh_mul(gate, up, out);
    }

    /// `out = up / (1 + exp(−gate))`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn sigmoid_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(
            gate.len() == up.len() && gate.len() == out.len(),
            "as many gates as values"
        );
        self.table.sigmoid_mul(gate, up, out);
    }

    /// `out[c] = silu(Σ_i x[i, c] · w[i, c])`: a depthwise convolution at one token, over the
    /// `[taps, channels]` inputs that end at it.
    ///
    /// # Panics
    /// If `x` and `w` are not the same number of rows as long as `out`.
    pub fn conv_silu(&self, x: &[f32], w: &[f32], out: &mut [f32]) {
        assert!(
            x.len() == w.len() && x.len().is_multiple_of(out.len().max(1)),
            "whole rows of {} channels",
            out.len()
        );
        self.table.conv_silu(x, w, out);
    }

    /// Tokens of one head of a gated delta net: changes the state and writes `out`,
    /// `[tokens, value_dim]`. See [`DeltaTokens`].
    ///
    /// # Panics
    /// If `state`, `out` or the inputs have another length.
    pub fn delta_tokens(&self, tokens: &DeltaTokens<'_>, state: &mut [f32], out: &mut [f32]) {
        tokens.check(state, out);
        self.table.delta_tokens(tokens, state, out);
    }

    /// `x = x · (1 + erf(x / √2)) / 2`.
    pub fn gelu(&self, x: &mut [f32]) {
        self.table.gelu(x);
    }

    /// `x += y`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "as many terms as sums");
        self.table.add(x, y);
    }
}
