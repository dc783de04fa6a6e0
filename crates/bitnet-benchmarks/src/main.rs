//! The program `bitnet-benchmarks`. Exit status: 0 done, 1 a contender computes a wrong result, 2
//! bad usage or bad input.

mod args;
mod compare;
mod table;

use anyhow::Result;
use args::{BenchmarkArgs, BenchmarkCommand};
use bitnet_benchmarks::measure::WrongResult;
use bitnet_benchmarks::output_file::OutputFile;
use bitnet_benchmarks::report;
use bitnet_benchmarks::results::BenchmarkDocument;
use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match BenchmarkArgs::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => return fail(&usage(&error)),
        Err(help) => help.exit(),
    };
    let result = match &cli.command {
        BenchmarkCommand::Compare(args) => compare::compare(args),
        BenchmarkCommand::Measure(args) => compare::measure(args),
        BenchmarkCommand::Report(args) => draw(args),
    };
    result.map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

fn draw(args: &args::BenchmarkReportArgs) -> Result<()> {
    let document = BenchmarkDocument::read(&args.input)?;
    OutputFile::new(&args.output)?.write(&report::html(&document))
}

/// The first paragraph of a clap error, in one line.
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

/// Prints the error in one line on stderr and returns the exit status.
fn fail(error: &anyhow::Error) -> ExitCode {
    if let Some(compare::FailedProcess(status)) = error.downcast_ref() {
        return ExitCode::from(*status);
    }
    let line: String = format!("{error:#}")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let _ = writeln!(std::io::stderr(), "error: {line}");
    ExitCode::from(if error.is::<WrongResult>() { 1 } else { 2 })
}
