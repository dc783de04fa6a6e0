//! Quantization of activations: absmax integers and signs, one scale per token or per tensor.

use crate::scheme::Rounding;
use crate::{Error, Result, named};

/// How activations are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationMethod {
    /// `q = clip(round(x · 127 / m), −128, 127)` with `m = max(max|x|, 1e-5)`; the scale is `m /
    /// 127` (b1.58, as HF transformers computes it).
    Int8,
    /// The same with 7 and −8 … 7.
    Int4,
    /// `q = +1 if x ≥ 0 else −1`; the scale is `mean|x|`, the least squared error that two levels
    /// ±s can reach.
    Sign,
}

named!(ActivationMethod, "activation method", { Int8 = "int8", Int4 = "int4", Sign = "sign" });

/// Which activations share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationGranularity {
    /// Each token, i.e. each row of X.
    Token,
    /// The whole tensor.
    Tensor,
}

named!(ActivationGranularity, "activation granularity", { Token = "token", Tensor = "tensor" });

/// Quantized activations: `x ≈ scale · value`.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedActivations {
    /// Values, `[M, K]` row-major.
    pub values: Vec<i8>,
    /// One scale for each token, or one scale in total.
    pub scales: Vec<f32>,
}

/// Quantizes activations `x` of shape `[M, K]`, `K = cols`.
///
/// ```
/// use bitnet_core::activation::{quantize, ActivationGranularity, ActivationMethod};
/// use bitnet_core::scheme::Rounding;
/// let x = [1.0, -0.5, 0.25, 0.0];
/// let q = quantize(&x, 4, ActivationMethod::Int8, ActivationGranularity::Token, Rounding::HalfEven)?;
/// assert_eq!(q.values, [127, -64, 32, 0]); // round(-63.5) is even
/// assert_eq!(q.scales, [1.0 / 127.0]);
/// # Ok::<(), bitnet_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Length`] if `x` is not a whole number of rows, [`Error::NotFinite`] for NaN or
/// infinity.
pub fn quantize(
    x: &[f32],
    cols: usize,
    method: ActivationMethod,
    granularity: ActivationGranularity,
    rounding: Rounding,
) -> Result<QuantizedActivations> {
    let mut out = QuantizedActivations {
        values: vec![],
        scales: vec![],
    };
    quantize_into(x, cols, (method, granularity, rounding), &mut out)?;
    Ok(out)
}

/// [`quantize`] into the buffers of `out`, which grow only if they are too small.
///
/// # Errors
/// As [`quantize`]; `out` is then as it was.
pub fn quantize_into(
    x: &[f32],
    cols: usize,
    (method, granularity, rounding): (ActivationMethod, ActivationGranularity, Rounding),
    out: &mut QuantizedActivations,
) -> Result<()> {
    if cols == 0 || !x.len().is_multiple_of(cols) {
        return Err(Error::Length {
            what: "activations",
            expected: x.len().next_multiple_of(cols.max(1)).max(cols),
            got: x.len(),
        });
    }
    if let Some((index, &value)) = x.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        return Err(Error::NotFinite { index, value });
    }
    let width = match granularity {
        ActivationGranularity::Token => cols,
        ActivationGranularity::Tensor => x.len().max(1),
    };
    out.values.resize(x.len(), 0);
    out.scales.clear();
    out.scales
        .extend(
            x.chunks(width)
                .zip(out.values.chunks_mut(width))
                .map(|(x, q)| match method {
                    ActivationMethod::Int8 => absmax(x, 127.0, rounding, q),
                    ActivationMethod::Int4 => absmax(x, 7.0, rounding, q),
                    ActivationMethod::Sign => {
                        q.iter_mut()
                            .zip(x)
                            .for_each(|(q, &x)| *q = if x >= 0.0 { 1 } else { -1 });
                        (x.iter().map(|&x| f64::from(x.abs())).sum::<f64>() / x.len() as f64) as f32
                    }
                }),
        );
    Ok(())
}

fn absmax(x: &[f32], top: f32, rounding: Rounding, q: &mut [i8]) -> f32 {
    let max = x.iter().fold(0.0f32, |m, &x| m.max(x.abs())).max(1e-5);
    let inverse = top / max;
    for (q, &x) in q.iter_mut().zip(x) {
        *q = rounding.round(x * inverse).clamp(-top - 1.0, top) as i8;
    }
    max / top
}
