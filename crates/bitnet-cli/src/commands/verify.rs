//! `bitnet verify`

use crate::Answer;
use crate::args::VerifyArgs;
use crate::print::{Output, bytes};
use bitnet_quant::Source;
use bitnet_quant::verify::{Damage, Verification, verify};
use serde_json::json;

pub(crate) fn run(args: &VerifyArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let result = match Source::open(&args.input) {
        Ok(source) => verify(&source)?,
        Err(error @ bitnet_formats::Error::Io { .. }) => return Err(error.into()),
        // A header that does not hold together is damage as much as a wrong byte is.
        Err(error) => Verification { checked: 0, bytes: 0, damage: vec![Damage { part: "header".into(), what: error.to_string() }] },
    };
    for damage in &result.damage {
        out.line(format!("damaged: {}: {}", damage.part, damage.what));
    }
    let path = args.input.display();
    match result.damage.len() {
        0 => out.line(format!("{path}: whole: {} stored tensors, {} checked", result.checked, bytes(result.bytes))),
        n => out.line(format!("{path}: damaged in {n} places of {} stored tensors", result.checked)),
    }
    out.document(json!({
        "path": path.to_string(),
        "whole": result.damage.is_empty(),
        "checked": result.checked,
        "bytes": result.bytes,
        "damage": result.damage.iter().map(|d| json!({"part": d.part, "what": d.what})).collect::<Vec<_>>(),
    }));
    Ok(if result.damage.is_empty() { Answer::Yes } else { Answer::No })
}
