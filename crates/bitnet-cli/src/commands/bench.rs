//! `bitnet bench`: speed of prefill and decode, load time and memory.

use crate::model::BenchArgs;
use crate::print::{Output, Table, bytes};
use crate::{Answer, job};
use bitnet_inference::{Config, Error, Model};
use bitnet_kernels::Pool;
use bitnet_kernels::machine::{Instruction, Memory, Pages, read};
use serde_json::{Value, json};
use std::fs;
use std::hint::black_box;
use std::sync::atomic::Ordering;
use std::time::Instant;

pub(crate) fn run(args: &BenchArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let options = args.load.options()?;
    let begin = Instant::now();
    let (name, model) = match (&args.model, &args.shape) {
        (Some(path), _) => (
            path.display().to_string(),
            Model::load_with(path, &options)?,
        ),
        (None, Some(shape)) => (
            format!("{shape}, synthetic weights"),
            Model::synthetic(Config::shape(shape)?, &options)?,
        ),
        (None, None) => anyhow::bail!("a model or --shape"),
    };
    let load = begin.elapsed().as_secs_f64();
    let (prompt, count) = (args.prompt as usize, args.tokens as usize);
    let vocab = model.config().vocab as u32;
    // Any tokens do: the work depends on their number.
    let tokens: Vec<u32> = (0..args.prompt)
        .map(|i| i.wrapping_mul(2_654_435_761) % vocab)
        .collect();
    let (mut prefill, mut decode, mut ceilings) = (vec![], vec![], None);
    let mut session = model.session(prompt + count, args.load.cache)?;
    let touched = model.bytes_per_token()
        + session.cache_bytes() * (2 * prompt + count) / (2 * (prompt + count));
    let mut peak = None;
    let interrupt = job::interrupt();
    // One turn more, not counted: memory is touched for the first time.
    for turn in 0..=args.repeat {
        session.clear();
        let begin = Instant::now();
        session.prefill(&tokens)?;
        let prefilled = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        for i in 0..args.tokens {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted.into());
            }
            session.decode(i % vocab)?;
        }
        let decoded = begin.elapsed().as_secs_f64();
        // What is read for comparison is not the model's memory.
        peak = peak.or_else(peak_memory);
        let ceilings = match &mut ceilings {
            None => ceilings.insert(Ceilings::new(model.threads(), touched)?),
            Some(ceilings) => ceilings,
        };
        if turn > 0 {
            prefill.push(prompt as f64 / prefilled);
            decode.push(count as f64 / decoded);
            ceilings.turn();
        }
    }
    let (prefill, decode) = (Spread::of(prefill), Spread::of(decode));
    let (read, products) = ceilings.map_or((None, None), |c| {
        (Some(Spread::of(c.read.clone())), c.products())
    });
    let decode_share = read
        .as_ref()
        .map(|read| decode.median * touched as f64 / read.median);
    let integers = model.integer_products(prompt, 1);
    let prefill_share = products
        .as_ref()
        .filter(|_| integers > 0)
        .map(|p| prefill.median / prompt as f64 * integers as f64 / p.median);
    let mut table = Table::new(&["figure", "median", "smallest", "largest"]);
    for (name, s) in [
        (format!("prefill of {prompt}, tokens/s"), &prefill),
        (format!("decode of {count} after it, tokens/s"), &decode),
    ] {
        table.row(vec![
            name,
            format!("{:.2}", s.median),
            format!("{:.2}", s.smallest),
            format!("{:.2}", s.largest),
        ]);
    }
    for (name, s) in [
        ("plain read, GB/s", &read),
        ("int8 multiply-adds in registers, G/s", &products),
    ] {
        if let Some(s) = s {
            let giga = |x: f64| format!("{:.2}", x / 1e9);
            table.row(vec![
                name.into(),
                giga(s.median),
                giga(s.smallest),
                giga(s.largest),
            ]);
        }
    }
    let (threads, isa) = (model.threads(), options.kernels.isa());
    out.line(format!(
        "{name}: {threads} threads, {isa}, {} turns",
        args.repeat
    ));
    out.table(&table);
    if let Some(share) = decode_share {
        let read = bytes(touched as u64);
        out.line(format!(
            "decode: {:.0} % of what a plain read of the {read} that a token touches would allow",
            100.0 * share
        ));
    }
    if let Some(share) = prefill_share {
        out.line(format!("prefill: {:.0} % of the int8 multiply-adds of this machine, the ternary layers' alone counted", 100.0 * share));
    }
    let made = if args.shape.is_some() {
        "making the weights"
    } else {
        "loading"
    };
    out.line(format!("{made}: {load:.2} s"));
    let memory = format!(
        "weights {}, keys and values {}",
        bytes(model.bytes() as u64),
        bytes(session.cache_bytes() as u64)
    );
    out.line(format!(
        "memory: {memory}{}",
        peak.map_or(String::new(), |p| format!(
            ", peak of the process {}",
            bytes(p)
        ))
    ));
    out.document(json!({
        "model": name,
        "threads": threads,
        "isa": isa.to_string(),
        "prompt": prompt,
        "tokens": count,
        "turns": args.repeat,
        "prefill_tokens_per_second": prefill.json(),
        "decode_tokens_per_second": decode.json(),
        "read_bytes_per_second": read.as_ref().map(Spread::json),
        "int8_multiply_adds_per_second": products.as_ref().map(Spread::json),
        "bytes_per_token": touched,
        "int8_multiply_adds_of_prefill": integers,
        "decode_share_of_read": decode_share,
        "prefill_share_of_int8": prefill_share,
        "load_seconds": if args.shape.is_some() { Value::Null } else { json!(load) },
        "weight_bytes": model.bytes(),
        "cache_bytes": session.cache_bytes(),
        "peak_bytes": peak,
    }));
    Ok(Answer::Yes)
}

/// What the machine does at most on as many threads, measured in the turns of the model.
struct Ceilings {
    pool: Pool,
    memory: Memory,
    instruction: Option<Instruction>,
    /// Bytes and multiply-adds per second.
    read: Vec<f64>,
    products: Vec<f64>,
}

impl Ceilings {
    /// Rounds of an instruction in a turn: some milliseconds.
    const ROUNDS: usize = 1_000_000;

    fn new(threads: usize, touched: usize) -> anyhow::Result<Self> {
        let instruction = Instruction::all().find(|i| i.is_int8());
        Ok(Self {
            pool: Pool::new(threads)?,
            memory: Memory::new(touched, Pages::Huge),
            instruction,
            read: vec![],
            products: vec![],
        })
    }

    fn turn(&mut self) {
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

    fn products(&self) -> Option<Spread> {
        (!self.products.is_empty()).then(|| Spread::of(self.products.clone()))
    }
}

/// Figures of several turns.
struct Spread {
    median: f64,
    smallest: f64,
    largest: f64,
}

impl Spread {
    fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let at = |i: usize| figures.get(i).copied().unwrap_or(0.0);
        let (n, last) = (figures.len(), figures.len().saturating_sub(1));
        Self {
            median: (at(last / 2) + at(n / 2)) / 2.0,
            smallest: at(0),
            largest: at(last),
        }
    }

    fn json(&self) -> Value {
        json!({"median": self.median, "smallest": self.smallest, "largest": self.largest})
    }
}

/// The most memory that this process had, where the system says.
fn peak_memory() -> Option<u64> {
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
