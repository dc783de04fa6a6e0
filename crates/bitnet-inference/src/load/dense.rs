//! Layers with float activations, and the embedding.

use super::options::FloatType;
use super::rounding::RoundingError;
use super::tensors::{CheckpointLoader, FoundTensor, locked};
use crate::blocks;
use crate::{Error, Result};
use bitnet_formats::{Content, StoredType};
use bitnet_kernels::dense::{
    BlockType, Blocks, DenseData, DenseMatrix, quantize_int4, quantize_int8, zeros,
};
use std::sync::{Mutex, PoisonError};

/// Number of weights that are decoded at once.
const STRIP: usize = 1 << 16;

/// What a dense matrix is for.
#[derive(Clone, Copy)]
pub(super) enum WeightUse {
    Linear = 0,
    Embedding = 1,
}

/// Decodes whole rows from a first row on.
type ReadRows<'a> = dyn Fn(usize, &mut [f32]) -> Result<()> + Sync + 'a;

impl CheckpointLoader<'_> {
    /// The weights of a linear layer with float activations, times `multiplier`.
    pub(super) fn dense_multiplied(
        &self,
        found: FoundTensor<'_>,
        multiplier: f32,
    ) -> Result<DenseMatrix> {
        let matrix = self.dense(found, WeightUse::Linear)?;
        if multiplier == 1.0 {
            return Ok(matrix);
        }
        let [rows, cols] = found.shape;
        let mut all = vec![0.0; rows * cols];
        all.chunks_mut(cols)
            .enumerate()
            .for_each(|(row, out)| matrix.row_into(row, out));
        all.iter_mut().for_each(|w| *w *= multiplier);
        DenseMatrix::new(rows, cols, DenseData::F32(all)).map_err(|e| found.kernel_error(e))
    }

    /// The weights of a matrix, in the type that was chosen for this use of it.
    pub(super) fn dense(&self, found: FoundTensor<'_>, used_as: WeightUse) -> Result<DenseMatrix> {
        let choice = self.floats[used_as as usize];
        if let Some(blocks) = self.gguf_blocks(found, choice)? {
            return Ok(blocks.into());
        }
        let [rows, cols] = found.shape;
        match &found.tensor.content {
            Content::Quantized(q) => {
                found.check_spec(q)?;
                let (pool, keeps) = (&self.runtime.pool, |kind| choice.keeps(kind));
                let error = |e| found.kernel_error(e);
                let range = found.rows();
                let blocks = blocks::strip_blocks(pool, self.source, q, range, keeps, error)?;
                if let Some(blocks) = blocks {
                    return Ok(blocks.into());
                }
                let matrix = self.matrix(found, q)?;
                if let Some(kind) = blocks::block_type(&matrix).filter(|kind| choice.keeps(*kind)) {
                    return blocks::matrix_blocks(&self.runtime.pool, &matrix, kind)
                        .map(Into::into)
                        .map_err(|e| found.kernel_error(e));
                }
                let read = |first: usize, out: &mut [f32]| {
                    out.chunks_mut(cols.max(1))
                        .enumerate()
                        .for_each(|(i, out)| matrix.dequantize_row_into(first + i, out));
                    Ok(())
                };
                self.converted(found, used_as, &read)
            }
            Content::Float(stored) | Content::Opaque(stored) => {
                let halves = match self.source.stored(*stored).dtype.to_string().as_str() {
                    "F16" => Some((DenseData::F16 as fn(Vec<u16>) -> DenseData, 0x7c00)),
                    "BF16" => Some((DenseData::Bf16 as fn(Vec<u16>) -> DenseData, 0x7f80)),
                    _ => None,
                };
                if let (FloatType::Exact, Some((data, special))) = (choice, halves) {
                    let data = data(self.halves(found, special)?);
                    return DenseMatrix::new(rows, cols, data).map_err(|e| found.kernel_error(e));
                }
                let read = |first: usize, out: &mut [f32]| {
                    let at = found.first_weight() + first * cols;
                    let range = at..at + out.len();
                    Ok(self.source.read_floats(*stored, range, &mut vec![], out)?)
                };
                self.converted(found, used_as, &read)
            }
        }
    }

    /// The blocks of a GGUF tensor as they are stored, where the choice allows it. They are read so
    /// whatever a recipe in the file says of them.
    fn gguf_blocks(&self, found: FoundTensor<'_>, choice: FloatType) -> Result<Option<Blocks>> {
        let stored = match &found.tensor.content {
            Content::Quantized(q) => q.packed,
            Content::Float(stored) | Content::Opaque(stored) => *stored,
        };
        let StoredType::Ggml(ggml_type) = self.source.stored(stored).dtype else {
            return Ok(None);
        };
        let Some(kind) = blocks::gguf_block_type(ggml_type).filter(|kind| choice.keeps(*kind))
        else {
            return Ok(None);
        };
        let (pool, rows) = (&self.runtime.pool, found.rows());
        let cols = found.shape[1];
        blocks::gguf_blocks(pool, self.source, stored, ggml_type, kind, (rows, cols)).map(Some)
    }

    /// Converts the rows that `read` decodes to the chosen type.
    fn converted(
        &self,
        found: FoundTensor<'_>,
        used_as: WeightUse,
        read: &ReadRows<'_>,
    ) -> Result<DenseMatrix> {
        let [rows, cols] = found.shape;
        let floats = |first: usize, count: usize| -> Result<Vec<f32>> {
            let mut floats = vec![0.0; count];
            read(first, &mut floats)?;
            found.check_finite(first * cols, &floats)?;
            Ok(floats)
        };
        let rounded = |error| locked(&self.rounding)[used_as as usize].add(error);
        let data = match self.floats[used_as as usize] {
            FloatType::Exact => DenseData::F32(self.strips([rows, cols], |first, out| {
                floats(first, out.len()).map(|w| out.copy_from_slice(&w))
            })?),
            FloatType::Bf16 => DenseData::Bf16(self.strips([rows, cols], |first, out| {
                let w = floats(first, out.len())?;
                for (out, w) in out.iter_mut().zip(&w) {
                    *out = half::bf16::from_f32(*w).to_bits();
                }
                let back = out.iter().map(|&bits| half::bf16::from_bits(bits).to_f32());
                rounded(RoundingError::between(&w, back));
                Ok(())
            })?),
            FloatType::Int8 => {
                let blocks = self.rounded_blocks([rows, cols], BlockType::INT8, &floats, &rounded);
                DenseData::Blocks(blocks?)
            }
            FloatType::Int4 => {
                let blocks = self.rounded_blocks([rows, cols], BlockType::INT4, &floats, &rounded);
                DenseData::Blocks(blocks?)
            }
        };
        DenseMatrix::new(rows, cols, data).map_err(|e| found.kernel_error(e))
    }

    /// Rounds rows to blocks of `kind`, and tells `rounded` the error of each strip.
    fn rounded_blocks(
        &self,
        [rows, cols]: [usize; 2],
        kind: BlockType,
        floats: &(dyn Fn(usize, usize) -> Result<Vec<f32>> + Sync),
        rounded: &(dyn Fn(RoundingError) + Sync),
    ) -> Result<Blocks> {
        Blocks::new(&self.runtime.pool, rows, cols, kind, |first, strip| {
            let w = floats(first, strip.rows() * cols)?;
            let (mut error, mut back) = (RoundingError::default(), vec![0.0; cols]);
            for (i, w) in w.chunks_exact(cols.max(1)).enumerate() {
                let mut row = strip.row(i);
                if kind == BlockType::INT8 {
                    quantize_int8(w, &mut row)
                } else {
                    quantize_int4(w, &mut row)
                }
                strip.row_into(i, &mut back);
                error.add(RoundingError::between(w, back.iter().copied()));
            }
            rounded(error);
            Ok::<(), Error>(())
        })
    }

    /// 16-bit floats as they are stored. A value that is not finite has all bits of `special` set.
    fn halves(&self, found: FoundTensor<'_>, special: u16) -> Result<Vec<u16>> {
        let [rows, cols] = found.shape;
        let stored = found.tensor.stored()[0];
        self.strips([rows, cols], |first, out: &mut [u16]| {
            let mut bytes = vec![0; 2 * out.len()];
            self.source.read(
                stored,
                2 * (found.first_weight() + first * cols) as u64,
                &mut bytes,
            )?;
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = u16::from_le_bytes(*bytes);
            }
            match out.iter().position(|bits| bits & special == special) {
                None => Ok(()),
                Some(i) => {
                    let nan = out[i] & !(special | 0x8000) != 0;
                    Err(found.not_finite(first * cols + i, nan))
                }
            }
        })
    }

    /// Row-major elements that `fill` writes on the threads of the pool, a strip of rows per call.
    fn strips<T: Copy + Default + Send>(
        &self,
        [rows, cols]: [usize; 2],
        fill: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
    ) -> Result<Vec<T>> {
        let strip = (STRIP / cols.max(1)).max(1);
        let (mut all, failed) = (zeros::<T>(rows * cols), Mutex::new(None));
        let pool = &self.runtime.pool;
        pool.for_chunks(&mut all, (strip * cols).max(1), |part, out| {
            if let Err(error) = fill(part * strip, out) {
                locked(&failed).get_or_insert(error);
            }
        });
        failed
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(all), Err)
    }
}
