//! `bitnet demo`: the built-in model through several settings, every figure measured in this run.

use crate::args::DemoArgs;
use crate::demo::{Original, PROMPT, SETTINGS, SettingReport, sample};
use crate::print::{Answer, Output, Table, bytes, decibels, percent};
use crate::progress::bar;
use anyhow::Context;
use bitnet_inference::perplexity::Perplexity;
use serde_json::json;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// Settings whose text is shown beside that of the original.
const SAMPLED: [&str; 3] = ["int4 group:32", "2 trit planes", "ternary optimal"];

pub(crate) fn run(args: &DemoArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let temporary;
    let folder: &Path = match &args.keep {
        Some(path) => {
            create(path)?;
            path
        }
        None => {
            temporary = tempfile::tempdir().context("cannot create a temporary folder")?;
            temporary.path()
        }
    };
    let original = Original::write(folder)?;
    let mut texts = vec![("as it comes", sample(&original.model)?)];
    let mut table = Table::new(&[
        "setting",
        "bits/weight",
        "file kB",
        "SQNR dB",
        "cosine",
        "zeros",
        "sign flips",
        "entropy",
        "bytes proven",
        "perplexity",
        "loss added, nats",
    ]);
    let (mut documents, mut all_whole) = (vec![], true);
    let mut before = Perplexity::default();
    let bar = bar(
        SETTINGS.len() as u64,
        false,
        "{bar:30} {pos}/{len}  {wide_msg}",
    );
    for setting in SETTINGS {
        bar.set_message(setting.name);
        let measured = original.quantize(setting)?;
        table.row(cells(&measured));
        documents.push(measured.json());
        all_whole &= measured.whole;
        before = measured.text.reference;
        if SAMPLED.contains(&setting.name) {
            texts.push((setting.name, sample(&measured.model)?));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    introduce(&original, &before, out);
    out.table(&table);
    out.line("");
    out.line(format!("Generated from \"{PROMPT}\":"));
    for (name, text) in &texts {
        out.line(format!("{name:>16}: {text}"));
    }
    out.document(json!({
        "model": "glassllm-en",
        "original_bytes": original.bytes(),
        "perplexity": before.value(),
        "perplexity_error": before.error(),
        "tokens": before.loss.count(),
        "settings": documents,
    }));
    Ok(if all_whole { Answer::Yes } else { Answer::No })
}

fn create(path: &Path) -> anyhow::Result<()> {
    fs::create_dir(path).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => anyhow::anyhow!(
            "{} exists already; --keep creates a new folder",
            path.display()
        ),
        _ => anyhow::anyhow!("cannot create {}: {error}", path.display()),
    })
}

fn introduce(original: &Original, before: &Perplexity, out: &mut Output) {
    out.line(format!(
        "glassllm-en: 852,608 weights in F16, {}, a llama-style language model. Its 28 linear \
         layers are quantized,",
        bytes(original.bytes())
    ));
    out.line(
        "embedding and norms kept. Figures are of the linear layers, read back from each written \
         file; bits per weight",
    );
    out.line(
        "include scales and padding. GGUF has no block for 341 columns and transformers none for \
         341 rows: those stay F16.",
    );
    out.line(format!(
        "Perplexity is on {} tokens of a novel that the model was not trained on; as it comes \
         {:.1} ± {:.1}. The loss that a",
        before.loss.count(),
        before.value(),
        before.error()
    ));
    out.line(
        "setting adds is measured token by token against the model as it comes, so its error is \
         smaller.",
    );
    out.line("");
}

fn cells(m: &SettingReport) -> Vec<String> {
    let added = &m.text.difference;
    vec![
        m.name.into(),
        format!("{:.3}", m.bits),
        format!("{:.1}", m.file_bytes as f64 / 1e3),
        decibels(m.error.sqnr_db()),
        format!("{:.4}", m.error.cosine()),
        percent(m.error.sparsity()),
        percent(m.error.sign_flip_share()),
        format!("{:.3}", m.entropy),
        if m.whole { "yes" } else { "NO" }.into(),
        format!("{:.1}", m.text.model.value()),
        format!("{:.3} ± {:.3}", added.mean(), added.error()),
    ]
}
