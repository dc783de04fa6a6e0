//! Rows of a tensor as f32, read strip by strip.

use crate::recipe::MAX_THREADS;
use crate::{Error, Result};
use bitnet_core::Matrix;
use bitnet_core::granule::Granule;
use bitnet_core::hadamard::Hadamard;
use bitnet_formats::{Content, Source, StoredId, Tensor};
use bitnet_kernels::Kernels;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Weights of a strip, as far as whole rows allow: 1 MiB of f32.
const STRIP_WEIGHTS: usize = 1 << 18;
/// Strips in memory for each thread: enough that no thread waits long for the
/// slowest.
const STRIPS_PER_THREAD: usize = 4;

/// Rows of a tensor as f32: stored floats or blocks, or dequantized values.
pub(crate) struct WeightRows<'a> {
    source: &'a Source,
    from: RowSource<'a>,
    /// Number of rows.
    pub(crate) count: usize,
    /// Weights of a row.
    pub(crate) cols: usize,
    order: Option<&'a [usize]>,
    /// Turns the rows back to their original basis.
    unrotate: Option<(Kernels, &'a Hadamard)>,
}

#[derive(Clone, Copy)]
enum RowSource<'a> {
    Stored(StoredId),
    Matrix(&'a Matrix),
}

/// Buffers of one thread.
#[derive(Default)]
pub(crate) struct StripBuffers {
    pub(crate) bytes: Vec<u8>,
    pub(crate) weights: Vec<f32>,
    pub(crate) back: Vec<f32>,
}

impl WeightRows<'_> {
    /// Reads rows `rows` into `out`; `bytes` is scratch.
    pub(crate) fn read(
        &self,
        rows: Range<usize>,
        bytes: &mut Vec<u8>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let cols = self.cols;
        out.resize(rows.len() * cols, 0.0);
        match (&self.from, self.order) {
            (RowSource::Stored(stored), None) => {
                self.source
                    .read_floats(*stored, rows.start * cols..rows.end * cols, bytes, out)?
            }
            (RowSource::Stored(stored), Some(order)) => {
                for (&row, out) in order[rows].iter().zip(out.chunks_mut(cols.max(1))) {
                    self.source
                        .read_floats(*stored, row * cols..(row + 1) * cols, bytes, out)?;
                }
            }
            (RowSource::Matrix(matrix), order) => {
                for (row, out) in rows.zip(out.chunks_mut(cols.max(1))) {
                    matrix.dequantize_row_into(order.map_or(row, |order| order[row]), out);
                }
            }
        }
        if let Some((kernels, rotation)) = self.unrotate {
            kernels.hadamard_unrotate(rotation, out);
        }
        Ok(())
    }
}

/// A tensor as one granule: each pass reads its strips again.
pub(crate) struct StripGranule<'a> {
    pub(crate) rows: &'a WeightRows<'a>,
    /// Rows of a strip.
    pub(crate) strip: usize,
    /// Set to stop the pass.
    pub(crate) interrupt: &'a AtomicBool,
}

impl Granule for StripGranule<'_> {
    type Error = Error;

    fn fold<T: Send>(
        &self,
        map: impl Fn(usize, &[f32]) -> T + Sync,
        join: impl Fn(T, T) -> T,
    ) -> Result<T> {
        let mut all: Option<T> = None;
        for window in windows(self.rows.count, self.strip) {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let parts = in_parallel(window.len(), |i, scratch| -> Result<T> {
                let rows = window[i].clone();
                let first = rows.start * self.rows.cols;
                self.rows
                    .read(rows, &mut scratch.bytes, &mut scratch.weights)?;
                Ok(map(first, &scratch.weights))
            });
            for part in parts {
                let part = part?;
                all = Some(match all {
                    Some(all) => join(all, part),
                    None => part,
                });
            }
        }
        Ok(all.unwrap_or_else(|| map(0, &[])))
    }
}

