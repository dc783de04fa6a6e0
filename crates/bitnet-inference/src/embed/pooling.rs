//! Hidden states of a text's tokens to one vector.

use bitnet_formats::arch::Pooling;

/// Takes hidden states in the order of the tokens.
#[derive(Debug)]
pub(super) struct Pool {
    pooling: Pooling,
    /// The result so far: a sum for the mean.
    values: Vec<f64>,
    tokens: usize,
}

impl Pool {
    pub(super) fn new(pooling: Pooling, dimensions: usize) -> Self {
        Self {
            pooling,
            values: vec![0.0; dimensions],
            tokens: 0,
        }
    }

    /// Adds the hidden state of the next token.
    pub(super) fn push(&mut self, state: &[f32]) {
        let first = self.tokens == 0;
        self.tokens += 1;
        for (value, x) in self.values.iter_mut().zip(state) {
            let x = f64::from(*x);
            match self.pooling {
                Pooling::Mean => *value += x,
                Pooling::Cls if first => *value = x,
                Pooling::Cls => {}
                Pooling::Last => *value = x,
                Pooling::Max => *value = if first { x } else { value.max(x) },
            }
        }
    }

    /// The vector, of length 1 if `normalize`. A vector of zeros stays.
    pub(super) fn finish(mut self, normalize: bool) -> Vec<f32> {
        if self.pooling == Pooling::Mean {
            let tokens = self.tokens as f64;
            self.values.iter_mut().for_each(|v| *v /= tokens);
        }
        let length = self.values.iter().map(|v| v * v).sum::<f64>().sqrt();
        if normalize && length > 0.0 {
            self.values.iter_mut().for_each(|v| *v /= length);
        }
        self.values.iter().map(|v| *v as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pooling_and_the_length() {
        for (pooling, plain) in [
            (Pooling::Mean, [3.0, -4.0]),
            (Pooling::Cls, [1.0, -5.0]),
            (Pooling::Last, [2.0, -6.0]),
            (Pooling::Max, [6.0, -1.0]),
        ] {
            let pooled = |normalize| {
                let mut pool = Pool::new(pooling, 2);
                [[1.0, -5.0], [6.0, -1.0], [2.0, -6.0]]
                    .iter()
                    .for_each(|x| pool.push(x));
                pool.finish(normalize)
            };
            assert_eq!(pooled(false), plain, "{pooling}");
            let length = pooled(true).iter().map(|x| x * x).sum::<f32>();
            assert!((length - 1.0).abs() < 1e-6, "{pooling}");
        }
        let mut zeros = Pool::new(Pooling::Mean, 2);
        zeros.push(&[0.0, 0.0]);
        assert_eq!(zeros.finish(true), [0.0, 0.0]);
    }
}
