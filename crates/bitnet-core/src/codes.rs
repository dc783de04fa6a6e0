//! The logical quantized matrix: values, scales and zero points, independent of any byte layout.

use crate::{Error, Granularity, Precision, Result, ScaleDtype};
use serde::{Deserialize, Serialize};

/// Whether there are zero points, and how they are stored: `w ≈ scale · (value − zero_point)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZeroPoints {
    /// Symmetric: every zero point is 0, none is stored.
    None,
    /// One signed integer per granule, in the range of the precision.
    I8,
    /// One f32 per granule: binary with two free levels.
    F32,
}

/// The shape and the conventions of a quantized matrix.
///
/// ```
/// use bitnet_core::{Granularity, MatrixSpec, Precision};
/// let spec = MatrixSpec::new(4, 300, Precision::Ternary, Granularity::Group(128));
/// assert_eq!(spec.granules_per_row(), 3);      // 128 + 128 + a tail of 44
/// assert_eq!(spec.scales_len(), 12);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatrixSpec {
    /// N, the number of output features.
    pub rows: usize,
    /// K, the number of input features.
    pub cols: usize,
    /// Alphabet of the values.
    pub precision: Precision,
    /// Number of trit planes: `W ≈ Σ_p scale_p · T_p`. 1 except for ternary with several planes.
    pub planes: usize,
    /// Which weights share a scale.
    pub granularity: Granularity,
    /// How scales are stored; every scale is exactly representable in it.
    pub scale_dtype: ScaleDtype,
    /// How zero points are stored.
    pub zero_points: ZeroPoints,
}

impl MatrixSpec {
    /// A symmetric single-plane matrix with f32 scales.
    pub fn new(rows: usize, cols: usize, precision: Precision, granularity: Granularity) -> Self {
        Self {
            rows,
            cols,
            precision,
            planes: 1,
            granularity,
            scale_dtype: ScaleDtype::F32,
            zero_points: ZeroPoints::None,
        }
    }

    /// Rows as a layout sees them: the planes stacked under one another, `planes · N`.
    pub fn stacked_rows(&self) -> usize {
        self.planes * self.rows
    }

    /// Number of values, `planes · N · K`.
    pub fn values_len(&self) -> usize {
        self.planes * self.rows * self.cols
    }

    /// Number of weights, `N · K`: the denominator of bits per weight.
    pub fn weights_len(&self) -> usize {
        self.rows * self.cols
    }

    /// Granules along one row: `ceil(K / g)` for groups, else 1.
    pub fn granules_per_row(&self) -> usize {
        match self.granularity {
            Granularity::Group(g) => self.cols.div_ceil(g),
            Granularity::Tensor | Granularity::Channel => 1,
        }
    }

    /// Number of scales, all planes together. Order: plane, row, group.
    pub fn scales_len(&self) -> usize {
        self.planes
            * match self.granularity {
                Granularity::Tensor => 1,
                Granularity::Channel | Granularity::Group(_) => self.rows * self.granules_per_row(),
            }
    }

    /// Index of the scale that covers row `row` and column `col` of plane `plane`.
    pub fn scale_index(&self, plane: usize, row: usize, col: usize) -> usize {
        match self.granularity {
            Granularity::Tensor => plane,
            Granularity::Channel => plane * self.rows + row,
            Granularity::Group(g) => (plane * self.rows + row) * self.granules_per_row() + col / g,
        }
    }

    /// Columns of one granule; the last granule of a row may be shorter.
    pub fn granule_cols(&self) -> usize {
        match self.granularity {
            Granularity::Group(g) => g.min(self.cols).max(1),
            Granularity::Tensor | Granularity::Channel => self.cols.max(1),
        }
    }

    /// Bytes of one stored zero point.
    pub(crate) fn zero_point_bytes(&self) -> usize {
        match self.zero_points {
            ZeroPoints::None => 0,
            ZeroPoints::I8 => 1,
            ZeroPoints::F32 => 4,
        }
    }

    /// The same matrix with another number of rows: a horizontal strip of it.
    pub fn with_rows(&self, rows: usize) -> Self {
        Self {
            rows,
            ..self.clone()
        }
    }

