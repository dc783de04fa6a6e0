//! Some rows of a quantized matrix, read without the others.

use crate::{Error, Result, ScaleSource, Source, StoredMatrix};
use bitnet_core::pack::PackedLen;
use bitnet_core::{Granularity, Matrix, MatrixSpec, ZeroPoints};
use std::ops::Range;

/// Rows of a quantized matrix that can be read alone.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedPart {
    /// The spec of these rows.
    pub spec: MatrixSpec,
    /// Their bytes among those of the matrix.
    pub bytes: Range<usize>,
    /// Their scales among those of the matrix, where these are stored apart.
    pub scales: Range<usize>,
}

impl StoredMatrix {
    /// The given rows, if the layout can be cut there: a matrix of one plane without zero points,
    /// in a layout of a known length.
    pub fn part(&self, rows: Range<usize>) -> Option<PackedPart> {
        let spec = &self.spec;
        let chunk = self.layout.chunk_rows(spec)?.max(1);
        let is_cut = |row: usize| row.is_multiple_of(chunk) || row == spec.rows;
        let plain = spec.planes == 1 && spec.zero_points == ZeroPoints::None;
        if !plain || !is_cut(rows.start) || !is_cut(rows.end) || rows.end > spec.rows {
            return None;
        }
        let len = |rows: usize| match self.layout.packed_len(&spec.with_rows(rows)) {
            _ if rows == 0 => Some(0),
            PackedLen::Exact(len) => Some(len),
            PackedLen::AtMost(_) => None,
        };
        let per_row = spec.granules_per_row();
        Some(PackedPart {
            spec: spec.with_rows(rows.len()),
            bytes: len(rows.start)?..len(rows.end)?,
            scales: match spec.granularity {
                Granularity::Tensor => 0..1,
                _ => rows.start * per_row..rows.end * per_row,
            },
        })
    }
}

impl Source {
    /// The scales of a part that are stored apart; none where the layout carries them.
    ///
    /// # Errors
    /// As [`Source::read_floats`].
    pub fn part_scales(&self, q: &StoredMatrix, part: &PackedPart) -> Result<Vec<f32>> {
        let ScaleSource::Stored { id, reciprocal } = q.scales else {
            return Ok(vec![]);
        };
        let mut scales = vec![0.0; part.scales.len()];
        self.read_floats(id, part.scales.clone(), &mut vec![], &mut scales)?;
        if reciprocal {
            scales.iter_mut().for_each(|s| *s = 1.0 / *s);
        }
        Ok(scales)
    }

    /// Some rows of a quantized matrix, if they can be read alone. `name` is for messages.
    ///
    /// # Errors
    /// As [`Source::matrix`].
    pub fn matrix_part(
        &self,
        name: &str,
        q: &StoredMatrix,
        rows: Range<usize>,
    ) -> Result<Option<Matrix>> {
        let Some(part) = q.part(rows) else {
            return Ok(None);
        };
        let path = self.file_of(q.packed);
        let mut bytes = vec![0; part.bytes.len()];
        self.read(q.packed, part.bytes.start as u64, &mut bytes)?;
        let unpacked = q.layout.unpack(&part.spec, &bytes);
        let unpacked = unpacked.map_err(Error::matrix(path, name))?;
        let scales = match unpacked.scales {
            Some(scales) if q.scales == ScaleSource::Inside => scales,
            _ => self.part_scales(q, &part)?,
        };
        let matrix = Matrix {
            spec: part.spec,
            values: unpacked.values,
            scales,
            zero_points: vec![],
        };
        matrix.validate().map_err(Error::matrix(path, name))?;
        Ok(Some(matrix))
    }
}
