//! `bitnet train`: models whose weights learn to be quantized.

use crate::args::train::{CommonArgs, ModelKind, TrainArgs, document};
use crate::print::{Answer, Output, bytes, percent};
use crate::training_bar::TrainingBar;
use bitnet_checkpoint::Error as CheckpointError;
use bitnet_quant::Error as QuantError;
use bitnet_quant::qat::QATConfig;
use bitnet_train::config::RunConfig;
use bitnet_train::run::{RunReport, Workload, run as run_workload};
use bitnet_train::{Error, ImageWorkload, LmWorkload};
use serde_json::json;

pub(crate) fn run(args: &TrainArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let (report, say): (RunReport, fn(f64) -> String) = match &args.what {
        ModelKind::Image(args) => {
            let config = args.configuration()?;
            let workload = ImageWorkload::new(&config)?;
            (
                train(
                    &workload,
                    &config.run,
                    &config.training,
                    &document(&config)?,
                    &args.common,
                )?,
                |error| format!("accuracy {}", percent(1.0 - error)),
            )
        }
        ModelKind::Lm(args) => {
            let config = args.configuration()?;
            let workload = LmWorkload::new(&config)?;
            (
                train(
                    &workload,
                    &config.run,
                    &config.training,
                    &document(&config)?,
                    &args.common,
                )?,
                |loss| format!("{loss:.4} nats, perplexity {:.3}", loss.exp()),
            )
        }
    };
    print(&report, say, out);
    Ok(Answer::Yes)
}

fn train<W: Workload>(
    workload: &W,
    run: &RunConfig,
    training: &QATConfig,
    document: &str,
    args: &CommonArgs,
) -> anyhow::Result<RunReport> {
    let mut watch = TrainingBar::new(args.quiet.quiet, workload.metric());
    run_workload(
        workload,
        run,
        training,
        document,
        &args.output(),
        &mut watch,
    )
    .map_err(|error| match error {
        Error::Quant(QuantError::Checkpoint(CheckpointError::Exists { path }))
            if path == args.out =>
        {
            anyhow::anyhow!(
                "{} exists already; --resume resumes the run in it",
                path.display()
            )
        }
        Error::Quant(QuantError::Checkpoint(interrupted @ CheckpointError::Interrupted)) => {
            anyhow::Error::new(interrupted)
                .context("interrupted; the same command with --resume continues from here")
        }
        other => other.into(),
    })
}

fn print(report: &RunReport, say: fn(f64) -> String, out: &mut Output) {
    let lines = [
        ("full precision", report.full),
        ("quantized after training", report.ptq),
        ("trained quantized", Some(report.qat)),
    ];
    for (name, value) in lines {
        if let Some(value) = value {
            out.line(format!("{name:<26}{}", say(value)));
        }
    }
    if report.qat_step != report.steps {
        out.line(format!(
            "{:<26}the weights after step {}, the best evaluation",
            "packed", report.qat_step
        ));
    }
    if let Some(share) = report.recovered() {
        out.line(format!(
            "{:<26}{} of the loss of quantization after training",
            "recovered",
            percent(share)
        ));
    }
    out.line(format!(
        "{}: {}, {:.3} bits per weight in packed layers; {} parameters, {} steps, {:.1} s and \
         {:.1} s of training",
        report.packed.display(),
        bytes(report.packed_bytes),
        report.packed_bits,
        report.parameters,
        report.steps,
        report.seconds[0],
        report.seconds[1],
    ));
    let mut document = json!(report);
    document["recovered"] = json!(report.recovered());
    out.document(document);
}
