//! The operations that graphs consist of, over all tokens of a batch, and their buffers.

use crate::arch::{AttentionBlock, DeltaBuffers, FeedForward};
use crate::cache::KvCache;
use crate::experts::RoutingBuffers;
use crate::linear::{KernelPool, LayerInput, LinearLayer};
use crate::projections::{GatedBuffers, GatedWeights, Projections};
use crate::{Config, Error, Result};
use bitnet_formats::arch::LayerRope;
use bitnet_kernels::dense::{Attention, TokenHeads};

/// Tokens of a long batch whose attention one task computes.
const ATTENTION_TILE: usize = 16;

/// The logits that a step returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedLogits {
    /// None: the tokens only enter the cache.
    Nothing,
    /// The logits after the last token.
    Last,
    /// The logits after every token.
    All,
}

/// The next tokens of one sequence.
#[derive(Debug)]
pub struct ForwardStep<'a> {
    /// Keys and values of the sequence so far.
    pub cache: &'a mut KvCache,
    /// The tokens that follow, at least one.
    pub tokens: &'a [u32],
    /// The logits to compute.
    pub want: WantedLogits,
}

/// Buffers of a forward pass. They grow to the largest batch and are reused, so a later pass of
/// that size allocates nothing here.
#[derive(Debug, Default)]
pub struct ForwardBuffers {
    /// The residual stream, `[tokens, hidden]`.
    pub(crate) x: Vec<f32>,
    /// The output of the last norm, `[tokens, hidden]`.
    pub(crate) normed: LayerInput,
    /// q and its gate.
    q_and_gate: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// The gate of what attention gives, of the same shape.
    pub(crate) output_gate: Vec<f32>,
    pub(crate) delta_net: DeltaBuffers,
    /// The input of the output projection, `[tokens, heads · head_dim]`, or of those of values.
    heads: LayerInput,
    /// The result of attention before a sub-norm or a gate, in the same shape.
    pub(crate) attended: Vec<f32>,
    pub(crate) gated: GatedBuffers,
    pub(crate) routing: RoutingBuffers,
    /// The output of the attention or feed-forward block, `[tokens, hidden]`.
    pub(crate) delta: Vec<f32>,
    /// Step and position of each token.
    pub(crate) places: Vec<(usize, usize)>,
    /// Cosine and sine of each pair, `[tokens, pairs]`, of the model's rotary positions and then of
    /// those of layers with a window.
    pub(crate) angles: Vec<(f32, f32)>,
    pub(crate) logits: Vec<f32>,
}

/// The gain of an RMS norm.
#[derive(Debug)]
pub(crate) struct NormGain(pub(crate) Vec<f32>);

/// What multiplies the result of attention: a function of `output_gate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutputGate {
    None,
    Sigmoid,
}

/// A forward pass in progress.
pub(crate) struct ForwardPass<'a, 'c> {
    pub(crate) runtime: &'a KernelPool,
    pub(crate) config: &'a Config,
    pub(crate) buffers: &'a mut ForwardBuffers,
    pub(crate) steps: &'a mut [ForwardStep<'c>],
}

impl ForwardPass<'_, '_> {
    /// `normed = RMS(x) · gain`, as input of `layers`.
    pub(crate) fn norm(&mut self, norm: &NormGain, layers: &[&LinearLayer]) -> Result<()> {
        let (kernels, hidden, eps) = (
            &self.runtime.kernels,
            self.config.hidden,
            self.config.norm_eps,
        );
        let x = &self.buffers.x;
        self.buffers.normed.write(
            self.runtime,
            layers,
            (x.len() / hidden, hidden),
            |token, out| {
                kernels.rms_norm(&x[token * hidden..][..hidden], &norm.0, eps, out);
            },
        )
    }

    /// `x += attention of RMS(x)`, as `arch/decoder.rs` writes it. The new keys and values enter the
    /// cache. After the last layer, drops the rows of tokens whose logits were not requested.
    pub(crate) fn attention(&mut self, layer: usize, block: &AttentionBlock) -> Result<()> {
        block.qkv.with(|layers| self.norm(&block.norm, layers))?;
        self.project(&block.qkv)?;
        self.rotate(layer, block.head_norms.as_ref());
        let kv_width = self.config.kv_heads * self.config.head_dim;
        let s = &*self.buffers;
        for (token, &(step, position)) in s.places.iter().enumerate() {
            let (k, v) = (
                &s.k[token * kv_width..][..kv_width],
                &s.v[token * kv_width..][..kv_width],
            );
            self.steps[step].cache.write(layer, position, k, v);
        }
        self.attend(layer);
        let width = self.config.heads * self.config.head_dim;
        if layer + 1 == self.config.layers {
            self.drop_unwanted(width);
        }
        let gate = match self.config.graph.output_gate {
            true => OutputGate::Sigmoid,
            false => OutputGate::None,
        };
        self.attention_out(&block.out, width, block.sub_norm.as_ref(), gate)?;
        self.add(block.post_norm.as_ref());
        Ok(())
    }

