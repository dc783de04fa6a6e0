//! ONNX models, written only: the messages of `onnx.proto` that a decoder needs, and low-bit
//! matrices in the blocks of onnxruntime's `MatMulNBits` and `GatherBlockQuantized`.
//!
//! [`Model::encode`] gives the bytes of a `model.onnx`. Its weights are external data: regions of
//! another file, which [`Weights`] names.

mod blocks;
mod model;
mod wire;

pub use blocks::{BlockFormat, PackedBlocks};
pub use model::{Attribute, Constant, Dim, Domain, ElementType, Model, Node, Value, Weights};

/// Version of the file format that is written: the first with bfloat16 and external data in all
/// readers of [`OPSET`].
pub const IR_VERSION: i64 = 10;
/// Version of ONNX's own operators: the first with `RMSNormalization`.
pub const OPSET: i64 = 23;
