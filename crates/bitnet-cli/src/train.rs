//! Flags of `bitnet train`, each over the configuration file.

use bitnet_core::Granularity;
use bitnet_core::scheme::Threshold;
use bitnet_quant::Activations;
use bitnet_quant::qat::{EarlyStopping, Progressive, StraightThroughEstimator};
use bitnet_quant::recipe::{Choices, Format, Rule, Target};
use bitnet_train::config::{ImageConfig, LmConfig, Network, RunConfig, Teacher, read};
use bitnet_train::run::RunOutput;
use clap::{Args, Subcommand};
use serde::Serialize;
use serde::de::{DeserializeOwned, IntoDeserializer, value};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    #[command(subcommand)]
    pub(crate) what: What,
}

#[derive(Debug, Subcommand)]
pub(crate) enum What {
    /// A classifier of images in idx files, as Fashion-MNIST's.
    Image(ImageArgs),
    /// A language model on text files, from scratch or from a folder.
    Lm(LmArgs),
}

/// How a run goes, whatever is trained.
#[derive(Debug, Args)]
pub(crate) struct CommonArgs {
    /// The folder to write: packed model, latent weights, checkpoints, report.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: PathBuf,
    /// Go on with the run that is there, from its newest checkpoint.
    #[arg(long)]
    pub(crate) resume: bool,
    /// Configuration in TOML; flags count more than it. With --resume, the run's own where there is
    /// none.
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
    /// Steps between checkpoints; 0: only at the end and when interrupted.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) every: u64,
    /// Checkpoints that stay, the newest; 0: all.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(crate) keep: usize,
    /// Steps of the optimizer.
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<u64>,
    /// Images or windows of a step.
    #[arg(long, value_name = "N")]
    pub(crate) batch: Option<usize>,
    /// What all randomness is drawn from.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Largest learning rate.
    #[arg(long, value_name = "X")]
    pub(crate) learning_rate: Option<f64>,
    /// Decay of matrices.
    #[arg(long, value_name = "X")]
    pub(crate) weight_decay: Option<f64>,
    /// Steps in which the learning rate rises.
    #[arg(long, value_name = "N")]
    pub(crate) warmup: Option<u64>,
    /// Steps between records of every layer in the log: flips, scales, gradients; 0: none.
    #[arg(long, value_name = "N")]
    pub(crate) telemetry: Option<u64>,
    /// Largest norm of all gradients together.
    #[arg(long, value_name = "X")]
    pub(crate) clip: Option<f64>,
    /// Steps between evaluations; 0: only at the end. Of several the best one decides which weights
    /// are packed.
    #[arg(long, value_name = "N")]
    pub(crate) evaluate_every: Option<u64>,
    /// Stop after this many evaluations without improvement; needs --evaluate-every.
    #[arg(long, value_name = "N")]
    pub(crate) patience: Option<u64>,
    /// Begin with so many bits, and go to the target by half as many, and so on, in the first half
    /// of the steps.
    #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u32).range(2..=8))]
    pub(crate) initial_bits: Option<u32>,
    /// Steps in which the strength of quantization rises from 0 to 1.
    #[arg(long, value_name = "N")]
    pub(crate) strength_warmup: Option<u64>,
    /// Weights of 0 count so much as a bias of their row, which leads them out of the dead zone:
    /// 0.001 for instance.
    #[arg(long, value_name = "X")]
    pub(crate) dead_zone_bias: Option<f32>,
    /// Learn also from this model: a folder, or `self` for the full-precision twin.
    #[arg(long, value_name = "FOLDER|self")]
    pub(crate) teacher: Option<String>,
    /// Do not train the full-precision twin: the report then has nothing to compare with.
    #[arg(long)]
    pub(crate) no_twin: bool,
    /// Begin the quantized model with the weights of the trained twin.
    #[arg(long)]
    pub(crate) fine_tune: bool,
    /// How gradients pass the rounding: plain, clipped:RANGE, lsq, stretched, soft:TEMPERATURE
    /// [default: plain].
    #[arg(long, value_name = "NAME")]
    pub(crate) estimator: Option<StraightThroughEstimator>,
    /// Inputs of quantized layers: float, int8, int4, sign [default: int8].
    #[arg(long, value_name = "TYPE", value_parser = parse_name::<Activations>)]
    pub(crate) activations: Option<Activations>,
    /// Container of the packed model: safetensors, hf-bitnet, gguf [default: safetensors].
    #[arg(long)]
    pub(crate) format: Option<Format>,
    /// Layers to leave in floats, besides embeddings, heads and norms.
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// Precision of the layers that a glob matches; may be given several times.
    #[arg(long, value_name = "GLOB=PRECISION")]
    pub(crate) rule: Vec<Rule>,
    /// binary, ternary, int2, int3, int4, int8 [default: ternary].
    #[arg(long)]
    pub(crate) precision: Option<Target>,
    /// Ternary rule: absmean, mean, median, adaptive, optimal, factor:X [default: absmean].
    #[arg(long)]
    pub(crate) threshold: Option<Threshold>,
    /// What one scale covers: tensor, channel, group:N [default: tensor].
    #[arg(long)]
    pub(crate) granularity: Option<Granularity>,
    /// No progress on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// A name as configuration files have it.
fn parse_name<T: DeserializeOwned>(name: &str) -> Result<T, String> {
    T::deserialize(IntoDeserializer::<value::Error>::into_deserializer(name))
        .map_err(|e| e.to_string())
}

#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// The folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…, each plain or with
    /// .gz.
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Number of classes.
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// mlp, cnn [default: mlp].
    #[arg(long, value_name = "NAME")]
    network: Option<Network>,
    /// Elements of the hidden layers, or channels of the convolutions [default: 512,512; 32,64].
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    sizes: Vec<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct LmArgs {
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Text to learn from; may be given several times. The end of each is held out.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// A tokenizer.json [default: the one beside --from; bytes without it].
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Share of each text that is held out [default: 0.1].
    #[arg(long, value_name = "X")]
    held_out: Option<f64>,
    /// A folder of a llama or bitnet model in floats to begin from.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["architecture", "hidden", "ffn", "layers", "heads", "kv_heads"])]
    from: Option<PathBuf>,
    /// Tokens of a window [default: 128].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// llama or bitnet [default: llama].
    #[arg(long, value_name = "NAME")]
    architecture: Option<String>,
    /// Elements of a token's state [default: 128].
    #[arg(long, value_name = "N")]
    hidden: Option<usize>,
    /// Elements between the feed-forward matrices [default: 384].
    #[arg(long, value_name = "N")]
    ffn: Option<usize>,
    /// Layers [default: 5].
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Query heads [default: 4].
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key and value heads [default: 2].
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
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

    fn apply(&self, run: &mut RunConfig, training: &mut bitnet_quant::qat::QATConfig) {
        set(&mut run.batch, self.batch);
        run.twin &= !self.no_twin;
        run.fine_tune |= self.fine_tune;
        set(&mut training.estimator, self.estimator);
        if let Some(teacher) = &self.teacher {
            run.teacher = Some(Teacher::from(teacher.clone()));
        }
        set(&mut training.steps, self.steps);
        set(&mut run.seed, self.seed);
        set(&mut training.optimizer.learning_rate, self.learning_rate);
        set(&mut training.optimizer.weight_decay, self.weight_decay);
        set(&mut training.schedule.warmup, self.warmup);
        set(&mut training.evaluate_every, self.evaluate_every);
        set(&mut training.telemetry.every, self.telemetry);
        training.clip = self.clip.or(training.clip);
        set(&mut training.dead_zone_bias, self.dead_zone_bias);
        if let Some(patience) = self.patience {
            training.early_stopping = Some(EarlyStopping {
                patience,
                ..training.early_stopping.unwrap_or_default()
            });
        }
        if let Some(bits) = self.initial_bits {
            let stages = Progressive::first_half(bits, training.steps).stages;
            training.progressive.get_or_insert_default().stages = stages;
        }
        if let Some(steps) = self.strength_warmup {
            training.progressive.get_or_insert_default().warmup = steps;
        }
        let recipe = &mut training.quantization;
        set(&mut recipe.format, self.format);
        recipe.activations = self.activations.or(recipe.activations);
        // With --resume the run's own configuration has them already.
        recipe.exclude.extend(
            self.exclude
                .iter()
                .filter(|glob| !recipe.exclude.contains(glob))
                .cloned()
                .collect::<Vec<_>>(),
        );
        let rules: Vec<Rule> = self
            .rule
            .iter()
            .filter(|rule| !recipe.rules.contains(rule))
            .cloned()
            .collect();
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
    }

    pub(crate) fn output(&self) -> RunOutput {
        RunOutput {
            out: self.out.clone(),
            resume: self.resume,
            every: self.every,
            keep: self.keep,
        }
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
        self.common.apply(&mut config.run, &mut config.training);
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
        set(&mut config.model.context, self.context);
        let shape = &mut config.model.shape;
        set(&mut shape.architecture, self.architecture.clone());
        set(&mut shape.hidden, self.hidden);
        set(&mut shape.ffn, self.ffn);
        set(&mut shape.layers, self.layers);
        set(&mut shape.heads, self.heads);
        set(&mut shape.kv_heads, self.kv_heads);
        self.common.apply(&mut config.run, &mut config.training);
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
