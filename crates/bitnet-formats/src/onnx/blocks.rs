//! Low-bit matrices as onnxruntime's `MatMulNBits` and `GatherBlockQuantized` read them.
//!
//! ```text
//! W is [N, K]; a block is bs columns of a row, the last one of a row padded
//! codes        uint8 [N, ⌈K/bs⌉, bs·bits/8]    code i of a block in bits (i·bits)%8… of byte i·bits/8
//! scales       f32   [N, ⌈K/bs⌉]
//! zero points  uint8 [N, ⌈⌈K/bs⌉·bits/8⌉]      packed likewise; absent: 2^(bits−1) everywhere
//! w = scale · (code − zero point)
//! ```
//!
//! A value v is the code v + 2^(bits−1), so a symmetric matrix needs no zero points, whatever its
//! precision: trits are the codes 1, 2 and 3.

use bitnet_core::{Error, Granularity, Matrix, MatrixSpec, Precision, Result, ZeroPoints};

/// Sizes of blocks that the operators have.
const BLOCKS: [usize; 5] = [256, 128, 64, 32, 16];

/// How a matrix lies in blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockFormat {
    /// N, the number of rows.
    pub rows: usize,
    /// K, the number of columns.
    pub cols: usize,
    /// Bits of a code: 2, 4 or 8.
    pub bits: usize,
    /// Columns of a block.
    pub block: usize,
    /// Whether zero points are stored.
    pub zero_points: bool,
}

/// The bytes of a matrix in blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedBlocks {
    /// Codes.
    pub codes: Vec<u8>,
    /// Scales, little-endian f32.
    pub scales: Vec<u8>,
    /// Zero points; empty if none are stored.
    pub zero_points: Vec<u8>,
}

fn unsupported(why: String) -> Error {
    Error::Unsupported {
        layout: "onnx",
        why,
    }
}

impl BlockFormat {
    /// The blocks that hold a matrix exactly.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for groups that are no multiple of 16, several planes, and zero
    /// points that are no integers.
    pub fn of(spec: &MatrixSpec) -> Result<Self> {
        if spec.planes != 1 {
            return Err(unsupported(format!(
                "it has {} trit planes, and an operator one; dequantize it first, or quantize \
                 with --planes 1",
                spec.planes
            )));
        }
        if spec.zero_points == ZeroPoints::F32 {
            return Err(unsupported(
                "its zero points are floats; dequantize it first, or quantize with --split zero"
                    .into(),
            ));
        }
        let block = match spec.granularity {
            Granularity::Group(group) if group < spec.cols => {
                let found = BLOCKS.iter().find(|&&block| group.is_multiple_of(block));
                *found.ok_or_else(|| {
                    unsupported(format!(
                        "its groups of {group} columns are no multiple of 16, the smallest block; \
                         dequantize it and quantize again with --granularity group:64 or channel"
                    ))
                })?
            }
            _ => {
                let found = BLOCKS
                    .iter()
                    .find(|&&block| spec.cols.is_multiple_of(block));
                *found.unwrap_or(&16)
            }
        };
        let bits = match spec.precision {
            Precision::Binary | Precision::Ternary | Precision::Int2 => 2,
            Precision::Int3 | Precision::Int4 => 4,
            Precision::Int8 => 8,
        };
        Ok(Self {
            rows: spec.rows,
            cols: spec.cols,
            bits,
            block,
            zero_points: spec.zero_points != ZeroPoints::None,
        })
    }

    /// Blocks of a row.
    pub fn blocks(&self) -> usize {
        self.cols.div_ceil(self.block)
    }

    /// Bytes of the codes of a block.
    pub fn block_bytes(&self) -> usize {
        self.block * self.bits / 8
    }

    /// Bytes of the zero points of a row.
    pub fn zero_point_bytes(&self) -> usize {
        (self.blocks() * self.bits).div_ceil(8)
    }

    /// The code of the value 0, and of every zero point that is not stored.
    fn zero(&self) -> i16 {
        1 << (self.bits - 1)
    }

    /// The bytes of a matrix.
    ///
    /// # Errors
    /// [`Error::Length`] for a matrix of another shape; [`Error::Unsupported`] for a value or a
    /// zero point that has no code.
    pub fn pack(&self, matrix: &Matrix) -> Result<PackedBlocks> {
        let spec = &matrix.spec;
        if Self::of(spec)? != *self {
            return Err(Error::Length {
                what: "values",
                expected: self.rows * self.cols,
                got: spec.values_len(),
            });
        }
        matrix.validate()?;
        let code = |value: f32| {
            let code = value + f32::from(self.zero());
            let fits = code.fract() == 0.0 && (0.0..f32::from(2 * self.zero())).contains(&code);
            let refuse = || unsupported(format!("{value} has no code of {} bits", self.bits));
            fits.then_some(code as u8).ok_or_else(refuse)
        };
        let per_row = self.blocks();
        let mut packed = PackedBlocks {
            codes: vec![0; self.rows * per_row * self.block_bytes()],
            scales: Vec::with_capacity(self.rows * per_row * 4),
            zero_points: vec![],
        };
        let mut line = vec![0; per_row * self.block];
        for row in 0..self.rows {
            let values = &matrix.values[row * self.cols..][..self.cols];
            for (code_at, &value) in line.iter_mut().zip(values) {
                *code_at = code(f32::from(value))?;
            }
            line[self.cols..].fill(self.zero() as u8);
            let width = per_row * self.block_bytes();
            put_codes(&line, self.bits, &mut packed.codes[row * width..][..width]);
            let mut zeros = vec![];
            for block in 0..per_row {
                let granule = spec.scale_index(0, row, block * self.block);
                packed.scales.extend(matrix.scales[granule].to_le_bytes());
                if self.zero_points {
                    zeros.push(code(matrix.zero_points[granule])?);
                }
            }
            if self.zero_points {
                let start = packed.zero_points.len();
                packed
                    .zero_points
                    .resize(start + self.zero_point_bytes(), 0);
                // As onnxruntime fills the last byte.
                zeros.resize(self.zero_point_bytes() * 8 / self.bits, self.zero() as u8);
                put_codes(&zeros, self.bits, &mut packed.zero_points[start..]);
            }
        }
        Ok(packed)
    }
}

/// Writes codes of `bits` bits, the first in the lowest bits of the first byte.
fn put_codes(codes: &[u8], bits: usize, out: &mut [u8]) {
    let per_byte = 8 / bits;
    for (byte, codes) in out.iter_mut().zip(codes.chunks(per_byte)) {
        *byte = codes
            .iter()
            .enumerate()
            .fold(0, |byte, (i, code)| byte | code << (i * bits));
    }
}
