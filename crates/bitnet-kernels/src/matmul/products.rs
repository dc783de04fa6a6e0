//! The loops over panels, planes, groups and tokens around the tiles.

use super::activations::{Int8Activations, PrepackedActivations};
use super::float::{self, FloatTables, STEP_TABLES};
use super::prepacked::Prepacked;
use super::shape::PANEL;
use super::tiles::{LINE, PanelSums, TOKENS, Term, prefetch};
use crate::kernels::Kernels;
use crate::parallel::ColumnsMut;
use crate::pool::Pool;
use crate::table::Table;
use std::ops::Range;

/// From this number of tokens on, a panel is unpacked to bytes once; fewer tokens go over the codes
/// of a panel twice at most.
const UNPACK_FROM: usize = 2 * TOKENS + 1;
/// Bytes that are unpacked at once.
const UNPACKED_BYTES: usize = 32 << 10;
/// Tokens whose sums are kept at once: 48 KiB.
const SUMMED_TOKENS: usize = 32 * TOKENS;
/// Float tokens whose tables are made at once.
const FLOAT_TOKENS: usize = 8;
/// Products that are worth a fork, some microseconds of one thread.
const WORTH: usize = 1 << 18;
/// Parts for each thread, so that a slow core does not keep the others waiting.
const PARTS: usize = 4;

/// Which sums of a panel: those of one scale group of one plane. They come in order, plane after
/// plane.
#[derive(Clone, Copy)]
struct PanelGroup {
    panel: usize,
    plane: usize,
    group: usize,
}

/// Takes the sums of each group and token.
trait Sink {
    fn put(&mut self, at: PanelGroup, token: usize, sums: &PanelSums);
}

/// The rows of a panel, as columns of the output.
fn panel_rows(w: &Prepacked, panel: usize) -> Range<usize> {
    panel * PANEL..w.rows().min((panel + 1) * PANEL)
}

/// Adds the groups; the output is plane after plane of tokens.
struct IntegerSums<'a> {
    w: &'a Prepacked,
    tokens: usize,
    out: ColumnsMut<'a, i32>,
}

impl Sink for IntegerSums<'_> {
    fn put(&mut self, at: PanelGroup, token: usize, sums: &PanelSums) {
        let (row, columns) = (at.plane * self.tokens + token, panel_rows(self.w, at.panel));
        for (out, &sum) in self.out.row(row, columns).iter_mut().zip(sums) {
            *out = if at.group == 0 { sum } else { *out + sum };
        }
    }
}

/// Scales the sums and adds planes, groups and bias.
struct ScaledSums<'a> {
    table: &'static Table,
    w: &'a Prepacked,
    x: Int8Activations<'a>,
    bias: Option<&'a [f32]>,
    out: ColumnsMut<'a, f32>,
}

impl ScaledSums<'_> {
    fn is_last(&self, at: PanelGroup) -> bool {
        at.plane + 1 == self.w.planes() && at.group + 1 == self.w.groups()
    }
}

impl Sink for ScaledSums<'_> {
    fn put(&mut self, at: PanelGroup, token: usize, sums: &PanelSums) {
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
        let out = self.out.row(token, panel_rows(self.w, at.panel));
        self.table.finish_sums(&term, sums, out);
    }
}

impl Kernels {
    /// Integer sums `Σ_k (v[p, n, k] − z[n, k]) · x[m, k]` over all columns, `[planes, M, N]`
    /// row-major, without float zero points. They are exact on every instruction set.
    ///
    /// # Panics
    /// If `x` was not prepacked for `w` or is not int8, or `out` is not `planes · M · N` long.
    pub fn matmul_sums(
        &self,
        pool: &Pool,
        w: &Prepacked,
        x: &PrepackedActivations,
        out: &mut [i32],
    ) {
        x.check(w);
        let Some(integers) = x.integers() else {
            panic!("integer sums of float activations")
        };
        out.fill(0);
        let tokens = x.rows();
        let shape = (w.planes() * tokens, w.rows());
        pool.for_columns(out, shape, PANEL, parts(pool, w, tokens), |out| {
            let panels = panels(&out);
            sum_panels(
                self.table,
                w,
                integers,
                tokens,
                panels,
                &mut IntegerSums { w, tokens, out },
            );
        });
    }

