//! The steps of a run: its folder, trainings and packing.

use super::trained::TrainedLayers;
use super::workload::{Phase, RunObserver, Workload};
use crate::config::{RunConfig, Teacher};
use crate::plot;
use crate::variables::variables;
use crate::{Error, Result, folder};
use bitnet_core::Matrix;
use bitnet_formats::replace::{is_empty_folder, remove, write_file};
use bitnet_quant::checkpoint::{self, Existing, Options};
use bitnet_quant::qat::{
    CheckpointConfig, Evaluation, Event, Linear, Linears, QATConfig, QATTrainer, Stopped, Task,
    checkpoints, read_log,
};
use bitnet_quant::recipe::Format;
use bitnet_quant::{Job, Source};
use candle_core::Tensor;
use candle_nn::VarMap;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// The folder of a run and its checkpoints.
#[derive(Debug, Clone)]
pub struct RunOutput {
    /// The folder.
    pub out: PathBuf,
    /// Whether to resume the run in this folder.
    pub resume: bool,
    /// Steps between checkpoints; 0: only at the end or an interruption.
    pub every: u64,
    /// Number of checkpoints to keep per phase; 0: all.
    pub keep: usize,
}

/// The settings of a run and the steps that it consists of.
pub(super) struct Runner<'a, W> {
    pub(super) workload: &'a W,
    pub(super) run: &'a RunConfig,
    pub(super) training: &'a QATConfig,
    pub(super) output: &'a RunOutput,
}

