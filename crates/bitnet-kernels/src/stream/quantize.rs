//! Floats to packed codes, each part of the matrix while it is in cache.

use super::layout::{DenseLayout, pack};
use super::plain::BLOCK;
use crate::kernels::Kernels;
use crate::parallel::lock;
use crate::pool::Pool;
use bitnet_core::granule::{Granule, STRIP};
use bitnet_core::ops::{Cuts, Magnitudes, Ops};
use bitnet_core::pack::Layout;
use bitnet_core::quantize::{Fitted, fit, fit_absmean, fit_trits, quantize_rows};
use bitnet_core::scheme::{Method, Scheme};
use bitnet_core::{Error, Granularity, Matrix, MatrixSpec, Result, ZeroPoints};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A matrix of floats, `[N, K]` row-major.
#[derive(Debug, Clone, Copy)]
pub enum FloatWeights<'a> {
    /// IEEE binary32.
    F32(&'a [f32]),
    /// IEEE binary16.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> FloatWeights<'a> {
    /// Number of weights.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::F16(w) => w.len(),
            Self::Bf16(w) => w.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The weights of a range as f32, in `buffer` where they are not f32 already.
    fn read<'b>(&self, kernels: Kernels, range: Range<usize>, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        buffer.resize(
            if matches!(self, Self::F32(_)) {
                0
            } else {
                range.len()
            },
            0.0,
        );
        match self {
            Self::F32(w) => return &w[range],
            Self::F16(w) => kernels.table.widen_f16(&w[range], buffer),
            Self::Bf16(w) => kernels.table.widen_bf16(&w[range], buffer),
        }
        buffer
    }
}

/// A quantized matrix in a wire layout.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix {
    /// Shape and conventions of the matrix.
    pub spec: MatrixSpec,
    /// The matrix in the wire layout.
    pub bytes: Vec<u8>,
    /// Scales, as [`bitnet_core::Matrix`] has them, whether the layout holds them or not.
    pub scales: Vec<f32>,
    /// Zero points, if the scheme has any.
    pub zero_points: Vec<f32>,
}

/// The whole matrix as one granule, cut as core cuts slices and folded on a pool.
struct MatrixGranule<'a> {
    weights: FloatWeights<'a>,
    kernels: Kernels,
    pool: &'a Pool,
}

impl Granule for MatrixGranule<'_> {
    type Error = Error;

    fn fold<T: Send>(
        &self,
        map: impl Fn(usize, &[f32]) -> T + Sync,
        join: impl Fn(T, T) -> T,
    ) -> Result<T> {
        let strips = self.weights.len().div_ceil(STRIP).max(1);
        let mut all = None;
        // A few strips for each thread at a time, so that few results wait to be joined.
        let window = 4 * self.pool.threads();
        for first in (0..strips).step_by(window) {
            let parts: Vec<Mutex<Option<T>>> = (first..strips.min(first + window))
                .map(|_| Mutex::new(None))
                .collect();
            self.pool.run(parts.len(), |i| {
                let start = (first + i) * STRIP;
                let mut buffer = vec![];
                let w = self.weights.read(
                    self.kernels,
                    start..self.weights.len().min(start + STRIP),
                    &mut buffer,
                );
                *lock(&parts[i]) = Some(map(start, w));
            });
            for part in parts
                .into_iter()
                .filter_map(|part| part.into_inner().unwrap_or_else(PoisonError::into_inner))
            {
                all = Some(match all {
                    Some(all) => join(all, part),
                    None => part,
                });
            }
        }
        Ok(all.unwrap_or_else(|| map(0, &[])))
    }
}