    /// `Y = X · Wᵀ + bias`, `[M, N]` row-major. `bias` has N elements. The bits are the same for
    /// every instruction set and pool.
    ///
    /// ```
    /// use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
    /// use bitnet_kernels::{Kernels, Pool, matmul::{Prepacked, PrepackedActivations}};
    /// let spec = MatrixSpec::new(2, 3, Precision::Ternary, Granularity::Channel);
    /// let matrix = Matrix {
    ///     spec,
    ///     values: vec![1, 0, -1, 1, 1, 1],
    ///     scales: vec![0.5, 2.0],
    ///     zero_points: vec![],
    /// };
    /// let (kernels, pool) = (Kernels::detect(), Pool::new(2)?);
    /// let w = Prepacked::new(&matrix, &pool)?;
    /// let x = [127.0, 1.0, 2.0];
    /// let mut y = [f32::NAN; 2];
    /// let int8 = PrepackedActivations::quantize(&kernels, &x, &w)?;
    /// kernels.matmul(&pool, &w, &int8, None, &mut y);
    /// assert_eq!(y, [62.5, 260.0]);
    /// let floats = PrepackedActivations::floats(&x, &w)?;
    /// kernels.matmul(&pool, &w, &floats, Some(&[0.0, 1.0]), &mut y);
    /// assert_eq!(y, [62.5, 261.0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Panics
    /// If `x` was not prepacked for `w`, `bias` is not N long, or `out` is not `M · N` long.
    pub fn matmul(
        &self,
        pool: &Pool,
        w: &Prepacked,
        x: &PrepackedActivations,
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) {
        x.check(w);
        assert!(
            bias.is_none_or(|b| b.len() == w.rows()),
            "a bias for each of {} rows",
            w.rows()
        );
        let (table, tokens) = (self.table, x.rows());
        if w.groups() == 0 {
            // Without columns there is no group whose term could be written.
            assert_eq!(
                out.len(),
                tokens * w.rows(),
                "the length of a product of {tokens} × {}",
                w.rows()
            );
            for (i, out) in out.iter_mut().enumerate() {
                *out = bias.map_or(0.0, |b| b[i % w.rows()]);
            }
            return;
        }
        let shape = (tokens, w.rows());
        pool.for_columns(out, shape, PANEL, parts(pool, w, tokens), |mut out| {
            let panels = panels(&out);
            match x.integers() {
                Some(x) => {
                    let mut sink = ScaledSums {
                        table,
                        w,
                        x,
                        bias,
                        out,
                    };
                    sum_panels(table, w, x, tokens, panels, &mut sink);
                }
                None => float_panels(table, w, x, panels, bias, &mut out),
            }
        });
    }
}

/// Parts of a product on the pool.
fn parts(pool: &Pool, w: &Prepacked, tokens: usize) -> usize {
    let work = w.bytes() * w.coding().fields() * tokens;
    let most = if pool.threads() > 1 {
        pool.threads() * PARTS
    } else {
        1
    };
    (work / WORTH).min(w.panels()).min(most).max(1)
}

/// The panels of a part: its columns are whole panels.
fn panels<T>(out: &ColumnsMut<'_, T>) -> Range<usize> {
    let columns = out.columns();
    columns.start / PANEL..columns.end.div_ceil(PANEL)
}

/// The groups of a panel, in order.
fn panel_groups(w: &Prepacked, panel: usize) -> impl Iterator<Item = PanelGroup> {
    let groups = w.groups();
    (0..w.planes()).flat_map(move |plane| {
        (0..groups).map(move |group| PanelGroup {
            panel,
            plane,
            group,
        })
    })
}

/// The sums of some panels with int8 activations.
fn sum_panels(
    table: &Table,
    w: &Prepacked,
    x: Int8Activations<'_>,
    tokens: usize,
    panels: Range<usize>,
    sink: &mut impl Sink,
) {
    if tokens < UNPACK_FROM {
        sum_packed(table, w, x, tokens, panels, sink);
    } else {
        sum_unpacked(table, w, x, tokens, panels, sink);
    }
}

