//! Every operation beside every rival.

mod common;

use bitnet_benchmarks::selection::{OperationGroup, Rivals};

fn main() {
    common::run(OperationGroup::ALL, Rivals::All);
}
