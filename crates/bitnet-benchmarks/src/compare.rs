//! `compare`: a process for each number of threads, whose documents become one.

use crate::args::{CompareArgs, MeasureArgs, WhatArgs};
use crate::table;
use anyhow::{Context, Result, bail};
use bitnet_benchmarks::machine::{Ceiling, Machine, facts, now, processors, working_set};
use bitnet_benchmarks::measure::{self, Effort};
use bitnet_benchmarks::operations::{self, Group, Rivals, Selection, Shape};
use bitnet_benchmarks::results::{CeilingRow, Document, FORMAT, Target, VERSION};
use bitnet_kernels::Pool;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// The process for a number of threads failed with this status and said why.
#[derive(Debug, thiserror::Error)]
#[error("measuring failed with exit status {0}")]
pub(crate) struct Failed(pub(crate) u8);

pub(crate) fn compare(args: &CompareArgs) -> Result<()> {
    let target = Target::new(&args.output)?;
    let mut threads: Vec<u16> = args.threads.clone();
    if threads.is_empty() {
        threads = vec![
            1,
            if args.what.quick {
                1
            } else {
                processors().min(1024) as u16
            },
        ];
        threads.dedup();
    }
    let mut document: Option<Document> = None;
    for threads in threads {
        let part = in_its_own_process(threads, &args.what)?;
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
        // Whoever reads our output has seen enough.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// candle and rayon take their number of threads from the environment, once for a process.
fn in_its_own_process(threads: u16, what: &WhatArgs) -> Result<Document> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("measure")
        .args(["--threads", &threads.to_string()])
        .args(what.flags());
    for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        command.env(name, threads.to_string());
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    match output.status.code() {
        Some(0) => Document::parse(std::str::from_utf8(&output.stdout)?),
        Some(status @ 1..=2) => Err(Failed(status as u8).into()),
        _ => bail!(
            "measuring with {threads} thread(s) ended with {}",
            output.status
        ),
    }
}

impl WhatArgs {
    /// The flags that say the same.
    fn flags(&self) -> Vec<String> {
        let list = |name: &str, values: Vec<String>| {
            if values.is_empty() {
                vec![]
            } else {
                vec![name.into(), values.join(",")]
            }
        };
        let mut flags = list(
            "--operations",
            self.operations.iter().map(ToString::to_string).collect(),
        );
        flags.extend(list(
            "--shapes",
            self.shapes.iter().map(ToString::to_string).collect(),
        ));
        flags.extend(list(
            "--tokens",
            self.tokens.iter().map(ToString::to_string).collect(),
        ));
        flags.extend(list(
            "--working-set",
            self.working_set.iter().map(ToString::to_string).collect(),
        ));
        flags.extend(list(
            "--turns",
            self.turns.iter().map(ToString::to_string).collect(),
        ));
        flags.extend(self.no_rivals.then(|| "--no-rivals".into()));
        flags.extend(self.quick.then(|| "--quick".into()));
        flags
    }

    fn selection(&self) -> Selection {
        let or = |given: &[Shape], default: &[Shape]| {
            if given.is_empty() {
                default.to_vec()
            } else {
                given.to_vec()
            }
        };
        // A layer of BitNet 2B-4T, a larger one, and one that L2 holds.
        let gemv = [
            Shape::new(6912, 2560),
            Shape::new(1024, 2560),
            Shape::new(4096, 14336),
        ];
        let tokens: &[usize] = if self.quick {
            &[4, 128]
        } else {
            &[4, 16, 128, 512]
        };
        Selection {
            groups: if self.operations.is_empty() {
                Group::ALL.to_vec()
            } else {
                self.operations.clone()
            },
            gemv: or(&self.shapes, if self.quick { &gemv[..2] } else { &gemv }),
            gemm: or(&self.shapes, &gemv[..1]),
            tokens: if self.tokens.is_empty() {
                tokens.to_vec()
            } else {
                self.tokens.iter().map(|&m| m as usize).collect()
            },
            rivals: if self.no_rivals {
                Rivals::None
            } else {
                Rivals::All
            },
        }
    }
}

pub(crate) fn measure(args: &MeasureArgs) -> Result<()> {
    let what = &args.what;
    let mut effort = if what.quick {
        Effort::QUICK
    } else {
        Effort::FULL
    };
    effort.turns = what.turns.map_or(effort.turns, |turns| turns as usize);
    let working_set = match what.working_set {
        Some(mib) => mib as usize * (1 << 20),
        None if what.quick => working_set() / 4,
        None => working_set(),
    };
    let plan = operations::plan(&what.selection())?;
    let threads = usize::from(args.threads);
    let machine = Machine::new(Arc::new(Pool::new(threads)?), working_set);
    let mut document = Document {
        format: FORMAT.into(),
        version: VERSION,
        program: format!("bitnet-benchmarks {}", env!("CARGO_PKG_VERSION")),
        date: now(),
        command: std::env::args().collect(),
        machine: facts(),
        turns: effort.turns,
        working_set_bytes: working_set,
        ceilings: vec![],
        rows: vec![],
    };
    progress(threads, "the machine");
    let ceilings = Ceiling::all();
    let rates = measure::ceilings(&machine, &ceilings, &effort);
    let row = |(ceiling, rate): (Ceiling, _)| CeilingRow {
        name: ceiling.to_string(),
        threads,
        unit: ceiling.unit(),
        rate,
    };
    document.ceilings = ceilings.into_iter().zip(rates).map(row).collect();
    for planned in plan {
        progress(threads, &format!("{planned:?}"));
        document.rows.extend(measure::case(
            &mut planned.make(&machine)?,
            &machine,
            &effort,
        )?);
    }
    serde_json::to_writer(std::io::stdout().lock(), &document)?;
    Ok(())
}

/// Who waits wants to know for what; nobody has to read it.
fn progress(threads: usize, what: &str) {
    let _ = writeln!(std::io::stderr(), "{threads} thread(s): {what}");
}