/// Straight from the codes, at most [`TOKENS`] tokens at a time.
fn sum_packed(
    table: &Table,
    w: &Prepacked,
    x: Int8Activations<'_>,
    tokens: usize,
    panels: Range<usize>,
    sink: &mut impl Sink,
) {
    let parts = tokens.div_ceil(TOKENS);
    for at in panels.flat_map(|panel| panel_groups(w, panel)) {
        let codes = w.codes(at.panel, at.plane, w.group_steps(at.group));
        for part in 0..parts {
            let tokens = part * tokens / parts..(part + 1) * tokens / parts;
            let mut sums = [[0; PANEL]; TOKENS];
            let sums = &mut sums[..tokens.len()];
            for (token, sums) in tokens.clone().zip(sums.iter_mut()) {
                *sums = w.start(at.panel, at.group, x.sum(token, at.group));
            }
            table.packed_sums(
                w.coding(),
                codes,
                x.columns(tokens.start, at.group, 0),
                sums,
            );
            tokens
                .zip(sums)
                .for_each(|(token, sums)| sink.put(at, token, sums));
        }
    }
}

/// From codes that are unpacked once for all tokens.
fn sum_unpacked(
    table: &Table,
    w: &Prepacked,
    x: Int8Activations<'_>,
    tokens: usize,
    panels: Range<usize>,
    sink: &mut impl Sink,
) {
    let coding = w.coding();
    let block = UNPACKED_BYTES / coding.step_codes();
    let mut buffer = CodeBuffer::new();
    let mut sums = vec![[0; PANEL]; SUMMED_TOKENS.min(tokens)];
    for panel in panels {
        for first in (0..tokens).step_by(SUMMED_TOKENS) {
            let sums = &mut sums[..SUMMED_TOKENS.min(tokens - first)];
            for at in panel_groups(w, panel) {
                let steps = w.group_steps(at.group);
                for begin in steps.clone().step_by(block) {
                    let now = begin..steps.end.min(begin + block);
                    let last = now.end == steps.end;
                    let (codes, packed) = (
                        &mut buffer.bytes()[..now.len() * coding.step_codes()],
                        w.codes(panel, at.plane, now),
                    );
                    let column = (begin - steps.start) * coding.step();
                    // Lines of the block after this one, to be prefetched beside each tile.
                    let lines = packed.len().div_ceil(LINE * sums.len().div_ceil(TOKENS));
                    table.unpack_codes(coding, packed, codes);
                    for (i, sums) in sums.chunks_mut(TOKENS).enumerate() {
                        (0..lines).for_each(|line| {
                            prefetch(
                                packed
                                    .as_ptr()
                                    .wrapping_add(packed.len() + (i * lines + line) * LINE),
                            )
                        });
                        let tokens = first + i * TOKENS..;
                        if begin == steps.start {
                            for (token, sums) in tokens.clone().zip(sums.iter_mut()) {
                                *sums = w.start(panel, at.group, x.sum(token, at.group));
                            }
                        }
                        let x = x.columns(tokens.start, at.group, column);
                        table.unpacked_sums(coding.most(), codes, x, sums);
                        if last {
                            tokens
                                .zip(sums.iter())
                                .for_each(|(token, sums)| sink.put(at, token, sums));
                        }
                    }
                }
            }
        }
    }
}

/// The products of some panels with float activations.
fn float_panels(
    table: &Table,
    w: &Prepacked,
    x: &PrepackedActivations,
    panels: Range<usize>,
    bias: Option<&[f32]>,
    out: &mut ColumnsMut<'_, f32>,
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
        for at in panels.clone().flat_map(|panel| panel_groups(w, panel)) {
            let steps = w.group_steps(at.group);
            let last = at.plane + 1 == w.planes() && at.group + 1 == w.groups();
            let bias = bias.filter(|_| last).map(|b| &b[at.panel * PANEL..]);
            for (token, tables) in tokens.clone().zip(tables.chunks(row)) {
                let mut sums = [[0.0; PANEL]; 2];
                table.float_sums(
                    w.codes(at.panel, at.plane, steps.clone()),
                    FloatTables(&tables[steps.start * STEP_TABLES..]),
                    &mut sums,
                );
                float::finish(
                    w.scales(at.panel, at.plane, at.group),
                    at.plane == 0 && at.group == 0,
                    bias,
                    &sums,
                    out.row(token, panel_rows(w, at.panel)),
                );
            }
        }
    }
}

/// [`UNPACKED_BYTES`] bytes that begin at a multiple of 64.
struct CodeBuffer(Vec<u8>);

impl CodeBuffer {
    fn new() -> Self {
        Self(vec![0; UNPACKED_BYTES + 63])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let offset = self.0.as_ptr().align_offset(64).min(63);
        &mut self.0[offset..][..UNPACKED_BYTES]
    }
}
