//! Synthetic models: the shape of a known model with generated weights, to measure speed without
//! a download.

use crate::arch::DeltaVectors;
use crate::experts::Expert;
use crate::forward::NormGain;
use crate::linear::{KernelPool, LinearLayer, LinearWeights};
use crate::load::{FloatType, WeightProvider, numbered_experts};
use crate::{Config, Error, Result};
use bitnet_core::random::Random;
use bitnet_core::{Granularity, MatrixSpec, Precision};
use bitnet_formats::arch::DeltaShape;
use bitnet_kernels::dense::{
    BlockCodes, BlockType, Blocks, DenseData, DenseMatrix, ScaleType, quantize_int4, quantize_int8,
    zeros,
};
use bitnet_kernels::matmul::Prepacked;
use serde_json::{Value, json};
use std::path::Path;

/// A shape that has a name.
pub(crate) struct Shape {
    name: &'static str,
    model: &'static str,
    /// hidden, ffn, layers, heads, key and value heads, elements of a head, vocabulary, context.
    sizes: [usize; 8],
    tied: bool,
    /// Columns under one scale, where every matrix is ternary, embedding and output matrix too; none
    /// for ternary layers with one scale each and an embedding of floats.
    pub(crate) group: Option<usize>,
}

const fn bonsai(name: &'static str, sizes: [usize; 8], tied: bool) -> Shape {
    let (model, group) = ("qwen3", Some(128));
    Shape {
        name,
        model,
        sizes,
        tied,
        group,
    }
}

#[rustfmt::skip]
const SHAPES: [Shape; 7] = [
    Shape {
        name: "bitnet-2b-4t", model: "bitnet", tied: true, group: None,
        sizes: [2560, 6912, 30, 20, 5, 128, 128_256, 4096],
    },
    Shape {
        name: "llama3-8b", model: "llama", tied: false, group: None,
        sizes: [4096, 14_336, 32, 32, 8, 128, 128_256, 8192],
    },
    bonsai("bonsai-1.7b", [2048, 6144, 28, 16, 8, 128, 151_936, 40_960], true),
    bonsai("bonsai-4b", [2560, 9728, 36, 32, 8, 128, 151_936, 40_960], true),
    bonsai("bonsai-8b", [4096, 12_288, 36, 32, 8, 128, 151_936, 40_960], false),
    Shape {
        name: "tiny", model: "bitnet", tied: true, group: None,
        sizes: [256, 512, 2, 4, 2, 64, 512, 512],
    },
    bonsai("bonsai-tiny", [256, 512, 2, 4, 2, 128, 512, 512], false),
];

impl Shape {
    /// # Errors
    /// [`Error::Option`] for a name that no shape has.
    pub(crate) fn by_name(name: &str) -> Result<&'static Self> {
        SHAPES
            .iter()
            .find(|shape| shape.name == name)
            .ok_or_else(|| Error::Option {
                option: "shape",
                expected: "bitnet-2b-4t, llama3-8b, bonsai-1.7b, bonsai-4b, bonsai-8b, tiny or \
                           bonsai-tiny",
                got: format!("'{name}'"),
            })
    }

    /// Its config.json.
    fn config(&self) -> Value {
        let [
            hidden,
            ffn,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context,
        ] = self.sizes;
        let qwen3 = self.model == "qwen3";
        json!({
            "model_type": self.model, "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
            "max_position_embeddings": context,
            "rms_norm_eps": if qwen3 { 1e-6 } else { 1e-5 },
            "rope_theta": if qwen3 { 1e6 } else { 5e5 },
            "hidden_act": if self.model == "bitnet" { "relu2" } else { "silu" },
            "tie_word_embeddings": self.tied,
        })
    }
}

impl Config {
    /// The config of a known shape: `bitnet-2b-4t`, `llama3-8b`, `bonsai-1.7b`, `bonsai-4b`,
    /// `bonsai-8b`, or one of two small ones, `tiny` and `bonsai-tiny`.
    ///
    /// # Errors
    /// [`Error::Option`] for another name.
    pub fn shape(name: &str) -> Result<Self> {
        Self::from_hf(Path::new(name), &Shape::by_name(name)?.config())
    }
}

