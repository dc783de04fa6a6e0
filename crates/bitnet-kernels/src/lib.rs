//! The hot loops of the workspace, compiled for each instruction set and chosen at run time.
//!
//! - [`Kernels`] is the place to start: [`Kernels::detect`] takes the widest instruction set of the
//!   machine. It implements [`bitnet_core::ops::Ops`], the loops that quantization needs.
//! - [`stream`] packs and unpacks the wire layouts, and rounds activations to int8.
//! - [`matmul`] multiplies low-bit weights with activations, [`dense`] multiplies floats.
//! - [`hadamard`] rotates activations for weights in a rotated basis.
//! - [`update`] has the steps of optimizers, [`machine`] measures ceilings of the machine.
//! - [`Pool`] runs the parts of a loop on threads.
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
//! A kernel is a plain loop compiled with wider registers, or written for them by hand. The plain
//! loop fixes the order of every floating-point operation, and Rust neither reorders nor fuses
//! them, so each instruction set returns the same bits. The tests hold every kernel to that on
//! every instruction set.

#[cfg(test)]
mod battery;
pub mod dense;
mod error;
pub mod hadamard;
mod isa;
mod kernels;
mod lines;
pub mod machine;
pub mod matmul;
mod parallel;
mod pool;
pub mod stream;
mod table;
pub mod update;

pub use error::Error;
pub use isa::Isa;
pub use kernels::Kernels;
pub use pool::Pool;
