//! The inputs of a matrix product that all contenders share, and the check of its result.

use crate::case::Limit;
use crate::ceiling::Ceiling;
use crate::selection::WeightShape;
use bitnet_kernels::Pool;
use bitnet_kernels::machine::Instruction;
use std::sync::Arc;

/// The scale of the weights and that of the activations.
pub(super) const SCALES: [f32; 2] = [0.02, 0.01];

/// What all contenders of a case share.
pub(super) struct ProductInputs {
    pub(super) shape: WeightShape,
    pub(super) tokens: usize,
    /// Values of the weights, `[N, K]`.
    pub(super) weights: Vec<i8>,
    /// Values of the activations, `[M, K]`.
    pub(super) activations: Vec<i8>,
    pub(super) pool: Arc<Pool>,
    /// Bytes of all copies of the weights, which the calls use in turn; 0 for one copy.
    pub(super) cycle: usize,
    /// Bytes of weights that L2 holds.
    pub(super) l2: usize,
}

impl ProductInputs {
    /// Number of copies of weights of `bytes` bytes.
    pub(super) fn copies(&self, bytes: usize) -> usize {
        self.cycle.div_ceil(bytes.max(1)).max(1)
    }

    /// The ceiling on reading weights of `bytes` bytes, if it is known.
    pub(super) fn reading(&self, bytes: usize) -> Option<Limit> {
        let ceiling = if self.cycle > 0 {
            Ceiling::MemoryRead
        } else {
            Ceiling::L2Read
        };
        (self.cycle > 0 || bytes <= self.l2).then_some(Limit {
            ceiling,
            cost: bytes as f64,
        })
    }

    /// The ceiling on multiplying with `instruction`, if it is known.
    pub(super) fn multiplying(&self, instruction: Option<Instruction>) -> Option<Limit> {
        instruction.map(|instruction| Limit {
            ceiling: Ceiling::Peak(instruction),
            cost: self.macs() as f64,
        })
    }

    /// Multiply-adds of the product.
    pub(super) fn macs(&self) -> usize {
        self.tokens * self.shape.n * self.shape.k
    }

    /// The weights in floats, `[N, K]`.
    pub(super) fn float_weights(&self) -> Vec<f32> {
        self.weights
            .iter()
            .map(|&q| SCALES[0] * f32::from(q))
            .collect()
    }

    /// The activations in floats, `[M, K]`.
    pub(super) fn float_activations(&self) -> Vec<f32> {
        self.activations
            .iter()
            .map(|&q| SCALES[1] * f32::from(q))
            .collect()
    }
}

/// Expected results of a product for some tokens, with error bounds.
pub(super) struct Reference {
    rows: usize,
    tokens: Vec<usize>,
    /// Value and error bound, `[tokens, rows]`.
    expected: Vec<(f64, f64)>,
}

impl Reference {
    /// Limit on the multiply-adds of the computation.
    const MACS: usize = 1 << 27;

    /// Calls `expected(row, token)`, which returns value and bound, for every row and up to eight
    /// tokens, including the first and the last.
    pub(super) fn new(
        product: &ProductInputs,
        expected: impl Fn(usize, usize) -> (f64, f64),
    ) -> Self {
        let rows = product.shape.n;
        let count = (Self::MACS / (rows * product.shape.k))
            .clamp(2, 8)
            .min(product.tokens);
        let tokens: Vec<_> = (0..count)
            .map(|i| i * (product.tokens - 1) / (count - 1).max(1))
            .collect();
        let expected = tokens
            .iter()
            .flat_map(|&token| (0..rows).map(move |row| (row, token)))
            .map(|(row, token)| expected(row, token));
        Self {
            rows,
            expected: expected.collect(),
            tokens,
        }
    }

    /// The product `x · w` in f64, with the bound `relative · Σ|x·w| + error · Σ|w|`, where `error`
    /// is that of each activation.
    pub(super) fn from_floats(
        product: &ProductInputs,
        weights: &[f32],
        relative: f64,
        error: f64,
    ) -> Self {
        let (k, x) = (product.shape.k, product.float_activations());
        Self::new(product, |row, token| {
            let pairs = weights[row * k..][..k]
                .iter()
                .zip(&x[token * k..][..k])
                .map(|(&w, &x)| (f64::from(w), f64::from(x)));
            let (sum, size, norm) = pairs.fold((0.0, 0.0, 0.0), |(s, a, n), (w, x)| {
                (s + w * x, a + (w * x).abs(), n + w.abs())
            });
            (sum, relative * size + error * norm)
        })
    }

    /// Checks `y`, `[M, N]`. The error names the first value outside its bound.
    pub(super) fn check(&self, y: &[f32]) -> Result<(), String> {
        for (token, expected) in self.tokens.iter().zip(self.expected.chunks(self.rows)) {
            for (row, (&got, &(value, bound))) in
                y[token * self.rows..].iter().zip(expected).enumerate()
            {
                let off = (f64::from(got) - value).abs();
                if off.is_nan() || off > bound {
                    return Err(format!(
                        "token {token}, row {row}: expected {value:.6} ± {bound:.1e}, got {got}"
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_product_is_noticed() {
        let reference = Reference {
            rows: 2,
            tokens: vec![0, 2],
            expected: vec![(1.0, 0.1), (2.0, 0.1), (3.0, 0.1), (4.0, 0.1)],
        };
        let right = [1.05, 2.0, 9.0, 9.0, 3.0, 3.95];
        assert_eq!(reference.check(&right), Ok(()));
        for (i, value) in [(0, 1.2), (1, f32::NAN), (5, -4.0)] {
            let mut wrong = right;
            wrong[i] = value;
            assert!(reference.check(&wrong).is_err(), "{value} at {i}");
        }
    }
}
