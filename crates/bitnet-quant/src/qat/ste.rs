//! Straight-through estimators: the one place that rounds weights while training.
//!
//! ```text
//! forwards    ŵ = s·(q − z),   q = the scheme's value of w
//! backwards   ∂L/∂w = ∂L/∂ŵ · m(w/s),   m as the estimator says
//! ```

use crate::tensor::kernel::Packed;
use crate::tensor::runtime::Runtime;
use crate::{Error, Result, matrix};
use bitnet_core::ops::{Cuts, Ops, Uniform};
use bitnet_core::scheme::{BinarySplit, Mapping, Method, Scheme};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ZeroPoints, pack};
use bitnet_kernels::stream;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// How the gradient passes the rounding of weights, and whether the scale is learned.
///
/// With `v = w/s`, and `low` and `high` the least and the greatest level in units of s:
///
/// ```
/// use bitnet_quant::qat::StraightThroughEstimator;
/// let soft: StraightThroughEstimator = "soft:0.5".parse()?;
/// assert_eq!(soft, StraightThroughEstimator::Soft { temperature: 0.5 });
/// assert_eq!(soft.to_string(), "soft:0.5");
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum StraightThroughEstimator {
    /// `m = 1` (Bengio et al. 2013, arXiv:1308.3432; b1.58 trains so). The scale is the scheme's and a constant of the gradient.
    #[default]
    Plain,
    /// `m = [range·low ≤ v ≤ range·high]`: weights far outside the levels stand still. `range` is positive.
    Clipped {
        /// Multiple of the outermost levels.
        range: f32,
    },
    /// LSQ (Esser et al. 2020, arXiv:1902.08153): s is a variable, `m = [low < v < high]`, and `∂ŵ/∂s = q − v` where that holds, else q.
    /// The gradient of s is multiplied by `1/√(n·Qp)`, n being the weights under one s and Qp the greatest value.
    /// Binary: `∂ŵ/∂s = q`. For schemes of one plane without zero points.
    LearnedScale,
    /// Stretched elastic (SEQ of ParetoQ, Liu et al. 2025, arXiv:2502.02631): α is a variable, levels are the middles of k equal parts of
    /// `[−α, α]`: `ŵ ∈ {−2α/3, 0, 2α/3}` for ternary, `{−3α/4, −α/4, α/4, 3α/4}` for 2 bits, `±α` for binary; `m = [|w| < α]`, and
    /// `∂ŵ/∂α = ŵ/α − w/α` where that holds, else `ŵ/α`; the gradient of α is multiplied as for LSQ.
    ///
    /// The four levels of 2 bits become the values ±1 and ±3 of int3 with the scale α/4: int2 has a zero and they have not.
    Stretched,
    /// The slope of a staircase of tanh: between two levels with middle c and half distance h, `m = (1 − tanh²(u/T)) / (T·tanh(1/T))` with
    /// `u = (v − c)/h`, and 0 outside the levels (DSQ, Gong et al. 2019, arXiv:1908.05033). T → ∞ is the clipped estimator with range 1.
    Soft {
        /// T, positive.
        temperature: f32,
    },
}

impl StraightThroughEstimator {
    /// Whether the scale is a variable.
    pub const fn learns_scale(self) -> bool {
        matches!(self, Self::LearnedScale | Self::Stretched)
    }

    pub(super) fn validate(self) -> Result<()> {
        match self {
            Self::Clipped { range: x } | Self::Soft { temperature: x } if !(x.is_finite() && x > 0.0) => {
                Err(Error::input("estimator", "a positive number", self))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for StraightThroughEstimator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.pad("plain"),
            Self::Clipped { range } => f.pad(&format!("clipped:{range}")),
            Self::LearnedScale => f.pad("lsq"),
            Self::Stretched => f.pad("stretched"),
            Self::Soft { temperature } => f.pad(&format!("soft:{temperature}")),
        }
    }
}

impl FromStr for StraightThroughEstimator {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let (name, number) = s.split_once(':').map_or((s, None), |(name, number)| (name, Some(number)));
        let estimator = match (name, number.map(str::parse)) {
            ("plain", None) => Self::Plain,
            ("clipped", Some(Ok(range))) => Self::Clipped { range },
            ("lsq", None) => Self::LearnedScale,
            ("stretched", None) => Self::Stretched,
            ("soft", Some(Ok(temperature))) => Self::Soft { temperature },
            _ => return Err(Error::input("estimator", "plain, clipped:X, lsq, stretched, soft:X", s)),
        };
        estimator.validate()?;
        Ok(estimator)
    }
}

