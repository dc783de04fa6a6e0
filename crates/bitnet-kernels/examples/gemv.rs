//! Speed of the ternary products, as shares of what the machine reads and multiplies in the same run.
//!
//! `cargo run --release -p bitnet-kernels --example gemv [threads] [isa]`; without arguments one thread and the widest instruction set.

use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_kernels::ternary::{Activations, Prepacked};
use bitnet_kernels::{Kernels, Pool};
use std::hint::black_box;
use std::time::Instant;

/// Bytes that are cycled through so that no cache holds them.
const COLD_BYTES: usize = 600 << 20;

/// Seconds: smallest, median and largest of a few batches of at least 30 ms.
fn time(mut call: impl FnMut()) -> [f64; 3] {
    let mut seconds = |calls: usize| {
        let begin = Instant::now();
        (0..calls).for_each(|_| call());
        begin.elapsed().as_secs_f64()
    };
    let once = seconds(1).max(1e-9);
    let calls = (0.03 / once).ceil() as usize;
    let mut all: Vec<f64> = (0..7).map(|_| seconds(calls) / calls as f64).collect();
    all.sort_by(f64::total_cmp);
    [all[0], all[3], all[6]]
}

fn spread([best, median, worst]: [f64; 3], amount: f64) -> String {
    format!("{:7.1} ({:.1} … {:.1})", amount / median / 1e9, amount / worst / 1e9, amount / best / 1e9)
}

fn matrix(rows: usize, cols: usize) -> Matrix {
    let mut state = 1u32;
    let mut trit = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 16) % 3) as i8 - 1
    };
    let spec = MatrixSpec::new(rows, cols, Precision::Ternary, Granularity::Tensor);
    Matrix { values: (0..rows * cols).map(|_| trit()).collect(), scales: vec![0.02], zero_points: vec![], spec }
}

fn activations(w: &Prepacked, tokens: usize) -> Activations {
    let values: Vec<i8> = (0..tokens * w.cols()).map(|i| (i * 2_654_435_761 >> 9) as i8).collect();
    Activations::from_values(&values, &vec![0.01; tokens], w).expect("lengths fit")
}

/// Bytes per second read by summing `bytes` on the pool.
fn read(pool: &Pool, bytes: usize) -> f64 {
    let data = vec![1u64; bytes / 8];
    let parts = pool.threads() * 4;
    let seconds = time(|| {
        pool.run(parts, |part| {
            black_box(machine::sum(&data[part * data.len() / parts..(part + 1) * data.len() / parts]));
        })
    });
    bytes as f64 / seconds[1]
}

