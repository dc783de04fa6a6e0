//! Values to packed bytes, on every instruction set.

mod common;

use bitnet_benchmarks::selection::{OperationGroup, Rivals};

fn main() {
    common::run(&[OperationGroup::Packing], Rivals::All);
}
