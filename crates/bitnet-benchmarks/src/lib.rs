//! Benchmarks of the kernels. Each operation is measured as a share of the machine's ceilings
//! (bandwidth of memory and L2, peak of the multiply instructions) and as a ratio to other engines.
//! Everything that is compared runs in the turns of one run.
//!
//! Start with [`operations::plan`]: it turns a [`selection::CaseSelection`] into cases, for the
//! program and for the criterion benches alike. Then
//! - [`case`]: a [`Case`] is one operation on one shape. Its [`Contender`]s perform it, and each
//!   can check its own result.
//! - [`measure`] times the contenders of a case beside the [`ceiling`]s, on a [`testbed`].
//! - [`results`] is the JSON document that `compare` writes; [`report`] renders it as HTML.
//! - [`machine`] reads the facts that the system tells about the processor and its caches.
//!
//! docs/benchmarks.md says how to read the figures.

pub mod case;
pub mod ceiling;
pub mod machine;
pub mod measure;
pub mod operations;
pub mod output_file;
pub mod report;
pub mod results;
pub mod selection;
pub mod testbed;

pub use case::{Case, Contender};