    /// Checks that every size is representable and the fields agree with one another.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if `planes · N · K` overflows, [`Error::Scheme`] for a group of 0
    /// columns, no plane at all, several planes of something that is not ternary, or zero points
    /// that the precision does not have.
    pub fn validate(&self) -> Result<()> {
        let too_large = Error::TooLarge {
            rows: self.rows,
            cols: self.cols,
        };
        // No buffer of this engine takes more than sixteen bytes a value. Each side is checked too,
        // because the other one may be 0.
        const MOST: usize = isize::MAX as usize / 64;
        let side = self.rows.max(self.cols);
        let cells = self
            .rows
            .checked_mul(self.cols)
            .and_then(|n| n.checked_mul(self.planes));
        if side > MOST || cells.is_none_or(|n| n > MOST) {
            return Err(too_large);
        }
        if self.granularity == Granularity::Group(0) {
            return Err(Error::Scheme("a group of 0 columns".into()));
        }
        if self.planes == 0
            || self.planes > 3
            || (self.planes > 1 && self.precision != Precision::Ternary)
        {
            return Err(Error::Scheme(format!(
                "{} planes of {}; 1 to 3 planes exist, and only of ternary",
                self.planes, self.precision
            )));
        }
        let zero_points_fit = match self.zero_points {
            ZeroPoints::None => true,
            ZeroPoints::I8 => !matches!(self.precision, Precision::Ternary | Precision::Binary),
            ZeroPoints::F32 => self.precision == Precision::Binary,
        };
        if !zero_points_fit {
            return Err(Error::Scheme(format!(
                "{} has no {:?} zero points",
                self.precision, self.zero_points
            )));
        }
        Ok(())
    }
}

/// A quantized matrix: `w[r, c] ≈ Σ_p scale[p, granule(r, c)] · (value[p, r, c] − zero_point[p,
/// granule(r, c)])`.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Shape and conventions.
    pub spec: MatrixSpec,
    /// Logical signed values, `[planes, N, K]` row-major.
    pub values: Vec<i8>,
    /// Scales, `[planes, granules]`, each representable in `spec.scale_dtype`.
    pub scales: Vec<f32>,
    /// Zero points, `[granules]`; empty when `spec.zero_points` is [`ZeroPoints::None`].
    pub zero_points: Vec<f32>,
}

impl Matrix {
    /// Checks lengths against the spec.
    ///
    /// # Errors
    /// [`Error::Length`] naming the slice, or what [`MatrixSpec::validate`] finds.
    pub fn validate(&self) -> Result<()> {
        self.spec.validate()?;
        let length = |what, expected, got| {
            if expected == got {
                Ok(())
            } else {
                Err(Error::Length {
                    what,
                    expected,
                    got,
                })
            }
        };
        length("values", self.spec.values_len(), self.values.len())?;
        length("scales", self.spec.scales_len(), self.scales.len())?;
        let zero_points = if self.spec.zero_points == ZeroPoints::None {
            0
        } else {
            self.spec.scales_len()
        };
        length("zero points", zero_points, self.zero_points.len())
    }

    /// Dequantizes row `row` into `out` (`K` elements).
    ///
    /// Each plane contributes `scale · (value − zero_point)`, computed in f32 in that order; planes
    /// are added in order.
    ///
    /// # Panics
    /// If `row ≥ N` or `out.len() != K`.
    pub fn dequantize_row_into(&self, row: usize, out: &mut [f32]) {
        assert_eq!(
            out.len(),
            self.spec.cols,
            "a row of {} columns",
            self.spec.cols
        );
        self.dequantize_part_into(row, 0, out);
    }

    /// Dequantizes the columns of row `row` from `first` on into `out`, as
    /// [`Matrix::dequantize_row_into`] does.
    ///
    /// # Panics
    /// If `row ≥ N` or `first + out.len() > K`.
    pub fn dequantize_part_into(&self, row: usize, first: usize, out: &mut [f32]) {
        let spec = &self.spec;
        assert!(
            row < spec.rows && first + out.len() <= spec.cols,
            "row {row} of {}, column {first} of {}",
            spec.rows,
            spec.cols
        );
        let width = spec.granule_cols();
        for plane in 0..spec.planes {
            let values = &self.values[(plane * spec.rows + row) * spec.cols + first..][..out.len()];
            let mut at = 0;
            while at < out.len() {
                let column = first + at;
                let end = (at + width - column % width).min(out.len());
                let index = spec.scale_index(plane, row, column);
                let scale = self.scales[index];
                let zero = self.zero_points.get(index).copied().unwrap_or(0.0);
                for (out, &value) in out[at..end].iter_mut().zip(&values[at..end]) {
                    let term = scale * (f32::from(value) - zero);
                    *out = if plane == 0 { term } else { *out + term };
                }
                at = end;
            }
        }
    }