impl Serialize for StraightThroughEstimator {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StraightThroughEstimator {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// No learned scale is smaller: what training pushes below stays a positive scale.
const LEAST_SCALE: f32 = 1e-8;

/// Weights as values and scales, from the forward pass to the backward pass.
#[derive(Debug, Clone)]
pub(super) enum Codes {
    /// One plane of trits, four to a byte.
    TwoBit(stream::Packed),
    /// Anything else, a byte for each value.
    Values(Matrix),
}

/// How the weights of a layer are rounded.
#[derive(Debug, Clone)]
pub(super) struct Quantizer {
    pub(super) scheme: Scheme,
    pub(super) estimator: StraightThroughEstimator,
    pub(super) runtime: Arc<Runtime>,
}

/// The middle of the road of `∂ŵ/∂w` and `∂ŵ/∂scale` for one granule.
#[derive(Clone, Copy)]
struct Slope {
    /// Step between two values.
    step: f32,
    /// Least and greatest level in units of the step.
    low: f32,
    high: f32,
    /// The variable in units of the step.
    unit: f32,
    binary: bool,
}

impl Slope {
    /// m of one weight.
    #[inline(always)]
    fn mask(self, estimator: StraightThroughEstimator, w: f32) -> f32 {
        let v = w / self.step;
        let inside = match estimator {
            StraightThroughEstimator::Plain => true,
            StraightThroughEstimator::Clipped { range } => range * self.low <= v && v <= range * self.high,
            StraightThroughEstimator::LearnedScale => self.low < v && v < self.high,
            StraightThroughEstimator::Stretched => v.abs() < self.unit,
            StraightThroughEstimator::Soft { temperature: t } => {
                let (cell, half) = if self.binary { (self.low, 1.0) } else { (v.floor().clamp(self.low, self.high - 1.0), 0.5) };
                let tanh = ((v - cell - half) / half / t).tanh();
                let slope = (1.0 - tanh * tanh) / (t * t.recip().tanh());
                return if self.low <= v && v <= self.high { slope } else { 0.0 };
            }
        };
        if inside { 1.0 } else { 0.0 }
    }

    /// ∂ŵ/∂(the variable) of a weight whose value is q.
    #[inline(always)]
    fn of_scale(self, estimator: StraightThroughEstimator, w: f32, q: f32) -> f32 {
        let inside = self.mask(estimator, w) != 0.0 && !self.binary;
        (q - if inside { w / self.step } else { 0.0 }) / self.unit
    }
}

impl Quantizer {
    /// Refuses what does not go together.
    pub(super) fn new(scheme: Scheme, estimator: StraightThroughEstimator, runtime: Arc<Runtime>) -> Result<Self> {
        estimator.validate()?;
        scheme.spec(1, 1)?;
        let several = matches!(scheme.method, Method::Ternary { planes: 2.., .. });
        if several && matches!(estimator, StraightThroughEstimator::Soft { .. }) || several && estimator.learns_scale() {
            return Err(Error::input("estimator", "plain or clipped for several trit planes", estimator));
        }
        if estimator.learns_scale() {
            let ok = match scheme.method {
                Method::Ternary { .. } | Method::Binary { split: BinarySplit::Zero, stochastic: None } => true,
                Method::Binary { .. } => false,
                Method::Int { bits, mapping, .. } => {
                    mapping == Mapping::Symmetric && (bits == 2 || estimator == StraightThroughEstimator::LearnedScale)
                }
            };
            if !ok {
                let expected = match estimator {
                    StraightThroughEstimator::Stretched => "ternary, binary or symmetric 2 bits where scales are stretched",
                    _ => "a scheme without zero points where scales are learned",
                };
                return Err(Error::input("scheme", expected, format!("{:?}", scheme.method)));
            }
        }
        Ok(Self { scheme, estimator, runtime })
    }

