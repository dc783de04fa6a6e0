//! Weight matrices in blocks of small integers, in panels of four rows.
//!
//! ```text
//! weight[n, k] = (code[n, k] − offset) · s + m      s, m of the group of columns, rounded once
//! ```
//!
//! Sixteen columns are a step. Four rows' codes of one step in 8 bits, of two in 4 bits or of four
//! in 2 bits are a *line* of 64 bytes: step f of row r is in bits `b·f …` of byte `4j + r` for lane
//! j, and in byte `16r + j` where a code has 8 bits. Lines of a panel follow one another, and so do
//! panels: one token reads one stream of codes, and a much shorter one of scales, `[panels, groups,
//! 4]`.

use super::lanes::{LANES, Lanes, f16_to_f32};
use crate::error::Error;
use crate::lines::{CacheLine, Lines, zeros};
use crate::parallel::lock;
use crate::pool::Pool;
use std::sync::{Mutex, PoisonError};

/// Columns of a block that has one binary16 scale.
pub const BLOCK: usize = 32;

/// Rows of a panel.
pub(super) const PANEL: usize = 4;
/// Groups whose scales are widened at once.
pub(super) const RUN: usize = LANES;
/// Columns under one outer scale of [`ScaleType::Nested`].
pub const SUPER: usize = 256;
/// Codes that are prepacked at once.
const STRIP: usize = 1 << 16;

/// The codes of a block type; a row to be filled has one byte for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockCodes {
    /// 0, 1 and 2 for −1, 0 and 1, held in 2 bits; 3 is 2.
    Trits,
    /// 0 … 15, held in 4 bits; 8 is subtracted where there are no minima.
    Int4,
    /// The bits of an `i8`.
    Int8,
}

impl BlockCodes {
    /// Bits of a code.
    pub const fn bits(self) -> usize {
        match self {
            Self::Trits => 2,
            Self::Int4 => 4,
            Self::Int8 => 8,
        }
    }

    /// Columns of a line.
    const fn line(self) -> usize {
        LANES * 8 / self.bits()
    }
}

/// The scale of the codes of a group of columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// An f32 for `group` columns, or for a row where that is shorter.
    F32 {
        /// Columns.
        group: usize,
    },
    /// A binary16 for each [`BLOCK`] columns.
    F16,
    /// An 8-bit integer for each `group` columns, times a binary16 for each [`SUPER`].
    Nested {
        /// Columns, 16 or 32.
        group: usize,
    },
}

/// How the weights of a matrix of blocks are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockType {
    /// The codes.
    pub codes: BlockCodes,
    /// Their scales.
    pub scales: ScaleType,
    /// Whether each group has a minimum as well, of the scale's type.
    pub minimum: bool,
}

impl BlockType {
    /// `s · (code − 8)`, s a binary16 for each 32 columns: Q4_0.
    pub const INT4: Self = Self {
        codes: BlockCodes::Int4,
        scales: ScaleType::F16,
        minimum: false,
    };
    /// `s · value`, s a binary16 for each 32 columns: Q8_0.
    pub const INT8: Self = Self {
        codes: BlockCodes::Int8,
        scales: ScaleType::F16,
        minimum: false,
    };

    /// Columns of a group of a row of `cols`.
    fn group(self, cols: usize) -> usize {
        match self.scales {
            // A group of a whole row ends with its last line.
            ScaleType::F32 { group } if group >= cols => cols.next_multiple_of(self.codes.line()),
            ScaleType::F32 { group } => group,
            ScaleType::F16 => BLOCK,
            ScaleType::Nested { group } => group,
        }
    }

    fn check(self, cols: usize) -> Result<(), Error> {
        let (line, group) = (self.codes.line(), self.group(cols));
        let nested =
            !matches!(self.scales, ScaleType::Nested { group } if group != 16 && group != 32);
        let minimum = !(self.minimum && matches!(self.scales, ScaleType::F32 { .. }));
        if (group > 0 || cols == 0) && group.is_multiple_of(line) && nested && minimum {
            return Ok(());
        }
        let why = format!(
            "{self:?} of {cols} columns: groups of whole {line} columns, nested ones of 16 or 32, and \
             minima that are no f32"
        );
        Err(bitnet_core::Error::Unsupported {
            layout: "blocks",
            why,
        }
        .into())
    }

