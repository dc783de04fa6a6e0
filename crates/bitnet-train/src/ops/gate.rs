//! Activation functions.

use super::{CHUNK, slice, with_elements};
use bitnet_kernels::Kernels;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `max(x, 0)`, with the gradient 0 at 0.
///
/// # Errors
/// For a tensor of another type.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Relu)
}

/// `silu(gate) · up` with `silu(g) = g / (1 + e^−g)`: the feed-forward gate of llama.
///
/// # Errors
/// For tensors of another type, or of different shapes.
pub fn silu_gate(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(
        &up.contiguous()?,
        Gate {
            silu: true,
            kernels: Kernels::detect(),
        },
    )
}

/// `max(gate, 0)² · up`: the feed-forward gate of b1.58.
///
/// # Errors
/// As [`silu_gate`].
pub fn relu2_gate(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(
        &up.contiguous()?,
        Gate {
            silu: false,
            kernels: Kernels::detect(),
        },
    )
}

struct Relu;

impl CustomOp1 for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = slice(storage, layout)?
            .iter()
            .map(|&x| if x > 0.0 { x } else { 0.0 })
            .collect();
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let masked = |y: &[f32], dy: &[f32]| -> Vec<f32> {
            y.iter()
                .zip(dy)
                .map(|(&y, &dy)| if y > 0.0 { dy } else { 0.0 })
                .collect()
        };
        let dx = with_elements(y, |y| with_elements(grad, |dy| masked(y, dy)))??;
        Ok(Some(Tensor::from_vec(dx, y.shape(), y.device())?))
    }
}

struct Gate {
    silu: bool,
    kernels: Kernels,
}

impl CustomOp2 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if l1.shape() != l2.shape() {
            candle_core::bail!(
                "gate: expected the shape {:?} twice, got {:?}",
                l1.shape(),
                l2.shape()
            );
        }
        let (gate, up) = (slice(s1, l1)?, slice(s2, l2)?);
        let mut out = vec![0.0; gate.len()];
        let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK));
        out.par_chunks_mut(CHUNK)
            .zip(inputs)
            .for_each(|(out, (gate, up))| {
                if self.silu {
                    self.kernels.silu_mul(gate, up, out)
                } else {
                    self.kernels.relu2_mul(gate, up, out)
                }
            });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut dgate = vec![0.0; gate.elem_count()];
        let mut dup = vec![0.0; up.elem_count()];
        with_elements(gate, |gate| {
            with_elements(up, |up| {
                with_elements(grad, |grad| {
                    let out = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
                    let inputs = gate
                        .par_chunks(CHUNK)
                        .zip(up.par_chunks(CHUNK))
                        .zip(grad.par_chunks(CHUNK));
                    out.zip(inputs)
                        .for_each(|((dgate, dup), ((gate, up), dy))| {
                            for i in 0..gate.len() {
                                let (value, slope) = if self.silu {
                                    silu(gate[i])
                                } else {
                                    relu2(gate[i])
                                };
                                (dgate[i], dup[i]) = (dy[i] * up[i] * slope, dy[i] * value);
                            }
                        });
                })
            })
        })???;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dgate, gate)?), Some(tensor(dup, up)?)))
    }
}

/// SiLU and its derivative `σ · (1 + g · (1 − σ))`.
fn silu(g: f32) -> (f32, f32) {
    let sigma = 1.0 / (1.0 + (-g).exp());
    (g * sigma, sigma * (1.0 + g * (1.0 - sigma)))
}

fn relu2(g: f32) -> (f32, f32) {
    let positive = if g > 0.0 { g } else { 0.0 };
    (positive * positive, 2.0 * positive)
}
