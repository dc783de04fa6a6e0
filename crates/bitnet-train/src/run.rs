//! A run: the full-precision twin, the twin quantized, and the model that is trained quantized,
//! measured alike.
//!
//! ```text
//! OUT/run.toml             the configuration
//! OUT/full/                the twin: config.json, model.safetensors, tokenizer                       what `self` teaches
//! OUT/latent/              the float weights behind the quantized model, as a folder of the same kind
//! OUT/packed[.gguf]        the quantized model
//! OUT/checkpoints/PHASE/   where a training stands; the newest few
//! OUT/telemetry-PHASE.jsonl  steps, evaluations and what the layers went through
//! OUT/training.{svg,png}   the same, drawn
//! OUT/report.json          what came of it all
//! ```
//!
//! Whatever interrupts a run, the same run goes on from the newest checkpoint and ends with the
//! same weights.

use crate::config::{Distillation, RunConfig, Teacher};
use crate::variables::variables;
use crate::{Error, Result, folder};
use bitnet_core::scheme::{Method, Threshold};
use bitnet_core::{Matrix, Precision, Scheme};
use bitnet_formats::Content;
use bitnet_formats::arch::Architecture;
use bitnet_formats::hf::{BitnetConfig, LinearClass, Mode};
use bitnet_formats::replace::{remove, write_file};
use bitnet_quant::checkpoint::{self, Existing, Options};
use bitnet_quant::qat::{
    CheckpointConfig, Evaluation, Event, Linear, Linears, QATConfig, QATTrainer, Stopped, Task,
    checkpoints, plot, read_log,
};
use bitnet_quant::recipe::Format;
use bitnet_quant::{Activations, Job, Source};
use candle_core::Tensor;
use candle_nn::{VarBuilder, VarMap};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// What a run does with one kind of model and data.
pub trait Work {
    /// The model.
    type Model: Linears;

    /// What [`Work::measure`] measures; less is better.
    fn metric(&self) -> &'static str;

    /// A model with the variables of `vb`.
    ///
    /// # Errors
    /// For a shape that means nothing.
    fn build(&self, vb: &VarBuilder<'_>) -> Result<Self::Model>;

    /// Sets the variables of a new model to what the run begins from, where that is not random.
    ///
    /// # Errors
    /// For weights that do not fit.
    fn begin(&self, vars: &VarMap) -> Result<()>;

    /// config.json of the folders that are written.
    fn config_json(&self) -> Value;

    /// Other files of these folders.
    ///
    /// # Errors
    /// For a tokenizer that cannot be read.
    fn files(&self) -> Result<Vec<(String, Vec<u8>)>>;

    /// The model with its data.
    fn task<'w>(
        &'w self,
        model: Self::Model,
        vars: VarMap,
        teacher: Option<Self::Model>,
    ) -> Box<dyn Task + 'w>;

    /// A model to learn from, of constants.
    ///
    /// # Errors
    /// For a folder with another kind of model, or other outputs.
    fn teacher(&self, path: &Path) -> Result<Self::Model>;

    /// Measures the model in a folder or file, packed or not, on what is held out.
    ///
    /// # Errors
    /// For what cannot be read or run.
    fn measure(&self, path: &Path) -> Result<f64>;
}

/// The part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The full-precision twin is trained.
    Twin,
    /// The quantized model is trained.
    Quantized,
}

impl Phase {
    /// The name in the folder: `full` or `quantized`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Twin => "full",
            Self::Quantized => "quantized",
        }
    }
}

