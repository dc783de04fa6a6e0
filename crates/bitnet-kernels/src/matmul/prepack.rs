//! Weights from a matrix, or from the bytes of a wire layout, to the kernel layout.

use super::coding::{CodeValues, Coding, Stream};
use super::prepacked::Prepacked;
use super::prepacked::{LINES, MatrixParameters, PanelFloats, PanelScales, PanelZeroPoints};
use super::shape::{PANEL, PaddedShape};
use super::trits;
use crate::error::Error;
use crate::kernels::Kernels;
use crate::lines::{CacheLine, Lines};
use crate::parallel::lock;
use crate::pool::Pool;
use bitnet_core::pack::{FastPath, Layout};
use bitnet_core::{Granularity, Matrix, MatrixSpec, ZeroPoints};
use std::sync::{Mutex, PoisonError};

/// Columns that are prepacked for all rows of a panel before the next columns: about the size of
/// the nearest cache.
const BLOCK: usize = 1280;

fn unsupported(why: String) -> Error {
    bitnet_core::Error::Unsupported {
        layout: "the kernels",
        why,
    }
    .into()
}

/// Unpacks some rows of a wire layout: values, and scales where the layout stores them.
trait Unpack:
    Fn(&MatrixSpec, &[u8]) -> bitnet_core::Result<(Vec<i8>, Option<Vec<f32>>)> + Sync
{
}
impl<F> Unpack for F where
    F: Fn(&MatrixSpec, &[u8]) -> bitnet_core::Result<(Vec<i8>, Option<Vec<f32>>)> + Sync
{
}

/// Writes the values of a panel and a plane, a slice for each row.
type PutPanel<'a> = dyn Fn(usize, usize, &[&[i8]]) -> bitnet_core::Result<()> + 'a;

impl Prepacked {
    /// Prepacks a matrix: ternary of one to three planes in the two-bit stream, binary, or integers
    /// of 2, 3, 4 and 8 bits, with or without zero points, with any granularity.
    ///
    /// # Errors
    /// [`Error::Matrix`] for a value outside the alphabet, for a matrix whose parts do not fit one
    /// another, for zero points that are no integers of the alphabet where they must be, and for
    /// more columns than 32-bit sums hold: [`MAX_COLS`](super::MAX_COLS), 2,097,151 for int4,
    /// 131,071 for int8, and half as many as the last two with zero points.
    pub fn new(matrix: &Matrix, pool: &Pool) -> Result<Self, Error> {
        Self::with_stream(matrix, Stream::TwoBit, pool)
    }

    /// [`Prepacked::new`] with ternary weights in the given stream. The stream makes no difference
    /// to other precisions.
    ///
    /// # Errors
    /// Those of [`Prepacked::new`].
    pub fn with_stream(matrix: &Matrix, stream: Stream, pool: &Pool) -> Result<Self, Error> {
        matrix.validate()?;
        let parameters = MatrixParameters {
            spec: &matrix.spec,
            scales: &matrix.scales,
            zero_points: &matrix.zero_points,
        };
        let mut packed = Self::empty(parameters, stream)?;
        let (rows, cols) = (packed.rows, packed.cols());
        let values =
            |plane: usize, row: usize| &matrix.values[(plane * rows + row) * cols..][..cols];
        let panels = packed.panels();
        packed.fill(pool, panels, |panel, put| {
            for plane in 0..matrix.spec.planes {
                let of_panel: Vec<&[i8]> = (panel * PANEL..rows.min((panel + 1) * PANEL))
                    .map(|row| values(plane, row))
                    .collect();
                put(panel, plane, &of_panel)?;
            }
            Ok(())
        })?;
        Ok(packed)
    }

