//! Matrices in memory through the quantizers of `bitnet-core`, on the threads of the current rayon
//! pool.

use crate::Result;
use crate::rows::{in_parallel, strip_rows, windows};
use bitnet_core::granule::{Granule, Importance};
use bitnet_core::quantize::{Fitted, fit, quantize_rows};
use bitnet_core::stats::ErrorStats;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Scheme, ZeroPoints};
use bitnet_kernels::Kernels;

/// A matrix in memory as one granule, in the strips of a streamed file, so that a tensor gets the
/// same values both ways.
struct InMemory<'a> {
    weights: &'a [f32],
    strip: usize,
}

impl Granule for InMemory<'_> {
    type Error = bitnet_core::Error;

    fn fold<T: Send>(
        &self,
        map: impl Fn(usize, &[f32]) -> T + Sync,
        join: impl Fn(T, T) -> T,
    ) -> Result<T, bitnet_core::Error> {
        let strips: Vec<_> = self.weights.chunks(self.strip.max(1)).collect();
        let parts = in_parallel(strips.len(), |i, _| map(i * self.strip, strips[i]));
        Ok(parts
            .into_iter()
            .reduce(join)
            .unwrap_or_else(|| map(0, &[])))
    }
}

/// Quantizes `weights` of `[rows, cols]`. The values do not depend on the number of threads, and
/// are those of [`crate::job::run`].
///
/// `importance` has one number for each column. Schemes for which [`Scheme::uses_importance`] is
/// false ignore it.
pub fn quantize(
    kernels: Kernels,
    weights: &[f32],
    (rows, cols): (usize, usize),
    scheme: &Scheme,
    importance: Option<&[f32]>,
) -> Result<Matrix> {
    let spec = scheme.spec(rows, cols)?;
    if weights.len() != spec.weights_len() || weights.is_empty() {
        return Err(bitnet_core::Error::Length {
            what: "weights",
            expected: spec.weights_len().max(1),
            got: weights.len(),
        }
        .into());
    }
    let importance = importance.filter(|_| scheme.uses_importance());
    if let Some(h) = importance.filter(|h| h.len() != cols) {
        return Err(bitnet_core::Error::Length {
            what: "importance",
            expected: cols,
            got: h.len(),
        }
        .into());
    }
    let strip = strip_rows(cols);
    let (fitted, importance) = match scheme.granularity {
        Granularity::Tensor => {
            let columns = importance.map(Importance::new).transpose()?;
            (
                Some(fit(
                    &kernels,
                    &InMemory {
                        weights,
                        strip: strip * cols,
                    },
                    scheme,
                    columns,
                )?),
                None,
            )
        }
        Granularity::Channel | Granularity::Group(_) => (None, importance),
    };
    if rows <= strip || rayon::current_num_threads() == 1 {
        return Ok(quantize_rows(
            &kernels,
            weights,
            cols,
            0,
            scheme,
            fitted.as_ref(),
            importance,
        )?);
    }
    let parts: Vec<_> = weights.chunks(strip * cols).collect();
    let strips = in_parallel(parts.len(), |i, _| {
        quantize_rows(
            &kernels,
            parts[i],
            cols,
            i * strip,
            scheme,
            fitted.as_ref(),
            importance,
        )
    });
    let strips = strips.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(join_strips(spec, &strips, fitted.as_ref()))
}

/// The strips of a matrix as one matrix; `fitted` has the granule of the tensor, if it is one.
fn join_strips(spec: MatrixSpec, strips: &[Matrix], fitted: Option<&Fitted>) -> Matrix {
    let mut whole = Matrix {
        values: Vec::with_capacity(spec.values_len()),
        scales: vec![],
        zero_points: vec![],
        spec,
    };
    for plane in 0..whole.spec.planes {
        for strip in strips {
            let (values, scales) = (
                strip.values.len() / strip.spec.planes,
                strip.scales.len() / strip.spec.planes,
            );
            whole
                .values
                .extend_from_slice(&strip.values[plane * values..][..values]);
            if fitted.is_none() {
                whole
                    .scales
                    .extend_from_slice(&strip.scales[plane * scales..][..scales]);
            }
        }
        if let Some(fitted) = fitted {
            whole.scales.push(fitted.scales[plane]);
        }
    }
    if whole.spec.zero_points != ZeroPoints::None {
        match fitted {
            Some(fitted) => whole.zero_points.push(fitted.zero_point),
            None => whole
                .zero_points
                .extend(strips.iter().flat_map(|s| &s.zero_points)),
        }
    }
    whole
}

/// The quantization error of a matrix against its original weights.
pub fn measure(weights: &[f32], matrix: &Matrix) -> ErrorStats {
    let (rows, cols) = (matrix.spec.rows, matrix.spec.cols);
    let mut error = ErrorStats::default();
    for window in windows(if cols == 0 { 0 } else { rows }, strip_rows(cols)) {
        let parts = in_parallel(window.len(), |i, buffers| {
            buffers.back.resize(cols, 0.0);
            let mut error = ErrorStats::default();
            for row in window[i].clone() {
                matrix.dequantize_row_into(row, &mut buffers.back);
                let row = ErrorStats::measure(&weights[row * cols..][..cols], &buffers.back);
                error = error.merge(row);
            }
            error
        });
        error = parts.into_iter().fold(error, ErrorStats::merge);
    }
    error
}

/// `Σ h_k·(w − ŵ)²`.
pub fn weighted_error(weights: &[f32], matrix: &Matrix, h: &[f32]) -> f64 {
    let mut back = vec![0.0; matrix.spec.cols];
    let mut sum = 0.0;
    for (row, w) in weights.chunks(matrix.spec.cols.max(1)).enumerate() {
        matrix.dequantize_row_into(row, &mut back);
        sum += w
            .iter()
            .zip(&back)
            .zip(h)
            .map(|((w, v), h)| f64::from(*h) * f64::from(w - v).powi(2))
            .sum::<f64>();
    }
    sum
}
