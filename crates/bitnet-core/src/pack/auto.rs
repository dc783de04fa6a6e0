//! Choosing the smallest layout.

use super::{Layout, PackedLen, own};
use crate::{MatrixSpec, Result};

/// The shortest of our own layouts for this matrix, and the packed bytes.
///
/// Layouts of fixed length are compared by that length without packing; the others are packed and
/// measured. Among equally short ones the first of [`layouts`](super::layouts) wins. `scales` are
/// not stored: our own layouts leave them to the container.
///
/// # Errors
/// As [`Layout::pack_into`].
///
/// ```
/// use bitnet_core::{Granularity, MatrixSpec, Precision, pack};
/// let spec = MatrixSpec::new(2, 3, Precision::Ternary, Granularity::Tensor);
/// let (layout, bytes) = pack::auto(&spec, &[1, 0, -1, 0, 0, 1], &[0.5])?;
/// assert_eq!((layout.name(), bytes.len()), ("two-bit", 2));
/// # Ok::<(), bitnet_core::Error>(())
/// ```
pub fn auto(
    spec: &MatrixSpec,
    values: &[i8],
    scales: &[f32],
) -> Result<(&'static dyn Layout, Vec<u8>)> {
    spec.validate()?;
    let mut best: Option<(usize, &'static dyn Layout, Option<Vec<u8>>)> = None;
    // `i8` holds every precision, so its error explains a matrix that no layout holds.
    let mut refusal = None;
    for layout in own() {
        if let Err(e) = layout.check(spec) {
            refusal = Some(e);
            continue;
        }
        let (len, bytes) = match layout.packed_len(spec) {
            PackedLen::Exact(n) => (n, None),
            PackedLen::AtMost(_) => {
                let mut bytes = Vec::new();
                layout.pack_into(spec, values, scales, &mut bytes)?;
                (bytes.len(), Some(bytes))
            }
        };
        if best.as_ref().is_none_or(|(shortest, ..)| len < *shortest) {
            best = Some((len, layout, bytes));
        }
    }
    match (best, refusal) {
        (Some((_, layout, Some(bytes))), _) => Ok((layout, bytes)),
        (Some((len, layout, None)), _) => {
            let mut bytes = Vec::with_capacity(len);
            layout.pack_into(spec, values, scales, &mut bytes)?;
            Ok((layout, bytes))
        }
        (None, Some(e)) => Err(e),
        (None, None) => unreachable!("there are layouts of our own"),
    }
}

/// Bits per weight, everything that is stored counted: `8 · (packed + scale bytes) / (N · K)`; 0
/// for a matrix without weights.
///
/// `scale_bytes` counts scales outside the packed bytes. All planes count, since they belong to the
/// same weights.
pub fn bits_per_weight(packed_bytes: usize, scale_bytes: usize, spec: &MatrixSpec) -> f64 {
    match spec.weights_len() {
        0 => 0.0,
        weights => 8.0 * (packed_bytes as f64 + scale_bytes as f64) / weights as f64,
    }
}
