//! Flags of the commands that read and write checkpoints.

use super::names::{layout, name, rule};
use bitnet_checkpoint::ShardSize;
use bitnet_checkpoint::recipe::Preset;
use bitnet_checkpoint::recipe::{Choices, Format, Rule, Target};
use bitnet_core::scheme::{BinarySplit, Clip, Mapping, Rounding, ScaleRule, Threshold};
use bitnet_core::{Granularity, ScaleDtype, pack};
use bitnet_formats::gguf::GgmlType;
use bitnet_formats::hf::LinearClass;
use clap::Args;
use clap::builder::PossibleValuesParser;
use std::path::PathBuf;

/// The checkpoint to read.
#[derive(Debug, Args)]
#[command(next_help_heading = Option::<&str>::None)]
pub(crate) struct InputArgs {
    /// The checkpoint: a .safetensors, .bin or .gguf file, or a folder with config.json
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

/// What a file may not say of itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "Reading")]
pub(crate) struct OpenArgs {
    /// Order of the codes in I2_S tensors of another program, whose files do not say it
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

/// How much a command prints.
#[derive(Debug, Args)]
#[command(next_help_heading = Option::<&str>::None)]
pub(crate) struct QuietArgs {
    /// Print the result alone: no progress, no notes, no tensors. One note remains: that many layers
    /// stay floats which no option excludes
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Where the result goes and how the job runs.
#[derive(Debug, Args)]
#[command(next_help_heading = Option::<&str>::None)]
pub(crate) struct JobArgs {
    /// Where to write: a .safetensors or .gguf file, or a folder
    ///
    /// A folder is a name without an ending, or with one that begins with a digit (qwen2.5-tern),
    /// or with a slash after it, or a folder that exists.
    #[arg(long, short, value_name = "PATH")]
    pub(crate) out: PathBuf,
    /// Replace the output if it exists; in a folder, what this program wrote
    #[arg(long)]
    pub(crate) force: bool,
    /// Most bytes of tensors in one file, such as 5GB, 500MB or 2GiB; above it a folder gets shards
    /// with an index, and a .gguf becomes a split set [default: 50GB in a folder; a .gguf is one
    /// file]
    ///
    /// A tensor that is larger has a file of its own. The set of NAME.gguf is
    /// NAME-00001-of-00003.gguf and so on, as gguf-split names it; a .safetensors file is never
    /// split.
    #[arg(long, value_name = "SIZE", value_parser = shard_size)]
    pub(crate) shard_size: Option<ShardSize>,
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    /// Print each tensor, however many there are, instead of the ten with the largest error
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) verbose: bool,
    /// Threads; 0 for one on each core
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Machine")]
    pub(crate) threads: usize,
}

fn shard_size(text: &str) -> Result<ShardSize, String> {
    text.parse()
}

/// The container to write.
#[derive(Debug, Args)]
#[command(next_help_heading = "Container")]
pub(crate) struct ContainerArgs {
    /// Container [default: by the ending of --out]
    #[arg(long, value_parser = name::<Format>())]
    pub(crate) format: Option<Format>,
    /// Scale convention of hf-bitnet: 1/scale (bitlinear) or scale (autobitlinear) [default:
    /// bitlinear]
    #[arg(long, value_name = "CLASS", value_parser = name::<LinearClass>())]
    pub(crate) linear_class: Option<LinearClass>,
}

#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    pub(crate) choices: ChoiceArgs,
    #[command(flatten)]
    pub(crate) tensors: TensorArgs,
    #[command(flatten)]
    pub(crate) search: SearchArgs,
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    #[command(flatten)]
    pub(crate) container: ContainerArgs,
    #[command(flatten)]
    pub(crate) job: JobArgs,
    #[command(flatten)]
    pub(crate) input: InputArgs,
}

/// Which tensors are quantized.
#[derive(Debug, Args)]
#[command(next_help_heading = "Tensors")]
pub(crate) struct TensorArgs {
    /// Precision for the tensors that a glob matches, excluded ones too; may be given several
    /// times
    #[arg(long, value_name = "GLOB=PRECISION", value_parser = rule(), hide_possible_values = true)]
    pub(crate) rule: Vec<Rule>,
    /// Tensors to quantize, instead of every two-dimensional *.weight and stacked experts
    #[arg(long, value_name = "GLOB")]
    pub(crate) include: Vec<String>,
    /// Tensors to keep, besides embeddings, heads, norms and routers
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// Tensors that are stored [in, out], and no others, instead of those that biases and shapes
    /// show
    #[arg(long, value_name = "GLOB")]
    pub(crate) transposed: Vec<String>,
}

/// The search for each tensor's precision, planes and granularity.
#[derive(Debug, Args)]
#[command(next_help_heading = "Search")]
pub(crate) struct SearchArgs {
    /// Choose each tensor's precision: the least error within BITS per weight, scales included
    #[arg(long, value_name = "BITS")]
    pub(crate) target_bpw: Option<f64>,
    /// Choose each tensor's precision: at least DB decibels; without --target-bpw in the fewest
    /// bytes
    #[arg(long, value_name = "DB", allow_negative_numbers = true)]
    pub(crate) min_sqnr: Option<f64>,
    /// Statistics of the layers' inputs, as the library saves them, to weight errors by
    #[arg(long, value_name = "FILE.json")]
    pub(crate) calibration: Option<PathBuf>,
}

/// Whole configurations; flags override them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Configuration (flags override it)")]
pub(crate) struct RecipeArgs {
    /// Configuration file in TOML, or in JSON if it ends in .json
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Built-in configuration for a purpose
    #[arg(long, value_name = "NAME", conflicts_with = "config", value_parser = name::<Preset>())]
    pub(crate) preset: Option<Preset>,
}

/// The fields of [`Choices`] as flags.
#[derive(Debug, Args)]
#[command(next_help_heading = "Precision")]
pub(crate) struct ChoiceArgs {
    /// Precision of quantized tensors [default: ternary]
    #[arg(long, value_parser = name::<Target>())]
    precision: Option<Target>,
    /// Rule for the ternary threshold [default: absmean; optimal for several planes]
    #[arg(long, value_parser = name::<Threshold>())]
    threshold: Option<Threshold>,
    /// Weights under one scale [default: channel; the block in GGUF; tensor in hf-bitnet;
    /// group:64 in mlx]
    #[arg(long, value_parser = name::<Granularity>())]
    granularity: Option<Granularity>,
    /// Trit planes: 1, 2 or 3 [default: 1]
    #[arg(long, value_name = "N")]
    planes: Option<usize>,
    /// Wire layout; auto is the smallest [default: the plain one of the precision]
    #[arg(long, value_name = "NAME", value_parser = layout())]
    layout: Option<String>,
    /// Type of stored scales [default: f32; f16 in GGUF; the model's type in hf-bitnet
    /// and mlx]
    #[arg(long, value_name = "TYPE", value_parser = name::<ScaleDtype>())]
    scale_dtype: Option<ScaleDtype>,
    /// Ternary scale: of the threshold rule, or least squares [default: rule]
    #[arg(long, value_parser = name::<ScaleRule>(), help_heading = "Details of precision")]
    scale: Option<ScaleRule>,
    /// Split of binary weights into two levels [default: zero]
    #[arg(long, value_parser = name::<BinarySplit>(), help_heading = "Details of precision")]
    split: Option<BinarySplit>,
    /// Random seed of stochastic binary weights [default: deterministic]
    #[arg(long, value_name = "N", help_heading = "Details of precision")]
    seed: Option<u64>,
    /// Mapping of integers [default: symmetric]
    #[arg(long, value_parser = name::<Mapping>(), help_heading = "Details of precision")]
    mapping: Option<Mapping>,
    /// Clipping range of integers [default: none]
    #[arg(long, value_parser = name::<Clip>(), help_heading = "Details of precision")]
    clip: Option<Clip>,
    /// Rounding of ties [default: half-even]
    #[arg(long, value_parser = name::<Rounding>(), help_heading = "Details of precision")]
    rounding: Option<Rounding>,
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

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Read headers only: no findings about weights
    #[arg(long)]
    pub(crate) headers: bool,
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    #[command(flatten)]
    pub(crate) input: InputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    pub(crate) container: ContainerArgs,
    /// Wire layout of quantized tensors; auto is the smallest [default: the one they have, if the
    /// container holds it]
    #[arg(long, value_name = "NAME", value_parser = layout(), help_heading = "Container")]
    pub(crate) layout: Option<String>,
    /// Write matrices that are stored in a rotated basis as f32 in their original one
    #[arg(long, help_heading = "Container")]
    pub(crate) unrotate: bool,
    #[command(flatten)]
    pub(crate) job: JobArgs,
    #[command(flatten)]
    pub(crate) input: InputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DequantizeArgs {
    /// Type of the floats
    #[arg(long, default_value = "f32", value_parser = name::<ScaleDtype>())]
    pub(crate) dtype: ScaleDtype,
    #[command(flatten)]
    pub(crate) job: JobArgs,
    #[command(flatten)]
    pub(crate) input: InputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The checkpoint before quantization
    pub(crate) original: PathBuf,
    /// The checkpoint after it
    pub(crate) quantized: PathBuf,
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    #[command(flatten)]
    pub(crate) gates: GateArgs,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// Limits that a comparison must keep.
#[derive(Debug, Args)]
#[command(next_help_heading = "Gates (exit status 1 if one fails)")]
pub(crate) struct GateArgs {
    /// Least SQNR of each tensor, in decibels
    #[arg(long, value_name = "DB", allow_negative_numbers = true, value_parser = parse_limit)]
    pub(crate) min_sqnr: Option<f64>,
    /// Least cosine similarity of each tensor
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = parse_limit)]
    pub(crate) min_cosine: Option<f64>,
    /// Largest mean squared error of each tensor
    #[arg(long, value_name = "X", value_parser = parse_limit)]
    pub(crate) max_mse: Option<f64>,
    /// Largest share of weights of each tensor that changed sign
    #[arg(long, value_name = "SHARE", value_parser = parse_limit)]
    pub(crate) max_sign_flips: Option<f64>,
    /// Most bits per weight of the quantized tensors together
    #[arg(long, value_name = "BITS", value_parser = parse_limit)]
    pub(crate) max_bpw: Option<f64>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    #[command(flatten)]
    pub(crate) input: InputArgs,
}

/// A gate's limit. NaN would let everything pass.
fn parse_limit(s: &str) -> Result<f64, String> {
    s.parse()
        .ok()
        .filter(|x: &f64| !x.is_nan())
        .ok_or_else(|| "expected a number".into())
}
