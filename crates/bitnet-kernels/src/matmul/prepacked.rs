//! Weights in the kernel layout.

use super::activations::Shape;
use super::coding::{Coding, Values};
use super::{PANEL, STEP_BYTES, Stream, lay, trits};
use crate::lines::{Line, Lines};
use crate::{Error, Kernels, Pool};
use bitnet_core::pack::{FastPath, Layout};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ZeroPoints};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Weights `(N, K)` in the kernel layout. Private to this crate and this process: it is never
/// written to a file.
#[derive(Debug, Clone)]
pub struct Prepacked {
    rows: usize,
    planes: usize,
    pub(super) precision: Precision,
    coding: Coding,
    shape: Shape,
    /// `[panels, planes, steps]` of 256 bytes.
    data: Lines,
    scales: Scales,
    zeros: Zeros,
}

/// Lines of a step.
const LINES: usize = STEP_BYTES / 64;
/// Columns that all rows of a panel are laid out for before the next ones are: about as many as the
/// nearest cache holds.
const BLOCK: usize = 1280;

type Row = [f32; PANEL];

#[derive(Debug, Clone)]
enum Scales {
    /// One for each plane.
    Tensor(Vec<Row>),
    /// `[planes, panels, groups]`, missing rows 0.
    Rows(Vec<Row>),
}

#[derive(Debug, Clone)]
enum Zeros {
    None,
    /// `[panels, groups]`, the integers.
    Integers(Vec<[i32; PANEL]>),
    /// `[panels, groups]`, scale times zero point.
    Floats(Vec<Row>),
}

fn unsupported(why: String) -> Error {
    bitnet_core::Error::Unsupported {
        layout: "the kernels",
        why,
    }
    .into()
}

/// A lock that one part has: a poisoned one belongs to a part that panicked, which ends the run.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A matrix without its values: what of a [`Matrix`] stays as it is.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// Shape and conventions.
    pub spec: &'a MatrixSpec,
    /// Scales, as in [`Matrix::scales`].
    pub scales: &'a [f32],
    /// Zero points, as in [`Matrix::zero_points`].
    pub zero_points: &'a [f32],
}

impl Prepacked {
    /// Lays a matrix out for the kernels: ternary of one to three planes in the two-bit stream,
    /// binary, or integers of 2, 3, 4 and 8 bits, with or without zero points, with any
    /// granularity.
    ///
    /// # Errors
    /// [`Error::Matrix`] for a value outside the alphabet, for a matrix whose parts do not fit one
    /// another, for zero points that are no integers of the alphabet where integers they must be,
    /// and for more columns than sums of 32 bits hold: [`MAX_COLS`](super::MAX_COLS), 2,097,151 for
    /// int4, 131,071 for int8, and half as many as the last two with zero points.
    pub fn new(matrix: &Matrix, pool: &Pool) -> Result<Self, Error> {
        Self::with_stream(matrix, Stream::TwoBit, pool)
    }

    /// The same, with ternary weights in the stream that the caller names. It makes no difference
    /// to other precisions.
    ///
    /// # Errors
    /// As [`Prepacked::new`].
    pub fn with_stream(matrix: &Matrix, stream: Stream, pool: &Pool) -> Result<Self, Error> {
        matrix.validate()?;
        let mut packed = Self::empty(
            Parts {
                spec: &matrix.spec,
                scales: &matrix.scales,
                zero_points: &matrix.zero_points,
            },
            stream,
        )?;
        let (rows, cols) = (packed.rows, packed.cols());
        let values =
            |plane: usize, row: usize| &matrix.values[(plane * rows + row) * cols..][..cols];
        let panels = packed.panels();
        packed.fill(pool, panels, |part, put| {
            for plane in 0..matrix.spec.planes {
                let of_panel: Vec<&[i8]> = (part * PANEL..rows.min((part + 1) * PANEL))
                    .map(|row| values(plane, row))
                    .collect();
                put(part, plane, &of_panel)?;
            }
            Ok(())
        })?;
        Ok(packed)
    }

