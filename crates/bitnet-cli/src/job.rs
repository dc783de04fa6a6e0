//! Runs a job with a progress bar and Ctrl-C, and prints what became of each tensor.

use crate::args::JobArgs;
use crate::print::{Output, Table, bytes, decibels};
use bitnet_checkpoint::job::{self, Existing, Options, Progress, Summary, TensorReport};
use bitnet_checkpoint::recipe::Compute;
use bitnet_checkpoint::recipe::Format;
use bitnet_checkpoint::{Job, Source};
use bitnet_core::stats::ErrorStats;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A progress bar on stderr; invisible where stderr is no terminal.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    pub(crate) fn new(total: u64, quiet: bool) -> Self {
        let target = if quiet {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let style = ProgressStyle::with_template(
            "{bar:30} {percent:>3}%  {decimal_bytes_per_sec}  {eta} left  {wide_msg}",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self(bar)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Progress for Bar {
    fn tensor(&self, name: &str) {
        self.0.set_message(name.to_string());
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

/// Set by the first Ctrl-C; the second one ends the program at once.
pub(crate) fn interrupt() -> &'static AtomicBool {
    static INTERRUPT: AtomicBool = AtomicBool::new(false);
    static HANDLER: OnceLock<()> = OnceLock::new();
    HANDLER.get_or_init(|| {
        // Without a handler Ctrl-C kills the program, and the journal still lets it go on.
        let _ = ctrlc::set_handler(|| {
            if INTERRUPT.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
    });
    &INTERRUPT
}

/// The container that the command line asks for.
pub(crate) fn format(asked: Option<Format>, out: &Path) -> Format {
    asked.unwrap_or(if out.extension().is_some_and(|e| e == "gguf") {
        Format::Gguf
    } else {
        Format::Safetensors
    })
}

/// Calls `f` with a progress bar over `total` bytes, Ctrl-C, and the threads and kernels that flags
/// and configuration ask for.
pub(crate) fn with_options<T>(
    args: &JobArgs,
    compute: &Compute,
    total: u64,
    f: impl FnOnce(&Options<'_>) -> bitnet_checkpoint::Result<T>,
) -> anyhow::Result<T> {
    let bar = Bar::new(total, args.quiet);
    Ok(f(&Options {
        threads: if args.threads > 0 {
            args.threads
        } else {
            compute.threads
        },
        kernels: compute.machine()?.kernels,
        progress: &bar,
        interrupt: interrupt(),
        existing: if args.force {
            Existing::Replace
        } else {
            Existing::Refuse
        },
    })?)
}

pub(crate) fn run(
    job: &Job<'_>,
    source: &Source,
    args: &JobArgs,
    compute: &Compute,
    out: &mut Output,
) -> anyhow::Result<()> {
    let summary = with_options(args, compute, job.input_bytes(), |options| {
        job::run(job, &args.out, options)
    })?;
    print(&summary, job, source, &args.out, out);
    Ok(())
}

/// Sums over the tensors of a report.
pub(crate) struct Totals {
    pub(crate) error: ErrorStats,
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
        quantized_bits: bits(
            quantized.iter().map(|t| t.bytes).sum(),
            quantized.iter().map(|t| t.weights).sum(),
        ),
        file_bits: bits(file_bytes, tensors.iter().map(|t| t.weights).sum()),
    }
}

fn print(summary: &Summary, job: &Job<'_>, source: &Source, path: &Path, out: &mut Output) {
    let mut table = Table::new(&[
        "tensor",
        "became",
        "layout",
        "scales",
        "bits/weight",
        "SQNR dB",
    ]);
    for t in &summary.tensors {
        table.row(vec![
            t.name.clone(),
            t.became.clone(),
            t.layout.clone().unwrap_or_default(),
            t.granularity.map(|g| g.to_string()).unwrap_or_default(),
            format!("{:.3}", t.bits_per_weight()),
            t.error.map(|e| decibels(e.sqnr_db())).unwrap_or_default(),
        ]);
    }
    out.table(&table);
    for t in summary.tensors.iter().filter(|t| t.note.is_some()) {
        out.line(format!(
            "note: {}: {}",
            t.name,
            t.note.as_deref().unwrap_or_default()
        ));
    }
    for note in &job.notes {
        out.line(format!("note: {note}"));
    }
    let totals = totals(&summary.tensors, summary.file_bytes);
    let quantized = summary
        .tensors
        .iter()
        .filter(|t| t.layout.is_some())
        .count();
    let input: u64 = source.files.iter().map(|f| f.len).sum();
    out.line("");
    if quantized > 0 {
        let sqnr = if totals.error.count > 0 {
            format!(", SQNR {} dB", decibels(totals.error.sqnr_db()))
        } else {
            String::new()
        };
        out.line(format!(
            "{quantized} tensors quantized at {:.3} bits per weight{sqnr}",
            totals.quantized_bits
        ));
    }
    let seconds = summary.elapsed.as_secs_f64();
    out.line(format!(
        "{}: {} from {} ({:.3} bits per weight in all, {:.2} times smaller), {seconds:.2} s, {:.2} GB/s{}",
        path.display(),
        bytes(summary.file_bytes),
        bytes(input),
        totals.file_bits,
        input as f64 / summary.file_bytes as f64,
        summary.input_bytes as f64 / 1e9 / seconds.max(1e-9),
        if summary.resumed > 0 { format!(", {} tensors from an interrupted run", summary.resumed) } else { String::new() },
    ));
    out.document(json!({
        "output": path.display().to_string(),
        "file_bytes": summary.file_bytes,
        "input_bytes": input,
        "seconds": seconds,
        "resumed": summary.resumed,
        "notes": job.notes,
        "tensors": summary.tensors.iter().map(tensor_json).collect::<Vec<_>>(),
        "totals": {
            "quantized_tensors": quantized,
            "quantized_bits_per_weight": totals.quantized_bits,
            "bits_per_weight": totals.file_bits,
            "sqnr_db": if totals.error.count > 0 { json!(totals.error.sqnr_db()) } else { Value::Null },
        },
    }));
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
