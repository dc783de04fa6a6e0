//! `bitnet compare`

use crate::args::checkpoint::{CompareArgs, GateArgs};
use crate::print::{Answer, Output, Table, decibels, percent, scientific};
use crate::progress::ByteBar;
use bitnet_checkpoint::compare::{Comparison, Scope, TensorComparison, compare};
use bitnet_core::stats::ErrorStats;
use serde_json::{Value, json};

pub(crate) fn run(args: &CompareArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let (original, quantized) = (
        args.open.open(&args.original)?,
        args.open.open(&args.quantized)?,
    );
    let total = original.stored_tensors().iter().map(|s| s.len).sum();
    let bar = ByteBar::new(total, args.quiet.quiet);
    let result = compare(&original, &quantized, &bar)?;
    drop(bar);
    out.table(&table(&result, args.quiet.quiet));
    let failures = gates(&args.gates, &result);
    for failure in &failures {
        out.line(format!("failed: {failure}"));
    }
    out.document(document(&result, &failures));
    Ok(if failures.is_empty() {
        Answer::Yes
    } else {
        Answer::No
    })
}

/// The tensors, unless `totals_alone`, and the totals.
fn table(result: &Comparison, totals_alone: bool) -> Table {
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
    let mut row = |name: &str, stored: &str, bits: f64, e: &ErrorStats, entropy: Option<f64>| {
        table.row(vec![
            name.into(),
            stored.into(),
            format!("{bits:.3}"),
            scientific(e.mse()),
            scientific(e.mae()),
            scientific(e.max_error),
            decibels(e.sqnr_db()),
            format!("{:.5}", e.cosine()),
            percent(e.sparsity()),
            percent(e.sign_flip_share()),
            entropy.map(|h| format!("{h:.3}")).unwrap_or_default(),
        ]);
    };
    for t in result.tensors.iter().filter(|_| !totals_alone) {
        row(
            &t.name,
            &t.stored_as,
            t.bits_per_weight(),
            &t.error,
            t.entropy,
        );
    }
    for (name, scope) in [
        ("quantized tensors", Scope::Quantized),
        ("all tensors", Scope::All),
    ] {
        let error = result.total(scope);
        if scope == Scope::All || error.count > 0 {
            row(name, "", result.bits_per_weight(scope), &error, None);
        }
    }
    table
}

fn document(result: &Comparison, failures: &[String]) -> Value {
    let stats = |e: &ErrorStats| {
        json!({
            "weights": e.count,
            "mse": e.mse(),
            "mae": e.mae(),
            "max_error": e.max_error,
            "sqnr_db": e.sqnr_db(),
            "exact": e.noise == 0.0,
            "cosine": e.cosine(),
            "sparsity": e.sparsity(),
            "sign_flips": e.sign_flip_share(),
        })
    };
    let with = |mut object: Value, more: Value| {
        if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
            object.extend(more);
        }
        object
    };
    let tensor = |t: &TensorComparison| {
        let head = json!({
            "name": t.name,
            "stored_as": t.stored_as,
            "bytes": t.bytes,
            "bits_per_weight": t.bits_per_weight(),
            "entropy_bits": t.entropy,
        });
        with(head, stats(&t.error))
    };
    let total = |scope: Scope| {
        let bits = result.bits_per_weight(scope);
        with(
            json!({"bits_per_weight": bits}),
            stats(&result.total(scope)),
        )
    };
    json!({
        "tensors": result.tensors.iter().map(tensor).collect::<Vec<_>>(),
        "quantized": total(Scope::Quantized),
        "all": total(Scope::All),
        "failed": failures,
    })
}

/// The gates that fail, with tensor, figure and limit.
fn gates(args: &GateArgs, result: &Comparison) -> Vec<String> {
    let mut failures = vec![];
    for t in &result.tensors {
        let mut gate = |limit: Option<f64>, got: f64, name: &str, fails: fn(f64, f64) -> bool| {
            if let Some(limit) = limit.filter(|&limit| fails(got, limit)) {
                failures.push(format!("{}: {name} is {got:.6}, the limit {limit}", t.name));
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
            "quantized tensors: {bits:.6} bits per weight, the limit {limit}"
        ));
    }
    failures
}
