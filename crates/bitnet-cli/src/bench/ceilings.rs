//! What the machine can do at most, measured between the repetitions of a benchmark.

use bitnet_kernels::Pool;
use bitnet_kernels::machine::{Instruction, Pages, WordBuffer, read};
use serde_json::{Value, json};
use std::fs;
use std::hint::black_box;
use std::time::Instant;

/// Speeds of plain reads and of int8 multiply-adds, on the threads of the model.
pub(crate) struct Ceilings {
    pool: Pool,
    memory: WordBuffer,
    instruction: Option<Instruction>,
    /// Bytes and multiply-adds per second.
    read: Vec<f64>,
    products: Vec<f64>,
}

impl Ceilings {
    /// Rounds of an instruction in a measurement: some milliseconds.
    const ROUNDS: usize = 1_000_000;

    pub(crate) fn new(threads: usize, touched: usize) -> anyhow::Result<Self> {
        let instruction = Instruction::all().find(|i| i.is_int8());
        Ok(Self {
            pool: Pool::new(threads)?,
            memory: WordBuffer::new(touched, Pages::Huge),
            instruction,
            read: vec![],
            products: vec![],
        })
    }

    pub(crate) fn measure(&mut self) {
        let (parts, words) = (self.pool.threads(), self.memory.words());
        // The first read wakes the threads and fills what cache there is.
        for counted in [false, true] {
            let begin = Instant::now();
            self.pool.run(parts, |part| {
                black_box(read(
                    &words[part * words.len() / parts..(part + 1) * words.len() / parts],
                ));
            });
            if counted {
                self.read
                    .push(self.memory.bytes() as f64 / begin.elapsed().as_secs_f64());
            }
        }
        if let Some(instruction) = self.instruction {
            let begin = Instant::now();
            self.pool.run(parts, |_| instruction.run(Self::ROUNDS));
            self.products.push(
                (parts * Self::ROUNDS * instruction.multiply_adds()) as f64
                    / begin.elapsed().as_secs_f64(),
            );
        }
    }

    /// Bytes read per second.
    pub(crate) fn read(&self) -> SpeedRange {
        SpeedRange::new(self.read.clone())
    }

    /// int8 multiply-adds per second, where the processor has instructions for them.
    pub(crate) fn products(&self) -> Option<SpeedRange> {
        (!self.products.is_empty()).then(|| SpeedRange::new(self.products.clone()))
    }
}

/// Median and range of the figures of several repetitions.
#[derive(Debug)]
pub(crate) struct SpeedRange {
    pub(crate) median: f64,
    pub(crate) smallest: f64,
    pub(crate) largest: f64,
}

impl SpeedRange {
    pub(crate) fn new(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let at = |i: usize| figures.get(i).copied().unwrap_or(0.0);
        let (n, last) = (figures.len(), figures.len().saturating_sub(1));
        Self {
            median: (at(last / 2) + at(n / 2)) / 2.0,
            smallest: at(0),
            largest: at(last),
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({"median": self.median, "smallest": self.smallest, "largest": self.largest})
    }
}

/// The largest memory of this process so far, where the system tells it.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kb| kb * 1024)
}
