//! Matrices of MLX that are ternary: read as values and scales, and not as floats.
//!
//! With q of 2 bits, q·s + b is (q − 1)·s where b = −s. The codes are those of our layout `two-bit`.

use super::{Foreign, ForeignMethod, ForeignType};
use crate::Result;
use crate::dtype::StoredType;
use crate::grouping::any_blocks;
use crate::storage::Storage;
use crate::tensor::{ScaleSource, StoredMatrix};
use bitnet_core::pack::{self, PackedLen};
use bitnet_core::{Granularity, MatrixSpec, Precision, ScaleDtype};

impl Storage {
    /// The values and scales of a matrix, if every code is below 3 and every bias a negated scale.
    /// Reads the matrix up to the first of its parts that says otherwise.
    pub(super) fn ternary(&self, matrix: &Foreign) -> Result<Option<StoredMatrix>> {
        let (ForeignType { bits: 2, group, .. }, [codes, scales, biases]) =
            (matrix.foreign_type, &matrix.parts[..])
        else {
            return Ok(None);
        };
        let (codes, scales) = (*codes, *scales);
        let known = matrix.foreign_type.method == ForeignMethod::Mlx && matrix.coding.is_ok();
        let stored = self.stored(scales).dtype;
        let dtype = ScaleDtype::ALL
            .iter()
            .find(|&&d| StoredType::from(d) == stored);
        let (Some(&scale_dtype), Some((&cols, leading)), true) =
            (dtype, matrix.shape.split_last(), known)
        else {
            return Ok(None);
        };
        let spec = MatrixSpec {
            scale_dtype,
            ..MatrixSpec::new(
                leading.iter().product(),
                cols,
                Precision::Ternary,
                Granularity::Group(group),
            )
        };
        let layout = pack::plain(Precision::Ternary);
        let fits = layout.check(&spec).is_ok()
            && layout.packed_len(&spec) == PackedLen::Exact(self.stored(codes).len as usize)
            && self.stored(scales).elements() == spec.scales_len();
        let negated = |(s, b): (&f32, &f32)| s.is_finite() && *b == -*s;
        if !fits
            || !self
                .floats(scales)?
                .iter()
                .zip(&self.floats(*biases)?)
                .all(negated)
            || any_blocks(self, codes, 4, has_code_3)?
        {
            return Ok(None);
        }
        Ok(Some(StoredMatrix {
            transposed: false,
            spec,
            layout,
            packed: codes,
            scales: ScaleSource::Stored {
                id: scales,
                reciprocal: false,
            },
            zero_points: None,
        }))
    }
}

fn has_code_3(codes: &[u8]) -> bool {
    codes
        .iter()
        .fold(0, |found, &b| found | (b & b >> 1 & 0x55))
        != 0
}
