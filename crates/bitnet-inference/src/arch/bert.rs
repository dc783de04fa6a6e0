//! Bert, the encoder: each token sees all tokens of its text, and norms come after what they norm.
//!
//! ```text
//! x = LN(word[token] + position[i] + type[0])
//! h = LN_a(x + o · Attention(q·x, k·x, v·x))
//! y = LN_f(h + down · gelu(up · h))
//! ```
//!
//! LN subtracts the mean, divides by the standard deviation, multiplies by a gain and adds a bias;
//! gelu is the exact one, with erf. Every linear layer has a bias. A text alone has token type 0.
//! The texts of a batch follow one another without padding, so none sees another.

use crate::forward::located;
use crate::linear::{KernelPool, LayerInput, LinearLayer};
use crate::load::CheckpointLoader;
use crate::projections::Projections;
use crate::{Error, Result};
use bitnet_formats::Kind;
use bitnet_formats::arch::HfEncoder;
use bitnet_kernels::dense::{Attention, Cached, DenseMatrix};

const WORDS: &str = "embeddings.word_embeddings";

/// Weights of an encoder. Shapes are (N, K).
#[derive(Debug)]
pub(crate) struct BertModel {
    pub(crate) facts: HfEncoder,
    /// `(vocab, hidden)`.
    words: DenseMatrix,
    /// `(positions, hidden)`.
    positions: DenseMatrix,
    /// Of token type 0, `[hidden]`.
    token_type: Vec<f32>,
    norm: LayerNorm,
    layers: Vec<BertLayer>,
}

/// Gain and bias of a LayerNorm, `[hidden]`.
#[derive(Debug)]
struct LayerNorm {
    gain: Vec<f32>,
    bias: Vec<f32>,
}

/// Weights of a layer.
#[derive(Debug)]
struct BertLayer {
    /// `(hidden, hidden)` each.
    qkv: Projections<3>,
    /// `(hidden, hidden)`.
    out: LinearLayer,
    attention_norm: LayerNorm,
    /// `(ffn, hidden)`.
    up: LinearLayer,
    /// `(hidden, ffn)`.
    down: LinearLayer,
    output_norm: LayerNorm,
}

/// Buffers of a pass. They grow to the largest batch.
#[derive(Debug, Default)]
pub(crate) struct EncoderBuffers {
    /// Hidden states, `[tokens, hidden]`.
    x: Vec<f32>,
    /// What attention or feed-forward adds to them.
    delta: Vec<f32>,
    /// Input of the linear layers.
    input: LayerInput,
    /// q, k and v, `[tokens, hidden]`.
    qkv: [Vec<f32>; 3],
    /// k and v, `[heads, tokens, head_dim]`.
    cached: [Vec<f32>; 2],
    attended: Vec<f32>,
    /// `[tokens, ffn]`.
    up: Vec<f32>,
    fused: Vec<f32>,
    /// First token and number of tokens of the text of each token.
    texts: Vec<(usize, usize)>,
}

/// The weights of an encoder, found by their names in Hugging Face's BertModel.
struct Modules<'a, 'b> {
    tensors: &'a CheckpointLoader<'b>,
    /// `bert.` where the encoder is part of a larger model.
    prefix: &'static str,
}

impl Modules<'_, '_> {
    fn name(&self, module: &str) -> String {
        format!("{}{module}", self.prefix)
    }

    fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<DenseMatrix> {
        let name = self.name(module);
        let source = self.tensors.source;
        source.refuse_rotated(&self.tensors.stored_name(&format!("{name}.weight")))?;
        self.tensors.embedding(&name, rows, cols)
    }

    fn norm(&self, module: &str, len: usize) -> Result<LayerNorm> {
        let name = self.name(module);
        Ok(LayerNorm {
            gain: self.tensors.vector(&format!("{name}.weight"), len)?,
            bias: self.tensors.vector(&format!("{name}.bias"), len)?,
        })
    }

    fn layer(&self, facts: &HfEncoder, layer: usize) -> Result<BertLayer> {
        let (hidden, ffn) = (facts.hidden, facts.ffn);
        let module = |module: &str| format!("encoder.layer.{layer}.{module}");
        let linear = |name: &str, rows, cols| {
            let name = self.name(&module(name));
            self.tensors.linear(&name, rows, cols, true)
        };
        Ok(BertLayer {
            qkv: Projections::Separate([
                linear("attention.self.query", hidden, hidden)?,
                linear("attention.self.key", hidden, hidden)?,
                linear("attention.self.value", hidden, hidden)?,
            ]),
            out: linear("attention.output.dense", hidden, hidden)?,
            attention_norm: self.norm(&module("attention.output.LayerNorm"), hidden)?,
            up: linear("intermediate.dense", ffn, hidden)?,
            down: linear("output.dense", hidden, ffn)?,
            output_norm: self.norm(&module("output.LayerNorm"), hidden)?,
        })
    }
}

