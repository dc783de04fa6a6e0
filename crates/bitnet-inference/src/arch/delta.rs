//! The gated delta net of qwen3_5: linear attention whose memory is a matrix for each head, in place
//! of keys and values.
//!
//! ```text
//! a = RMS_in(x)
//! q, k, v = silu(conv(qkv·a))          causal, over the last taps of each channel
//! q, k = q / (|q| · √dk), k / |k|       each head
//! β = sigmoid(b·a), g = exp(−exp(A_log) · softplus(a_proj·a + dt_bias))      each head of v
//! S = g·S + β · (v − g·S·k) ⊗ k        token by token: DeltaTokens has the order
//! h = x + out · (RMS_head(S·q) ⊙ silu(z·a))
//! ```
//!
//! A head of q and k serves `value_heads / key_heads` heads of v: those that follow one another
//! ([`ValueHeads::Grouped`]), or each `key_heads`-th ([`ValueHeads::Tiled`]). |x| is
//! √(Σx² + 10⁻⁶). The feed-forward is that of `decoder.rs`.

use crate::Result;
use crate::config::ValueHeads;
use crate::forward::{ForwardBuffers, ForwardPass, NormGain, OutputGate};
use crate::linear::{KernelPool, LinearLayer};
use crate::load::WeightProvider;
use crate::projections::Projections;
use bitnet_formats::arch::DeltaShape;
use bitnet_kernels::dense::DeltaTokens;

/// Added to the sum of squares of a head of q or k.
const UNIT_EPS: f32 = 1e-6;

/// Weights of a gated delta net. V = value_heads · value_dim, C = 2 · key_heads · key_dim + V.
#[derive(Debug)]
pub(crate) struct DeltaBlock {
    shape: DeltaShape,
    /// `[hidden]`.
    norm: NormGain,
    /// q, k and v, z, b and a: `(C, hidden)`, `(V, hidden)` and `(value_heads, hidden)` twice.
    inputs: Projections<4>,
    vectors: DeltaVectors,
    /// Factors of the elements of a head of q and of k, after its root mean square is 1.
    unit: [Vec<f32>; 2],
    /// Of each head, `[value_dim]`.
    head_norm: NormGain,
    /// `(hidden, V)`.
    out: LinearLayer,
    /// The order of the heads in the columns of `out`: that of the model, but for weights in a
    /// rotated basis that are grouped in a model that is not.
    out_heads: ValueHeads,
}

/// Parameters of a gated delta net that are neither norms nor matrices.
#[derive(Debug)]
pub(crate) struct DeltaVectors {
    /// Of the convolution, `[taps, C]`.
    pub(crate) conv: Vec<f32>,
    /// `−exp(A_log)`, `[value_heads]`.
    pub(crate) rates: Vec<f32>,
    /// `[value_heads]`.
    pub(crate) dt_bias: Vec<f32>,
}

/// Buffers of a gated delta net.
#[derive(Debug, Default)]
pub(crate) struct DeltaBuffers {
    /// Input of the convolution, `[tokens, C]`.
    mixed: Vec<f32>,
    /// The same behind the inputs that each sequence has kept: `taps − 1` rows more for each.
    padded: Vec<f32>,
    /// Its result, `[tokens, C]`.
    qkv: Vec<f32>,
    /// The gate, `[tokens, V]`.
    z: Vec<f32>,
    b: Vec<f32>,
    a: Vec<f32>,
    /// Decay and rate, `[tokens, value_heads]`.
    gates: Vec<(f32, f32)>,
    /// Outputs of the heads, `[value_heads, tokens, value_dim]` of each sequence.
    heads: Vec<f32>,
}

