//! RMS norm.

use super::{dot, rows, slice, with_elements};
use bitnet_kernels::Kernels;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Number of rows whose gain gradients one task sums.
const ROWS: usize = 64;

struct RmsNorm {
    eps: f32,
    kernels: Kernels,
}

/// `y = x · r · g` with `r = 1/√(mean x² + ε)`; x `[…, K]`, g `[K]`, rounded as in the inference
/// engine.
///
/// # Errors
/// For tensors of another type or shape.
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op2(
        gain,
        RmsNorm {
            eps: eps as f32,
            kernels: Kernels::detect(),
        },
    )
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((_, k), x, gain) = (rows(l1)?, slice(s1, l1)?, slice(s2, l2)?);
        if gain.len() != k {
            candle_core::bail!(
                "rms-norm: expected a gain of {k} elements, got {}",
                gain.len()
            );
        }
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(k * ROWS)
            .zip(x.par_chunks(k * ROWS))
            .for_each(|(out, x)| {
                for (out, x) in out.chunks_mut(k).zip(x.chunks(k)) {
                    self.kernels.rms_norm(x, gain, self.eps, out);
                }
            });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    /// `dx = r · (g·dy − x · r² · mean(g·dy·x))`, `dg = Σ_rows dy · x · r`.
    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let k = gain.elem_count();
        let mut dx = vec![0.0; x.elem_count()];
        let dgain = with_elements(x, |x| {
            with_elements(gain, |gain| {
                with_elements(grad, |grad| {
                    let parts = dx
                        .par_chunks_mut(k * ROWS)
                        .zip(x.par_chunks(k * ROWS))
                        .zip(grad.par_chunks(k * ROWS));
                    let sums: Vec<Vec<f32>> = parts
                        .map(|((dx, x), dy)| {
                            let mut sum = vec![0.0; k];
                            for ((dx, x), dy) in dx.chunks_mut(k).zip(x.chunks(k)).zip(dy.chunks(k))
                            {
                                row(x, gain, dy, self.eps, dx, &mut sum);
                            }
                            sum
                        })
                        .collect();
                    // In the order of the rows, so that the sum does not depend on threads.
                    sums.into_iter().fold(vec![0.0; k], |mut all, sum| {
                        all.iter_mut().zip(sum).for_each(|(a, s)| *a += s);
                        all
                    })
                })
            })
        })???;
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dgain, gain.shape(), device)?),
        ))
    }
}

fn row(x: &[f32], gain: &[f32], dy: &[f32], eps: f32, dx: &mut [f32], dgain: &mut [f32]) {
    let k = x.len() as f32;
    let r = 1.0 / (dot(x, x) / k + eps).sqrt();
    dx.iter_mut()
        .zip(gain.iter().zip(dy))
        .for_each(|(dx, (gain, dy))| *dx = gain * dy);
    let pull = r * r * dot(dx, x) / k;
    dx.iter_mut()
        .zip(x)
        .for_each(|(dx, x)| *dx = r * (*dx - x * pull));
    dgain
        .iter_mut()
        .zip(x.iter().zip(dy))
        .for_each(|(dgain, (x, dy))| *dgain += dy * x * r);
}
