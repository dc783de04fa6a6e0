//! The operations of causal attention with rotary positions, except matrix products.

use super::{dot, rows, slice, with_elements};
use bitnet_kernels::Kernels;
use bitnet_kernels::dense::RotaryPairing;
use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Cosine and sine of the rotary embedding: elements i and i + d/2 of a head rotate by
/// `position · theta^(−2i/d)`.
#[derive(Debug, Clone)]
pub struct Angles {
    /// `[positions, d/2]`.
    table: Arc<Vec<(f32, f32)>>,
    pairs: usize,
}

impl Angles {
    /// The angles of `positions` positions for heads of `head_dim` elements, rounded as in the
    /// inference engine.
    pub fn new(theta: f64, head_dim: usize, positions: usize) -> Self {
        let pairs = head_dim / 2;
        let frequencies: Vec<f32> = (0..pairs)
            .map(|i| theta.powf(-((2 * i) as f64) / head_dim as f64) as f32)
            .collect();
        let angle = |position: usize, frequency: f32| {
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            (cos as f32, sin as f32)
        };
        let table = (0..positions)
            .flat_map(|p| frequencies.iter().map(move |&f| angle(p, f)))
            .collect();
        Self {
            table: Arc::new(table),
            pairs,
        }
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.table.len() / self.pairs.max(1)
    }
}

/// `[B, T, H·D]` to `[B, H, T, D]`; with `angles` each head is rotated by its position.
///
/// # Errors
/// For a tensor of another type or shape, and more positions than angles.
pub fn heads_first(x: &Tensor, heads: usize, angles: Option<&Angles>) -> Result<Tensor> {
    let (batch, positions, width) = x.dims3()?;
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(Error::msg(format!(
            "expected {heads} heads to divide {width} elements"
        )));
    }
    let shape = [batch, positions, heads, width / heads];
    if let Some(angles) =
        angles.filter(|a| positions > a.positions() || 2 * a.pairs != width / heads)
    {
        let (expected, pairs) = (angles.positions(), angles.pairs);
        return Err(Error::msg(format!(
            "expected at most {expected} positions of heads of {} elements, got {shape:?}",
            2 * pairs
        )));
    }
    x.contiguous()?.apply_op1(Move {
        shape,
        first: true,
        angles: angles.cloned(),
        kernels: Kernels::detect(),
    })
}

/// `[B, H, T, D]` to `[B, T, H·D]`.
///
/// # Errors
/// For a tensor of another type or shape.
pub fn heads_last(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, positions, d) = x.dims4()?;
    let op = Move {
        shape: [batch, positions, heads, d],
        first: false,
        angles: None,
        kernels: Kernels::detect(),
    };
    x.contiguous()?.apply_op1(op)
}

/// Moves heads before positions and rotates them, or moves them back.
struct Move {
    /// Batch, positions, heads, elements per head.
    shape: [usize; 4],
    first: bool,
    angles: Option<Angles>,
    kernels: Kernels,
}

impl Move {
    /// Moves heads to the front and rotates them.
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let [_, positions, heads, d] = self.shape;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(positions * d)
            .enumerate()
            .for_each(|(block, out)| {
                let (batch, head) = (block / heads, block % heads);
                for (position, out) in out.chunks_mut(d).enumerate() {
                    out.copy_from_slice(
                        &x[((batch * positions + position) * heads + head) * d..][..d],
                    );
                    if let Some(angles) = &self.angles {
                        self.kernels.rotate(
                            out,
                            &angles.table[position * angles.pairs..][..angles.pairs],
                            RotaryPairing::Halves,
                        );
                    }
                }
            });
        out
    }

    /// Moves positions to the front and rotates heads back.
    fn backward(&self, x: &[f32]) -> Vec<f32> {
        let [_, positions, heads, d] = self.shape;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(heads * d)
            .enumerate()
            .for_each(|(token, out)| {
                let (batch, position) = (token / positions, token % positions);
                for (head, out) in out.chunks_mut(d).enumerate() {
                    let x = &x[((batch * heads + head) * positions + position) * d..][..d];
                    match &self.angles {
                        None => out.copy_from_slice(x),
                        Some(angles) => {
                            let (a, b) = x.split_at(d / 2);
                            let (out_a, out_b) = out.split_at_mut(d / 2);
                            for (i, &(cos, sin)) in angles.table[position * angles.pairs..]
                                [..angles.pairs]
                                .iter()
                                .enumerate()
                            {
                                (out_a[i], out_b[i]) =
                                    (a[i] * cos + b[i] * sin, b[i] * cos - a[i] * sin);
                            }
                        }
                    }
                }
            });
        out
    }

    fn dims(&self, first: bool) -> Shape {
        let [batch, positions, heads, d] = self.shape;
        if first {
            Shape::from((batch, heads, positions, d))
        } else {
            Shape::from((batch, positions, heads * d))
        }
    }
}

