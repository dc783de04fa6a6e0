//! `bitnet compare`

use crate::Answer;
use crate::args::CompareArgs;
use crate::job::Bar;
use crate::print::{Output, Table, decibels, percent, scientific};
use bitnet_checkpoint::compare::{Comparison, Scope, compare};
use bitnet_core::stats::ErrorStats;
use serde_json::{Value, json};

pub(crate) fn run(args: &CompareArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let (original, quantized) = (
        args.open.open(&args.original)?,
        args.open.open(&args.quantized)?,
    );
    let bar = Bar::new(original.stored_tensors().iter().map(|s| s.len).sum(), false);
    let result = compare(&original, &quantized, &bar)?;
    drop(bar);
    let mut table = Table::new(&[
        "tensor",
        "stored as",
        "bits/weight",
        "MSE",
        "MAE",
        "max error",
        "SQNR dB",
        "cosine",
        "zeros",
        "sign flips",
        "entropy",
    ]);
    let row = |name: String, stored: String, bits: f64, e: &ErrorStats, entropy: Option<f64>| {
        vec![
            name,
            stored,
            format!("{bits:.3}"),
            scientific(e.mse()),
            scientific(e.mae()),
            scientific(e.max_error),
            decibels(e.sqnr_db()),
            format!("{:.5}", e.cosine()),
            percent(e.sparsity()),
            percent(e.sign_flip_share()),
            entropy.map(|h| format!("{h:.3}")).unwrap_or_default(),
        ]
    };
    for t in &result.tensors {
        table.row(row(
            t.name.clone(),
            t.stored_as.clone(),
            t.bits_per_weight(),
            &t.error,
            t.entropy,
        ));
    }
    let (low, all) = (result.total(Scope::Quantized), result.total(Scope::All));
    if low.count > 0 {
        table.row(row(
            "quantized tensors".into(),
            String::new(),
            result.bits_per_weight(Scope::Quantized),
            &low,
            None,
        ));
    }
    table.row(row(
        "all tensors".into(),
        String::new(),
        result.bits_per_weight(Scope::All),
        &all,
        None,
    ));
    out.table(&table);
    let failures = gates(args, &result);
    for failure in &failures {
        out.line(format!("failed: {failure}"));
    }
    let stats = |e: &ErrorStats| {
        json!({
            "weights": e.count, "mse": e.mse(), "mae": e.mae(), "max_error": e.max_error, "sqnr_db": e.sqnr_db(),
            "exact": e.noise == 0.0, "cosine": e.cosine(), "sparsity": e.sparsity(), "sign_flips": e.sign_flip_share(),
        })
    };
    let with = |mut object: Value, more: Value| {
        if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
            object.extend(more);
        }
        object
    };
    out.document(json!({
        "tensors": result.tensors.iter().map(|t| with(
            json!({"name": t.name, "stored_as": t.stored_as, "bytes": t.bytes, "bits_per_weight": t.bits_per_weight(), "entropy_bits": t.entropy}),
            stats(&t.error),
        )).collect::<Vec<_>>(),
        "quantized": with(json!({"bits_per_weight": result.bits_per_weight(Scope::Quantized)}), stats(&low)),
        "all": with(json!({"bits_per_weight": result.bits_per_weight(Scope::All)}), stats(&all)),
        "failed": failures,
    }));
    Ok(if failures.is_empty() {
        Answer::Yes
    } else {
        Answer::No
    })
}

/// What each gate has against each tensor.
fn gates(args: &CompareArgs, result: &Comparison) -> Vec<String> {
    let mut failures = vec![];
    for t in &result.tensors {
        let mut gate = |limit: Option<f64>, got: f64, name: &str, fails: fn(f64, f64) -> bool| {
            if let Some(limit) = limit.filter(|&limit| fails(got, limit)) {
                failures.push(format!("{}: {name} {got:.6} against {limit}", t.name));
            }
        };
        gate(
            args.min_sqnr,
            t.error.sqnr_db(),
            "SQNR in dB",
            |got, limit| got < limit || got.is_nan(),
        );
        gate(args.min_cosine, t.error.cosine(), "cosine", |got, limit| {
            got < limit || got.is_nan()
        });
        gate(args.max_mse, t.error.mse(), "MSE", |got, limit| {
            got > limit || got.is_nan()
        });
        gate(
            args.max_sign_flips,
            t.error.sign_flip_share(),
            "share of sign flips",
            |got, limit| got > limit,
        );
    }
    let bits = result.bits_per_weight(Scope::Quantized);
    if let Some(limit) = args.max_bpw.filter(|&limit| bits > limit) {
        failures.push(format!(
            "quantized tensors: {bits:.6} bits per weight against {limit}"
        ));
    }
    failures
}
