//! The command line.

use crate::model::{BenchArgs, ChatArgs, PerplexityArgs, RunArgs};
#[cfg(feature = "train")]
use crate::train::TrainArgs;
use bitnet_checkpoint::recipe::Preset;
use bitnet_checkpoint::recipe::{Choices, Format, Rule, Target};
use bitnet_core::pack;
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, Rounding, ScaleRule, Threshold};
use bitnet_core::{Granularity, ScaleDtype};
use bitnet_formats::gguf::GgmlType;
use bitnet_formats::hf::LinearClass;
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Ternary and low-bit weights: quantize, inspect, convert, compare, verify.
#[derive(Debug, Parser)]
#[command(name = "bitnet", version, max_term_width = 120)]
pub(crate) struct Cli {
    /// Print one JSON document on stdout.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Quantize a checkpoint: a .safetensors file, a folder with config.json, or a .gguf.
    Quantize(Box<QuantizeArgs>),
    /// List tensors and honest bits per weight, and report what looks wrong.
    Inspect(InspectArgs),
    /// Write the same codes in another container or layout.
    Convert(ConvertArgs),
    /// Write every tensor as floats.
    Dequantize(DequantizeArgs),
    /// What was lost, tensor by tensor.
    Compare(CompareArgs),
    /// Check tensors, metadata and the files beside them against their checksums.
    Verify(VerifyArgs),
    /// Go on with a text, token by token.
    Run(RunArgs),
    /// Talk with a model that has a chat template.
    Chat(ChatArgs),
    /// How well a model predicts a text, and how far it is from a reference.
    Perplexity(PerplexityArgs),
    /// Speed, load time and memory of a model, or of a shape with made-up weights.
    Bench(BenchArgs),
    /// Train a model whose weights learn to be quantized, and pack it.
    #[cfg(feature = "train")]
    Train(Box<TrainArgs>),
    /// Quantize the built-in model in several ways and print bits against error.
    Demo(DemoArgs),
}

/// What is read.
#[derive(Debug, Args)]
pub(crate) struct InputArgs {
    /// The checkpoint: a .safetensors file, a folder with config.json, or a .gguf.
    #[arg(value_name = "IN")]
    pub(crate) input: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// The layouts that an I2_S tensor may have.
fn i2s_orders() -> PossibleValuesParser {
    let layouts = pack::of_ggml_type(GgmlType::I2S.id());
    layouts.map(|layout| layout.name()).into()
}

/// What a file may leave open.
#[derive(Debug, Args)]
pub(crate) struct OpenArgs {
    /// Order of codes in I2_S tensors that another program wrote, which the file does not say:
    /// i2_s, i2_s-g64, i2_s-x4.
    #[arg(long, value_name = "NAME", default_value = "i2_s", value_parser = i2s_orders())]
    pub(crate) i2s_order: String,
}

impl OpenArgs {
    pub(crate) fn open(
        &self,
        path: &std::path::Path,
    ) -> bitnet_formats::Result<bitnet_formats::Source> {
        bitnet_formats::Source::open_with(
            path,
            &bitnet_formats::source::OpenOptions {
                i2s_layout: self.i2s_order.clone(),
            },
        )
    }
}

impl InputArgs {
    pub(crate) fn open(&self) -> bitnet_formats::Result<bitnet_formats::Source> {
        self.open.open(&self.input)
    }
}

/// Where the result goes and how the job runs.
#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// Where to write: a .safetensors or .gguf file, or a folder.
    #[arg(long, value_name = "PATH")]
    pub(crate) out: PathBuf,
    /// Replace the output if it exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// Threads; 0 for one on each core.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) threads: usize,
    /// No progress bar.
    #[arg(long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    pub(crate) input: InputArgs,
    #[command(flatten)]
    pub(crate) job: JobArgs,
    /// Configuration in TOML, or in JSON if it ends in .json; flags count more than it.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Settings for a purpose instead of a configuration: bitnet, performance, accuracy, memory,
    /// balanced; flags count more than it.
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    pub(crate) preset: Option<Preset>,
    /// Choose each tensor's precision, planes and granularity: least error with at most so many
    /// bits per weight, scales included.
    #[arg(long, value_name = "BITS")]
    pub(crate) target_bpw: Option<f64>,
    /// Choose them so that each tensor keeps at least so many dB; without --target-bpw in the
    /// fewest bytes.
    #[arg(long, value_name = "DB", allow_negative_numbers = true)]
    pub(crate) min_sqnr: Option<f64>,
    /// Statistics of the layers' inputs, as the library saves them: errors are weighted by them
    /// where a rule can do so.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) calibration: Option<PathBuf>,
    /// Container: safetensors, hf-bitnet, gguf. Default: by the ending of --out.
    #[arg(long)]
    pub(crate) format: Option<Format>,
    /// Scale convention of hf-bitnet: bitlinear (1/scale, the default) or autobitlinear (scale).
    #[arg(long, value_name = "CLASS")]
    pub(crate) linear_class: Option<LinearClass>,
    /// Tensors to quantize, instead of every two-dimensional *.weight.
    #[arg(long, value_name = "GLOB")]
    pub(crate) include: Vec<String>,
    /// Tensors to keep, besides embeddings, heads, norms and routers.
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// Precision for the tensors that a glob matches, excluded ones too; may be given several
    /// times.
    #[arg(long, value_name = "GLOB=PRECISION")]
    pub(crate) rule: Vec<Rule>,
    #[command(flatten)]
    pub(crate) choices: ChoiceArgs,
}

