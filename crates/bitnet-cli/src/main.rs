//! The program `bitnet`. Exit status: 0 done, 1 the answer is no, 2 bad usage or bad input, 130
//! interrupted. Where the reader of stdout has closed it, the program ends quietly.

mod args;
mod bench;
mod commands;
mod demo;
mod generation;
mod job;
mod print;
mod progress;
mod report;
mod target;
#[cfg(feature = "train")]
mod training_bar;
mod usage;

use anyhow::Context;
use args::{Cli, Command};
use clap::Parser;
use print::{Answer, Output};
use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if usage::is_request(&error) => {
            let result = usage::print(&error).context(print::CANNOT_WRITE);
            return status(result.map(|()| Answer::Yes));
        }
        Err(error) => return fail(&anyhow::anyhow!(usage::line(&error))),
    };
    let mut out = Output::new(cli.json);
    status(
        run(&cli.command, &mut out).and_then(|answer| match out.flush() {
            // The answer stands, whether or not somebody reads the figures.
            Err(error) if is_closed_pipe(&error) => Ok(answer),
            written => written.map(|()| answer),
        }),
    )
}

fn run(command: &Command, out: &mut Output) -> anyhow::Result<Answer> {
    match command {
        Command::Quantize(args) => commands::quantize::run(args, out),
        Command::Inspect(args) => commands::inspect::run(args, out),
        Command::Convert(args) => commands::convert::run(args, out),
        Command::Dequantize(args) => commands::dequantize::run(args, out),
        Command::Compare(args) => commands::compare::run(args, out),
        Command::Verify(args) => commands::verify::run(args, out),
        Command::Run(args) => commands::run::run(args, out),
        Command::Chat(args) => commands::chat::run(args, out),
        Command::Embed(args) => commands::embed::run(args, out),
        Command::Perplexity(args) => commands::perplexity::run(args, out),
        Command::Bench(args) => commands::bench::run(args, out),
        #[cfg(feature = "train")]
        Command::Train(args) => commands::train::run(args, out),
        Command::Demo(args) => commands::demo::run(args, out),
        Command::Completions(args) => commands::completions::run(args, out),
        Command::Manual(args) => commands::manual::run(args, out),
    }
}

/// The exit status, after one line on stderr if there is an error.
fn status(result: anyhow::Result<Answer>) -> ExitCode {
    match result {
        Ok(Answer::Yes) => ExitCode::SUCCESS,
        Ok(Answer::No) => ExitCode::from(1),
        // A generation whose reader has read enough.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Only stdout is a pipe that the program writes to.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// One line on stderr, and the exit status.
fn fail(error: &anyhow::Error) -> ExitCode {
    let interrupted = matches!(
        error.downcast_ref(),
        Some(bitnet_checkpoint::Error::Interrupted)
    ) || matches!(
        error.downcast_ref(),
        Some(bitnet_inference::Error::Interrupted)
    );
    // The messages of the crates hold their causes already; a chain would say everything twice.
    // An error of the system has no words of its own around it.
    let cause = match error.downcast_ref::<io::Error>() {
        Some(cause) if cause.to_string() != error.to_string() => format!(": {cause}"),
        _ => String::new(),
    };
    let line = print::printable(&format!("{error}{cause}").replace('\n', " "));
    print::stderr_line(format!("error: {line}"));
    ExitCode::from(if interrupted { 130 } else { 2 })
}