impl BertModel {
    pub(crate) fn load(tensors: &CheckpointLoader<'_>, facts: HfEncoder) -> Result<Self> {
        let inside = tensors.source.find(&format!("bert.{WORDS}.weight"));
        let prefix = match inside {
            Some(_) if tensors.source.kind() != Kind::Gguf => "bert.",
            _ => "",
        };
        let modules = Modules { tensors, prefix };
        let hidden = facts.hidden;
        let types = "embeddings.token_type_embeddings";
        let types = modules.embedding(types, facts.token_types, hidden)?;
        let mut token_type = vec![0.0; hidden];
        types.row_into(0, &mut token_type);
        let positions = "embeddings.position_embeddings";
        Ok(Self {
            words: modules.embedding(WORDS, facts.vocab, hidden)?,
            positions: modules.embedding(positions, facts.context, hidden)?,
            token_type,
            norm: modules.norm("embeddings.LayerNorm", hidden)?,
            layers: (0..facts.layers)
                .map(|i| modules.layer(&facts, i))
                .collect::<Result<_>>()?,
            facts,
        })
    }

    /// The hidden states of the tokens of texts, `[tokens, hidden]`, one text after another.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for a text without tokens, [`Error::Context`] for one with more than
    /// positions, [`Error::Token`] for a token outside the vocabulary, [`Error::NotFinite`].
    pub(crate) fn hidden_states<'b>(
        &self,
        runtime: &KernelPool,
        texts: &[&[u32]],
        buffers: &'b mut EncoderBuffers,
    ) -> Result<&'b [f32]> {
        let mut pass = EncoderPass {
            runtime,
            model: self,
            b: buffers,
        };
        pass.embed(texts)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let done = pass
                .attention(layer)
                .and_then(|()| pass.feed_forward(layer));
            done.map_err(located(|| format!("layer {i}")))?;
        }
        Ok(&buffers.x)
    }
}

/// A pass in progress.
struct EncoderPass<'a> {
    runtime: &'a KernelPool,
    model: &'a BertModel,
    b: &'a mut EncoderBuffers,
}

