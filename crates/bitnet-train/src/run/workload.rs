//! What a run trains, and the observer of its events.

use crate::Result;
use bitnet_quant::qat::{Event, Linears, Task};
use candle_nn::{VarBuilder, VarMap};
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::Path;

/// A kind of model with its data and metric.
pub trait Workload {
    /// The trainable model.
    type Model: Linears;

    /// Name of the metric of [`Workload::measure`]; less is better.
    fn metric(&self) -> &'static str;

    /// Builds a model with the variables of `vb`.
    ///
    /// # Errors
    /// For an invalid shape.
    fn build(&self, vb: &VarBuilder<'_>) -> Result<Self::Model>;

    /// Loads pretrained weights into the variables of a new model, if the run starts from some.
    ///
    /// # Errors
    /// For weights that do not fit.
    fn load_initial(&self, vars: &VarMap) -> Result<()>;

    /// config.json of the folders that the run writes.
    fn config_json(&self) -> Value;

    /// Other files of these folders.
    ///
    /// # Errors
    /// For a tokenizer that cannot be read.
    fn files(&self) -> Result<Vec<(String, Vec<u8>)>>;

    /// The training task: a model with its data.
    fn task<'t>(
        &'t self,
        model: Self::Model,
        vars: VarMap,
        teacher: Option<Self::Model>,
    ) -> Box<dyn Task + 't>;

    /// Loads a teacher, with constants as weights.
    ///
    /// # Errors
    /// For a folder with another kind of model, or other outputs.
    fn teacher(&self, path: &Path) -> Result<Self::Model>;

    /// Measures the model in a folder or file, packed or not, on held-out data.
    ///
    /// # Errors
    /// For a model that cannot be read or run.
    fn measure(&self, path: &Path) -> Result<f64>;
}

/// A phase of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Training of the full-precision twin.
    Twin,
    /// Training of the quantized model.
    Quantized,
}

impl Phase {
    /// Name in the run's folder: `full` or `quantized`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Twin => "full",
            Self::Quantized => "quantized",
        }
    }
}

/// Receives the events of each phase, and may stop the run at the end of a step.
pub trait RunObserver {
    /// Called for each event.
    fn on(&mut self, phase: Phase, event: &Event<'_>) -> ControlFlow<()>;
}

impl RunObserver for () {
    fn on(&mut self, _: Phase, _: &Event<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}
