//! Tensor element types: ids, names and sizes.
//!
//! Most types store a row as consecutive blocks of [`GgmlType::block_len`] values in
//! [`GgmlType::block_bytes`] bytes; plain numbers are blocks of one. Three types of llama.cpp forks
//! add something: I2_S one 32-byte trailer per tensor, IQ1_BN and IQ2_BN a scale in front of every
//! row.

use super::error::{Error, Result};
use std::fmt;

/// One line for each type: variant, id, name, values per block, bytes per block.
macro_rules! ggml_types {
    ($($(#[$doc:meta])+ $variant:ident = $id:literal, $name:literal, $len:literal => $bytes:literal;)+) => {
        /// How the elements of a tensor are stored.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum GgmlType {
            $($(#[$doc])+ $variant,)+
        }

        impl GgmlType {
            /// All known types in the order of their ids.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The number that tensor infos hold.
            pub const fn id(self) -> u32 {
                match self { $(Self::$variant => $id,)+ }
            }

            /// The type with this id; `None` for ids that were never given out or whose types were
            /// withdrawn. Of two types with one id, the one that is not older.
            pub const fn from_id(id: u32) -> Option<Self> {
                let mut i = 0;
                while i < Self::ALL.len() {
                    if Self::ALL[i].id() == id {
                        return Some(Self::ALL[i]);
                    }
                    i += 1;
                }
                None
            }

            /// The usual name, such as `TQ2_0`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// Values in one block.
            pub const fn block_len(self) -> usize {
                match self { $(Self::$variant => $len,)+ }
            }

            /// Bytes of one block.
            pub const fn block_bytes(self) -> usize {
                match self { $(Self::$variant => $bytes,)+ }
            }
        }
    };
}

ggml_types! {
    /// IEEE binary32.
    F32 = 0, "F32", 1 => 4;
    /// IEEE binary16.
    F16 = 1, "F16", 1 => 2;
    /// 4 bits, one scale for 32 values.
    Q4_0 = 2, "Q4_0", 32 => 18;
    /// 4 bits, scale and minimum for 32 values.
    Q4_1 = 3, "Q4_1", 32 => 20;
    /// 5 bits, one scale for 32 values.
    Q5_0 = 6, "Q5_0", 32 => 22;
    /// 5 bits, scale and minimum for 32 values.
    Q5_1 = 7, "Q5_1", 32 => 24;
    /// 8 bits, one scale for 32 values.
    Q8_0 = 8, "Q8_0", 32 => 34;
    /// 8 bits, scale and weighted sum for 32 values; activations in memory only.
    Q8_1 = 9, "Q8_1", 32 => 36;
    /// 2 bits, super-blocks of 256.
    Q2K = 10, "Q2_K", 256 => 84;
    /// 3 bits, super-blocks of 256.
    Q3K = 11, "Q3_K", 256 => 110;
    /// 4 bits, super-blocks of 256.
    Q4K = 12, "Q4_K", 256 => 144;
    /// 5 bits, super-blocks of 256.
    Q5K = 13, "Q5_K", 256 => 176;
    /// 6 bits, super-blocks of 256.
    Q6K = 14, "Q6_K", 256 => 210;
    /// 8 bits, super-blocks of 256; activations in memory only.
    Q8K = 15, "Q8_K", 256 => 292;
    /// About 2.06 bits, codebook.
    Iq2Xxs = 16, "IQ2_XXS", 256 => 66;
    /// About 2.31 bits, codebook.
    Iq2Xs = 17, "IQ2_XS", 256 => 74;
    /// About 3.06 bits, codebook.
    Iq3Xxs = 18, "IQ3_XXS", 256 => 98;
    /// About 1.56 bits, codebook.
    Iq1S = 19, "IQ1_S", 256 => 50;
    /// 4 bits, uneven levels, one scale for 32 values.
    Iq4Nl = 20, "IQ4_NL", 32 => 18;
    /// About 3.44 bits, codebook.
    Iq3S = 21, "IQ3_S", 256 => 110;
    /// About 2.56 bits, codebook.
    Iq2S = 22, "IQ2_S", 256 => 82;
    /// 4 bits, uneven levels, super-blocks of 256.
    Iq4Xs = 23, "IQ4_XS", 256 => 136;
    /// Signed 8-bit integer.
    I8 = 24, "I8", 1 => 1;
    /// Signed 16-bit integer.
    I16 = 25, "I16", 1 => 2;
    /// Signed 32-bit integer.
    I32 = 26, "I32", 1 => 4;
    /// Signed 64-bit integer.
    I64 = 27, "I64", 1 => 8;
    /// IEEE binary64.
    F64 = 28, "F64", 1 => 8;
    /// About 1.75 bits, codebook.
    Iq1M = 29, "IQ1_M", 256 => 56;
    /// bfloat16.
    Bf16 = 30, "BF16", 1 => 2;
    /// Ternary, five values to a byte.
    Tq1_0 = 34, "TQ1_0", 256 => 54;
    /// Ternary, four values to a byte.
    Tq2_0 = 35, "TQ2_0", 256 => 66;
    /// Ternary, four values to a byte and one scale for the tensor; bitnet.cpp's fork. The blocks
    /// run over the flat tensor.
    I2S = 36, "I2_S", 128 => 32;
    /// 4-bit floats with a shared power of two.
    Mxfp4 = 39, "MXFP4", 32 => 17;
    /// 4-bit floats with 8-bit float scales.
    Nvfp4 = 40, "NVFP4", 64 => 36;
    /// Binary, one scale for 128 values.
    Q1_0 = 41, "Q1_0", 128 => 18;
    /// Four levels, one scale for 64 values.
    Q2_0 = 42, "Q2_0", 64 => 18;
    /// Four levels, one scale for 128 values: what older files of Prism's fork hold under the id of
    /// [`GgmlType::Q2_0`].
    Q2_0G128 = 42, "Q2_0-g128", 128 => 34;
    /// Ternary, 13 bytes for 64 values and an f16 scale before each row; ik_llama.cpp's fork.
    Iq1Bn = 134, "IQ1_BN", 64 => 13;
    /// Ternary, 16 bytes for 64 values and an f32 scale before each row; ik_llama.cpp's fork.
    Iq2Bn = 135, "IQ2_BN", 64 => 16;
    /// Four levels, one scale for 128 values; Prism's fork.
    Pq2_0 = 142, "PQ2_0", 128 => 34;
    /// Ternary, five values to a byte, one scale for 128 values; Prism's fork.
    Ptq1_0 = 143, "PTQ1_0", 128 => 28;
}

/// Bytes after the codes of an I2_S tensor: its f32 scale and 28 bytes of padding.
const I2_S_TRAILER: u64 = 32;

impl GgmlType {
    /// The programs that read tensors of this type: llama.cpp, or the fork that made it.
    pub const fn opened_by(self) -> &'static str {
        match self {
            Self::Q2_0G128 => "the first version of Prism's fork of llama.cpp",
            Self::Pq2_0 | Self::Ptq1_0 => "Prism's fork of llama.cpp",
            Self::Iq1Bn | Self::Iq2Bn => "ik_llama.cpp",
            Self::I2S => "bitnet.cpp",
            _ => "llama.cpp",
        }
    }

    /// Bytes that precede the blocks of each row.
    const fn row_prefix(self) -> usize {
        match self {
            Self::Iq1Bn => 2,
            Self::Iq2Bn => 4,
            _ => 0,
        }
    }

    /// Bytes of a row of `cols` values. For I2_S without the tensor's trailer.
    ///
    /// ```
    /// use bitnet_formats::gguf::GgmlType;
    /// assert_eq!(GgmlType::Tq2_0.row_bytes(2560).unwrap(), 660);
    /// assert!(GgmlType::Tq2_0.row_bytes(100).is_err());
    /// ```
    ///
    /// # Errors
    /// [`Error::RowLength`] if the row is not a whole number of blocks, [`Error::TooLarge`] on
    /// overflow.
    pub fn row_bytes(self, cols: usize) -> Result<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return Err(Error::RowLength {
                ggml_type: self,
                cols,
                block: self.block_len(),
            });
        }
        (cols / self.block_len())
            .checked_mul(self.block_bytes())
            .and_then(|n| n.checked_add(self.row_prefix()))
            .ok_or_else(|| Error::TooLarge { shape: vec![cols] })
    }

    /// Bytes of a whole tensor; `shape` is row-major, outermost dimension first, and an empty shape
    /// is one value.
    ///
    /// # Errors
    /// [`Error::RowLength`] if a row (for I2_S: the flat tensor) is not a whole number of blocks,
    /// [`Error::TooLarge`] on overflow.
    pub fn tensor_bytes(self, shape: &[usize]) -> Result<u64> {
        let too_large = || Error::TooLarge {
            shape: shape.to_vec(),
        };
        let product = |dims: &[usize]| {
            dims.iter()
                .try_fold(1usize, |n, &dim| n.checked_mul(dim))
                .ok_or_else(too_large)
        };
        let elements = product(shape)?;
        let (rows, cols, trailer) = match (self, shape.split_last()) {
            (Self::I2S, _) => (1, elements, I2_S_TRAILER),
            (_, Some((&cols, outer))) => (product(outer)?, cols, 0),
            (_, None) => (1, 1, 0),
        };
        let row = self.row_bytes(cols)? as u64;
        row.checked_mul(rows as u64)
            .and_then(|n| n.checked_add(trailer))
            .filter(|&n| i64::try_from(n).is_ok())
            .ok_or_else(too_large)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
