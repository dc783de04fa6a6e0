//! Ternary and low-bit quantization on plain slices: no files, no threads, no unsafe.
//!
//! How a matrix passes through this crate:
//!
//! ```text
//! f32 weights (N, K) ── fit ──► parameters of each granule (scale, zero point, threshold)
//!                    ── encode ──► values (signed i8), scales as they will be stored
//!                    ── Layout::pack ──► bytes of one wire layout
//! ```
//!
//! Conventions of the whole engine: weights are row-major `(N = out_features, K = in_features)`,
//! groups run along `K`, a *value* is the logical signed number and a *code* its stored unsigned
//! pattern, and `w ≈ scale · (value − zero_point)`: the scale always multiplies.
//!
//! Where to start: [`Scheme`] says what to quantize to, [`quantize`] turns weights into a
//! [`Matrix`], [`pack`] turns its values into bytes and back, [`stats`] measures the error. [`ops`]
//! holds the hot loops, which `bitnet-kernels` compiles for each instruction set.
#![forbid(unsafe_code)]

mod affine;
mod binary;
mod cut;
mod error;
mod fitted;
mod levels;
mod planes;
mod precision;
mod scales;
mod ternary;

pub mod activation;
pub mod codes;
pub mod granule;
pub mod hadamard;
pub mod memory;
pub mod mixed_precision;
pub mod names;
pub mod ops;
pub mod pack;
pub mod quantize;
pub mod random;
pub mod scheme;
pub mod stats;

pub use codes::{Matrix, MatrixSpec, ZeroPoints};
pub use error::{Error, Result};
pub use precision::{Granularity, Precision};
pub use scales::{ScaleDtype, ScaleForm, ScaleStorage};
pub use scheme::Scheme;
