//! From weights to a [`Matrix`]: fit the parameters of each granule, then encode with them.

use crate::granule::{Granule, Importance};
use crate::levels::{MAX_PLANES, PlaneLevels};
use crate::ops::{Cuts, Magnitudes, Moments, Ops};
use crate::scheme::{Method, ScaleRule, Scheme, Threshold};
use crate::{
    Error, Granularity, Matrix, MatrixSpec, Result, ScaleForm, ZeroPoints, affine, binary, planes,
    ternary,
};

use crate::fitted::Encoder;
pub use crate::fitted::Fitted;

/// Chooses the parameters of one granule.
///
/// # Errors
/// [`Error::NotFinite`] with the position inside the granule, [`Error::Scheme`] for a scheme or an
/// importance that does not apply, and the granule's own errors when it cannot be read.
pub fn fit<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    scheme: &Scheme,
    importance: Option<Importance<'_>>,
) -> Result<Fitted, G::Error> {
    if let Method::Ternary { planes: 1, .. } = scheme.method {
        let sizes = granule.fold(|_, w| ops.magnitudes(w), Magnitudes::merge)?;
        return fit_trits(ops, granule, &sizes, scheme, importance);
    }
    let moments = granule.fold(|_, w| ops.moments(w), Moments::merge)?;
    if !moments.finite {
        return not_finite(granule);
    }
    if moments.max_abs() == 0.0 {
        return Ok(dead(scheme)?);
    }
    let storage = scheme.scale_storage();
    let fitted = match scheme.method {
        Method::Ternary { planes, .. } => {
            planes::fit(ops, granule, &moments, planes, storage, importance)
        }
        Method::Binary { split, stochastic } => binary::fit(
            ops,
            granule,
            &moments,
            (split, stochastic),
            storage,
            importance,
        ),
        Method::Int { mapping, clip, .. } => {
            let kind = (scheme.precision()?, mapping, clip);
            affine::fit(
                ops,
                granule,
                &moments,
                kind,
                (storage, scheme.rounding),
                importance,
            )
        }
    }?;
    // The scale is 0 once rounded to its type: a reader would see zeros, so zeros are written.
    Ok(if fitted.scales[0] == 0.0 {
        dead(scheme)?
    } else {
        fitted
    })
}

/// [`fit`] for a scheme of one trit plane and a granule whose magnitudes are known.
///
/// # Errors
/// As [`fit`]; [`Error::Scheme`] for any other scheme.
pub fn fit_trits<G: Granule + ?Sized>(
    ops: &impl Ops,
    granule: &G,
    sizes: &Magnitudes,
    scheme: &Scheme,
    importance: Option<Importance<'_>>,
) -> Result<Fitted, G::Error> {
    let Method::Ternary {
        planes: 1,
        threshold,
        scale,
    } = scheme.method
    else {
        return Err(Error::Scheme(format!(
            "a scheme of one trit plane is needed, not {:?}",
            scheme.method
        ))
        .into());
    };
    if !sizes.sum.is_finite() {
        return not_finite(granule);
    }
    if sizes.max == 0.0 {
        return Ok(dead(scheme)?);
    }
    let fitted = ternary::fit(
        ops,
        granule,
        sizes,
        (threshold, scale),
        scheme.scale_storage(),
        scheme.rounding,
        importance,
    )?;
    Ok(if fitted.scales[0] == 0.0 {
        dead(scheme)?
    } else {
        fitted
    })
}

/// [`fit_trits`] from `sizes` alone: absmean of weights that are finite and not ternary already.
/// `None` where that needs another pass over the weights.
#[inline]
pub fn fit_absmean(sizes: &Magnitudes, scheme: &Scheme) -> Option<(f32, Cuts)> {
    let Method::Ternary {
        planes: 1,
        threshold: Threshold::Absmean,
        scale: ScaleRule::Rule,
    } = scheme.method
    else {
        return None;
    };
    if !sizes.sum.is_finite() || sizes.ternary {
        return None;
    }
    ternary::absmean(sizes.mean(), scheme.scale_storage(), scheme.rounding)
        .ok()
        .filter(|(scale, _)| *scale != 0.0)
}

/// The error that names the first weight that is NaN or infinite.
fn not_finite<T, G: Granule + ?Sized>(granule: &G) -> Result<T, G::Error> {
    let first = granule.fold(
        |offset, w| {
            w.iter()
                .position(|w| !w.is_finite())
                .map(|i| (offset + i, w[i]))
        },
        |a, b| a.or(b),
    )?;
    let (index, value) = first.unwrap_or((0, f32::NAN));
    Err(Error::NotFinite { index, value }.into())
}

/// A granule of zeros.
fn dead(scheme: &Scheme) -> Result<Fitted> {
    let encoder = match scheme.method {
        Method::Ternary { planes, .. } if planes > 1 => Encoder::Levels(PlaneLevels::ZERO),
        Method::Binary { .. } => Encoder::Constant(1),
        _ => Encoder::Constant(0),
    };
    let scale = match scheme.scale_form {
        ScaleForm::Direct => 0.0,
        ScaleForm::Inverse => scheme.scale_storage().round(0.0)?,
    };
    Ok(Fitted::one(scale, encoder))
}