    /// Dequantizes the whole matrix, `[N, K]` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.spec.weights_len()];
        if self.spec.cols > 0 {
            for (row, out) in out.chunks_mut(self.spec.cols).enumerate() {
                self.dequantize_row_into(row, out);
            }
        }
        out
    }

    /// The same matrix with scales of another granularity, if that loses nothing.
    ///
    /// A finer granularity is always possible. A coarser one is possible if the granules that would
    /// share a scale have equal scales; granules of zeros are ignored.
    ///
    /// # Errors
    /// [`Error::Scheme`] naming the two scales that differ.
    pub fn with_granularity(mut self, granularity: Granularity) -> Result<Self> {
        let spec = MatrixSpec {
            granularity,
            ..self.spec.clone()
        };
        spec.validate()?;
        if spec == self.spec {
            return Ok(self);
        }
        let mut found: Vec<Option<(f32, f32)>> = vec![None; spec.scales_len()];
        let mut dead: Vec<Option<(f32, f32)>> = found.clone();
        let (old_width, new_width) = (self.spec.granule_cols(), spec.granule_cols());
        for plane in 0..spec.planes {
            for row in 0..spec.rows {
                let line = &mut self.values[(plane * spec.rows + row) * spec.cols..][..spec.cols];
                let mut start = 0;
                while start < spec.cols {
                    let end = ((start / old_width + 1) * old_width)
                        .min((start / new_width + 1) * new_width)
                        .min(spec.cols);
                    let (from, to) = (
                        self.spec.scale_index(plane, row, start),
                        spec.scale_index(plane, row, start),
                    );
                    let scale = (
                        self.scales[from],
                        self.zero_points.get(from).copied().unwrap_or(0.0),
                    );
                    // With scale 0 every value means 0; with another scale only the value 0 does.
                    if scale.0 == 0.0
                        && spec.zero_points == ZeroPoints::None
                        && spec.precision.contains(0)
                    {
                        line[start..end].fill(0);
                    }
                    if line[start..end].iter().all(|&v| f32::from(v) == scale.1) {
                        dead[to] = dead[to].or(Some(scale));
                    } else if *found[to].get_or_insert(scale) != scale {
                        let other = found[to].unwrap_or(scale);
                        return Err(Error::Scheme(format!(
                            "one scale for each {granularity}: row {row}, column {start} has {:e}, \
                             others {:e}",
                            scale.0, other.0
                        )));
                    }
                    start = end;
                }
            }
        }
        let chosen: Vec<(f32, f32)> = found
            .into_iter()
            .zip(dead)
            .map(|(found, dead)| found.or(dead).unwrap_or_default())
            .collect();
        let scales = chosen.iter().map(|c| c.0).collect();
        let zero_points = if spec.zero_points == ZeroPoints::None {
            vec![]
        } else {
            chosen.iter().map(|c| c.1).collect()
        };
        Ok(Self {
            spec,
            values: self.values,
            scales,
            zero_points,
        })
    }

    /// The matrix whose row `r` is row `order[r]` of this one.
    ///
    /// # Panics
    /// If an index is not below `N`.
    pub fn select_rows(&self, order: &[usize]) -> Self {
        let spec = self.spec.with_rows(order.len());
        let rows = |width: usize, all: &[i8]| -> Vec<i8> {
            let stride = self.spec.rows * width;
            (0..spec.planes)
                .flat_map(|p| {
                    order
                        .iter()
                        .flat_map(move |&r| &all[p * stride + r * width..][..width])
                })
                .copied()
                .collect()
        };
        let per_row = self.spec.granules_per_row();
        let granules = |all: &[f32]| -> Vec<f32> {
            if self.spec.granularity == Granularity::Tensor || all.is_empty() {
                return all.to_vec();
            }
            let stride = self.spec.rows * per_row;
            (0..all.len() / stride.max(1))
                .flat_map(|p| {
                    order
                        .iter()
                        .flat_map(move |&r| &all[p * stride + r * per_row..][..per_row])
                })
                .copied()
                .collect()
        };
        Self {
            values: rows(self.spec.cols, &self.values),
            scales: granules(&self.scales),
            zero_points: granules(&self.zero_points),
            spec,
        }
    }

    /// The matrix whose column c is column `order[c]`, or none if a group of the new columns is not
    /// a group of the old ones, which have a scale of their own. `order` has as many columns.
    pub fn select_columns(&self, order: &[usize]) -> Option<Self> {
        let (cols, group) = (self.spec.cols, self.spec.granule_cols());
        let per_row = self.spec.granules_per_row();
        if order.len() != cols || order.iter().any(|&c| c >= cols) {
            return None;
        }
        if per_row > 1 && !whole_groups(order, group) {
            return None;
        }
        let values = self.values.chunks_exact(cols.max(1));
        let granules = |all: &[f32]| -> Vec<f32> {
            if per_row <= 1 {
                return all.to_vec();
            }
            let firsts = order.iter().step_by(group);
            all.chunks_exact(per_row)
                .flat_map(|row| firsts.clone().map(move |&c| row[c / group]))
                .collect()
        };
        Some(Self {
            values: values
                .flat_map(|row| order.iter().map(move |&c| row[c]))
                .collect(),
            scales: granules(&self.scales),
            zero_points: granules(&self.zero_points),
            spec: self.spec.clone(),
        })
    }

    /// Bytes of the matrix in memory: one for each value; scales and zero points in their stored
    /// types.
    pub fn memory_footprint(&self) -> usize {
        self.values.len()
            + self.scales.len() * self.spec.scale_dtype.bytes()
            + self.zero_points.len() * self.spec.zero_point_bytes()
    }

    /// The scale of a matrix with a single scale.
    ///
    /// # Errors
    /// [`Error::Length`] for a matrix with several scales.
    pub fn single_scale(&self) -> Result<f32> {
        match (self.spec.granularity, &self.scales[..]) {
            (Granularity::Tensor, &[scale]) | (_, &[scale]) => Ok(scale),
            _ => Err(Error::Length {
                what: "scales",
                expected: 1,
                got: self.scales.len(),
            }),
        }
    }
}
/// Whether an order of columns moves whole groups of `group` columns; the last one may be shorter,
/// if it stays the last.
pub fn whole_groups(order: &[usize], group: usize) -> bool {
    order.chunks(group.max(1)).all(|run| {
        let first = run[0];
        let whole = run.len() == group || first + run.len() == order.len();
        let in_order = run.iter().zip(first..).all(|(&c, at)| c == at);
        whole && in_order && first.is_multiple_of(group)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Granularity, Precision};

    /// A matrix of two rows of six columns, whose values are their columns.
    fn matrix(granularity: Granularity, scales: &[f32]) -> Matrix {
        Matrix {
            spec: MatrixSpec::new(2, 6, Precision::Int8, granularity),
            values: [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15].to_vec(),
            scales: scales.to_vec(),
            zero_points: vec![],
        }
    }

    #[test]
    fn columns_move_with_their_scales() {
        let order = [4, 5, 0, 1, 2, 3];
        let values = vec![4, 5, 0, 1, 2, 3, 14, 15, 10, 11, 12, 13];
        let groups = matrix(Granularity::Group(2), &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let moved = groups.select_columns(&order).unwrap();
        assert_eq!(moved.values, values);
        assert_eq!(moved.scales, [3.0, 1.0, 2.0, 6.0, 4.0, 5.0]);
        for (row, column) in [(0, 3), (1, 0), (1, 5)] {
            let mut rows = [[0.0; 6]; 2];
            groups.dequantize_row_into(row, &mut rows[0]);
            moved.dequantize_row_into(row, &mut rows[1]);
            assert_eq!(rows[1][column], rows[0][order[column]]);
        }
        let rows = matrix(Granularity::Channel, &[1.0, 2.0]);
        let moved = rows.select_columns(&[5, 4, 3, 2, 1, 0]).unwrap();
        assert_eq!((moved.values[0], moved.scales), (5, vec![1.0, 2.0]));
        // Three columns with one scale, of which two move; and orders that are none.
        let wide = matrix(Granularity::Group(3), &[1.0, 2.0, 3.0, 4.0]);
        for (matrix, order) in [(&wide, &order[..]), (&rows, &order[..5]), (&rows, &[6; 6])] {
            assert!(matrix.select_columns(order).is_none());
        }
        assert!(whole_groups(&[2, 3, 0, 1, 4], 2) && !whole_groups(&[4, 0, 1, 2, 3], 2));
    }
}
