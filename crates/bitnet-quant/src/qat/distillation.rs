//! Losses between a student and its teacher. The teacher gets no gradient.
//!
//! ```
//! use bitnet_quant::qat::distillation::{hidden_loss, logits_loss, relation_loss, Distance};
//! use candle_core::{Device, Tensor, Var};
//! let normal = |shape: (usize, usize, usize)| Tensor::randn(0f32, 1f32, shape, &Device::Cpu);
//! let (student, teacher) = (Var::from_tensor(&normal((2, 7, 32))?)?, normal((2, 7, 32))?);
//! let loss = (logits_loss(&student, &teacher, 2.0)? + hidden_loss(&student, &teacher, Distance::Cosine)?)?;
//! let loss = (loss + relation_loss(&student, &normal((2, 7, 48))?, 4)?)?;
//! assert!(loss.backward()?.get(&student).is_some());
//! # Ok::<(), bitnet_quant::Error>(())
//! ```

use crate::tensor::{contiguous_floats, into_candle, not_empty, token_shape, with_floats};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp2, D, Layout, Shape, Tensor};
use rayon::prelude::*;

fn same_shape(what: &'static str, student: &Tensor, teacher: &Tensor) -> Result<()> {
    not_empty(student)?;
    if student.dims() == teacher.dims() {
        return Ok(());
    }
    Err(Error::input(
        what,
        format!("the student's shape {:?}", student.dims()),
        format!("{:?}", teacher.dims()),
    ))
}

/// `T²·mean over tokens of KL(softmax(t/T) ‖ softmax(s/T))` of logits `[…, V]`, f32 (Hinton et al.
/// 2015, arXiv:1503.02531; T² keeps the size of the gradient the same for every temperature).
/// Stable for logits of any size. On the CPU it is one operation of the graph and keeps only its
/// inputs.
///
/// # Errors
/// [`Error::Input`] for different shapes, a temperature that is not positive, or another type than
/// f32.
pub fn logits_loss(student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    same_shape("teacher's logits", student, teacher)?;
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(Error::input(
            "temperature",
            "a positive number",
            temperature,
        ));
    }
    let (_, classes) = token_shape(student)?;
    if !student.device().is_cpu() {
        return on_device(student, teacher, temperature);
    }
    Ok(student.contiguous()?.apply_op2(
        &teacher.detach().contiguous()?,
        Divergence {
            temperature,
            classes,
        },
    )?)
}

/// [`logits_loss`] in candle's operations.
pub(super) fn on_device(student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    let log = |x: &Tensor| candle_nn::ops::log_softmax(&(x / temperature)?, D::Minus1);
    let (student, teacher) = (log(student)?, log(&teacher.detach())?);
    let each = (teacher.exp()? * (teacher - student)?)?.sum(D::Minus1)?;
    Ok((each.mean_all()? * temperature.powi(2))?)
}

/// A distance between hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distance {
    /// `mean (s − t)²` over all elements.
    Mse,
    /// `mean over tokens of 1 − s·t / (|s|·|t|)`: compares directions only.
    Cosine,
}

/// Distance of hidden states `[…, D]` of the same width.
///
/// # Errors
/// [`Error::Input`] for different shapes.
pub fn hidden_loss(student: &Tensor, teacher: &Tensor, distance: Distance) -> Result<Tensor> {
    same_shape("teacher's hidden states", student, teacher)?;
    let teacher = teacher.detach();
    Ok(match distance {
        Distance::Mse => (student - teacher)?.sqr()?.mean_all()?,
        Distance::Cosine => {
            // ε keeps the slope of the root finite for a token of zeros.
            let length =
                |x: &Tensor| -> Result<Tensor> { Ok((x.sqr()?.sum(D::Minus1)? + 1e-12)?.sqrt()?) };
            let cosine =
                ((student * &teacher)?.sum(D::Minus1)? / (length(student)? * length(&teacher)?)?)?;
            (1.0 - cosine.mean_all()?)?
        }
    })
}