/// `f(0), f(1), … f(count − 1)`, on the threads of the current rayon pool.
///
/// The one parallel loop of this crate: rayon's iterators are compiled anew for each closure, which
/// was a third of the crate's code.
pub(crate) fn in_parallel<T: Send>(
    count: usize,
    f: impl Fn(usize, &mut StripBuffers) -> T + Sync,
) -> Vec<T> {
    let results: Vec<_> = (0..count).map(|_| Mutex::new(None)).collect();
    for_each(count, &|i, buffers| {
        let result = f(i, buffers);
        *results[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    });
    let results = results.into_iter().map(Mutex::into_inner);
    results
        .filter_map(|result| result.unwrap_or_else(PoisonError::into_inner))
        .collect()
}

fn for_each(count: usize, f: &(dyn Fn(usize, &mut StripBuffers) + Sync)) {
    (0..count)
        .into_par_iter()
        .for_each_init(StripBuffers::default, |buffers, i| f(i, buffers));
}

/// A pool of `n` threads; 0 for one on each core.
pub(crate) fn thread_pool(n: usize) -> Result<rayon::ThreadPool> {
    if n > MAX_THREADS {
        return Err(Error::Recipe(format!(
            "at most {MAX_THREADS} threads, got {n}"
        )));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .build()
        .map_err(|e| Error::Recipe(format!("{n} threads: {e}")))
}

/// Row ranges of `strip` rows, in windows that occupy all current threads. Results are joined in
/// the order of the strips, so they do not depend on the number of threads.
pub(crate) fn windows(count: usize, strip: usize) -> impl Iterator<Item = Vec<Range<usize>>> {
    let strips = count.div_ceil(strip);
    let window = STRIPS_PER_THREAD * rayon::current_num_threads();
    (0..strips.div_ceil(window)).map(move |w| {
        (w * window..((w + 1) * window).min(strips))
            .map(|s| s * strip..((s + 1) * strip).min(count))
            .collect()
    })
}

/// Rows of a strip.
pub(crate) fn strip_rows(cols: usize) -> usize {
    (STRIP_WEIGHTS / cols.max(1)).max(1)
}

/// The elements of a tensor `[N, …]` as f32, row by row.
///
/// # Errors
/// [`Error::File`] for what cannot be read.
pub fn read_all(source: &Source, tensor: &Tensor) -> Result<Vec<f32>> {
    with_rows(source, tensor, None, |rows| {
        let mut out = vec![];
        rows.read(0..rows.count, &mut vec![], &mut out)?;
        Ok(out)
    })
}

/// Calls `f` with the rows of a tensor; row `r` is row `order[r]` of the source.
///
/// The rows are those of the weight matrix. Of ggml blocks, which must not be cut, a row is the
/// last dimension instead, and a one-dimensional tensor has rows of one element.
pub(crate) fn with_rows<T>(
    source: &Source,
    tensor: &Tensor,
    order: Option<&[usize]>,
    f: impl FnOnce(&WeightRows<'_>) -> Result<T>,
) -> Result<T> {
    let (rows, cols) = tensor.matrix_shape().unwrap_or((tensor.elements(), 1));
    match &tensor.content {
        Content::Float(stored) | Content::Opaque(stored) => {
            let blocks = source.stored(*stored).dtype.block() > 1;
            let cols = if blocks {
                tensor.shape.last().copied().unwrap_or(1)
            } else {
                cols
            };
            f(&WeightRows {
                source,
                from: RowSource::Stored(*stored),
                count: tensor.elements() / cols.max(1),
                cols,
                order,
                unrotate: None,
            })
        }
        Content::Quantized(q) => {
            let matrix = source.matrix(&tensor.name, q)?;
            // The same weights in the same order, if the matrix of the file has other rows than the
            // tensor.
            f(&WeightRows {
                source,
                from: RowSource::Matrix(&matrix),
                count: matrix.spec.rows,
                cols: matrix.spec.cols,
                order: order.filter(|_| matrix.spec.rows == rows),
                unrotate: None,
            })
        }
    }
}

impl WeightRows<'_> {
    /// The same weights in rows of another length.
    pub(crate) fn reshaped(&self, cols: usize) -> Self {
        Self {
            source: self.source,
            from: self.from,
            count: self.count * self.cols / cols.max(1),
            cols,
            order: self.order,
            unrotate: self.unrotate,
        }
    }
}

/// [`with_rows`] in the original basis, where the source stores the tensor in a rotated one.
pub(crate) fn with_original_rows<T>(
    source: &Source,
    tensor: &Tensor,
    order: Option<&[usize]>,
    kernels: Kernels,
    f: impl FnOnce(&WeightRows<'_>) -> Result<T>,
) -> Result<T> {
    let rotation = source.rotation_of(&tensor.name)?;
    with_rows(source, tensor, order, |rows| {
        let Some(rotation) = rotation else {
            return f(rows);
        };
        if !rows.cols.is_multiple_of(rotation.width()) {
            let expected = format!("rows of {} columns, as its rotation has", rotation.width());
            let got = format!("{} columns", rows.cols);
            let path = source.file_of_tensor(tensor);
            return Err(bitnet_formats::Error::tensor(path, &tensor.name, expected, got).into());
        }
        f(&WeightRows {
            unrotate: Some((kernels, rotation)),
            ..rows.reshaped(rows.cols)
        })
    })
}

/// Moments of finite numbers.
///
/// # Errors
/// [`bitnet_core::Error::NotFinite`] with the position of the first that is none.
pub fn moments(kernels: bitnet_kernels::Kernels, x: &[f32]) -> Result<bitnet_core::ops::Moments> {
    use bitnet_core::ops::Ops;
    let moments = kernels.moments(x);
    if moments.finite {
        return Ok(moments);
    }
    let (index, value) = x
        .iter()
        .copied()
        .enumerate()
        .find(|(_, v)| !v.is_finite())
        .unwrap_or((0, f32::NAN));
    Err(Error::Core(bitnet_core::Error::NotFinite { index, value }))
}
