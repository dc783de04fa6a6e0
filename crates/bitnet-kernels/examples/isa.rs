//! The instruction sets that this machine runs, narrow to wide: `cargo run -p bitnet-kernels
//! --example isa`.

use bitnet_kernels::Kernels;

fn main() {
    println!(
        "{}",
        Kernels::all()
            .map(|kernels| kernels.isa().to_string())
            .collect::<Vec<_>>()
            .join(" ")
    );
}
