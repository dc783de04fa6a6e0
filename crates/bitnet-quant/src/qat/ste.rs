//! Straight-through estimators: the one place that rounds weights while training.
//!
//! ```text
//! forwards    ŵ = s·(q − z),   q = the scheme's value of w
//! backwards   ∂L/∂w = ∂L/∂ŵ · m(w/s),   m as the estimator says
//! ```

use crate::tensor::kernel::Packed;
use crate::tensor::runtime::Runtime;
use crate::{Error, Result};
use bitnet_checkpoint::matrix;
use bitnet_core::ops::{Cuts, Ops, Uniform};
use bitnet_core::scheme::{BinarySplit, Mapping, Method, Scheme};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ZeroPoints, named, pack};
use bitnet_kernels::stream;
use rayon::prelude::*;
use std::borrow::Cow;
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
    /// `m = 1` (Bengio et al. 2013, arXiv:1308.3432; b1.58 trains so). The scale is the scheme's
    /// and a constant of the gradient.
    #[default]
    Plain,
    /// `m = [range·low ≤ v ≤ range·high]`: weights far outside the levels stand still. `range` is
    /// positive.
    Clipped {
        /// Multiple of the outermost levels.
        range: f32,
    },
    /// LSQ (Esser et al. 2020, arXiv:1902.08153): s is a variable, `m = [low < v < high]`, and
    /// `∂ŵ/∂s = q − v` where that holds, else q. The gradient of s is multiplied by `1/√(n·Qp)`, n
    /// being the weights under one s and Qp the greatest value. Binary: `∂ŵ/∂s = q`. For schemes of
    /// one plane without zero points.
    LearnedScale,
    /// Stretched elastic (SEQ of ParetoQ, Liu et al. 2025, arXiv:2502.02631): α is a variable,
    /// levels are the middles of k equal parts of `[−α, α]`: `ŵ ∈ {−2α/3, 0, 2α/3}` for ternary,
    /// `{−3α/4, −α/4, α/4, 3α/4}` for 2 bits, `±α` for binary; `m = [|w| < α]`, and `∂ŵ/∂α = ŵ/α −
    /// w/α` where that holds, else `ŵ/α`; the gradient of α is multiplied as for LSQ.
    ///
    /// The four levels of 2 bits become the values ±1 and ±3 of int3 with the scale α/4: int2 has a
    /// zero and they have not.
    Stretched,
    /// The slope of a staircase of tanh: between two levels with middle c and half distance h, `m =
    /// (1 − tanh²(u/T)) / (T·tanh(1/T))` with `u = (v − c)/h`, and 0 outside the levels (DSQ, Gong
    /// et al. 2019, arXiv:1908.05033). T → ∞ is the clipped estimator with range 1.
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
            Self::Clipped { range: x } | Self::Soft { temperature: x }
                if !(x.is_finite() && x > 0.0) =>
            {
                Err(Error::input("estimator", "a positive number", self))
            }
            _ => Ok(()),
        }
    }
}

named!(
    StraightThroughEstimator, "estimator",
    { Plain = "plain", LearnedScale = "lsq", Stretched = "stretched" },
    {
        Clipped { range: f32 } = "clipped": "X" if |x| x.is_finite() && *x > 0.0,
        Soft { temperature: f32 } = "soft": "X" if |x| x.is_finite() && *x > 0.0,
    }
);

/// No learned scale is smaller: what training pushes below stays a positive scale.
pub(super) const LEAST_SCALE: f32 = 1e-8;

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

/// m over one granule.
#[derive(Clone, Copy)]
enum Slope {
    /// 1 for weights from the first to the second number, else 0.
    Range(f32, f32),
    Soft(Staircase),
}

/// The staircase of tanh: levels from `low` to `high` in units of `step`, `2·half` apart.
#[derive(Clone, Copy)]
struct Staircase {
    step: f32,
    low: f32,
    high: f32,
    half: f32,
    temperature: f32,
}

impl Staircase {
    fn slope(self, w: f32) -> f32 {
        let Self {
            step,
            low,
            high,
            half,
            temperature: t,
        } = self;
        let v = w / step;
        // The lower of the two levels that v is between.
        let below = low
            + ((v - low) / (2.0 * half))
                .floor()
                .clamp(0.0, (high - low) / (2.0 * half) - 1.0)
                * 2.0
                * half;
        let tanh = ((v - below - half) / half / t).tanh();
        if low <= v && v <= high {
            (1.0 - tanh * tanh) / (t * t.recip().tanh())
        } else {
            0.0
        }
    }
}

