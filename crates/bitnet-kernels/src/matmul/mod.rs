//! Low-bit weights times int8 or float activations, from a private kernel layout.
//!
//! ```text
//! Y[M, N] = s_x[m] · Σ_p Σ_g s_w[p, n, g] · Σ_{k in g} (v[p, n, k] − z[n, g]) · x[m, k]  (+ bias[n])
//! ```
//!
//! Planes p are those of [`bitnet_core::Matrix`]: one, or two or three of ternary weights. The
//! inner sums are exact in i32; the rest is done in f32 in the order of planes and groups, so every
//! instruction set and every number of threads gives the same bits. Weights are stored as unsigned
//! codes, so that unsigned × signed byte products can be used: sums begin at `−(offset + z) · Σ x`
//! instead of 0.
//!
//! # Kernel layout
//!
//! Rows go in panels of [`PANEL`] = 64. A panel is a run of steps, a step is 256 bytes: lane r (4
//! bytes) belongs to row r of the panel, and field f of its byte b to column 4f + b of the step.
//! [`Stream`] and precision decide how many fields a byte has:
//!
//! ```text
//! weights         fields   columns of a step   code              value
//! binary             8            32           bit f             2 · code − 1
//! ternary, int2      4            16           bits 2f, 2f + 1   code − 1, code − 2
//! int3, int4         2             8           bits 4f … 4f + 3  code − 4, code − 8
//! int8               1             4           the byte          code − 128
//! ternary, 1.6       5            20           five trits of a byte, see below
//! ```
//!
//! So a load holds the columns of a step of its rows, an `and` leaves one field in place (the sums
//! of the upper ones are multiples of a power of 2 and are shifted down at the end), and the
//! activations that meet a field are the same 4 bytes for every lane. Each scale group begins at a
//! new step; missing rows and columns hold the code of the value 0 (binary has none: there the
//! activations are 0). The planes of a panel follow one another.
//!
//! # Five trits in a byte
//!
//! Bit 7 negates all five trits. The other seven bits number the 122 patterns that are all 0 or
//! whose last trit other than 0 is +1. A table of 128 bytes gives the first four as codes `t + 1`
//! in 2-bit fields; the fifth depends on the lower six bits alone. With VBMI each table is one
//! instruction.

mod activations;
pub(crate) mod coding;
pub(crate) mod float;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
mod prepack;
pub(crate) mod prepack_loops;
mod prepacked;
mod products;
pub(crate) mod shape;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
pub(crate) mod simd128;
mod stream;
pub(crate) mod tiles;
mod trits;
mod unpack;
#[cfg(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    all(target_arch = "wasm32", target_feature = "simd128")
))]
mod vector;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

pub use activations::PrepackedActivations;
pub use coding::{MAX_COLS, Stream};
pub use prepacked::{MatrixParameters, Prepacked};
pub use shape::PANEL;
