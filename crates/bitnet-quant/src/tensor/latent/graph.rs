//! A latent layer in candle's own operations, for devices that `product.rs` has no kernels for:
//! CUDA, Metal.
//!
//! ```text
//! y = x̃·W̃ᵀ + b      x̃ = |x + λ·(x̂ − x)| + (x − |x|)
//!                    W̃ = |W + λ·(Ŵ − W)| + (W − |W|)·|1 − λ + λ·m| + (s − |s|)·|λ·∂Ŵ/∂s|
//! ```
//!
//! `|…|` is a detached value. A difference `(x − |x|)` is 0, or NaN where x is not finite, and
//! passes the gradient. Codes and scales equal those of the CPU with two exceptions: a sum in
//! another order may round to another scale, and the CPU keeps the scale of weights that are
//! ternary already. Weights are summed in f64; Metal has no f64 and sums in f32.

use super::estimator::StraightThroughEstimator;
use super::rounding::{LEAST_SCALE, WeightRounding};
use crate::Activations;
use crate::{Error, Result};
use bitnet_core::scheme::{
    BinarySplit, Clip, Mapping, Method, Rounding, ScaleRule, Scheme, Threshold,
};
use bitnet_core::{Granularity, Precision, ScaleDtype, ScaleForm};
use candle_core::{D, DType, Tensor};

/// The layer, without its tensors.
pub(crate) struct DeviceGraph<'a> {
    pub(crate) rounding: &'a WeightRounding,
    pub(crate) activations: Activations,
    pub(crate) lambda: f32,
    /// β.
    pub(crate) dead_zone: f32,
}

/// Detached values and the step between two of them.
pub(crate) struct RoundedGranules {
    /// `[granules, weights of one]`.
    pub(crate) values: Tensor,
    /// `[granules, 1]`.
    pub(crate) step: Tensor,
}