    /// `q, k, v = W·normed`.
    fn project(&mut self, qkv: &Projections<3>) -> Result<()> {
        let (tokens, config) = (self.buffers.places.len(), self.config);
        let (width, kv_width) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let s = &mut *self.buffers;
        let kv = [(&mut s.k, kv_width), (&mut s.v, kv_width)];
        let [k, v] = kv;
        if !config.graph.output_gate {
            let outs = [(&mut s.q, width), k, v];
            return qkv.apply(
                self.runtime,
                &mut s.normed,
                tokens,
                &mut s.gated.fused,
                outs,
            );
        }
        let outs = [(&mut s.q_and_gate, 2 * width), k, v];
        qkv.apply(
            self.runtime,
            &mut s.normed,
            tokens,
            &mut s.gated.fused,
            outs,
        )?;
        // Each head and then its gate.
        s.q.resize(tokens * width, 0.0);
        s.output_gate.resize(tokens * width, 0.0);
        let dim = config.head_dim;
        let heads =
            s.q.chunks_exact_mut(dim)
                .zip(s.output_gate.chunks_exact_mut(dim));
        for ((q, gate), both) in heads.zip(s.q_and_gate.chunks_exact(2 * dim)) {
            q.copy_from_slice(&both[..dim]);
            gate.copy_from_slice(&both[dim..]);
        }
        Ok(())
    }

    /// `q, k = rope(q), rope(k)`, each head after its norm where there is one.
    fn rotate(&mut self, layer: usize, norms: Option<&[NormGain; 2]>) {
        let (KernelPool { kernels, pool }, config) = (self.runtime, self.config);
        let rope = config.layer_rope(layer);
        let (dim, eps) = (config.head_dim, config.norm_eps);
        let s = &mut *self.buffers;
        let tokens = s.places.len();
        // The angles of the model come before those of layers with a window.
        let angles = match rope {
            Some(_) if config.attention[layer].rope == LayerRope::Local => {
                &s.angles[tokens * config.rope.pairs()..]
            }
            _ => &s.angles[..],
        };
        for (i, (x, heads)) in [(&mut s.q, config.heads), (&mut s.k, config.kv_heads)]
            .into_iter()
            .enumerate()
        {
            let norm = norms.map(|norms| &norms[i].0);
            if norm.is_none() && rope.is_none() {
                continue;
            }
            pool.for_chunks(x, heads * dim, |token, x| {
                if let Some(gain) = norm {
                    for head in x.chunks_exact_mut(dim) {
                        kernels.rms_norm_in_place(head, gain, eps);
                    }
                }
                let Some(rope) = rope else { return };
                let angles = &angles[token * rope.pairs()..][..rope.pairs()];
                if rope.dims == dim {
                    return kernels.rotate(x, angles, rope.pairing);
                }
                for head in x.chunks_exact_mut(dim) {
                    kernels.rotate(&mut head[..rope.dims], angles, rope.pairing);
                }
            });
        }
    }

    /// `attended = Attention(q, K, V)` over the cache. The pool splits short batches by token and
    /// group of heads, long ones by tiles of tokens.
    fn attend(&mut self, layer: usize) {
        let (KernelPool { kernels, pool }, config) = (self.runtime, self.config);
        let (tokens, steps) = (self.buffers.places.len(), &*self.steps);
        let (width, group) = (
            config.heads * config.head_dim,
            config.heads / config.kv_heads * config.head_dim,
        );
        let (scale, window) = (config.scales.scores, config.attention[layer].window);
        let s = &mut *self.buffers;
        let (queries, places) = (&s.q, &s.places);
        s.attended.resize(tokens * width, 0.0);
        let attention = |(step, position): (usize, usize), head: usize| {
            let [keys, values] = steps[step].cache.head(layer, head);
            Attention {
                keys,
                values,
                len: position + 1,
                window,
                head_dim: config.head_dim,
                scale,
            }
        };
        if tokens < 2 * ATTENTION_TILE {
            pool.for_chunks(&mut s.attended, group, |part, out| {
                let (token, head) = (part / config.kv_heads, part % config.kv_heads);
                let queries = &queries[token * width + head * group..][..group];
                kernels.attend(&attention(places[token], head), queries, out);
            });
            return;
        }
        pool.for_chunks(&mut s.attended, ATTENTION_TILE * width, |tile, out| {
            let places = &places[tile * ATTENTION_TILE..][..out.len() / width];
            let queries = &queries[tile * ATTENTION_TILE * width..];
            let mut first = 0;
            for run in places.chunk_by(|a, b| a.0 == b.0) {
                let heads = TokenHeads {
                    tokens: run.len(),
                    width: group,
                    stride: width,
                };
                for head in 0..config.kv_heads {
                    let start = first * width + head * group;
                    let (queries, out) = (&queries[start..], &mut out[start..]);
                    kernels.attend_run(&attention(run[0], head), heads, queries, out);
                }
                first += run.len();
            }
        });
    }