/// Divergence of self-attention relations, as MiniLM (Wang et al. 2021, arXiv:2012.15828): of
/// queries, keys or values `[B, T, D]`, split into `heads` relation heads each, `R =
/// softmax(A·Aᵀ/√(D/heads))`, the mean over all rows of `KL(R_teacher ‖ R_student)`. Student and
/// teacher may have different D and different attention heads.
///
/// # Errors
/// [`Error::Input`] for other shapes than `[B, T, D]` with the same B and T, and for a D that
/// `heads` does not divide.
pub fn relation_loss(student: &Tensor, teacher: &Tensor, heads: usize) -> Result<Tensor> {
    let relations = |what: &'static str, x: &Tensor| -> Result<Tensor> {
        not_empty(x)?;
        let [b, t, d] = *x.dims() else {
            return Err(Error::input(
                what,
                "shape [batch, tokens, width]",
                format!("{:?}", x.dims()),
            ));
        };
        if heads == 0 || d % heads != 0 {
            return Err(Error::input(
                what,
                format!("a width that {heads} heads divide"),
                d,
            ));
        }
        let a = x
            .reshape((b, t, heads, d / heads))?
            .transpose(1, 2)?
            .contiguous()?;
        Ok((a.matmul(&a.t()?)? * ((d / heads) as f64).sqrt().recip())?)
    };
    logits_loss(
        &relations("student's states", student)?,
        &relations("teacher's states", &teacher.detach())?,
        1.0,
    )
}

struct Divergence {
    temperature: f64,
    classes: usize,
}

/// `(max, log Σ exp((x − max)/T))` of one row.
fn normaliser(x: &[f32], temperature: f64) -> (f64, f64) {
    let max = f64::from(x.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x)));
    (
        max,
        x.iter()
            .map(|&x| ((f64::from(x) - max) / temperature).exp())
            .sum::<f64>()
            .ln(),
    )
}

impl Divergence {
    /// `log softmax(x/T)`, one class after another.
    fn log_probabilities<'a>(&self, x: &'a [f32]) -> impl Iterator<Item = f64> + 'a {
        let t = self.temperature;
        let (max, log) = normaliser(x, t);
        x.iter().map(move |&x| (f64::from(x) - max) / t - log)
    }

    fn loss(&self, student: &[f32], teacher: &[f32]) -> f64 {
        let rows = student
            .par_chunks(self.classes)
            .zip(teacher.par_chunks(self.classes));
        let each: Vec<f64> = rows
            .map(|(s, t)| {
                self.log_probabilities(s)
                    .zip(self.log_probabilities(t))
                    .map(|(s, t)| t.exp() * (t - s))
                    .sum()
            })
            .collect();
        each.iter().sum::<f64>() / each.len() as f64 * self.temperature.powi(2)
    }
}

impl CustomOp2 for Divergence {
    fn name(&self) -> &'static str {
        "divergence"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        ls: &Layout,
        t: &CpuStorage,
        lt: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let loss = self.loss(contiguous_floats(s, ls)?, contiguous_floats(t, lt)?);
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    /// `∂/∂s = T·(softmax(s/T) − softmax(t/T)) / tokens`.
    fn bwd(
        &self,
        s: &Tensor,
        t: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let out = with_floats(s, |student| {
            with_floats(t, |teacher| {
                let factor = f64::from(grad.to_scalar::<f32>()?) * self.temperature
                    / (student.len() / self.classes) as f64;
                let mut out = vec![0f32; student.len()];
                let rows = student
                    .par_chunks(self.classes)
                    .zip(teacher.par_chunks(self.classes))
                    .zip(out.par_chunks_mut(self.classes));
                rows.for_each(|((s, t), out)| {
                    let both = self.log_probabilities(s).zip(self.log_probabilities(t));
                    out.iter_mut()
                        .zip(both)
                        .for_each(|(out, (s, t))| *out = (factor * (s.exp() - t.exp())) as f32);
                });
                Ok(out)
            })
        });
        Ok((
            Some(Tensor::from_vec(
                out.map_err(into_candle)?,
                s.shape(),
                s.device(),
            )?),
            None,
        ))
    }
}
