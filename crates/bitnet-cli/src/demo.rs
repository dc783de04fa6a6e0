//! The built-in model of `bitnet demo`, its settings, and what is measured of each.

use crate::report;
use anyhow::Context;
use bitnet_checkpoint::compare::{Scope, compare};
use bitnet_checkpoint::job::{self, Existing, Options};
use bitnet_checkpoint::verify::verify;
use bitnet_checkpoint::{Job, Recipe, Source};
use bitnet_core::stats::ErrorStats;
use bitnet_inference::perplexity::{
    Mean, PerplexityComparison, Windows, compare as compare_models,
};
use bitnet_inference::{CacheType, GenerateOptions, LoadOptions, Model};
use bitnet_kernels::Kernels;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// The model of assets/glassllm-en, so that the demo needs no file.
const MODEL: &[(&str, &[u8])] = &[
    (
        "config.json",
        include_bytes!("../../../assets/glassllm-en/config.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../../assets/glassllm-en/model.safetensors"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../../assets/glassllm-en/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../../assets/glassllm-en/tokenizer_config.json"),
    ),
    (
        "LICENSE",
        include_bytes!("../../../assets/glassllm-en/LICENSE"),
    ),
];

/// Text that the model was not trained on: see its README.
const HELD_OUT: &str = include_str!("../../../assets/northanger-abbey/text.txt");

/// What is quantized, and how.
pub(crate) struct Setting {
    /// Its name in the table.
    pub(crate) name: &'static str,
    /// The ending of the written file; empty for a folder.
    ending: &'static str,
    /// The recipe, in TOML.
    recipe: &'static str,
}

const fn setting(name: &'static str, ending: &'static str, recipe: &'static str) -> Setting {
    Setting {
        name,
        ending,
        recipe,
    }
}

/// In groups, each from many bits to few.
pub(crate) const SETTINGS: &[Setting] = &[
    setting("int8", "", "default = {precision = 'int8'}"),
    setting(
        "int4 group:32",
        "",
        "default = {precision = 'int4', granularity = 'group:32', scale_dtype = 'f16', \
         clip = 'search'}",
    ),
    setting(
        "int3 group:64",
        "",
        "default = {precision = 'int3', granularity = 'group:64', scale_dtype = 'f16', \
         clip = 'search'}",
    ),
    setting(
        "int2 group:64",
        "",
        "default = {precision = 'int2', granularity = 'group:64', scale_dtype = 'f16', \
         clip = 'search'}",
    ),
    setting(
        "3 trit planes",
        "",
        "default = {planes = 3, granularity = 'group:128', scale_dtype = 'f16', layout = 'base-3'}",
    ),
    setting(
        "2 trit planes",
        "",
        "default = {planes = 2, granularity = 'group:128', scale_dtype = 'f16', layout = 'base-3'}",
    ),
    setting(
        "ternary absmean, one scale (b1.58)",
        "",
        "default = {threshold = 'absmean', granularity = 'tensor'}",
    ),
    setting("ternary absmean", "", "default = {threshold = 'absmean'}"),
    setting("ternary mean (TWN)", "", "default = {threshold = 'mean'}"),
    setting("ternary median", "", "default = {threshold = 'median'}"),
    setting("ternary adaptive", "", "default = {threshold = 'adaptive'}"),
    setting("ternary optimal", "", "default = {threshold = 'optimal'}"),
    setting(
        "ternary optimal, base-3",
        "",
        "default = {threshold = 'optimal', layout = 'base-3'}",
    ),
    setting(
        "ternary optimal, smallest layout",
        "",
        "default = {threshold = 'optimal', granularity = 'tensor', layout = 'auto'}",
    ),
    setting("ternary for HF transformers", "", "format = 'hf-bitnet'"),
    setting(
        "ternary for llama.cpp (GGUF)",
        ".gguf",
        "format = 'gguf'\ndefault = {threshold = 'optimal'}",
    ),
    setting("binary", "", "default = {precision = 'binary'}"),
];

/// The prompt that models continue.
pub(crate) const PROMPT: &str = "Alice looked at the Queen, and";

/// The model as it comes, in a folder that takes the quantized ones too.
pub(crate) struct Original {
    folder: PathBuf,
    source: Source,
    pub(crate) model: Model,
    /// The held-out text.
    tokens: Vec<u32>,
}

/// What one setting made of the model.
pub(crate) struct SettingReport {
    pub(crate) name: &'static str,
    pub(crate) model: Model,
    /// Of the quantized tensors.
    pub(crate) error: ErrorStats,
    pub(crate) tensors: usize,
    pub(crate) bits: f64,
    pub(crate) entropy: f64,
    pub(crate) file_bytes: u64,
    pub(crate) file_bits: f64,
    /// Whether the written file passes `verify`.
    pub(crate) whole: bool,
    /// On the held-out text, with the original as the reference.
    pub(crate) text: PerplexityComparison,
}

impl Original {
    /// Writes the model into the folder and opens it.
    pub(crate) fn write(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("glassllm-en");
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        for (name, bytes) in MODEL {
            fs::write(path.join(name), bytes).with_context(|| format!("cannot write {name}"))?;
        }
        let model = load(&path)?;
        let tokens = model.tokenizer()?.encode(HELD_OUT, true)?;
        Ok(Self {
            folder: folder.into(),
            source: Source::open(&path)?,
            model,
            tokens,
        })
    }

    /// Bytes of the file of weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.source.files().iter().map(|f| f.len).sum()
    }

    /// Quantizes with a setting, and measures what a reader of the written file finds.
    pub(crate) fn quantize(&self, setting: &'static Setting) -> anyhow::Result<SettingReport> {
        let number = SETTINGS
            .iter()
            .take_while(|s| s.name != setting.name)
            .count();
        let target = self.folder.join(format!("{number:02}{}", setting.ending));
        let recipe = Recipe::from_toml(setting.recipe)?;
        let plan = Job::quantize(&self.source, &recipe, &target)?;
        let options = Options {
            threads: 0,
            kernels: Kernels::from_env()?,
            progress: &(),
            interrupt: &AtomicBool::new(false),
            existing: Existing::Refuse,
        };
        let summary = job::run(&plan, &target, &options)?;
        let written = Source::open(&target)?;
        let comparison = compare(&self.source, &written, &())?;
        let error = comparison.total(Scope::Quantized);
        let quantized = || comparison.tensors.iter().filter(|t| t.quantized);
        let entropy: f64 = quantized()
            .map(|t| t.entropy.unwrap_or(0.0) * t.error.count as f64)
            .sum();
        let model = load(&target)?;
        Ok(SettingReport {
            name: setting.name,
            tensors: quantized().count(),
            bits: comparison.bits_per_weight(Scope::Quantized),
            entropy: entropy / error.count.max(1) as f64,
            error,
            file_bytes: summary.file_bytes,
            file_bits: report::totals(&summary.tensors, summary.file_bytes).file_bits,
            whole: verify(&written)?.damage.is_empty(),
            text: self.read(&model)?,
            model,
        })
    }

    /// Has a model and the original predict the held-out text.
    fn read(&self, model: &Model) -> anyhow::Result<PerplexityComparison> {
        let context = self.model.config().context;
        let windows = Windows {
            context,
            stride: context / 2,
            cache: CacheType::F16,
        };
        let interrupt = AtomicBool::new(false);
        Ok(compare_models(
            model,
            &self.model,
            &self.tokens,
            &windows,
            &|_, _| (),
            &interrupt,
        )?)
    }
}