impl DeviceGraph<'_> {
    /// Rejects schemes that these operations do not cover.
    pub(crate) fn check(&self, cols: usize) -> Result<()> {
        let Scheme {
            method,
            granularity,
            scale_form,
            rounding,
            ..
        } = self.rounding.scheme;
        let learned = self.rounding.estimator.learns_scale();
        let can = match method {
            Method::Ternary {
                planes: 1,
                threshold,
                ..
            } => {
                let rule = matches!(
                    threshold,
                    Threshold::Absmean | Threshold::Mean | Threshold::Factor(_)
                );
                (rule || learned) && rounding == Rounding::HalfEven
            }
            Method::Binary {
                split: BinarySplit::Zero,
                stochastic: None,
            } => true,
            Method::Int {
                mapping: Mapping::Symmetric,
                clip: Clip::None | Clip::Rms(_),
                ..
            } => true,
            _ => false,
        };
        if !can || scale_form != ScaleForm::Direct {
            let expected = "ternary of one plane by absmean, mean or a factor, binary around 0, or \
                symmetric integers, on devices other than the CPU";
            return Err(Error::input("scheme", expected, format!("{method:?}")));
        }
        match granularity {
            Granularity::Group(group) if !cols.is_multiple_of(group) => Err(Error::input(
                "group",
                format!("a divisor of the {cols} columns, on devices other than the CPU"),
                group,
            )),
            _ => Ok(()),
        }
    }

    /// y `[…, N]` of x `[…, K]`, W `[N, K]`, learned scales `[granules]` and a bias `[N]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        w: &Tensor,
        scale: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (n, k) = w.dims2()?;
        self.check(k)?;
        let mut dims = x.dims().to_vec();
        dims.splice(dims.len() - 1.., [n]);
        let x = x.reshape(((), k))?;
        let y = if self.lambda > 0.0 {
            let granules = self.granules(w)?;
            let scale = scale.map(|s| s.reshape(((), 1))).transpose()?;
            let rounded = self.round(
                &granules.detach(),
                scale.as_ref().map(Tensor::detach).as_ref(),
            )?;
            let weights = self
                .weights(&granules, scale.as_ref(), &rounded)?
                .reshape((n, k))?;
            let y = self.tokens(&x)?.matmul(&weights.t()?)?;
            match f64::from(self.lambda * self.dead_zone) {
                0.0 => y,
                beta => {
                    let dead = rounded
                        .values
                        .eq(0f32)?
                        .to_dtype(DType::F32)?
                        .reshape((n, k))?;
                    y.broadcast_add(&((w * dead)?.sum(1)? * beta)?)?
                }
            }
        } else {
            x.matmul(&w.t()?)?
        };
        let y = y.reshape(dims)?;
        Ok(bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))?)
    }

    /// W̃ `[N, K]` of W `[N, K]`.
    pub(crate) fn fake_quantized_weights(
        &self,
        w: &Tensor,
        scale: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (n, k) = w.dims2()?;
        self.check(k)?;
        if self.lambda == 0.0 {
            return Ok(w.clone());
        }
        let granules = self.granules(w)?;
        let scale = scale.map(|s| s.reshape(((), 1))).transpose()?;
        let rounded = self.round(
            &granules.detach(),
            scale.as_ref().map(Tensor::detach).as_ref(),
        )?;
        let weights = self.weights(&granules, scale.as_ref(), &rounded)?;
        Ok(weights.reshape((n, k))?)
    }

    /// W as `[granules, weights of one]`.
    pub(crate) fn granules(&self, w: &Tensor) -> Result<Tensor> {
        Ok(match self.rounding.scheme.granularity {
            Granularity::Tensor => w.reshape((1, ()))?,
            Granularity::Channel => w.clone(),
            Granularity::Group(group) => w.reshape(((), group))?,
        })
    }

    /// Values of granules by the scheme, or with learned scales `[granules, 1]`.
    pub(crate) fn round(&self, w: &Tensor, learned: Option<&Tensor>) -> Result<RoundedGranules> {
        let Scheme {
            method, rounding, ..
        } = self.rounding.scheme;
        let size = w.abs()?;
        let mut cut = None;
        let step = match (learned, method) {
            (Some(learned), _) => self.stored(&quotient(
                &learned.maximum(LEAST_SCALE)?,
                self.rounding.unit(),
            )?)?,
            (
                None,
                Method::Ternary {
                    threshold: Threshold::Absmean,
                    scale: ScaleRule::Rule,
                    ..
                }
                | Method::Binary { .. },
            ) => self.stored(&wide(&size)?.mean_keepdim(1)?)?,
            (None, Method::Ternary { threshold, .. }) => {
                let mean = wide(&size)?.mean_keepdim(1)?;
                let at = match threshold {
                    Threshold::Mean => (mean * 0.7)?.to_dtype(DType::F32)?,
                    Threshold::Factor(factor) => {
                        (mean * f64::from(factor))?.to_dtype(DType::F32)?
                    }
                    _ => (mean.to_dtype(DType::F32)? * 0.5)?,
                };
                let kept = wide(&size.broadcast_gt(&at)?.to_dtype(DType::F32)?)?;
                let step = ((wide(&size)? * &kept)?.sum_keepdim(1)?
                    / kept.sum_keepdim(1)?.maximum(1.0)?)?;
                cut = Some(at);
                self.stored(&step)?
            }
            (None, Method::Int { clip, .. }) => {
                let mut range = wide(&size.max_keepdim(1)?)?;
                if let Clip::Rms(times) = clip {
                    range = range
                        .minimum(&(wide(w)?.sqr()?.mean_keepdim(1)?.sqrt()? * f64::from(times))?)?;
                }
                self.stored(&quotient(
                    &range,
                    f32::from(self.rounding.scheme.precision()?.range().1),
                )?)?
            }
        };
        let values = match (method, self.rounding.estimator) {
            (Method::Ternary { .. }, _) => {
                let cut = cut.map_or_else(|| &step * 0.5, Ok)?;
                (is(w.broadcast_gt(&cut)?)? - is(w.broadcast_lt(&cut.neg()?)?)?)?
            }
            (Method::Binary { .. }, _) => is(w.ge(0f32)?)?.affine(2.0, -1.0)?,
            (Method::Int { .. }, StraightThroughEstimator::Stretched) => {
                let far = (&step * 2.0)?;
                let above = (is(w.broadcast_gt(&far)?)? + is(w.ge(0f32)?)?)?;
                (above + is(w.broadcast_gt(&far.neg()?)?)?)?.affine(2.0, -3.0)?
            }
            (Method::Int { .. }, _) => {
                let (low, high) = self.rounding.scheme.precision()?.range();
                let v = w
                    .broadcast_div(&divisor(&step)?)?
                    .clamp(f32::from(low), f32::from(high))?;
                match rounding {
                    Rounding::HalfEven => half_even(&v)?,
                    Rounding::HalfAway => v.round()?,
                    Rounding::HalfUp => (v + 0.5)?.floor()?,
                }
            }
        };
        Ok(RoundedGranules { values, step })
    }

    /// A scale rounded to the type that the scheme stores, in f32.
    fn stored(&self, scale: &Tensor) -> Result<Tensor> {
        let scale = scale.to_dtype(DType::F32)?;
        let dtype = match self.rounding.scheme.scale_dtype {
            ScaleDtype::F32 => return Ok(scale),
            ScaleDtype::F16 => DType::F16,
            ScaleDtype::Bf16 => DType::BF16,
        };
        Ok(scale.to_dtype(dtype)?.to_dtype(DType::F32)?)
    }

    /// W̃ in granules.
    fn weights(
        &self,
        w: &Tensor,
        scale: Option<&Tensor>,
        rounded: &RoundedGranules,
    ) -> Result<Tensor> {
        let lambda = f64::from(self.lambda);
        let (still, RoundedGranules { values, step }) = (w.detach(), rounded);
        let mut passing = (w - &still)?;
        let slope = self.slope(&still, step)?;
        if let Some(slope) = &slope {
            passing = (passing * slope.affine(lambda, 1.0 - lambda)?)?;
        }
        if let (Some(scale), Some(inside)) = (scale, &slope) {
            let scheme = &self.rounding.scheme;
            let of_weights = match scheme.precision()? {
                Precision::Binary => values.clone(),
                _ => (values - (inside * still.broadcast_div(&divisor(step)?)?)?)?,
            };
            let most = f64::from(scheme.precision()?.range().1);
            let factor =
                lambda / f64::from(self.rounding.unit()) / (w.dims()[1] as f64 * most).sqrt();
            passing =
                (passing + (of_weights * factor)?.broadcast_mul(&(scale - scale.detach())?)?)?;
        }
        Ok((mix(&still, values.broadcast_mul(step)?, lambda)? + passing)?)
    }

    /// The slope m, `[granules, weights of one]`; `None` if it is 1 everywhere.
    fn slope(&self, w: &Tensor, step: &Tensor) -> Result<Option<Tensor>> {
        let precision = self.rounding.levels()?;
        let (low, high) = precision.range();
        let (low, high) = (f32::from(low), f32::from(high));
        let at = |factor: f32| step * f64::from(factor);
        let slope = match self.rounding.estimator {
            StraightThroughEstimator::Plain => return Ok(None),
            StraightThroughEstimator::Clipped { range } => {
                (is(w.broadcast_ge(&at(range * low)?)?)?
                    * is(w.broadcast_le(&at(range * high)?)?)?)?
            }
            StraightThroughEstimator::LearnedScale => {
                (is(w.broadcast_gt(&at(low)?)?)? * is(w.broadcast_lt(&at(high)?)?)?)?
            }
            StraightThroughEstimator::Stretched => {
                is(w.abs()?.broadcast_lt(&at(self.rounding.unit())?)?)?
            }
            StraightThroughEstimator::Soft { temperature: t } => {
                let half = if precision == Precision::Binary {
                    1.0
                } else {
                    0.5
                };
                let v = w.broadcast_div(&divisor(step)?)?;
                let inside = (is(v.ge(low)?)? * is(v.le(high)?)?)?;
                let places = f64::from((high - low) / (2.0 * half)) - 1.0;
                let below = v
                    .affine(f64::from(0.5 / half), f64::from(-0.5 * low / half))?
                    .floor()?
                    .clamp(0.0, places)?;
                let from_middle =
                    (v - below.affine(f64::from(2.0 * half), f64::from(low + half))?)?;
                let tanh = (from_middle / f64::from(half * t))?.tanh()?;
                let most = f64::from(t * t.recip().tanh());
                (inside * tanh.sqr()?.affine(-1.0 / most, 1.0 / most)?)?
            }
        };
        // A granule of zeros has no range: the gradient passes unchanged.
        let dead = is(step.eq(0f32)?)?;
        Ok(Some(
            slope
                .broadcast_mul(&dead.affine(-1.0, 1.0)?)?
                .broadcast_add(&dead)?,
        ))
    }

    /// x̃ of tokens `[M, K]`.
    fn tokens(&self, x: &Tensor) -> Result<Tensor> {
        let still = x.detach();
        let quantized = match self.activations {
            Activations::Float => return Ok(x.clone()),
            Activations::Int8 => absmax(&still, 127.0)?,
            Activations::Int4 => absmax(&still, 7.0)?,
            Activations::Sign => {
                let scale = wide(&still.abs()?)?.mean_keepdim(1)?.to_dtype(DType::F32)?;
                is(still.ge(0f32)?)?
                    .affine(2.0, -1.0)?
                    .broadcast_mul(&scale)?
            }
        };
        Ok((mix(&still, quantized, f64::from(self.lambda))? + (x - &still)?)?)
    }
}