    /// Prepacks a matrix from the bytes of a wire layout, without ever holding all its values. The
    /// scales are those inside the bytes, where the layout stores them, else `parameters.scales`.
    ///
    /// ```
    /// use bitnet_core::{Granularity, MatrixSpec, Precision, pack};
    /// use bitnet_kernels::{Kernels, Pool, matmul::{MatrixParameters, Prepacked, Stream}};
    /// let (kernels, pool) = (Kernels::detect(), Pool::single());
    /// let spec = MatrixSpec::new(4, 3, Precision::Ternary, Granularity::Tensor);
    /// let layout = pack::by_name("hf-bitnet")?;
    /// // Four rows a byte: +1 in the first, 0 in the second, −1 in the others.
    /// let bytes = [0b00_00_01_10; 3];
    /// let parameters = MatrixParameters { spec: &spec, scales: &[0.5], zero_points: &[] };
    /// let w = Prepacked::from_wire(&kernels, &pool, layout, parameters, &bytes, Stream::TwoBit)?;
    /// assert_eq!((w.rows(), w.cols()), (4, 3));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The layout's error for the bytes, and the errors of [`Prepacked::new`].
    pub fn from_wire(
        kernels: &Kernels,
        pool: &Pool,
        layout: &dyn Layout,
        parameters: MatrixParameters<'_>,
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
        let spec = parameters.spec;
        layout.check(spec)?;
        let whole = bytes.len() == layout.packed_len(spec).bound();
        // Row r and those a quarter of the matrix further on share bytes: a strip is four panels.
        let quarters = layout.fast_path() == Some(FastPath::QuarterRows);
        if quarters && spec.rows.is_multiple_of(4 * PANEL) && whole {
            return Self::from_quarters(unpack, parameters, bytes, stream, pool);
        }
        let panels_are_chunks = layout
            .chunk_rows(spec)
            .is_some_and(|chunk| PANEL.is_multiple_of(chunk.max(1)));
        if panels_are_chunks && spec.planes == 1 && whole && spec.rows > PANEL {
            return Self::from_panels(unpack, layout, parameters, bytes, stream, pool);
        }
        let (values, scales) = unpack(spec, bytes)?;
        let matrix = Matrix {
            spec: spec.clone(),
            values,
            scales: scales.unwrap_or_else(|| parameters.scales.to_vec()),
            zero_points: parameters.zero_points.to_vec(),
        };
        Self::with_stream(&matrix, stream, pool)
    }

