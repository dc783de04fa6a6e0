//! Synthetic models: the shape of a known model with generated weights, to measure speed without
//! a download.

use crate::experts::Expert;
use crate::forward::NormGain;
use crate::linear::{KernelPool, LinearLayer, LinearWeights};
use crate::load::{FloatType, WeightProvider, numbered_experts};
use crate::{Config, Error, Result};
use bitnet_core::random::Random;
use bitnet_core::{Granularity, MatrixSpec, Precision};
use bitnet_kernels::dense::{
    BlockType, Blocks, DenseData, DenseMatrix, quantize_int4, quantize_int8, zeros,
};
use bitnet_kernels::matmul::Prepacked;
use serde_json::{Value, json};
use std::path::Path;

impl Config {
    /// The config of a known shape: `bitnet-2b-4t`, `llama3-8b`, or `tiny` (2 layers of 256).
    ///
    /// # Errors
    /// [`Error::Option`] for another name.
    pub fn shape(name: &str) -> Result<Self> {
        let Some(config) = shape_config(name) else {
            return Err(Error::Option {
                option: "shape",
                expected: "bitnet-2b-4t, llama3-8b or tiny",
                got: format!("'{name}'"),
            });
        };
        Self::from_hf(Path::new(name), &config)
    }
}

/// The config.json of a known shape.
fn shape_config(name: &str) -> Option<Value> {
    let config = |model, [hidden, ffn, layers, heads, kv_heads, vocab, context]: [usize; 7]| {
        json!({
            "model_type": model, "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
            "hidden_act": if model == "bitnet" { "relu2" } else { "silu" },
            "tie_word_embeddings": model == "bitnet",
        })
    };
    let size = match name {
        "bitnet-2b-4t" => [2560, 6912, 30, 20, 5, 128_256, 4096],
        "llama3-8b" => [4096, 14_336, 32, 32, 8, 128_256, 8192],
        "tiny" => [256, 512, 2, 4, 2, 512, 512],
        _ => return None,
    };
    let model = if name == "llama3-8b" {
        "llama"
    } else {
        "bitnet"
    };
    Some(config(model, size))
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

    fn experts(&self, mlp: &str, shape: [usize; 3]) -> Result<Vec<Expert>> {
        numbered_experts(self, mlp, shape)
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
