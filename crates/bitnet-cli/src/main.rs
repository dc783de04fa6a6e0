//! The program `bitnet`. Exit status: 0 done, 1 the answer is no, 2 bad usage or bad input, 130
//! interrupted.

mod args;
mod commands;
mod job;
mod model;
mod print;
#[cfg(feature = "train")]
mod train;

use args::{Cli, Command};
use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

/// What a command that ran to its end answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Done, or yes.
    Yes,
    /// A gate failed, or the file is damaged.
    No,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => return fail(&usage(&error)),
        Err(help) => help.exit(),
    };
    let mut out = print::Output::new(cli.json);
    let result = match &cli.command {
        Command::Quantize(args) => commands::quantize::run(args, &mut out),
        Command::Inspect(args) => commands::inspect::run(args, &mut out),
        Command::Convert(args) => commands::convert::run(args, &mut out),
        Command::Dequantize(args) => commands::dequantize::run(args, &mut out),
        Command::Compare(args) => commands::compare::run(args, &mut out),
        Command::Verify(args) => commands::verify::run(args, &mut out),
        Command::Run(args) => commands::run::run(args, &mut out),
        Command::Chat(args) => commands::chat::run(args, &mut out),
        Command::Perplexity(args) => commands::perplexity::run(args, &mut out),
        Command::Bench(args) => commands::bench::run(args, &mut out),
        #[cfg(feature = "train")]
        Command::Train(args) => commands::train::run(args, &mut out),
        Command::Demo(args) => commands::demo::run(args, &mut out),
    };
    match result {
        Ok(answer) => match out.flush() {
            Ok(()) if answer == Answer::Yes => ExitCode::SUCCESS,
            Ok(()) => ExitCode::from(1),
            // Whoever reads our output has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                ExitCode::from(u8::from(answer == Answer::No))
            }
            Err(error) => fail(&error.into()),
        },
        Err(error) => fail(&error),
    }
}

/// What is wrong with the command line, in one line: clap says it in the first paragraph.
fn usage(error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.is_empty() && !line.starts_with("Usage:"));
    let line = lines.collect::<Vec<_>>().join(" ");
    anyhow::anyhow!("{}; see --help", line.trim_start_matches("error: "))
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
    let line = print::printable(&error.to_string().replace('\n', " "));
    let _ = writeln!(std::io::stderr(), "error: {line}");
    ExitCode::from(if interrupted { 130 } else { 2 })
}