/// Multiply-adds per second of the byte dot product on registers alone.
fn dot_peak(pool: &Pool) -> f64 {
    const ROUNDS: usize = 20_000;
    let macs = pool.threads() * machine::dots(0) * ROUNDS;
    let seconds = time(|| {
        pool.run(pool.threads(), |_| {
            black_box(machine::dots(ROUNDS));
        })
    });
    macs as f64 / seconds[0]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(Ok(1), |a| a.parse())?;
    let kernels = match arguments.next() {
        Some(name) => {
            let isa = name.parse()?;
            Kernels::new(isa).ok_or(bitnet_kernels::Error::Unavailable { isa })?
        }
        None => Kernels::detect(),
    };
    let pool = Pool::new(threads)?;
    let fork = time(|| pool.run(2 * threads, |_| ()));
    println!("{} on {threads} thread(s), fork-join {:.2} µs ({:.2} … {:.2})", kernels.isa(), fork[1] * 1e6, fork[0] * 1e6, fork[2] * 1e6);
    let (dram, cache) = (read(&pool, COLD_BYTES), read(&pool, threads << 20));
    let peak = dot_peak(&pool);
    println!("reads {:.1} GB/s from memory, {:.1} GB/s from L2; byte dot product {:.0} G MAC/s", dram / 1e9, cache / 1e9, peak / 1e9);

    println!("\nM = 1, G weights/s: median (worst … best) of 7");
    for (rows, cols) in [(6912, 2560), (2560, 6912), (4096, 14336), (1024, 2560)] {
        let matrix = matrix(rows, cols);
        let begin = Instant::now();
        let packed = Prepacked::new(&matrix, &pool)?;
        let prepack = (rows * cols) as f64 / begin.elapsed().as_secs_f64();
        let hot = packed.bytes() <= 1 << 20;
        let copies = vec![packed.clone(); if hot { 1 } else { COLD_BYTES.div_ceil(packed.bytes()) }];
        let mut y = vec![0.0; 4 * rows];
        for tokens in [1, 4] {
            let x = activations(&packed, tokens);
            let mut at = 0;
            let seconds = time(|| {
                kernels.ternary_matmul(&pool, &copies[at], &x, None, &mut y[..tokens * rows]);
                at = (at + 1) % copies.len();
            });
            let share = packed.bytes() as f64 / seconds[1] / if hot { cache } else { dram };
            let place = if hot { "L2" } else { "memory" };
            println!(
                "{rows:5} × {cols:5} from {place:6} M = {tokens}: {}, {:.0} % of the read bandwidth",
                spread(seconds, (rows * cols) as f64),
                100.0 * share
            );
        }
        println!("{rows:5} × {cols:5} prepack: {:.2} G weights/s", prepack / 1e9);
    }

    println!("\nM > 1, G MAC/s: median (worst … best) of 7");
    let matrix = matrix(6912, 2560);
    let packed = Prepacked::new(&matrix, &pool)?;
    for tokens in [2, 4, 6, 7, 8, 16, 32, 128, 512] {
        let x = activations(&packed, tokens);
        let mut y = vec![0.0; tokens * 6912];
        let seconds = time(|| kernels.ternary_matmul(&pool, &packed, &x, None, &mut y));
        let macs = (tokens * 6912 * 2560) as f64;
        println!(" 6912 ×  2560 M = {tokens:3}: {}, {:.0} % of the peak", spread(seconds, macs), 100.0 * macs / seconds[1] / peak);
    }
    Ok(())
}

/// The ceilings, with the widest registers that the machine has.
mod machine {
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;

    /// Σ of the words, as fast as memory gives them.
    pub(crate) fn sum(data: &[u64]) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was found on the line above.
            return unsafe { wide_sum(data) };
        }
        plain_sum(data)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn wide_sum(data: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 8];
        let (lines, rest) = data.as_chunks::<64>();
        for lines in lines {
            for (sum, line) in sums.iter_mut().zip(lines.as_chunks::<8>().0) {
                // SAFETY: eight words of 8 bytes; the read needs no alignment.
                *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
            }
        }
        sums.into_iter().map(|s| _mm512_reduce_add_epi64(s) as u64).sum::<u64>() + rest.iter().sum::<u64>()
    }

    fn plain_sum(data: &[u64]) -> u64 {
        data.iter().fold(0, |sum, &word| sum.wrapping_add(word))
    }

    /// Some rounds of byte dot products on registers; for 0 rounds, the multiply-adds of one.
    pub(crate) fn dots(rounds: usize) -> usize {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the feature, which AVX-512 F comes with, was found on the line above.
            return unsafe { wide_dots(rounds) };
        }
        let mut sum = [0i32; 64];
        for round in 0..rounds {
            sum.iter_mut().for_each(|s| *s = s.wrapping_add(std::hint::black_box(round as i32)));
        }
        std::hint::black_box(sum);
        64
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn wide_dots(rounds: usize) -> usize {
        let mut sums = [_mm512_setzero_si512(); 24];
        let (a, b) = (_mm512_set1_epi8(std::hint::black_box(1)), _mm512_set1_epi8(std::hint::black_box(2)));
        for _ in 0..rounds {
            // Opaque, so that rounds are not merged.
            let b = std::hint::black_box(b);
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        std::hint::black_box(sums);
        24 * 64
    }
}
