//! Rows of a tensor as f32, read strip by strip.

use crate::forms::{Forms, MatrixForm};
use crate::recipe::MAX_THREADS;
use crate::{Error, Result};
use bitnet_core::Matrix;
use bitnet_core::granule::Granule;
use bitnet_core::hadamard::Hadamard;
use bitnet_formats::arch::TensorOrder;
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

/// Weights of a block of rows that are read to be turned, as far as a row allows.
const TURNED_WEIGHTS: usize = 1 << 14;
/// Rows of such a block: a cache line of floats.
const TURNED_ROWS: usize = 16;

/// Which rows of a source are those of an output, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// These.
    List(Vec<usize>),
    /// `count` runs of `len` rows; the first begins at row `first`, each other one `stride` rows
    /// behind the one before.
    Runs {
        first: usize,
        len: usize,
        stride: usize,
        count: usize,
    },
}

impl RowOrder {
    /// `len` rows from `first` on.
    pub(crate) const fn run(first: usize, len: usize) -> Self {
        Self::Runs {
            first,
            len,
            stride: len,
            count: 1,
        }
    }

    /// Number of rows.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::List(rows) => rows.len(),
            Self::Runs { len, count, .. } => len * count,
        }
    }

    /// The source's row of a row.
    pub(crate) fn row(&self, row: usize) -> usize {
        match self {
            Self::List(rows) => rows[row],
            Self::Runs {
                first, len, stride, ..
            } => first + row / len * stride + row % len,
        }
    }

    /// The rows, if they are one run.
    pub(crate) fn single_run(&self) -> Option<Range<usize>> {
        match *self {
            Self::Runs {
                first,
                len,
                count: 1,
                ..
            } => Some(first..first + len),
            _ => None,
        }
    }

    /// All rows.
    pub(crate) fn to_list(&self) -> Vec<usize> {
        (0..self.len()).map(|row| self.row(row)).collect()
    }
}

/// Which rows or columns of a source are those of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OutputOrder {
    Rows(RowOrder),
    /// All columns, for each that of the source.
    Columns(Vec<usize>),
}

impl From<TensorOrder> for OutputOrder {
    fn from(order: TensorOrder) -> Self {
        match order {
            TensorOrder::Rows(rows) => Self::Rows(RowOrder::List(rows)),
            TensorOrder::Columns(columns) => Self::Columns(columns),
        }
    }
}

/// Rows of a tensor as f32: stored floats or blocks, or dequantized values.
#[derive(Clone, Copy)]
pub(crate) struct WeightRows<'a> {
    source: &'a Source,
    from: RowSource<'a>,
    /// Number of rows.
    pub(crate) count: usize,
    /// Weights of a row.
    pub(crate) cols: usize,
    order: Option<&'a RowOrder>,
    /// For each column the column of what is read.
    columns: Option<&'a [usize]>,
    /// The last two dimensions of what is read: those of each matrix.
    matrix: (usize, usize),
    /// Whether the rows are columns of what is read.
    turned: bool,
    /// Turns the rows back to their original basis.
    unrotate: Option<(Kernels, &'a Hadamard)>,
}