impl DeltaBlock {
    pub(crate) fn load(
        provider: &dyn WeightProvider,
        layer: usize,
        shape: DeltaShape,
    ) -> Result<Self> {
        let hidden = provider.config().hidden;
        let name = |module: &str| format!("model.layers.{layer}.{module}");
        let linear = |module: &str, rows: usize, cols: usize| {
            provider.linear(&name(&format!("linear_attn.{module}")), rows, cols, false)
        };
        let dim = shape.key_dim as f32;
        Ok(Self {
            shape,
            norm: provider.norm(&name("input_layernorm"), hidden)?,
            inputs: Projections::Separate([
                linear("in_proj_qkv", shape.conv_width(), hidden)?,
                linear("in_proj_z", shape.value_width(), hidden)?,
                linear("in_proj_b", shape.value_heads, hidden)?,
                linear("in_proj_a", shape.value_heads, hidden)?,
            ]),
            vectors: provider.delta_vectors(&name("linear_attn"), &shape)?,
            unit: [1.0 / dim, 1.0 / dim.sqrt()].map(|factor| vec![factor; shape.key_dim]),
            head_norm: provider.norm(&name("linear_attn.norm"), shape.value_dim)?,
            out: linear("out_proj", hidden, shape.value_width())?,
            out_heads: match provider.grouped_input(&name("linear_attn.out_proj"))? {
                true => ValueHeads::Grouped,
                false => provider.config().value_heads,
            },
        })
    }

    /// The head of q and k that serves a head of v, and the place of that head in the input of
    /// `out`.
    fn heads_of(&self, order: ValueHeads, head: usize) -> (usize, usize) {
        let (keys, each) = (self.shape.key_heads, self.shape.values_per_key());
        let (key, turn) = match order {
            ValueHeads::Grouped => (head / each, head % each),
            ValueHeads::Tiled => (head % keys, head / keys),
        };
        let place = match self.out_heads {
            ValueHeads::Grouped => key * each + turn,
            ValueHeads::Tiled => turn * keys + key,
        };
        (key, place)
    }

    /// The linear layers that see every token.
    pub(crate) fn inputs(&self) -> &[LinearLayer] {
        self.inputs.layers()
    }

    /// The output matrix.
    pub(crate) fn out(&self) -> &LinearLayer {
        &self.out
    }
}

impl ForwardPass<'_, '_> {
    /// `x += gated delta net of RMS(x)`. The states of the caches move on by the tokens.
    pub(crate) fn delta_net(&mut self, layer: usize, block: &DeltaBlock) -> Result<()> {
        block.inputs.with(|layers| self.norm(&block.norm, layers))?;
        self.delta_inputs(block)?;
        self.convolve(layer, block);
        self.delta_gates(block);
        self.delta_heads(layer, block);
        let width = block.shape.value_width();
        if layer + 1 == self.config.layers {
            self.drop_unwanted(width);
        }
        self.attention_out(&block.out, width, None, OutputGate::None)?;
        self.add(None);
        Ok(())
    }

    /// `mixed, z, b, a = W·normed`.
    fn delta_inputs(&mut self, block: &DeltaBlock) -> Result<()> {
        let (shape, s) = (&block.shape, &mut *self.buffers);
        let outs = [
            (&mut s.delta_net.mixed, shape.conv_width()),
            (&mut s.delta_net.z, shape.value_width()),
            (&mut s.delta_net.b, shape.value_heads),
            (&mut s.delta_net.a, shape.value_heads),
        ];
        let tokens = s.places.len();
        (block.inputs).apply(
            self.runtime,
            &mut s.normed,
            tokens,
            &mut s.gated.fused,
            outs,
        )
    }

    /// `q, k, v = silu(conv(mixed))` with q and k of length 1/√dk and 1.
    fn convolve(&mut self, layer: usize, block: &DeltaBlock) {
        let KernelPool { kernels, pool } = self.runtime;
        let (shape, width) = (&block.shape, block.shape.conv_width());
        let kept = shape.taps - 1;
        let ForwardBuffers {
            places,
            delta_net: d,
            ..
        } = &mut *self.buffers;
        d.padded.clear();
        let mut first = 0;
        for step in self.steps.iter_mut() {
            let end = first + step.tokens.len();
            let (inputs, _) = step.cache.delta_state(layer);
            d.padded.extend_from_slice(inputs);
            d.padded
                .extend_from_slice(&d.mixed[first * width..end * width]);
            let from = d.padded.len() - kept * width;
            inputs.copy_from_slice(&d.padded[from..]);
            first = end;
        }
        d.qkv.resize(places.len() * width, 0.0);
        let padded = &d.padded;
        let eps = UNIT_EPS / shape.key_dim as f32;
        pool.for_chunks(&mut d.qkv, width, |token, out| {
            let row = token + places[token].0 * kept;
            let inputs = &padded[row * width..][..shape.taps * width];
            kernels.conv_silu(inputs, &block.vectors.conv, out);
            let keys = out.chunks_exact_mut(shape.key_width()).take(2);
            for (part, unit) in keys.zip(&block.unit) {
                for head in part.chunks_exact_mut(shape.key_dim) {
                    kernels.rms_norm_in_place(head, unit, eps);
                }
            }
        });
    }

