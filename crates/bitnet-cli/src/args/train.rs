//! Flags of `bitnet train`, each over the configuration file.

use super::checkpoint::QuietArgs;
use super::examples;
use super::names::{NameParser, name, rule};
use bitnet_checkpoint::recipe::{Activations, Choices, Format, Preset, Recipe, Rule, Target};
use bitnet_core::Granularity;
use bitnet_core::scheme::Threshold;
use bitnet_formats::arch::ARCHITECTURES;
use bitnet_quant::qat::{EarlyStopping, Progressive, QATConfig, StraightThroughEstimator};

use bitnet_train::config::{ImageConfig, LmConfig, Network, RunConfig, Teacher, read};
use bitnet_train::run::RunOutput;
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use serde::de::{DeserializeOwned, IntoDeserializer, value};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    #[command(subcommand)]
    pub(crate) what: ModelKind,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelKind {
    /// Train a classifier of images in idx files, such as Fashion-MNIST
    #[command(after_help = examples::TRAIN_IMAGE)]
    Image(ImageArgs),
    /// Train a language model on text files, from scratch or from a folder
    #[command(after_help = examples::TRAIN_LM)]
    Lm(LmArgs),
}

/// How a run goes, whatever is trained.
#[derive(Debug, Args)]
#[command(next_help_heading = Option::<&str>::None)]
pub(crate) struct CommonArgs {
    /// The folder to write: packed model, latent weights, checkpoints, report
    #[arg(long, short, value_name = "FOLDER")]
    pub(crate) out: PathBuf,
    /// Resume the run in that folder, from its newest checkpoint
    #[arg(long)]
    pub(crate) resume: bool,
    /// Configuration file in TOML, which flags override [default with --resume: the run's own]
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) quiet: QuietArgs,
    #[command(flatten)]
    pub(crate) steps: StepArgs,
    #[command(flatten)]
    pub(crate) precision: PrecisionArgs,
    #[command(flatten)]
    pub(crate) comparison: TwinArgs,
    #[command(flatten)]
    pub(crate) method: MethodArgs,
    #[command(flatten)]
    pub(crate) checkpoints: CheckpointArgs,
}

