//! Synthetic models: the shape of a known model with generated weights, to measure speed without
//! a download.

use crate::forward::NormGain;
use crate::linear::{KernelPool, LinearLayer, LinearWeights};
use crate::load::{FloatType, WeightProvider};
use crate::{Activation, Config, Error, Result, Rope};
use bitnet_core::random::Random;
use bitnet_core::{Granularity, MatrixSpec, Precision};
use bitnet_formats::arch::{BITNET, DecoderGraph, LLAMA};
use bitnet_kernels::dense::{
    BlockType, Blocks, DenseData, DenseMatrix, RotaryPairing, quantize_int4, quantize_int8, zeros,
};
use bitnet_kernels::matmul::Prepacked;

impl Config {
    /// The config of a known shape: `bitnet-2b-4t`, `llama3-8b`, or `tiny` (2 layers of 256).
    ///
    /// # Errors
    /// [`Error::Option`] for another name.
    pub fn shape(name: &str) -> Result<Self> {
        let config = |architecture,
                      graph,
                      activation,
                      hidden,
                      ffn,
                      layers,
                      heads,
                      kv_heads,
                      head_dim,
                      vocab,
                      context,
                      theta,
                      tied| Self {
            architecture,
            graph,
            hidden,
            ffn,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context,
            norm_eps: 1e-5,
            activation,
            rope: Rope {
                theta,
                pairing: RotaryPairing::Halves,
                divisors: None,
            },
            tied,
            attention_bias: false,
            mlp_bias: false,
            bos: None,
            eos: vec![],
        };
        use Activation::{Relu2, Silu};
        use DecoderGraph::{Bitnet, Llama};
        match name {
            "bitnet-2b-4t" => Ok(config(
                &BITNET, Bitnet, Relu2, 2560, 6912, 30, 20, 5, 128, 128_256, 4096, 5e5, true,
            )),
            "llama3-8b" => Ok(config(
                &LLAMA, Llama, Silu, 4096, 14_336, 32, 32, 8, 128, 128_256, 8192, 5e5, false,
            )),
            "tiny" => Ok(config(
                &BITNET, Bitnet, Relu2, 256, 512, 2, 4, 2, 64, 512, 512, 1e4, true,
            )),
            _ => Err(Error::Option {
                option: "shape",
                expected: "bitnet-2b-4t, llama3-8b or tiny",
                got: format!("'{name}'"),
            }),
        }
    }
}

/// Generates weights: ternary layers with 40 % zeros and a scale that keeps activations of order 1,
/// norms of ones, and a nearly normal embedding.
pub(crate) struct SyntheticWeights<'a> {
    pub(crate) config: &'a Config,
    pub(crate) runtime: &'a KernelPool,
    pub(crate) embedding: FloatType,
}

/// The random seed of a module.
fn seed(module: &str) -> u64 {
    module.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl WeightProvider for SyntheticWeights<'_> {
    fn config(&self) -> &Config {
        self.config
    }

    fn norm(&self, _: &str, len: usize) -> Result<NormGain> {
        Ok(NormGain(vec![1.0; len]))
    }

    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<LinearLayer> {
        let mut random = Random::new(seed(module));
        // Ten trits from 64 bits: thresholds on six bits each.
        let mut values = vec![0i8; rows * cols];
        for chunk in values.chunks_mut(10) {
            let mut bits = random.bits();
            for v in chunk {
                *v = i8::from(bits & 63 < 19) - i8::from(bits & 63 >= 45);
                bits >>= 6;
            }
        }
        let spec = MatrixSpec::new(rows, cols, Precision::Ternary, Granularity::Tensor);
        let matrix = bitnet_core::Matrix {
            spec,
            values,
            scales: vec![1.3 / (cols as f32).sqrt()],
            zero_points: vec![],
        };
        let packed = Prepacked::new(&matrix, &self.runtime.pool)?;
        Ok(LinearLayer {
            weights: LinearWeights::Ternary(packed),
            bias: bias.then(|| vec![0.0; rows]),
            rotation: None,
        })
    }

    fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<DenseMatrix> {
        let pool = &self.runtime.pool;
        // A sum of four uniform numbers, 16 of the 64 bits each.
        let fill = |row: usize, out: &mut [f32]| {
            let mut random = Random::new(seed(module) ^ row as u64);
            for w in out {
                let bits = random.bits();
                let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
                *w = (sum as f32 / 65536.0 - 2.0) * 0.05;
            }
        };
        let data = match self.embedding {
            FloatType::Int8 | FloatType::Int4 => {
                let int8 = self.embedding == FloatType::Int8;
                DenseData::Blocks(Blocks::new(
                    pool,
                    rows,
                    cols,
                    if int8 {
                        BlockType::INT8
                    } else {
                        BlockType::INT4
                    },
                    |first, strip| {
                        let mut floats = vec![0.0; cols];
                        for i in 0..strip.rows() {
                            fill(first + i, &mut floats);
                            let mut row = strip.row(i);
                            if int8 {
                                quantize_int8(&floats, &mut row)
                            } else {
                                quantize_int4(&floats, &mut row)
                            }
                        }
                        Ok::<(), Error>(())
                    },
                )?)
            }
            FloatType::Exact | FloatType::Bf16 => {
                let mut all = zeros::<u16>(rows * cols);
                pool.for_chunks(&mut all, cols, |row, out| {
                    let mut floats = vec![0.0; cols];
                    fill(row, &mut floats);
                    out.iter_mut()
                        .zip(&floats)
                        .for_each(|(o, w)| *o = half::bf16::from_f32(*w).to_bits());
                });
                DenseData::Bf16(all)
            }
        };
        Ok(DenseMatrix::new(rows, cols, data)?)
    }
}
