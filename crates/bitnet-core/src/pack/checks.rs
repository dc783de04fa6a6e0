//! Checks that layouts share, and their errors.

use crate::{Error, MatrixSpec, Precision, Result, ScaleDtype, ZeroPoints};

/// An invalid pattern in a part of the packed bytes.
#[derive(Debug, PartialEq)]
pub(super) struct Bad {
    /// Offset into the part.
    pub(super) offset: usize,
    pub(super) what: String,
}

impl Bad {
    pub(super) fn new(offset: usize, what: impl Into<String>) -> Self {
        Self {
            offset,
            what: what.into(),
        }
    }

    /// The error, for a part that begins at `start` of the packed bytes.
    pub(super) fn at(self, layout: &'static str, start: usize) -> Error {
        Error::Corrupt {
            layout,
            offset: start + self.offset,
            what: self.what,
        }
    }
}

pub(super) fn unsupported(layout: &'static str, why: impl Into<String>) -> Error {
    Error::Unsupported {
        layout,
        why: why.into(),
    }
}

/// Every layout needs a valid spec of bounded size, in one of the layout's precisions.
pub(super) fn check_precision(
    layout: &'static str,
    spec: &MatrixSpec,
    precisions: &[Precision],
) -> Result<()> {
    spec.validate()?;
    // A matrix without columns may still have any number of rows, and the reverse; products with
    // either must not overflow.
    let limit = isize::MAX as usize / 64;
    if spec.rows > limit || spec.cols > limit {
        return Err(Error::TooLarge {
            rows: spec.rows,
            cols: spec.cols,
        });
    }
    if precisions.contains(&spec.precision) {
        return Ok(());
    }
    let names = precisions
        .iter()
        .map(|p| p.name())
        .collect::<Vec<_>>()
        .join(", ");
    Err(unsupported(
        layout,
        format!("it holds {names} and the matrix is {}", spec.precision),
    ))
}

/// Foreign layouts hold neither a second plane nor zero points.
pub(super) fn check_plain(layout: &'static str, spec: &MatrixSpec) -> Result<()> {
    if spec.planes != 1 {
        return Err(unsupported(
            layout,
            format!("it holds 1 plane and the matrix has {}", spec.planes),
        ));
    }
    if spec.zero_points != ZeroPoints::None {
        return Err(unsupported(
            layout,
            format!(
                "it has no zero points and the matrix has {:?} ones",
                spec.zero_points
            ),
        ));
    }
    Ok(())
}

/// `K % block = 0`.
pub(super) fn check_cols(layout: &'static str, spec: &MatrixSpec, block: usize) -> Result<()> {
    if spec.cols.is_multiple_of(block) {
        return Ok(());
    }
    Err(unsupported(
        layout,
        format!(
            "rows are cut into blocks of {block} and {} columns leave {}",
            spec.cols,
            spec.cols % block
        ),
    ))
}

/// Checks the number of values, and that each is in the alphabet.
pub(super) fn check_values(spec: &MatrixSpec, values: &[i8]) -> Result<()> {
    check_len("values", spec.values_len(), values.len())?;
    match first_outside(spec.precision, values) {
        None => Ok(()),
        Some(index) => Err(Error::Value {
            index,
            got: i32::from(values[index]),
            expected: spec.precision.alphabet(),
        }),
    }
}

/// The first value outside the alphabet.
pub(super) fn first_outside(precision: Precision, values: &[i8]) -> Option<usize> {
    // One pass without branches; the search runs only if the pass found something.
    let (low, high) = precision.range();
    let bad = match precision {
        Precision::Int8 => 0,
        Precision::Binary => values
            .iter()
            .fold(0u8, |bad, &v| bad | u8::from((v != 1) & (v != -1))),
        _ => values
            .iter()
            .fold(0u8, |bad, &v| bad | u8::from((v < low) | (v > high))),
    };
    if bad == 0 {
        None
    } else {
        values.iter().position(|&v| !precision.contains(v))
    }
}

/// Checks the number of scales, and that each is a finite number of its type.
pub(super) fn check_scales(
    layout: &'static str,
    spec: &MatrixSpec,
    dtype: ScaleDtype,
    scales: &[f32],
) -> Result<()> {
    check_len("scales", spec.scales_len(), scales.len())?;
    match scales.iter().position(|&s| !is_stored(dtype, s)) {
        None => Ok(()),
        Some(i) => Err(unsupported(
            layout,
            format!("scale {i} is {:?}, which is no finite {dtype}", scales[i]),
        )),
    }
}

/// Whether the number is finite and exactly representable in the type.
pub(super) fn is_stored(dtype: ScaleDtype, scale: f32) -> bool {
    scale.is_finite() && dtype.round(scale).to_bits() == scale.to_bits()
}

pub(super) fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
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
