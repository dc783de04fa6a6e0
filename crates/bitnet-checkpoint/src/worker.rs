//! The work on one tensor: read, quantize, measure and pack strips, and send the bytes to the
//! writer thread in order.

use crate::onnx::RotaryTable;
use crate::plan::{Action, Job, Pack, TensorJob, mlx};
use crate::recipe::Format;
use crate::report::{Options, TensorReport};
use crate::rows::{
    OutputOrder, RowOrder, StripBuffers, StripGranule, WeightRows, in_parallel, strip_rows,
    windows, with_joined_rows, with_matrix_rows, with_original_rows, with_rows,
};
use crate::{Error, Result};
use bitnet_core::granule::Importance;
use bitnet_core::pack::{self, Layout};
use bitnet_core::quantize::{Fitted, fit, quantize_rows};
use bitnet_core::stats::{CodeHistogram, ErrorStats};
use bitnet_core::{Granularity, Matrix, MatrixSpec, ScaleDtype, ScaleStorage, Scheme, ZeroPoints};
use bitnet_formats::onnx::BlockFormat;
use bitnet_formats::output::{OutputId, Writer};
use bitnet_formats::{Content, StoredId, StoredMatrix, Tensor, dtype};
use bitnet_kernels::{Pool, stream};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;

/// Weights reconstructed and measured at a time.
const MEASURED: usize = 1 << 14;
/// Bytes of one piece of a copied tensor.
const COPY_BYTES: usize = 4 << 20;

/// A message to the writer thread.
pub(crate) enum WriterMessage {
    Append(OutputId, Vec<u8>),
    End(OutputId),
    Layout(String, &'static str),
    Commit(serde_json::Value),
}

impl WriterMessage {
    pub(crate) fn apply(self, writer: &mut Writer) -> bitnet_formats::Result<()> {
        match self {
            Self::Append(index, bytes) => writer.append(index, &bytes),
            Self::End(index) => writer.end(index),
            Self::Layout(name, layout) => {
                writer.set_layout(&name, layout);
                Ok(())
            }
            Self::Commit(note) => writer.commit(note),
        }
    }
}

pub(crate) struct Worker<'a> {
    pub(crate) job: &'a Job<'a>,
    pub(crate) tensor_job: &'a TensorJob,
    pub(crate) options: &'a Options<'a>,
    pub(crate) out: &'a SyncSender<WriterMessage>,
}