    /// The spec of what this makes.
    fn spec(&self, (rows, cols): (usize, usize)) -> Result<MatrixSpec> {
        let mut spec = self.scheme.spec(rows, cols)?;
        if self.estimator == StraightThroughEstimator::Stretched && spec.precision == Precision::Int2 {
            spec.precision = Precision::Int3;
        }
        Ok(spec)
    }

    /// The learned variable in units of the step between two values.
    fn unit(&self) -> f32 {
        match (self.estimator, self.scheme.method) {
            (StraightThroughEstimator::Stretched, Method::Ternary { .. }) => 1.5,
            (StraightThroughEstimator::Stretched, Method::Int { .. }) => 4.0,
            _ => 1.0,
        }
    }

    /// Where learned scales begin: for ternary and binary with the scale of the scheme, for integers with the multiple of `mean|W|` that has the
    /// least squared error on normal weights.
    pub(super) fn initial_scales(&self, w: &[f32], shape: (usize, usize)) -> Result<Vec<f32>> {
        let Method::Int { .. } = self.scheme.method else {
            let fitted = self.runtime.install(|| matrix::quantize(self.runtime.machine.kernels, w, shape, &self.scheme, None))?;
            return Ok(fitted.scales.iter().map(|s| (s * self.unit()).max(LEAST_SCALE)).collect());
        };
        let spec = self.spec(shape)?;
        let factor = match (self.estimator, spec.precision) {
            (StraightThroughEstimator::Stretched, _) => 2.5,
            (_, Precision::Int2) => 1.32,
            (_, Precision::Int3) => 0.756,
            (_, Precision::Int4) => 0.424,
            _ => 0.0386,
        };
        let width = if spec.granularity == Granularity::Tensor { w.len() } else { spec.granule_cols() };
        let rows = w.chunks(if spec.granularity == Granularity::Tensor { w.len() } else { spec.cols }.max(1));
        let granules = rows.flat_map(|row| row.chunks(width.max(1)));
        let mean = |w: &[f32]| self.runtime.machine.kernels.magnitudes(w).mean();
        Ok(granules.map(|w| ((factor * mean(w)) as f32).max(LEAST_SCALE)).collect())
    }

    /// Weights `[N, K]` to values: by the scheme, or with the learned scales.
    pub(super) fn encode(&self, w: &[f32], shape: (usize, usize), learned: Option<&[f32]>) -> Result<Codes> {
        let (kernels, pool) = (self.runtime.machine.kernels, &self.runtime.pool);
        if let Some(learned) = learned {
            return self.runtime.install(|| self.encode_learned(w, shape, learned)).map(Codes::Values);
        }
        if let Method::Ternary { planes: 1, .. } = self.scheme.method {
            let layout = pack::by_name("two-bit")?;
            return Ok(Codes::TwoBit(stream::quantize(kernels, pool, stream::Weights::F32(w), shape.0, shape.1, &self.scheme, layout)?));
        }
        self.runtime.install(|| matrix::quantize(kernels, w, shape, &self.scheme, None)).map(Codes::Values)
    }

