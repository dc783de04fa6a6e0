//! Floats to packed codes and to int8, on every instruction set.

mod common;

use bitnet_benchmarks::selection::{OperationGroup, Rivals};

fn main() {
    common::run(&[OperationGroup::Quantization], Rivals::All);
}