/// Generates weights: ternary layers with 40 % zeros and a scale that keeps activations of order 1,
/// norms of ones, and a nearly normal embedding. With a group every matrix is ternary.
pub(crate) struct SyntheticWeights<'a> {
    pub(crate) config: &'a Config,
    pub(crate) runtime: &'a KernelPool,
    pub(crate) embedding: FloatType,
    /// Columns under one scale of every matrix; see [`Shape::group`].
    pub(crate) group: Option<usize>,
    /// Whether the inputs of ternary layers are int8.
    pub(crate) int8: bool,
}

/// The random seed of a module.
fn seed(module: &str) -> u64 {
    module.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The scale of ternary weights with which a row's product with elements of order 1 is of order 1.
fn scale(cols: usize) -> f32 {
    1.3 / (cols as f32).sqrt()
}

/// Ten trits from 64 bits: thresholds on six bits each.
fn fill_trits(random: &mut Random, values: &mut [i8]) {
    for chunk in values.chunks_mut(10) {
        let mut bits = random.bits();
        for v in chunk {
            *v = i8::from(bits & 63 < 19) - i8::from(bits & 63 >= 45);
            bits >>= 6;
        }
    }
}

impl SyntheticWeights<'_> {
    /// A ternary matrix with float activations, made a strip of rows at a time in its blocks.
    fn trits(&self, module: &str, [rows, cols]: [usize; 2], group: usize) -> Result<DenseMatrix> {
        let kind = BlockType {
            codes: BlockCodes::Trits,
            scales: ScaleType::F32 { group },
            minimum: false,
        };
        let blocks = Blocks::new(&self.runtime.pool, rows, cols, kind, |first, strip| {
            let mut values = vec![0; cols];
            for i in 0..strip.rows() {
                let row_seed = seed(module) ^ (first + i) as u64;
                fill_trits(&mut Random::new(row_seed), &mut values);
                let row = strip.row(i);
                for (code, v) in row.codes.iter_mut().zip(&values) {
                    *code = (v + 1).cast_unsigned();
                }
                row.floats.fill(scale(cols));
            }
            Ok::<(), Error>(())
        })?;
        Ok(blocks.into())
    }
}

impl WeightProvider for SyntheticWeights<'_> {
    fn config(&self) -> &Config {
        self.config
    }

    fn norm(&self, _: &str, len: usize) -> Result<NormGain> {
        Ok(NormGain(vec![1.0; len]))
    }

    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<LinearLayer> {
        let bias = bias.then(|| vec![0.0; rows]);
        if let (Some(group), false) = (self.group, self.int8) {
            return Ok(LinearLayer {
                weights: LinearWeights::Dense(self.trits(module, [rows, cols], group)?),
                bias,
                rotation: None,
            });
        }
        let mut values = vec![0i8; rows * cols];
        fill_trits(&mut Random::new(seed(module)), &mut values);
        let granularity = self.group.map_or(Granularity::Tensor, Granularity::Group);
        let spec = MatrixSpec::new(rows, cols, Precision::Ternary, granularity);
        let matrix = bitnet_core::Matrix {
            scales: vec![scale(cols); spec.scales_len()],
            spec,
            values,
            zero_points: vec![],
        };
        let packed = Prepacked::new(&matrix, &self.runtime.pool)?;
        Ok(LinearLayer {
            weights: LinearWeights::Ternary(packed),
            bias,
            rotation: None,
        })
    }

    fn delta_vectors(&self, _: &str, shape: &DeltaShape) -> Result<DeltaVectors> {
        Ok(DeltaVectors {
            conv: vec![0.5; shape.taps * shape.conv_width()],
            rates: vec![-0.1; shape.value_heads],
            dt_bias: vec![0.0; shape.value_heads],
        })
    }

    fn experts(&self, mlp: &str, shape: [usize; 3]) -> Result<Vec<Expert>> {
        numbered_experts(self, mlp, shape)
    }

    fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<DenseMatrix> {
        if let Some(group) = self.group {
            return self.trits(module, [rows, cols], group);
        }
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