/// Hears what happens in each phase, and may stop the run at the end of a step.
pub trait Observer {
    /// Something happened.
    fn on(&mut self, phase: Phase, event: &Event<'_>) -> ControlFlow<()>;
}

impl Observer for () {
    fn on(&mut self, _: Phase, _: &Event<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Where a run writes.
#[derive(Debug, Clone)]
pub struct Place {
    /// The folder.
    pub out: PathBuf,
    /// Whether a run that is there already goes on.
    pub resume: bool,
    /// Steps between checkpoints; 0: only where it ends or is interrupted.
    pub every: u64,
    /// How many checkpoints of a phase stay; 0: all.
    pub keep: usize,
}

/// What came of a run. Each measure is that of [`Work::measure`], of the model as it was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What is measured; less is better.
    pub metric: String,
    /// Weights and other parameters of the model.
    pub parameters: u64,
    /// The twin.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub full: Option<f64>,
    /// The twin, quantized after its training.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ptq: Option<f64>,
    /// The model that was trained quantized, packed.
    pub qat: f64,
    /// The same before packing: the evaluation in its training, the best one where there were
    /// several.
    pub qat_in_training: f64,
    /// The step after which it was so: the last, or the one of the best evaluation.
    pub qat_step: u64,
    /// Most steps of each training.
    pub steps: u64,
    /// Seconds of training of the twin and of the quantized model, of the last run of each.
    pub seconds: [f64; 2],
    /// Bytes of the packed file.
    pub packed_bytes: u64,
    /// Bits per weight of the packed layers, scales included.
    pub packed_bits: f64,
    /// The packed file or folder.
    pub packed: PathBuf,
}

impl Report {
    /// The share of what quantization after training loses that training quantized wins back; none
    /// where nothing was lost.
    pub fn recovered(&self) -> Option<f64> {
        let (full, ptq) = (self.full?, self.ptq?);
        (ptq > full).then(|| (ptq - self.qat) / (ptq - full))
    }
}

/// Trains, packs and measures. `document` is the configuration as run.toml shall hold it.
///
/// # Errors
/// [`bitnet_quant::CheckpointError::Exists`] for a folder that is there, unless the run is to go on;
/// [`bitnet_quant::CheckpointError::Interrupted`] where the observer stopped it; what settings, data,
/// training and files can fail with, most of it before the first step.
pub fn run<W: Work>(
    work: &W,
    run: &RunConfig,
    training: &QATConfig,
    document: &str,
    place: &Place,
    observer: &mut dyn Observer,
) -> Result<Report> {
    let runner = Runner {
        work,
        run,
        training,
        out: &place.out,
        place,
    };
    let fresh = !place.out.exists();
    let _lock = runner.open(document)?;
    let report_path = place.out.join("report.json");
    if let Ok(text) = fs::read(&report_path) {
        return serde_json::from_slice(&text)
            .map_err(|e| Error::data(&report_path, "the report of a run", e));
    }
    runner.rehearse().inspect_err(|_| {
        if fresh {
            let _ = fs::remove_dir_all(&place.out);
        }
    })?;
    let full_path = place.out.join("full");
    let mut seconds = [0.0; 2];
    let (mut full, mut ptq) = (None, None);
    if run.twin {
        if !full_path.exists() {
            let (vars, model) = runner.start(None)?;
            let mut task = work.task(model, vars.clone(), None);
            seconds[0] = runner.train(Phase::Twin, &mut *task, observer)?.1;
            folder::save(
                &full_path,
                &folder::tensors(&vars),
                &work.config_json(),
                &work.files()?,
            )?;
        }
        full = Some(work.measure(&full_path)?);
        let packed = runner.packed("ptq");
        runner.pack(&full_path, &packed, BTreeMap::new())?;
        ptq = Some(work.measure(&packed)?);
        remove(&packed)?;
    }
    let (vars, mut model) = runner.start(run.fine_tune.then_some(full_path.as_path()))?;
    let own: HashSet<String> = folder::sorted(&vars).into_keys().collect();
    QATTrainer::new(training.clone())?.prepare(&mut model, &vars)?;
    let mut task = work.task(model, vars.clone(), runner.teacher()?);
    let (kept, took) = runner.train(Phase::Quantized, &mut *task, observer)?;
    seconds[1] = took;
    runner.plot()?;
    // Learned scales are no variables of the model: the packed weights hold them.
    let mut latent = folder::tensors(&vars);
    latent.retain(|name, _| own.contains(name));
    let trained = Trained::of(task.linears())?;
    let (packed, latent_path) = (runner.packed("packed"), place.out.join("latent"));
    folder::replace(
        &latent_path,
        &latent,
        &trained.config_json(work.config_json()),
        &work.files()?,
    )?;
    let (summary, parameters) = (
        runner.pack_trained(&trained, &latent, &packed)?,
        latent.values().map(|t| t.elem_count() as u64).sum(),
    );
    let layers = summary
        .tensors
        .iter()
        .filter(|t| t.layout.is_some())
        .fold((0, 0), |(b, w), t| (b + t.bytes, w + t.weights));
    let report = Report {
        metric: work.metric().into(),
        parameters,
        full,
        ptq,
        qat: work.measure(&packed)?,
        qat_in_training: kept.value,
        qat_step: kept.step,
        steps: training.steps,
        seconds,
        packed_bytes: summary.file_bytes,
        packed_bits: layers.0 as f64 * 8.0 / layers.1.max(1) as f64,
        packed,
    };
    write_file(&report_path, format!("{:#}\n", json!(report)).as_bytes())?;
    Ok(report)
}

struct Runner<'a, W> {
    work: &'a W,
    run: &'a RunConfig,
    training: &'a QATConfig,
    out: &'a Path,
    place: &'a Place,
}

impl<W: Work> Runner<'_, W> {
    /// Makes the folder, or finds it, and keeps other processes from it. A run goes on as it began.
    fn open(&self, document: &str) -> Result<File> {
        let toml = self.out.join("run.toml");
        match (self.out.exists(), self.place.resume) {
            (true, false) => {
                return Err(bitnet_quant::CheckpointError::Exists {
                    path: self.out.to_path_buf(),
                }
                .into());
            }
            (true, true) if !toml.exists() => {
                return Err(Error::data(
                    self.out,
                    "the folder of a run to go on with: run.toml",
                    "none",
                ));
            }
            (true, true) => {}
            (false, _) => {
                fs::create_dir_all(self.out)
                    .map_err(bitnet_formats::Error::io(self.out, "create"))?;
                write_file(&toml, document.as_bytes())?;
            }
        }
        let lock = File::open(&toml).map_err(bitnet_formats::Error::io(&toml, "open"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Error::data(
                    self.out,
                    "to be the only process of this run",
                    "another one at work",
                ));
            }
            Err(fs::TryLockError::Error(e)) => {
                return Err(bitnet_formats::Error::io(&toml, "lock")(e).into());
            }
        }
        let began = fs::read_to_string(&toml).map_err(bitnet_formats::Error::io(&toml, "read"))?;
        let missing = |text: &str, other: &str| {
            text.lines()
                .find(|line| !other.lines().any(|l| l == *line))
                .map(str::to_string)
        };
        if began != document {
            let (there, here) = (missing(&began, document), missing(document, &began));
            let say = |line: Option<String>| {
                line.map_or("nothing about it".into(), |line| format!("'{line}'"))
            };
            return Err(Error::data(
                &toml,
                format!("the settings that the run began with, {}", say(there)),
                say(here),
            ));
        }
        Ok(lock)
    }

    /// Does with the model of the start what is done in the end, so that nothing goes wrong there
    /// that can be known now.
    fn rehearse(&self) -> Result<()> {
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
        self.training.validate()?;
        let (vars, mut model) = self.start(None)?;
        let floats = folder::tensors(&vars);
        QATTrainer::new(self.training.clone())?.prepare(&mut model, &vars)?;
        let path = self.out.join("rehearsal");
        folder::replace(
            &path,
            &floats,
            &self.work.config_json(),
            &self.work.files()?,
        )?;
        let planned = Source::open(&path).map_err(Error::from).and_then(|source| {
            let given = Trained::of(Some(&mut model))?.given;
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
        if let Some(name) = no_bias {
            let got = format!("{} and {name} without one", self.training.dead_zone_bias);
            return Err(Error::option(
                "training.dead_zone_bias",
                "0 where a layer has no bias, which is what it is packed as",
                got,
            ));
        }
        if let Some(Teacher::Folder(path)) = &self.run.teacher {
            self.work.teacher(path)?;
        }
        Ok(())
    }

    /// Variables and model at the start, or with the weights of a folder.
    fn start(&self, from: Option<&Path>) -> Result<(VarMap, W::Model)> {
        let vars = VarMap::new();
        let model = self.work.build(&variables(&vars, self.run.seed))?;
        match from {
            Some(path) => folder::load(&vars, &Source::open(path)?)?,
            None => self.work.begin(&vars)?,
        }
        Ok((vars, model))
    }

    fn teacher(&self) -> Result<Option<W::Model>> {
        match &self.run.teacher {
            None => Ok(None),
            Some(Teacher::Twin) => self.work.teacher(&self.out.join("full")).map(Some),
            Some(Teacher::Folder(path)) => self.work.teacher(path).map(Some),
        }
    }

    /// The evaluation of the model that the task now holds, and seconds.
    fn train(
        &self,
        phase: Phase,
        task: &mut dyn Task,
        observer: &mut dyn Observer,
    ) -> Result<(Evaluation, f64)> {
        let folder = self.out.join("checkpoints").join(phase.name());
        let begun = !checkpoints(&folder)?.is_empty();
        let mut config = self.training.clone();
        config.checkpoint = Some(CheckpointConfig {
            folder,
            every: self.place.every,
            keep: self.place.keep,
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

    fn log(&self, phase: Phase) -> PathBuf {
        self.out.join(format!("telemetry-{}.jsonl", phase.name()))
    }

    /// Draws the log of the quantized model.
    fn plot(&self) -> Result<()> {
        let log = read_log(&self.log(Phase::Quantized))?;
        ["training.svg", "training.png"]
            .into_iter()
            .try_for_each(|name| Ok(plot::save(&log, &self.out.join(name))?))
    }

    fn packed(&self, name: &str) -> PathBuf {
        match self.training.quantization.format {
            Format::Gguf => self.out.join(format!("{name}.gguf")),
            Format::Safetensors | Format::HfBitnet => self.out.join(name),
        }
    }

    /// Quantizes as `bitnet quantize` does.
    fn pack(
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

    /// Packs what was trained, and looks whether the file holds it.
    fn pack_trained(
        &self,
        trained: &Trained,
        latent: &BTreeMap<String, Tensor>,
        to: &Path,
    ) -> Result<checkpoint::Summary> {
        let from = self.out.join("rounded");
        let mut weights = latent.clone();
        for layer in trained.layers.iter().filter(|layer| layer.rounded_first) {
            weights.insert(layer.name.clone(), layer.weight.clone());
        }
        weights.extend(trained.biases.clone());
        folder::replace(
            &from,
            &weights,
            &self.work.config_json(),
            &self.work.files()?,
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

/// The layers of a trained model that are quantized.
struct Trained {
    layers: Vec<Layer>,
    /// Biases that hold a dead zone, by name, `[N]`.
    biases: BTreeMap<String, Tensor>,
    /// Values and scales of integers whose scales were learned: of levels that nothing reaches the
    /// scale is not to be found again in Ŵ.
    given: BTreeMap<String, Matrix>,
    /// Linear layers in floats.
    floats: Vec<String>,
    /// Whether transformers computes the same from the latent weights: b1.58 itself.
    online: bool,
}

struct Layer {
    /// Of the weights.
    name: String,
    /// Ŵ `[N, K]`.
    weight: Tensor,
    /// Whether packing begins with Ŵ: quantizing it again gives the same values whatever the
    /// container, and learned scales are in it.
    rounded_first: bool,
}

impl Trained {
    fn of(model: Option<&mut dyn Linears>) -> Result<Self> {
        let mut trained = Self {
            layers: vec![],
            biases: BTreeMap::new(),
            given: BTreeMap::new(),
            floats: vec!["lm_head".into()],
            online: true,
        };
        if let Some(model) = model {
            model.visit_linears(&mut |name, linear| {
                let Linear::Qat(layer) = linear else {
                    trained.floats.push(name.into());
                    return Ok(());
                };
                let (scheme, learned) = (layer.scheme(), layer.learned_scale().is_some());
                let dead_zone = layer.dead_zone_bias() != 0.0;
                trained.online &= *scheme == Scheme::ternary(Threshold::Absmean)
                    && !learned
                    && layer.activations() == Activations::Int8;
                trained.online &= !dead_zone;
                if let Some(bias) = layer.packed_bias()?.filter(|_| dead_zone) {
                    trained.biases.insert(format!("{name}.bias"), bias);
                }
                let planes = matches!(scheme.method, Method::Ternary { planes, .. } if planes > 1);
                let rounded_first =
                    learned || (scheme.precision()? == Precision::Ternary && !planes);
                if learned && !matches!(scheme.precision()?, Precision::Ternary | Precision::Binary)
                {
                    trained
                        .given
                        .insert(format!("{name}.weight"), layer.quantized_weights()?);
                }
                trained.layers.push(Layer {
                    name: format!("{name}.weight"),
                    weight: layer.dequantized_weights()?,
                    rounded_first,
                });
                Ok(())
            })?;
        }
        trained.floats.sort();
        trained.floats.dedup();
        Ok(trained)
    }

    /// config.json of the latent weights: where transformers can, it makes them ternary in each
    /// forward pass.
    fn config_json(&self, mut json: Value) -> Value {
        let decoder = json["model_type"]
            .as_str()
            .is_some_and(|name| Architecture::by_name(name).is_some());
        if self.online
            && decoder
            && let Some(object) = json.as_object_mut()
        {
            let bitnet = BitnetConfig {
                linear_class: LinearClass::AutoBitLinear,
                mode: Mode::Online,
            };
            object.insert("quantization_config".into(), bitnet.to_json(&self.floats));
        }
        json
    }
}

impl Layer {
    /// Whether a checkpoint holds these weights: scales may have been rounded to 16 bits.
    fn check(&self, source: &Source) -> Result<()> {
        let bad = |got: String| {
            Error::from(bitnet_formats::Error::tensor(
                &source.path,
                &self.name,
                "the weights of the last step",
                got,
            ))
        };
        let tensor = source.find(&self.name).ok_or_else(|| bad("none".into()))?;
        let expected = self.weight.flatten_all()?.to_vec1::<f32>()?;
        let got = match &tensor.content {
            Content::Quantized(q) => source.matrix(&self.name, q)?.dequantize(),
            _ => folder::read(source, &self.name, self.weight.dims())?
                .flatten_all()?
                .to_vec1::<f32>()?,
        };
        // bf16 keeps 8 bits of a scale.
        match expected
            .iter()
            .zip(&got)
            .position(|(e, g)| (e - g).abs() > e.abs() / 128.0)
        {
            Some(at) => Err(bad(format!(
                "{} instead of {} at index {at}: this recipe cannot hold them",
                got[at], expected[at]
            ))),
            None => Ok(()),
        }
    }
}

/// What, beside variables and step, decides the losses of a task.
pub(crate) fn state(
    seed: u64,
    batch: usize,
    distillation: &Distillation,
    teacher: bool,
    data: u64,
) -> Value {
    json!({"seed": seed, "batch": batch, "data": format!("{data:016x}"), "teacher": teacher, "distillation": teacher.then_some(distillation)})
}

/// Refuses to go on where something else decides the losses now.
pub(crate) fn restore(there: &Value, here: &Value) -> bitnet_quant::Result<()> {
    let differs = here
        .as_object()
        .into_iter()
        .flatten()
        .find(|(key, value)| there.get(key) != Some(value));
    match differs {
        None => Ok(()),
        Some((key, value)) => {
            let expected = format!(
                "{key} {} as in the checkpoint, for a training goes on as it began",
                there.get(key).unwrap_or(&Value::Null)
            );
            Err(bitnet_quant::Error::Input {
                what: "training",
                expected,
                got: value.to_string(),
            })
        }
    }
}