impl<W: Workload> Runner<'_, W> {
    /// Creates or finds the folder of the run and locks it against other processes. A resumed run
    /// must have the settings of its start.
    pub(super) fn open(&self, document: &str) -> Result<File> {
        let out = &self.output.out;
        let toml = out.join("run.toml");
        match (out.exists(), self.output.resume) {
            (true, false) if !is_empty_folder(out) => {
                return Err(bitnet_quant::CheckpointError::Exists { path: out.clone() }.into());
            }
            (true, true) if !toml.exists() => {
                return Err(Error::data(
                    out,
                    "the folder of a run to resume: run.toml",
                    "none",
                ));
            }
            (true, true) => {}
            (_, _) => {
                fs::create_dir_all(out).map_err(bitnet_formats::Error::io(out, "create"))?;
                write_file(&toml, document.as_bytes())?;
            }
        }
        let lock = File::open(&toml).map_err(bitnet_formats::Error::io(&toml, "open"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Error::data(
                    out,
                    "to be the only process of this run",
                    "another one at work",
                ));
            }
            Err(fs::TryLockError::Error(e)) => {
                return Err(bitnet_formats::Error::io(&toml, "lock")(e).into());
            }
        }
        self.check_settings(&toml, document)?;
        Ok(lock)
    }

    /// Compares the settings in run.toml with those of now, line by line.
    fn check_settings(&self, toml: &Path, document: &str) -> Result<()> {
        let began = fs::read_to_string(toml).map_err(bitnet_formats::Error::io(toml, "read"))?;
        if began == document {
            return Ok(());
        }
        // The first line of one text that the other does not have.
        let missing = |text: &str, other: &str| {
            text.lines()
                .find(|line| !other.lines().any(|l| l == *line))
                .map_or("nothing about it".into(), |line| format!("'{line}'"))
        };
        Err(Error::data(
            toml,
            format!(
                "the settings that the run began with, {}",
                missing(&began, document)
            ),
            missing(document, &began),
        ))
    }

    /// Checks the settings, then packs the untrained model as a dry run, so that errors of the last
    /// steps appear before the first.
    pub(super) fn rehearse(&self) -> Result<()> {
        self.check_training()?;
        let (vars, mut model) = self.start(None)?;
        let floats = folder::tensors(&vars);
        QATTrainer::new(self.training.clone())?.prepare(&mut model, &vars)?;
        let path = self.output.out.join("rehearsal");
        folder::replace(
            &path,
            &floats,
            &self.workload.config_json(),
            &self.workload.files()?,
        )?;
        let planned = Source::open(&path).map_err(Error::from).and_then(|source| {
            let given = TrainedLayers::collect(Some(&mut model))?.given;
            Job::quantize_given(
                &source,
                &self.training.quantization,
                &self.packed("packed"),
                given,
            )?;
            Ok(())
        });
        remove(&path)?;
        planned?;
        self.check_dead_zone(&mut model)?;
        if let Some(Teacher::Folder(path)) = &self.run.teacher {
            self.workload.teacher(path)?;
        }
        Ok(())
    }

    /// Rejects training settings that a run does not support.
    fn check_training(&self) -> Result<()> {
        if self.training.quantization.search.is_some() {
            return Err(Error::option(
                "training.quantization.search",
                "none: write down the rules that it finds",
                "one",
            ));
        }
        if self.training.checkpoint.is_some() || self.training.telemetry.file.is_some() {
            return Err(Error::option(
                "training.checkpoint and training.telemetry.file",
                "none: a run has places of its own",
                "one",
            ));
        }
        Ok(self.training.validate()?)
    }

    /// Rejects a dead-zone bias for layers without a bias, in which it is packed.
    fn check_dead_zone(&self, model: &mut W::Model) -> Result<()> {
        let mut no_bias = None;
        model.visit_linears(&mut |name, linear| {
            if let Linear::Qat(layer) = linear
                && layer.dead_zone_bias() != 0.0
                && layer.bias().is_none()
            {
                no_bias = Some(name.to_owned());
            }
            Ok(())
        })?;
        match no_bias {
            None => Ok(()),
            Some(name) => Err(Error::option(
                "training.dead_zone_bias",
                "0 where a layer has no bias, which is what it is packed as",
                format!("{} and {name} without one", self.training.dead_zone_bias),
            )),
        }
    }

    /// Variables and model at the start of a training, or with the weights of a folder.
    pub(super) fn start(&self, from: Option<&Path>) -> Result<(VarMap, W::Model)> {
        let vars = VarMap::new();
        let model = self.workload.build(&variables(&vars, self.run.seed))?;
        match from {
            Some(path) => folder::load(&vars, &Source::open(path)?)?,
            None => self.workload.load_initial(&vars)?,
        }
        Ok((vars, model))
    }

    /// The folder of the twin.
    pub(super) fn twin_path(&self) -> PathBuf {
        self.output.out.join("full")
    }

    /// The teacher of the quantized model, if it has one.
    pub(super) fn teacher(&self) -> Result<Option<W::Model>> {
        match &self.run.teacher {
            None => Ok(None),
            Some(Teacher::Twin) => self.workload.teacher(&self.twin_path()).map(Some),
            Some(Teacher::Folder(path)) => self.workload.teacher(path).map(Some),
        }
    }

    /// Trains, from the newest checkpoint if there is one. Returns the evaluation of the model that
    /// the task then holds, and seconds.
    pub(super) fn train(
        &self,
        phase: Phase,
        task: &mut dyn Task,
        observer: &mut dyn RunObserver,
    ) -> Result<(Evaluation, f64)> {
        let folder = self.output.out.join("checkpoints").join(phase.name());
        let begun = !checkpoints(&folder)?.is_empty();
        let mut config = self.training.clone();
        config.checkpoint = Some(CheckpointConfig {
            folder,
            every: self.output.every,
            keep: self.output.keep,
        });
        config.telemetry.file = Some(self.log(phase));
        if phase == Phase::Twin {
            (config.progressive, config.level_regularization) = (None, 0.0);
        }
        let mut trainer = QATTrainer::new(config)?;
        let mut callback = |event: &Event<'_>| observer.on(phase, event);
        let outcome = if begun {
            trainer.resume(task, &mut callback)?
        } else {
            trainer.run(task, &mut callback)?
        };
        match (outcome.stopped, outcome.kept) {
            (Stopped::Interrupted, _) | (_, None) => {
                Err(bitnet_quant::CheckpointError::Interrupted.into())
            }
            (_, Some(kept)) => Ok((kept, outcome.seconds)),
        }
    }

    /// Path of the telemetry of a phase.
    fn log(&self, phase: Phase) -> PathBuf {
        self.output
            .out
            .join(format!("telemetry-{}.jsonl", phase.name()))
    }

    /// Plots the telemetry of the quantized model.
    pub(super) fn plot(&self) -> Result<()> {
        let log = read_log(&self.log(Phase::Quantized))?;
        ["training.svg", "training.png"]
            .into_iter()
            .try_for_each(|name| plot::save(&log, &self.output.out.join(name)))
    }

    /// Path of a packed model by name.
    pub(super) fn packed(&self, name: &str) -> PathBuf {
        match self.training.quantization.format {
            Format::Gguf => self.output.out.join(format!("{name}.gguf")),
            Format::Safetensors | Format::HfBitnet | Format::Mlx | Format::Onnx => {
                self.output.out.join(name)
            }
        }
    }

    /// Quantizes a folder as `bitnet quantize` does.
    pub(super) fn pack(
        &self,
        from: &Path,
        to: &Path,
        given: BTreeMap<String, Matrix>,
    ) -> Result<checkpoint::Summary> {
        let (source, recipe) = (Source::open(from)?, &self.training.quantization);
        let job = Job::quantize_given(&source, recipe, to, given)?;
        let options = Options {
            threads: recipe.compute.threads,
            kernels: recipe.compute.machine()?.kernels,
            progress: &(),
            interrupt: &AtomicBool::new(false),
            existing: Existing::Replace,
        };
        Ok(checkpoint::run(&job, to, &options)?)
    }

    /// Packs the trained model and checks that the file holds its weights.
    pub(super) fn pack_trained(
        &self,
        trained: &TrainedLayers,
        latent: &BTreeMap<String, Tensor>,
        to: &Path,
    ) -> Result<checkpoint::Summary> {
        let from = self.output.out.join("rounded");
        let mut weights = latent.clone();
        for layer in trained.layers.iter().filter(|layer| layer.pack_rounded) {
            weights.insert(layer.name.clone(), layer.weight.clone());
        }
        weights.extend(trained.biases.clone());
        folder::replace(
            &from,
            &weights,
            &self.workload.config_json(),
            &self.workload.files()?,
        )?;
        let summary = self.pack(&from, to, trained.given.clone());
        remove(&from)?;
        let summary = summary?;
        if self.training.quantization.format != Format::Gguf {
            let source = Source::open(to)?;
            trained
                .layers
                .iter()
                .try_for_each(|layer| layer.check(&source))?;
        }
        Ok(summary)
    }
}
