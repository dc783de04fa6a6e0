//! Packed bytes to values and floats, on every instruction set.

mod common;

use bitnet_benchmarks::operations::{Group, Rivals};

fn main() {
    common::run(&[Group::Simd], Rivals::All);
}