    fn encode_learned(&self, w: &[f32], shape: (usize, usize), learned: &[f32]) -> Result<Matrix> {
        let spec = self.spec(shape)?;
        let expected = |what, expected, got| if expected == got { Ok(()) } else { Err(bitnet_core::Error::Length { what, expected, got }) };
        expected("weights", spec.weights_len(), w.len())?;
        expected("scales", spec.scales_len(), learned.len())?;
        let broken = |x: &[f32]| x.iter().position(|x| !x.is_finite()).map(|i| (i, x[i]));
        if let Some((index, value)) = broken(w).or_else(|| broken(learned)) {
            return Err(bitnet_core::Error::NotFinite { index, value }.into());
        }
        let storage = self.scheme.scale_storage();
        let step = |&scale: &f32| storage.round(f64::from(scale.max(LEAST_SCALE) / self.unit()));
        let scales = learned.iter().map(step).collect::<Result<Vec<_>, _>>()?;
        let mut values = vec![0i8; w.len()];
        let (width, kernels) = (spec.granule_cols(), self.runtime.machine.kernels);
        values.par_chunks_mut(spec.cols).zip(w.par_chunks(spec.cols)).enumerate().for_each(|(row, (values, w))| {
            for (i, (q, w)) in values.chunks_mut(width).zip(w.chunks(width)).enumerate() {
                let scale = scales[spec.scale_index(0, row, i * width)];
                match (self.scheme.method, self.estimator) {
                    (Method::Ternary { .. }, _) => kernels.encode_cut(w, Cuts::rounding(scale, self.scheme.rounding), q),
                    (Method::Binary { .. }, _) => q.iter_mut().zip(w).for_each(|(q, &w)| *q = if w >= 0.0 { 1 } else { -1 }),
                    (Method::Int { .. }, StraightThroughEstimator::Stretched) => {
                        let far = 2.0 * scale;
                        q.iter_mut().zip(w).for_each(|(q, &w)| *q = 2 * (i8::from(w > far) + i8::from(w >= 0.0) + i8::from(w > -far)) - 3);
                    }
                    (Method::Int { .. }, _) => {
                        let (low, high) = spec.precision.range();
                        kernels.encode_uniform(w, &Uniform { scale, zero: 0.0, low, high, rounding: self.scheme.rounding }, q);
                    }
                }
            }
        });
        Ok(Matrix { spec, values, scales, zero_points: vec![] })
    }

    /// ∂L/∂w in place of ∂L/∂ŵ, both `[N, K]`, for `w + λ·(ŵ − w)`; ∂L/∂scale where scales are learned.
    pub(super) fn surrogate(&self, w: &[f32], codes: &Codes, lambda: f32, learned: bool, grad: &mut [f32]) -> Option<Vec<f32>> {
        if self.estimator == StraightThroughEstimator::Plain {
            return None;
        }
        let estimator = self.estimator;
        let spec = codes.spec();
        let (low, high) = self.levels(spec);
        let (cols, width, granules) = (spec.cols.max(1), spec.granule_cols(), spec.granules_per_row());
        let mut of_scales = vec![0f64; if learned { spec.rows * granules } else { 0 }];
        let scales = codes.scales();
        let row = |row: usize, w: &[f32], grad: &mut [f32], of_scales: &mut [f64]| {
            for (i, (grad, w)) in grad.chunks_mut(width).zip(w.chunks(width)).enumerate() {
                let index = spec.scale_index(0, row, i * width);
                let zero = codes.zero_point(index);
                let step = (0..spec.planes).map(|p| scales[p * (spec.scales_len() / spec.planes) + index]).sum::<f32>();
                let binary = spec.precision == Precision::Binary;
                let slope = Slope { step, low: low - zero, high: high - zero, unit: self.unit(), binary };
                if step == 0.0 {
                    // A granule of zeros has no range: the identity.
                    continue;
                }
                if let (Some(sum), Codes::Values(matrix)) = (of_scales.get_mut(i), codes) {
                    let values = &matrix.values[row * cols + i * width..][..w.len()];
                    let part = |((&g, &w), &q): ((&f32, &f32), &i8)| f64::from(g * slope.of_scale(estimator, w, f32::from(q)));
                    *sum = f64::from(lambda) * grad.iter().zip(w).zip(values).map(part).sum::<f64>();
                }
                grad.iter_mut().zip(w).for_each(|(g, &w)| *g *= 1.0 - lambda + lambda * slope.mask(estimator, w));
            }
        };
        if learned {
            let rows = grad.par_chunks_mut(cols).zip(w.par_chunks(cols)).zip(of_scales.par_chunks_mut(granules));
            self.runtime.install(|| rows.enumerate().for_each(|(r, ((grad, w), sums))| row(r, w, grad, sums)));
        } else {
            let rows = grad.par_chunks_mut(cols).zip(w.par_chunks(cols));
            self.runtime.install(|| rows.enumerate().for_each(|(r, (grad, w))| row(r, w, grad, &mut [])));
        }
        learned.then(|| {
            let tensor = spec.granularity == Granularity::Tensor;
            let sums = if tensor { vec![of_scales.iter().sum()] } else { of_scales };
            let qp = f64::from(self.scheme.precision().map_or(1, |p| p.range().1));
            let scaled = |(i, sum): (usize, f64)| {
                let n = if tensor { spec.weights_len() } else { width.min(spec.cols - i % granules * width) };
                (sum / (n as f64 * qp).sqrt()) as f32
            };
            sums.into_iter().enumerate().map(scaled).collect()
        })
    }

