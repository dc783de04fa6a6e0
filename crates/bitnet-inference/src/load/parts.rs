//! One matrix of several that are packed as one: its bytes, scales and zero points alone, or all
//! values unpacked where the layout cannot be cut there.

use super::tensors::{CheckpointLoader, FoundTensor};
use crate::Result;
use bitnet_core::pack::PackedLen;
use bitnet_core::{Granularity, Matrix, MatrixSpec, ZeroPoints};
use bitnet_formats::{ScaleSource, StoredMatrix};
use std::ops::Range;

/// Rows of a packed matrix that can be read alone.
pub(super) struct PackedPart {
    /// The spec of these rows.
    pub(super) spec: MatrixSpec,
    /// Their bytes; none for all.
    bytes: Option<Range<usize>>,
    /// Their scales among those of the matrix.
    scales: Range<usize>,
}

impl FoundTensor<'_> {
    /// Checks that a packed matrix has the rows of the tensor.
    pub(super) fn check_spec(&self, q: &StoredMatrix) -> Result<()> {
        let [_, cols] = self.shape;
        let rows = self.tensor.elements() / cols.max(1);
        if (q.spec.rows, q.spec.cols) == (rows, cols) {
            return Ok(());
        }
        Err(self.error(
            format!("a matrix of {rows} × {cols}"),
            format!("{} × {}", q.spec.rows, q.spec.cols),
        ))
    }

    /// The rows of this matrix among those of `q`, if they can be read alone. [`Self::check_spec`]
    /// has passed.
    pub(super) fn part(&self, q: &StoredMatrix) -> Option<PackedPart> {
        let (spec, rows) = (&q.spec, self.shape[0]);
        if rows == spec.rows {
            return Some(PackedPart {
                spec: spec.clone(),
                bytes: None,
                scales: 0..spec.scales_len(),
            });
        }
        let chunk = q.layout.chunk_rows(spec)?.max(1);
        let cut = self.first.is_multiple_of(chunk) && rows.is_multiple_of(chunk);
        if !cut || spec.planes != 1 || spec.zero_points != ZeroPoints::None {
            return None;
        }
        let end = |rows: usize| match q.layout.packed_len(&spec.with_rows(rows)) {
            PackedLen::Exact(len) => Some(len),
            PackedLen::AtMost(_) => None,
        };
        let bytes = match self.first {
            0 => 0..end(rows)?,
            first => end(first)?..end(first + rows)?,
        };
        let per_row = spec.granules_per_row();
        Some(PackedPart {
            spec: spec.with_rows(rows),
            bytes: Some(bytes),
            scales: match spec.granularity {
                Granularity::Tensor => 0..1,
                _ => self.first * per_row..(self.first + rows) * per_row,
            },
        })
    }
}

impl CheckpointLoader<'_> {
    /// The packed bytes of a part.
    pub(super) fn read_part(
        &self,
        q: &StoredMatrix,
        part: &PackedPart,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        match &part.bytes {
            None => self.source.read_all_into(q.packed, bytes)?,
            Some(range) => {
                bytes.resize(range.len(), 0);
                self.source.read(q.packed, range.start as u64, bytes)?;
            }
        }
        Ok(())
    }

    /// The scales of a part that are stored apart.
    pub(super) fn stored_scales(&self, q: &StoredMatrix, part: &PackedPart) -> Result<Vec<f32>> {
        let ScaleSource::Stored { id, reciprocal } = q.scales else {
            return Ok(vec![]);
        };
        let mut scales = vec![0.0; part.scales.len()];
        let range = part.scales.clone();
        self.source
            .read_floats(id, range, &mut vec![], &mut scales)?;
        if reciprocal {
            scales.iter_mut().for_each(|s| *s = 1.0 / *s);
        }
        Ok(scales)
    }

    /// The values and scales of a matrix.
    pub(super) fn matrix(&self, found: FoundTensor<'_>, q: &StoredMatrix) -> Result<Matrix> {
        let name = &found.tensor.name;
        let Some(unpacked) = found.unpacked else {
            return Ok(self.source.matrix(name, q)?);
        };
        found.check_spec(q)?;
        if let Some(part) = found.part(q) {
            let mut bytes = vec![];
            self.read_part(q, &part, &mut bytes)?;
            let error = |e: bitnet_core::Error| found.kernel_error(e.into());
            let values = q.layout.unpack(&part.spec, &bytes).map_err(error)?;
            let matrix = Matrix {
                scales: match values.scales {
                    Some(scales) if q.scales == ScaleSource::Inside => scales,
                    _ => self.stored_scales(q, &part)?,
                },
                spec: part.spec,
                values: values.values,
                zero_points: vec![],
            };
            matrix.validate().map_err(error)?;
            return Ok(matrix);
        }
        let whole = match unpacked.get() {
            Some(whole) => whole,
            None => {
                let whole = self.source.matrix(name, q)?;
                unpacked.get_or_init(|| whole)
            }
        };
        Ok(some_rows(whole, found.first..found.first + found.shape[0]))
    }
}

/// Some rows of a matrix, of all its planes.
fn some_rows(matrix: &Matrix, rows: Range<usize>) -> Matrix {
    let spec = &matrix.spec;
    let (cols, per_row) = (spec.cols, spec.granules_per_row());
    let values = (0..spec.planes).flat_map(|plane| {
        let start = (plane * spec.rows + rows.start) * cols;
        &matrix.values[start..start + rows.len() * cols]
    });
    let granules = |all: &[f32]| match spec.granularity {
        Granularity::Tensor => all.to_vec(),
        _ => all
            .chunks_exact((spec.rows * per_row).max(1))
            .flat_map(|plane| &plane[rows.start * per_row..rows.end * per_row])
            .copied()
            .collect(),
    };
    Matrix {
        spec: spec.with_rows(rows.len()),
        values: values.copied().collect(),
        scales: granules(&matrix.scales),
        zero_points: granules(&matrix.zero_points),
    }
}