/// The optimizer and its schedule.
#[derive(Debug, Args)]
#[command(next_help_heading = "Optimizer")]
pub(crate) struct StepArgs {
    /// Steps of the optimizer
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Images or windows in a step
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Largest learning rate
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,
    /// Steps in which the learning rate rises
    #[arg(long, value_name = "N")]
    warmup: Option<u64>,
    /// Weight decay of matrices
    #[arg(long, value_name = "X")]
    weight_decay: Option<f64>,
    /// Largest norm of all gradients together
    #[arg(long, value_name = "X")]
    clip: Option<f64>,
    /// Random seed
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// What the layers are quantized to.
#[derive(Debug, Args)]
#[command(next_help_heading = "Precision")]
pub(crate) struct PrecisionArgs {
    /// Start from a preset of `bitnet quantize`, not from the defaults or the recipe of --config;
    /// `bonsai` makes every matrix ternary, embedding and head too
    #[arg(long, value_name = "NAME", value_parser = name::<Preset>())]
    preset: Option<Preset>,
    /// Precision of the layers [default: ternary]
    #[arg(long, value_parser = name::<Target>())]
    precision: Option<Target>,
    /// Rule for the ternary threshold [default: absmean]
    #[arg(long, value_parser = name::<Threshold>())]
    threshold: Option<Threshold>,
    /// Weights under one scale [default: tensor]
    #[arg(long, value_parser = name::<Granularity>())]
    granularity: Option<Granularity>,
    /// Inputs of quantized layers [default: int8]
    #[arg(long, value_name = "TYPE", value_parser = activations())]
    activations: Option<Activations>,
    /// Precision of the layers that a glob matches; may be given several times
    #[arg(long, value_name = "GLOB=PRECISION", value_parser = rule(), hide_possible_values = true)]
    rule: Vec<Rule>,
    /// Layers to leave in floats, besides those of the preset [default: embeddings, heads, norms]
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Container of the packed model [default: safetensors]
    #[arg(long, value_parser = name::<Format>())]
    format: Option<Format>,
}

/// The full-precision twin and the teacher.
#[derive(Debug, Args)]
#[command(next_help_heading = "Twin and teacher")]
pub(crate) struct TwinArgs {
    /// Learn also from this model: a folder, or `self` for the full-precision twin
    #[arg(long, value_name = "FOLDER|self")]
    teacher: Option<String>,
    /// Start the quantized model from the weights of the trained twin
    #[arg(long)]
    fine_tune: bool,
    /// Do not train the full-precision twin: the report then has nothing to compare with
    #[arg(long)]
    no_twin: bool,
}

/// How quantized weights are trained.
#[derive(Debug, Args)]
#[command(next_help_heading = "Training of quantized weights")]
pub(crate) struct MethodArgs {
    /// Gradient of the rounding [default: plain]
    #[arg(long, value_name = "NAME", value_parser = name::<StraightThroughEstimator>())]
    estimator: Option<StraightThroughEstimator>,
    /// Start with BITS and halve them in steps to the target in the first half of the training
    #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u32).range(2..=8))]
    initial_bits: Option<u32>,
    /// Steps in which the strength of quantization rises from 0 to 1
    #[arg(long, value_name = "N")]
    strength_warmup: Option<u64>,
    /// Dead-zone bias: adds X times the sum of a row's zero-valued weights to that row's bias, so
    /// that they keep a gradient (try 0.001)
    #[arg(long, value_name = "X")]
    dead_zone_bias: Option<f32>,
}

/// Evaluations, checkpoints and records.
#[derive(Debug, Args)]
#[command(next_help_heading = "Evaluations and checkpoints")]
pub(crate) struct CheckpointArgs {
    /// Steps between evaluations; 0: only at the end. The weights of the best one are packed
    #[arg(long, value_name = "N")]
    evaluate_every: Option<u64>,
    /// Stop after N evaluations without improvement; needs --evaluate-every
    #[arg(long, value_name = "N")]
    patience: Option<u64>,
    /// Steps between checkpoints; 0: only at the end and when interrupted
    #[arg(long, default_value_t = 0, value_name = "N")]
    every: u64,
    /// Newest checkpoints to keep; 0: all
    #[arg(long, default_value_t = 2, value_name = "N")]
    keep: usize,
    /// Steps between records of each layer in the log (flips, scales, gradients); 0: none
    #[arg(long, value_name = "N")]
    telemetry: Option<u64>,
}

/// The parser of activation types, by the names that configuration files have.
pub(crate) fn activations() -> NameParser<Activations> {
    NameParser::new(|s| {
        Activations::deserialize(IntoDeserializer::<value::Error>::into_deserializer(s))
            .map_err(|e| e.to_string())
    })
}

#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    /// The folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…, each plain or
    /// with .gz
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Network [default: mlp]
    #[arg(long, value_name = "NAME", value_parser = name::<Network>())]
    network: Option<Network>,
    /// Elements of the hidden layers, or channels of the convolutions [default: 512,512; 32,64]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    sizes: Vec<usize>,
    /// Number of classes
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct LmArgs {
    /// Text to learn from; may be given several times. The end of each is held out
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// A folder of a model in floats to start from, of an architecture that --architecture takes
    #[arg(long, value_name = "FOLDER", conflicts_with_all = SHAPE)]
    from: Option<PathBuf>,
    /// A tokenizer.json [default: the one beside --from; bytes without it]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Share of each text that is held out [default: 0.1]
    #[arg(long, value_name = "X")]
    held_out: Option<f64>,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Flags that a model from a folder answers itself.
const SHAPE: [&str; 7] = [
    "architecture",
    "hidden",
    "ffn",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
];

/// The shape of a model from scratch.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ShapeArgs {
    /// Architecture [default: llama]
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(trained()))]
    architecture: Option<String>,
    /// Tokens in a window [default: 128]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Width of the hidden state [default: 128]
    #[arg(long, value_name = "N")]
    hidden: Option<usize>,
    /// Width between the feed-forward matrices [default: 384]
    #[arg(long, value_name = "N")]
    ffn: Option<usize>,
    /// Layers [default: 5]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Query heads [default: 4]
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key and value heads [default: 2]
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Width of a head [default: --hidden / --heads]
    #[arg(long, value_name = "N")]
    head_dim: Option<usize>,
}

/// Names of the architectures that can be trained.
fn trained() -> impl Iterator<Item = &'static str> {
    let all = ARCHITECTURES.iter().filter(|a| a.training.is_some());
    all.map(|a| a.name)
}

fn set<T>(field: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *field = value;
    }
}

impl CommonArgs {
    /// The configuration that flags are put over.
    fn base<T: DeserializeOwned + Default>(&self) -> anyhow::Result<T> {
        let own = self.out.join("run.toml");
        match &self.config {
            Some(path) => Ok(read(path)?),
            None if self.resume && own.exists() => Ok(read(&own)?),
            None => Ok(T::default()),
        }
    }

    fn apply(&self, run: &mut RunConfig, training: &mut QATConfig) -> anyhow::Result<()> {
        let TwinArgs {
            teacher,
            fine_tune,
            no_twin,
        } = &self.comparison;
        run.twin &= !no_twin;
        run.fine_tune |= fine_tune;
        if let Some(teacher) = teacher {
            run.teacher = Some(Teacher::from(teacher.clone()));
        }
        self.steps.apply(run, training);
        set(
            &mut training.evaluate_every,
            self.checkpoints.evaluate_every,
        );
        set(&mut training.telemetry.every, self.checkpoints.telemetry);
        if let Some(patience) = self.checkpoints.patience {
            training.early_stopping = Some(EarlyStopping {
                patience,
                ..training.early_stopping.unwrap_or_default()
            });
        }
        self.method.apply(training);
        self.precision.apply(&mut training.quantization)
    }

