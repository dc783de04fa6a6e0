//! Rotation of activations for weights in a rotated basis: [`bitnet_core::hadamard`] in vectors.
//!
//! The sums are those of the oracle in core, pair by pair: stages h = 1 … 8 of 16 neighbours in
//! registers, then two stages in each pass over a block, which stays in the nearest cache. So every
//! instruction set gives the oracle's bits. A row of n columns takes n·log₂ block additions.

use crate::dense::lanes::{LANES, Lanes};
use crate::kernels::Kernels;
use crate::pool::Pool;
use bitnet_core::hadamard::{Hadamard, normalization};

/// Elements of whole rows that one part of a parallel rotation takes at least: some microseconds.
const PART: usize = 1 << 14;

impl Kernels {
    /// `x ← H · (s ⊙ x)` of each row of `x`: see [`Hadamard::rotate`].
    ///
    /// ```
    /// use bitnet_core::hadamard::Hadamard;
    /// let rotation = Hadamard::new(2, 2, Some(&[1, -1]))?;
    /// let mut rows = [1.0, 1.0, 3.0, 1.0];
    /// bitnet_kernels::Kernels::detect().hadamard_rotate(&rotation, &mut rows);
    /// let r = 0.5f32.sqrt();
    /// assert_eq!(rows, [0.0, 2.0 * r, 2.0 * r, 4.0 * r]);
    /// # Ok::<(), bitnet_core::Error>(())
    /// ```
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn hadamard_rotate(&self, rotation: &Hadamard, x: &mut [f32]) {
        rotation.check_rows(x);
        let signs = rotation.signs().map_or(Signs::None, Signs::Before);
        self.table.hadamard(x, rotation.block(), signs);
    }

    /// [`Kernels::hadamard_rotate`] with the rows on the threads of a pool.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn hadamard_rotate_rows(&self, pool: &Pool, rotation: &Hadamard, x: &mut [f32]) {
        rotation.check_rows(x);
        let width = rotation.width();
        let rows = PART.div_ceil(width);
        pool.for_chunks(x, rows * width, |_, x| self.hadamard_rotate(rotation, x));
    }

    /// `x ← s ⊙ (H · x)` of each row of `x`: see [`Hadamard::unrotate`].
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn hadamard_unrotate(&self, rotation: &Hadamard, x: &mut [f32]) {
        rotation.check_rows(x);
        let signs = rotation.signs().map_or(Signs::None, Signs::After);
        self.table.hadamard(x, rotation.block(), signs);
    }
}

/// When the signs of a row, of ±1 each, multiply its elements.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Signs<'a> {
    /// Never.
    None,
    /// Before the transform.
    Before(&'a [f32]),
    /// After it.
    After(&'a [f32]),
}

/// Transforms each block of `x`, whole rows of as many columns as there are signs. The block is a
/// power of two that divides both.
#[inline(always)]
pub(crate) fn transform<L: Lanes>(lanes: L, x: &mut [f32], block: usize, signs: Signs<'_>) {
    let scale = normalization(block);
    let of = |signs: &[f32], i: usize| -> std::ops::Range<usize> {
        let at = (i * block) % signs.len().max(1);
        at..at + block
    };
    for (i, x) in x.chunks_exact_mut(block.max(1)).enumerate() {
        if let Signs::Before(signs) = signs {
            times(x, &signs[of(signs, i)]);
        }
        if block < LANES {
            stages(x);
        } else {
            vector_stages(lanes, x.as_chunks_mut::<LANES>().0);
        }
        x.iter_mut().for_each(|x| *x *= scale);
        if let Signs::After(signs) = signs {
            times(x, &signs[of(signs, i)]);
        }
    }
}

/// `x ← s ⊙ x`.
#[inline(always)]
fn times(x: &mut [f32], signs: &[f32]) {
    x.iter_mut().zip(signs).for_each(|(x, s)| *x *= s);
}

/// All stages of a block that is shorter than a register.
#[inline(always)]
fn stages(x: &mut [f32]) {
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
}

/// All stages of a block of whole registers.
#[inline(always)]
fn vector_stages<L: Lanes>(lanes: L, x: &mut [[f32; LANES]]) {
    for x in x.iter_mut() {
        lanes.store(lanes.butterflies(lanes.f32(x)), x);
    }
    let mut h = 1;
    while 2 * h < x.len() {
        two_stages(x, h);
        h *= 4;
    }
    if h < x.len() {
        let (low, high) = x.split_at_mut(h);
        for (a, b) in low.iter_mut().zip(high) {
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
    }
}

/// The stages of registers that are `h` and `2·h` apart.
#[inline(always)]
fn two_stages(x: &mut [[f32; LANES]], h: usize) {
    for part in x.chunks_exact_mut(4 * h) {
        let (first, second) = part.split_at_mut(2 * h);
        let ((a, b), (c, d)) = (first.split_at_mut(h), second.split_at_mut(h));
        for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
            for i in 0..LANES {
                let (p, q) = (a[i] + b[i], a[i] - b[i]);
                let (r, s) = (c[i] + d[i], c[i] - d[i]);
                (a[i], b[i], c[i], d[i]) = (p + r, q + s, p - r, q - s);
            }
        }
    }
}
