//! Element types of stored tensors and their way to f32.

use crate::foreign::ForeignType;
use crate::gguf::{self, GgmlType};
use bitnet_core::ScaleDtype;
use bitnet_core::pack::{self, Layout, LayoutOrigin};
use safetensors::Dtype;
use std::fmt;

/// How the elements of a stored tensor are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// One number after another.
    Plain(Dtype),
    /// ggml blocks.
    Ggml(GgmlType),
    /// Several tensors of another program's quantization.
    Foreign(ForeignType),
}

impl StoredType {
    /// F32.
    pub const F32: Self = Self::Plain(Dtype::F32);
    /// Bytes.
    pub const U8: Self = Self::Plain(Dtype::U8);
    /// Words of 32 bits.
    pub const U32: Self = Self::Plain(Dtype::U32);
    /// Signed bytes.
    pub const I8: Self = Self::Plain(Dtype::I8);

    /// The type of a GGUF tensor; a type that safetensors has too is [`StoredType::Plain`].
    pub fn from_ggml(ggml: GgmlType) -> Self {
        match ggml {
            GgmlType::F32 => Self::Plain(Dtype::F32),
            GgmlType::F16 => Self::Plain(Dtype::F16),
            GgmlType::Bf16 => Self::Plain(Dtype::BF16),
            GgmlType::F64 => Self::Plain(Dtype::F64),
            GgmlType::I8 => Self::Plain(Dtype::I8),
            GgmlType::I16 => Self::Plain(Dtype::I16),
            GgmlType::I32 => Self::Plain(Dtype::I32),
            GgmlType::I64 => Self::Plain(Dtype::I64),
            other => Self::Ggml(other),
        }
    }

    /// The GGUF type of it, if GGUF has one.
    pub fn to_ggml(self) -> Option<GgmlType> {
        match self {
            Self::Ggml(ggml) => Some(ggml),
            Self::Plain(Dtype::F32) => Some(GgmlType::F32),
            Self::Plain(Dtype::F16) => Some(GgmlType::F16),
            Self::Plain(Dtype::BF16) => Some(GgmlType::Bf16),
            Self::Plain(Dtype::F64) => Some(GgmlType::F64),
            Self::Plain(Dtype::I8) => Some(GgmlType::I8),
            Self::Plain(Dtype::I16) => Some(GgmlType::I16),
            Self::Plain(Dtype::I32) => Some(GgmlType::I32),
            Self::Plain(Dtype::I64) => Some(GgmlType::I64),
            Self::Plain(_) | Self::Foreign(_) => None,
        }
    }