#[derive(Clone, Copy)]
enum RowSource<'a> {
    Stored(StoredId),
    /// Tensors of so many elements each, one behind the other.
    Joined(&'a [StoredId], usize),
    Matrix(&'a Matrix),
}

/// Buffers of one thread.
#[derive(Default)]
pub(crate) struct StripBuffers {
    pub(crate) bytes: Vec<u8>,
    pub(crate) weights: Vec<f32>,
    pub(crate) back: Vec<f32>,
}

impl<'a> WeightRows<'a> {
    /// All rows of a matrix, in its order.
    const fn plain(source: &'a Source, from: RowSource<'a>, matrix: (usize, usize)) -> Self {
        Self {
            source,
            from,
            count: matrix.0,
            cols: matrix.1,
            order: None,
            columns: None,
            matrix,
            turned: false,
            unrotate: None,
        }
    }
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
        match self.order {
            _ if self.turned => self.read_turned(rows.start * cols, bytes, out)?,
            None => self.read_flat(rows.start * cols, bytes, out)?,
            Some(order) => {
                for (row, out) in rows.zip(out.chunks_mut(cols.max(1))) {
                    self.read_flat(order.row(row) * cols, bytes, out)?;
                }
            }
        }
        if let Some((kernels, rotation)) = self.unrotate {
            kernels.hadamard_unrotate(rotation, out);
        }
        if let Some(columns) = self.columns {
            let mut moved = vec![0.0; columns.len()];
            for row in out.chunks_exact_mut(columns.len().max(1)) {
                for (to, &column) in moved.iter_mut().zip(columns) {
                    *to = row[column];
                }
                row.copy_from_slice(&moved);
            }
        }
        Ok(())
    }

    /// Weights `start…` in the order in which they are stored.
    fn read_flat(&self, start: usize, bytes: &mut Vec<u8>, out: &mut [f32]) -> Result<()> {
        match self.from {
            RowSource::Stored(stored) => {
                let range = start..start + out.len();
                self.source.read_floats(stored, range, bytes, out)?;
            }
            RowSource::Joined(all, elements) => {
                let (mut start, mut rest) = (start, out);
                while !rest.is_empty() {
                    let (part, at) = (start / elements.max(1), start % elements.max(1));
                    let len = (elements - at).min(rest.len());
                    let (out, after) = rest.split_at_mut(len);
                    self.source
                        .read_floats(all[part], at..at + len, bytes, out)?;
                    (start, rest) = (start + len, after);
                }
            }
            RowSource::Matrix(matrix) => dequantize_range(matrix, start, out),
        }
        Ok(())
    }

    /// Part of a row that need not begin and end with the blocks of its type.
    fn read_part(&self, start: usize, bytes: &mut Vec<u8>, out: &mut [f32]) -> Result<()> {
        let block = match self.from {
            RowSource::Stored(stored) => self.source.stored(stored).dtype.block(),
            RowSource::Joined(..) | RowSource::Matrix(_) => 1,
        };
        if block == 1 {
            return self.read_flat(start, bytes, out);
        }
        let first = start / block * block;
        let end = (start + out.len()).next_multiple_of(block);
        let mut blocks = vec![0.0; end - first];
        self.read_flat(first, bytes, &mut blocks)?;
        out.copy_from_slice(&blocks[start - first..][..out.len()]);
        Ok(())
    }

    /// Weights `start…` of the transposed matrices: whole columns of what is stored. Blocks of a few
    /// parts of rows are read and turned, so memory holds little besides `out`.
    fn read_turned(&self, start: usize, bytes: &mut Vec<u8>, out: &mut [f32]) -> Result<()> {
        let (rows, cols) = self.matrix;
        let mut block = vec![];
        let (mut column, mut rest) = (start / rows.max(1), out);
        while !rest.is_empty() {
            let (matrix, first) = (column / cols, column % cols);
            let width = (cols - first).min(rest.len() / rows);
            if width == 0 {
                return Err(Error::Core(bitnet_core::Error::Length {
                    what: "columns",
                    expected: rows,
                    got: rest.len(),
                }));
            }
            let (turned, after) = rest.split_at_mut(width * rows);
            let height = (TURNED_WEIGHTS / width).clamp(1, TURNED_ROWS);
            for row in (0..rows).step_by(height) {
                let height = height.min(rows - row);
                block.resize(height * width, 0.0);
                for (i, part) in block.chunks_mut(width).enumerate() {
                    let row = matrix * rows + row + i;
                    let row = self.order.map_or(row, |order| order.row(row));
                    self.read_part(row * cols + first, bytes, part)?;
                }
                for (c, out) in turned.chunks_mut(rows).enumerate() {
                    let weights = block[c..].iter().step_by(width);
                    out[row..row + height]
                        .iter_mut()
                        .zip(weights)
                        .for_each(|(out, w)| *out = *w);
                }
            }
            (column, rest) = (column + width, after);
        }
        Ok(())
    }

    /// The same weights in rows of another length; of turned ones a multiple of a column.
    pub(crate) fn reshaped(&self, cols: usize) -> Self {
        Self {
            count: self.count * self.cols / cols.max(1),
            cols,
            ..*self
        }
    }

    /// The rows of the weight matrices: outputs.
    pub(crate) fn in_form(&self, form: MatrixForm) -> Self {
        if !form.transposed {
            return self.reshaped(form.cols);
        }
        let turned = !self.turned;
        let cols = if turned { self.matrix.0 } else { self.matrix.1 };
        Self {
            turned,
            ..self.reshaped(cols)
        }
    }
}