impl SettingReport {
    pub(crate) fn json(&self) -> Value {
        let mean = |m: &Mean| json!({"mean": m.mean(), "error": m.error()});
        json!({
            "setting": self.name,
            "quantized_tensors": self.tensors,
            "bits_per_weight": self.bits,
            "file_bytes": self.file_bytes,
            "file_bits_per_weight": self.file_bits,
            "sqnr_db": self.error.sqnr_db(),
            "cosine": self.error.cosine(),
            "sparsity": self.error.sparsity(),
            "sign_flips": self.error.sign_flip_share(),
            "entropy_bits": self.entropy,
            "whole": self.whole,
            "perplexity": self.text.model.value(),
            "perplexity_error": self.text.model.error(),
            "loss_difference": mean(&self.text.difference),
        })
    }
}

fn load(path: &Path) -> anyhow::Result<Model> {
    Ok(Model::load_with(
        path,
        &LoadOptions {
            kernels: Kernels::from_env()?,
            ..LoadOptions::default()
        },
    )?)
}

/// What a model generates from the prompt, in one line.
pub(crate) fn sample(model: &Model) -> anyhow::Result<String> {
    let options = GenerateOptions {
        max_tokens: 32,
        ..GenerateOptions::default()
    };
    let tokens: Vec<_> = model
        .generate(PROMPT, &options)?
        .collect::<Result<_, _>>()?;
    let text: String = tokens.iter().map(|t| t.text.as_str()).collect();
    Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
}