/// The fields of [`Choices`] as flags.
#[derive(Debug, Args)]
pub(crate) struct ChoiceArgs {
    /// binary, ternary, int2, int3, int4, int8; f32, f16, bf16; keep [default: ternary].
    #[arg(long)]
    precision: Option<Target>,
    /// Ternary rule: absmean, mean, median, adaptive, optimal, factor:X [default: absmean; optimal
    /// for several planes].
    #[arg(long)]
    threshold: Option<Threshold>,
    /// Ternary scale: rule, least-squares [default: rule].
    #[arg(long)]
    scale: Option<ScaleRule>,
    /// Trit planes: 1, 2 or 3 [default: 1].
    #[arg(long, value_name = "N")]
    planes: Option<usize>,
    /// Binary levels: zero, mean, optimal [default: zero].
    #[arg(long)]
    split: Option<BinarySplit>,
    /// Seed of stochastic binary weights [default: deterministic].
    #[arg(long)]
    seed: Option<u64>,
    /// Integers: symmetric, asymmetric [default: symmetric].
    #[arg(long)]
    mapping: Option<Mapping>,
    /// Range of integers: none, search, rms:X [default: none].
    #[arg(long)]
    clip: Option<Clip>,
    /// What one scale covers: tensor, channel, group:N [default: channel; the block in GGUF; tensor
    /// in hf-bitnet].
    #[arg(long)]
    granularity: Option<Granularity>,
    /// How scales are stored: f32, f16, bf16 [default: f32; f16 in GGUF; the model's type in
    /// hf-bitnet].
    #[arg(long, value_name = "TYPE")]
    scale_dtype: Option<ScaleDtype>,
    /// Ties: half-even, half-away, half-up [default: half-even].
    #[arg(long)]
    rounding: Option<Rounding>,
    /// Wire layout by name, or auto for the smallest [default: the plain one of the precision].
    #[arg(long, value_name = "NAME")]
    layout: Option<String>,
}

impl ChoiceArgs {
    pub(crate) fn choices(&self) -> Choices {
        Choices {
            precision: self.precision,
            threshold: self.threshold,
            scale: self.scale,
            planes: self.planes,
            split: self.split,
            seed: self.seed,
            mapping: self.mapping,
            clip: self.clip,
            granularity: self.granularity,
            scale_dtype: self.scale_dtype,
            rounding: self.rounding,
            layout: self.layout.clone(),
        }
    }
}

/// A gate's limit. NaN would let everything pass.
fn parse_limit(s: &str) -> Result<f64, String> {
    s.parse()
        .ok()
        .filter(|x: &f64| !x.is_nan())
        .ok_or_else(|| "expected a number".into())
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) input: InputArgs,
    /// Read headers only: no findings about weights.
    #[arg(long)]
    pub(crate) headers: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    pub(crate) input: InputArgs,
    #[command(flatten)]
    pub(crate) job: JobArgs,
    /// Container: safetensors, hf-bitnet, gguf. Default: by the ending of --out.
    #[arg(long)]
    pub(crate) format: Option<Format>,
    /// Wire layout of quantized tensors, or auto [default: the one they have, if the container
    /// holds it].
    #[arg(long, value_name = "NAME")]
    pub(crate) layout: Option<String>,
    /// Scale convention of hf-bitnet: bitlinear or autobitlinear.
    #[arg(long, value_name = "CLASS")]
    pub(crate) linear_class: Option<LinearClass>,
}

#[derive(Debug, Args)]
pub(crate) struct DequantizeArgs {
    #[command(flatten)]
    pub(crate) input: InputArgs,
    #[command(flatten)]
    pub(crate) job: JobArgs,
    /// Type of the floats: f32, f16, bf16.
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: ScaleDtype,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The checkpoint before.
    pub(crate) original: PathBuf,
    /// The checkpoint after.
    pub(crate) quantized: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// Fail (exit 1) where a tensor's SQNR is below this many dB.
    #[arg(long, value_name = "DB", allow_negative_numbers = true, value_parser = parse_limit)]
    pub(crate) min_sqnr: Option<f64>,
    /// Fail where a tensor's cosine similarity is below this.
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = parse_limit)]
    pub(crate) min_cosine: Option<f64>,
    /// Fail where a tensor's mean squared error is above this.
    #[arg(long, value_name = "X", value_parser = parse_limit)]
    pub(crate) max_mse: Option<f64>,
    /// Fail where a larger share of a tensor's weights changed sign.
    #[arg(long, value_name = "SHARE", value_parser = parse_limit)]
    pub(crate) max_sign_flips: Option<f64>,
    /// Fail where the quantized tensors together take more bits per weight.
    #[arg(long, value_name = "BITS", value_parser = parse_limit)]
    pub(crate) max_bpw: Option<f64>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) input: InputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Keep the files in this folder, which must not exist yet.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) keep: Option<PathBuf>,
}
