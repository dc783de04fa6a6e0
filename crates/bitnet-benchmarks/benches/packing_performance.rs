//! Values to packed bytes, on every instruction set.

mod common;

use bitnet_benchmarks::operations::{Group, Rivals};

fn main() {
    common::run(&[Group::Packing], Rivals::All);
}
