//! Progress of a training on stderr, and Ctrl-C.

use crate::print::stderr_line;
use crate::progress::{bar, interrupt};
use bitnet_quant::qat::Event;
use bitnet_train::run::{Phase, RunObserver};
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

/// A bar for each training; evaluations are lines above it.
pub(crate) struct TrainingBar {
    bar: Option<ProgressBar>,
    quiet: bool,
    /// Name of the evaluated figure.
    metric: &'static str,
}

impl TrainingBar {
    pub(crate) fn new(quiet: bool, metric: &'static str) -> Self {
        Self {
            bar: None,
            quiet,
            metric,
        }
    }

    fn begin(&mut self, phase: Phase, step: u64, steps: u64) {
        let template = "{prefix} {bar:30} {pos}/{len}  {eta} left  {wide_msg}";
        let bar = bar(steps, self.quiet, template).with_position(step);
        bar.set_prefix(match phase {
            Phase::Twin => "full precision",
            Phase::Quantized => "quantized",
        });
        // Steps before a resume do not count as speed.
        bar.reset_eta();
        self.bar = Some(bar);
    }
}

impl RunObserver for TrainingBar {
    fn on(&mut self, phase: Phase, event: &Event<'_>) -> ControlFlow<()> {
        match (event, &self.bar) {
            (Event::Begin { step, steps }, _) => self.begin(phase, *step, *steps),
            (Event::Step(step), Some(bar)) => {
                bar.set_position(step.step);
                bar.set_message(format!(
                    "loss {:.4}  {:.0}/s",
                    step.loss,
                    step.units as f64 / step.seconds.max(1e-9)
                ));
            }
            (Event::Evaluated(evaluation), Some(bar)) if !self.quiet => bar.suspend(|| {
                stderr_line(format!(
                    "step {}: {} {:.4}",
                    evaluation.step, self.metric, evaluation.value
                ));
            }),
            _ => {}
        }
        if interrupt().load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}
