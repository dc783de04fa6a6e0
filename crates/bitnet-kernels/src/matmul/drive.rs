//! The loops over panels, planes, groups and tokens around the tiles.

use super::activations::Integers;
use super::float::{self, Float, STEP_TABLES};
#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
use super::simd128;
use super::tiles::{LINE, SCALAR, Sums, TOKENS, Term, Tiles, ask};
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{Activations, PANEL, Prepacked};
use crate::{Isa, Kernels, Pool};
use std::marker::PhantomData;
use std::ops::Range;

/// From so many tokens on, a panel is unpacked to bytes once; fewer go over the codes of a panel
/// twice at most.
const DENSE: usize = 2 * TOKENS + 1;
/// Bytes that are unpacked at once.
const DENSE_CODES: usize = 32 << 10;
/// Tokens whose sums are kept at once: 48 KiB.
const DENSE_TOKENS: usize = 32 * TOKENS;
/// Float tokens whose tables are made at once.
const FLOAT_TOKENS: usize = 8;
/// Products that are worth a fork, some microseconds of one thread.
const WORTH: usize = 1 << 18;
/// Parts for each thread, so that a slow core does not keep the others waiting.
const PARTS: usize = 4;

/// Where the sums of a panel come from: groups of a panel and token come in order, plane after
/// plane.
#[derive(Clone, Copy)]
struct Segment {
    panel: usize,
    plane: usize,
    group: usize,
}

/// What becomes of the sums of a segment and a token.
trait Sink: Sync {
    /// # Safety
    /// No other thread has this panel.
    unsafe fn put(&self, at: Segment, token: usize, sums: &Sums);
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
        assert_eq!(
            Some(out.len()),
            rows.checked_mul(cols),
            "the length of a product of {rows} × {cols}"
        );
        Self {
            data: out.as_mut_ptr(),
            rows,
            cols,
            borrowed: PhantomData,
        }
    }

    /// The columns of one panel in the row of one token.
    ///
    /// # Safety
    /// No other thread has this panel, and this one holds no other slice of it.
    #[expect(
        clippy::mut_from_ref,
        reason = "threads share the matrix and write different columns"
    )]
    unsafe fn panel(&self, token: usize, panel: usize) -> &mut [T] {
        let first = panel * PANEL;
        assert!(
            token < self.rows && first < self.cols,
            "a panel of the output"
        );
        // SAFETY: the columns lie inside row `token` of the borrowed slice, whose length `new`
        // checked; the caller vouches for the rest.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.data.add(token * self.cols + first),
                PANEL.min(self.cols - first),
            )
        }
    }
}

/// Rows: plane after plane of tokens.
struct IntegerSums<'a> {
    tokens: usize,
    out: Output<'a, i32>,
}

impl Sink for IntegerSums<'_> {
    unsafe fn put(&self, at: Segment, token: usize, sums: &Sums) {
        // SAFETY: the caller's.
        let out = unsafe { self.out.panel(at.plane * self.tokens + token, at.panel) };
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = if at.group == 0 { sum } else { *out + sum };
        }
    }
}

struct Floats<'a> {
    tiles: &'static Tiles,
    w: &'a Prepacked,
    x: Integers<'a>,
    bias: Option<&'a [f32]>,
    out: Output<'a, f32>,
}

impl Floats<'_> {
    fn is_last(&self, at: Segment) -> bool {
        at.plane + 1 == self.w.planes() && at.group + 1 == self.w.groups()
    }
}

impl Sink for Floats<'_> {
    unsafe fn put(&self, at: Segment, token: usize, sums: &Sums) {
        let term = Term {
            scales: self.w.scales(at.panel, at.plane, at.group),
            shift: self
                .w
                .shift(at.panel, at.group)
                .map(|shift| (shift, self.x.sum(token, at.group))),
            first: at.plane == 0 && at.group == 0,
            last: self.is_last(at).then(|| {
                (
                    self.x.scale(token),
                    self.bias.map(|b| &b[at.panel * PANEL..]),
                )
            }),
        };
        // SAFETY: the caller's; `tiles` came from a `Kernels`, so the machine has its instruction
        // set.
        unsafe { (self.tiles.finish)(&term, sums, self.out.panel(token, at.panel)) };
    }
}

impl Kernels {
    /// Integer sums `Σ_k (v[p, n, k] − z[n, k]) · x[m, k]` over all columns, `[planes, M, N]`
    /// row-major, without float zero points: what the exactness of every instruction set is judged
    /// by.
    ///
    /// # Panics
    /// If `x` was not laid out for `w` or is not int8, or `out` is not `planes · M · N` long.
    pub fn matmul_sums(&self, pool: &Pool, w: &Prepacked, x: &Activations, out: &mut [i32]) {
        x.check(w);
        let Some(integers) = x.integers() else {
            panic!("integer sums of float activations")
        };
        out.fill(0);
        let tokens = x.rows();
        self.sweep(
            pool,
            w,
            integers,
            tokens,
            &IntegerSums {
                tokens,
                out: Output::new(out, w.planes() * tokens, w.rows()),
            },
        );
    }

