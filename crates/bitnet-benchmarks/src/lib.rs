//! Measures the kernels: each operation as a share of what the machine can do and as a ratio to
//! rivals, all in turns of one run.
//!
//! [`operations`] defines what there is to measure, once for the program and for the criterion
//! benches: a [`Case`] is one operation on one shape, its [`Contender`]s are those who do it, and
//! each knows how to check its own result. [`measure`] times them, [`machine`] has the ceilings,
//! [`results`] is the document, [`report`] draws it. docs/benchmarks.md says how to read it.

pub mod machine;
pub mod measure;
pub mod operations;
pub mod report;
pub mod results;

pub use operations::{Case, Contender};
