//! Every operation beside every rival.

mod common;

use bitnet_benchmarks::operations::{Group, Rivals};

fn main() {
    common::run(&Group::ALL, Rivals::All);
}
