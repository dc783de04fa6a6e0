//! `bitnet demo`: the built-in model through several settings, every figure measured in this run.

use crate::args::DemoArgs;
use crate::print::{Output, Table, decibels, percent};
use crate::{Answer, job};
use anyhow::Context;
use bitnet_core::stats::ErrorStats;
use bitnet_kernels::Kernels;
use bitnet_quant::checkpoint::{self, Existing, Options};
use bitnet_quant::compare::{Scope, compare};
use bitnet_quant::verify::verify;
use bitnet_quant::{Job, Recipe, Source};
use serde_json::json;
use std::fs;
use std::path::Path;

/// The model of assets/glassllm-en, so that the program needs no file.
const MODEL: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../../../assets/glassllm-en/config.json")),
    ("model.safetensors", include_bytes!("../../../../assets/glassllm-en/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../../../assets/glassllm-en/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../../assets/glassllm-en/tokenizer_config.json")),
    ("LICENSE", include_bytes!("../../../../assets/glassllm-en/LICENSE")),
];

/// Settings: what the table calls them, the ending of the file, and the recipe.
const SETTINGS: &[(&str, &str, &str)] = &[
    ("int8", ".safetensors", "default = {precision = 'int8'}"),
    ("int4 group:32", ".safetensors", "default = {precision = 'int4', granularity = 'group:32', scale_dtype = 'f16', clip = 'search'}"),
    ("int3 group:64", ".safetensors", "default = {precision = 'int3', granularity = 'group:64', scale_dtype = 'f16', clip = 'search'}"),
    ("int2 group:64", ".safetensors", "default = {precision = 'int2', granularity = 'group:64', scale_dtype = 'f16', clip = 'search'}"),
    ("3 trit planes", ".safetensors", "default = {planes = 3, granularity = 'group:128', scale_dtype = 'f16', layout = 'base-3'}"),
    ("2 trit planes", ".safetensors", "default = {planes = 2, granularity = 'group:128', scale_dtype = 'f16', layout = 'base-3'}"),
    ("ternary absmean, one scale (b1.58)", ".safetensors", "default = {threshold = 'absmean', granularity = 'tensor'}"),
    ("ternary absmean", ".safetensors", "default = {threshold = 'absmean'}"),
    ("ternary mean (TWN)", ".safetensors", "default = {threshold = 'mean'}"),
    ("ternary median", ".safetensors", "default = {threshold = 'median'}"),
    ("ternary adaptive", ".safetensors", "default = {threshold = 'adaptive'}"),
    ("ternary optimal", ".safetensors", "default = {threshold = 'optimal'}"),
    ("ternary optimal, base-3", ".safetensors", "default = {threshold = 'optimal', layout = 'base-3'}"),
    ("ternary optimal, smallest layout", ".safetensors", "default = {threshold = 'optimal', granularity = 'tensor', layout = 'auto'}"),
    ("ternary for HF transformers", "", "format = 'hf-bitnet'"),
    ("ternary for llama.cpp (GGUF)", ".gguf", "format = 'gguf'\ndefault = {threshold = 'optimal'}"),
    ("binary", ".safetensors", "default = {precision = 'binary'}"),
];

pub(crate) fn run(args: &DemoArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let temporary;
    let folder: &Path = match &args.keep {
        Some(path) => {
            fs::create_dir(path).map_err(|e| anyhow::anyhow!("cannot create {}: {e}", path.display()))?;
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
    let original_bytes: u64 = source.files.iter().map(|f| f.len).sum();
    let mut table =
        Table::new(&["setting", "bits/weight", "file kB", "SQNR dB", "cosine", "zeros", "sign flips", "entropy", "bytes proven"]);
    let mut lines = vec![];
    let kernels = Kernels::from_env()?;
    for (i, (name, ending, recipe)) in SETTINGS.iter().enumerate() {
        let target = folder.join(format!("{i:02}{ending}"));
        let recipe = Recipe::from_toml(recipe)?;
        let plan = Job::quantize(&source, &recipe, &target)?;
        let options = Options { threads: 0, kernels, progress: &(), interrupt: &Default::default(), existing: Existing::Refuse };
        let summary = checkpoint::run(&plan, &target, &options)?;
        // Everything below comes from reading the written file again.
        let written = Source::open(&target)?;
        let whole = verify(&written)?.damage.is_empty();
        let comparison = compare(&source, &written, &())?;
        let error: ErrorStats = comparison.total(Scope::Quantized);
        let bits = comparison.bits_per_weight(Scope::Quantized);
        let low: Vec<_> = comparison.tensors.iter().filter(|t| t.quantized).collect();
        let entropy = low.iter().map(|t| t.entropy.unwrap_or(0.0) * t.error.count as f64).sum::<f64>() / error.count.max(1) as f64;
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
    out.line("");
    out.table(&table);
    let all_whole = lines.iter().all(|l| l["whole"] == true);
    out.document(json!({"model": "glassllm-en", "original_bytes": original_bytes, "settings": lines}));
    Ok(if all_whole { Answer::Yes } else { Answer::No })
}
