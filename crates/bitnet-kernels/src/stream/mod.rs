//! Elementwise work at the speed of memory: floats to packed codes, packed codes to values and to
//! floats, activations to int8.
//!
//! Each function returns the bits of its counterpart in bitnet-core on every
//! instruction set and every number of threads.

mod layout;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod plain;
mod quantize;
mod token;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

pub use layout::{dequantize, pack, unpack};
pub use quantize::{FloatWeights, PackedMatrix, quantize, quantize_into};
pub use token::quantize_token;
