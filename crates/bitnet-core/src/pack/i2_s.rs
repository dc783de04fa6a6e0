//! `i2_s`, `i2_s-g64`, `i2_s-x4`: the I2_S type of bitnet.cpp, ternary, in the three orders that go
//! by that name.
//!
//! Two-bit codes (value + 1), four a byte, the first in the high bits. A group of values takes a
//! quarter as many bytes, and the four codes of a byte are a quarter of the group apart:
//!
//! ```text
//! i2_s        groups of 128 values of a row:  byte p = [ v(p) | v(32 + p) | v(64 + p) | v(96 + p) ],  p < 32
//! i2_s-g64    groups of 64 values of a row:   byte p = [ v(p) | v(16 + p) | v(32 + p) | v(48 + p) ],  p < 16
//! i2_s-x4     groups of 4 whole rows:         byte c = [ row 0 | row 1 | row 2 | row 3 ],             c < K
//! then        f32 scale, little-endian, and 28 bytes of padding: n/4 + 32 bytes in all
//! ```
//!
//! The orders have the same length and the same codes: nothing in the bytes tells them apart. The
//! padding is written as 0 and not read, because programs that write this type leave there what
//! their buffer held. The scale follows the codes, so the matrix packs only as a whole.

use super::{Bad, is_stored, quads, unsupported};
use super::{
    FastPath, Layout, LayoutOrigin, PackedLen, Unpacked, check_cols, check_len, check_plain,
    check_precision, check_scales, check_values,
};
use crate::{Granularity, MatrixSpec, Precision, Result};

/// Bytes after the codes.
const TRAILER: usize = 32;

/// The number of the type in GGUF.
const GGML_TYPE: u32 = 36;

/// Which values share a byte.
#[derive(Debug)]
enum CodeOrder {
    /// A quarter of this many values of a row apart.
    Group(usize),
    /// Four rows, at the same column.
    Rows,
}

/// The I2_S type in one of its orders.
#[derive(Debug)]
pub(super) struct I2S {
    name: &'static str,
    summary: &'static str,
    order: CodeOrder,
    /// Whether GGUF files are written in this order.
    written: bool,
}

/// The order of x86 builds.
pub(super) const GROUPS_OF_128: I2S = I2S {
    name: "i2_s",
    summary: "ternary, 128 values in 32 bytes, one f32 scale inside, 2 bits per weight \
        (bitnet.cpp)",
    order: CodeOrder::Group(128),
    written: true,
};

/// The order of ARM builds.
pub(super) const GROUPS_OF_64: I2S = I2S {
    name: "i2_s-g64",
    summary: "ternary, 64 values in 16 bytes, one f32 scale inside, 2 bits per weight \
        (bitnet.cpp on ARM)",
    order: CodeOrder::Group(64),
    written: false,
};

/// Four rows interleaved.
pub(super) const FOUR_ROWS: I2S = I2S {
    name: "i2_s-x4",
    summary: "ternary, 4 rows a byte, one f32 scale inside, 2 bits per weight (bitnet.cpp, \
        interleaved)",
    order: CodeOrder::Rows,
    written: false,
};

impl I2S {
    /// Values of a group; 1 stands for the 0 of a matrix without columns, whose groups are none.
    fn group(&self, spec: &MatrixSpec) -> usize {
        match self.order {
            CodeOrder::Group(values) => values,
            CodeOrder::Rows => (4 * spec.cols).max(1),
        }
    }
}

impl Layout for I2S {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn stores_scales(&self) -> bool {
        true
    }

    fn origin(&self) -> LayoutOrigin {
        if self.written {
            LayoutOrigin::Ggml(GGML_TYPE)
        } else {
            LayoutOrigin::GgmlVariant(GGML_TYPE)
        }
    }

    fn foreign_spec(&self, rows: usize, cols: usize) -> Option<MatrixSpec> {
        Some(MatrixSpec::new(
            rows,
            cols,
            Precision::Ternary,
            Granularity::Tensor,
        ))
    }

    fn fast_path(&self) -> Option<FastPath> {
        Some(match self.order {
            CodeOrder::Group(values) => FastPath::GroupQuarters(values),
            CodeOrder::Rows => FastPath::FourRows,
        })
    }

    fn check(&self, spec: &MatrixSpec) -> Result<()> {
        check_precision(self.name, spec, &[Precision::Ternary])?;
        check_plain(self.name, spec)?;
        if spec.granularity != Granularity::Tensor {
            return Err(unsupported(
                self.name,
                format!(
                    "it has one scale a tensor and the granularity is {}",
                    spec.granularity
                ),
            ));
        }
        match self.order {
            CodeOrder::Group(values) => check_cols(self.name, spec, values),
            CodeOrder::Rows if spec.rows.is_multiple_of(4) => Ok(()),
            CodeOrder::Rows => Err(unsupported(
                self.name,
                format!(
                    "it interleaves 4 rows and {} rows leave {}",
                    spec.rows,
                    spec.rows % 4
                ),
            )),
        }
    }

    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen {
        PackedLen::Exact(spec.values_len() / 4 + TRAILER)
    }

    fn chunk_rows(&self, _: &MatrixSpec) -> Option<usize> {
        None
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
        check_scales(self.name, spec, spec.scale_dtype, scales)?;
        let start = out.len();
        out.resize(start + self.packed_len(spec).bound(), 0);
        let (codes, trailer) = out[start..].split_at_mut(values.len() / 4);
        let group = self.group(spec);
        for (values, bytes) in values
            .chunks_exact(group)
            .zip(codes.chunks_exact_mut((group / 4).max(1)))
        {
            quads::pack(values, quads::HIGH_FIRST, bytes);
        }
        trailer[..4].copy_from_slice(&scales[0].to_le_bytes());
        Ok(())
    }

    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked> {
        self.check(spec)?;
        check_len("packed bytes", self.packed_len(spec).bound(), bytes.len())?;
        let mut values = vec![0; spec.values_len()];
        let (codes, trailer) = bytes.split_at(values.len() / 4);
        let group = self.group(spec);
        let group_bytes = (group / 4).max(1);
        for (i, (bytes, values)) in codes
            .chunks_exact(group_bytes)
            .zip(values.chunks_exact_mut(group))
            .enumerate()
        {
            quads::unpack(bytes, quads::HIGH_FIRST, values)
                .map_err(|bad| bad.at(self.name, i * group_bytes))?;
        }
        let scale = f32::from_le_bytes([trailer[0], trailer[1], trailer[2], trailer[3]]);
        if !is_stored(spec.scale_dtype, scale) {
            return Err(Bad::new(
                codes.len(),
                format!(
                    "the scale {scale:?}, which is no finite {}",
                    spec.scale_dtype
                ),
            )
            .at(self.name, 0));
        }
        Ok(Unpacked {
            values,
            scales: Some(vec![scale]),
        })
    }
}
