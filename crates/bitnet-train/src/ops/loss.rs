//! Cross-entropy.

use super::{rows, slice, with_elements};
use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

struct CrossEntropy {
    targets: Vec<u32>,
}

/// `mean over rows of −ln softmax(logits)[target]` in nats; logits `[…, V]`, targets u32 of the
/// shape before V. The result is a scalar.
///
/// The backward pass recomputes the probabilities.
///
/// # Errors
/// For tensors of another type or shape, and a target that is not below V.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let targets = targets.flatten_all()?.to_vec1::<u32>()?;
    logits.contiguous()?.apply_op1(CrossEntropy { targets })
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, v) = rows(layout)?;
        if n != self.targets.len() || n == 0 {
            return Err(Error::msg(format!(
                "cross-entropy: expected a target for each of {n} rows, got {}",
                self.targets.len()
            )));
        }
        if let Some(target) = self.targets.iter().find(|&&t| t as usize >= v) {
            return Err(Error::msg(format!(
                "cross-entropy: expected targets below {v}, got {target}"
            )));
        }
        let logits = slice(storage, layout)?;
        let losses: Vec<f64> = logits
            .par_chunks(v)
            .zip(&self.targets)
            .map(|(row, &target)| {
                let (max, sum) = normalizer(row);
                f64::from(sum).ln() + f64::from(max) - f64::from(row[target as usize])
            })
            .collect();
        let mean = losses.iter().sum::<f64>() / n as f64;
        Ok((CpuStorage::F32(vec![mean as f32]), Shape::from(())))
    }

    /// `(softmax(logits) − one-hot(target)) / rows`.
    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let v = logits.dim(candle_core::D::Minus1)?;
        let factor = grad.to_scalar::<f32>()? / self.targets.len() as f32;
        let mut out = vec![0.0; logits.elem_count()];
        with_elements(logits, |logits| {
            out.par_chunks_mut(v)
                .zip(logits.par_chunks(v))
                .zip(&self.targets)
                .for_each(|((out, row), &target)| {
                    let (max, sum) = normalizer(row);
                    let scale = factor / sum;
                    out.iter_mut()
                        .zip(row)
                        .for_each(|(out, &x)| *out = (x - max).exp() * scale);
                    out[target as usize] -= factor;
                });
        })?;
        Ok(Some(Tensor::from_vec(
            out,
            logits.shape(),
            logits.device(),
        )?))
    }
}

/// The largest logit and the sum of `e^(x − largest)`.
fn normalizer(row: &[f32]) -> (f32, f32) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // `max` ignores NaN, but the sum does not.
    (max, row.iter().map(|&x| (x - max).exp()).sum())
}