    /// The offset that is subtracted from a code.
    pub(super) fn offset(self) -> u8 {
        match (self.codes, self.minimum) {
            (BlockCodes::Trits, _) => 1,
            (BlockCodes::Int4, false) => 8,
            (BlockCodes::Int4, true) | (BlockCodes::Int8, _) => 0,
        }
    }

    /// The weight of a code, rounded once.
    fn weight(self, code: u8, scale: f32, minimum: f32) -> f32 {
        let value = if self.codes == BlockCodes::Int8 {
            f32::from(code.cast_signed())
        } else {
            f32::from(code) - f32::from(self.offset())
        };
        if self.minimum {
            value.mul_add(scale, minimum)
        } else {
            value * scale
        }
    }
}

/// Numbers that scales and minima are made of; vectors that the type does not need are empty.
#[derive(Debug, Clone, Default)]
struct BlockScales {
    /// f32, one for a group.
    floats: Vec<f32>,
    /// binary16: scales and minima, one for a group, or for [`SUPER`] columns if nested.
    halves: [Vec<u16>; 2],
    /// The integers that multiply nested halves, one for a group.
    factors: [Vec<i8>; 2],
}

/// ScaleLengths of [`BlockScales`] for `rows` rows.
#[derive(Debug, Clone, Copy)]
struct ScaleLengths {
    floats: usize,
    halves: [usize; 2],
    factors: [usize; 2],
}

impl ScaleLengths {
    fn new(kind: BlockType, groups: usize, supers: usize, rows: usize) -> Self {
        let [floats, halves, factors] = match kind.scales {
            ScaleType::F32 { .. } => [groups, 0, 0],
            ScaleType::F16 => [0, groups, 0],
            ScaleType::Nested { .. } => [0, supers, groups],
        };
        let both = |n: usize| [n * rows, if kind.minimum { n * rows } else { 0 }];
        Self {
            floats: floats * rows,
            halves: both(halves),
            factors: both(factors),
        }
    }

    /// Zeros of these lengths, and `more` after the end of each vector that is not empty.
    fn zeros(self, more: usize) -> BlockScales {
        let with = |n: usize| if n > 0 { n + more } else { 0 };
        BlockScales {
            floats: zeros(with(self.floats)),
            halves: self.halves.map(|n| zeros(with(n))),
            factors: self.factors.map(|n| zeros(with(n))),
        }
    }
}

/// One row to be filled. Slices that the type does not need are empty.
#[derive(Debug)]
pub struct BlockRow<'a> {
    /// A byte for each column: see [`BlockCodes`].
    pub codes: &'a mut [u8],
    /// One scale for each group: [`ScaleType::F32`].
    pub floats: &'a mut [f32],
    /// Scales and minima in binary16: for each group, or for each 256 columns where they are
    /// nested.
    pub halves: [&'a mut [u16]; 2],
    /// The integers that nested scales and minima are multiplied by, for each group.
    pub factors: [&'a mut [i8]; 2],
}

/// Rows to be filled, next to one another.
#[derive(Debug)]
pub struct BlockStrip {
    kind: BlockType,
    rows: usize,
    cols: usize,
    /// BlockCodes of a row with the padding of its last line.
    stride: usize,
    codes: Vec<u8>,
    scales: BlockScales,
    /// Those of one row.
    lengths: ScaleLengths,
}

impl BlockStrip {
    fn new(blocks: &Blocks, rows: usize) -> Self {
        let (kind, stride) = (blocks.kind, blocks.lines * blocks.kind.codes.line());
        let lengths = |rows| ScaleLengths::new(kind, blocks.groups, blocks.supers, rows);
        let codes = vec![kind.offset(); rows * stride];
        Self {
            kind,
            rows,
            cols: blocks.cols,
            stride,
            codes,
            scales: lengths(rows).zeros(0),
            lengths: lengths(1),
        }
    }

    /// Its rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row i of the strip.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, i: usize) -> BlockRow<'_> {
        fn part<T>(all: &mut [T], i: usize, n: usize) -> &mut [T] {
            &mut all[i * n..(i + 1) * n]
        }
        assert!(i < self.rows, "row {i} of {}", self.rows);
        let [halves, half_minima] = &mut self.scales.halves;
        let [factors, factor_minima] = &mut self.scales.factors;
        BlockRow {
            codes: &mut self.codes[i * self.stride..][..self.cols],
            floats: part(&mut self.scales.floats, i, self.lengths.floats),
            halves: [
                part(halves, i, self.lengths.halves[0]),
                part(half_minima, i, self.lengths.halves[1]),
            ],
            factors: [
                part(factors, i, self.lengths.factors[0]),
                part(factor_minima, i, self.lengths.factors[1]),
            ],
        }
    }

    /// The weights of row i of the strip.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not K elements.
    pub fn row_into(&self, i: usize, out: &mut [f32]) {
        assert!(
            i < self.rows && out.len() == self.cols,
            "row {i} of {}, {} columns of {}",
            self.rows,
            out.len(),
            self.cols
        );
        let (group, of) = (self.kind.group(self.cols), self.lengths);
        for (g, out) in out.chunks_mut(group.max(1)).enumerate() {
            let halves = (
                i * of.halves[0]
                    + if of.factors[0] > 0 {
                        g * group / SUPER
                    } else {
                        g
                    },
                i * of.factors[0] + g,
            );
            let (scale, minimum) = self.scales.pair(i * of.floats + g, halves.0, halves.1);
            for (out, &code) in out
                .iter_mut()
                .zip(&self.codes[i * self.stride + g * group..])
            {
                *out = self.kind.weight(code, scale, minimum);
            }
        }
    }
}

