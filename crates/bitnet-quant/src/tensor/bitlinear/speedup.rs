//! How much faster a packed layer is than candle's f32 layer.

use super::BitLinear;
use crate::Result;
use crate::tensor::not_empty;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::Linear;
use std::time::{Duration, Instant};

/// Median times of forward passes on the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speedup {
    /// This layer, packed.
    pub bitlinear: Duration,
    /// candle's f32 linear layer.
    pub linear: Duration,
}

impl Speedup {
    /// How many times faster this layer is.
    pub fn factor(&self) -> f64 {
        self.linear.as_secs_f64() / self.bitlinear.as_secs_f64().max(1e-12)
    }
}

impl BitLinear {
    /// Times this layer, packed, and candle's f32 [`Linear`] with the same weights on a batch of
    /// `tokens`, alternately.
    ///
    /// # Errors
    /// As a forward pass.
    pub fn measure_speedup(&self, tokens: usize) -> Result<Speedup> {
        const REPETITIONS: usize = 9;
        let x = Tensor::randn(0f32, 1f32, (tokens, self.in_features), &Device::Cpu)?;
        not_empty(&x)?;
        let weight = Tensor::from_vec(
            self.quantized_weights()?.dequantize(),
            (self.out_features, self.in_features),
            &Device::Cpu,
        )?;
        let bias = self.bias().map(|b| b.to_dtype(DType::F32)).transpose()?;
        let linear = Linear::new(weight, bias);
        let packed = self.packed_weights()?;
        let time = |f: &dyn Fn() -> Result<Tensor>| -> Result<Duration> {
            let start = Instant::now();
            f()?;
            Ok(start.elapsed())
        };
        let (ours, theirs) = (
            || self.packed_forward(&x, &packed),
            || Ok(linear.forward(&x)?),
        );
        let mut times = [vec![], vec![]];
        for repetition in 0..=REPETITIONS {
            let pair = [time(&ours)?, time(&theirs)?];
            // The first repetition warms caches and pools.
            if repetition > 0 {
                times
                    .iter_mut()
                    .zip(pair)
                    .for_each(|(all, one)| all.push(one));
            }
        }
        let [bitlinear, linear] = times.map(|mut all| {
            all.sort_unstable();
            all[REPETITIONS / 2]
        });
        Ok(Speedup { bitlinear, linear })
    }
}
