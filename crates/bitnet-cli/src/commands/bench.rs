//! `bitnet bench`: speed of prefill and decode, load time and memory.

use crate::args::model::BenchArgs;
use crate::bench::{SpeedRange, SpeedReport, measure};
use crate::print::{Answer, Output, Table, bytes};
use serde_json::{Value, json};

pub(crate) fn run(args: &BenchArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let measured = measure(args, &args.load.options()?)?;
    print(args, &measured, out);
    out.document(document(args, &measured));
    Ok(Answer::Yes)
}

fn print(args: &BenchArgs, m: &SpeedReport, out: &mut Output) {
    out.line(format!(
        "{}: {} threads, {}, {} repetitions",
        m.name, m.threads, m.isa, args.repeat
    ));
    out.table(&table(args, m));
    out.line(format!(
        "decode: {:.0} % of the speed of a plain read of the {} that a token touches",
        100.0 * m.decode_share,
        bytes(m.bytes_per_token as u64)
    ));
    if let Some(share) = m.prefill_share {
        out.line(format!(
            "prefill: {:.0} % of the int8 multiply-adds of this machine, counting the ternary \
             layers alone",
            100.0 * share
        ));
    }
    let made = match m.made_up {
        true => "making the weights",
        false => "loading",
    };
    out.line(format!("{made}: {:.2} s", m.load_seconds));
    let peak = m.peak_bytes.map_or(String::new(), |p| {
        format!(", peak of the process {}", bytes(p))
    });
    out.line(format!(
        "memory: weights {}, keys and values {}{peak}",
        bytes(m.weight_bytes as u64),
        bytes(m.cache_bytes as u64)
    ));
}

fn table(args: &BenchArgs, m: &SpeedReport) -> Table {
    let (prompt, count) = (args.prompt, args.tokens);
    let mut table = Table::new(&["figure", "median", "smallest", "largest"]);
    let mut row = |name: String, speeds: &SpeedRange, unit: f64| {
        let speeds = [speeds.median, speeds.smallest, speeds.largest];
        let cells = speeds.map(|speed| format!("{:.2}", speed / unit));
        table.row([&[name][..], &cells].concat());
    };
    row(format!("prefill of {prompt}, tokens/s"), &m.prefill, 1.0);
    row(
        format!("decode of {count} after it, tokens/s"),
        &m.decode,
        1.0,
    );
    row("plain read, GB/s".into(), &m.read, 1e9);
    if let Some(products) = &m.products {
        row("int8 multiply-adds in registers, G/s".into(), products, 1e9);
    }
    table
}

fn document(args: &BenchArgs, m: &SpeedReport) -> Value {
    json!({
        "model": m.name,
        "threads": m.threads,
        "isa": m.isa.to_string(),
        "prompt": args.prompt,
        "tokens": args.tokens,
        "turns": args.repeat,
        "prefill_tokens_per_second": m.prefill.json(),
        "decode_tokens_per_second": m.decode.json(),
        "read_bytes_per_second": m.read.json(),
        "int8_multiply_adds_per_second": m.products.as_ref().map(SpeedRange::json),
        "bytes_per_token": m.bytes_per_token,
        "int8_multiply_adds_of_prefill": m.integers,
        "decode_share_of_read": m.decode_share,
        "prefill_share_of_int8": m.prefill_share,
        "load_seconds": if m.made_up { Value::Null } else { json!(m.load_seconds) },
        "weight_bytes": m.weight_bytes,
        "cache_bytes": m.cache_bytes,
        "peak_bytes": m.peak_bytes,
    })
}
