//! Floats to packed codes and to int8, on every instruction set.

mod common;

use bitnet_benchmarks::operations::{Group, Rivals};

fn main() {
    common::run(&[Group::Quantization], Rivals::All);
}
