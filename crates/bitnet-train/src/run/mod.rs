//! A run trains the full-precision twin and the quantized model, quantizes the twin after training
//! (PTQ), and measures all three alike. Start with [`run()`].
//!
//! ```text
//! OUT/run.toml               the configuration
//! OUT/full/                  the twin: config.json, model.safetensors, tokenizer
//! OUT/latent/                the latent weights of the quantized model, in the same format
//! OUT/packed[.gguf]          the quantized model
//! OUT/checkpoints/PHASE/     the newest checkpoints of a training
//! OUT/telemetry-PHASE.jsonl  steps, evaluations and statistics of the layers
//! OUT/training.{svg,png}     plots of them
//! OUT/report.json            the results
//! ```
//!
//! An interrupted run resumes from its newest checkpoint and ends with the same weights.

mod report;
pub(crate) mod resume;
mod runner;
mod trained;
mod workload;

pub use report::RunReport;
pub use runner::RunOutput;
pub use workload::{Phase, RunObserver, Workload};

use crate::config::RunConfig;
use crate::{Error, Result, folder};
use bitnet_formats::replace::{remove, write_file};
use bitnet_quant::qat::{QATConfig, QATTrainer};
use runner::Runner;
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use trained::TrainedLayers;

/// Trains, packs and measures. `document` is the text of run.toml.
///
/// # Errors
/// [`bitnet_quant::CheckpointError::Exists`] for an existing folder, unless the run resumes;
/// [`bitnet_quant::CheckpointError::Interrupted`] if the observer stopped it; errors of settings,
/// data, training and files, most of them before the first step.
pub fn run<W: Workload>(
    workload: &W,
    run: &RunConfig,
    training: &QATConfig,
    document: &str,
    output: &RunOutput,
    observer: &mut dyn RunObserver,
) -> Result<RunReport> {
    let runner = Runner {
        workload,
        run,
        training,
        output,
    };
    let fresh = !output.out.exists();
    let _lock = runner.open(document)?;
    let report_path = output.out.join("report.json");
    if let Ok(text) = fs::read(&report_path) {
        return serde_json::from_slice(&text)
            .map_err(|e| Error::data(&report_path, "the report of a run", e));
    }
    runner.rehearse().inspect_err(|_| {
        if fresh {
            let _ = fs::remove_dir_all(&output.out);
        }
    })?;
    let twin = match run.twin {
        true => Some(train_twin(&runner, observer)?),
        false => None,
    };
    let report = train_quantized(&runner, twin, observer)?;
    write_file(&report_path, format!("{:#}\n", json!(report)).as_bytes())?;
    Ok(report)
}

/// Results of the full-precision twin.
struct TwinResult {
    full: f64,
    ptq: f64,
    seconds: f64,
}

/// Trains the twin, unless its folder exists, then measures it and its quantization.
fn train_twin<W: Workload>(
    runner: &Runner<'_, W>,
    observer: &mut dyn RunObserver,
) -> Result<TwinResult> {
    let (workload, path) = (runner.workload, runner.twin_path());
    let mut seconds = 0.0;
    if !path.exists() {
        let (vars, model) = runner.start(None)?;
        let mut task = workload.task(model, vars.clone(), None);
        seconds = runner.train(Phase::Twin, &mut *task, observer)?.1;
        folder::save(
            &path,
            &folder::tensors(&vars),
            &workload.config_json(),
            &workload.files()?,
        )?;
    }
    let full = workload.measure(&path)?;
    let packed = runner.packed("ptq");
    runner.pack(&path, &packed, BTreeMap::new())?;
    let ptq = workload.measure(&packed)?;
    remove(&packed)?;
    Ok(TwinResult { full, ptq, seconds })
}

/// Trains the quantized model, writes and packs it, and measures the packed file.
fn train_quantized<W: Workload>(
    runner: &Runner<'_, W>,
    twin: Option<TwinResult>,
    observer: &mut dyn RunObserver,
) -> Result<RunReport> {
    let (workload, training, out) = (runner.workload, runner.training, &runner.output.out);
    let twin_path = runner.twin_path();
    let (vars, mut model) = runner.start(runner.run.fine_tune.then_some(twin_path.as_path()))?;
    let own: HashSet<String> = folder::sorted(&vars).into_keys().collect();
    QATTrainer::new(training.clone())?.prepare(&mut model, &vars)?;
    let mut task = workload.task(model, vars.clone(), runner.teacher()?);
    let (kept, seconds) = runner.train(Phase::Quantized, &mut *task, observer)?;
    runner.plot()?;
    // Learned scales are not variables of the model: the packed weights hold them.
    let mut latent = folder::tensors(&vars);
    latent.retain(|name, _| own.contains(name));
    let trained = TrainedLayers::collect(task.linears())?;
    let (packed, latent_path) = (runner.packed("packed"), out.join("latent"));
    folder::replace(
        &latent_path,
        &latent,
        &trained.config_json(workload.config_json()),
        &workload.files()?,
    )?;
    let summary = runner.pack_trained(&trained, &latent, &packed)?;
    let (layer_bytes, layer_weights) = summary
        .tensors
        .iter()
        .filter(|t| t.layout.is_some())
        .fold((0, 0), |(b, w), t| (b + t.bytes, w + t.weights));
    Ok(RunReport {
        metric: workload.metric().into(),
        parameters: latent.values().map(|t| t.elem_count() as u64).sum(),
        full: twin.as_ref().map(|t| t.full),
        ptq: twin.as_ref().map(|t| t.ptq),
        qat: workload.measure(&packed)?,
        qat_in_training: kept.value,
        qat_step: kept.step,
        steps: training.steps,
        seconds: [twin.map_or(0.0, |t| t.seconds), seconds],
        packed_bytes: summary.file_bytes,
        packed_bits: layer_bytes as f64 * 8.0 / layer_weights.max(1) as f64,
        packed,
    })
}