    /// [`Prepacked::from_wire`] of a layout whose bytes can be cut between panels.
    fn from_panels(
        unpack: impl Unpack,
        layout: &dyn Layout,
        parameters: MatrixParameters<'_>,
        bytes: &[u8],
        stream: Stream,
        pool: &Pool,
    ) -> Result<Self, Error> {
        let spec = parameters.spec;
        let bytes_of = |rows: usize| layout.packed_len(&spec.with_rows(rows)).bound();
        let strip = |panel: usize| {
            let rows = panel * PANEL..spec.rows.min((panel + 1) * PANEL);
            (
                spec.with_rows(rows.len()),
                &bytes[bytes_of(rows.start)..bytes_of(rows.end)],
            )
        };
        let mut inside = vec![];
        let panels = spec.rows.div_ceil(PANEL);
        if layout.stores_scales() {
            // The scales come first: they decide how the columns are grouped.
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
        let parameters = MatrixParameters {
            scales: if layout.stores_scales() {
                &inside
            } else {
                parameters.scales
            },
            ..parameters
        };
        let mut packed = Self::empty(parameters, stream)?;
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
        unpack: impl Unpack,
        parameters: MatrixParameters<'_>,
        bytes: &[u8],
        stream: Stream,
        pool: &Pool,
    ) -> Result<Self, Error> {
        let mut packed = Self::empty(parameters, stream)?;
        let (cols, quarter) = (packed.cols(), packed.panels() / 4);
        packed.fill(pool, quarter, |part, put| {
            let strip = PANEL * cols;
            let (values, _) = unpack(
                &parameters.spec.with_rows(4 * PANEL),
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
    fn empty(parameters: MatrixParameters<'_>, stream: Stream) -> Result<Self, Error> {
        check_parameters(parameters)?;
        let spec = parameters.spec;
        let (coding, granules) = (
            Coding::new(spec.precision, stream),
            Granules::new(parameters),
        );
        let mut packed = Self {
            rows: spec.rows,
            planes: spec.planes,
            precision: spec.precision,
            coding,
            shape: PaddedShape::new(spec.cols, granules.group_cols(), coding.step()),
            data: Lines::filled(CacheLine([0; 64]), 0),
            scales: granules.scales(),
            zeros: granules.zero_points(),
        };
        packed.data = Lines::filled(
            CacheLine([coding.zero_byte(spec.precision); 64]),
            packed.panels() * packed.planes * packed.steps() * LINES,
        );
        Ok(packed)
    }

    /// Runs `part` for each part on the pool; it gets its number, and the function that writes a
    /// panel.
    fn fill(
        &mut self,
        pool: &Pool,
        parts: usize,
        part: impl Fn(usize, &PutPanel<'_>) -> bitnet_core::Result<()> + Sync,
    ) -> Result<(), Error> {
        let lines = self.planes * self.steps() * LINES;
        let mut data = std::mem::replace(&mut self.data, Lines::filled(CacheLine([0; 64]), 0));
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
                packed.check_values(kernels, panel, plane, rows)?;
                let steps = packed.steps() * LINES;
                packed.write_panel(kernels, rows, &mut lines[plane * steps..][..steps]);
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

    /// Checks that every value is in the alphabet.
    fn check_values(
        &self,
        kernels: Kernels,
        panel: usize,
        plane: usize,
        rows: &[&[i8]],
    ) -> bitnet_core::Result<()> {
        let (low, high) = self.precision.range();
        let binary = self.precision == bitnet_core::Precision::Binary;
        for (r, values) in rows.iter().enumerate() {
            // Only a row that fails is searched for the place.
            if kernels.table.any_outside(values, low, high, binary) {
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
    fn write_panel(&self, kernels: Kernels, rows: &[&[i8]], lines: &mut [CacheLine]) {
        let offset = CodeValues::new(self.precision).offset as u8;
        let add = |v: i8| v.cast_unsigned().wrapping_add(offset);
        let one_by_one = |_: &[i8], _: &mut [u32]| 0;
        match self.coding {
            Coding::Bits1 => self.write_fields::<8>(
                rows,
                lines,
                one_by_one,
                |v| (v > 0).into(),
                |q| (0..8).fold(0, |lane, f| lane | q[f] << f),
            ),
            Coding::Bits2 => {
                let many = |values: &[i8], lanes: &mut [u32]| {
                    kernels.table.pack_lanes(values, offset, lanes)
                };
                self.write_fields::<4>(rows, lines, many, add, |q| {
                    q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6
                })
            }
            Coding::Bits4 => {
                self.write_fields::<2>(rows, lines, one_by_one, add, |q| q[0] | q[1] << 4)
            }
            Coding::Bits8 => self.write_fields::<1>(rows, lines, one_by_one, add, |q| q[0]),
            Coding::Trits => self.write_fields::<5>(rows, lines, one_by_one, add, trits::pack),
        }
    }

    /// `many` makes the lanes of the first steps of a row and returns their number; `lane` makes
    /// the lane of a step out of the codes of its F fields.
    #[inline(always)]
    fn write_fields<const F: usize>(
        &self,
        rows: &[&[i8]],
        lines: &mut [CacheLine],
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
}

/// Checks that scales and zero points are those of the matrix, and that 32-bit sums hold a row.
fn check_parameters(parameters: MatrixParameters<'_>) -> Result<(), Error> {
    let MatrixParameters {
        spec,
        scales,
        zero_points,
    } = parameters;
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
    let most = CodeValues::new(spec.precision).max_cols(spec.zero_points);
    if spec.cols > most {
        return Err(unsupported(format!(
            "{} columns of {}, at most {most}",
            spec.cols, spec.precision
        )));
    }
    let (low, high) = spec.precision.range();
    let is_value = |z: f32| z.fract() == 0.0 && (f32::from(low)..=f32::from(high)).contains(&z);
    match zero_points.iter().find(|&&z| !is_value(z)) {
        Some(z) if spec.zero_points == ZeroPoints::I8 => Err(unsupported(format!(
            "zero point {z}, which is no integer in {low}..={high}"
        ))),
        _ => Ok(()),
    }
}

/// Scales and zero points of a matrix, by panels. Groups that share both are merged, as those of a
/// per-tensor matrix with an f16 scale in every block.
struct Granules<'a> {
    parameters: MatrixParameters<'a>,
    /// Granularity after groups were merged.
    merged: Granularity,
    /// Groups of a row after they were merged.
    groups: usize,
}

impl<'a> Granules<'a> {
    fn new(parameters: MatrixParameters<'a>) -> Self {
        let spec = parameters.spec;
        let per_row = spec.granules_per_row();
        let same = |all: &[f32]| {
            all.chunks(per_row.max(1))
                .all(|row| row.iter().all(|s| s.to_bits() == row[0].to_bits()))
        };
        let merged = match spec.granularity {
            Granularity::Group(_) if same(parameters.scales) && same(parameters.zero_points) => {
                Granularity::Channel
            }
            other => other,
        };
        Self {
            parameters,
            merged,
            groups: if merged == spec.granularity {
                per_row
            } else {
                1
            },
        }
    }

    /// Columns of a group.
    fn group_cols(&self) -> usize {
        let cols = self.parameters.spec.cols.max(1);
        match self.merged {
            Granularity::Group(g) => g.min(cols),
            Granularity::Tensor | Granularity::Channel => cols,
        }
    }

    /// The number of `all`, scales or zero points, that a granule has.
    fn one(&self, all: &[f32], plane: usize, row: usize, g: usize) -> f32 {
        let spec = self.parameters.spec;
        match spec.granularity {
            Granularity::Tensor => all[plane],
            _ => all[(plane * spec.rows + row) * spec.granules_per_row() + g],
        }
    }

    /// `[planes, panels, groups]` of `value(plane, row, group)`, 0 for missing rows.
    fn by_panel(
        &self,
        planes: usize,
        value: impl Fn(usize, usize, usize) -> f32,
    ) -> Vec<PanelFloats> {
        let (rows, groups) = (self.parameters.spec.rows, self.groups);
        let panels = rows.div_ceil(PANEL);
        let panel_floats = |i: usize| {
            let (plane, panel, g) = (i / (panels * groups), i / groups % panels, i % groups);
            std::array::from_fn(|r| {
                if panel * PANEL + r < rows {
                    value(plane, panel * PANEL + r, g)
                } else {
                    0.0
                }
            })
        };
        (0..planes * panels * groups).map(panel_floats).collect()
    }

    fn scales(&self) -> PanelScales {
        let MatrixParameters { spec, scales, .. } = self.parameters;
        if self.merged == Granularity::Tensor {
            return PanelScales::Tensor(scales.iter().map(|&s| [s; PANEL]).collect());
        }
        PanelScales::Rows(
            self.by_panel(spec.planes, |plane, row, g| self.one(scales, plane, row, g)),
        )
    }

    fn zero_points(&self) -> PanelZeroPoints {
        let MatrixParameters {
            spec,
            scales,
            zero_points,
        } = self.parameters;
        match spec.zero_points {
            ZeroPoints::None => PanelZeroPoints::None,
            ZeroPoints::I8 => {
                let rows = self.by_panel(1, |_, row, g| self.one(zero_points, 0, row, g));
                PanelZeroPoints::Integers(rows.into_iter().map(|r| r.map(|z| z as i32)).collect())
            }
            ZeroPoints::F32 => PanelZeroPoints::Floats(self.by_panel(1, |_, row, g| {
                self.one(scales, 0, row, g) * self.one(zero_points, 0, row, g)
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::kernels::Kernels;
    use crate::matmul::prepack_loops::RUN;

    #[test]
    fn lanes_hold_the_codes() {
        for (offset, low, high) in [(1, -1, 1), (2, -2, 1)] {
            let span = i32::from(high) - i32::from(low) + 1;
            let values: Vec<i8> = (0..4 * RUN as i32 + 5)
                .map(|i| ((i * 5 + i / 7) % span) as i8 + low)
                .collect();
            let whole = values.len() / RUN * 4;
            let expected: Vec<u32> = values
                .chunks(16)
                .take(whole)
                .map(|step| {
                    step.iter()
                        .enumerate()
                        .map(|(c, v)| {
                            u32::from((v + offset).cast_unsigned()) << (8 * (c % 4) + c / 4 * 2)
                        })
                        .sum()
                })
                .collect();
            for kernels in Kernels::all() {
                let mut lanes = vec![u32::MAX; whole + 3];
                assert_eq!(
                    kernels
                        .table
                        .pack_lanes(&values, offset.cast_unsigned(), &mut lanes),
                    whole
                );
                assert_eq!(
                    (&lanes[..whole], &lanes[whole..]),
                    (&expected[..], &[u32::MAX; 3][..]),
                    "{}",
                    kernels.isa()
                );
                assert!(
                    !kernels.table.any_outside(&values, low, high, false)
                        && kernels.table.any_outside(&values, low, high, true)
                );
                for at in [0, 63, 100, values.len() - 1] {
                    let mut wrong = values.clone();
                    wrong[at] = high + 1;
                    assert!(kernels.table.any_outside(&wrong, low, high, false));
                }
            }
        }
    }
}
