//! `bitnet manual`: a page for the program and one for each command.

use crate::args::{Cli, ManualArgs};
use crate::print::{Answer, Output};
use anyhow::Context;
use bitnet_formats::replace::write_file;
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use serde_json::json;
use std::fs;
use std::path::Path;

pub(crate) fn run(args: &ManualArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let folder = &args.folder;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let mut names = vec![];
    write(&program, folder, &mut names)?;
    out.line(format!("{}: {} pages", folder.display(), names.len()));
    out.document(json!({"folder": folder.display().to_string(), "pages": names}));
    Ok(Answer::Yes)
}

/// Writes the pages of a command and of all below it.
fn write(command: &Command, folder: &Path, names: &mut Vec<String>) -> anyhow::Result<()> {
    let page = Man::new(command.clone());
    let name = page.get_filename();
    let mut text = vec![];
    page.render(&mut text)?;
    write_file(&folder.join(&name), &text)?;
    names.push(name);
    for below in command.get_subcommands() {
        write(below, folder, names)?;
    }
    Ok(())
}
