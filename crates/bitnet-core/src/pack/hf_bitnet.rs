//! `hf-bitnet`: the uint8 tensors of Hugging Face's `bitnet` quantization, ternary, one scale
//! outside.
//!
//! With `R = ceil(N / 4)` the tensor is `[R, K]`, and byte `(r, c)` holds the codes (value + 1) of
//! rows `r`, `R + r`, `2R + r` and `3R + r` of column `c`, the first in the low bits: rows that
//! share a byte are a quarter of the matrix apart. Fields of rows that do not exist are 0. Code 3
//! is undefined (readers differ on it) and refused. Since the stride depends on N, the matrix packs
//! only as a whole.
//!
//! ```text
//! N = 6, R = 2:   byte (0, c) = [ 00 | c4 | c2 | c0 ]     byte (1, c) = [ 00 | c5 | c3 | c1 ]
//! ```

use super::{
    FastPath, Layout, LayoutOrigin, PackedLen, Unpacked, check_len, check_plain, check_precision,
    check_values, quads, unsupported,
};
use crate::{Granularity, MatrixSpec, Precision, Result};

/// Four rows a byte, a quarter of the matrix apart.
#[derive(Debug)]
pub(super) struct HfBitnet;

impl Layout for HfBitnet {
    fn name(&self) -> &'static str {
        "hf-bitnet"
    }

    fn summary(&self) -> &'static str {
        "ternary, 4 rows a byte, per-tensor scale outside, 2 bits per weight (Hugging Face \
            transformers)"
    }

    fn origin(&self) -> LayoutOrigin {
        LayoutOrigin::HfBitnet
    }

    fn default_for(&self) -> &'static [Precision] {
        &[Precision::Ternary]
    }

    fn default_granularities(&self) -> &'static [Granularity] {
        &[Granularity::Tensor]
    }

    fn fast_path(&self) -> Option<FastPath> {
        Some(FastPath::QuarterRows)
    }

    fn check(&self, spec: &MatrixSpec) -> Result<()> {
        check_precision(self.name(), spec, &[Precision::Ternary])?;
        check_plain(self.name(), spec)?;
        if spec.granularity != Granularity::Tensor {
            return Err(unsupported(
                self.name(),
                format!(
                    "it has one scale a tensor and the granularity is {}",
                    spec.granularity
                ),
            ));
        }
        Ok(())
    }

    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen {
        PackedLen::Exact(spec.rows.div_ceil(4) * spec.cols)
    }

    fn chunk_rows(&self, _: &MatrixSpec) -> Option<usize> {
        None
    }

    fn pack_into(
        &self,
        spec: &MatrixSpec,
        values: &[i8],
        _: &[f32],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.check(spec)?;
        check_values(spec, values)?;
        let start = out.len();
        out.resize(start + self.packed_len(spec).bound(), 0);
        quads::pack(values, quads::LOW_FIRST, &mut out[start..]);
        Ok(())
    }

    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked> {
        self.check(spec)?;
        check_len("packed bytes", self.packed_len(spec).bound(), bytes.len())?;
        let mut values = vec![0; spec.values_len()];
        quads::unpack(bytes, quads::LOW_FIRST, &mut values)
            .map_err(|bad| bad.at(self.name(), 0))?;
        Ok(Unpacked {
            values,
            scales: None,
        })
    }
}