/// Quantizes a matrix in memory and packs it: the bytes and scales of
/// [`bitnet_core::quantize::quantize`] followed by [`Layout::pack_into`].
///
/// One plane of trits in the layouts `two-bit` and `base-3` never exists as values: each row is
/// read, fitted, encoded and packed while it is in cache, so rows and groups cost one pass over
/// memory and one scale for the tensor costs two. Other schemes and layouts take core's way, strip
/// by strip on the pool.
///
/// # Errors
/// Those of the two functions.
pub fn quantize(
    kernels: Kernels,
    pool: &Pool,
    weights: FloatWeights<'_>,
    rows: usize,
    cols: usize,
    scheme: &Scheme,
    layout: &dyn Layout,
) -> Result<PackedMatrix> {
    let mut out = PackedMatrix {
        spec: scheme.spec(rows, cols)?,
        bytes: vec![],
        scales: vec![],
        zero_points: vec![],
    };
    quantize_into(
        kernels,
        pool,
        weights,
        (rows, cols),
        scheme,
        layout,
        &mut out,
    )?;
    Ok(out)
}

/// [`quantize`] into memory that is there: what `out` held is replaced, and its vectors grow only
/// where they must. Fresh memory costs page faults, which show beside a pass over the weights.
/// `shape` is `(rows, cols)`.
///
/// # Errors
/// Those of [`quantize`]; what `out` holds then means nothing.
pub fn quantize_into(
    kernels: Kernels,
    pool: &Pool,
    weights: FloatWeights<'_>,
    (rows, cols): (usize, usize),
    scheme: &Scheme,
    layout: &dyn Layout,
    out: &mut PackedMatrix,
) -> Result<()> {
    let spec = scheme.spec(rows, cols)?;
    layout.check(&spec)?;
    if weights.len() != spec.weights_len() {
        return Err(Error::Length {
            what: "weights",
            expected: spec.weights_len(),
            got: weights.len(),
        });
    }
    let job = QuantizeJob {
        kernels,
        pool,
        weights,
        scheme,
        layout,
        spec: &spec,
    };
    let fitted = match scheme.granularity {
        Granularity::Tensor if !weights.is_empty() => Some(fit(
            &kernels,
            &MatrixGranule {
                weights,
                kernels,
                pool,
            },
            scheme,
            None,
        )?),
        _ => None,
    };
    let ternary = matches!(scheme.method, Method::Ternary { planes: 1, .. });
    match DenseLayout::new(layout, &spec) {
        Some(dense) if ternary => job.fused(dense, fitted.as_ref(), out)?,
        _ => (out.bytes, out.scales, out.zero_points) = job.by_values(fitted.as_ref())?,
    }
    out.spec = spec;
    Ok(())
}

/// FloatWeights of a part, as far as whole rows allow.
const PART: usize = 1 << 18;

struct QuantizeJob<'a> {
    kernels: Kernels,
    pool: &'a Pool,
    weights: FloatWeights<'a>,
    scheme: &'a Scheme,
    layout: &'a dyn Layout,
    spec: &'a MatrixSpec,
}

