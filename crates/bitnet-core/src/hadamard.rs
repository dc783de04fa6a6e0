//! The rotation of weights in a rotated basis: a Walsh–Hadamard transform in blocks, with signs.
//!
//! ```text
//! H[i][j] = (−1)^popcount(i & j) / √block       Sylvester's matrix in natural order: H = Hᵀ = H⁻¹
//! rotate:    x ← H · (s ⊙ x)                    each block of the row by itself; s of ±1
//! unrotate:  x ← s ⊙ (H · x)                    its inverse
//! ```
//!
//! A matrix W of such a model is stored as W' = W · diag(s) · H, so that W' · rotate(x) = W · x:
//! its rows are those of W, rotated. The loops here are the definition of the bits:
//! `bitnet-kernels` has the same sums in vectors.

use crate::{Error, Result};
use std::sync::Arc;

/// Blocks and signs of a rotation of rows of a fixed width.
///
/// ```
/// use bitnet_core::hadamard::Hadamard;
/// let rotation = Hadamard::new(4, 4, Some(&[1, -1, 1, 1]))?;
/// let mut row = [1.0, 2.0, 3.0, 4.0];
/// rotation.rotate(&mut row);
/// assert_eq!(row, [3.0, 1.0, -4.0, 2.0]);
/// rotation.unrotate(&mut row);
/// assert_eq!(row, [1.0, 2.0, 3.0, 4.0]);
/// # Ok::<(), bitnet_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Hadamard {
    width: usize,
    block: usize,
    /// ±1 for each column; none if all are 1.
    signs: Option<Arc<[f32]>>,
}

impl PartialEq for Hadamard {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.signs, &other.signs) {
            // Clones share their signs: comparing two of them looks at none.
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
            (a, b) => a.is_none() && b.is_none(),
        };
        same && (self.width, self.block) == (other.width, other.block)
    }
}

impl Hadamard {
    /// A rotation of rows of `width` columns, with a sign of ±1 for each column.
    ///
    /// # Errors
    /// [`Error::Rotation`] for a block that is no power of two or does not divide the width, and
    /// for signs of another number or value.
    pub fn new(width: usize, block: usize, signs: Option<&[i8]>) -> Result<Self> {
        if !block.is_power_of_two() {
            let why = format!("a block of {block} columns is no power of two");
            return Err(Error::Rotation(why));
        }
        if width == 0 || !width.is_multiple_of(block) {
            let why = format!("blocks of {block} do not divide {width} columns");
            return Err(Error::Rotation(why));
        }
        if let Some(signs) = signs {
            if signs.len() != width {
                let why = format!("{} signs for {width} columns", signs.len());
                return Err(Error::Rotation(why));
            }
            if let Some(at) = signs.iter().position(|s| s.unsigned_abs() != 1) {
                let why = format!("sign {at} is {}, and only 1 and -1 are signs", signs[at]);
                return Err(Error::Rotation(why));
            }
        }
        Ok(Self {
            width,
            block,
            signs: signs.map(|signs| signs.iter().map(|&s| f32::from(s)).collect()),
        })
    }

    /// Columns of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Columns of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// ±1 for each column; none if all are 1.
    pub fn signs(&self) -> Option<&[f32]> {
        self.signs.as_deref()
    }

    /// `x ← H · (s ⊙ x)` of each row of `x`.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn rotate(&self, x: &mut [f32]) {
        self.apply_signs(x);
        x.chunks_exact_mut(self.block).for_each(transform);
    }

    /// `x ← s ⊙ (H · x)` of each row of `x`.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn unrotate(&self, x: &mut [f32]) {
        self.check_rows(x);
        x.chunks_exact_mut(self.block).for_each(transform);
        self.apply_signs(x);
    }

    /// # Panics
    /// If `x` is not whole rows.
    pub fn check_rows(&self, x: &[f32]) {
        assert!(
            x.len().is_multiple_of(self.width),
            "whole rows of {} columns, got {} elements",
            self.width,
            x.len()
        );
    }

    fn apply_signs(&self, x: &mut [f32]) {
        self.check_rows(x);
        let Some(signs) = self.signs() else { return };
        for row in x.chunks_exact_mut(self.width) {
            row.iter_mut().zip(signs).for_each(|(x, s)| *x *= s);
        }
    }
}

