//! The loops over panels, groups and tokens around the tiles.

use super::tiles::{SCALAR, Sums, TOKENS, Term, Tiles};
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{Activations, PANEL, Prepacked, STEP_CODES};
use crate::{Isa, Kernels, Pool};
use std::marker::PhantomData;
use std::ops::Range;

/// From so many tokens on, a panel is unpacked to bytes once; fewer go over the two-bit codes of a panel twice at most.
const DENSE: usize = 2 * TOKENS + 1;
/// Steps that are unpacked at once: 32 KiB of codes.
const DENSE_STEPS: usize = 32;
/// Tokens whose sums are kept at once: 48 KiB.
const DENSE_TOKENS: usize = 32 * TOKENS;
/// Products that are worth a fork, some microseconds of one thread.
const WORTH: usize = 1 << 18;
/// Parts for each thread, so that a slow core does not keep the others waiting.
const PARTS: usize = 4;

/// What becomes of the sums of a panel, a token and a scale group; groups of a panel and token come in order.
trait Sink: Sync {
    /// # Safety
    /// No other thread has this panel.
    unsafe fn put(&self, panel: usize, token: usize, group: usize, sums: &Sums);
}

/// A matrix `[M, N]`, of whose rows each thread writes other columns.
struct Output<'a, T> {
    data: *mut T,
    rows: usize,
    cols: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: `Output::panel`, the only access, is for one thread a panel.
unsafe impl<T: Send> Sync for Output<'_, T> {}

impl<'a, T> Output<'a, T> {
    fn new(out: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert_eq!(Some(out.len()), rows.checked_mul(cols), "the length of a product of {rows} × {cols}");
        Self { data: out.as_mut_ptr(), rows, cols, borrowed: PhantomData }
    }

    /// The columns of one panel in the row of one token.
    ///
    /// # Safety
    /// No other thread has this panel, and this one holds no other slice of it.
    #[expect(clippy::mut_from_ref, reason = "threads share the matrix and write different columns")]
    unsafe fn panel(&self, token: usize, panel: usize) -> &mut [T] {
        let first = panel * PANEL;
        assert!(token < self.rows && first < self.cols, "a panel of the output");
        // SAFETY: the columns lie inside row `token` of the borrowed slice, whose length `new` checked; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(token * self.cols + first), PANEL.min(self.cols - first)) }
    }
}

struct Integers<'a>(Output<'a, i32>);

impl Sink for Integers<'_> {
    unsafe fn put(&self, panel: usize, token: usize, group: usize, sums: &Sums) {
        // SAFETY: the caller's.
        let out = unsafe { self.0.panel(token, panel) };
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = if group == 0 { sum } else { *out + sum };
        }
    }
}

struct Floats<'a> {
    tiles: &'static Tiles,
    w: &'a Prepacked,
    x: &'a Activations,
    bias: Option<&'a [f32]>,
    out: Output<'a, f32>,
}

impl Sink for Floats<'_> {
    unsafe fn put(&self, panel: usize, token: usize, group: usize, sums: &Sums) {
        let last = group + 1 == self.w.groups();
        let term = Term {
            scales: self.w.scales(panel, group),
            first: group == 0,
            last: last.then(|| (self.x.scale(token), self.bias.map(|b| &b[panel * PANEL..]))),
        };
        // SAFETY: the caller's; `tiles` came from a `Kernels`, so the machine has its instruction set.
        unsafe { (self.tiles.finish)(&term, sums, self.out.panel(token, panel)) };
    }
}

impl Kernels {
    /// Integer sums `Σ_k q[n, k] · x[m, k]` over all columns, `[M, N]` row-major: what the exactness of every instruction set is judged by.
    ///
    /// # Panics
    /// If `x` was not laid out for `w`, or `out` is not `M · N` long.
    pub fn ternary_sums(&self, pool: &Pool, w: &Prepacked, x: &Activations, out: &mut [i32]) {
        x.check(w);
        out.fill(0);
        self.sweep(pool, w, x, &Integers(Output::new(out, x.rows(), w.rows())));
    }

