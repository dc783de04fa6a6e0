//! The state of a task that a checkpoint records, so that a resumed training computes the same.

use crate::config::Distillation;
use serde_json::{Value, json};

/// What determines the losses of a task, besides variables and step.
pub(crate) fn task_state(
    seed: u64,
    batch: usize,
    distillation: &Distillation,
    teacher: bool,
    data: u64,
) -> Value {
    json!({
        "seed": seed,
        "batch": batch,
        "data": format!("{data:016x}"),
        "teacher": teacher,
        "distillation": teacher.then_some(distillation),
    })
}

/// Rejects a checkpoint whose task state differs from the current one.
pub(crate) fn check_task_state(checkpoint: &Value, current: &Value) -> bitnet_quant::Result<()> {
    let differs = current
        .as_object()
        .into_iter()
        .flatten()
        .find(|(key, value)| checkpoint.get(key) != Some(value));
    match differs {
        None => Ok(()),
        Some((key, value)) => {
            let expected = format!(
                "{key} {} as in the checkpoint, for a training resumes as it began",
                checkpoint.get(key).unwrap_or(&Value::Null)
            );
            Err(bitnet_quant::Error::Input {
                what: "training",
                expected,
                got: value.to_string(),
            })
        }
    }
}