impl EncoderPass<'_> {
    /// `x = LN(word[token] + position[i] + type[0])`.
    fn embed(&mut self, texts: &[&[u32]]) -> Result<()> {
        let (model, b) = (self.model, &mut *self.b);
        let HfEncoder {
            hidden,
            vocab,
            context,
            ..
        } = model.facts;
        b.texts.clear();
        for text in texts {
            let (first, got) = (b.texts.len(), text.len());
            if got == 0 {
                return Err(Error::EmptyPrompt);
            }
            if got > context {
                return Err(Error::Context { got, context });
            }
            if let Some(&got) = text.iter().find(|&&t| t as usize >= vocab) {
                return Err(Error::Token { got, vocab });
            }
            b.texts.resize(first + got, (first, got));
        }
        b.delta.resize(b.texts.len() * hidden, 0.0);
        let mut row = vec![0.0; hidden];
        let tokens = texts.iter().flat_map(|text| text.iter().enumerate());
        for ((i, &token), sum) in tokens.zip(b.delta.chunks_exact_mut(hidden)) {
            model.words.row_into(token as usize, sum);
            self.runtime.kernels.add(sum, &model.token_type);
            model.positions.row_into(i, &mut row);
            self.runtime.kernels.add(sum, &row);
        }
        b.x.resize(b.delta.len(), 0.0);
        self.norm(&model.norm);
        Ok(())
    }

    /// `x = LN(delta)`.
    fn norm(&mut self, norm: &LayerNorm) {
        let (KernelPool { kernels, pool }, facts) = (self.runtime, &self.model.facts);
        let (delta, eps) = (&self.b.delta, facts.norm_eps as f32);
        pool.for_chunks(&mut self.b.x, facts.hidden, |token, x| {
            let sum = &delta[token * facts.hidden..][..facts.hidden];
            kernels.layer_norm(sum, &norm.gain, &norm.bias, eps, x);
        });
    }

    /// `x = LN(x + delta)`.
    fn add_and_norm(&mut self, norm: &LayerNorm) {
        let (KernelPool { kernels, pool }, hidden) = (self.runtime, self.model.facts.hidden);
        let x = &self.b.x;
        pool.for_chunks(&mut self.b.delta, hidden, |token, delta| {
            kernels.add(delta, &x[token * hidden..][..hidden]);
        });
        self.norm(norm);
    }

    /// `x = LN_a(x + o · Attention(q·x, k·x, v·x))`.
    fn attention(&mut self, layer: &BertLayer) -> Result<()> {
        let (runtime, hidden) = (self.runtime, self.model.facts.hidden);
        let b = &mut *self.b;
        let tokens = b.texts.len();
        let x = &b.x;
        layer.qkv.with(|layers| {
            b.input
                .write(runtime, layers, (tokens, hidden), |token, out| {
                    out.copy_from_slice(&x[token * hidden..][..hidden]);
                })
        })?;
        let [q, k, v] = &mut b.qkv;
        let outs = [(q, hidden), (k, hidden), (v, hidden)];
        let qkv = &layer.qkv;
        qkv.apply(runtime, &mut b.input, tokens, &mut b.fused, outs)?;
        self.attend();
        let b = &mut *self.b;
        let attended = &b.attended;
        b.input
            .write(runtime, &[&layer.out], (tokens, hidden), |token, out| {
                out.copy_from_slice(&attended[token * hidden..][..hidden]);
            })?;
        layer.out.apply(runtime, &mut b.input, &mut b.delta)?;
        self.add_and_norm(&layer.attention_norm);
        Ok(())
    }

    /// `attended = softmax(q · Kᵀ / √head_dim) · V` of each head, over all tokens of the text.
    fn attend(&mut self) {
        let (KernelPool { kernels, pool }, facts) = (self.runtime, &self.model.facts);
        let (hidden, dim) = (facts.hidden, facts.hidden / facts.heads);
        let b = &mut *self.b;
        let tokens = b.texts.len();
        let [q, k, v] = &b.qkv;
        for (from, to) in [k, v].into_iter().zip(&mut b.cached) {
            to.resize(from.len(), 0.0);
            pool.for_chunks(to, tokens * dim, |head, to| {
                for (to, from) in to.chunks_exact_mut(dim).zip(from.chunks_exact(hidden)) {
                    to.copy_from_slice(&from[head * dim..][..dim]);
                }
            });
        }
        let ([keys, values], texts) = (&b.cached, &b.texts);
        b.attended.resize(tokens * hidden, 0.0);
        pool.for_chunks(&mut b.attended, hidden, |token, out| {
            let (first, len) = texts[token];
            let q = &q[token * hidden..][..hidden];
            let heads = q.chunks_exact(dim).zip(out.chunks_exact_mut(dim));
            for (head, (q, out)) in heads.enumerate() {
                let rows = (head * tokens + first) * dim..(head * tokens + first + len) * dim;
                let attention = Attention {
                    keys: Cached::F32(&keys[rows.clone()]),
                    values: Cached::F32(&values[rows]),
                    len,
                    window: None,
                    head_dim: dim,
                    scale: 1.0 / (dim as f32).sqrt(),
                };
                kernels.attend(&attention, q, out);
            }
        });
    }

    /// `x = LN_f(x + down · gelu(up · x))`.
    fn feed_forward(&mut self, layer: &BertLayer) -> Result<()> {
        let (runtime, facts) = (self.runtime, &self.model.facts);
        let (hidden, ffn) = (facts.hidden, facts.ffn);
        let b = &mut *self.b;
        let tokens = b.texts.len();
        let x = &b.x;
        b.input
            .write(runtime, &[&layer.up], (tokens, hidden), |token, out| {
                out.copy_from_slice(&x[token * hidden..][..hidden]);
            })?;
        b.up.resize(tokens * ffn, 0.0);
        layer.up.apply(runtime, &mut b.input, &mut b.up)?;
        let up = &b.up;
        b.input
            .write(runtime, &[&layer.down], (tokens, ffn), |token, out| {
                out.copy_from_slice(&up[token * ffn..][..ffn]);
                runtime.kernels.gelu(out);
            })?;
        layer.down.apply(runtime, &mut b.input, &mut b.delta)?;
        self.add_and_norm(&layer.output_norm);
        Ok(())
    }
}
