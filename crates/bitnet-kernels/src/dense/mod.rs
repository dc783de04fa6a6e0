//! Products with float activations, attention over a cache, and the elementwise steps between them.
//!
//! ```text
//! Y[M, N] = X[M, K] · Wᵀ (+ bias)
//! ```
//!
//! W is in f32, f16, bf16 ([`DenseData`]) or in blocks of integers ([`Blocks`]).
//!
//! Every loop is written once, over 16 lanes or plain Rust, and compiled for each instruction set.
//! A sum runs over [`LANES`] strided partial sums with fused multiply-adds, which are then added in
//! pairs; the order depends on K alone. So the instruction set, the number of threads and the
//! number of tokens computed together change no bit of the result.

pub(crate) mod attention;
pub(crate) mod attention_run;
mod blocks;
pub(crate) mod delta;
pub(crate) mod elementwise;
pub(crate) mod lanes;
mod matrix;
mod panels;
pub(crate) mod product;
mod rows;
mod run;
mod tile;

pub use crate::lines::zeros;
pub use attention::{Attention, Cached};
pub(crate) use attention_run::AttentionScratch;
pub use attention_run::TokenHeads;
pub use bitnet_core::ops::LANES;
pub use blocks::{
    BLOCK, BlockCodes, BlockRow, BlockStrip, BlockType, Blocks, SUPER, ScaleType, quantize_int4,
    quantize_int8,
};
pub use delta::DeltaTokens;
pub use elementwise::RotaryPairing;
pub use lanes::f16_to_f32;
pub use matrix::{DenseData, DenseMatrix};
