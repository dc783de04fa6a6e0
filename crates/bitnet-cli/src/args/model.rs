//! Flags of the commands that run models.

use super::checkpoint::{OpenArgs, QuietArgs};
use super::names::{NameParser, name};
use crate::print::note;
use bitnet_formats::source::OpenOptions;
use bitnet_inference::{
    ActivationType, CacheType, Config, FloatType, GenerateOptions, LoadOptions, Model, Pooling,
    Sampling, Tools,
};
use bitnet_kernels::Kernels;
use clap::Args;
use clap::builder::RangedI64ValueParser;
use std::path::{Path, PathBuf};

/// Most threads: more are no faster, and each takes memory.
const MAX_THREADS: usize = 1024;

/// How a model is loaded and run.
#[derive(Debug, Args)]
#[command(next_help_heading = "Loading and computing")]
pub(crate) struct LoadArgs {
    /// Threads; 0 for one on each core
    #[arg(long, default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Inputs of ternary layers; auto is int8 where the model says it was trained so
    #[arg(
        long,
        default_value = "auto",
        value_name = "TYPE",
        value_parser = name::<ActivationType>()
    )]
    activations: ActivationType,
    /// Linear layers with float inputs, in memory
    #[arg(long, default_value = "exact", value_name = "TYPE", value_parser = name::<FloatType>())]
    weights: FloatType,
    /// Embedding and output matrix, in memory
    #[arg(long, default_value = "exact", value_name = "TYPE", value_parser = name::<FloatType>())]
    embedding: FloatType,
    #[command(flatten)]
    open: OpenArgs,
}

/// What a model remembers of the tokens before.
#[derive(Debug, Args)]
#[command(next_help_heading = "Loading and computing")]
pub(crate) struct CacheArgs {
    /// Cached keys and values
    #[arg(
        long = "cache",
        default_value = "f16",
        value_name = "TYPE",
        value_parser = name::<CacheType>()
    )]
    pub(crate) kind: CacheType,
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

    /// Loads a model and prints on stderr what was assumed, unless `quiet`.
    pub(crate) fn load(&self, path: &Path, quiet: &QuietArgs) -> anyhow::Result<Model> {
        let model = Model::load_with(path, &self.options()?)?;
        if !quiet.quiet {
            for text in model.notes() {
                note(text);
            }
        }
        Ok(model)
    }

    /// The tokens of a text, with a note if it begins with the start token that the tokenizer adds.
    pub(crate) fn encode(
        &self,
        model: &Model,
        text: &str,
        quiet: &QuietArgs,
    ) -> anyhow::Result<Vec<u32>> {
        let tokenizer = model.tokenizer()?;
        let tokens = tokenizer.encode(text, true)?;
        if !quiet.quiet
            && let Some(start) = tokenizer.doubled_start(&tokens)?
        {
            note(format!(
                "the text begins with the start token {:?}, which the tokenizer adds: the model \
                 sees it twice",
                tokenizer.name(start).unwrap_or_default()
            ));
        }
        Ok(tokens)
    }
}

/// Reads the file of `--tools`.
pub(crate) fn read_tools(path: &Path) -> anyhow::Result<Tools> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| anyhow::anyhow!("cannot read {}: {e}", path.display()))?;
    Tools::from_json(text.trim_start_matches('\u{feff}'))
        .map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}

