//! Our matrix products alone.

mod common;

use bitnet_benchmarks::selection::{OperationGroup, Rivals};

fn main() {
    common::run(&[OperationGroup::Gemv, OperationGroup::Gemm], Rivals::None);
}
