//! The model and the data of a training.

use super::linear::Linears;
use crate::Result;
use candle_core::Tensor;
use candle_nn::VarMap;

/// A model with its data.
///
/// The loss must be a function of the variables and `(step, micro)`, so that a resumed training has
/// the same bits: draw batches, dropout and other randomness from the seed and these two numbers.
pub trait Task {
    /// The variables that are trained.
    fn vars(&self) -> &VarMap;

    /// The scalar loss of micro-batch `micro` of `step`, both counted from 0.
    ///
    /// # Errors
    /// Any error of the model.
    fn loss(&mut self, step: u64, micro: u64) -> Result<Tensor>;

    /// The error on held-out data; lower is better.
    ///
    /// # Errors
    /// As [`Task::loss`].
    fn evaluate(&mut self) -> Result<f64>;

    /// The linear layers of the model, for telemetry and the quantization schedule; `None` if they
    /// cannot be visited.
    fn linears(&mut self) -> Option<&mut dyn Linears> {
        None
    }

    /// Everything except variables and step that the losses depend on: the seed, the data set.
    /// Checkpoints store it.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Called before resuming from a checkpoint with this state: return an error if it does not fit
    /// this task.
    ///
    /// # Errors
    /// One line that names what differs.
    fn restore(&mut self, state: &serde_json::Value) -> Result<()> {
        let _ = state;
        Ok(())
    }

    /// Size and unit of a micro-batch: 64 images, 2048 tokens.
    fn batch(&self) -> (u64, &'static str) {
        (1, "batches")
    }
}
