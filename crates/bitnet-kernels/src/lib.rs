//! The hot loops of [`bitnet_core::ops`] compiled for each instruction set and chosen at run time,
//! and the products of low-bit weights with activations: [`matmul`].
//!
//! ```
//! use bitnet_kernels::Kernels;
//! use bitnet_core::ops::Ops;
//! let kernels = Kernels::detect();
//! let moments = kernels.moments(&[1.0, -3.0]);
//! assert_eq!(moments.sum_abs, 4.0);
//! println!("ran on {}", kernels.isa());
//! ```
//!
//! A loop of `ops` is the body of its oracle, compiled with wider registers. The oracle fixes the
//! order of every floating-point operation and Rust never reorders or fuses them, so each
//! instruction set returns the same bits; the tests hold every one to that.

pub mod dense;
mod lines;
pub mod machine;
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(
        dead_code,
        unused_imports,
        unused_macros,
        reason = "WebAssembly uses part of it, other machines the plain loops alone"
    )
)]
pub mod matmul;
mod pool;
pub mod stream;
pub mod update;

pub use pool::Pool;

use bitnet_core::ops::{Above, Cuts, Key, Magnitudes, Moments, Ops, Scalar, Uniform};
use std::fmt;
use std::str::FromStr;

/// An instruction set that loops are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// The target's baseline.
    Scalar,
    /// x86-64 with SSSE3 and SSE4.1.
    Sse41,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX2 and AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// [`Isa::Avx512`] with VBMI.
    Avx512Vbmi,
    /// aarch64.
    Neon,
    /// aarch64 with dot products.
    NeonDotprod,
    /// WebAssembly compiled with simd128.
    Simd128,
}

impl Isa {
    /// All of them; those of one architecture stand together, narrow to wide.
    pub const ALL: [Self; 9] = [
        Self::Scalar,
        Self::Sse41,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vbmi,
        Self::Neon,
        Self::NeonDotprod,
        Self::Simd128,
    ];

    /// Whether this machine runs it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Sse41 => is_x86_feature_detected!("ssse3") && is_x86_feature_detected!("sse4.1"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512vbmi")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => {
                Self::Neon.is_available() && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            Self::Simd128 => cfg!(all(target_arch = "wasm32", target_feature = "simd128")),
            #[allow(
                unreachable_patterns,
                reason = "which of them remain depends on the target"
            )]
            _ => false,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scalar => "scalar",
            Self::Sse41 => "sse41",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vbmi => "avx512vbmi",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
            Self::Simd128 => "simd128",
        })
    }
}

/// Why no kernels could be had for a name.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no instruction set of that name.
    #[error("unknown instruction set '{got}', expected one of {}", Isa::ALL.map(|isa| isa.to_string()).join(", "))]
    UnknownIsa {
        /// The name given.
        got: String,
    },
    /// The matrix or the activations are not what the kernels take.
    #[error(transparent)]
    Matrix(#[from] bitnet_core::Error),
    /// The machine does not have it.
    #[error("this machine does not run {isa}")]
    Unavailable {
        /// The instruction set asked for.
        isa: Isa,
    },
}

impl FromStr for Isa {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.to_string() == s)
            .ok_or_else(|| Error::UnknownIsa { got: s.into() })
    }
}

/// The loops for one instruction set. Having a value proves that the machine runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernels {
    isa: Isa,
}

impl Kernels {
    /// The widest that the machine runs.
    pub fn detect() -> Self {
        Self::all().last().unwrap_or(Self { isa: Isa::Scalar })
    }

    /// The one that `BITNET_ISA` names, else the widest that the machine runs.
    ///
    /// # Errors
    /// [`Error`] if the variable names nothing, or something that this machine does not run.
    pub fn from_env() -> Result<Self, Error> {
        match std::env::var("BITNET_ISA") {
            Ok(name) => {
                let isa = name.parse()?;
                Self::new(isa).ok_or(Error::Unavailable { isa })
            }
            Err(_) => Ok(Self::detect()),
        }
    }

    /// `None` if the machine does not run `isa`.
    pub fn new(isa: Isa) -> Option<Self> {
        isa.is_available().then_some(Self { isa })
    }

