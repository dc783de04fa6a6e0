//! The block types of ggml: a fixed number of values of one row, and their scale as f16, in a fixed
//! number of bytes.
//!
//! Blocks follow one another along the row, rows follow one another without padding. Every block
//! holds a scale of its own; here a granule covers whole blocks, so all blocks of a granule hold
//! the same scale. A foreign file whose blocks differ is read with [`Granularity::Group`] of one
//! block. The scale is finite; it may be negative (ggml writes negative scales in some types).

use super::{
    Bad, FastPath, FindsWider, Layout, LayoutOrigin, PackedLen, Unpacked, check_cols, check_len,
    check_plain, check_precision, check_scales, check_values, unsupported,
};
use crate::{Granularity, MatrixSpec, Precision, Result, ScaleDtype};
use half::f16;
use std::fmt::Debug;
use std::marker::PhantomData;

/// One block type.
pub(super) trait Block: Send + Sync + Debug {
    const NAME: &'static str;
    const SUMMARY: &'static str;
    /// What the blocks hold. Tensors of other programs are of the first, or of the wider second
    /// where [`Block::WIDER`] finds its values. Int2 is stored negated: a block with the scale `d`
    /// and the codes −1 … 2 is the values 1 … −2 with the scale `−d`.
    const PRECISIONS: &'static [Precision];
    /// The type in GGUF.
    const ORIGIN: LayoutOrigin;
    /// The precisions that GGUF stores in this type when the user names no layout.
    const DEFAULT_FOR: &'static [Precision];
    /// Whether some of these blocks have values outside the first precision.
    const WIDER: Option<FindsWider> = None;
    /// Whether tensors of other programs are read as codes, and not as floats.
    const READ_AS_CODES: bool;
    const FAST_PATH: Option<FastPath> = None;
    /// Values of a block.
    const VALUES: usize;
    /// Bytes of a block, the scale among them.
    const BYTES: usize;
    /// Where the two bytes of the scale are.
    const SCALE_AT: usize;

    /// Writes all of `block` (`BYTES` zeros) but the scale.
    fn pack(precision: Precision, values: &[i8], block: &mut [u8]);

    /// Reads all of `block` but the scale.
    fn unpack(precision: Precision, block: &[u8], values: &mut [i8]) -> Result<(), Bad>;
}

/// The layout of one block type.
#[derive(Debug)]
pub(super) struct Ggml<B>(PhantomData<B>);

/// The scale of a matrix of this precision for the one that is stored, and the reverse.
fn stored_scale(precision: Precision, scale: f32) -> f32 {
    if precision == Precision::Int2 {
        -scale
    } else {
        scale
    }
}

impl<B: Block> Ggml<B> {
    pub(super) const fn new() -> Self {
        Self(PhantomData)
    }

    /// Adds the scale of block `i` where a granule begins, and compares it with its granule's
    /// elsewhere.
    fn add_scale(
        spec: &MatrixSpec,
        i: usize,
        block: &[u8],
        scales: &mut Vec<f32>,
    ) -> Result<(), Bad> {
        let per_row = spec.cols / B::VALUES;
        let half = f16::from_le_bytes([block[B::SCALE_AT], block[B::SCALE_AT + 1]]);
        if !half.is_finite() {
            return Err(Bad::new(B::SCALE_AT, format!("the scale {half}")));
        }
        let scale = stored_scale(spec.precision, half.to_f32());
        // Granules come up in order, so the first block of one is met exactly when its scale is not
        // there yet.
        match scales.get(spec.scale_index(0, i / per_row, i % per_row * B::VALUES)) {
            None => scales.push(scale),
            Some(first) if first.to_bits() == scale.to_bits() => {}
            Some(first) => {
                return Err(Bad::new(
                    B::SCALE_AT,
                    format!("the scale {scale} in a granule that began with {first}"),
                ));
            }
        }
        Ok(())
    }
}

