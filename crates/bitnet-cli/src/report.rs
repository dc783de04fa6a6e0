//! What a job made of each tensor: a table for people, a document for programs.

use crate::args::checkpoint::JobArgs;
use crate::print::{Output, Table, bytes, decibels};
use bitnet_checkpoint::job::{Summary, TensorReport};
use bitnet_core::stats::ErrorStats;
use bitnet_formats::output::shard_number;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Checkpoints of more tensors are printed as the tensors with the largest error.
const MOST_TENSORS: usize = 20;
/// How many of them.
const WORST: usize = 10;

/// Sums over the tensors of a report.
pub(crate) struct Totals {
    pub(crate) error: ErrorStats,
    /// How many tensors were quantized.
    pub(crate) quantized: usize,
    /// Bits per weight of the quantized tensors.
    pub(crate) quantized_bits: f64,
    /// Bits per weight of the whole file, header and all.
    pub(crate) file_bits: f64,
}

pub(crate) fn totals(tensors: &[TensorReport], file_bytes: u64) -> Totals {
    let quantized: Vec<&TensorReport> = tensors.iter().filter(|t| t.layout.is_some()).collect();
    let bits = |bytes: u64, weights: u64| bytes as f64 * 8.0 / weights.max(1) as f64;
    Totals {
        error: quantized
            .iter()
            .filter_map(|t| t.error)
            .fold(ErrorStats::default(), ErrorStats::merge),
        quantized: quantized.len(),
        quantized_bits: bits(
            quantized.iter().map(|t| t.bytes).sum(),
            quantized.iter().map(|t| t.weights).sum(),
        ),
        file_bits: bits(file_bytes, tensors.iter().map(|t| t.weights).sum()),
    }
}

/// Prints the tensors, the notes and the totals.
pub(crate) fn print(
    summary: &Summary,
    job_notes: &[String],
    input_bytes: u64,
    args: &JobArgs,
    out: &mut Output,
) {
    let all = args.verbose || summary.tensors.len() <= MOST_TENSORS;
    let totals = totals(&summary.tensors, summary.file_bytes);
    if !args.quiet.quiet {
        if all {
            out.table(&table(summary.tensors.iter()));
        } else {
            let worst = worst(&summary.tensors);
            let count = summary.tensors.len();
            if worst.is_empty() {
                out.line(format!("{count} tensors; --verbose lists them"));
            } else {
                out.table(&table(worst.iter().copied()));
                out.line(format!(
                    "the largest errors of {count} tensors; --verbose lists all"
                ));
            }
        }
        for note in notes(&summary.tensors, all) {
            out.line(format!("note: {note}"));
        }
        for note in job_notes {
            out.line(format!("note: {note}"));
        }
        out.line("");
    }
    let sqnr = (totals.error.count > 0).then(|| totals.error.sqnr_db());
    if totals.quantized > 0 {
        out.line(format!(
            "{} tensors quantized at {:.3} bits per weight{}",
            totals.quantized,
            totals.quantized_bits,
            sqnr.map_or(String::new(), |db| format!(", SQNR {} dB", decibels(db)))
        ));
    }
    let seconds = summary.elapsed.as_secs_f64();
    out.line(format!(
        "{}: {} from {} ({:.3} bits per weight in all, {}), {seconds:.2} s, {:.2} GB/s{}",
        output(summary, args),
        bytes(summary.file_bytes),
        bytes(input_bytes),
        totals.file_bits,
        change(input_bytes, summary.file_bytes),
        summary.input_bytes as f64 / 1e9 / seconds.max(1e-9),
        match summary.resumed {
            0 => String::new(),
            n => format!(", {n} tensors from an interrupted run"),
        },
    ));
    out.document(json!({
        "output": opened(summary, args).display().to_string(),
        "files": summary.files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>(),
        "file_bytes": summary.file_bytes,
        "input_bytes": input_bytes,
        "seconds": seconds,
        "resumed": summary.resumed,
        "notes": job_notes,
        "tensors": summary.tensors.iter().map(tensor_json).collect::<Vec<_>>(),
        "totals": {
            "quantized_tensors": totals.quantized,
            "quantized_bits_per_weight": totals.quantized_bits,
            "bits_per_weight": totals.file_bits,
            "sqnr_db": sqnr,
        },
    }));
}

