//! The norm between the input of a layer and its quantization.

use crate::Result;
use crate::tensor::with_floats;
use candle_core::{D, Tensor};

/// A norm between the input and its quantization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubNorm {
    /// `x / √(mean x² + ε) · g`, as in b1.58; its gain is `rms_norm.weight`.
    Rms,
    /// `(x − mean) / √(var + ε) · g + c`, SubLN of BitNet; `layer_norm.weight` and
    /// `layer_norm.bias`.
    Layer,
}

/// A norm with its gain and, for [`SubNorm::Layer`], its shift, each `[K]`.
#[derive(Debug, Clone)]
pub(super) struct InputNorm {
    pub(super) kind: SubNorm,
    pub(super) eps: f64,
    pub(super) gain: Tensor,
    pub(super) shift: Option<Tensor>,
}

impl InputNorm {
    /// The norm in candle's operations, with gradients.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let centred = match self.kind {
            SubNorm::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
            SubNorm::Rms => x.clone(),
        };
        let power = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?;
        let x = centred.broadcast_div(&power)?.broadcast_mul(&self.gain)?;
        Ok(match &self.shift {
            Some(shift) => x.broadcast_add(shift)?,
            None => x,
        })
    }

    /// The norm of each row of `k` elements, written over it.
    pub(super) fn apply_in_place(&self, x: &mut [f32], k: usize) -> Result<()> {
        with_floats(&self.gain, |gain| {
            for row in x.chunks_mut(k) {
                let mean = |f: &dyn Fn(f32) -> f64, row: &[f32]| {
                    row.iter().map(|&x| f(x)).sum::<f64>() / k as f64
                };
                if self.kind == SubNorm::Layer {
                    let centre = mean(&f64::from, row) as f32;
                    row.iter_mut().for_each(|x| *x -= centre);
                }
                let power = (mean(&|x| f64::from(x).powi(2), row) + self.eps).sqrt() as f32;
                row.iter_mut()
                    .zip(gain)
                    .for_each(|(x, g)| *x = *x / power * g);
            }
            Ok(())
        })?;
        match &self.shift {
            None => Ok(()),
            Some(shift) => with_floats(shift, |shift| {
                x.chunks_mut(k)
                    .for_each(|row| row.iter_mut().zip(shift).for_each(|(x, b)| *x += b));
                Ok(())
            }),
        }
    }
}