const LANES: usize = 16;

/// `Σ g·q` and `Σ g·w` over the weights from `range.0` to `range.1`.
fn scale_sums(grad: &[f32], w: &[f32], q: &[i8], range: (f32, f32)) -> (f64, f64) {
    let (mut of_values, mut of_weights) = ([0f32; LANES], [0f32; LANES]);
    for ((grad, w), q) in grad.chunks(LANES).zip(w.chunks(LANES)).zip(q.chunks(LANES)) {
        for (lane, ((&g, &w), &q)) in grad.iter().zip(w).zip(q).enumerate() {
            of_values[lane] += g * f32::from(q);
            of_weights[lane] += if range.0 <= w && w <= range.1 {
                g * w
            } else {
                0.0
            };
        }
    }
    let total = |lanes: [f32; LANES]| lanes.into_iter().map(f64::from).sum();
    (total(of_values), total(of_weights))
}

impl Quantizer {
    /// Refuses what does not go together.
    pub(super) fn new(
        scheme: Scheme,
        estimator: StraightThroughEstimator,
        runtime: Arc<Runtime>,
    ) -> Result<Self> {
        estimator.validate()?;
        scheme.spec(1, 1)?;
        let several = matches!(scheme.method, Method::Ternary { planes: 2.., .. });
        if several
            && !matches!(
                estimator,
                StraightThroughEstimator::Plain | StraightThroughEstimator::Clipped { .. }
            )
        {
            return Err(Error::input(
                "estimator",
                "plain or clipped for several trit planes",
                estimator,
            ));
        }
        if estimator.learns_scale() {
            let ok = match scheme.method {
                Method::Ternary { .. }
                | Method::Binary {
                    split: BinarySplit::Zero,
                    stochastic: None,
                } => true,
                Method::Binary { .. } => false,
                Method::Int { bits, mapping, .. } => {
                    mapping == Mapping::Symmetric
                        && (bits == 2 || estimator == StraightThroughEstimator::LearnedScale)
                }
            };
            if !ok {
                let expected = match estimator {
                    StraightThroughEstimator::Stretched => {
                        "ternary, binary or symmetric 2 bits where scales are stretched"
                    }
                    _ => "a scheme without zero points where scales are learned",
                };
                return Err(Error::input(
                    "scheme",
                    expected,
                    format!("{:?}", scheme.method),
                ));
            }
        }
        Ok(Self {
            scheme,
            estimator,
            runtime,
        })
    }

    /// The spec of what this makes.
    fn spec(&self, (rows, cols): (usize, usize)) -> Result<MatrixSpec> {
        Ok(MatrixSpec {
            precision: self.levels()?,
            ..self.scheme.spec(rows, cols)?
        })
    }

    /// The alphabet of the values, which is that of the scheme but for four stretched levels.
    pub(super) fn levels(&self) -> Result<Precision> {
        match self.scheme.precision()? {
            Precision::Int2 if self.estimator == StraightThroughEstimator::Stretched => {
                Ok(Precision::Int3)
            }
            other => Ok(other),
        }
    }

    /// The learned variable in units of the step between two values.
    pub(super) fn unit(&self) -> f32 {
        match (self.estimator, self.scheme.method) {
            (StraightThroughEstimator::Stretched, Method::Ternary { .. }) => 1.5,
            (StraightThroughEstimator::Stretched, Method::Int { .. }) => 4.0,
            _ => 1.0,
        }
    }

    /// Where learned scales begin: for ternary and binary with the scale of the scheme, for
    /// integers with the multiple of `mean|W|` that has the least squared error on normal weights.
    pub(super) fn initial_scales(&self, w: &[f32], shape: (usize, usize)) -> Result<Vec<f32>> {
        let Method::Int { .. } = self.scheme.method else {
            let fitted = self.runtime.install(|| {
                matrix::quantize(self.runtime.machine.kernels, w, shape, &self.scheme, None)
            })?;
            return Ok(fitted
                .scales
                .iter()
                .map(|s| (s * self.unit()).max(LEAST_SCALE))
                .collect());
        };
        let spec = self.spec(shape)?;
        let factor = match (self.estimator, spec.precision) {
            (StraightThroughEstimator::Stretched, _) => 2.5,
            (_, Precision::Int2) => 1.32,
            (_, Precision::Int3) => 0.756,
            (_, Precision::Int4) => 0.424,
            _ => 0.0386,
        };
        let width = if spec.granularity == Granularity::Tensor {
            w.len()
        } else {
            spec.granule_cols()
        };
        let rows = w.chunks(
            if spec.granularity == Granularity::Tensor {
                w.len()
            } else {
                spec.cols
            }
            .max(1),
        );
        let granules = rows.flat_map(|row| row.chunks(width.max(1)));
        let mean = |w: &[f32]| self.runtime.machine.kernels.magnitudes(w).mean();
        Ok(granules
            .map(|w| ((factor * mean(w)) as f32).max(LEAST_SCALE))
            .collect())
    }

