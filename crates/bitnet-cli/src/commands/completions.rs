//! `bitnet completions`

use crate::args::{Cli, CompletionsArgs};
use crate::print::{Answer, Output};
use clap::CommandFactory;

pub(crate) fn run(args: &CompletionsArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let mut script = vec![];
    clap_complete::generate(args.shell, &mut Cli::command(), "bitnet", &mut script);
    out.raw(&script)?;
    Ok(Answer::Yes)
}