    /// Lays out a matrix from the bytes of a wire layout, without ever holding all its values. The
    /// scales are those inside the bytes, where the layout stores them, else `parts.scales`.
    ///
    /// ```
    /// use bitnet_core::{Granularity, MatrixSpec, Precision, pack};
    /// use bitnet_kernels::{Kernels, Pool, matmul::{Parts, Prepacked, Stream}};
    /// let (kernels, pool) = (Kernels::detect(), Pool::single());
    /// let spec = MatrixSpec::new(4, 3, Precision::Ternary, Granularity::Tensor);
    /// let layout = pack::by_name("hf-bitnet")?;
    /// // Four rows a byte: +1 in the first, 0 in the second, −1 in the others.
    /// let parts = Parts { spec: &spec, scales: &[0.5], zero_points: &[] };
    /// let w = Prepacked::from_wire(&kernels, &pool, layout, parts, &[0b00_00_01_10; 3], Stream::TwoBit)?;
    /// assert_eq!((w.rows(), w.cols()), (4, 3));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// What the layout finds wrong with the bytes, and as [`Prepacked::new`].
    pub fn from_wire(
        kernels: &Kernels,
        pool: &Pool,
        layout: &dyn Layout,
        parts: Parts<'_>,
        bytes: &[u8],
        stream: Stream,
    ) -> Result<Self, Error> {
        let unpack = |spec: &MatrixSpec, bytes: &[u8]| {
            if bytes.len() != layout.packed_len(spec).bound() {
                // Nothing is allocated for bytes that are not there.
                return layout.unpack(spec, bytes).map(|u| (u.values, u.scales));
            }
            let mut values = vec![0; spec.values_len()];
            let scales =
                crate::stream::unpack(*kernels, &Pool::single(), layout, spec, bytes, &mut values)?;
            Ok((values, scales))
        };
        let spec = parts.spec;
        layout.check(spec)?;
        let expected = layout.packed_len(spec).bound();
        let strip = match (layout.fast_path(), layout.chunk_rows(spec)) {
            // Row r and those a quarter of the matrix further on share bytes: a strip is four
            // panels.
            (Some(FastPath::QuarterRows), _)
                if spec.rows.is_multiple_of(4 * PANEL) && bytes.len() == expected =>
            {
                return Self::from_quarters(unpack, parts, bytes, stream, pool);
            }
            (_, Some(chunk))
                if spec.planes == 1
                    && PANEL.is_multiple_of(chunk.max(1))
                    && bytes.len() == expected =>
            {
                PANEL
            }
            _ => spec.rows,
        };
        if strip >= spec.rows {
            let (values, scales) = unpack(spec, bytes)?;
            let scales = scales.unwrap_or_else(|| parts.scales.to_vec());
            let matrix = Matrix {
                spec: spec.clone(),
                values,
                scales,
                zero_points: parts.zero_points.to_vec(),
            };
            return Self::with_stream(&matrix, stream, pool);
        }
        let of = |rows: usize| layout.packed_len(&spec.with_rows(rows)).bound();
        let strip = |panel: usize| {
            let rows = panel * PANEL..spec.rows.min((panel + 1) * PANEL);
            (
                spec.with_rows(rows.len()),
                &bytes[of(rows.start)..of(rows.end)],
            )
        };
        let mut inside = vec![];
        let panels = spec.rows.div_ceil(PANEL);
        if layout.stores_scales() {
            // The scales come first: what they are decides how the columns are grouped.
            let found: Vec<_> = (0..panels).map(|_| Mutex::new(Ok(vec![]))).collect();
            pool.run(panels, |panel| {
                let (spec, bytes) = strip(panel);
                *lock(&found[panel]) = layout.scales(&spec, bytes).map(Option::unwrap_or_default);
            });
            for scales in found {
                inside.extend(
                    scales
                        .into_inner()
                        .unwrap_or_else(PoisonError::into_inner)?,
                );
            }
            if spec.granularity == Granularity::Tensor {
                inside.truncate(1);
            }
        }
        let parts = Parts {
            scales: if layout.stores_scales() {
                &inside
            } else {
                parts.scales
            },
            ..parts
        };
        let mut packed = Self::empty(parts, stream)?;
        packed.fill(pool, panels, |panel, put| {
            let (spec, bytes) = strip(panel);
            let (values, _) = unpack(&spec, bytes)?;
            put(
                panel,
                0,
                &values.chunks(spec.cols.max(1)).collect::<Vec<_>>(),
            )
        })?;
        Ok(packed)
    }

