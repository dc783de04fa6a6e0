//! Quantized weights of a latent layer, kept from the forward pass to the backward pass.

use crate::Result;
use crate::tensor::packed::PackedWeights;
use crate::tensor::runtime::Runtime;
use bitnet_core::{Matrix, MatrixSpec, Precision, ZeroPoints, pack};
use bitnet_kernels::stream;
use rayon::prelude::*;
use std::borrow::Cow;

/// Values and scales of quantized weights.
#[derive(Debug, Clone)]
pub(crate) enum WeightCodes {
    /// One plane of trits, four to a byte.
    TwoBit(stream::PackedMatrix),
    /// Any other matrix, a byte for each value.
    Values(Matrix),
}

impl WeightCodes {
    pub(crate) fn spec(&self) -> &MatrixSpec {
        match self {
            Self::TwoBit(packed) => &packed.spec,
            Self::Values(matrix) => &matrix.spec,
        }
    }

    pub(super) fn scales(&self) -> &[f32] {
        match self {
            Self::TwoBit(packed) => &packed.scales,
            Self::Values(matrix) => &matrix.scales,
        }
    }

    /// Mean of the scales' magnitudes.
    #[cfg(feature = "qat")]
    pub(crate) fn mean_scale(&self) -> f64 {
        self.scales()
            .iter()
            .map(|s| f64::from(s.abs()))
            .sum::<f64>()
            / self.scales().len().max(1) as f64
    }

    pub(super) fn zero_point(&self, index: usize) -> f32 {
        match self {
            Self::Values(Matrix {
                zero_points,
                spec:
                    MatrixSpec {
                        zero_points: ZeroPoints::I8 | ZeroPoints::F32,
                        ..
                    },
                ..
            }) => zero_points[index],
            _ => 0.0,
        }
    }

    /// The weights in the kernel layout.
    pub(crate) fn prepack(&self, runtime: &Runtime) -> Result<PackedWeights> {
        match self {
            Self::TwoBit(packed) => {
                PackedWeights::from_wire(packed, pack::plain(Precision::Ternary), runtime)
            }
            Self::Values(matrix) => PackedWeights::new(matrix, runtime),
        }
    }

    /// Ŵ, `[N, K]`.
    pub(crate) fn dequantize(&self, runtime: &Runtime) -> Result<Vec<f32>> {
        let spec = self.spec();
        let mut out = vec![0.0; spec.weights_len()];
        match self {
            Self::TwoBit(packed) => {
                let (layout, kernels) = (pack::plain(Precision::Ternary), runtime.machine.kernels);
                stream::dequantize(
                    kernels,
                    &runtime.pool,
                    layout,
                    spec,
                    &packed.bytes,
                    &packed.scales,
                    &mut out,
                )?;
            }
            Self::Values(matrix) => runtime.install(|| {
                let rows = out.par_chunks_mut(spec.cols.max(1)).enumerate();
                rows.for_each(|(row, out)| matrix.dequantize_row_into(row, out));
            }),
        }
        Ok(out)
    }

    /// For each row, `beta·Σ` of the weights whose value is 0.
    pub(crate) fn sums_of_zeros(
        &self,
        w: &[f32],
        beta: f32,
        runtime: &Runtime,
    ) -> Result<Vec<f32>> {
        let (values, cols) = (self.values(runtime)?, self.spec().cols.max(1));
        let row = |(w, q): (&[f32], &[i8])| {
            w.iter()
                .zip(q)
                .map(|(&w, &q)| if q == 0 { f64::from(w) } else { 0.0 })
                .sum::<f64>()
        };
        Ok(w.chunks(cols)
            .zip(values.chunks(cols))
            .map(|part| (f64::from(beta) * row(part)) as f32)
            .collect())
    }

    /// Adds `beta·of_rows[n]` to the elements of row n whose value is 0.
    pub(crate) fn add_to_zeros(
        &self,
        of_rows: &[f32],
        beta: f32,
        runtime: &Runtime,
        out: &mut [f32],
    ) -> Result<()> {
        let (values, cols) = (self.values(runtime)?, self.spec().cols.max(1));
        for ((out, q), of_row) in out.chunks_mut(cols).zip(values.chunks(cols)).zip(of_rows) {
            out.iter_mut()
                .zip(q)
                .for_each(|(out, &q)| *out += if q == 0 { beta * of_row } else { 0.0 });
        }
        Ok(())
    }

    pub(super) fn values(&self, runtime: &Runtime) -> Result<Cow<'_, [i8]>> {
        match self {
            Self::Values(matrix) => Ok(Cow::Borrowed(&matrix.values)),
            Self::TwoBit(stream::PackedMatrix { spec, bytes, .. }) => {
                let mut values = vec![0; spec.values_len()];
                stream::unpack(
                    runtime.machine.kernels,
                    &runtime.pool,
                    pack::plain(Precision::Ternary),
                    spec,
                    bytes,
                    &mut values,
                )?;
                Ok(Cow::Owned(values))
            }
        }
    }
}