    /// `Y = X · Wᵀ + bias`, `[M, N]` row-major. `bias` has N elements. The bits are the same for every instruction set and pool.
    ///
    /// ```
    /// use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
    /// use bitnet_kernels::{Kernels, Pool, ternary::{Activations, Prepacked}};
    /// let spec = MatrixSpec::new(2, 3, Precision::Ternary, Granularity::Channel);
    /// let matrix = Matrix { spec, values: vec![1, 0, -1, 1, 1, 1], scales: vec![0.5, 2.0], zero_points: vec![] };
    /// let pool = Pool::new(2)?;
    /// let w = Prepacked::new(&matrix, &pool)?;
    /// let x = Activations::quantize(&[127.0, 1.0, 2.0], &w)?;
    /// let mut y = [f32::NAN; 2];
    /// Kernels::detect().ternary_matmul(&pool, &w, &x, None, &mut y);
    /// assert_eq!(y, [62.5, 260.0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Panics
    /// If `x` was not laid out for `w`, `bias` is not N long, or `out` is not `M · N` long.
    pub fn ternary_matmul(&self, pool: &Pool, w: &Prepacked, x: &Activations, bias: Option<&[f32]>, out: &mut [f32]) {
        x.check(w);
        assert!(bias.is_none_or(|b| b.len() == w.rows()), "a bias for each of {} rows", w.rows());
        if w.groups() == 0 {
            // Without columns there is no group whose term could be written.
            assert_eq!(out.len(), x.rows() * w.rows(), "the length of a product of {} × {}", x.rows(), w.rows());
            for (i, out) in out.iter_mut().enumerate() {
                *out = bias.map_or(0.0, |b| b[i % w.rows()]);
            }
            return;
        }
        let out = Output::new(out, x.rows(), w.rows());
        self.sweep(pool, w, x, &Floats { tiles: self.tiles(), w, x, bias, out });
    }

    fn tiles(&self) -> &'static Tiles {
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Vbmi => &x86::AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &x86::AVX_VNNI,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &x86::AVX2,
            _ => &SCALAR,
        }
    }

    fn sweep(&self, pool: &Pool, w: &Prepacked, x: &Activations, sink: &impl Sink) {
        let tiles = self.tiles();
        let panels = w.panels();
        let work = w.bytes() * 4 * x.rows();
        let parts = (work / WORTH).min(panels).min(if pool.threads() > 1 { pool.threads() * PARTS } else { 1 }).max(1);
        pool.run(parts, |part| {
            let panels = part * panels / parts..(part + 1) * panels / parts;
            // SAFETY: the machine has the instruction set of this `Kernels`, and each panel is in one part.
            unsafe {
                if x.rows() < DENSE {
                    direct(tiles, w, x, panels, sink);
                } else {
                    dense(tiles, w, x, panels, sink);
                }
            }
        });
    }
}

/// # Safety
/// The machine has the instruction set of `tiles`; no other thread has these panels.
unsafe fn direct(tiles: &Tiles, w: &Prepacked, x: &Activations, panels: Range<usize>, sink: &impl Sink) {
    let parts = x.rows().div_ceil(TOKENS);
    for panel in panels {
        for group in 0..w.groups() {
            let steps = w.group_steps(group);
            for part in 0..parts {
                let tokens = part * x.rows() / parts..(part + 1) * x.rows() / parts;
                let mut sums = [[0; PANEL]; TOKENS];
                let sums = &mut sums[..tokens.len()];
                for (token, sums) in tokens.clone().zip(sums.iter_mut()) {
                    *sums = [-x.sum(token, group); PANEL];
                }
                // SAFETY: the caller's.
                unsafe {
                    (tiles.direct)(w.codes(panel, steps.clone()), x.from(tokens.start, steps.start), sums);
                    tokens.zip(sums).for_each(|(token, sums)| sink.put(panel, token, group, sums));
                }
            }
        }
    }
}

/// # Safety
/// As [`direct`].
unsafe fn dense(tiles: &Tiles, w: &Prepacked, x: &Activations, panels: Range<usize>, sink: &impl Sink) {
    let mut codes = Codes::new();
    let mut sums = vec![[0; PANEL]; DENSE_TOKENS.min(x.rows())];
    for panel in panels {
        for first in (0..x.rows()).step_by(DENSE_TOKENS) {
            let sums = &mut sums[..DENSE_TOKENS.min(x.rows() - first)];
            for group in 0..w.groups() {
                for (token, sums) in sums.iter_mut().enumerate() {
                    *sums = [-x.sum(first + token, group); PANEL];
                }
                let steps = w.group_steps(group);
                for at in steps.clone().step_by(DENSE_STEPS) {
                    let steps = at..steps.end.min(at + DENSE_STEPS);
                    let codes = &mut codes.bytes()[..steps.len() * STEP_CODES];
                    // SAFETY: the caller's.
                    unsafe {
                        (tiles.unpack)(w.codes(panel, steps), codes);
                        for (i, sums) in sums.chunks_mut(TOKENS).enumerate() {
                            (tiles.dense)(codes, x.from(first + i * TOKENS, at), sums);
                        }
                    }
                }
                // SAFETY: the caller's.
                sums.iter().enumerate().for_each(|(token, sums)| unsafe { sink.put(panel, first + token, group, sums) });
            }
        }
    }
}

/// Room for the codes of [`DENSE_STEPS`] steps, at a multiple of 64 bytes.
struct Codes(Vec<u8>);

impl Codes {
    fn new() -> Self {
        Self(vec![0; DENSE_STEPS * STEP_CODES + 63])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let offset = self.0.as_ptr().align_offset(64).min(63);
        &mut self.0[offset..][..DENSE_STEPS * STEP_CODES]
    }
}
