//! What clap answers instead of a command line: help, the version, or what is wrong in one line.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Error};
use std::io;

/// Whether the error is a request for help or for the version.
pub(crate) fn is_request(error: &Error) -> bool {
    !error.use_stderr() || is_bare(error)
}

/// `bitnet` alone.
fn is_bare(error: &Error) -> bool {
    error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        && std::env::args_os().len() <= 1
}

/// Prints help or the version on stdout.
pub(crate) fn print(error: &Error) -> io::Result<()> {
    if is_bare(error) {
        crate::args::Cli::command().print_help()
    } else {
        error.print()
    }
}

/// What is wrong with the command line in one line: the first paragraph of clap's message, and what
/// was meant.
pub(crate) fn line(error: &Error) -> String {
    if matches!(
        error.kind(),
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        return "a command is missing; see --help".into();
    }
    let text = error.to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.is_empty() && !line.starts_with("Usage:"));
    let line = lines.collect::<Vec<_>>().join(" ");
    let line = line.trim_start_matches("error: ");
    match suggestion(error) {
        Some(name) => format!("{line}; did you mean '{name}'?"),
        None if line.ends_with('?') => line.into(),
        None => format!("{line}; see --help"),
    }
}

/// The command, flag or value that was meant; of several, clap names the most similar last.
fn suggestion(error: &Error) -> Option<String> {
    let kinds = [
        ContextKind::SuggestedSubcommand,
        ContextKind::SuggestedArg,
        ContextKind::SuggestedValue,
    ];
    kinds.iter().find_map(|&kind| match error.get(kind)? {
        ContextValue::String(name) => Some(name.clone()),
        ContextValue::Strings(names) => names.last().cloned(),
        _ => None,
    })
}