/// Checks the length of a slice.
fn check_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            expected,
            got,
        })
    }
}

/// The zero points of a matrix, all 0; empty if it has none.
fn empty_zero_points(spec: &MatrixSpec) -> Vec<f32> {
    match spec.zero_points {
        ZeroPoints::None => vec![],
        ZeroPoints::I8 | ZeroPoints::F32 => vec![0.0; spec.scales_len()],
    }
}

/// Quantizes a strip of rows, `weights` of shape `[weights.len() / cols, cols]`, whose first row is
/// row `first_row` of the matrix.
///
/// With [`Granularity::Tensor`] the parameters come from `fitted`, because they belong to the whole
/// matrix; otherwise each granule of the strip gets its own and `fitted` must be `None`. The strips
/// of a matrix, one after another, are the quantized matrix, plane by plane.
///
/// # Errors
/// [`Error::Length`] for a strip that is not whole rows or an importance that is not `cols` long,
/// [`Error::NotFinite`] with the position in the whole matrix, [`Error::Scheme`] for a scheme that
/// does not exist.
pub fn quantize_rows(
    ops: &impl Ops,
    weights: &[f32],
    cols: usize,
    first_row: usize,
    scheme: &Scheme,
    fitted: Option<&Fitted>,
    importance: Option<&[f32]>,
) -> Result<Matrix> {
    if cols == 0 || !weights.len().is_multiple_of(cols) {
        return Err(Error::Length {
            what: "weights",
            expected: weights.len().next_multiple_of(cols.max(1)),
            got: weights.len(),
        });
    }
    if let Some(h) = importance {
        check_length("importance", cols, h.len())?;
    }
    if fitted.is_some() != (scheme.granularity == Granularity::Tensor) {
        return Err(Error::Scheme(
            "parameters of the whole matrix go with granularity tensor, and with no other".into(),
        ));
    }
    let importance = importance.map(Importance::new).transpose()?;
    let spec = scheme.spec(weights.len() / cols, cols)?;
    let mut values = vec![0i8; spec.values_len()];
    let mut scales = vec![0.0; spec.scales_len()];
    let mut zero_points = empty_zero_points(&spec);
    let mut planes: Vec<&mut [i8]> = if weights.is_empty() {
        vec![]
    } else {
        values.chunks_mut(weights.len()).collect()
    };
    let width = spec.granule_cols();
    for (row, weights) in weights.chunks(cols).enumerate() {
        for (column, w) in (0..).step_by(width).zip(weights.chunks(width)) {
            // Where the granule begins in the strip and in the matrix.
            let (start, index) = (row * cols + column, (first_row + row) * cols + column);
            let part = importance.and_then(|h| h.columns(column, w.len()));
            let fitted = match fitted {
                Some(fitted) => *fitted,
                None => fit(ops, w, scheme, part).map_err(|e| moved(e, index))?,
            };
            let mut out: [&mut [i8]; MAX_PLANES] = Default::default();
            for (out, plane) in out.iter_mut().zip(&mut planes) {
                *out = &mut plane[start..start + w.len()];
            }
            fitted.encode(ops, w, index, &mut out[..spec.planes]);
            for plane in 0..spec.planes {
                scales[spec.scale_index(plane, row, column)] = fitted.scales[plane];
            }
            if let Some(zero) = zero_points.get_mut(spec.scale_index(0, row, column)) {
                *zero = fitted.zero_point;
            }
        }
    }
    Ok(Matrix {
        spec,
        values,
        scales,
        zero_points,
    })
}

/// An error about a granule that begins at weight `start` of the matrix.
fn moved(error: Error, start: usize) -> Error {
    match error {
        Error::NotFinite { index, value } => Error::NotFinite {
            index: start + index,
            value,
        },
        other => other,
    }
}

/// Quantizes a matrix in memory, `weights` of shape `[rows, cols]`.
///
/// `importance`, one non-negative number for each column, weighs the squared error. The optimal
/// threshold, trit planes, the optimal binary split and the clip search use it; with other rules it
/// is an error.
///
/// # Errors
/// As [`quantize_rows`].
pub fn quantize(
    ops: &impl Ops,
    weights: &[f32],
    rows: usize,
    cols: usize,
    scheme: &Scheme,
    importance: Option<&[f32]>,
) -> Result<Matrix> {
    let spec = scheme.spec(rows, cols)?;
    check_length("weights", spec.weights_len(), weights.len())?;
    if weights.is_empty() {
        return Ok(Matrix {
            values: vec![],
            scales: vec![0.0; spec.scales_len()],
            zero_points: empty_zero_points(&spec),
            spec,
        });
    }
    if scheme.granularity != Granularity::Tensor {
        return quantize_rows(ops, weights, cols, 0, scheme, None, importance);
    }
    if let Some(h) = importance {
        check_length("importance", cols, h.len())?;
    }
    let importance = importance.map(Importance::new).transpose()?;
    let fitted = fit(ops, weights, scheme, importance)?;
    quantize_rows(ops, weights, cols, 0, scheme, Some(&fitted), None)
}