/// `x + λ·(x̂ − x)`.
fn mix(x: &Tensor, quantized: Tensor, lambda: f64) -> candle_core::Result<Tensor> {
    if lambda == 1.0 {
        Ok(quantized)
    } else {
        x + ((quantized - x)? * lambda)?
    }
}

/// Absmax quantization of each token, dequantized.
fn absmax(x: &Tensor, top: f32) -> candle_core::Result<Tensor> {
    let max = x.abs()?.max_keepdim(D::Minus1)?.maximum(1e-5f32)?;
    let inverse = max.ones_like()?.affine(f64::from(top), 0.0)?.div(&max)?;
    half_even(&x.broadcast_mul(&inverse)?.clamp(-top - 1.0, top)?)?
        .broadcast_mul(&quotient(&max, top)?)
}

/// A correctly rounded quotient; candle divides by a number by multiplying with its inverse.
fn quotient(x: &Tensor, by: f32) -> candle_core::Result<Tensor> {
    x.broadcast_div(&Tensor::new(by, x.device())?.to_dtype(x.dtype())?)
}

/// Rounds numbers below 2²² in magnitude to the nearest integer, halves to even; candle's `round`
/// takes halves away from 0. Adding 1.5·2²³ leaves no bit below 1.
fn half_even(x: &Tensor) -> candle_core::Result<Tensor> {
    const MAGIC: f64 = 12_582_912.0;
    (x + MAGIC)? - MAGIC
}

/// A condition as the numbers 0 and 1.
fn is(condition: Tensor) -> candle_core::Result<Tensor> {
    condition.to_dtype(DType::F32)
}

/// Steps as divisors: 1 where a step is 0, whose weights are all 0.
pub(crate) fn divisor(step: &Tensor) -> candle_core::Result<Tensor> {
    step + is(step.eq(0f32)?)?
}

/// Converts to the type in which weights are summed.
fn wide(x: &Tensor) -> candle_core::Result<Tensor> {
    if x.device().is_metal() {
        Ok(x.clone())
    } else {
        x.to_dtype(DType::F64)
    }
}