    /// Whether its elements can be read as f32: f8, f16, bf16, f32, f64, the ggml blocks that have a
    /// decoder, and what another program quantized if its method is known.
    pub fn is_float(self) -> bool {
        match self {
            Self::Plain(dtype) => {
                matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) || is_f8(dtype)
            }
            Self::Foreign(foreign) => foreign.decodes,
            Self::Ggml(ggml) => gguf::has_decoder(ggml),
        }
    }

    /// Elements that are stored together: 1, or the block of a ggml type.
    pub fn block(self) -> usize {
        match self {
            Self::Plain(_) | Self::Foreign(_) => 1,
            Self::Ggml(ggml) => ggml.block_len(),
        }
    }

    /// Bytes of `count` elements, a multiple of [`StoredType::block`]; `None` on overflow or for
    /// elements that are not whole bytes.
    pub fn bytes(self, count: usize) -> Option<usize> {
        match self {
            Self::Plain(dtype) => count
                .checked_mul(dtype.bitsize())
                .filter(|bits| bits % 8 == 0)
                .map(|bits| bits / 8),
            Self::Ggml(ggml) => (count / ggml.block_len()).checked_mul(ggml.block_bytes()),
            Self::Foreign(_) => None,
        }
    }

    /// Decodes `bytes` into `out`, exactly where f32 can hold the number (f64 rounds to nearest).
    ///
    /// # Errors
    /// A sentence if the type has no decoder or the lengths do not fit.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) -> Result<(), String> {
        let fits = |size: usize| {
            if bytes.len() == out.len() * size {
                Ok(())
            } else {
                Err(format!("{} bytes for {} elements", bytes.len(), out.len()))
            }
        };
        match self {
            Self::Plain(Dtype::F32) => {
                fits(4)?;
                out.iter_mut()
                    .zip(bytes.as_chunks::<4>().0)
                    .for_each(|(o, b)| *o = f32::from_le_bytes(*b));
            }
            Self::Plain(Dtype::F16) => {
                fits(2)?;
                out.iter_mut()
                    .zip(bytes.as_chunks::<2>().0)
                    .for_each(|(o, b)| *o = f16_to_f32(u16::from_le_bytes(*b)));
            }
            Self::Plain(Dtype::BF16) => {
                fits(2)?;
                out.iter_mut()
                    .zip(bytes.as_chunks::<2>().0)
                    .for_each(|(o, b)| {
                        *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)
                    });
            }
            Self::Plain(Dtype::F64) => {
                fits(8)?;
                out.iter_mut()
                    .zip(bytes.as_chunks::<8>().0)
                    .for_each(|(o, b)| *o = f64::from_le_bytes(*b) as f32);
            }
            Self::Plain(dtype) if is_f8(dtype) => {
                fits(1)?;
                out.iter_mut()
                    .zip(bytes)
                    .for_each(|(o, &b)| *o = f8_to_f32(dtype, b));
            }
            Self::Plain(other) => return Err(format!("{other:?} holds no weights")),
            Self::Ggml(ggml) => gguf::decode(ggml, bytes, out).map_err(|e| e.to_string())?,
            Self::Foreign(foreign) => return Err(format!("{foreign} is several tensors")),
        }
        Ok(())
    }
}

/// Whether the type is an 8-bit float that decodes. Those without negative zero are not read.
fn is_f8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0)
}

/// An 8-bit float, exactly. E4M3 has no infinity, and NaN is all ones; E5M2 is the upper byte of
/// binary16; E8M0 is a power of two.
fn f8_to_f32(dtype: Dtype, bits: u8) -> f32 {
    let wide = u32::from(bits);
    match dtype {
        Dtype::F8_E5M2 => f16_to_f32(u16::from(bits) << 8),
        Dtype::F8_E8M0 => match wide {
            0 => f32::from_bits(1 << 22),
            0xff => f32::NAN,
            exponent => f32::from_bits(exponent << 23),
        },
        _ if bits & 0x7f == 0x7f => f32::NAN,
        // The fields in place, and the exponent rebased by 2^120.
        _ => {
            let magnitude = f32::from_bits((wide & 0x7f) << 20) * f32::from_bits(0x7b80_0000);
            f32::from_bits(magnitude.to_bits() | (wide & 0x80) << 24)
        }
    }
}

/// binary16 to binary32 without a branch, so that it vectorises: shift the fields into place and
/// let a multiplication by 2^112 rebase the exponent, which is exact and handles subnormals;
/// infinities and NaN get their exponent filled afterwards.
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if bits & 0x7c00 == 0x7c00 {
        0x7f80_0000
    } else {
        0
    };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => f.pad(&format!("{dtype:?}")),
            Self::Ggml(ggml) => f.pad(ggml.name()),
            Self::Foreign(foreign) => foreign.fmt(f),
        }
    }
}

impl From<ScaleDtype> for StoredType {
    fn from(dtype: ScaleDtype) -> Self {
        Self::Plain(match dtype {
            ScaleDtype::F32 => Dtype::F32,
            ScaleDtype::F16 => Dtype::F16,
            ScaleDtype::Bf16 => Dtype::BF16,
        })
    }
}

