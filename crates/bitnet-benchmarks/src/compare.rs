//! `compare` runs a process for each number of threads and merges their documents; `measure` is
//! what such a process does.

use crate::args::{CompareKernelsArgs, MeasureProcessArgs, SelectionArgs};
use crate::table;
use anyhow::{Context, Result, bail};
use bitnet_benchmarks::ceiling::Ceiling;
use bitnet_benchmarks::machine::{facts, now, processors, working_set};
use bitnet_benchmarks::measure::{self, MeasuringTime};
use bitnet_benchmarks::operations;
use bitnet_benchmarks::output_file::OutputFile;
use bitnet_benchmarks::results::{BenchmarkDocument, CeilingRow, FORMAT, VERSION};
use bitnet_benchmarks::selection::{CaseSelection, OperationGroup, Rivals, WeightShape};
use bitnet_benchmarks::testbed::Testbed;
use bitnet_kernels::Pool;
use std::fmt::Display;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// The process for a number of threads failed with this status and printed the reason.
#[derive(Debug, thiserror::Error)]
#[error("measuring failed with exit status {0}")]
pub(crate) struct FailedProcess(pub(crate) u8);

pub(crate) fn compare(args: &CompareKernelsArgs) -> Result<()> {
    let target = OutputFile::new(&args.output)?;
    let mut threads = args.threads.clone();
    if threads.is_empty() {
        threads.push(1);
        if !args.selection.quick {
            threads.push(processors().min(1024) as u16);
        }
        threads.dedup();
    }
    let mut document: Option<BenchmarkDocument> = None;
    for threads in threads {
        let part = run_process(threads, &args.selection)?;
        match &mut document {
            Some(document) => {
                document.ceilings.extend(part.ceilings);
                document.rows.extend(part.rows);
            }
            None => document = Some(part),
        }
    }
    let mut document = document.context("no number of threads")?;
    document.command = std::env::args().collect();
    target.write(&format!("{:#}\n", serde_json::to_value(&document)?))?;
    let mut out = std::io::stdout().lock();
    match out
        .write_all(table::text(&document).as_bytes())
        .and_then(|()| out.flush())
    {
        // A reader that closes the pipe has seen enough.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Measures with a number of threads in a process of its own, because candle and rayon read that
/// number from the environment once per process.
fn run_process(threads: u16, selection: &SelectionArgs) -> Result<BenchmarkDocument> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("measure")
        .args(["--threads", &threads.to_string()])
        .args(selection.flags());
    for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        command.env(name, threads.to_string());
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    match output.status.code() {
        Some(0) => BenchmarkDocument::parse(std::str::from_utf8(&output.stdout)?),
        Some(status @ 1..=2) => Err(FailedProcess(status as u8).into()),
        _ => bail!(
            "measuring with {threads} thread(s) ended with {}",
            output.status
        ),
    }
}

/// A flag with its values, unless there are none.
fn flag<T: Display>(name: &str, values: impl IntoIterator<Item = T>) -> Vec<String> {
    let values: Vec<_> = values.into_iter().map(|v| v.to_string()).collect();
    if values.is_empty() {
        vec![]
    } else {
        vec![name.into(), values.join(",")]
    }
}

/// `given`, or the default where it is empty.
fn given_or<T: Clone>(given: &[T], default: &[T]) -> Vec<T> {
    if given.is_empty() { default } else { given }.to_vec()
}

impl SelectionArgs {
    /// These arguments as flags of a command line.
    fn flags(&self) -> Vec<String> {
        let mut flags = [
            flag("--operations", &self.operations),
            flag("--shapes", &self.shapes),
            flag("--tokens", &self.tokens),
            flag("--working-set", self.working_set),
            flag("--turns", self.turns),
        ]
        .concat();
        flags.extend(self.no_rivals.then(|| "--no-rivals".into()));
        flags.extend(self.quick.then(|| "--quick".into()));
        flags
    }

    fn selection(&self) -> CaseSelection {
        // Two layers of BitNet 2B-4T, the second of which L2 holds, and a larger layer.
        let gemv = [
            WeightShape::new(6912, 2560),
            WeightShape::new(1024, 2560),
            WeightShape::new(4096, 14336),
        ];
        let tokens: &[u32] = if self.quick {
            &[4, 128]
        } else {
            &[4, 16, 128, 512]
        };
        CaseSelection {
            groups: given_or(&self.operations, OperationGroup::ALL),
            gemv: given_or(&self.shapes, if self.quick { &gemv[..2] } else { &gemv }),
            gemm: given_or(&self.shapes, &gemv[..1]),
            tokens: given_or(&self.tokens, tokens)
                .into_iter()
                .map(|m| m as usize)
                .collect(),
            rivals: if self.no_rivals {
                Rivals::None
            } else {
                Rivals::All
            },
        }
    }
}

pub(crate) fn measure(args: &MeasureProcessArgs) -> Result<()> {
    let selection = &args.selection;
    let mut time = if selection.quick {
        MeasuringTime::QUICK
    } else {
        MeasuringTime::FULL
    };
    time.turns = selection.turns.map_or(time.turns, |turns| turns as usize);
    let working_set = match selection.working_set {
        Some(mib) => mib as usize * (1 << 20),
        None if selection.quick => working_set() / 4,
        None => working_set(),
    };
    let plan = operations::plan(&selection.selection())?;
    let threads = usize::from(args.threads);
    let testbed = Testbed::new(Arc::new(Pool::new(threads)?), working_set);
    let mut document = BenchmarkDocument {
        format: FORMAT.into(),
        version: VERSION,
        program: format!("bitnet-benchmarks {}", env!("CARGO_PKG_VERSION")),
        date: now(),
        command: std::env::args().collect(),
        machine: facts(),
        turns: time.turns,
        working_set_bytes: working_set,
        ceilings: vec![],
        rows: vec![],
    };
    progress(threads, "the machine");
    let ceilings = Ceiling::all();
    let rates = measure::ceilings(&testbed, &ceilings, &time);
    let row = |(ceiling, rate): (Ceiling, _)| CeilingRow {
        name: ceiling.to_string(),
        threads,
        unit: ceiling.unit(),
        rate,
    };
    document.ceilings = ceilings.into_iter().zip(rates).map(row).collect();
    for planned in plan {
        progress(threads, &format!("{planned:?}"));
        let mut case = planned.make(&testbed)?;
        let rows = measure::case(&mut case, &testbed, &time)?;
        document.rows.extend(rows);
    }
    serde_json::to_writer(std::io::stdout().lock(), &document)?;
    Ok(())
}

/// Prints what is measured now. A stderr that cannot be written is no error.
fn progress(threads: usize, what: &str) {
    let _ = writeln!(std::io::stderr(), "{threads} thread(s): {what}");
}