impl BlockScales {
    /// Scale and minimum made of the numbers at these places.
    fn pair(&self, float: usize, half: usize, factor: usize) -> (f32, f32) {
        let one = |which: usize| {
            let half = self.halves[which].get(half).map(|&bits| f16_to_f32(bits));
            half.map(|half| {
                self.factors[which]
                    .get(factor)
                    .map_or(half, |&f| half * f32::from(f))
            })
        };
        (
            one(0).unwrap_or_else(|| self.floats[float]),
            one(1).unwrap_or(-0.0),
        )
    }
}

/// Weights `(N, K)` in blocks of small integers. [`Blocks::row_into`] returns the exact weights.
#[derive(Debug, Clone)]
pub struct Blocks {
    rows: usize,
    cols: usize,
    kind: BlockType,
    /// Lines, groups and outer scales of a row.
    lines: usize,
    groups: usize,
    supers: usize,
    /// `[panels, lines]`, and one more that loads may reach into.
    codes: Lines,
    /// `[panels, groups, 4]` or `[panels, supers, 4]`, and a run more.
    scales: BlockScales,
}

impl Blocks {
    /// A matrix of N rows and K columns. `fill` is called on any thread for each strip, with the
    /// number of its first row; weights that it does not set are 0.
    ///
    /// ```
    /// use bitnet_kernels::{Error, Pool, dense::{BlockType, Blocks, DenseMatrix}};
    /// let blocks = Blocks::new(&Pool::single(), 2, 3, BlockType::INT4, |first, strip| {
    ///     for i in 0..strip.rows() {
    ///         let row = strip.row(i);
    ///         // Row 1 is 0.5 · (−8, 0, 7), row 0 the half.
    ///         row.codes.copy_from_slice(&[0, 8, 15]);
    ///         row.halves[0][0] = if first + i == 1 { 0x3800 } else { 0x3400 };
    ///     }
    ///     Ok::<(), Error>(())
    /// })?;
    /// let mut row = [0.0; 3];
    /// DenseMatrix::from(blocks).row_into(1, &mut row);
    /// assert_eq!(row, [-4.0, 0.0, 3.5]);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Matrix`] for a type that does not fit these columns, and the error of the first
    /// strip whose `fill` failed.
    pub fn new<E: From<Error> + Send>(
        pool: &Pool,
        rows: usize,
        cols: usize,
        kind: BlockType,
        fill: impl Fn(usize, &mut BlockStrip) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        kind.check(cols)?;
        let (lines, groups, supers) = (
            cols.div_ceil(kind.codes.line()),
            cols.div_ceil(kind.group(cols).max(1)),
            cols.div_ceil(SUPER),
        );
        let panels = rows.div_ceil(PANEL);
        let Some(total) = panels
            .checked_mul(lines)
            .filter(|n| n.checked_mul(2 * size_of::<CacheLine>()).is_some())
        else {
            return Err(Error::from(bitnet_core::Error::Length {
                what: "weights",
                expected: usize::MAX,
                got: rows,
            })
            .into());
        };
        let mut codes = Lines::filled_on(pool, CacheLine([0; 64]), total + 1);
        let all_rows = panels * PANEL;
        let mut scales = ScaleLengths::new(kind, groups, supers, all_rows).zeros(PANEL * RUN);
        let empty = Self {
            rows,
            cols,
            kind,
            lines,
            groups,
            supers,
            codes: Lines::filled(CacheLine([0; 64]), 0),
            scales: BlockScales::default(),
        };
        let strip_panels = (STRIP / cols.max(1) / PANEL).max(1);
        let strip_rows = strip_panels * PANEL;
        let mut places = StripPlace::cut(
            &mut codes[..total],
            strip_panels * lines,
            &mut scales,
            ScaleLengths::new(kind, groups, supers, strip_rows),
            panels.div_ceil(strip_panels),
        );
        let failed = Mutex::new(None::<(usize, E)>);
        pool.for_chunks(&mut places, 1, |number, place| {
            let first = number * strip_rows;
            let mut strip = BlockStrip::new(&empty, (rows - first).min(strip_rows));
            match fill(first, &mut strip) {
                Ok(()) => place[0].prepack(&strip),
                Err(error) => {
                    let mut failed = lock(&failed);
                    if failed.as_ref().is_none_or(|(n, _)| number < *n) {
                        *failed = Some((number, error));
                    }
                }
            }
        });
        drop(places);
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some((_, error)) => Err(error),
            None => Ok(Self {
                codes,
                scales,
                ..empty
            }),
        }
    }

    /// N, the number of output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, the number of input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the weights are held.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Bytes of codes, scales and minima.
    pub fn bytes(&self) -> usize {
        let BlockScales {
            floats,
            halves,
            factors,
        } = &self.scales;
        let halves: usize = halves.iter().map(Vec::len).sum();
        let factors: usize = factors.iter().map(Vec::len).sum();
        size_of_val(&*self.codes) + 4 * floats.len() + 2 * halves + factors
    }

    /// Row `row` as floats.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not K elements.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "row {row} of {}, {} columns of {}",
            self.rows,
            out.len(),
            self.cols
        );
        let (panel, r, bits, line_cols) = (
            row / PANEL,
            row % PANEL,
            self.kind.codes.bits(),
            self.kind.codes.line(),
        );
        let (group, nested) = (
            self.kind.group(self.cols),
            matches!(self.kind.scales, ScaleType::Nested { .. }),
        );
        for (i, (out, line)) in out
            .chunks_mut(line_cols)
            .zip(&self.codes[panel * self.lines..])
            .enumerate()
        {
            let g = i * line_cols / group;
            let at = (panel * self.groups + g) * PANEL + r;
            let half = if nested {
                (panel * self.supers + g * group / SUPER) * PANEL + r
            } else {
                at
            };
            let (scale, minimum) = self.scales.pair(at, half, at);
            for (step, out) in out.chunks_mut(LANES).enumerate() {
                for (j, out) in out.iter_mut().enumerate() {
                    let byte = line.0[if bits == 8 {
                        LANES * r + j
                    } else {
                        PANEL * j + r
                    }];
                    let code = byte >> (bits * step % 8) & (0xff >> (8 - bits));
                    *out = self.kind.weight(code, scale, minimum);
                }
            }
        }
    }

    /// Lines of a row, and how many of them are full.
    pub(super) fn lines(&self) -> (usize, usize) {
        (self.lines, self.cols / self.kind.codes.line())
    }

    /// Groups of a row, and the lines of each.
    pub(super) fn groups(&self) -> (usize, usize) {
        (
            self.groups,
            self.kind.group(self.cols) / self.kind.codes.line(),
        )
    }

    /// Where the codes of a panel begin. Three bytes after the last one's can be read.
    pub(super) fn panel_start(&self, panel: usize) -> *const u8 {
        Lines::bytes(&self.codes[panel * self.lines..]).as_ptr()
    }

    /// Scales and minima of [`RUN`] groups of a panel from `first` on, `[groups, 4]`. Those after
    /// the last group are anything.
    #[inline(always)]
    pub(super) fn widen<L: Lanes>(
        &self,
        lanes: L,
        panel: usize,
        first: usize,
        to: &mut [[f32; PANEL * RUN]; 2],
    ) {
        let at = (panel * self.groups + first) * PANEL;
        let kinds = 1 + usize::from(self.kind.minimum);
        match self.kind.scales {
            ScaleType::F32 { .. } => {
                to[0].copy_from_slice(&self.scales.floats[at..][..PANEL * RUN])
            }
            ScaleType::F16 => {
                for (halves, to) in self.scales.halves.iter().zip(to).take(kinds) {
                    let halves = &halves[at..][..PANEL * RUN];
                    prefetch_after(lanes, halves);
                    for (halves, to) in halves.as_chunks().0.iter().zip(to.as_chunks_mut().0) {
                        lanes.store(lanes.f16(halves), to);
                    }
                }
            }
            ScaleType::Nested { group } => {
                for ((halves, factors), to) in self
                    .scales
                    .halves
                    .iter()
                    .zip(&self.scales.factors)
                    .zip(to)
                    .take(kinds)
                {
                    let (halves, factors) =
                        (halves.as_chunks::<PANEL>().0, &factors[at..][..PANEL * RUN]);
                    prefetch_after(lanes, factors);
                    for (i, (factors, to)) in factors
                        .as_chunks()
                        .0
                        .iter()
                        .zip(to.as_chunks_mut().0)
                        .enumerate()
                    {
                        let outer = [halves
                            [panel * self.supers + (first + i * (LANES / PANEL)) * group / SUPER];
                            LANES / PANEL];
                        let mut outer_of_lanes = [0; LANES];
                        outer_of_lanes.copy_from_slice(outer.as_flattened());
                        let weights = lanes.times(lanes.i8(factors), lanes.f16(&outer_of_lanes));
                        lanes.store(weights, to);
                    }
                }
            }
        }
    }
}

