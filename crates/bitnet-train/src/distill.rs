//! Distillation: the terms of a loss that compare student and teacher.

use crate::config::Distillation;
use crate::models::Trace;
use bitnet_quant::Result;
use bitnet_quant::qat::distillation::{Distance, hidden_loss, logits_loss, relation_loss};
use candle_core::Tensor;

/// `(1 − share)·loss + share·KL(teacher ‖ student)`.
pub(crate) fn logits(
    loss: Tensor,
    student: &Tensor,
    teacher: &Tensor,
    how: &Distillation,
) -> Result<Tensor> {
    if how.logits == 0.0 {
        return Ok(loss);
    }
    Ok(((loss * (1.0 - how.logits))?
        + (logits_loss(student, teacher, how.temperature)? * how.logits)?)?)
}

/// Adds to `loss` the weighted mean distance of hidden states and the weighted mean divergence of
/// the three relations of the last layer.
pub(crate) fn traces(
    mut loss: Tensor,
    student: &Trace,
    teacher: &Trace,
    how: &Distillation,
) -> Result<Tensor> {
    if how.hidden > 0.0 {
        for (s, t) in student.hidden.iter().zip(&teacher.hidden) {
            loss = (loss
                + (hidden_loss(s, t, Distance::Mse)?
                    * (how.hidden / student.hidden.len() as f64))?)?;
        }
    }
    if how.relations > 0.0
        && let (Some((ours, heads)), Some((theirs, _))) = (&student.relations, &teacher.relations)
    {
        for (s, t) in ours.iter().zip(theirs) {
            loss = (loss + (relation_loss(s, t, *heads)? * (how.relations / 3.0))?)?;
        }
    }
    Ok(loss)
}