    /// Weights `[N, K]` to values: by the scheme, or with the learned scales.
    pub(super) fn encode(
        &self,
        w: &[f32],
        shape: (usize, usize),
        learned: Option<&[f32]>,
    ) -> Result<Codes> {
        let (kernels, pool) = (self.runtime.machine.kernels, &self.runtime.pool);
        if let Some(learned) = learned {
            let matrix = self
                .runtime
                .install(|| self.encode_learned(w, shape, learned))?;
            if matrix.spec.precision != Precision::Ternary {
                return Ok(Codes::Values(matrix));
            }
            let Matrix {
                spec,
                values,
                scales,
                zero_points,
            } = matrix;
            let mut bytes = vec![];
            stream::pack(
                kernels,
                pool,
                pack::plain(Precision::Ternary),
                &spec,
                &values,
                &scales,
                &mut bytes,
            )?;
            return Ok(Codes::TwoBit(stream::Packed {
                spec,
                bytes,
                scales,
                zero_points,
            }));
        }
        if let Method::Ternary { planes: 1, .. } = self.scheme.method {
            let layout = pack::plain(Precision::Ternary);
            return Ok(Codes::TwoBit(stream::quantize(
                kernels,
                pool,
                stream::Weights::F32(w),
                shape.0,
                shape.1,
                &self.scheme,
                layout,
            )?));
        }
        let matrix = self
            .runtime
            .install(|| matrix::quantize(kernels, w, shape, &self.scheme, None))?;
        Ok(Codes::Values(matrix))
    }

    fn encode_learned(&self, w: &[f32], shape: (usize, usize), learned: &[f32]) -> Result<Matrix> {
        let spec = self.spec(shape)?;
        let expected = |what, expected, got| {
            if expected == got {
                Ok(())
            } else {
                Err(bitnet_core::Error::Length {
                    what,
                    expected,
                    got,
                })
            }
        };
        expected("weights", spec.weights_len(), w.len())?;
        expected("scales", spec.scales_len(), learned.len())?;
        let kernels = self.runtime.machine.kernels;
        for x in [w, learned]
            .into_iter()
            .filter(|x| !kernels.magnitudes(x).sum.is_finite())
        {
            if let Some(index) = x.iter().position(|x| !x.is_finite()) {
                return Err(bitnet_core::Error::NotFinite {
                    index,
                    value: x[index],
                }
                .into());
            }
        }
        let storage = self.scheme.scale_storage();
        let step = |&scale: &f32| storage.round(f64::from(scale.max(LEAST_SCALE) / self.unit()));
        let scales = learned.iter().map(step).collect::<Result<Vec<_>, _>>()?;
        let mut values = vec![0i8; w.len()];
        let width = spec.granule_cols();
        values
            .par_chunks_mut(spec.cols)
            .zip(w.par_chunks(spec.cols))
            .enumerate()
            .for_each(|(row, (values, w))| {
                for (i, (q, w)) in values.chunks_mut(width).zip(w.chunks(width)).enumerate() {
                    let scale = scales[spec.scale_index(0, row, i * width)];
                    match (self.scheme.method, self.estimator) {
                        (Method::Ternary { .. }, _) => {
                            kernels.encode_cut(w, Cuts::rounding(scale, self.scheme.rounding), q)
                        }
                        (Method::Binary { .. }, _) => q
                            .iter_mut()
                            .zip(w)
                            .for_each(|(q, &w)| *q = if w >= 0.0 { 1 } else { -1 }),
                        (Method::Int { .. }, StraightThroughEstimator::Stretched) => {
                            let far = 2.0 * scale;
                            q.iter_mut().zip(w).for_each(|(q, &w)| {
                                *q = 2
                                    * (i8::from(w > far) + i8::from(w >= 0.0) + i8::from(w > -far))
                                    - 3
                            });
                        }
                        (Method::Int { .. }, _) => {
                            let (low, high) = spec.precision.range();
                            kernels.encode_uniform(
                                w,
                                &Uniform {
                                    scale,
                                    zero: 0.0,
                                    low,
                                    high,
                                    rounding: self.scheme.rounding,
                                },
                                q,
                            );
                        }
                    }
                }
            });
        Ok(Matrix {
            spec,
            values,
            scales,
            zero_points: vec![],
        })
    }