/// Prefetches beyond these scales, as far as [`panels`](super::panels) prefetches beyond their
/// codes.
#[inline(always)]
fn prefetch_after<L: Lanes, T>(lanes: L, scales: &[T]) {
    const AHEAD: usize = 1 << 10;
    let begin = scales.as_ptr().cast::<u8>();
    for line in 0..size_of_val(scales).div_ceil(64) {
        lanes.prefetch::<true>(begin.wrapping_add(AHEAD + 64 * line));
    }
}

/// Where the codes and scales of a strip go.
struct StripPlace<'a> {
    codes: &'a mut [CacheLine],
    floats: &'a mut [f32],
    halves: [&'a mut [u16]; 2],
    factors: [&'a mut [i8]; 2],
}

impl<'a> StripPlace<'a> {
    /// The places of `count` strips, `lines` lines and `lengths` scales in each.
    fn cut(
        codes: &'a mut [CacheLine],
        lines: usize,
        scales: &'a mut BlockScales,
        lengths: ScaleLengths,
        count: usize,
    ) -> Vec<Self> {
        let [halves, half_minima] = &mut scales.halves;
        let [factors, factor_minima] = &mut scales.factors;
        let mut codes = pieces(codes, lines, count);
        let mut floats = pieces(&mut scales.floats, lengths.floats, count);
        let mut halves = pieces(halves, lengths.halves[0], count);
        let mut half_minima = pieces(half_minima, lengths.halves[1], count);
        let mut factors = pieces(factors, lengths.factors[0], count);
        let mut factor_minima = pieces(factor_minima, lengths.factors[1], count);
        std::iter::from_fn(|| {
            Some(Self {
                codes: codes.next()?,
                floats: floats.next()?,
                halves: [halves.next()?, half_minima.next()?],
                factors: [factors.next()?, factor_minima.next()?],
            })
        })
        .collect()
    }

    fn prepack(&mut self, strip: &BlockStrip) {
        prepack_codes(strip, self.codes);
        transpose(&strip.scales.floats, strip.rows, self.floats);
        for (from, to) in strip.scales.halves.iter().zip(&mut self.halves) {
            transpose(from, strip.rows, to);
        }
        for (from, to) in strip.scales.factors.iter().zip(&mut self.factors) {
            transpose(from, strip.rows, to);
        }
    }
}

/// `count` pieces of `len` elements, the last ones shorter or empty.
fn pieces<T>(all: &mut [T], len: usize, count: usize) -> impl Iterator<Item = &mut [T]> {
    let mut rest = all;
    (0..count).map(move |_| {
        let here = len.min(rest.len());
        let (piece, after) = std::mem::take(&mut rest).split_at_mut(here);
        rest = after;
        piece
    })
}

/// `[rows, n]` to `[panels, n, 4]`.
fn transpose<T: Copy>(from: &[T], rows: usize, to: &mut [T]) {
    let n = from.len() / rows.max(1);
    for (row, from) in from.chunks_exact(n.max(1)).enumerate() {
        let to = &mut to[row / PANEL * n * PANEL + row % PANEL..];
        from.iter()
            .zip(to.iter_mut().step_by(PANEL))
            .for_each(|(from, to)| *to = *from);
    }
}

/// The codes of a strip in lines.
fn prepack_codes(strip: &BlockStrip, lines: &mut [CacheLine]) {
    let rows = |panel: usize| -> [&[u8]; PANEL] {
        // Missing rows repeat the last one.
        std::array::from_fn(|r| {
            &strip.codes[(panel * PANEL + r).min(strip.rows - 1) * strip.stride..][..strip.stride]
        })
    };
    let lines_of_row = strip.stride / strip.kind.codes.line();
    for (panel, lines) in lines
        .chunks_exact_mut(lines_of_row.max(1))
        .take(strip.rows.div_ceil(PANEL))
        .enumerate()
    {
        let rows = rows(panel);
        match strip.kind.codes {
            BlockCodes::Trits => interleave::<4>(rows, lines),
            BlockCodes::Int4 => interleave::<2>(rows, lines),
            BlockCodes::Int8 => {
                for (r, row) in rows.into_iter().enumerate() {
                    row.as_chunks::<LANES>()
                        .0
                        .iter()
                        .zip(&mut *lines)
                        .for_each(|(step, line)| line.0.as_chunks_mut().0[r] = *step);
                }
            }
        }
    }
}

/// Byte `4j + r` gets the codes of lane j of row r in F steps.
fn interleave<const F: usize>(rows: [&[u8]; PANEL], lines: &mut [CacheLine]) {
    let bits = 8 / F;
    for (i, line) in lines.iter_mut().enumerate() {
        let mut bytes = [[0u8; LANES]; PANEL];
        for (bytes, row) in bytes.iter_mut().zip(rows) {
            for (f, step) in row[i * F * LANES..][..F * LANES]
                .as_chunks::<LANES>()
                .0
                .iter()
                .enumerate()
            {
                bytes
                    .iter_mut()
                    .zip(step)
                    .for_each(|(byte, code)| *byte |= code << (bits * f));
            }
        }
        for (j, lane) in line.0.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            *lane = std::array::from_fn(|r| bytes[r][j]);
        }
    }
}

