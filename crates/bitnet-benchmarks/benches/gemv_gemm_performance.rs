//! Our matrix products alone.

mod common;

use bitnet_benchmarks::operations::{Group, Rivals};

fn main() {
    common::run(&[Group::Gemv, Group::Gemm], Rivals::None);
}