/// The GGUF type that stores a wire layout, if there is one.
pub fn ggml_type_of(layout: &dyn Layout) -> Option<GgmlType> {
    match layout.origin() {
        LayoutOrigin::GgmlVariant(_) => None,
        origin => ggml_type_of_origin(origin),
    }
}

/// The type of a GGUF tensor of a layout, also of those that are only read.
pub(crate) fn ggml_type_of_origin(origin: LayoutOrigin) -> Option<GgmlType> {
    match origin {
        LayoutOrigin::Ggml(id) | LayoutOrigin::GgmlVariant(id) => GgmlType::from_id(id),
        LayoutOrigin::GgmlOlder(id) => {
            let first = GgmlType::from_id(id);
            let mut types = GgmlType::ALL.iter().copied();
            types.find(|t| t.id() == id && Some(*t) != first)
        }
        LayoutOrigin::Own | LayoutOrigin::HfBitnet => None,
    }
}

/// The layout of the tensors of a GGUF type, the one that is written if there are several.
pub fn layout_of(ggml_type: GgmlType) -> Option<&'static dyn Layout> {
    let mut layouts = pack::layouts().iter().copied();
    layouts.find(|layout| ggml_type_of(*layout) == Some(ggml_type))
}

/// Writes `weights` as `dtype`, rounded to nearest even.
pub fn encode(dtype: ScaleDtype, weights: &[f32], out: &mut Vec<u8>) {
    out.reserve(weights.len() * dtype.bytes());
    weights.iter().for_each(|&w| dtype.write(w, out));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_decodes_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32();
            let got = f16_to_f32(bits);
            assert!(
                got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()),
                "{bits:#06x}: {got} {expected}"
            );
        }
    }

    #[test]
    fn every_f8_decodes_by_its_fields() {
        for bits in 0..=u8::MAX {
            let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
            let (e, m) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
            let e4m3 = match (e, m) {
                (15, 7.0) => f64::NAN,
                (0, m) => m / 8.0 * 2f64.powi(-6),
                (e, m) => (1.0 + m / 8.0) * 2f64.powi(e - 7),
            };
            let (e, m) = (i32::from(bits >> 2 & 31), f64::from(bits & 3));
            let e5m2 = match (e, m) {
                (31, 0.0) => f64::INFINITY,
                (31, _) => f64::NAN,
                (0, m) => m / 4.0 * 2f64.powi(-14),
                (e, m) => (1.0 + m / 4.0) * 2f64.powi(e - 15),
            };
            let e8m0 = match bits {
                255 => f64::NAN,
                e => sign * 2f64.powi(i32::from(e) - 127),
            };
            let types = [Dtype::F8_E4M3, Dtype::F8_E5M2, Dtype::F8_E8M0];
            for (dtype, expected) in types.into_iter().zip([e4m3, e5m2, e8m0]) {
                let (expected, mut got) = ((sign * expected) as f32, [0.0]);
                StoredType::Plain(dtype).decode(&[bits], &mut got).unwrap();
                assert!(
                    got[0].to_bits() == expected.to_bits()
                        || (got[0].is_nan() && expected.is_nan()),
                    "{dtype:?} {bits:#04x}: {} {expected}",
                    got[0]
                );
            }
        }
    }

    #[test]
    fn plain_types_decode_little_endian() {
        let mut out = [0.0f32; 1];
        StoredType::Plain(Dtype::BF16)
            .decode(&[0x80, 0xbf], &mut out)
            .unwrap();
        assert_eq!(out, [-1.0]);
        StoredType::Plain(Dtype::F64)
            .decode(&0.1f64.to_le_bytes(), &mut out)
            .unwrap();
        assert_eq!(out, [0.1]);
        assert!(StoredType::F32.decode(&[0; 3], &mut out).is_err());
        assert!(
            StoredType::U8
                .decode(&[0], &mut out)
                .unwrap_err()
                .contains("U8")
        );
    }
}
