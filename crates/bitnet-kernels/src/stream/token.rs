//! Activations of one token to int8.

use crate::kernels::Kernels;
use bitnet_core::{Error, Result};

/// Quantizes one token to int8 as [`bitnet_core::activation`] does (absmax, ties to even) and
/// returns its scale:
///
/// ```text
/// m = max(max|x|, 1e-5),   q = clip(round(x · (127 / m)), −128, 127),   scale = m / 127
/// ```
///
/// Columns are cut into groups of `group`; the last one may be shorter. Group `g` is written to
/// `out` from `g · stride` on and its `Σ q` to `sums[g]`; the elements between two groups do not
/// change. One group and `stride = x.len()` write the token without gaps.
///
/// ```
/// use bitnet_kernels::{Kernels, stream::quantize_token};
/// let (mut q, mut sums) = ([0; 5], [0; 2]);
/// let x = [1.0, -0.5, 0.25, 0.0];
/// let scale = quantize_token(Kernels::detect(), &x, 2, 3, &mut q, &mut sums)?;
/// assert_eq!((scale, q, sums), (1.0 / 127.0, [127, -64, 0, 32, 0], [63, 32]));
/// # Ok::<(), bitnet_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::NotFinite`] with the position in the token for NaN or infinity, [`Error::Length`] if
/// `out` or `sums` do not hold the groups or a group does not fit its stride. Nothing is written
/// then.
pub fn quantize_token(
    kernels: Kernels,
    x: &[f32],
    group: usize,
    stride: usize,
    out: &mut [i8],
    sums: &mut [i32],
) -> Result<f32> {
    let group = group.clamp(1, x.len().max(1));
    let groups = x.len().div_ceil(group);
    let check = |what, expected, got, fits| {
        if fits {
            Ok(())
        } else {
            Err(Error::Length {
                what,
                expected,
                got,
            })
        }
    };
    check(
        "stride of a group",
        group,
        stride,
        stride >= group || groups <= 1,
    )?;
    check("sums", groups, sums.len(), sums.len() == groups)?;
    let end = groups
        .saturating_sub(1)
        .saturating_mul(stride)
        .saturating_add(x.len() - groups.saturating_sub(1) * group);
    check("int8 activations", end, out.len(), out.len() >= end)?;
    let max = f32::from_bits(kernels.table.absmax(x));
    if !max.is_finite() {
        let index = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
        return Err(Error::NotFinite {
            index,
            value: x[index],
        });
    }
    let max = max.max(1e-5);
    for (g, (x, sum)) in x.chunks(group).zip(sums).enumerate() {
        let out = &mut out[g * stride..][..x.len()];
        *sum = kernels.table.round_to_int8(x, 127.0 / max, out);
    }
    Ok(max / 127.0)
}
