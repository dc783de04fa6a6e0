//! Speed of products of one token with weights in floats and blocks, and of attention, on one thread.
//!
//! `cargo run --release -p bitnet-kernels --example dense`. Products read from memory: their bytes are set against a plain read of as many in the same turn.

use bitnet_kernels::dense::{Attention, BLOCK, Cached, Data, Matrix, zeros};
use bitnet_kernels::machine::{Memory, Pages, read};
use bitnet_kernels::{Kernels, Pool};
use std::hint::black_box;
use std::time::Instant;

const TURNS: usize = 7;

fn seconds(mut call: impl FnMut()) -> f64 {
    let begin = Instant::now();
    call();
    begin.elapsed().as_secs_f64()
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn main() -> Result<(), bitnet_kernels::Error> {
    let (kernels, pool) = (Kernels::from_env()?, Pool::single());
    let (rows, cols) = (128_256, 2560);
    let (weights, blocks) = (rows * cols, rows * cols / BLOCK);
    // 1.0 in binary16, and in bfloat16 a small number.
    let scales = || vec![0x3c00u16; blocks];
    let half = || {
        let mut all = zeros(weights);
        all.fill(0x3c00u16);
        all
    };
    let x: Vec<f32> = (0..cols).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut out = vec![0.0; rows];
    println!("{}: {rows} × {cols} with one token, GB/s and the share of a plain read", kernels.isa());
    for name in ["f16", "bf16", "int8", "int4"] {
        let data = match name {
            "f16" => Data::F16(half()),
            "bf16" => Data::Bf16(half()),
            "int8" => {
                let mut values = zeros(weights);
                values.fill(3);
                Data::Int8 { values, scales: scales() }
            }
            _ => {
                let mut codes = zeros(weights / 2);
                codes.fill(0x53);
                Data::Int4 { codes, scales: scales() }
            }
        };
        let matrix = Matrix::new(rows, cols, data)?;
        let memory = Memory::new(matrix.bytes(), Pages::Huge);
        let turns: Vec<[f64; 2]> = (0..TURNS)
            .map(|_| {
                [seconds(|| _ = black_box(read(memory.words()))), seconds(|| kernels.dense_matmul(&pool, &matrix, &x, None, &mut out))]
            })
            .collect();
        let bytes = matrix.bytes() as f64 / 1e9;
        let speed = median(turns.iter().map(|t| bytes / t[1]).collect());
        let share = median(turns.iter().map(|t| 100.0 * t[0] / t[1]).collect());
        println!("{name:5} {speed:5.1} GB/s, {share:.0} %");
    }
    println!("\nattention of 4 heads of 128 over a cache of binary16, µs");
    for len in [128, 512, 2048] {
        let cache: Vec<u16> = (0..len * 128).map(|i| 0x3000 + (i % 251) as u16).collect();
        let (keys, values) = (Cached::F16(&cache), Cached::F16(&cache));
        let attention = Attention { keys, values, len, head_dim: 128, scale: 0.088 };
        let (q, mut out) = (&x[..512], [0.0; 512]);
        let turns = (0..TURNS).map(|_| seconds(|| (0..200).for_each(|_| kernels.attend(&attention, q, black_box(&mut out)))) / 200.0);
        println!("{len:5} positions: {:.1}", 1e6 * median(turns.collect()));
    }
    Ok(())
}
