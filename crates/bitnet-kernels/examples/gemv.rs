//! Speed of the ternary products, as shares of the speed at which the machine reads and multiplies
//! in the same run.
//!
//! `cargo run --release -p bitnet-kernels --example gemv [threads] [isa]`; without arguments one
//! thread and the widest instruction set.

use bitnet_core::random::Random;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_kernels::machine::{self, Instruction, Pages, WordBuffer};
use bitnet_kernels::matmul::{Prepacked, PrepackedActivations};
use bitnet_kernels::{Kernels, Pool};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Bytes that are cycled through so that no cache holds them.
const COLD_BYTES: usize = 2400 << 20;

/// Turns of each measurement; a turn lasts about [`TURN`] seconds for the ceiling and as long for
/// the operation.
const TURNS: usize = 21;
/// See [`TURNS`].
const TURN: f64 = 0.01;

/// Seconds of one call, over enough calls for a turn.
fn turn(mut call: impl FnMut(), calls: usize) -> f64 {
    let begin = Instant::now();
    (0..calls).for_each(|_| call());
    begin.elapsed().as_secs_f64() / calls as f64
}

/// Smallest, median and largest.
fn summary(mut all: Vec<f64>) -> [f64; 3] {
    all.sort_by(f64::total_cmp);
    [all[0], all[all.len() / 2], all[all.len() - 1]]
}

/// An operation to measure: a call, and the amount of work in it.
struct Work<'a> {
    amount: f64,
    call: Box<dyn FnMut() + 'a>,
}

impl Work<'_> {
    fn calls(&mut self) -> usize {
        (TURN / turn(&mut self.call, 1).max(1e-9)).ceil() as usize
    }
}

/// Rates of `work` a second, and its shares of a ceiling measured in turns with it; `scale` turns
/// its amount into the ceiling's.
fn against(mut ceiling: Work<'_>, mut work: Work<'_>, scale: f64) -> String {
    let (of_ceiling, of_work) = (ceiling.calls(), work.calls());
    let turns: Vec<[f64; 2]> = (0..TURNS)
        .map(|_| {
            [
                ceiling.amount / turn(&mut ceiling.call, of_ceiling),
                work.amount / turn(&mut work.call, of_work),
            ]
        })
        .collect();
    let [low, median, high] = summary(turns.iter().map(|t| t[1] / 1e9).collect());
    let [from, share, to] = summary(turns.iter().map(|t| 100.0 * t[1] * scale / t[0]).collect());
    let [_, top, _] = summary(turns.iter().map(|t| t[0] / 1e9).collect());
    format!("{median:6.1} ({low:.1} … {high:.1}), {share:.0} % ({from:.0} … {to:.0}) of {top:.1}")
}

fn matrix(rows: usize, cols: usize) -> Matrix {
    let mut random = Random::new(1);
    let spec = MatrixSpec::new(rows, cols, Precision::Ternary, Granularity::Tensor);
    Matrix {
        values: (0..rows * cols).map(|_| random.trit()).collect(),
        scales: vec![0.02],
        zero_points: vec![],
        spec,
    }
}

fn activations(w: &Prepacked, tokens: usize) -> PrepackedActivations {
    let values: Vec<i8> = (0..tokens * w.cols())
        .map(|i| ((i * 2_654_435_761) >> 9) as i8)
        .collect();
    PrepackedActivations::from_values(&values, &vec![0.01; tokens], w).expect("lengths fit")
}

/// Reads of `data` on the pool, a sixteenth of the cold bytes at most in a call, each call where
/// the last one ended.
fn reading<'a>(pool: &'a Pool, data: &'a [u64]) -> Work<'a> {
    let words = data.len().min(COLD_BYTES / 16 / 8);
    let mut at = 0;
    let call = move || {
        let data = &data[at..at + words];
        pool.run(pool.threads(), |part| {
            black_box(machine::read(
                &data[part * words / pool.threads()..(part + 1) * words / pool.threads()],
            ));
        });
        at = if at + 2 * words <= data.len() {
            at + words
        } else {
            0
        };
    };
    Work {
        amount: (8 * words) as f64,
        call: Box::new(call),
    }
}