    /// Keeps the rows of tokens whose logits were requested and drops the others; `width` is that of
    /// the result of attention.
    pub(crate) fn drop_unwanted(&mut self, width: usize) {
        let hidden = self.config.hidden;
        let s = &mut *self.buffers;
        let gated = s.output_gate.len() == s.attended.len();
        let (mut first, mut wanted) = (0, 0);
        for step in self.steps.iter() {
            let end = first + step.tokens.len();
            let from = match step.want {
                WantedLogits::Nothing => end,
                WantedLogits::Last => end - 1,
                WantedLogits::All => first,
            };
            s.x.copy_within(from * hidden..end * hidden, wanted * hidden);
            s.attended
                .copy_within(from * width..end * width, wanted * width);
            if gated {
                s.output_gate
                    .copy_within(from * width..end * width, wanted * width);
            }
            wanted += end - from;
            first = end;
        }
        s.x.truncate(wanted * hidden);
        s.attended.truncate(wanted * width);
        s.output_gate.truncate(wanted * width);
    }

    /// `delta = o · heads`, where `heads` is `attended`, of `width` elements for each token, or its
    /// sub-norm or its product with a gate if the graph has one.
    pub(crate) fn attention_out(
        &mut self,
        o: &LinearLayer,
        width: usize,
        sub_norm: Option<&NormGain>,
        gate: OutputGate,
    ) -> Result<()> {
        let (kernels, eps) = (&self.runtime.kernels, self.config.norm_eps);
        let s = &mut *self.buffers;
        let (attended, gates) = (&s.attended, &s.output_gate);
        s.heads.write(
            self.runtime,
            &[o],
            (attended.len() / width, width),
            |token, out| {
                let attended = &attended[token * width..][..width];
                let gates = || &gates[token * width..][..width];
                match (sub_norm, gate) {
                    (Some(norm), _) => kernels.rms_norm(attended, &norm.0, eps, out),
                    (None, OutputGate::None) => out.copy_from_slice(attended),
                    (None, OutputGate::Sigmoid) => kernels.sigmoid_mul(gates(), attended, out),
                }
            },
        )?;
        s.delta.resize(s.x.len(), 0.0);
        o.apply(self.runtime, &mut s.heads, &mut s.delta)
    }

    /// `x += feed-forward of RMS(x)`, as `arch/decoder.rs` and `experts.rs` write it.
    pub(crate) fn feed_forward(&mut self, block: &FeedForward) -> Result<()> {
        let block = match block {
            FeedForward::Experts(block) => {
                self.experts(block)?;
                self.add(None);
                return Ok(());
            }
            FeedForward::Dense(block) => block,
        };
        block
            .gate_up
            .with(|layers| self.norm(&block.norm, layers))?;
        let weights = GatedWeights {
            gate_up: &block.gate_up,
            sub_norm: block.sub_norm.as_ref(),
            down: &block.down,
            ffn: self.config.ffn,
        };
        let s = &mut *self.buffers;
        s.delta.resize(s.x.len(), 0.0);
        let runtime = (self.runtime, self.config);
        s.gated
            .apply(runtime, &weights, &mut s.normed, &mut s.delta)?;
        self.add(block.post_norm.as_ref());
        Ok(())
    }

    /// `x += r · delta`, token by token, with delta after its norm where there is one.
    pub(crate) fn add(&mut self, post_norm: Option<&NormGain>) {
        let (KernelPool { kernels, pool }, config) = (self.runtime, self.config);
        let (hidden, eps, residual) = (config.hidden, config.norm_eps, config.scales.residual);
        let s = &mut *self.buffers;
        if post_norm.is_some() || residual != 1.0 {
            pool.for_chunks(&mut s.delta, hidden, |_, delta| {
                if let Some(norm) = post_norm {
                    kernels.rms_norm_in_place(delta, &norm.0, eps);
                }
                scale(delta, residual);
            });
        }
        let delta = &s.delta;
        pool.for_chunks(&mut s.x, hidden, |token, x| {
            kernels.add(x, &delta[token * hidden..][..hidden])
        });
    }
}

/// Multiplies all elements, unless by 1.
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Adds the place to an error about activations that are not finite.
pub(crate) fn located(at: impl Fn() -> String) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Kernels(bitnet_kernels::Error::Matrix(bitnet_core::Error::NotFinite { .. })) => {
            Error::NotFinite { at: at() }
        }
        other => other,
    }
}
