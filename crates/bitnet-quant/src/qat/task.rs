//! What is trained.

use super::linear::Linears;
use crate::Result;
use candle_core::Tensor;
use candle_nn::VarMap;

/// What is trained: a model with its data.
///
/// Equal `(step, micro)` must give equal losses for equal variables, so that a training that was
/// interrupted goes on with the same bits: draw batches, dropout and other randomness from the seed
/// and these two numbers.
pub trait Task {
    /// The variables that are trained.
    fn vars(&self) -> &VarMap;

    /// The scalar loss of micro-batch `micro` of `step`, both counted from 0.
    ///
    /// # Errors
    /// Whatever keeps the model from computing it.
    fn loss(&mut self, step: u64, micro: u64) -> Result<Tensor>;

    /// How good the model is on data that it is not trained on; lower is better.
    ///
    /// # Errors
    /// As [`Task::loss`].
    fn evaluate(&mut self) -> Result<f64>;

    /// The model's linear layers, where it shows them: for telemetry and the schedule of
    /// quantization.
    fn linears(&mut self) -> Option<&mut dyn Linears> {
        None
    }

    /// What, beside the variables and the step, decides the losses: the seed, which data. It is
    /// kept in checkpoints.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// A checkpoint with this state goes on: refuse what does not fit.
    ///
    /// # Errors
    /// One line that names what differs.
    fn restore(&mut self, state: &serde_json::Value) -> Result<()> {
        let _ = state;
        Ok(())
    }

    /// How much a micro-batch holds, and of what: 64 images, 2048 tokens.
    fn batch(&self) -> (u64, &'static str) {
        (1, "batches")
    }
}