/// Multiply-adds of the byte product that the kernels are made of, on registers alone.
fn dots(pool: &Pool, instruction: Instruction) -> Work<'_> {
    const ROUNDS: usize = 50_000;
    let amount = (pool.threads() * instruction.multiply_adds() * ROUNDS) as f64;
    Work {
        amount,
        call: Box::new(move || pool.run(pool.threads(), |_| instruction.run(ROUNDS))),
    }
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
    // A part ends when every thread has one, so that the caller cannot run them all before a worker
    // begins.
    let fork = || {
        let here = AtomicUsize::new(0);
        pool.run(threads, |_| {
            here.fetch_add(1, Ordering::AcqRel);
            while here.load(Ordering::Acquire) < threads {
                std::hint::spin_loop();
            }
        });
    };
    let fork = summary((0..TURNS).map(|_| 1e6 * turn(fork, 200)).collect());
    println!(
        "{} on {threads} thread(s), fork-join {:.2} µs ({:.2} … {:.2})",
        kernels.isa(),
        fork[1],
        fork[0],
        fork[2]
    );
    println!(
        "median (smallest … largest) of {TURNS} turns; shares are of the ceiling in the same turn"
    );

    let (cold, warm) = (
        WordBuffer::new(COLD_BYTES, Pages::Huge),
        WordBuffer::new(threads << 19, Pages::Huge),
    );
    println!("\nG weights/s, share of the bytes read in GB/s");
    for (rows, cols) in [(6912, 2560), (2560, 6912), (4096, 14336), (1024, 2560)] {
        let matrix = matrix(rows, cols);
        let begin = Instant::now();
        let packed = Prepacked::new(&matrix, &pool)?;
        let prepack = (rows * cols) as f64 / begin.elapsed().as_secs_f64();
        let hot = packed.bytes() <= 1 << 20;
        let copies = vec![
            packed.clone();
            if hot {
                1
            } else {
                COLD_BYTES.div_ceil(packed.bytes())
            }
        ];
        for tokens in [1, 4] {
            let (x, mut y) = (activations(&packed, tokens), vec![0.0; tokens * rows]);
            let mut at = 0;
            let call = || {
                kernels.matmul(&pool, &copies[at], &x, None, &mut y);
                at = (at + 1) % copies.len();
            };
            let work = Work {
                amount: (rows * cols) as f64,
                call: Box::new(call),
            };
            let bytes = packed.bytes() as f64 / (rows * cols) as f64;
            let result = against(
                reading(&pool, if hot { warm.words() } else { cold.words() }),
                work,
                bytes,
            );
            println!(
                "{rows:5} × {cols:5} M = {tokens} from {}: {result}",
                if hot { "L2    " } else { "memory" }
            );
        }
        println!("{rows:5} × {cols:5} prepack: {:.2}", prepack / 1e9);
    }

    let Some(instruction) = Instruction::all().find(|i| i.is_int8()) else {
        return Ok(());
    };
    println!("\nG MAC/s, share of {instruction} on registers");
    let packed = Prepacked::new(&matrix(6912, 2560), &pool)?;
    for tokens in [1, 2, 3, 4, 6, 8, 12, 16, 32, 128, 512] {
        let (x, mut y) = (activations(&packed, tokens), vec![0.0; tokens * 6912]);
        let call = || kernels.matmul(&pool, &packed, &x, None, &mut y);
        let work = Work {
            amount: (tokens * 6912 * 2560) as f64,
            call: Box::new(call),
        };
        println!(
            " 6912 ×  2560 M = {tokens:3}: {}",
            against(dots(&pool, instruction), work, 1.0)
        );
    }
    Ok(())
}