    /// [`Prepacked::from_wire`] of the layout whose bytes hold four rows a quarter of the matrix
    /// apart.
    fn from_quarters(
        unpack: impl Fn(&MatrixSpec, &[u8]) -> bitnet_core::Result<(Vec<i8>, Option<Vec<f32>>)> + Sync,
        parts: Parts<'_>,
        bytes: &[u8],
        stream: Stream,
        pool: &Pool,
    ) -> Result<Self, Error> {
        let mut packed = Self::empty(parts, stream)?;
        let (cols, quarter) = (packed.cols(), packed.panels() / 4);
        packed.fill(pool, quarter, |part, put| {
            let strip = PANEL * cols;
            let (values, _) = unpack(
                &parts.spec.with_rows(4 * PANEL),
                &bytes[part * strip..][..strip],
            )?;
            for (i, values) in values.chunks(strip.max(1)).enumerate() {
                put(
                    i * quarter + part,
                    0,
                    &values.chunks(cols.max(1)).collect::<Vec<_>>(),
                )?;
            }
            Ok(())
        })?;
        Ok(packed)
    }

    /// A matrix of zeros with these scales and zero points.
    fn empty(parts: Parts<'_>, stream: Stream) -> Result<Self, Error> {
        let Parts {
            spec,
            scales,
            zero_points,
        } = parts;
        spec.validate()?;
        let length = |what, expected, got| bitnet_core::Error::Length {
            what,
            expected,
            got,
        };
        if scales.len() != spec.scales_len() {
            return Err(length("scales", spec.scales_len(), scales.len()).into());
        }
        if let Some(index) = scales.iter().position(|s| !s.is_finite()) {
            return Err(bitnet_core::Error::NotFinite {
                index,
                value: scales[index],
            }
            .into());
        }
        let expected = if spec.zero_points == ZeroPoints::None {
            0
        } else {
            spec.scales_len()
        };
        if zero_points.len() != expected {
            return Err(length("zero points", expected, zero_points.len()).into());
        }
        let most = Values::of(spec.precision).max_cols(spec.zero_points);
        if spec.cols > most {
            return Err(unsupported(format!(
                "{} columns of {}, at most {most}",
                spec.cols, spec.precision
            )));
        }
        let coding = match (spec.precision, stream) {
            (Precision::Ternary, Stream::Trits) => Coding::Trits,
            (Precision::Ternary, Stream::TwoBit) | (Precision::Int2, _) => Coding::Bits2,
            (Precision::Binary, _) => Coding::Bits1,
            (Precision::Int3 | Precision::Int4, _) => Coding::Bits4,
            (Precision::Int8, _) => Coding::Bits8,
        };
        // Groups that share a scale and a zero point are one: that is what an f16 scale in every
        // block of a per-tensor matrix comes to.
        let per_row = spec.granules_per_row();
        let same = |all: &[f32]| {
            all.chunks(per_row.max(1))
                .all(|row| row.iter().all(|s| s.to_bits() == row[0].to_bits()))
        };
        let merged = match spec.granularity {
            Granularity::Group(_) if same(scales) && same(zero_points) => Granularity::Channel,
            other => other,
        };
        let groups = if merged == spec.granularity {
            per_row
        } else {
            1
        };
        let one = |all: &[f32], plane: usize, row: usize, g: usize| match spec.granularity {
            Granularity::Tensor => all[plane],
            _ => all[(plane * spec.rows + row) * per_row + g],
        };
        let group = match merged {
            Granularity::Group(g) => g.min(spec.cols.max(1)),
            Granularity::Tensor | Granularity::Channel => spec.cols.max(1),
        };
        let panels = spec.rows.div_ceil(PANEL);
        let rows_of = |planes: usize, value: &dyn Fn(usize, usize, usize) -> f32| -> Vec<Row> {
            let of = |i: usize| {
                let (plane, panel, g) = (i / (panels * groups), i / groups % panels, i % groups);
                std::array::from_fn(|r| {
                    if panel * PANEL + r < spec.rows {
                        value(plane, panel * PANEL + r, g)
                    } else {
                        0.0
                    }
                })
            };
            (0..planes * panels * groups).map(of).collect()
        };
        let uniform = merged == Granularity::Tensor;
        let (low, high) = spec.precision.range();
        let zeros = match spec.zero_points {
            ZeroPoints::None => Zeros::None,
            ZeroPoints::I8 => {
                if let Some(z) = zero_points
                    .iter()
                    .find(|z| z.fract() != 0.0 || !(f32::from(low)..=f32::from(high)).contains(*z))
                {
                    return Err(unsupported(format!(
                        "zero point {z}, which is no integer in {low}..={high}"
                    )));
                }
                let rows = rows_of(1, &|_, row, g| one(zero_points, 0, row, g));
                Zeros::Integers(rows.into_iter().map(|r| r.map(|z| z as i32)).collect())
            }
            ZeroPoints::F32 => Zeros::Floats(rows_of(1, &|_, row, g| {
                one(scales, 0, row, g) * one(zero_points, 0, row, g)
            })),
        };
        let scales = if uniform {
            Scales::Tensor(scales.iter().map(|&s| [s; PANEL]).collect())
        } else {
            Scales::Rows(rows_of(spec.planes, &|plane, row, g| {
                one(scales, plane, row, g)
            }))
        };
        let shape = Shape::new(spec.cols, group, coding.step());
        let mut packed = Self {
            rows: spec.rows,
            planes: spec.planes,
            precision: spec.precision,
            coding,
            shape,
            data: Lines::filled(Line([0; 64]), 0),
            scales,
            zeros,
        };
        let zero = match coding {
            Coding::Trits => trits::ZERO,
            Coding::Bits1 => 0,
            Coding::Bits2 => 0b01_01_01_01 * Values::of(spec.precision).offset as u8,
            Coding::Bits4 => 0x11 * Values::of(spec.precision).offset as u8,
            Coding::Bits8 => 128,
        };
        packed.data = Lines::filled(
            Line([zero; 64]),
            panels * packed.planes * packed.steps() * LINES,
        );
        Ok(packed)
    }