impl Worker<'_> {
    fn send(&self, message: WriterMessage) -> Result<()> {
        // The writer thread ends early only after an error of its own, which `run` returns.
        self.out.send(message).map_err(|_| Error::Interrupted)
    }

    fn check_interrupt(&self) -> Result<()> {
        if self.options.interrupt.load(Ordering::Relaxed) {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }

    fn advance(&self, share: usize, of: usize) {
        let source = self.job.source;
        let tensors = self.tensor_job.tensors();
        let bytes: u64 = tensors.map(|t| source.bytes_of(source.tensor(t))).sum();
        self.options
            .progress
            .advance((bytes as u128 * share as u128 / of.max(1) as u128) as u64);
    }

    fn error(&self, error: Error) -> Error {
        match (error, self.tensor_job.tensor) {
            (Error::Core(source), Some(index)) => {
                let tensor = self.job.source.tensor(index);
                Error::Tensor {
                    path: self.job.source.file_of_tensor(tensor).to_path_buf(),
                    tensor: tensor.name.clone(),
                    source,
                }
            }
            (other, _) => other,
        }
    }

    pub(crate) fn run(&self) -> Result<TensorReport> {
        self.check_interrupt()?;
        self.options.progress.tensor(&self.tensor_job.name);
        let report = match &self.tensor_job.action {
            Action::Literal(bytes) => self.literal(bytes),
            Action::Copy => self.copy(),
            Action::Cast(dtype) => self.with_rows(|rows| self.cast(rows, *dtype)),
            Action::Unrotate(dtype) => self.with_original_rows(|rows| self.cast(rows, *dtype)),
            Action::Pack(pack) => self.pack(pack),
            Action::Blocks(format) => self.blocks(format),
            Action::Rotary(table) => self.rotary(table),
        }
        .map_err(|e| self.error(e))?;
        self.send(WriterMessage::Commit(
            serde_json::to_value(&report).unwrap_or_default(),
        ))?;
        Ok(report)
    }

    fn report(&self, became: impl ToString, bytes: u64) -> TensorReport {
        let source = self.job.source;
        let tensors = self.tensor_job.tensors().map(|t| source.tensor(t));
        let weights = match (self.tensor_job.tensor, &self.tensor_job.order) {
            (None, _) => bytes / 4,
            (Some(id), Some(OutputOrder::Rows(order))) => {
                (order.len() * row_len(source.tensor(id))) as u64
            }
            (Some(_), _) => tensors.map(|t| t.elements() as u64).sum(),
        };
        TensorReport {
            name: self.tensor_job.name.clone(),
            became: became.to_string(),
            layout: None,
            granularity: None,
            weights,
            bytes,
            error: None,
            entropy: None,
            note: self.tensor_job.note.clone(),
        }
    }

    fn literal(&self, bytes: &[u8]) -> Result<TensorReport> {
        self.send(WriterMessage::Append(self.tensor_job.data, bytes.to_vec()))?;
        self.send(WriterMessage::End(self.tensor_job.data))?;
        Ok(self.report("f32", bytes.len() as u64))
    }

    fn copy(&self) -> Result<TensorReport> {
        let source = self.job.source;
        let Some(index) = self.tensor_job.tensor else {
            return Ok(self.report("nothing", 0));
        };
        let tensor = source.tensor(index);
        let Some(&first) = tensor.stored().first() else {
            return Ok(self.report("nothing", 0));
        };
        let total = match &self.tensor_job.order {
            None => {
                let tensors = self.tensor_job.tensors().map(|t| source.tensor(t));
                let stored: Vec<StoredId> = tensors.map(Tensor::first_stored).collect();
                let total = stored.iter().map(|&id| source.stored(id).len).sum();
                for id in stored {
                    self.copy_bytes(id, 0..source.stored(id).len, total)?;
                }
                total
            }
            Some(OutputOrder::Columns(order)) => {
                let rows = tensor.shape.first().copied().unwrap_or(1);
                self.copy_columns(first, order, rows)?
            }
            Some(OutputOrder::Rows(order)) => {
                let rows = tensor.elements() / row_len(tensor);
                let row_bytes = source.stored(first).len / rows.max(1) as u64;
                self.copy_rows(first, order, row_bytes)?;
                order.len() as u64 * row_bytes
            }
        };
        self.send(WriterMessage::End(self.tensor_job.data))?;
        Ok(self.report(format!("copied {}", source.stored(first).dtype), total))
    }

    /// Sends the rows of a stored tensor with their columns in another order; returns their bytes.
    fn copy_columns(&self, stored: StoredId, order: &[usize], rows: usize) -> Result<u64> {
        let source = self.job.source;
        let total = source.stored(stored).len;
        let row_bytes = total / rows.max(1) as u64;
        let (order, unit) = self.moved_units(stored, order)?;
        let (mut row, mut buffer) = (vec![0; row_bytes as usize], vec![]);
        for at in 0..rows as u64 {
            source.read(stored, at * row_bytes, &mut row)?;
            for &from in &order {
                buffer.extend_from_slice(&row[from * unit..][..unit]);
            }
            if buffer.len() >= COPY_BYTES || at + 1 == rows as u64 {
                self.advance(buffer.len(), total as usize);
                let bytes = std::mem::take(&mut buffer);
                self.send(WriterMessage::Append(self.tensor_job.data, bytes))?;
                self.check_interrupt()?;
            }
        }
        Ok(total)
    }

    /// Sends bytes of a stored tensor, of `total` that are sent for the output.
    fn copy_bytes(&self, stored: StoredId, bytes: Range<u64>, total: u64) -> Result<()> {
        let (source, mut at) = (self.job.source, bytes.start);
        while at < bytes.end {
            let mut buffer = vec![0; (bytes.end - at).min(COPY_BYTES as u64) as usize];
            source.read(stored, at, &mut buffer)?;
            at += buffer.len() as u64;
            self.advance(buffer.len(), total as usize);
            self.send(WriterMessage::Append(self.tensor_job.data, buffer))?;
            self.check_interrupt()?;
        }
        Ok(())
    }

    /// Sends rows of a stored tensor.
    fn copy_rows(&self, stored: StoredId, order: &RowOrder, row_bytes: u64) -> Result<()> {
        let total = order.len() as u64 * row_bytes;
        if let &RowOrder::Runs {
            first,
            len,
            stride,
            count,
        } = order
        {
            for run in 0..count {
                let start = (first + run * stride) as u64 * row_bytes;
                self.copy_bytes(stored, start..start + len as u64 * row_bytes, total)?;
            }
            return Ok(());
        }
        let (source, mut buffer) = (self.job.source, vec![]);
        for row in 0..order.len() {
            let end = buffer.len();
            buffer.resize(end + row_bytes as usize, 0);
            source.read(
                stored,
                order.row(row) as u64 * row_bytes,
                &mut buffer[end..],
            )?;
            if buffer.len() >= COPY_BYTES || row + 1 == order.len() {
                self.advance(buffer.len(), total as usize);
                let bytes = std::mem::take(&mut buffer);
                self.send(WriterMessage::Append(self.tensor_job.data, bytes))?;
                self.check_interrupt()?;
            }
        }
        Ok(())
    }

    /// An order of columns as one of the blocks of a stored tensor, and the bytes of a block. The
    /// plan has checked that it moves whole ones.
    fn moved_units(&self, stored: StoredId, order: &[usize]) -> Result<(Vec<usize>, usize)> {
        let stored = self.job.source.stored(stored);
        let block = stored.dtype.block();
        let units = order.iter().step_by(block).map(|c| c / block);
        let bytes = stored.len as usize * block / stored.elements().max(1);
        Ok((units.collect(), bytes))
    }

    /// Calls `f` with the rows of the tensor.
    fn with_rows<T>(&self, f: impl FnOnce(&WeightRows<'_>) -> Result<T>) -> Result<T> {
        let source = self.job.source;
        if !self.tensor_job.joined.is_empty() {
            let tensors: Vec<&Tensor> = self
                .tensor_job
                .tensors()
                .map(|t| source.tensor(t))
                .collect();
            let Content::Quantized(q) = &tensors[0].content else {
                return with_joined_rows(source, &tensors, f);
            };
            let matrix = self.joined_matrix(source.matrix(&tensors[0].name, q)?)?;
            return with_matrix_rows(source, &matrix, f);
        }
        match self.tensor_job.tensor {
            Some(index) => with_rows(
                source,
                source.tensor(index),
                self.tensor_job.order.as_ref(),
                f,
            ),
            None => Err(Error::Recipe("a literal has no rows".into())),
        }
    }

    /// [`Self::with_rows`] in the original basis.
    fn with_original_rows<T>(&self, f: impl FnOnce(&WeightRows<'_>) -> Result<T>) -> Result<T> {
        let (source, kernels) = (self.job.source, self.options.kernels);
        match self.tensor_job.tensor {
            Some(index) => with_original_rows(
                source,
                source.tensor(index),
                self.tensor_job.order.as_ref(),
                kernels,
                f,
            ),
            None => Err(Error::Recipe("a literal has no rows".into())),
        }
    }

    fn cast(&self, rows: &WeightRows<'_>, to: ScaleDtype) -> Result<TensorReport> {
        let (mut bytes, count) = (0, rows.count);
        for window in windows(count, strip_rows(rows.cols)) {
            self.check_interrupt()?;
            let done: usize = window.iter().map(Range::len).sum();
            let parts = in_parallel(window.len(), |i, scratch| -> Result<Vec<u8>> {
                let range = window[i].clone();
                let first = range.start * rows.cols;
                rows.read(range, &mut scratch.bytes, &mut scratch.weights)?;
                let lost = scratch
                    .weights
                    .iter()
                    .position(|w| w.is_finite() && !to.round(*w).is_finite());
                if let Some(i) = lost {
                    let index = first + i;
                    let what = format!(
                        "weight {index} is {}, which {to} cannot hold",
                        scratch.weights[i]
                    );
                    return Err(bitnet_core::Error::Scheme(what).into());
                }
                let mut out = vec![];
                dtype::encode(to, &scratch.weights, &mut out);
                Ok(out)
            });
            for part in parts {
                let part = part?;
                bytes += part.len() as u64;
                self.send(WriterMessage::Append(self.tensor_job.data, part))?;
            }
            self.advance(done, count);
        }
        self.send(WriterMessage::End(self.tensor_job.data))?;
        Ok(self.report(to, bytes))
    }

    fn pack(&self, pack: &Pack) -> Result<TensorReport> {
        match &pack.scheme {
            Some(scheme) => {
                self.with_rows(|rows| self.quantize(pack, scheme, &rows.in_form(pack.form())))
            }
            None => self.recode(pack),
        }
    }

    fn quantize(
        &self,
        pack: &Pack,
        scheme: &Scheme,
        rows: &WeightRows<'_>,
    ) -> Result<TensorReport> {
        let spec = &pack.spec;
        let chunk = pack
            .layout
            .and_then(|l| l.chunk_rows(spec))
            .filter(|_| spec.planes == 1);
        let strip = strip_rows(spec.cols).next_multiple_of(chunk.unwrap_or(1));
        let fitted: Option<Fitted> = match scheme.granularity {
            Granularity::Tensor if spec.weights_len() > 0 => {
                let h = pack
                    .importance
                    .as_deref()
                    .map(Importance::new)
                    .transpose()?;
                Some(fit(
                    &self.options.kernels,
                    &StripGranule {
                        rows,
                        strip,
                        interrupt: self.options.interrupt,
                    },
                    scheme,
                    h,
                )?)
            }
            _ => None,
        };
        let strips = StripJob {
            pack,
            scheme,
            rows,
            fitted: fitted.as_ref(),
            pack_strips: chunk.is_some(),
        };
        let mut done = AssembledTensor::new(spec, chunk.is_none());
        for window in windows(if spec.cols == 0 { 0 } else { spec.rows }, strip) {
            self.check_interrupt()?;
            let parts = in_parallel(window.len(), |i, buffers| {
                self.quantize_strip(&strips, window[i].clone(), buffers)
            });
            for part in parts {
                let part = part?;
                done.add(spec, &part);
                self.advance(part.matrix.spec.rows, spec.rows);
                if chunk.is_some() {
                    self.send_codes(pack, part.packed)?;
                }
            }
        }
        if spec.weights_len() == 0 {
            done.values = Some(vec![]);
        }
        let mut layout = pack.layout;
        if let Some(values) = &done.values {
            let bytes = self.pack_whole(pack, values, &done.scales, &mut layout)?;
            done.packed_bytes += bytes.len() as u64;
            self.send_codes(pack, bytes)?;
        }
        let bytes = done.packed_bytes + self.finish_matrix(pack, &done.scales, &done.zeros)?;
        let mut report = self.packed_report(pack, layout, bytes);
        report.error = Some(done.error);
        report.entropy = Some(done.histogram.entropy_bits());
        Ok(report)
    }

    fn quantize_strip(
        &self,
        job: &StripJob<'_>,
        range: Range<usize>,
        buffers: &mut StripBuffers,
    ) -> Result<QuantizedStrip> {
        let (pack, first_row) = (job.pack, range.start);
        job.rows
            .read(range, &mut buffers.bytes, &mut buffers.weights)?;
        let cols = pack.spec.cols;
        let h = pack.importance.as_deref().filter(|_| job.fitted.is_none());
        let mut matrix = quantize_rows(
            &self.options.kernels,
            &buffers.weights,
            cols,
            first_row,
            job.scheme,
            job.fitted,
            h,
        )?;
        let mut error = ErrorStats::default();
        buffers.back.resize(cols.min(MEASURED), 0.0);
        for (row, weights) in buffers.weights.chunks(cols).enumerate() {
            for (part, weights) in weights.chunks(MEASURED).enumerate() {
                let back = &mut buffers.back[..weights.len()];
                matrix.dequantize_part_into(row, part * MEASURED, back);
                error = error.merge(ErrorStats::measure(weights, back));
            }
        }
        let mut histogram = CodeHistogram::default();
        histogram.add(&matrix.values);
        let mut packed = vec![];
        if let (Some(layout), true) = (pack.layout, job.pack_strips) {
            stream::pack(
                self.options.kernels,
                &Pool::single(),
                layout,
                &matrix.spec,
                &matrix.values,
                &matrix.scales,
                &mut packed,
            )?;
            matrix.values = vec![];
        }
        Ok(QuantizedStrip {
            first_row,
            packed,
            matrix,
            error,
            histogram,
        })
    }

    /// The matrix with its rows or columns in the order of the output.
    fn ordered(&self, matrix: Matrix) -> Result<Matrix> {
        match &self.tensor_job.order {
            None => Ok(matrix),
            Some(OutputOrder::Rows(order)) => Ok(matrix.select_rows(&order.to_list())),
            Some(OutputOrder::Columns(order)) => matrix.select_columns(order).ok_or_else(|| {
                let name = &self.tensor_job.name;
                Error::Recipe(format!(
                    "'{name}': groups of columns that do not move as one"
                ))
            }),
        }
    }

    fn recode(&self, pack: &Pack) -> Result<TensorReport> {
        let source = self.job.source;
        let Some(tensor) = self.tensor_job.tensor.map(|i| source.tensor(i)) else {
            return Err(Error::Recipe("a literal has no codes".into()));
        };
        let matrix = match (&pack.given, &tensor.content) {
            (Some(given), _) => self.ordered((**given).clone())?,
            (None, Content::Quantized(q)) => self.ordered_matrix(tensor, q)?,
            (None, _) => return Err(Error::Recipe("floats have no codes".into())),
        };
        let mut matrix = matrix.with_granularity(pack.spec.granularity)?;
        for scale in &mut matrix.scales {
            *scale = pack.spec.scale_dtype.round(*scale);
            if !scale.is_finite() {
                return Err(bitnet_core::Error::Scheme(format!(
                    "a scale that does not fit {}",
                    pack.spec.scale_dtype
                ))
                .into());
            }
        }
        matrix.spec = pack.spec.clone();
        let mut layout = pack.layout;
        let bytes = self.pack_whole(pack, &matrix.values, &matrix.scales, &mut layout)?;
        let mut total = bytes.len() as u64;
        self.send_codes(pack, bytes)?;
        total += self.finish_matrix(pack, &matrix.scales, &matrix.zero_points)?;
        self.advance(1, 1);
        Ok(self.packed_report(pack, layout, total))
    }

    /// The matrix of the output: joined, or some rows of a tensor's.
    fn ordered_matrix(&self, tensor: &Tensor, q: &StoredMatrix) -> Result<Matrix> {
        let (source, name) = (self.job.source, &tensor.name);
        if let Some(OutputOrder::Rows(order)) = &self.tensor_job.order
            && let Some(rows) = order.single_run()
            && let Some(matrix) = source.matrix_part(name, q, rows)?
        {
            return Ok(matrix);
        }
        self.ordered(self.joined_matrix(source.matrix(name, q)?)?)
    }

    /// A matrix with the rows of those that are joined to it.
    fn joined_matrix(&self, mut matrix: Matrix) -> Result<Matrix> {
        let source = self.job.source;
        if self.tensor_job.joined.is_empty() {
            return Ok(matrix);
        }
        if matrix.spec.planes != 1 {
            let why = "experts of several planes cannot be joined to one tensor";
            return Err(bitnet_core::Error::Scheme(why.into()).into());
        }
        if matrix.spec.granularity == Granularity::Tensor {
            matrix = matrix.with_granularity(Granularity::Channel)?;
        }
        for &id in &self.tensor_job.joined {
            let tensor = source.tensor(id);
            let Content::Quantized(q) = &tensor.content else {
                return Err(Error::Recipe("floats have no codes".into()));
            };
            let other = source.matrix(&tensor.name, q)?;
            let other = other.with_granularity(matrix.spec.granularity)?;
            matrix.spec.rows += other.spec.rows;
            matrix.values.extend(other.values);
            matrix.scales.extend(other.scales);
            matrix.zero_points.extend(other.zero_points);
        }
        Ok(matrix)
    }

    /// Sends packed bytes as the format has them.
    fn send_codes(&self, pack: &Pack, mut bytes: Vec<u8>) -> Result<()> {
        if self.job.format == Format::Mlx {
            mlx::encode(pack.spec.precision, &mut bytes);
        }
        self.send(WriterMessage::Append(self.tensor_job.data, bytes))
    }

    /// The values of a quantized source in blocks of ONNX operators.
    fn blocks(&self, format: &BlockFormat) -> Result<TensorReport> {
        let source = self.job.source;
        let tensor = self.tensor_job.tensor.map(|i| source.tensor(i));
        let Some((tensor, Content::Quantized(q))) = tensor.map(|t| (t, &t.content)) else {
            return Err(Error::Recipe("floats have no codes".into()));
        };
        let matrix = self.ordered(source.matrix(&tensor.name, q)?)?;
        let precision = matrix.spec.precision;
        let packed = format.pack(&matrix)?;
        drop(matrix);
        let job = self.tensor_job;
        let parts = [
            (Some(job.data), packed.codes),
            (job.scale, packed.scales),
            (job.zero, packed.zero_points),
        ];
        let mut total = 0;
        for (id, bytes) in parts {
            let Some(id) = id else { continue };
            total += bytes.len() as u64;
            self.send(WriterMessage::Append(id, bytes))?;
            self.send(WriterMessage::End(id))?;
        }
        self.advance(1, 1);
        Ok(TensorReport {
            layout: Some(format!("{}-bit blocks", format.bits)),
            granularity: Some(Granularity::Group(format.block)),
            ..self.report(precision, total)
        })
    }

    fn rotary(&self, table: &RotaryTable) -> Result<TensorReport> {
        let step = (COPY_BYTES / (table.frequencies.len() * 4).max(1)).max(1);
        let mut start = 0;
        while start < table.positions {
            self.check_interrupt()?;
            let end = (start + step).min(table.positions);
            let rows = table.rows(start..end);
            self.send(WriterMessage::Append(self.tensor_job.data, rows))?;
            start = end;
        }
        self.send(WriterMessage::End(self.tensor_job.data))?;
        Ok(self.report("f32", table.len() as u64))
    }

    fn pack_whole(
        &self,
        pack: &Pack,
        values: &[i8],
        scales: &[f32],
        layout: &mut Option<&'static dyn Layout>,
    ) -> Result<Vec<u8>> {
        match layout {
            Some(layout) => {
                let mut bytes = Vec::with_capacity(
                    layout
                        .packed_len(&pack.spec)
                        .bound()
                        .min(values.len() * 4 + 64),
                );
                stream::pack(
                    self.options.kernels,
                    &Pool::single(),
                    *layout,
                    &pack.spec,
                    values,
                    scales,
                    &mut bytes,
                )?;
                Ok(bytes)
            }
            None => {
                let (picked, bytes) = pack::auto(&pack.spec, values, scales)?;
                *layout = Some(picked);
                self.send(WriterMessage::Layout(
                    self.tensor_job.name.clone(),
                    picked.name(),
                ))?;
                Ok(bytes)
            }
        }
    }

    /// Writes scales and zero points that are stored as tensors of their own, and ends the written
    /// tensors. Returns the bytes written.
    fn finish_matrix(&self, pack: &Pack, scales: &[f32], zeros: &[f32]) -> Result<u64> {
        self.send(WriterMessage::End(self.tensor_job.data))?;
        let mut total = 0;
        let mut put = |index: OutputId, bytes: Vec<u8>| -> Result<()> {
            total += bytes.len() as u64;
            self.send(WriterMessage::Append(index, bytes))?;
            self.send(WriterMessage::End(index))
        };
        if let Some(index) = self.tensor_job.scale {
            let mut bytes = vec![];
            let storage = ScaleStorage {
                dtype: pack.scale_dtype,
                form: pack.scale_form,
            };
            scales
                .iter()
                .for_each(|&s| pack.scale_dtype.write(storage.to_stored(s), &mut bytes));
            put(index, bytes)?;
        }
        if let Some(index) = self.tensor_job.zero {
            let bytes = match pack.spec.zero_points {
                _ if self.job.format == Format::Mlx => {
                    mlx::biases(&pack.spec, pack.scale_dtype, scales, zeros)
                }
                ZeroPoints::F32 => zeros.iter().flat_map(|z| z.to_le_bytes()).collect(),
                _ => zeros.iter().map(|&z| z as i8 as u8).collect(),
            };
            put(index, bytes)?;
        }
        Ok(total)
    }

    fn packed_report(
        &self,
        pack: &Pack,
        layout: Option<&'static dyn Layout>,
        bytes: u64,
    ) -> TensorReport {
        let planes = pack.spec.planes;
        let became = if planes > 1 {
            format!("{planes} × {}", pack.spec.precision)
        } else {
            pack.spec.precision.to_string()
        };
        TensorReport {
            layout: layout.map(|l| l.name().into()),
            granularity: Some(pack.spec.granularity),
            ..self.report(became, bytes)
        }
    }
}

/// Elements of a row: the last dimension, or one element of a vector.
fn row_len(tensor: &Tensor) -> usize {
    match tensor.shape[..] {
        [_, .., cols] => cols.max(1),
        _ => 1,
    }
}

/// What the strips of a tensor share.
struct StripJob<'a> {
    pack: &'a Pack,
    scheme: &'a Scheme,
    rows: &'a WeightRows<'a>,
    /// The parameters of a tensor with one granule.
    fitted: Option<&'a Fitted>,
    /// Whether each strip is packed on its own.
    pack_strips: bool,
}

/// The strips of a tensor put together.
struct AssembledTensor {
    /// The values; `None` if each strip is packed on its own.
    values: Option<Vec<i8>>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    error: ErrorStats,
    histogram: CodeHistogram,
    packed_bytes: u64,
}

impl AssembledTensor {
    fn new(spec: &MatrixSpec, keep_values: bool) -> Self {
        let zeros = match spec.zero_points {
            ZeroPoints::None => 0,
            ZeroPoints::I8 | ZeroPoints::F32 => spec.scales_len(),
        };
        Self {
            values: keep_values.then(|| vec![0; spec.values_len()]),
            scales: vec![0.0; spec.scales_len()],
            zeros: vec![0.0; zeros],
            error: ErrorStats::default(),
            histogram: CodeHistogram::default(),
            packed_bytes: 0,
        }
    }

    /// Copies a strip to its place.
    fn add(&mut self, spec: &MatrixSpec, strip: &QuantizedStrip) {
        let (count, first) = (strip.matrix.spec.rows, strip.first_row);
        self.error = self.error.merge(strip.error);
        self.histogram.merge(&strip.histogram);
        self.packed_bytes += strip.packed.len() as u64;
        if let Some(values) = &mut self.values {
            for plane in 0..spec.planes {
                let from = &strip.matrix.values[plane * count * spec.cols..][..count * spec.cols];
                values[(plane * spec.rows + first) * spec.cols..][..from.len()]
                    .copy_from_slice(from);
            }
        }
        place_granules(spec, first, &strip.matrix.scales, &mut self.scales);
        place_granules(spec, first, &strip.matrix.zero_points, &mut self.zeros);
    }
}

/// A quantized strip.
struct QuantizedStrip {
    first_row: usize,
    packed: Vec<u8>,
    /// Its values are empty if the strip is packed.
    matrix: Matrix,
    error: ErrorStats,
    histogram: CodeHistogram,
}

/// Copies the scales or zero points of a strip that begins at `first_row` into those of the matrix.
fn place_granules(spec: &MatrixSpec, first_row: usize, strip: &[f32], all: &mut [f32]) {
    let per_plane = (strip.len() / spec.planes, all.len() / spec.planes);
    let first = if spec.granularity == Granularity::Tensor {
        0
    } else {
        first_row * spec.granules_per_row()
    };
    for plane in 0..if strip.is_empty() { 0 } else { spec.planes } {
        let from = &strip[plane * per_plane.0..][..per_plane.0];
        all[plane * per_plane.1 + first..][..from.len()].copy_from_slice(from);
    }
}
