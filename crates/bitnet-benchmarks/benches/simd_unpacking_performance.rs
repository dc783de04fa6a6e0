//! Packed bytes to values and floats, on every instruction set.

mod common;

use bitnet_benchmarks::selection::{OperationGroup, Rivals};

fn main() {
    common::run(&[OperationGroup::Simd], Rivals::All);
}
