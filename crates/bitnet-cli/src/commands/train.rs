//! `bitnet train`: models whose weights learn to be quantized.

use crate::print::{Output, bytes, percent};
use crate::train::{CommonArgs, TrainArgs, What, document};
use crate::{Answer, job};
use bitnet_checkpoint::Error as CheckpointError;
use bitnet_quant::qat::{Event, QATConfig};
use bitnet_train::config::RunConfig;
use bitnet_train::run::{Phase, RunObserver, RunReport, Workload, run as run_workload};
use bitnet_train::{Error, ImageWorkload, LmWorkload};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

pub(crate) fn run(args: &TrainArgs, out: &mut Output) -> anyhow::Result<Answer> {
    let (report, say): (RunReport, fn(f64) -> String) = match &args.what {
        What::Image(args) => {
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
        What::Lm(args) => {
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
    let mut watch = Watch {
        bar: None,
        quiet: args.quiet,
        metric: workload.metric(),
    };
    run_workload(
        workload,
        run,
        training,
        document,
        &args.output(),
        &mut watch,
    )
    .map_err(|error| match error {
        Error::Quant(bitnet_quant::Error::Checkpoint(CheckpointError::Exists { path }))
            if path == args.out =>
        {
            anyhow::anyhow!(
                "{} exists already; --resume goes on with the run in it",
                path.display()
            )
        }
        Error::Quant(bitnet_quant::Error::Checkpoint(
            interrupted @ CheckpointError::Interrupted,
        )) => anyhow::Error::new(interrupted)
            .context("interrupted; the same command with --resume goes on from here"),
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
            "{:<26}{} of what quantization after training loses",
            "recovered",
            percent(share)
        ));
    }
    out.line(format!(
        "{}: {}, {:.3} bits per weight in packed layers; {} parameters, {} steps, {:.1} s and {:.1} s of training",
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

/// A bar for each training on stderr, and Ctrl-C.
struct Watch {
    bar: Option<ProgressBar>,
    quiet: bool,
    metric: &'static str,
}

impl RunObserver for Watch {
    fn on(&mut self, phase: Phase, event: &Event<'_>) -> ControlFlow<()> {
        match event {
            Event::Begin { step, steps } => {
                let target = if self.quiet {
                    ProgressDrawTarget::hidden()
                } else {
                    ProgressDrawTarget::stderr()
                };
                let bar = ProgressBar::with_draw_target(Some(*steps), target).with_position(*step);
                let style = ProgressStyle::with_template(
                    "{prefix} {bar:30} {pos}/{len}  {eta} left  {wide_msg}",
                );
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.set_prefix(match phase {
                    Phase::Twin => "full precision",
                    Phase::Quantized => "quantized",
                });
                // So that what went before a resume does not count as speed.
                bar.reset_eta();
                self.bar = Some(bar);
            }
            Event::Step(step) => {
                if let Some(bar) = &self.bar {
                    bar.set_position(step.step);
                    bar.set_message(format!(
                        "loss {:.4}  {:.0}/s",
                        step.loss,
                        step.units as f64 / step.seconds.max(1e-9)
                    ));
                }
            }
            Event::Evaluated(evaluation) => {
                if let Some(bar) = &self.bar {
                    bar.suspend(|| {
                        if !self.quiet {
                            eprintln!(
                                "step {}: {} {:.4}",
                                evaluation.step, self.metric, evaluation.value
                            );
                        }
                    });
                }
            }
            _ => {}
        }
        if job::interrupt().load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}