impl QuantizeJob<'_> {
    /// One plane of trits, row by row. Every byte and every scale is written.
    fn fused(
        &self,
        dense: DenseLayout,
        fitted: Option<&Fitted>,
        out: &mut PackedMatrix,
    ) -> Result<()> {
        let PackedMatrix {
            bytes,
            scales,
            zero_points,
            ..
        } = out;
        bytes.resize(self.layout.packed_len(self.spec).bound(), 0);
        scales.resize(self.spec.scales_len(), 0.0);
        zero_points.clear();
        if let Some(fitted) = fitted {
            scales.fill(fitted.scales[0]);
        }
        if !bytes.is_empty() {
            let (rows, stride) = (
                (PART / self.spec.cols).max(1),
                self.spec.cols.div_ceil(dense.values()),
            );
            let per_row = if fitted.is_some() {
                0
            } else {
                self.spec.granules_per_row()
            };
            // The error of the first row that has one.
            let error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
            let mut of_rows = scales.chunks_mut((per_row * rows).max(1));
            let parts = bytes
                .chunks_mut(stride * rows)
                .enumerate()
                .map(|(part, bytes)| (part * rows, bytes, of_rows.next().unwrap_or_default()));
            self.pool.for_each(parts, |(first, bytes, scales)| {
                let mut row = RowQuantizer {
                    job: self,
                    dense,
                    buffer: vec![],
                    sizes: vec![],
                    cuts: vec![],
                };
                if let Err((at, new)) = row.part(first, fitted, scales, bytes, stride, per_row) {
                    let mut error = lock(&error);
                    if error.as_ref().is_none_or(|(other, _)| at < *other) {
                        *error = Some((at, new));
                    }
                }
            });
            if let Some((_, error)) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Bytes, scales and zero points of any scheme and layout, through the values of the whole
    /// matrix.
    fn by_values(&self, fitted: Option<&Fitted>) -> Result<(Vec<u8>, Vec<f32>, Vec<f32>)> {
        let spec = self.spec;
        let mut values = vec![0; spec.values_len()];
        let mut scales = vec![0.0; spec.scales_len()];
        let mut zero_points = vec![
            0.0;
            if spec.zero_points == ZeroPoints::None {
                0
            } else {
                spec.scales_len()
            }
        ];
        if !values.is_empty() {
            let rows = (PART / spec.cols).max(1);
            let strips: Vec<Mutex<Option<Result<Matrix>>>> = (0..spec.rows.div_ceil(rows))
                .map(|_| Mutex::new(None))
                .collect();
            self.pool.run(strips.len(), |i| {
                let (first, mut buffer) = (i * rows, vec![]);
                let range = first * spec.cols..(first + rows).min(spec.rows) * spec.cols;
                let w = self.weights.read(self.kernels, range, &mut buffer);
                let strip = quantize_rows(
                    &self.kernels,
                    w,
                    spec.cols,
                    first,
                    self.scheme,
                    fitted,
                    None,
                );
                *lock(&strips[i]) = Some(strip);
            });
            for (i, strip) in strips.into_iter().enumerate() {
                let Some(strip) = strip.into_inner().unwrap_or_else(PoisonError::into_inner) else {
                    continue;
                };
                let (strip, first) = (strip?, i * rows);
                place(spec.planes, spec.cols * first, &strip.values, &mut values);
                let granule = if spec.granularity == Granularity::Tensor {
                    0
                } else {
                    first * spec.granules_per_row()
                };
                place(spec.planes, granule, &strip.scales, &mut scales);
                place(spec.planes, granule, &strip.zero_points, &mut zero_points);
            }
        }
        let mut bytes = vec![];
        pack(
            self.kernels,
            self.pool,
            self.layout,
            spec,
            &values,
            &scales,
            &mut bytes,
        )?;
        Ok((bytes, scales, zero_points))
    }
}

/// Copies the planes of a strip to position `at` of each plane of the whole.
fn place<T: Copy>(planes: usize, at: usize, strip: &[T], whole: &mut [T]) {
    let (from, to) = (strip.len() / planes, whole.len() / planes);
    for plane in 0..planes {
        whole[plane * to + at..][..from].copy_from_slice(&strip[plane * from..][..from]);
    }
}

/// Rows one after another, and the buffers that they share.
struct RowQuantizer<'a> {
    job: &'a QuantizeJob<'a>,
    dense: DenseLayout,
    buffer: Vec<f32>,
    sizes: Vec<Magnitudes>,
    cuts: Vec<Cuts>,
}