impl<B: Block> Layout for Ggml<B> {
    fn name(&self) -> &'static str {
        B::NAME
    }

    fn summary(&self) -> &'static str {
        B::SUMMARY
    }

    fn stores_scales(&self) -> bool {
        true
    }

    fn origin(&self) -> LayoutOrigin {
        B::ORIGIN
    }

    fn default_for(&self) -> &'static [Precision] {
        B::DEFAULT_FOR
    }

    fn foreign_spec(&self, rows: usize, cols: usize) -> Option<MatrixSpec> {
        let granularity = Granularity::Group(B::VALUES);
        B::READ_AS_CODES.then(|| MatrixSpec {
            scale_dtype: ScaleDtype::F16,
            ..MatrixSpec::new(rows, cols, B::PRECISIONS[0], granularity)
        })
    }

    fn wider(&self) -> Option<(Precision, FindsWider)> {
        Some((*B::PRECISIONS.get(1)?, B::WIDER?))
    }

    fn fast_path(&self) -> Option<FastPath> {
        B::FAST_PATH
    }

    fn check(&self, spec: &MatrixSpec) -> Result<()> {
        check_precision(B::NAME, spec, B::PRECISIONS)?;
        check_plain(B::NAME, spec)?;
        check_cols(B::NAME, spec, B::VALUES)?;
        if spec.scale_dtype != ScaleDtype::F16 {
            return Err(unsupported(
                B::NAME,
                format!("its scales are f16 and the matrix has {}", spec.scale_dtype),
            ));
        }
        if let Granularity::Group(g) = spec.granularity
            && !g.is_multiple_of(B::VALUES)
        {
            return Err(unsupported(
                B::NAME,
                format!(
                    "a block of {} values has one scale, and groups of {g} cut it",
                    B::VALUES
                ),
            ));
        }
        if spec.values_len() == 0 && spec.scales_len() > 0 {
            return Err(unsupported(
                B::NAME,
                format!(
                    "a {} × {} matrix has no block to hold its scale",
                    spec.rows, spec.cols
                ),
            ));
        }
        Ok(())
    }

    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen {
        PackedLen::Exact(spec.values_len() / B::VALUES * B::BYTES)
    }

    fn chunk_rows(&self, _: &MatrixSpec) -> Option<usize> {
        Some(1)
    }

    fn pack_into(
        &self,
        spec: &MatrixSpec,
        values: &[i8],
        scales: &[f32],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.check(spec)?;
        check_values(spec, values)?;
        check_scales(B::NAME, spec, ScaleDtype::F16, scales)?;
        let halves: Vec<[u8; 2]> = scales
            .iter()
            .map(|&s| f16::from_f32(stored_scale(spec.precision, s)).to_le_bytes())
            .collect();
        let start = out.len();
        out.resize(start + self.packed_len(spec).bound(), 0);
        let per_row = spec.cols / B::VALUES;
        for (i, (values, block)) in values
            .chunks_exact(B::VALUES)
            .zip(out[start..].chunks_exact_mut(B::BYTES))
            .enumerate()
        {
            B::pack(spec.precision, values, block);
            let scale = halves[spec.scale_index(0, i / per_row, i % per_row * B::VALUES)];
            block[B::SCALE_AT..B::SCALE_AT + 2].copy_from_slice(&scale);
        }
        Ok(())
    }

    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked> {
        self.check(spec)?;
        check_len("packed bytes", self.packed_len(spec).bound(), bytes.len())?;
        let mut values = vec![0; spec.values_len()];
        let mut scales: Vec<f32> = Vec::with_capacity(spec.scales_len());
        for (i, (block, values)) in bytes
            .chunks_exact(B::BYTES)
            .zip(values.chunks_exact_mut(B::VALUES))
            .enumerate()
        {
            let corrupt = |bad: Bad| bad.at(B::NAME, i * B::BYTES);
            B::unpack(spec.precision, block, values).map_err(corrupt)?;
            Self::add_scale(spec, i, block, &mut scales).map_err(corrupt)?;
        }
        Ok(Unpacked {
            values,
            scales: Some(scales),
        })
    }

    fn scales(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Option<Vec<f32>>> {
        self.check(spec)?;
        check_len("packed bytes", self.packed_len(spec).bound(), bytes.len())?;
        let mut scales = Vec::with_capacity(spec.scales_len());
        for (i, block) in bytes.chunks_exact(B::BYTES).enumerate() {
            Self::add_scale(spec, i, block, &mut scales)
                .map_err(|bad| bad.at(B::NAME, i * B::BYTES))?;
        }
        Ok(Some(scales))
    }
}
