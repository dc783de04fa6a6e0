//! `bitnet demo`: the built-in model through several settings, every figure measured in this run.

use crate::args::DemoArgs;
use crate::print::{Output, Table, decibels, percent};
use crate::{Answer, job};
use anyhow::Context;
use bitnet_checkpoint::compare::{Scope, compare};
use bitnet_checkpoint::job::{Existing, Options};
use bitnet_checkpoint::verify::verify;
use bitnet_checkpoint::{Job, Recipe, Source};
use bitnet_core::stats::ErrorStats;
use bitnet_inference::perplexity::{Perplexity, Windows, perplexity};
use bitnet_inference::{CacheType, GenerateOptions, LoadOptions, Model};
use bitnet_kernels::Kernels;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// The model of assets/glassllm-en, so that the program needs no file.
const MODEL: &[(&str, &[u8])] = &[
    (
        "config.json",
        include_bytes!("../../../../assets/glassllm-en/config.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../../../assets/glassllm-en/model.safetensors"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../../../assets/glassllm-en/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../../../assets/glassllm-en/tokenizer_config.json"),
    ),
    (
        "LICENSE",
        include_bytes!("../../../../assets/glassllm-en/LICENSE"),
    ),
];

/// Settings: what the table calls them, the ending of the file (none for a folder, which is a
/// model), and the recipe.
const SETTINGS: &[(&str, &str, &str)] = &[
    ("int8", "", "default = {precision = 'int8'}"),
    (
        "int4 group:32",
        "",
        "default = {precision = 'int4', granularity = 'group:32', scale_dtype = 'f16', clip = 'search'}",
    ),
    (
        "int3 group:64",
        "",
        "default = {precision = 'int3', granularity = 'group:64', scale_dtype = 'f16', clip = 'search'}",
    ),
    (
        "int2 group:64",
        "",
        "default = {precision = 'int2', granularity = 'group:64', scale_dtype = 'f16', clip = 'search'}",
    ),
    (
        "3 trit planes",
        "",
        "default = {planes = 3, granularity = 'group:128', scale_dtype = 'f16', layout = 'base-3'}",
    ),
    (
        "2 trit planes",
        "",
        "default = {planes = 2, granularity = 'group:128', scale_dtype = 'f16', layout = 'base-3'}",
    ),
    (
        "ternary absmean, one scale (b1.58)",
        "",
        "default = {threshold = 'absmean', granularity = 'tensor'}",
    ),
    ("ternary absmean", "", "default = {threshold = 'absmean'}"),
    ("ternary mean (TWN)", "", "default = {threshold = 'mean'}"),
    ("ternary median", "", "default = {threshold = 'median'}"),
    ("ternary adaptive", "", "default = {threshold = 'adaptive'}"),
    ("ternary optimal", "", "default = {threshold = 'optimal'}"),
    (
        "ternary optimal, base-3",
        "",
        "default = {threshold = 'optimal', layout = 'base-3'}",
    ),
    (
        "ternary optimal, smallest layout",
        "",
        "default = {threshold = 'optimal', granularity = 'tensor', layout = 'auto'}",
    ),
    ("ternary for HF transformers", "", "format = 'hf-bitnet'"),
    (
        "ternary for llama.cpp (GGUF)",
        ".gguf",
        "format = 'gguf'\ndefault = {threshold = 'optimal'}",
    ),
    ("binary", "", "default = {precision = 'binary'}"),
];

/// What the model is measured on: the beginning of a book that it was trained on.
const TEXT: &str = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice she had \
peeped into the book her sister was reading, but it had no pictures or conversations in it, \"and what is the use of a book,\" thought Alice \"without \
pictures or conversations?\" So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether \
the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran \
close by her. There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit say to itself, \"Oh \
dear! Oh dear! I shall be late!\"";

/// What it goes on with, and which settings are shown doing so besides the model as it comes.
const PROMPT: &str = "Alice looked at the Queen, and";
const SPEAKERS: [&str; 3] = ["int4 group:32", "2 trit planes", "ternary optimal"];

/// The perplexity of the text under a checkpoint, with tokens from the model as it comes.
fn measure(path: &Path, tokens: &[u32]) -> anyhow::Result<(Model, Perplexity)> {
    let model = Model::load_with(
        path,
        &LoadOptions {
            kernels: Kernels::from_env()?,
            ..LoadOptions::default()
        },
    )?;
    let context = model.config().context;
    let windows = Windows {
        context,
        stride: context / 2,
        cache: CacheType::F16,
    };
    let result = perplexity(
        &model,
        tokens,
        &windows,
        &|_, _| (),
        &AtomicBool::new(false),
    )?;
    Ok((model, result))
}

/// What a model goes on with, in one line.
fn speak(model: &Model) -> anyhow::Result<String> {
    let options = GenerateOptions {
        max_tokens: 32,
        ..GenerateOptions::default()
    };
    let tokens: Vec<_> = model
        .generate(PROMPT, &options)?
        .collect::<Result<_, _>>()?;
    Ok(tokens
        .iter()
        .map(|t| t.text.as_str())
        .collect::<String>()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" "))
}