fn table<'a>(tensors: impl Iterator<Item = &'a TensorReport>) -> Table {
    let mut table = Table::new(&[
        "tensor",
        "became",
        "layout",
        "scales",
        "bits/weight",
        "SQNR dB",
    ]);
    for t in tensors {
        table.row(vec![
            t.name.clone(),
            t.became.clone(),
            t.layout.clone().unwrap_or_default(),
            t.granularity.map(|g| g.to_string()).unwrap_or_default(),
            format!("{:.3}", t.bits_per_weight()),
            t.error.map(|e| decibels(e.sqnr_db())).unwrap_or_default(),
        ]);
    }
    table
}

/// The tensors with the lowest SQNR, the lowest first; those without any error are left out.
fn worst(tensors: &[TensorReport]) -> Vec<&TensorReport> {
    let sqnr = |t: &TensorReport| t.error.map_or(f64::INFINITY, |e| e.sqnr_db());
    let mut worst: Vec<&TensorReport> =
        tensors.iter().filter(|t| sqnr(t) < f64::INFINITY).collect();
    worst.sort_by(|a, b| sqnr(a).total_cmp(&sqnr(b)));
    worst.truncate(WORST);
    worst
}

/// The notes on tensors. Unless `all`, notes with the same text are one line with their number.
fn notes(tensors: &[TensorReport], all: bool) -> Vec<String> {
    let noted = tensors
        .iter()
        .filter_map(|t| Some((t.name.as_str(), t.note.as_deref()?)));
    if all {
        return noted
            .map(|(name, note)| format!("{name}: {note}"))
            .collect();
    }
    let mut names: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, note) in noted {
        names.entry(note).or_default().push(name);
    }
    names
        .iter()
        .map(|(note, names)| match names[..] {
            [name] => format!("{name}: {note}"),
            _ => format!("{} and {} more: {note}", names[0], names.len() - 1),
        })
        .collect()
}

/// What opens the output: the first file of a GGUF set, else what `--out` names.
fn opened<'a>(summary: &'a Summary, args: &'a JobArgs) -> &'a Path {
    let first = summary
        .files
        .first()
        .filter(|f| f.parent() == args.out.parent());
    first.unwrap_or(&args.out)
}

/// The output and the number of its files.
fn output(summary: &Summary, args: &JobArgs) -> String {
    let shard = |file: &&PathBuf| shard_number(file).is_some_and(|(_, count)| count > 1);
    let name = opened(summary, args).display();
    match summary.files.iter().filter(shard).count() {
        count if summary.files.len() > 1 => format!("{name} ({count} files)"),
        _ => name.to_string(),
    }
}

/// How much smaller or larger the output is.
fn change(input_bytes: u64, output_bytes: u64) -> String {
    let ratio = input_bytes as f64 / output_bytes.max(1) as f64;
    if ratio >= 1.005 {
        format!("{ratio:.2} times smaller")
    } else if ratio > 0.995 {
        "as large".into()
    } else {
        format!("{:.2} times larger", 1.0 / ratio.max(f64::MIN_POSITIVE))
    }
}

fn tensor_json(t: &TensorReport) -> Value {
    json!({
        "name": t.name,
        "became": t.became,
        "layout": t.layout,
        "granularity": t.granularity.map(|g| g.to_string()),
        "weights": t.weights,
        "bytes": t.bytes,
        "bits_per_weight": t.bits_per_weight(),
        "sqnr_db": t.error.map(|e| e.sqnr_db()),
        "cosine": t.error.map(|e| e.cosine()),
        "sparsity": t.error.map(|e| e.sparsity()),
        "entropy_bits": t.entropy,
        "note": t.note,
    })
}
