//! Flags of the commands that run models, and what they have in common.

use crate::args::OpenArgs;
use bitnet_formats::source::OpenOptions;
use bitnet_inference::{
    ActivationType, CacheType, FloatType, GenerateOptions, LoadOptions, Model, Sampling, Timings,
};
use bitnet_kernels::Kernels;
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Most threads: more help nobody, and each takes memory.
const MAX_THREADS: usize = 1024;

/// How a model is loaded and run.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    open: OpenArgs,
    /// Threads; 0 for one on each core.
    #[arg(long, default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Inputs of ternary layers: auto (int8 where the model says it was trained so), int8, float.
    #[arg(long, default_value = "auto", value_name = "TYPE")]
    activations: ActivationType,
    /// Linear layers with float inputs, in memory: exact, bf16, int8, int4.
    #[arg(long, default_value = "exact", value_name = "TYPE")]
    weights: FloatType,
    /// Embedding and output matrix, in memory: exact, bf16, int8, int4.
    #[arg(long, default_value = "exact", value_name = "TYPE")]
    embedding: FloatType,
    /// Keys and values: f32, f16, int8.
    #[arg(long, default_value = "f16", value_name = "TYPE")]
    pub(crate) cache: CacheType,
}

impl LoadArgs {
    pub(crate) fn options(&self) -> anyhow::Result<LoadOptions> {
        anyhow::ensure!(
            self.threads <= MAX_THREADS,
            "--threads: expected at most {MAX_THREADS}, got {}",
            self.threads
        );
        Ok(LoadOptions {
            threads: self.threads,
            kernels: Kernels::from_env()?,
            activations: self.activations,
            weights: self.weights,
            embedding: self.embedding,
            open: OpenOptions {
                i2s_layout: self.open.i2s_order.clone(),
            },
        })
    }

    /// Loads a model and says on stderr what was assumed.
    pub(crate) fn load(&self, path: &Path) -> anyhow::Result<Model> {
        let model = Model::load_with(path, &self.options()?)?;
        for note in model.notes() {
            eprintln!("note: {}", crate::print::printable(note));
        }
        Ok(model)
    }
}

/// How tokens are chosen, and until when.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// Most tokens to generate.
    #[arg(long, short = 'n', default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    /// 0 takes the likeliest token.
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "X",
        allow_negative_numbers = true
    )]
    temperature: f32,
    /// Only the N likeliest tokens; 0 for all.
    #[arg(long, default_value_t = 0, value_name = "N")]
    top_k: usize,
    /// Only the likeliest tokens that together reach this probability.
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    top_p: f32,
    /// Only tokens at least this share as likely as the likeliest.
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    min_p: f32,
    /// Above 1: tokens that occurred become less likely.
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "X",
        allow_negative_numbers = true
    )]
    repetition_penalty: f32,
    /// What randomness begins with.
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Text that ends the generation; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after the model's own end of text.
    #[arg(long)]
    ignore_eos: bool,
}

impl GenerateArgs {
    pub(crate) fn options(&self) -> anyhow::Result<GenerateOptions> {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        };
        sampling.check()?;
        Ok(GenerateOptions {
            max_tokens: self.max_tokens,
            sampling,
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The model: a folder with config.json, or a .gguf.
    pub(crate) model: PathBuf,
    /// The text to go on with; without it, stdin.
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Give the text as a user's message, by the model's chat template.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Positions; 0 for as many as prompt and --max-tokens need.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) context: usize,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// The model: a folder with config.json, or a .gguf.
    pub(crate) model: PathBuf,
    /// What the system message says.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Positions; 0 for all that the model has, but at most 4096.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) context: usize,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// The model: a folder with config.json, or a .gguf.
    pub(crate) model: PathBuf,
    /// The text, a file.
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Another model with the same vocabulary: also prints the divergence from it.
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<PathBuf>,
    /// Tokens of a window; 0 for all that the model has, but at most 512.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) context: usize,
    /// Tokens from one window to the next; 0 for half a window.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) stride: usize,
    /// Only this many tokens from the start; 0 for all.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) tokens: usize,
    /// No progress bar.
    #[arg(long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The model: a folder with config.json, or a .gguf.
    #[arg(required_unless_present = "shape", conflicts_with = "shape")]
    pub(crate) model: Option<PathBuf>,
    /// Made-up weights of this shape: bitnet-2b-4t, llama3-8b, tiny.
    #[arg(long, value_name = "NAME")]
    pub(crate) shape: Option<String>,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) prompt: u32,
    /// Tokens to decode after it.
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tokens: u32,
    /// Turns; medians are printed.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: u32,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// Speeds in one line.
pub(crate) fn speed(timings: &Timings) -> String {
    let (prompt, decoded) = (timings.prompt_tokens, timings.decoded_tokens);
    format!(
        "prompt {prompt} tokens, {:.1} tokens/s; decode {decoded} tokens, {:.1} tokens/s",
        timings.prompt_speed(),
        timings.decode_speed()
    )
}

/// Speeds for programs.
pub(crate) fn speed_json(timings: &Timings) -> Value {
    json!({
        "prompt_tokens": timings.prompt_tokens,
        "prompt_seconds": timings.prompt.as_secs_f64(),
        "decoded_tokens": timings.decoded_tokens,
        "decode_seconds": timings.decode.as_secs_f64(),
    })
}
