//! Speed of products of one token with weights in floats and blocks, and of attention, on one
//! thread.
//!
//! `cargo run --release -p bitnet-kernels --example dense`. Products read from memory: their bytes
//! are compared with a plain read of the same number of bytes in the same turn.

use bitnet_kernels::dense::{
    Attention, BlockCodes, BlockStrip, BlockType, Blocks, Cached, DenseData, DenseMatrix,
    ScaleType, zeros,
};
use bitnet_kernels::machine::{Pages, WordBuffer, read};
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
    // With fewer rows the matrix is in the caches, and arithmetic is the bound.
    let (rows, cols) = (
        std::env::args()
            .nth(1)
            .and_then(|n| n.parse().ok())
            .unwrap_or(128_256),
        2560,
    );
    let weights = rows * cols;
    // 1.0 in binary16, and in bfloat16 a small number.
    let half = || {
        let mut all = zeros(weights);
        all.fill(0x3c00u16);
        all
    };
    let blocks = |codes, scales, minimum| {
        let fill = |_: usize, strip: &mut BlockStrip| -> Result<(), bitnet_kernels::Error> {
            for i in 0..strip.rows() {
                let mut row = strip.row(i);
                row.codes.fill(1);
                row.floats.fill(0.5);
                row.halves.iter_mut().for_each(|all| all.fill(0x3c00));
                row.factors.iter_mut().for_each(|all| all.fill(3));
            }
            Ok(())
        };
        Blocks::new(
            &pool,
            rows,
            cols,
            BlockType {
                codes,
                scales,
                minimum,
            },
            fill,
        )
        .map(DenseData::Blocks)
    };
    let (group, row) = (
        ScaleType::Nested { group: 16 },
        ScaleType::F32 { group: cols },
    );
    let x: Vec<f32> = (0..cols).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut out = vec![0.0; rows];
    println!(
        "{}: {rows} × {cols} with one token, GB/s and the share of a plain read",
        kernels.isa()
    );
    for name in [
        "f16", "bf16", "int8", "int4", "q4_1", "q4_k", "q6_k", "ternary",
    ] {
        let data = match name {
            "f16" => DenseData::F16(half()),
            "bf16" => DenseData::Bf16(half()),
            "int8" => blocks(BlockCodes::Int8, ScaleType::F16, false)?,
            "int4" => blocks(BlockCodes::Int4, ScaleType::F16, false)?,
            "q4_1" => blocks(BlockCodes::Int4, ScaleType::F16, true)?,
            "q4_k" => blocks(BlockCodes::Int4, ScaleType::Nested { group: 32 }, true)?,
            "q6_k" => blocks(BlockCodes::Int8, group, false)?,
            _ => blocks(BlockCodes::Trits, row, false)?,
        };
        let matrix = DenseMatrix::new(rows, cols, data)?;
        let memory = WordBuffer::new(matrix.bytes(), Pages::Huge);
        let turns: Vec<[f64; 2]> = (0..TURNS)
            .map(|_| {
                [
                    seconds(|| _ = black_box(read(memory.words()))),
                    seconds(|| kernels.dense_matmul(&pool, &matrix, &x, None, &mut out)),
                ]
            })
            .collect();
        let bytes = matrix.bytes() as f64 / 1e9;
        let speed = median(turns.iter().map(|t| bytes / t[1]).collect());
        let share = median(turns.iter().map(|t| 100.0 * t[0] / t[1]).collect());
        println!("{name:7} {speed:5.1} GB/s, {share:.0} %");
    }
    println!("\nattention of 4 heads of 128 over a cache of binary16, µs");
    for len in [128, 512, 2048] {
        let cache: Vec<u16> = (0..len * 128).map(|i| 0x3000 + (i % 251) as u16).collect();
        let (keys, values) = (Cached::F16(&cache), Cached::F16(&cache));
        let attention = Attention {
            keys,
            values,
            len,
            window: None,
            head_dim: 128,
            scale: 0.088,
        };
        let (q, mut out) = (&x[..512], [0.0; 512]);
        let turns = (0..TURNS).map(|_| {
            seconds(|| (0..200).for_each(|_| kernels.attend(&attention, q, black_box(&mut out))))
                / 200.0
        });
        println!("{len:5} positions: {:.1}", 1e6 * median(turns.collect()));
    }
    Ok(())
}