    /// `g = exp(rate · softplus(a + dt_bias)), β = sigmoid(b)`, in f64.
    fn delta_gates(&mut self, block: &DeltaBlock) {
        let (d, heads) = (&mut self.buffers.delta_net, block.shape.value_heads);
        let (a, b, vectors) = (&d.a, &d.b, &block.vectors);
        d.gates.resize(a.len(), (0.0, 0.0));
        (self.runtime.pool).for_chunks(&mut d.gates, heads, |token, gates| {
            let (a, b) = (&a[token * heads..], &b[token * heads..]);
            for (head, gate) in gates.iter_mut().enumerate() {
                let x = f64::from(a[head] + vectors.dt_bias[head]);
                let softplus = x.max(0.0) + (-x.abs()).exp().ln_1p();
                let decay = (f64::from(vectors.rates[head]) * softplus).exp();
                let rate = 1.0 / (1.0 + (-f64::from(b[head])).exp());
                *gate = (decay as f32, rate as f32);
            }
        });
    }

    /// The recurrence, a head of a sequence at a time, and the norm and the gate of its output.
    fn delta_heads(&mut self, layer: usize, block: &DeltaBlock) {
        let KernelPool { kernels, pool } = self.runtime;
        let (shape, eps, order) = (&block.shape, self.config.norm_eps, self.config.value_heads);
        let (dim, width, conv) = (shape.value_dim, shape.value_width(), shape.conv_width());
        let s = &mut *self.buffers;
        let d = &mut s.delta_net;
        d.heads.resize(s.places.len() * width, 0.0);
        s.attended.resize(d.heads.len(), 0.0);
        let mut first = 0;
        for step in self.steps.iter_mut() {
            let tokens = step.tokens.len();
            let end = first + tokens;
            let (_, states) = step.cache.delta_state(layer);
            let (qkv, gates) = (
                &d.qkv[first * conv..end * conv],
                &d.gates[first * shape.value_heads..end * shape.value_heads],
            );
            let heads = &mut d.heads[first * width..end * width];
            let lens = [DeltaTokens::state_len(shape.key_dim, dim), tokens * dim];
            pool.for_chunks_of_two((states, &mut *heads), lens, |head, state, out| {
                let key = block.heads_of(order, head).0 * shape.key_dim;
                let run = DeltaTokens {
                    tokens,
                    q: &qkv[key..],
                    k: &qkv[shape.key_width() + key..],
                    key_stride: conv,
                    v: &qkv[2 * shape.key_width() + head * dim..],
                    value_stride: conv,
                    gates: &gates[head..],
                    gate_stride: shape.value_heads,
                    key_dim: shape.key_dim,
                    value_dim: dim,
                };
                kernels.delta_tokens(&run, state, out);
                for out in out.chunks_exact_mut(dim) {
                    kernels.rms_norm_in_place(out, &block.head_norm.0, eps);
                }
            });
            let z = &d.z[first * width..end * width];
            let attended = &mut s.attended[first * width..end * width];
            pool.for_chunks(attended, width, |token, row| {
                for (head, outs) in heads.chunks_exact(tokens * dim).enumerate() {
                    let (_, place) = block.heads_of(order, head);
                    let gate = &z[token * width + head * dim..][..dim];
                    let out = &outs[token * dim..][..dim];
                    kernels.silu_mul(gate, out, &mut row[place * dim..][..dim]);
                }
            });
            first = end;
        }
    }
}