/// Weights `start…` of a matrix, dequantized.
fn dequantize_range(matrix: &Matrix, start: usize, out: &mut [f32]) {
    let cols = matrix.spec.cols.max(1);
    let mut done = 0;
    while done < out.len() {
        let (row, first) = ((start + done) / cols, (start + done) % cols);
        let len = (cols - first).min(out.len() - done);
        matrix.dequantize_part_into(row, first, &mut out[done..done + len]);
        done += len;
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

/// The weight matrix of a tensor as f32, `[N, K]` row by row, and its shape; of several matrices one
/// after another.
///
/// # Errors
/// [`Error::File`] for what cannot be read, [`Error::Recipe`] for a tensor that is no matrix.
pub fn read_matrix(source: &Source, tensor: &Tensor) -> Result<(Vec<f32>, (usize, usize))> {
    let form = Forms::new(source)
        .form(tensor)
        .ok_or_else(|| Error::Recipe(format!("'{}' has fewer than two dimensions", tensor.name)))?;
    with_rows(source, tensor, None, |rows| {
        let mut out = vec![];
        let rows = rows.in_form(form);
        rows.read(0..rows.count, &mut vec![], &mut out)?;
        Ok((out, (form.rows, form.cols)))
    })
}

/// Calls `f` with the rows of a tensor, in the order of its shape; row (or column) `r` is row (or
/// column) `order[r]` of the source.
///
/// A row is the last dimension, or that of the packed matrix where it is longer. A one-dimensional
/// tensor has rows of one element.
pub(crate) fn with_rows<T>(
    source: &Source,
    tensor: &Tensor,
    order: Option<&OutputOrder>,
    f: impl FnOnce(&WeightRows<'_>) -> Result<T>,
) -> Result<T> {
    let (order, columns) = match order {
        None => (None, None),
        Some(OutputOrder::Rows(rows)) => (Some(rows), None),
        Some(OutputOrder::Columns(columns)) => (None, Some(&columns[..])),
    };
    let shape = match tensor.shape[..] {
        [.., rows, cols] => (rows, cols),
        _ => (tensor.elements(), 1),
    };
    let rows = |from, cols: usize| WeightRows {
        source,
        from,
        count: order.map_or(tensor.elements() / cols.max(1), RowOrder::len),
        cols,
        order,
        columns,
        matrix: shape,
        turned: false,
        unrotate: None,
    };
    match &tensor.content {
        Content::Float(stored) | Content::Opaque(stored) => {
            let blocks = source.stored(*stored).dtype.block() > 1;
            let cols = match tensor.shape[..] {
                [cols] if blocks => cols,
                _ => shape.1,
            };
            f(&rows(RowSource::Stored(*stored), cols))
        }
        Content::Quantized(q) => {
            let name = &tensor.name;
            if let Some(rows) = order.and_then(RowOrder::single_run)
                && q.spec.cols == shape.1
                && let Some(matrix) = source.matrix_part(name, q, rows)?
            {
                return with_matrix_rows(source, &matrix, f);
            }
            let matrix = source.matrix(name, q)?;
            let (from, spec) = (RowSource::Matrix(&matrix), &matrix.spec);
            if q.transposed {
                if order.is_some() || columns.is_some() {
                    let name = &tensor.name;
                    return Err(Error::Recipe(format!(
                        "'{name}' is packed transposed, so its rows and columns cannot change \
                         their order"
                    )));
                }
                return f(&WeightRows {
                    count: spec.weights_len() / shape.1.max(1),
                    matrix: (shape.1, shape.0),
                    turned: true,
                    ..rows(from, shape.1)
                });
            }
            // The same weights in the same order, if the matrix of the file has other rows than the
            // tensor.
            let same_rows = tensor.elements() == spec.rows * shape.1;
            let order = order.filter(|_| same_rows);
            f(&WeightRows {
                order,
                count: order.map_or(spec.rows, RowOrder::len),
                ..rows(from, spec.cols)
            })
        }
    }
}

/// Calls `f` with the rows of several tensors of floats of one shape `[N, K]`, one behind the other.
pub(crate) fn with_joined_rows<T>(
    source: &Source,
    tensors: &[&Tensor],
    f: impl FnOnce(&WeightRows<'_>) -> Result<T>,
) -> Result<T> {
    let stored: Vec<StoredId> = tensors.iter().map(|t| t.first_stored()).collect();
    let &[rows, cols] = tensors.first().map_or(&[][..], |t| &t.shape[..]) else {
        return Err(Error::Recipe("only matrices can be joined".into()));
    };
    let from = RowSource::Joined(&stored, rows * cols);
    f(&WeightRows::plain(
        source,
        from,
        (rows * tensors.len(), cols),
    ))
}

/// Calls `f` with the rows of a quantized matrix.
pub(crate) fn with_matrix_rows<T>(
    source: &Source,
    matrix: &Matrix,
    f: impl FnOnce(&WeightRows<'_>) -> Result<T>,
) -> Result<T> {
    let shape = (matrix.spec.rows, matrix.spec.cols);
    f(&WeightRows::plain(source, RowSource::Matrix(matrix), shape))
}

/// [`with_rows`] in the original basis, where the source stores the tensor in a rotated one.
pub(crate) fn with_original_rows<T>(
    source: &Source,
    tensor: &Tensor,
    order: Option<&OutputOrder>,
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
            ..*rows
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