    /// One for each instruction set that the machine runs, narrow to wide.
    pub fn all() -> impl Iterator<Item = Self> {
        Isa::ALL.into_iter().filter_map(Self::new)
    }

    /// The instruction set that runs.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// The oracle's loops under the target features of one instruction set.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled_for {
    ($isa:ident, $features:literal) => {
        mod $isa {
            use bitnet_core::ops::{self, Above, Cuts, Key, Moments, Uniform};

            #[target_feature(enable = $features)]
            pub(crate) fn moments(w: &[f32]) -> Moments {
                ops::moments(w)
            }

            #[target_feature(enable = $features)]
            pub(crate) fn above_both(w: &[f32], key: Key, t: [f32; 2]) -> [Above; 2] {
                match key {
                    Key::Magnitude => ops::above_both(w, Key::Magnitude, t),
                    Key::Signed => ops::above_both(w, Key::Signed, t),
                }
            }

            #[target_feature(enable = $features)]
            pub(crate) fn above(w: &[f32], h: Option<&[f32]>, key: Key, t: f32) -> Above {
                match key {
                    Key::Magnitude => ops::above(w, h, Key::Magnitude, t),
                    Key::Signed => ops::above(w, h, Key::Signed, t),
                }
            }

            #[target_feature(enable = $features)]
            pub(crate) fn uniform_error(w: &[f32], h: Option<&[f32]>, quantizer: &Uniform) -> f64 {
                ops::uniform_error(w, h, quantizer)
            }

            #[target_feature(enable = $features)]
            pub(crate) fn encode_cut(w: &[f32], cuts: Cuts, out: &mut [i8]) {
                ops::encode_cut(w, cuts, out);
            }

            #[target_feature(enable = $features)]
            pub(crate) fn encode_uniform(w: &[f32], quantizer: &Uniform, out: &mut [i8]) {
                ops::encode_uniform(w, quantizer, out);
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
compiled_for!(sse41, "ssse3,sse4.1");
#[cfg(target_arch = "x86_64")]
compiled_for!(avx2, "avx2");
#[cfg(target_arch = "x86_64")]
compiled_for!(avx512, "avx512f,avx512bw,avx512dq,avx512vl");

/// Calls a loop for the instruction set of a [`Kernels`].
macro_rules! dispatch {
    ($self:ident, $loop:ident($($argument:expr),*)) => {
        match $self.isa {
            // SAFETY: `Kernels::new` made this value after `Isa::is_available` found every feature
            // that the loop enables.
            #[cfg(target_arch = "x86_64")]
            Isa::Sse41 => unsafe { sse41::$loop($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { avx2::$loop($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Vbmi => unsafe { avx512::$loop($($argument),*) },
            _ => Scalar.$loop($($argument),*),
        }
    };
}

impl Ops for Kernels {
    fn moments(&self, w: &[f32]) -> Moments {
        dispatch!(self, moments(w))
    }

    fn magnitudes(&self, w: &[f32]) -> Magnitudes {
        stream::magnitudes(*self, w)
    }

    fn magnitudes_each(&self, w: &[f32], width: usize, out: &mut Vec<Magnitudes>) {
        stream::magnitudes_each(*self, w, width, out);
    }

    fn inside(&self, w: &[f32], key: Key, low: f32, high: f32, out: &mut Vec<f32>) {
        stream::inside(*self, w, key, low, high, out);
    }

    fn above_both(&self, w: &[f32], key: Key, t: [f32; 2]) -> [Above; 2] {
        dispatch!(self, above_both(w, key, t))
    }

    fn above(&self, w: &[f32], h: Option<&[f32]>, key: Key, t: f32) -> Above {
        dispatch!(self, above(w, h, key, t))
    }

    fn uniform_error(&self, w: &[f32], h: Option<&[f32]>, quantizer: &Uniform) -> f64 {
        dispatch!(self, uniform_error(w, h, quantizer))
    }

    fn encode_cut(&self, w: &[f32], cuts: Cuts, out: &mut [i8]) {
        dispatch!(self, encode_cut(w, cuts, out));
    }

    fn encode_uniform(&self, w: &[f32], quantizer: &Uniform, out: &mut [i8]) {
        dispatch!(self, encode_uniform(w, quantizer, out));
    }
}
