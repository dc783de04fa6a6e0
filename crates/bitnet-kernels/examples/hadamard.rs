//! Speed of rotations of one row, on one thread.
//!
//! `cargo run --release -p bitnet-kernels --example hadamard [isa]`: microseconds of a row and
//! G additions/s, medians of turns. A row and its signs stay in the nearest caches.

use bitnet_core::hadamard::Hadamard;
use bitnet_kernels::{Isa, Kernels};
use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

const TURNS: usize = 9;
/// Additions of a turn.
const TURN: usize = 1 << 24;
/// Widths of the layers of a 27B model, which blocks of 1024 divide.
const WIDTHS: [usize; 3] = [5120, 6144, 17408];

/// Seconds of a call.
fn seconds(calls: usize, mut call: impl FnMut()) -> f64 {
    let mut all: Vec<f64> = (0..TURNS)
        .map(|_| {
            let begin = Instant::now();
            (0..calls).for_each(|_| call());
            begin.elapsed().as_secs_f64() / calls as f64
        })
        .collect();
    all.sort_by(f64::total_cmp);
    all[TURNS / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let kernels = match std::env::args().nth(1) {
        Some(name) => {
            let isa: Isa = name.parse()?;
            Kernels::new(isa).ok_or("this machine does not run it")?
        }
        None => Kernels::from_env()?,
    };
    println!(
        "{}: block, width, µs of a row, G additions/s",
        kernels.isa()
    );
    let blocks = (6..=12).map(|power| (1 << power, 1 << power));
    let rows = WIDTHS
        .into_iter()
        .flat_map(|width| [(64, width), (1024, width)]);
    for (block, width) in blocks.chain(rows) {
        let signs: Vec<i8> = (0..width)
            .map(|i| if i % 3 == 0 { -1 } else { 1 })
            .collect();
        let rotation = Hadamard::new(width, block, Some(&signs))?;
        let mut x: Vec<f32> = (0..width).map(|i| (i % 17) as f32 - 8.0).collect();
        let additions = width * block.ilog2() as usize;
        let time = seconds(TURN / additions, || {
            kernels.hadamard_rotate(&rotation, black_box(&mut x));
        });
        let rate = additions as f64 / time / 1e9;
        println!("{block:5} {width:6} {:8.3} {rate:6.1}", 1e6 * time);
    }
    Ok(())
}
