//! `bitnet verify`

use crate::args::checkpoint::VerifyArgs;
use crate::print::{Answer, Output, bytes};
use bitnet_checkpoint::verify::{Damage, Verification, verify};
use bitnet_formats::document::KEY;
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;

/// Whether the header, or what is left of it, names our document.
fn carries_document(path: &Path) -> bool {
    let model = path.join("model.safetensors");
    let path = if path.is_dir() { model.as_path() } else { path };
    let mut head = vec![];
    let read =
        std::fs::File::open(path).and_then(|file| file.take(64 << 20).read_to_end(&mut head));
    read.is_ok() && head.windows(KEY.len()).any(|w| w == KEY.as_bytes())
}

pub(crate) fn run(args: &VerifyArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let result = match args.input.open() {
        Ok(source) => verify(&source)?,
        Err(error @ bitnet_formats::Error::Io { .. }) => return Err(error.into()),
        // A file of ours with a broken header is damaged; any other file is bad input.
        Err(error) if !carries_document(&args.input.input) => return Err(error.into()),
        Err(error) => Verification {
            checked: 0,
            bytes: 0,
            damage: vec![Damage {
                part: "header".into(),
                what: error.to_string(),
            }],
        },
    };
    if !args.quiet.quiet {
        for damage in &result.damage {
            out.line(format!("damaged: {}: {}", part(damage), damage.what));
        }
    }
    let path = args.input.input.display();
    match result.damage.len() {
        0 => out.line(format!(
            "{path}: whole: {} stored tensors, {} checked",
            result.checked,
            bytes(result.bytes)
        )),
        n => out.line(format!(
            "{path}: damaged in {n} places of {} stored tensors",
            result.checked
        )),
    }
    out.document(json!({
        "path": path.to_string(),
        "whole": result.damage.is_empty(),
        "checked": result.checked,
        "bytes": result.bytes,
        "damage": result.damage.iter().map(damage_json).collect::<Vec<_>>(),
    }));
    Ok(if result.damage.is_empty() {
        Answer::Yes
    } else {
        Answer::No
    })
}

fn damage_json(damage: &Damage) -> Value {
    json!({"part": damage.part, "what": damage.what})
}

/// The damaged part in words.
fn part(damage: &Damage) -> &str {
    match damage.part.as_str() {
        "document" => "recipe and checksums",
        "metadata" => "metadata of the container",
        name => name,
    }
}
