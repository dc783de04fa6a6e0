//! `bitnet bench`: speed of prefill and decode, load time and memory.

use crate::model::BenchArgs;
use crate::print::{Output, Table, bytes};
use crate::{Answer, job};
use bitnet_inference::{Config, Error, Model};
use serde_json::{Value, json};
use std::fs;
use std::sync::atomic::Ordering;
use std::time::Instant;

pub(crate) fn run(args: &BenchArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let options = args.load.options()?;
    let begin = Instant::now();
    let (name, model) = match (&args.model, &args.shape) {
        (Some(path), _) => (path.display().to_string(), Model::load_with(path, &options)?),
        (None, Some(shape)) => (format!("{shape}, made-up weights"), Model::made_up(Config::shape(shape)?, &options)?),
        (None, None) => anyhow::bail!("a model or --shape"),
    };
    let load = begin.elapsed().as_secs_f64();
    let (prompt, count) = (args.prompt as usize, args.tokens as usize);
    let vocab = model.config().vocab as u32;
    // Any tokens do: the work depends on their number.
    let tokens: Vec<u32> = (0..args.prompt).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let (mut prefill, mut decode) = (vec![], vec![]);
    let mut session = model.session(prompt + count, args.load.cache)?;
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
        if turn > 0 {
            prefill.push(prompt as f64 / prefilled);
            decode.push(count as f64 / begin.elapsed().as_secs_f64());
        }
    }
    let (prefill, decode) = (Spread::of(prefill), Spread::of(decode));
    let mut table = Table::new(&["figure", "median", "smallest", "largest"]);
    for (name, s) in [(format!("prefill of {prompt}, tokens/s"), &prefill), (format!("decode of {count} after it, tokens/s"), &decode)] {
        table.row(vec![name, format!("{:.2}", s.median), format!("{:.2}", s.smallest), format!("{:.2}", s.largest)]);
    }
    let (threads, isa) = (model.threads(), options.kernels.isa());
    out.line(format!("{name}: {threads} threads, {isa}, {} turns", args.repeat));
    out.table(&table);
    let peak = peak_memory();
    let made = if args.shape.is_some() { "making the weights" } else { "loading" };
    out.line(format!("{made}: {load:.2} s"));
    let memory = format!("weights {}, keys and values {}", bytes(model.bytes() as u64), bytes(session.cache_bytes() as u64));
    out.line(format!("memory: {memory}{}", peak.map_or(String::new(), |p| format!(", peak of the process {}", bytes(p)))));
    out.document(json!({
        "model": name,
        "threads": threads,
        "isa": isa.to_string(),
        "prompt": prompt,
        "tokens": count,
        "turns": args.repeat,
        "prefill_tokens_per_second": prefill.json(),
        "decode_tokens_per_second": decode.json(),
        "load_seconds": if args.shape.is_some() { Value::Null } else { json!(load) },
        "weight_bytes": model.bytes(),
        "cache_bytes": session.cache_bytes(),
        "peak_bytes": peak,
    }));
    Ok(Answer::Yes)
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
        Self { median: (at(last / 2) + at(n / 2)) / 2.0, smallest: at(0), largest: at(last) }
    }

    fn json(&self) -> Value {
        json!({"median": self.median, "smallest": self.smallest, "largest": self.largest})
    }
}

/// The most memory that this process had, where the system says.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}