    /// `Y = X · Wᵀ + bias`, `[M, N]` row-major. `bias` has N elements. The bits are the same for
    /// every instruction set and pool.
    ///
    /// ```
    /// use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
    /// use bitnet_kernels::{Kernels, Pool, matmul::{Activations, Prepacked}};
    /// let spec = MatrixSpec::new(2, 3, Precision::Ternary, Granularity::Channel);
    /// let matrix = Matrix { spec, values: vec![1, 0, -1, 1, 1, 1], scales: vec![0.5, 2.0], zero_points: vec![] };
    /// let (kernels, pool) = (Kernels::detect(), Pool::new(2)?);
    /// let w = Prepacked::new(&matrix, &pool)?;
    /// let x = [127.0, 1.0, 2.0];
    /// let mut y = [f32::NAN; 2];
    /// kernels.matmul(&pool, &w, &Activations::quantize(&kernels, &x, &w)?, None, &mut y);
    /// assert_eq!(y, [62.5, 260.0]);
    /// kernels.matmul(&pool, &w, &Activations::floats(&x, &w)?, Some(&[0.0, 1.0]), &mut y);
    /// assert_eq!(y, [62.5, 261.0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Panics
    /// If `x` was not laid out for `w`, `bias` is not N long, or `out` is not `M · N` long.
    pub fn matmul(
        &self,
        pool: &Pool,
        w: &Prepacked,
        x: &Activations,
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) {
        x.check(w);
        assert!(
            bias.is_none_or(|b| b.len() == w.rows()),
            "a bias for each of {} rows",
            w.rows()
        );
        if w.groups() == 0 {
            // Without columns there is no group whose term could be written.
            assert_eq!(
                out.len(),
                x.rows() * w.rows(),
                "the length of a product of {} × {}",
                x.rows(),
                w.rows()
            );
            for (i, out) in out.iter_mut().enumerate() {
                *out = bias.map_or(0.0, |b| b[i % w.rows()]);
            }
            return;
        }
        let (tiles, out) = (self.tiles(), Output::new(out, x.rows(), w.rows()));
        match x.integers() {
            Some(integers) => self.sweep(
                pool,
                w,
                integers,
                x.rows(),
                &Floats {
                    tiles,
                    w,
                    x: integers,
                    bias,
                    out,
                },
            ),
            // SAFETY: the machine has the instruction set of this `Kernels`, and each panel is in
            // one part.
            None => self.parts(pool, w, x.rows(), |panels| unsafe {
                floats(tiles, w, x, panels, bias, &out)
            }),
        }
    }

    fn tiles(&self) -> &'static Tiles {
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => &x86::AVX512_VBMI,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &x86::AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &x86::AVX_VNNI,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &x86::AVX2,
            #[cfg(target_arch = "x86_64")]
            Isa::Sse41 => &x86::SSE41,
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => &neon::DOTPROD,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &neon::NEON,
            #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
            Isa::Simd128 => &simd128::SIMD128,
            _ => &SCALAR,
        }
    }

    /// Calls `each` with the panels of each part, on the pool.
    fn parts(&self, pool: &Pool, w: &Prepacked, tokens: usize, each: impl Fn(Range<usize>) + Sync) {
        let panels = w.panels();
        let work = w.bytes() * w.coding().fields() * tokens;
        let parts = (work / WORTH)
            .min(panels)
            .min(if pool.threads() > 1 {
                pool.threads() * PARTS
            } else {
                1
            })
            .max(1);
        pool.run(parts, |part| {
            each(part * panels / parts..(part + 1) * panels / parts)
        });
    }

    fn sweep(&self, pool: &Pool, w: &Prepacked, x: Integers<'_>, tokens: usize, sink: &impl Sink) {
        let tiles = self.tiles();
        self.parts(pool, w, tokens, |panels| {
            // SAFETY: the machine has the instruction set of this `Kernels`, and each panel is in
            // one part.
            unsafe {
                if tokens < DENSE {
                    direct(tiles, w, x, tokens, panels, sink);
                } else {
                    dense(tiles, w, x, tokens, panels, sink);
                }
            }
        });
    }
}

/// The segments of a panel, in order.
fn segments(w: &Prepacked, panel: usize) -> impl Iterator<Item = Segment> {
    let groups = w.groups();
    (0..w.planes()).flat_map(move |plane| {
        (0..groups).map(move |group| Segment {
            panel,
            plane,
            group,
        })
    })
}