    pub(crate) fn output(&self) -> RunOutput {
        RunOutput {
            out: self.out.clone(),
            resume: self.resume,
            every: self.checkpoints.every,
            keep: self.checkpoints.keep,
        }
    }
}

impl StepArgs {
    fn apply(&self, run: &mut RunConfig, training: &mut QATConfig) {
        set(&mut run.batch, self.batch);
        set(&mut run.seed, self.seed);
        set(&mut training.steps, self.steps);
        set(&mut training.optimizer.learning_rate, self.learning_rate);
        set(&mut training.optimizer.weight_decay, self.weight_decay);
        set(&mut training.schedule.warmup, self.warmup);
        training.clip = self.clip.or(training.clip);
    }
}

impl MethodArgs {
    fn apply(&self, training: &mut QATConfig) {
        set(&mut training.estimator, self.estimator);
        set(&mut training.dead_zone_bias, self.dead_zone_bias);
        if let Some(bits) = self.initial_bits {
            let stages = Progressive::first_half(bits, training.steps).stages;
            training.progressive.get_or_insert_default().stages = stages;
        }
        if let Some(steps) = self.strength_warmup {
            training.progressive.get_or_insert_default().warmup = steps;
        }
    }
}

impl PrecisionArgs {
    fn apply(&self, recipe: &mut Recipe) -> anyhow::Result<()> {
        if let Some(preset) = self.preset {
            *recipe = Recipe {
                format: recipe.format,
                compute: recipe.compute.clone(),
                ..preset.build()?
            };
        }
        set(&mut recipe.format, self.format);
        recipe.activations = self.activations.or(recipe.activations);
        // With --resume the run's own configuration has them already.
        let new = |glob: &&String| !recipe.exclude.contains(glob);
        let exclude: Vec<String> = self.exclude.iter().filter(new).cloned().collect();
        recipe.exclude.extend(exclude);
        let new = |rule: &&Rule| !recipe.rules.contains(rule);
        let rules: Vec<Rule> = self.rule.iter().filter(new).cloned().collect();
        recipe.rules.splice(0..0, rules);
        let Self {
            precision,
            threshold,
            granularity,
            ..
        } = *self;
        recipe.default = Choices {
            precision,
            threshold,
            granularity,
            ..Choices::default()
        }
        .over(&recipe.default);
        Ok(())
    }
}

impl ImageArgs {
    pub(crate) fn configuration(&self) -> anyhow::Result<ImageConfig> {
        let mut config: ImageConfig = self.common.base()?;
        set(&mut config.data.folder, self.data.clone());
        set(&mut config.data.classes, self.classes);
        set(&mut config.model.network, self.network);
        if !self.sizes.is_empty() {
            config.model.sizes.clone_from(&self.sizes);
        }
        self.common.apply(&mut config.run, &mut config.training)?;
        anyhow::ensure!(
            !config.data.folder.as_os_str().is_empty(),
            "--data: expected the folder of the images, got none"
        );
        config.complete();
        Ok(config)
    }
}

impl LmArgs {
    pub(crate) fn configuration(&self) -> anyhow::Result<LmConfig> {
        let mut config: LmConfig = self.common.base()?;
        if !self.text.is_empty() {
            config.data.text.clone_from(&self.text);
        }
        config.data.tokenizer = self.tokenizer.clone().or(config.data.tokenizer);
        set(&mut config.data.held_out, self.held_out);
        config.model.from = self.from.clone().or(config.model.from);
        set(&mut config.model.context, self.shape.context);
        let shape = &mut config.model.shape;
        set(&mut shape.architecture, self.shape.architecture.clone());
        set(&mut shape.hidden, self.shape.hidden);
        set(&mut shape.ffn, self.shape.ffn);
        set(&mut shape.layers, self.shape.layers);
        set(&mut shape.heads, self.shape.heads);
        set(&mut shape.kv_heads, self.shape.kv_heads);
        shape.head_dim = self.shape.head_dim.or(shape.head_dim);
        self.common.apply(&mut config.run, &mut config.training)?;
        anyhow::ensure!(
            !config.data.text.is_empty(),
            "--text: expected at least one file, got none"
        );
        Ok(config)
    }
}

/// A configuration as run.toml holds it.
pub(crate) fn document<T: Serialize>(config: &T) -> anyhow::Result<String> {
    Ok(toml::to_string(config)?)
}
