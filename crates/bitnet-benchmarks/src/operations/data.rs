//! Inputs that several operations share, and the comparison of their results.

use crate::selection::Rivals;
use bitnet_core::random::nth;
use bitnet_kernels::Kernels;
use std::fmt;

/// `n` trits, uniformly distributed.
pub(super) fn trits(n: usize) -> Vec<i8> {
    (0..n).map(|i| (nth(i as u64, 0) % 3) as i8 - 1).collect()
}

/// `n` weights distributed like those of a layer: sums of four uniform numbers, standard deviation
/// 0.02.
pub(super) fn weights(n: usize) -> Vec<f32> {
    let uniform = |bits: u64| (bits & 0xffff) as f32 / 65_535.0 - 0.5;
    let sum = |x: u64| uniform(x) + uniform(x >> 16) + uniform(x >> 32) + uniform(x >> 48);
    (0..n).map(|i| sum(nth(i as u64, 0)) * 0.034_641).collect()
}

/// Our kernels, widest first; without rivals the widest alone.
pub(super) fn kernels(rivals: Rivals) -> Vec<Kernels> {
    let mut kernels: Vec<_> = Kernels::all().collect();
    kernels.reverse();
    kernels.truncate(if rivals == Rivals::All {
        kernels.len()
    } else {
        1
    });
    kernels
}

/// Compares a result with the expected one. The error names the first difference.
pub(super) fn same<T: PartialEq + fmt::Debug>(
    what: &str,
    expected: &[T],
    got: &[T],
) -> Result<(), String> {
    if expected.len() != got.len() {
        return Err(format!(
            "{what}: expected {}, got {}",
            expected.len(),
            got.len()
        ));
    }
    match expected.iter().zip(got).position(|(e, g)| e != g) {
        None => Ok(()),
        Some(i) => Err(format!(
            "{what}: expected {:?} at {i}, got {:?}",
            expected[i], got[i]
        )),
    }
}