/// # Safety
/// The machine has the instruction set of `tiles`; no other thread has these panels.
unsafe fn direct(
    tiles: &Tiles,
    w: &Prepacked,
    x: Integers<'_>,
    tokens: usize,
    panels: Range<usize>,
    sink: &impl Sink,
) {
    let parts = tokens.div_ceil(TOKENS);
    for at in panels.flat_map(|panel| segments(w, panel)) {
        let codes = w.codes(at.panel, at.plane, w.group_steps(at.group));
        for part in 0..parts {
            let tokens = part * tokens / parts..(part + 1) * tokens / parts;
            let mut sums = [[0; PANEL]; TOKENS];
            let sums = &mut sums[..tokens.len()];
            for (token, sums) in tokens.clone().zip(sums.iter_mut()) {
                *sums = w.start(at.panel, at.group, x.sum(token, at.group));
            }
            // SAFETY: the caller's.
            unsafe {
                (tiles.direct)(w.coding(), codes, x.from(tokens.start, at.group, 0), sums);
                tokens
                    .zip(sums)
                    .for_each(|(token, sums)| sink.put(at, token, sums));
            }
        }
    }
}

/// # Safety
/// As [`direct`].
unsafe fn dense(
    tiles: &Tiles,
    w: &Prepacked,
    x: Integers<'_>,
    tokens: usize,
    panels: Range<usize>,
    sink: &impl Sink,
) {
    let coding = w.coding();
    let block = DENSE_CODES / coding.step_codes();
    let mut room = Codes::new();
    let mut sums = vec![[0; PANEL]; DENSE_TOKENS.min(tokens)];
    for panel in panels {
        for first in (0..tokens).step_by(DENSE_TOKENS) {
            let sums = &mut sums[..DENSE_TOKENS.min(tokens - first)];
            for at in segments(w, panel) {
                let steps = w.group_steps(at.group);
                for begin in steps.clone().step_by(block) {
                    let now = begin..steps.end.min(begin + block);
                    let last = now.end == steps.end;
                    let (codes, packed) = (
                        &mut room.bytes()[..now.len() * coding.step_codes()],
                        w.codes(panel, at.plane, now),
                    );
                    let column = (begin - steps.start) * coding.step();
                    // Lines of the block after this one, to be asked for beside each tile.
                    let lines = packed.len().div_ceil(LINE * sums.len().div_ceil(TOKENS));
                    // SAFETY: the caller's.
                    unsafe { (tiles.unpack)(coding, packed, codes) };
                    for (i, sums) in sums.chunks_mut(TOKENS).enumerate() {
                        (0..lines).for_each(|line| {
                            ask(packed
                                .as_ptr()
                                .wrapping_add(packed.len() + (i * lines + line) * LINE))
                        });
                        let tokens = first + i * TOKENS..;
                        if begin == steps.start {
                            for (token, sums) in tokens.clone().zip(sums.iter_mut()) {
                                *sums = w.start(panel, at.group, x.sum(token, at.group));
                            }
                        }
                        // SAFETY: the caller's.
                        unsafe {
                            (tiles.dense)(
                                coding.most(),
                                codes,
                                x.from(tokens.start, at.group, column),
                                sums,
                            )
                        };
                        if last {
                            // SAFETY: the caller's.
                            tokens
                                .zip(sums.iter())
                                .for_each(|(token, sums)| unsafe { sink.put(at, token, sums) });
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`direct`].
unsafe fn floats(
    tiles: &Tiles,
    w: &Prepacked,
    x: &Activations,
    panels: Range<usize>,
    bias: Option<&[f32]>,
    out: &Output<'_, f32>,
) {
    let row = w.steps() * STEP_TABLES;
    let mut tables = vec![0.0; FLOAT_TOKENS.min(x.rows()) * row];
    for first in (0..x.rows()).step_by(FLOAT_TOKENS) {
        let tokens = first..x.rows().min(first + FLOAT_TOKENS);
        for (token, tables) in tokens.clone().zip(tables.chunks_mut(row)) {
            for (g, x) in x
                .token(token)
                .unwrap_or(&[])
                .chunks(w.shape().padded)
                .enumerate()
            {
                let steps = w.group_steps(g);
                float::tables(
                    &x[..steps.len() * float::STEP],
                    &mut tables[steps.start * STEP_TABLES..],
                );
            }
        }
        for at in panels.clone().flat_map(|panel| segments(w, panel)) {
            let steps = w.group_steps(at.group);
            let last = at.plane + 1 == w.planes() && at.group + 1 == w.groups();
            let bias = bias.filter(|_| last).map(|b| &b[at.panel * PANEL..]);
            for (token, tables) in tokens.clone().zip(tables.chunks(row)) {
                let mut sums = [[0.0; PANEL]; 2];
                // SAFETY: the caller's.
                let out = unsafe {
                    (tiles.float)(
                        w.codes(at.panel, at.plane, steps.clone()),
                        Float(&tables[steps.start * STEP_TABLES..]),
                        &mut sums,
                    );
                    out.panel(token, at.panel)
                };
                float::finish(
                    w.scales(at.panel, at.plane, at.group),
                    at.plane == 0 && at.group == 0,
                    bias,
                    &sums,
                    out,
                );
            }
        }
    }
}

/// Room for [`DENSE_CODES`] bytes, at a multiple of 64.
struct Codes(Vec<u8>);

impl Codes {
    fn new() -> Self {
        Self(vec![0; DENSE_CODES + 63])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let offset = self.0.as_ptr().align_offset(64).min(63);
        &mut self.0[offset..][..DENSE_CODES]
    }
}
