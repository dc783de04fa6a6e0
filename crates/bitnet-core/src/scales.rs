//! How scales are stored, and which scale a reader gets back.

use crate::{Error, Result, named};

/// How a scale is stored. Codes are chosen knowing the scale after this rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleDtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

named!(ScaleDtype, "scale type", { F32 = "f32", F16 = "f16", Bf16 = "bf16" });

impl ScaleDtype {
    /// The nearest number that the type holds (ties to even), as f32.
    ///
    /// ```
    /// use bitnet_core::ScaleDtype;
    /// assert_eq!(ScaleDtype::Bf16.round(1.003), 1.0);
    /// assert_eq!(ScaleDtype::F32.round(1.003), 1.003);
    /// ```
    pub fn round(self, scale: f32) -> f32 {
        match self {
            Self::F32 => scale,
            Self::F16 => half::f16::from_f32(scale).to_f32(),
            Self::Bf16 => half::bf16::from_f32(scale).to_f32(),
        }
    }

    /// Bytes of one stored scale.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Appends `scale` as little-endian bytes.
    pub fn write(self, scale: f32, out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(scale.to_le_bytes()),
            Self::F16 => out.extend(half::f16::from_f32(scale).to_le_bytes()),
            Self::Bf16 => out.extend(half::bf16::from_f32(scale).to_le_bytes()),
        }
    }

    /// The number in little-endian bytes that [`ScaleDtype::write`] made.
    ///
    /// # Panics
    /// If `bytes` is not [`ScaleDtype::bytes`] long.
    pub fn read(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
            (Self::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
            _ => panic!("{} bytes for a scale of type {self}", bytes.len()),
        }
    }
}

/// Whether the container stores a scale or its inverse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScaleForm {
    /// The scale.
    #[default]
    Direct,
    /// 1/scale, as HF `bitlinear` folders do. The scale is then `1/x` in f32 for the stored x.
    Inverse,
}

named!(ScaleForm, "scale form", { Direct = "direct", Inverse = "inverse" });

/// How a scale is stored: its type, and whether the number is the scale or its inverse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScaleStorage {
    /// Type of the stored number.
    pub dtype: ScaleDtype,
    /// The scale, or its inverse.
    pub form: ScaleForm,
}

impl ScaleStorage {
    /// The number stored as the inverse of scale 0, i.e. for a granule of zeros. Unlike 1/0 it is
    /// finite in every type.
    pub const DEAD_INVERSE: f32 = 32768.0;

    /// The number that is stored for a scale: itself, or the f32 whose inverse it is.
    ///
    /// Inverting twice may be off by one in the last place, so a neighbour whose inverse is exactly
    /// `scale` is preferred.
    pub fn to_stored(self, scale: f32) -> f32 {
        match self.form {
            ScaleForm::Direct => scale,
            ScaleForm::Inverse if scale == 0.0 => Self::DEAD_INVERSE,
            ScaleForm::Inverse => {
                let near = scale.recip();
                let candidates = [
                    self.dtype.round(near),
                    near,
                    near.next_up(),
                    near.next_down(),
                ];
                candidates
                    .into_iter()
                    .find(|x| x.recip() == scale)
                    .unwrap_or(near)
            }
        }
    }

    /// The scale after storage, i.e. the scale that a reader gets back.
    ///
    /// # Errors
    /// [`Error::Scheme`] if the type cannot hold it.
    pub fn round(self, scale: f64) -> Result<f32> {
        let nearest = self.back(self.nearest(self.exact(scale)));
        if nearest.is_finite() {
            Ok(nearest)
        } else {
            Err(self.too_large(scale))
        }
    }

    /// The storable scale nearest to `scale`, and its neighbour on the other side of `scale` (f32
    /// scales have none: both are the same). A scale that is too small for the type becomes 0, and
    /// the granule then holds only zeros; one that is too large is an error.
    ///
    /// # Errors
    /// [`Error::Scheme`] if the type cannot hold it.
    pub fn around(self, scale: f64) -> Result<(f32, f32)> {
        let exact = self.exact(scale);
        let nearest = self.nearest(exact);
        let other = match self.dtype {
            ScaleDtype::F32 => nearest,
            ScaleDtype::F16 | ScaleDtype::Bf16 => {
                // Neighbours of a positive number differ by one in the last bit that the type
                // keeps; rounding repairs subnormals.
                let step = if self.dtype == ScaleDtype::F16 {
                    1 << 13
                } else {
                    1 << 16
                };
                let bits = nearest.to_bits();
                let bits = if f64::from(nearest) < exact {
                    bits.saturating_add(step)
                } else {
                    bits.saturating_sub(step)
                };
                self.dtype.round(f32::from_bits(bits))
            }
        };
        let (nearest, other) = (self.back(nearest), self.back(other));
        if !nearest.is_finite() {
            return Err(self.too_large(scale));
        }
        Ok((nearest, if other.is_finite() { other } else { nearest }))
    }

    /// The number to store, before it is rounded to the type.
    fn exact(self, scale: f64) -> f64 {
        match self.form {
            ScaleForm::Direct => scale,
            ScaleForm::Inverse if scale == 0.0 => f64::from(Self::DEAD_INVERSE),
            ScaleForm::Inverse => scale.recip(),
        }
    }

    /// The number to store.
    fn nearest(self, exact: f64) -> f32 {
        let nearest = self.dtype.round(exact as f32);
        if self.form == ScaleForm::Direct || nearest.is_finite() {
            return nearest;
        }
        // The inverse of a tiny scale overflows: store the largest number of the type, i.e. the
        // smallest scale.
        match self.dtype {
            ScaleDtype::F32 => f32::MAX,
            ScaleDtype::F16 => half::f16::MAX.to_f32(),
            ScaleDtype::Bf16 => half::bf16::MAX.to_f32(),
        }
    }

    /// The scale that a stored number stands for.
    fn back(self, stored: f32) -> f32 {
        match self.form {
            ScaleForm::Direct => stored,
            ScaleForm::Inverse => stored.recip(),
        }
    }

    fn too_large(self, scale: f64) -> Error {
        Error::Scheme(format!(
            "a scale of {scale:e} does not fit {} ({})",
            self.dtype, self.form
        ))
    }
}