pub(crate) fn run(args: &DemoArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let temporary;
    let folder: &Path = match &args.keep {
        Some(path) => {
            fs::create_dir(path)
                .map_err(|e| anyhow::anyhow!("cannot create {}: {e}", path.display()))?;
            path
        }
        None => {
            temporary = tempfile::tempdir().context("cannot create a temporary folder")?;
            temporary.path()
        }
    };
    let model = folder.join("glassllm-en");
    fs::create_dir(&model)?;
    for (name, bytes) in MODEL {
        fs::write(model.join(name), bytes).with_context(|| format!("cannot write {name}"))?;
    }
    let source = Source::open(&model)?;
    let original_bytes: u64 = source.files().iter().map(|f| f.len).sum();
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
    ]);
    let mut lines = vec![];
    let original = Model::load(&model)?;
    let tokens = original.tokenizer()?.encode(TEXT, true)?;
    let (_, before) = measure(&model, &tokens)?;
    let mut texts = vec![("as it comes", speak(&original)?)];
    let kernels = Kernels::from_env()?;
    for (i, (name, ending, recipe)) in SETTINGS.iter().enumerate() {
        let target = folder.join(format!("{i:02}{ending}"));
        let recipe = Recipe::from_toml(recipe)?;
        let plan = Job::quantize(&source, &recipe, &target)?;
        let options = Options {
            threads: 0,
            kernels,
            progress: &(),
            interrupt: &Default::default(),
            existing: Existing::Refuse,
        };
        let summary = bitnet_checkpoint::job::run(&plan, &target, &options)?;
        // Everything below comes from reading the written file again.
        let written = Source::open(&target)?;
        let whole = verify(&written)?.damage.is_empty();
        let comparison = compare(&source, &written, &())?;
        let error: ErrorStats = comparison.total(Scope::Quantized);
        let bits = comparison.bits_per_weight(Scope::Quantized);
        let low: Vec<_> = comparison.tensors.iter().filter(|t| t.quantized).collect();
        let entropy = low
            .iter()
            .map(|t| t.entropy.unwrap_or(0.0) * t.error.count as f64)
            .sum::<f64>()
            / error.count.max(1) as f64;
        let (quantized, after) = measure(&target, &tokens)?;
        if SPEAKERS.contains(name) {
            texts.push((name, speak(&quantized)?));
        }
        let totals = job::totals(&summary.tensors, summary.file_bytes);
        table.row(vec![
            (*name).into(),
            format!("{bits:.3}"),
            format!("{:.1}", summary.file_bytes as f64 / 1e3),
            decibels(error.sqnr_db()),
            format!("{:.4}", error.cosine()),
            percent(error.sparsity()),
            percent(error.sign_flip_share()),
            format!("{entropy:.3}"),
            if whole { "yes" } else { "NO" }.into(),
            format!("{:.1}", after.value()),
        ]);
        lines.push(json!({
            "setting": name,
            "quantized_tensors": low.len(),
            "bits_per_weight": bits,
            "file_bytes": summary.file_bytes,
            "file_bits_per_weight": totals.file_bits,
            "sqnr_db": error.sqnr_db(),
            "cosine": error.cosine(),
            "sparsity": error.sparsity(),
            "sign_flips": error.sign_flip_share(),
            "entropy_bits": entropy,
            "whole": whole,
            "perplexity": after.value(),
        }));
    }
    out.line(
        "glassllm-en: 852,608 weights in F16, a llama-style language model; its 28 linear layers quantized, embeddings and norms kept.",
    );
    out.line(format!(
        "The file as it comes has {:.1} kB. Figures are of the linear layers, read back from each written file;",
        original_bytes as f64 / 1e3
    ));
    out.line(
        "bits per weight include scales and padding. GGUF has no block for 341 columns and transformers none for 341 rows: those stay F16.",
    );
    out.line(format!(
        "Perplexity is that of {} tokens of a text that the model was trained on; as it comes {:.1} ± {:.1}.",
        before.loss.count(),
        before.value(),
        before.error()
    ));
    out.line("");
    out.table(&table);
    out.line("");
    out.line(format!("\"{PROMPT}\" goes on:"));
    for (name, text) in &texts {
        out.line(format!("{name:>16}: {text}"));
    }
    let all_whole = lines.iter().all(|l| l["whole"] == true);
    out.document(json!({"model": "glassllm-en", "original_bytes": original_bytes, "perplexity": before.value(), "settings": lines}));
    Ok(if all_whole { Answer::Yes } else { Answer::No })
}