/// Rounds a row of floats to [`BlockType::INT8`]: scale max|w|/127 as binary16, then the nearest
/// value.
///
/// # Panics
/// If `row` is of another type or length.
pub fn quantize_int8(w: &[f32], row: &mut BlockRow<'_>) {
    quantize(
        w,
        row,
        |block| block.iter().fold(0.0f32, |m, w| m.max(w.abs())) / 127.0,
        127.0,
        0,
    );
}

/// Rounds a row of floats to [`BlockType::INT4`]: the weight of largest magnitude becomes −8 ·
/// scale, as in Q4_0.
///
/// # Panics
/// As [`quantize_int8`].
pub fn quantize_int4(w: &[f32], row: &mut BlockRow<'_>) {
    quantize(
        w,
        row,
        |block| {
            block
                .iter()
                .fold(0.0f32, |m, &w| if w.abs() > m.abs() { w } else { m })
                / -8.0
        },
        7.0,
        8,
    );
}

/// Scales by `step`, values up to `high` and down to −8 or −`high`, codes `offset` above them.
#[inline(always)]
fn quantize(
    w: &[f32],
    row: &mut BlockRow<'_>,
    step: impl Fn(&[f32]) -> f32,
    high: f32,
    offset: i8,
) {
    let low = if offset > 0 {
        -f32::from(offset)
    } else {
        -high
    };
    assert!(
        w.len() == row.codes.len() && row.halves[0].len() == w.len().div_ceil(BLOCK),
        "a row of {} weights",
        w.len()
    );
    for ((w, codes), scale) in w
        .chunks(BLOCK)
        .zip(row.codes.chunks_mut(BLOCK))
        .zip(&mut *row.halves[0])
    {
        let half = half::f16::from_f32(step(w));
        let step = half.to_f32();
        *scale = half.to_bits();
        for (code, &w) in codes.iter_mut().zip(w) {
            let value = if step != 0.0 {
                (w / step).round_ties_even().clamp(low, high)
            } else {
                0.0
            };
            *code = (value as i8 + offset).cast_unsigned();
        }
    }
}