    /// ∂L/∂w in place of ∂L/∂ŵ, both `[N, K]`, for `w + λ·(ŵ − w)`; ∂L/∂scale where scales are
    /// learned.
    pub(super) fn surrogate(
        &self,
        w: &[f32],
        codes: &Codes,
        lambda: f32,
        learned: bool,
        grad: &mut [f32],
    ) -> Result<Option<Vec<f32>>> {
        if self.estimator == StraightThroughEstimator::Plain {
            return Ok(None);
        }
        let spec = codes.spec();
        let (cols, width, granules) = (
            spec.cols.max(1),
            spec.granule_cols(),
            spec.granules_per_row(),
        );
        let values = if learned {
            codes.values(&self.runtime)?
        } else {
            Cow::Borrowed(&[][..])
        };
        let mut of_scales = vec![0f64; if learned { spec.rows * granules } else { 0 }];
        let row = |row: usize, w: &[f32], grad: &mut [f32], of_scales: &mut [f64]| {
            for (i, (grad, w)) in grad.chunks_mut(width).zip(w.chunks(width)).enumerate() {
                let index = spec.scale_index(0, row, i * width);
                let (step, slope) = self.slope(codes, index);
                if step == 0.0 {
                    // A granule of zeros has no range: the identity.
                    continue;
                }
                if let (Some(sum), Slope::Range(from, to)) = (of_scales.get_mut(i), slope) {
                    let (of_values, of_weights) = scale_sums(
                        grad,
                        w,
                        &values[row * cols + i * width..][..w.len()],
                        (from, to),
                    );
                    let inside = if spec.precision == Precision::Binary {
                        0.0
                    } else {
                        of_weights / f64::from(step)
                    };
                    *sum = f64::from(lambda) * (of_values - inside) / f64::from(self.unit());
                }
                match slope {
                    Slope::Range(from, to) => {
                        let outside = 1.0 - lambda;
                        grad.iter_mut().zip(w).for_each(|(g, &w)| {
                            *g *= if from <= w && w <= to { 1.0 } else { outside }
                        });
                    }
                    Slope::Soft(stairs) => grad
                        .iter_mut()
                        .zip(w)
                        .for_each(|(g, &w)| *g *= 1.0 - lambda + lambda * stairs.slope(w)),
                }
            }
        };
        if learned {
            let rows = grad
                .par_chunks_mut(cols)
                .zip(w.par_chunks(cols))
                .zip(of_scales.par_chunks_mut(granules));
            self.runtime.install(|| {
                rows.enumerate()
                    .for_each(|(r, ((grad, w), sums))| row(r, w, grad, sums))
            });
        } else {
            let rows = grad.par_chunks_mut(cols).zip(w.par_chunks(cols));
            self.runtime.install(|| {
                rows.enumerate()
                    .for_each(|(r, (grad, w))| row(r, w, grad, &mut []))
            });
        }
        Ok(learned.then(|| {
            let tensor = spec.granularity == Granularity::Tensor;
            let sums = if tensor {
                vec![of_scales.iter().sum()]
            } else {
                of_scales
            };
            let qp = f64::from(self.scheme.precision().map_or(1, |p| p.range().1));
            let scaled = |(i, sum): (usize, f64)| {
                let n = if tensor {
                    spec.weights_len()
                } else {
                    width.min(spec.cols - i % granules * width)
                };
                (sum / (n as f64 * qp).sqrt()) as f32
            };
            sums.into_iter().enumerate().map(scaled).collect()
        }))
    }

    /// Step between two values of the granule whose scale is at `index`, and its slope.
    fn slope(&self, codes: &Codes, index: usize) -> (f32, Slope) {
        let (spec, scales) = (codes.spec(), codes.scales());
        let step = (0..spec.planes)
            .map(|plane| scales[plane * (scales.len() / spec.planes) + index])
            .sum::<f32>();
        let zero = codes.zero_point(index);
        let (low, high) = spec.precision.range();
        let (low, high) = (f32::from(low) - zero, f32::from(high) - zero);
        let slope = match self.estimator {
            StraightThroughEstimator::Plain => Slope::Range(f32::NEG_INFINITY, f32::INFINITY),
            StraightThroughEstimator::Clipped { range } => {
                Slope::Range(range * low * step, range * high * step)
            }
            StraightThroughEstimator::LearnedScale => {
                Slope::Range((low * step).next_up(), (high * step).next_down())
            }
            StraightThroughEstimator::Stretched => Slope::Range(
                (-self.unit() * step).next_up(),
                (self.unit() * step).next_down(),
            ),
            StraightThroughEstimator::Soft { temperature } => {
                let half = if spec.precision == Precision::Binary {
                    1.0
                } else {
                    0.5
                };
                Slope::Soft(Staircase {
                    step,
                    low,
                    high,
                    half,
                    temperature,
                })
            }
        };
        (step, slope)
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
        self.scales()
            .iter()
            .map(|s| f64::from(s.abs()))
            .sum::<f64>()
            / self.scales().len().max(1) as f64
    }