    /// Runs `part` for each part on the pool; it gets its number and what writes the values of a
    /// panel and a plane, a slice for each row.
    fn fill(
        &mut self,
        pool: &Pool,
        parts: usize,
        part: impl Fn(
            usize,
            &dyn Fn(usize, usize, &[&[i8]]) -> Result<(), bitnet_core::Error>,
        ) -> Result<(), bitnet_core::Error>
        + Sync,
    ) -> Result<(), Error> {
        let lines = self.planes * self.steps() * LINES;
        let mut data = std::mem::replace(&mut self.data, Lines::filled(Line([0; 64]), 0));
        let panels: Vec<_> = data.chunks_mut(lines.max(1)).map(Mutex::new).collect();
        let failed = Mutex::new(None::<(usize, bitnet_core::Error)>);
        let (packed, kernels) = (&*self, Kernels::detect());
        pool.run(parts, |number| {
            let put = |panel: usize, plane: usize, rows: &[&[i8]]| {
                // A matrix without columns has no lines to write.
                let Some(lines) = panels.get(panel) else {
                    return Ok(());
                };
                let mut lines = lock(lines);
                packed.check(kernels, panel, plane, rows)?;
                let steps = packed.steps() * LINES;
                packed.lay_out(kernels, rows, &mut lines[plane * steps..][..steps]);
                Ok(())
            };
            if let Err(error) = part(number, &put) {
                let mut first = lock(&failed);
                if first.as_ref().is_none_or(|(n, _)| number < *n) {
                    *first = Some((number, error));
                }
            }
        });
        drop(panels);
        self.data = data;
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some((_, error)) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// That every value is in the alphabet.
    fn check(
        &self,
        kernels: Kernels,
        panel: usize,
        plane: usize,
        rows: &[&[i8]],
    ) -> Result<(), bitnet_core::Error> {
        let (low, high) = self.precision.range();
        let binary = self.precision == Precision::Binary;
        for (r, values) in rows.iter().enumerate() {
            // The search for the place is for the one row that needs it.
            if lay::outside(kernels, values, low, high, binary) {
                let at = values
                    .iter()
                    .position(|&v| !self.precision.contains(v))
                    .unwrap_or(0);
                let index = (plane * self.rows + panel * PANEL + r) * self.cols() + at;
                return Err(bitnet_core::Error::Value {
                    index,
                    got: i32::from(values[at]),
                    expected: self.precision.alphabet(),
                });
            }
        }
        Ok(())
    }

    /// Writes the codes of one plane of a panel.
    fn lay_out(&self, kernels: Kernels, rows: &[&[i8]], lines: &mut [Line]) {
        let offset = Values::of(self.precision).offset as u8;
        let add = |v: i8| v.cast_unsigned().wrapping_add(offset);
        let one_by_one = |_: &[i8], _: &mut [u32]| 0;
        match self.coding {
            Coding::Bits1 => self.lay_out_as::<8>(
                rows,
                lines,
                one_by_one,
                |v| (v > 0).into(),
                |q| (0..8).fold(0, |lane, f| lane | q[f] << f),
            ),
            Coding::Bits2 => {
                let quads =
                    |values: &[i8], lanes: &mut [u32]| lay::quads(kernels, values, offset, lanes);
                self.lay_out_as::<4>(rows, lines, quads, add, |q| {
                    q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6
                })
            }
            Coding::Bits4 => {
                self.lay_out_as::<2>(rows, lines, one_by_one, add, |q| q[0] | q[1] << 4)
            }
            Coding::Bits8 => self.lay_out_as::<1>(rows, lines, one_by_one, add, |q| q[0]),
            Coding::Trits => self.lay_out_as::<5>(rows, lines, one_by_one, add, trits::pack),
        }
    }

    /// `many` makes the lanes of the first steps of a row and says of how many; `lane` makes the
    /// lane of a step out of the codes of its F fields.
    #[inline(always)]
    fn lay_out_as<const F: usize>(
        &self,
        rows: &[&[i8]],
        lines: &mut [Line],
        many: impl Fn(&[i8], &mut [u32]) -> usize,
        code: impl Fn(i8) -> u8,
        lane: impl Fn([u32; F]) -> u32,
    ) {
        let step = 4 * F;
        let lane_of = |values: &[i8]| {
            let mut codes = [[code(0); 4]; F];
            codes
                .as_flattened_mut()
                .iter_mut()
                .zip(values)
                .for_each(|(c, &v)| *c = code(v));
            lane(codes.map(u32::from_le_bytes))
        };
        let mut lanes = [0; BLOCK / 4];
        for g in 0..self.groups() {
            let cols = self.group_cols(g);
            let lines = &mut lines[self.group_steps(g).start * LINES..];
            for first in cols.clone().step_by(BLOCK) {
                let lines = &mut lines[(first - cols.start) / step * LINES..];
                for (r, values) in rows.iter().enumerate() {
                    let values = &values[first..cols.end.min(first + BLOCK)];
                    let lanes = &mut lanes[..values.len().div_ceil(step)];
                    let done = many(values, lanes);
                    lanes[done..]
                        .iter_mut()
                        .zip(values[done * step..].chunks(step))
                        .for_each(|(lane, values)| *lane = lane_of(values));
                    for (lines, lane) in lines.chunks_exact_mut(LINES).zip(lanes) {
                        lines[r / 16].0[r % 16 * 4..][..4].copy_from_slice(&lane.to_le_bytes());
                    }
                }
            }
        }
    }

    /// The matrix `times` times under itself, where one scale is for all rows.
    pub(crate) fn repeated(&self, times: usize) -> Self {
        assert!(
            self.rows.is_multiple_of(PANEL)
                && matches!(
                    (&self.scales, &self.zeros),
                    (Scales::Tensor(_), Zeros::None)
                )
        );
        let mut data = Lines::filled(Line([0; 64]), self.data.len() * times);
        data.chunks_mut(self.data.len().max(1))
            .for_each(|copy| copy.copy_from_slice(&self.data));
        Self {
            rows: self.rows * times,
            data,
            scales: self.scales.clone(),
            zeros: Zeros::None,
            ..*self
        }
    }

    /// N, the number of output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, the number of input features.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// Planes, each with scales of its own.
    pub fn planes(&self) -> usize {
        self.planes
    }

    /// Bytes of the codes, padding included.
    pub fn bytes(&self) -> usize {
        self.data.len() * 64
    }

    /// Bytes of everything it holds.
    pub fn memory(&self) -> usize {
        let rows = match &self.scales {
            Scales::Tensor(rows) | Scales::Rows(rows) => rows.len(),
        };
        let zeros = match &self.zeros {
            Zeros::None => 0,
            Zeros::Integers(rows) => rows.len(),
            Zeros::Floats(rows) => rows.len(),
        };
        self.bytes() + (rows + zeros) * size_of::<Row>()
    }

    /// The kernel that a product with int8 activations runs, as instruction set and types, such as
    /// `avx512-w2a8`.
    pub fn kernel_name(&self, kernels: &Kernels) -> String {
        format!("{}-{}a8", kernels.isa(), self.describe())
    }

    /// Weight type, as kernel names have it.
    pub(crate) fn describe(&self) -> &'static str {
        match (self.precision, self.coding) {
            (Precision::Ternary, Coding::Trits) => "w1.6",
            (Precision::Ternary, _) => "w1.58",
            (Precision::Binary, _) => "w1",
            (Precision::Int2, _) => "w2",
            (Precision::Int3, _) => "w3",
            (Precision::Int4, _) => "w4",
            (Precision::Int8, _) => "w8",
        }
    }