    /// Least and greatest value.
    fn levels(&self, spec: &MatrixSpec) -> (f32, f32) {
        let (low, high) = spec.precision.range();
        if self.estimator == StraightThroughEstimator::Stretched && spec.precision == Precision::Int3 {
            (-3.0, 3.0)
        } else {
            (low.into(), high.into())
        }
    }
}

impl Codes {
    pub(super) fn spec(&self) -> &MatrixSpec {
        match self {
            Self::TwoBit(packed) => &packed.spec,
            Self::Values(matrix) => &matrix.spec,
        }
    }

    fn scales(&self) -> &[f32] {
        match self {
            Self::TwoBit(packed) => &packed.scales,
            Self::Values(matrix) => &matrix.scales,
        }
    }

    /// Mean of the scales' magnitudes.
    pub(super) fn mean_scale(&self) -> f64 {
        self.scales().iter().map(|s| f64::from(s.abs())).sum::<f64>() / self.scales().len().max(1) as f64
    }

    fn zero_point(&self, index: usize) -> f32 {
        match self {
            Self::Values(Matrix { zero_points, spec: MatrixSpec { zero_points: ZeroPoints::I8 | ZeroPoints::F32, .. }, .. }) => {
                zero_points[index]
            }
            _ => 0.0,
        }
    }

    /// In the layout of the kernels.
    pub(super) fn prepack(&self, runtime: &Runtime) -> Result<Packed> {
        match self {
            Self::TwoBit(packed) => Packed::from_wire(packed, pack::by_name("two-bit")?, runtime),
            Self::Values(matrix) => Packed::new(matrix, runtime),
        }
    }

    /// Ŵ, `[N, K]`.
    pub(super) fn dequantize(&self, runtime: &Runtime) -> Result<Vec<f32>> {
        let spec = self.spec();
        let mut out = vec![0.0; spec.weights_len()];
        match self {
            Self::TwoBit(packed) => {
                let (layout, kernels) = (pack::by_name("two-bit")?, runtime.machine.kernels);
                stream::dequantize(kernels, &runtime.pool, layout, spec, &packed.bytes, &packed.scales, &mut out)?;
            }
            Self::Values(matrix) => runtime.install(|| {
                let rows = out.par_chunks_mut(spec.cols.max(1)).enumerate();
                rows.for_each(|(row, out)| matrix.dequantize_row_into(row, out));
            }),
        }
        Ok(out)
    }

    /// Values, one byte each.
    pub(super) fn into_matrix(self, runtime: &Runtime) -> Result<Matrix> {
        match self {
            Self::Values(matrix) => Ok(matrix),
            Self::TwoBit(stream::Packed { spec, bytes, scales, zero_points }) => {
                let mut values = vec![0; spec.values_len()];
                stream::unpack(runtime.machine.kernels, &runtime.pool, pack::by_name("two-bit")?, &spec, &bytes, &mut values)?;
                Ok(Matrix { spec, values, scales, zero_points })
            }
        }
    }
}