/// How tokens are chosen, and when generation ends.
#[derive(Debug, Args)]
#[command(next_help_heading = "Generation")]
pub(crate) struct GenerateArgs {
    /// Most tokens to generate
    #[arg(long, short = 'n', default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    /// Randomness of the choice; 0 takes the likeliest token
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "X",
        allow_negative_numbers = true
    )]
    temperature: f32,
    /// Random seed
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Text that ends the generation; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Choose among the N likeliest tokens; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    top_k: usize,
    /// Choose among the likeliest tokens that together reach this probability
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    top_p: f32,
    /// Choose among tokens at least this share as likely as the likeliest
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    min_p: f32,
    /// Above 1: tokens that occurred become less likely
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "X",
        allow_negative_numbers = true
    )]
    repetition_penalty: f32,
    /// Continue after the model's own end of text
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
    /// The model: a folder with config.json, or a .gguf
    pub(crate) model: PathBuf,
    /// The prompt; without it, stdin is read
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Send the prompt as a user's message, through the model's chat template
    #[arg(long)]
    pub(crate) chat: bool,
    /// Tools that the model may call, for its chat template: a JSON list of functions
    #[arg(long, value_name = "FILE", requires = "chat")]
    pub(crate) tools: Option<PathBuf>,
    /// Positions of the context; 0 for what prompt and --max-tokens need
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) context: usize,
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// The model: a folder with config.json, or a .gguf
    pub(crate) model: PathBuf,
    /// Text of the system message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tools that the model may call, for its chat template: a JSON list of functions
    #[arg(long, value_name = "FILE")]
    pub(crate) tools: Option<PathBuf>,
    /// Positions of the context; 0 for the model's, at most 4096
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) context: usize,
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

/// How vectors are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EmbedFormat {
    /// A line of numbers for each text.
    Text,
    /// A JSON object for each text, in a line.
    Jsonl,
    /// A NumPy array of f32, texts × dimensions.
    Npy,
}

bitnet_core::named!(EmbedFormat, "format", {
    Text = "text",
    Jsonl = "jsonl",
    Npy = "npy",
});

#[derive(Debug, Args)]
pub(crate) struct EmbedArgs {
    /// The model: a folder with config.json, or a .gguf
    pub(crate) model: PathBuf,
    /// The texts; without them and --file, the lines of stdin
    #[arg(value_name = "TEXT", conflicts_with = "file")]
    pub(crate) texts: Vec<String>,
    /// A file with a text in each line; - for stdin
    #[arg(long, short, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// How the vectors are printed
    #[arg(
        long,
        default_value = "text",
        value_name = "FORMAT",
        value_parser = name::<EmbedFormat>()
    )]
    pub(crate) format: EmbedFormat,
    /// Print the cosine similarity of each two texts in place of the vectors
    #[arg(long)]
    pub(crate) similarity: bool,
    /// How the states of the tokens become one vector, where the model's own way is not wanted
    #[arg(long, value_name = "POOLING", value_parser = name::<Pooling>())]
    pub(crate) pooling: Option<Pooling>,
    /// Keep the length of the vectors
    #[arg(long)]
    pub(crate) no_normalize: bool,
    /// The model's prompt of this name is put before each text
    #[arg(long, value_name = "NAME")]
    pub(crate) prompt_name: Option<String>,
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// The model: a folder with config.json, or a .gguf
    pub(crate) model: PathBuf,
    /// The text, a file
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Another model with the same vocabulary, to measure the divergence from
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<PathBuf>,
    /// Tokens of a window; 0 for the model's context, at most 512
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) context: usize,
    /// Tokens from one window to the next; 0 for half a window
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) stride: usize,
    /// Only the first N tokens of the text; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) tokens: usize,
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The model: a folder with config.json, or a .gguf
    #[arg(required_unless_present = "shape", conflicts_with = "shape")]
    pub(crate) model: Option<PathBuf>,
    /// Shape of a model with synthetic weights
    #[arg(long, value_name = "NAME", value_parser = shape())]
    pub(crate) shape: Option<String>,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = count(u32::MAX))]
    pub(crate) prompt: u32,
    /// Tokens to decode after it
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = count(u32::MAX))]
    pub(crate) tokens: u32,
    /// Number of repetitions; the median is reported
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = count(1000))]
    pub(crate) repeat: u32,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

/// The parser of numbers from 1 to `most`.
fn count(most: u32) -> RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(most))
}

/// The parser of shapes with synthetic weights.
pub(crate) fn shape() -> NameParser<String> {
    NameParser::new(|s| match Config::shape(s) {
        Ok(_) => Ok(s.into()),
        Err(error) => Err(error.to_string()),
    })
}
