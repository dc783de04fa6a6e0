//! Ternary layers: weights in the layout of the integer kernels.

use super::tensors::{CheckpointLoader, FoundTensor, locked};
use crate::Result;
use crate::linear::KernelPool;
use bitnet_core::ops::Ops;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_formats::hf::{LinearClass, Mode};
use bitnet_formats::{Content, PackedPart, ScaleSource, StoredMatrix};
use bitnet_kernels::matmul::{MatrixParameters, Prepacked, Stream};
use serde_json::Value;

/// Merges the scales of all granules into one for the tensor, if they are equal.
fn merge_scales(mut matrix: Matrix) -> Matrix {
    let scale = matrix
        .scales
        .iter()
        .copied()
        .find(|s| *s != 0.0)
        .unwrap_or(0.0);
    if matrix.spec.granularity == Granularity::Tensor
        || matrix.scales.iter().any(|s| *s != scale && *s != 0.0)
    {
        return matrix;
    }
    if matrix.scales.contains(&0.0) && scale != 0.0 {
        // A granule with scale 0 is all zero, so its values must be 0 under the common scale.
        let (cols, width, per_row) = (
            matrix.spec.cols,
            matrix.spec.granule_cols(),
            matrix.spec.granules_per_row(),
        );
        for (row, values) in matrix.values.chunks_mut(cols.max(1)).enumerate() {
            for (group, values) in values.chunks_mut(width).enumerate() {
                if matrix.scales[row * per_row + group] == 0.0 {
                    values.fill(0);
                }
            }
        }
    }
    matrix.spec.granularity = Granularity::Tensor;
    matrix.scales = vec![scale];
    matrix
}

impl CheckpointLoader<'_> {
    /// The weights of a ternary layer, times `multiplier`.
    pub(super) fn ternary(&self, found: FoundTensor<'_>, multiplier: f32) -> Result<Prepacked> {
        let mut matrix = match &found.tensor.content {
            Content::Quantized(q) => {
                if let Some(packed) = self.prepacked(found, q, multiplier)? {
                    return Ok(packed);
                }
                self.matrix(found, q)?
            }
            _ => self.ternarized(found)?,
        };
        matrix.scales.iter_mut().for_each(|s| *s *= multiplier);
        Prepacked::new(&merge_scales(matrix), &self.runtime.pool).map_err(|e| found.kernel_error(e))
    }

    /// Prepacks wire bytes without unpacking them, where each row has one scale.
    fn prepacked(
        &self,
        found: FoundTensor<'_>,
        q: &StoredMatrix,
        multiplier: f32,
    ) -> Result<Option<Prepacked>> {
        found.check_spec(q)?;
        let whole = found.shape[0] == q.spec.rows;
        let part = match q.part(found.rows()) {
            Some(part) => part,
            None if whole => PackedPart {
                spec: q.spec.clone(),
                bytes: 0..self.source.stored(q.packed).len as usize,
                scales: 0..q.spec.scales_len(),
            },
            None => return Ok(None),
        };
        let scales = match q.scales {
            ScaleSource::Inside if multiplier != 1.0 => return Ok(None),
            ScaleSource::Inside => vec![],
            ScaleSource::Stored { .. } => {
                let mut scales = self.source.part_scales(q, &part)?;
                scales.iter_mut().for_each(|s| *s *= multiplier);
                scales
            }
        };
        let mut bytes = locked(&self.buffers).pop().unwrap_or_default();
        if whole {
            self.source.read_all_into(q.packed, &mut bytes)?;
        } else {
            bytes.resize(part.bytes.len(), 0);
            let start = part.bytes.start as u64;
            self.source.read(q.packed, start, &mut bytes)?;
        }
        let KernelPool { kernels, pool } = self.runtime;
        let parts = MatrixParameters {
            spec: &part.spec,
            scales: &scales,
            zero_points: &[],
        };
        let packed = Prepacked::from_wire(kernels, pool, q.layout, parts, &bytes, Stream::TwoBit);
        locked(&self.buffers).push(bytes);
        let packed = packed.map_err(|e| found.kernel_error(e))?;
        Ok((packed.groups() <= 1).then_some(packed))
    }

    /// Whether the checkpoint makes the float weights of a module ternary in each forward pass.
    pub(super) fn is_online(&self, module: &str) -> Result<bool> {
        let Some(bitnet) = self.source.bitnet().filter(|b| b.mode == Mode::Online) else {
            return Ok(false);
        };
        let path = self.source.path().join("config.json");
        let bad = |key: &str, expected: &str, got: String| {
            let key = format!("quantization_config.{key}");
            bitnet_formats::Error::config(&path, key, expected, got)
        };
        if bitnet.linear_class != LinearClass::AutoBitLinear {
            return Err(bad(
                "linear_class",
                "autobitlinear: no other class has an online mode",
                bitnet.linear_class.name().into(),
            )
            .into());
        }
        let config = self.source.config();
        let kept = config
            .and_then(|c| c.pointer("/quantization_config/modules_to_not_convert"))
            .filter(|v| !v.is_null());
        let Some(kept) = kept else { return Ok(true) };
        let names = plain_names(kept).ok_or_else(|| {
            bad(
                "modules_to_not_convert",
                "a list of plain module names with lm_head among them",
                kept.to_string(),
            )
        })?;
        let prefix = |name: &str| {
            module
                .strip_prefix(name)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || name.ends_with('.'))
        };
        Ok(!names
            .iter()
            .any(|name| prefix(name) || module.ends_with(name)))
    }

    /// Applies the absmean rule as the forward pass of the checkpoint does:
    /// s = 1/max(mean|W|, 1e-5), values clamp(round(W·s), −1, 1), scale 1/s.
    fn ternarized(&self, found: FoundTensor<'_>) -> Result<Matrix> {
        let Content::Float(stored) = found.tensor.content else {
            return Err(found.error(
                "float weights, for quantization_mode is online",
                "packed ones",
            ));
        };
        self.source.refuse_rotated(&found.tensor.name)?;
        let [rows, cols] = found.shape;
        let mut w = vec![0.0; rows * cols];
        self.source
            .read_floats(stored, 0..w.len(), &mut vec![], &mut w)?;
        found.check_finite(0, &w)?;
        let inverse = 1.0 / (self.runtime.kernels.moments(&w).mean_abs() as f32).max(1e-5);
        let values = w
            .iter()
            .map(|w| (w * inverse).round_ties_even().clamp(-1.0, 1.0) as i8)
            .collect();
        Ok(Matrix {
            spec: MatrixSpec::new(rows, cols, Precision::Ternary, Granularity::Tensor),
            values,
            scales: vec![1.0 / inverse],
            zero_points: vec![],
        })
    }
}

/// The names of a `modules_to_not_convert` without patterns that contains `lm_head`.
fn plain_names(list: &Value) -> Option<Vec<&str>> {
    let names: Vec<&str> = list
        .as_array()?
        .iter()
        .map(|v| v.as_str())
        .collect::<Option<_>>()?;
    let plain = |n: &&str| n.chars().all(|c| c.is_alphanumeric() || "._-".contains(c));
    (names.contains(&"lm_head") && names.iter().all(plain)).then_some(names)
}