/// `1 / √block`, rounded once; exact for powers of four.
#[inline]
pub fn normalization(block: usize) -> f32 {
    (1.0 / (block as f64).sqrt()) as f32
}

/// `x ← H · x` of one block: for h = 1, 2, 4, … the sum and the difference of each pair i, i + h,
/// then one multiplication.
fn transform(x: &mut [f32]) {
    let mut h = 1;
    while h < x.len() {
        for pairs in x.chunks_exact_mut(2 * h) {
            let (low, high) = pairs.split_at_mut(h);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        h *= 2;
    }
    let scale = normalization(x.len());
    x.iter_mut().for_each(|x| *x *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// `H · (s ⊙ x)` by the formula, in f64.
    fn by_definition(x: &[f32], block: usize, signs: Option<&[i8]>) -> Vec<f64> {
        let signed: Vec<f64> = x
            .iter()
            .enumerate()
            .map(|(i, x)| f64::from(*x) * f64::from(signs.map_or(1, |s| s[i])))
            .collect();
        let row = |i: usize| {
            let of_block = &signed[i / block * block..][..block];
            let terms = of_block.iter().enumerate().map(|(j, x)| {
                let odd = ((i % block) & j).count_ones() % 2 == 1;
                if odd { -x } else { *x }
            });
            terms.sum::<f64>() / (block as f64).sqrt()
        };
        (0..x.len()).map(row).collect()
    }

    fn random_signs(n: usize) -> Vec<i8> {
        let mut random = Random::new(5);
        (0..n).map(|_| (random.bits() % 2) as i8 * 2 - 1).collect()
    }

    #[test]
    fn the_butterflies_are_the_product_with_the_matrix() {
        let mut random = Random::new(1);
        for (width, block) in [
            (1, 1),
            (6, 2),
            (12, 4),
            (24, 8),
            (48, 16),
            (320, 64),
            (2048, 1024),
        ] {
            let signs = random_signs(width);
            for signs in [None, Some(&signs[..])] {
                let x: Vec<f32> = (0..width).map(|_| random.uniform() as f32 - 0.5).collect();
                let rotation = Hadamard::new(width, block, signs).unwrap();
                let mut rotated = x.clone();
                rotation.rotate(&mut rotated);
                let norm = x.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                for (got, expected) in rotated.iter().zip(by_definition(&x, block, signs)) {
                    let off = (f64::from(*got) - expected).abs();
                    assert!(off < 1e-6 * norm, "{width}, {block}: {got} for {expected}");
                }
                rotation.unrotate(&mut rotated);
                for (got, expected) in rotated.iter().zip(&x) {
                    assert!(f64::from((got - expected).abs()) < 1e-6 * norm);
                }
            }
        }
    }

    /// `numpy`'s product of Sylvester's matrix with s ⊙ x: no scale is left out, and no order of rows
    /// or signs is another one.
    #[test]
    fn order_signs_and_normalization_are_those_of_the_definition() {
        let signs = [1, 1, -1, 1, 1, -1, 1, 1];
        let rotation = Hadamard::new(8, 8, Some(&signs)).unwrap();
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        rotation.rotate(&mut x);
        let sums = [18.0, 2.0, -14.0, 18.0, -10.0, -18.0, 18.0, -6.0];
        for (got, sum) in x.iter().zip(sums) {
            assert_eq!(*got, sum * normalization(8));
        }
    }

    #[test]
    fn normalization_is_exact_for_powers_of_four() {
        for power in 0..8 {
            assert_eq!(normalization(1 << (2 * power)), 0.5f32.powi(power));
        }
    }

    #[test]
    fn what_is_no_rotation_is_refused() {
        for (width, block, signs, what) in [
            (12, 3, None, "power of two"),
            (12, 0, None, "power of two"),
            (12, 8, None, "do not divide 12"),
            (0, 1, None, "do not divide 0"),
            (2, 2, Some(&[1i8][..]), "1 signs for 2"),
            (2, 2, Some(&[1, 0][..]), "sign 1 is 0"),
            (2, 2, Some(&[1, i8::MIN][..]), "sign 1 is -128"),
        ] {
            let error = Hadamard::new(width, block, signs).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