impl RowQuantizer<'_> {
    /// A part of the matrix from row `first` on. An error comes with the number of its row.
    fn part(
        &mut self,
        first: usize,
        fitted: Option<&Fitted>,
        scales: &mut [f32],
        bytes: &mut [u8],
        stride: usize,
        per_row: usize,
    ) -> Result<(), (usize, Error)> {
        let spec = self.job.spec;
        let width = spec.granule_cols();
        let even = width.is_multiple_of(4) && spec.cols.is_multiple_of(width);
        if let (DenseLayout::TwoBit { .. }, FloatWeights::F32(w), true, None) =
            (self.dense, self.job.weights, even, fitted)
        {
            let w = &w[first * spec.cols..][..4 * bytes.len()];
            return self
                .granules(w, first * spec.cols, scales, bytes)
                .map_err(|(granule, e)| (first + granule / per_row, e));
        }
        for (i, bytes) in bytes.chunks_mut(stride).enumerate() {
            let scales = if fitted.is_some() {
                &mut []
            } else {
                &mut scales[per_row * i..][..per_row]
            };
            self.row(first + i, fitted, scales, bytes)
                .map_err(|e| (first + i, e))?;
        }
        Ok(())
    }

    /// Granules of equal size, one after another in the bytes too: each is encoded while the next
    /// one is measured, which fits into one another because sums wait for one another and codes do
    /// not. `index` is the position of the first weight in the matrix.
    fn granules(
        &self,
        w: &[f32],
        index: usize,
        scales: &mut [f32],
        bytes: &mut [u8],
    ) -> Result<(), (usize, Error)> {
        let QuantizeJob { kernels, spec, .. } = self.job;
        let width = spec.granule_cols();
        let mut sizes = kernels.magnitudes(&w[..width.min(w.len())]);
        for (i, (scale, bytes)) in scales
            .iter_mut()
            .zip(bytes.chunks_mut(width / 4))
            .enumerate()
        {
            let (now, next) = w[i * width..].split_at(width);
            let cuts;
            (*scale, cuts) = self
                .fit(now, &sizes, index + i * width)
                .map_err(|e| (i, e))?;
            let next = &next[..width.min(next.len())];
            sizes = kernels
                .table
                .encode_two_bit_and_measure(now, cuts, bytes, next);
        }
        Ok(())
    }

    /// Scale and cuts of a granule that begins at `index`.
    fn fit(&self, w: &[f32], sizes: &Magnitudes, index: usize) -> Result<(f32, Cuts)> {
        if let Some(fitted) = fit_absmean(sizes, self.job.scheme) {
            return Ok(fitted);
        }
        let fitted =
            fit_trits(&self.job.kernels, w, sizes, self.job.scheme, None).map_err(|e| match e {
                Error::NotFinite {
                    index: inside,
                    value,
                } => Error::NotFinite {
                    index: index + inside,
                    value,
                },
                other => other,
            })?;
        Ok((fitted.scales[0], cuts_of(&fitted)))
    }

    fn row(
        &mut self,
        row: usize,
        fitted: Option<&Fitted>,
        scales: &mut [f32],
        out: &mut [u8],
    ) -> Result<()> {
        let QuantizeJob {
            kernels,
            spec,
            weights,
            ..
        } = self.job;
        let (first, width) = (
            row * spec.cols,
            if fitted.is_some() {
                spec.cols
            } else {
                spec.granule_cols()
            },
        );
        let mut buffer = std::mem::take(&mut self.buffer);
        let w = weights.read(*kernels, first..first + spec.cols, &mut buffer);
        self.cuts.clear();
        self.cuts.extend(fitted.map(cuts_of));
        self.sizes.clear();
        if fitted.is_none() {
            kernels.magnitudes_each(w, width, &mut self.sizes);
        }
        for (i, (w, scale)) in w.chunks(width).zip(scales).enumerate() {
            let cuts;
            (*scale, cuts) = self.fit(w, &self.sizes[i], first + i * width)?;
            self.cuts.push(cuts);
        }
        if let (DenseLayout::TwoBit { .. }, true) =
            (self.dense, width.is_multiple_of(4) || width == spec.cols)
        {
            for ((w, &cuts), out) in w
                .chunks(width)
                .zip(&self.cuts)
                .zip(out.chunks_mut(width.div_ceil(4)))
            {
                kernels.table.encode_two_bit(w, cuts, out);
            }
        } else {
            let mut values = [0; BLOCK];
            for (block, (w, out)) in w
                .chunks(BLOCK)
                .zip(out.chunks_mut(BLOCK / self.dense.values()))
                .enumerate()
            {
                let mut at = 0;
                while at < w.len() {
                    let column = block * BLOCK + at;
                    let end = (at + width - column % width).min(w.len());
                    kernels.encode_cut(
                        &w[at..end],
                        self.cuts[column / width],
                        &mut values[at..end],
                    );
                    at = end;
                }
                self.dense.pack(*kernels, &values[..w.len()], out);
            }
        }
        self.buffer = buffer;
        Ok(())
    }
}

fn cuts_of(fitted: &Fitted) -> Cuts {
    fitted.cuts().expect("one plane of trits has cuts")
}