    /// Whether float activations can meet it.
    pub(crate) fn takes_floats(&self) -> bool {
        self.precision == Precision::Ternary && self.coding == Coding::Bits2
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn coding(&self) -> Coding {
        self.coding
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Scale groups along a row; neighbours that share a scale are one.
    pub fn groups(&self) -> usize {
        self.shape.groups()
    }

    /// Columns of one group.
    pub(super) fn group_cols(&self, group: usize) -> Range<usize> {
        group * self.shape.group..self.cols().min((group + 1) * self.shape.group)
    }

    /// Steps of a whole row of a plane.
    pub(crate) fn steps(&self) -> usize {
        match self.groups() {
            0 => 0,
            n => self.group_steps(n - 1).end,
        }
    }

    /// Steps of one group.
    pub(crate) fn group_steps(&self, group: usize) -> Range<usize> {
        let step = self.coding.step();
        let first = group * self.shape.group.div_ceil(step);
        first..first + self.group_cols(group).len().div_ceil(step)
    }

    /// The codes of some steps of a plane of a panel.
    pub(crate) fn codes(&self, panel: usize, plane: usize, steps: Range<usize>) -> &[u8] {
        let first = ((panel * self.planes + plane) * self.steps() + steps.start) * LINES;
        Lines::bytes(&self.data[first..first + steps.len() * LINES])
    }

    /// The scale of each row of a panel in a group.
    pub(crate) fn scales(&self, panel: usize, plane: usize, group: usize) -> &Row {
        match &self.scales {
            Scales::Tensor(scales) => &scales[plane],
            Scales::Rows(scales) => {
                &scales[(plane * self.panels() + panel) * self.groups() + group]
            }
        }
    }

    /// What the sums of a panel and a group begin with, where Σ x of the group is `x`.
    pub(crate) fn start(&self, panel: usize, group: usize, x: i32) -> [i32; PANEL] {
        let offset = Values::of(self.precision).offset;
        match &self.zeros {
            Zeros::Integers(zeros) => zeros[panel * self.groups() + group]
                .map(|z| (offset + z).wrapping_mul(x).wrapping_neg()),
            Zeros::None | Zeros::Floats(_) => [offset.wrapping_mul(x).wrapping_neg(); PANEL],
        }
    }

    /// Scale times float zero point of each row of a panel in a group.
    pub(crate) fn shift(&self, panel: usize, group: usize) -> Option<&Row> {
        match &self.zeros {
            Zeros::Floats(zeros) => Some(&zeros[panel * self.groups() + group]),
            Zeros::None | Zeros::Integers(_) => None,
        }
    }
}
