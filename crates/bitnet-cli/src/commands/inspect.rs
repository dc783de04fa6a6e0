//! `bitnet inspect`

use crate::args::checkpoint::InspectArgs;
use crate::print::{Answer, Output, Table, bytes, shape};
use bitnet_checkpoint::inspect::{Finding, TensorSummary, lint, opened_by, tensors};
use bitnet_kernels::Kernels;
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub(crate) fn run(args: &InspectArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let source = args.input.open()?;
    let tensors = tensors(&source);
    let findings = if args.headers {
        vec![]
    } else {
        lint(&source, Kernels::from_env()?)?
    };
    if !args.quiet.quiet {
        out.table(&table(&tensors));
        out.line("");
    }
    let file_bytes: u64 = source.files().iter().map(|f| f.len).sum();
    let weights: u64 = tensors.iter().map(|t| t.weights()).sum();
    let file_bits = file_bytes as f64 * 8.0 / weights.max(1) as f64;
    let low: Vec<_> = tensors.iter().filter(|t| t.spec.is_some()).collect();
    let low_weights: u64 = low.iter().map(|t| t.weights()).sum();
    let low_bits =
        low.iter().map(|t| t.bytes).sum::<u64>() as f64 * 8.0 / low_weights.max(1) as f64;
    if !low.is_empty() {
        out.line(format!(
            "{} quantized tensors, {low_weights} weights at {low_bits:.3} bits",
            low.len()
        ));
    }
    out.line(format!(
        "{}: {} tensors, {weights} weights, {}, {file_bits:.3} bits per weight in all",
        args.input.input.display(),
        tensors.len(),
        bytes(file_bytes)
    ));
    if let Some(document) = source.document() {
        out.line(format!("written by {}", document.generator));
    }
    if let Some(bitnet) = source.bitnet() {
        out.line(format!(
            "quantization_config: {} ({:?})",
            bitnet.linear_class.name(),
            bitnet.mode
        ));
    }
    let programs = opened_by(&source);
    match programs.iter().next() {
        Some((program, types)) if programs.len() == 1 => {
            let types: Vec<_> = types.iter().copied().collect();
            out.line(format!("opened by {program} (types {})", types.join(", ")));
        }
        Some(_) => {
            let names: Vec<_> = programs.keys().copied().collect();
            out.line(format!(
                "opened by no one program: types of {}",
                names.join(", of ")
            ));
        }
        None => {}
    }
    for note in source.notes() {
        out.line(format!("note: {note}"));
    }
    if args.quiet.quiet {
        let mut counts = BTreeMap::new();
        for f in &findings {
            *counts.entry(title(f.check)).or_insert(0) += 1;
        }
        for (title, count) in counts {
            out.line(format!("{title}: {count} findings"));
        }
    } else {
        for f in &findings {
            out.line(format!("{}: {}: {}", title(f.check), f.tensor, f.what));
        }
    }
    out.document(json!({
        "path": args.input.input.display().to_string(),
        "file_bytes": file_bytes,
        "weights": weights,
        "bits_per_weight": file_bits,
        "quantized_weights": low_weights,
        "quantized_bits_per_weight": if low.is_empty() { None } else { Some(low_bits) },
        "generator": source.document().map(|d| &d.generator),
        "recipe": source.document().map(|d| &d.recipe),
        "opened_by": programs,
        "notes": source.notes(),
        "linear_class": source.bitnet().map(|b| b.linear_class.name()),
        "tensors": tensors.iter().map(|t| json!({
            "name": t.name,
            "shape": t.shape,
            "stored_as": t.stored_as,
            "precision": t.spec.as_ref().map(|s| s.precision.name()),
            "planes": t.spec.as_ref().map(|s| s.planes),
            "granularity": t.spec.as_ref().map(|s| s.granularity.to_string()),
            "transposed": t.transposed,
            "bytes": t.bytes,
            "bits_per_weight": t.bits_per_weight(),
        })).collect::<Vec<_>>(),
        "findings": (!args.headers).then(|| findings.iter().map(finding_json).collect::<Vec<_>>()),
    }));
    Ok(Answer::Yes)
}

fn finding_json(f: &Finding) -> Value {
    json!({"tensor": f.tensor, "check": f.check, "what": f.what})
}

fn table(tensors: &[TensorSummary]) -> Table {
    let mut table = Table::new(&[
        "tensor",
        "shape",
        "stored as",
        "precision",
        "scales",
        "bytes",
        "bits/weight",
    ]);
    for t in tensors {
        let spec = t.spec.as_ref();
        let precision = spec.map(|s| {
            if s.planes > 1 {
                format!("{} × {}", s.planes, s.precision)
            } else {
                s.precision.to_string()
            }
        });
        table.row(vec![
            t.name.clone(),
            shape(&t.shape),
            t.stored_as.clone(),
            precision.unwrap_or_default(),
            spec.map(|s| match t.transposed {
                true => format!("{}, [in, out]", s.granularity),
                false => s.granularity.to_string(),
            })
            .unwrap_or_default(),
            t.bytes.to_string(),
            format!("{:.3}", t.bits_per_weight()),
        ]);
    }
    table
}

/// A check of [`lint`] in words.
fn title(check: &str) -> &str {
    match check {
        "dead" => "all zero",
        "not-finite" => "not finite",
        "already-ternary" => "ternary already",
        "already-quantized" => "quantized already",
        "corrupt" => "damaged",
        "scale" => "doubtful scale",
        "k" => "columns",
        "tied" => "tied head",
        other => other,
    }
}