impl CustomOp1 for Move {
    fn name(&self) -> &'static str {
        "move-heads"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let out = if self.first {
            self.forward(x)
        } else {
            self.backward(x)
        };
        Ok((CpuStorage::F32(out), self.dims(self.first)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let out = with_elements(grad, |grad| {
            if self.first {
                self.backward(grad)
            } else {
                self.forward(grad)
            }
        })?;
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

/// Causal softmax of `scale · x`, x `[…, R, T]`: row r is position r mod T and gets 0 for later
/// positions. R is a multiple of T.
///
/// # Errors
/// For a tensor of another type or shape.
pub fn causal_softmax(x: &Tensor, scale: f32) -> Result<Tensor> {
    let (r, t) = (
        x.dim(candle_core::D::Minus2)?,
        x.dim(candle_core::D::Minus1)?,
    );
    if t == 0 || !r.is_multiple_of(t) {
        return Err(Error::msg(format!(
            "causal softmax: expected rows for each of {t} positions, got {r}"
        )));
    }
    x.contiguous()?.apply_op1(CausalSoftmax { scale })
}

struct CausalSoftmax {
    scale: f32,
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((_, t), x) = (rows(layout)?, slice(storage, layout)?);
        let mut out = vec![0.0f32; x.len()];
        out.par_chunks_mut(t * t)
            .zip(x.par_chunks(t * t))
            .for_each(|(out, x)| {
                for (position, (out, x)) in out.chunks_mut(t).zip(x.chunks(t)).enumerate() {
                    let (out, x) = (&mut out[..=position], &x[..=position]);
                    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    out.iter_mut()
                        .zip(x)
                        .for_each(|(out, &x)| *out = ((x - max) * self.scale).exp());
                    let inverse = 1.0 / out.iter().sum::<f32>();
                    out.iter_mut().for_each(|p| *p *= inverse);
                }
            });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    /// `dx = scale · p · (dp − Σ p · dp)`.
    fn bwd(&self, _: &Tensor, p: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let t = p.dim(candle_core::D::Minus1)?;
        let mut dx = vec![0.0f32; p.elem_count()];
        with_elements(p, |p| {
            with_elements(grad, |dp| {
                let inputs = p.par_chunks(t * t).zip(dp.par_chunks(t * t));
                dx.par_chunks_mut(t * t)
                    .zip(inputs)
                    .for_each(|(dx, (p, dp))| {
                        for (position, (dx, (p, dp))) in dx
                            .chunks_mut(t)
                            .zip(p.chunks(t).zip(dp.chunks(t)))
                            .enumerate()
                        {
                            let (dx, p, dp) =
                                (&mut dx[..=position], &p[..=position], &dp[..=position]);
                            let sum = dot(p, dp);
                            dx.iter_mut()
                                .zip(p.iter().zip(dp))
                                .for_each(|(dx, (p, d))| *dx = self.scale * p * (d - sum));
                        }
                    });
            })
        })??;
        Ok(Some(Tensor::from_vec(dx, p.shape(), p.device())?))
    }
}
