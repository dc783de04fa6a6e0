//! The program `bitnet-benchmarks`. Exit status: 0 done, 1 a contender computes something wrong, 2
//! bad usage or bad input.

mod args;
mod compare;
mod table;

use anyhow::Result;
use args::{Cli, Command};
use bitnet_benchmarks::measure::Wrong;
use bitnet_benchmarks::report;
use bitnet_benchmarks::results::{Document, Target};
use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => return fail(&usage(&error)),
        Err(help) => help.exit(),
    };
    let result = match &cli.command {
        Command::Compare(args) => compare::compare(args),
        Command::Measure(args) => compare::measure(args),
        Command::Report(args) => draw(args),
    };
    result.map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

fn draw(args: &args::ReportArgs) -> Result<()> {
    let document = Document::read(&args.input)?;
    Target::new(&args.output)?.write(&report::html(&document))
}

/// What is wrong with the command line, in one line: clap says it in the first paragraph.
fn usage(error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.is_empty() && !line.starts_with("Usage:"));
    anyhow::anyhow!(
        "{}; see --help",
        lines
            .collect::<Vec<_>>()
            .join(" ")
            .trim_start_matches("error: ")
    )
}

/// One line on stderr, and the exit status.
fn fail(error: &anyhow::Error) -> ExitCode {
    if let Some(compare::Failed(status)) = error.downcast_ref() {
        return ExitCode::from(*status);
    }
    let line: String = format!("{error:#}")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let _ = writeln!(std::io::stderr(), "error: {line}");
    ExitCode::from(if error.is::<Wrong>() { 1 } else { 2 })
}