    fn zero_point(&self, index: usize) -> f32 {
        match self {
            Self::Values(Matrix {
                zero_points,
                spec:
                    MatrixSpec {
                        zero_points: ZeroPoints::I8 | ZeroPoints::F32,
                        ..
                    },
                ..
            }) => zero_points[index],
            _ => 0.0,
        }
    }

    /// In the layout of the kernels.
    pub(super) fn prepack(&self, runtime: &Runtime) -> Result<Packed> {
        match self {
            Self::TwoBit(packed) => {
                Packed::from_wire(packed, pack::plain(Precision::Ternary), runtime)
            }
            Self::Values(matrix) => Packed::new(matrix, runtime),
        }
    }

    /// Ŵ, `[N, K]`.
    pub(super) fn dequantize(&self, runtime: &Runtime) -> Result<Vec<f32>> {
        let spec = self.spec();
        let mut out = vec![0.0; spec.weights_len()];
        match self {
            Self::TwoBit(packed) => {
                let (layout, kernels) = (pack::plain(Precision::Ternary), runtime.machine.kernels);
                stream::dequantize(
                    kernels,
                    &runtime.pool,
                    layout,
                    spec,
                    &packed.bytes,
                    &packed.scales,
                    &mut out,
                )?;
            }
            Self::Values(matrix) => runtime.install(|| {
                let rows = out.par_chunks_mut(spec.cols.max(1)).enumerate();
                rows.for_each(|(row, out)| matrix.dequantize_row_into(row, out));
            }),
        }
        Ok(out)
    }

    /// `beta·Σ of the weights whose value is 0` of each row.
    pub(super) fn sums_of_zeros(
        &self,
        w: &[f32],
        beta: f32,
        runtime: &Runtime,
    ) -> Result<Vec<f32>> {
        let (values, cols) = (self.values(runtime)?, self.spec().cols.max(1));
        let row = |(w, q): (&[f32], &[i8])| {
            w.iter()
                .zip(q)
                .map(|(&w, &q)| if q == 0 { f64::from(w) } else { 0.0 })
                .sum::<f64>()
        };
        Ok(w.chunks(cols)
            .zip(values.chunks(cols))
            .map(|part| (f64::from(beta) * row(part)) as f32)
            .collect())
    }

    /// Adds `beta·of_rows[n]` to the elements of row n, where the value is 0.
    pub(super) fn add_to_zeros(
        &self,
        of_rows: &[f32],
        beta: f32,
        runtime: &Runtime,
        out: &mut [f32],
    ) -> Result<()> {
        let (values, cols) = (self.values(runtime)?, self.spec().cols.max(1));
        for ((out, q), of_row) in out.chunks_mut(cols).zip(values.chunks(cols)).zip(of_rows) {
            out.iter_mut()
                .zip(q)
                .for_each(|(out, &q)| *out += if q == 0 { beta * of_row } else { 0.0 });
        }
        Ok(())
    }

    fn values(&self, runtime: &Runtime) -> Result<Cow<'_, [i8]>> {
        match self {
            Self::Values(matrix) => Ok(Cow::Borrowed(&matrix.values)),
            Self::TwoBit(stream::Packed { spec, bytes, .. }) => {
                let mut values = vec![0; spec.values_len()];
                stream::unpack(
                    runtime.machine.kernels,
                    &runtime.pool,
                    pack::plain(Precision::Ternary),
                    spec,
                    bytes,
                    &mut values,
                )?;
                Ok(Cow::Owned(values))
            }
        }
    }

    /// Values, one byte each.
    pub(super) fn into_matrix(self, runtime: &Runtime) -> Result<Matrix> {
        match self {
            Self::Values(matrix) => Ok(matrix),
            Self::TwoBit(_) => {
                let values = self.values(runtime)?.into_owned();
                Ok(Matrix {
                    spec: self.spec().clone(),
                    values,
                    scales: self.scales().to_vec(),
                    zero_points: vec![],
                })
            }
        }
    }
}
