//! The one place that rounds latent weights.
//!
//! ```text
//! forwards    ŵ = s·(q − z),   q = the scheme's value of w
//! backwards   ∂L/∂w = ∂L/∂ŵ · m(w/s),   m as the estimator says (slope.rs)
//! ```

use super::codes::WeightCodes;
use super::estimator::StraightThroughEstimator;
use crate::tensor::runtime::Runtime;
use crate::{Error, Result};
use bitnet_checkpoint::matrix;
use bitnet_core::ops::{Cuts, Ops, Uniform};
use bitnet_core::scheme::{BinarySplit, Mapping, Method, Scheme};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, pack};
use bitnet_kernels::stream;
use rayon::prelude::*;
use std::sync::Arc;

/// Lower bound of learned scales: a scale stays positive whatever its gradient.
pub(crate) const LEAST_SCALE: f32 = 1e-8;

/// How a layer rounds its weights.
#[derive(Debug, Clone)]
pub(crate) struct WeightRounding {
    pub(crate) scheme: Scheme,
    pub(crate) estimator: StraightThroughEstimator,
    pub(crate) runtime: Arc<Runtime>,
}

impl WeightRounding {
    /// Rejects a scheme and an estimator that do not go together.
    pub(crate) fn new(
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

    /// The spec of the matrix that [`WeightRounding::encode`] returns.
    fn spec(&self, (rows, cols): (usize, usize)) -> Result<MatrixSpec> {
        Ok(MatrixSpec {
            precision: self.levels()?,
            ..self.scheme.spec(rows, cols)?
        })
    }

    /// The alphabet of the values: that of the scheme, except for four stretched levels.
    pub(crate) fn levels(&self) -> Result<Precision> {
        match self.scheme.precision()? {
            Precision::Int2 if self.estimator == StraightThroughEstimator::Stretched => {
                Ok(Precision::Int3)
            }
            other => Ok(other),
        }
    }

    /// The learned variable divided by the step between two values.
    pub(crate) fn unit(&self) -> f32 {
        match (self.estimator, self.scheme.method) {
            (StraightThroughEstimator::Stretched, Method::Ternary { .. }) => 1.5,
            (StraightThroughEstimator::Stretched, Method::Int { .. }) => 4.0,
            _ => 1.0,
        }
    }

    /// First values of learned scales: for ternary and binary the scale of the scheme, for integers
    /// the multiple of `mean|W|` with the least squared error on normally distributed weights.
    pub(crate) fn initial_scales(&self, w: &[f32], shape: (usize, usize)) -> Result<Vec<f32>> {
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

    /// Quantizes weights `[N, K]` by the scheme, or with learned scales.
    pub(crate) fn encode(
        &self,
        w: &[f32],
        shape: (usize, usize),
        learned: Option<&[f32]>,
    ) -> Result<WeightCodes> {
        let (kernels, pool) = (self.runtime.machine.kernels, &self.runtime.pool);
        if let Some(learned) = learned {
            let matrix = self.matrix(w, shape, Some(learned))?;
            if matrix.spec.precision != Precision::Ternary {
                return Ok(WeightCodes::Values(matrix));
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
            return Ok(WeightCodes::TwoBit(stream::PackedMatrix {
                spec,
                bytes,
                scales,
                zero_points,
            }));
        }
        if let Method::Ternary { planes: 1, .. } = self.scheme.method {
            let layout = pack::plain(Precision::Ternary);
            return Ok(WeightCodes::TwoBit(stream::quantize(
                kernels,
                pool,
                stream::FloatWeights::F32(w),
                shape.0,
                shape.1,
                &self.scheme,
                layout,
            )?));
        }
        Ok(WeightCodes::Values(self.matrix(w, shape, None)?))
    }

    /// The values of [`WeightRounding::encode`], a byte each.
    pub(crate) fn matrix(
        &self,
        w: &[f32],
        shape: (usize, usize),
        learned: Option<&[f32]>,
    ) -> Result<Matrix> {
        let kernels = self.runtime.machine.kernels;
        self.runtime.install(|| match learned {
            Some(learned) => self.encode_learned(w, shape, learned),
            None => Ok(matrix::quantize(kernels, w, shape, &self.scheme, None)?),
        })
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
}
