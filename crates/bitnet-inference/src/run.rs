//! The steps that graphs are made of, over all tokens of a batch, and their buffers.

use crate::cache::KvCache;
use crate::config::{Activation, Config};
use crate::linear::{Input, Linear, Machine};
use crate::{Error, Result};
use bitnet_kernels::dense::Attention;

/// Which logits a step is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// None: the tokens only go into the cache.
    Nothing,
    /// Those after the last token.
    Last,
    /// Those after every token.
    All,
}

/// Tokens that follow what is in a cache.
#[derive(Debug)]
pub struct Step<'a> {
    /// The sequence so far.
    pub cache: &'a mut KvCache,
    /// What follows; at least one token.
    pub tokens: &'a [u32],
    /// The logits to compute.
    pub want: Want,
}

/// Buffers of a forward pass. They grow to the largest batch and are used again: a pass that fits allocates nothing for itself.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The residual stream, `[tokens, hidden]`.
    pub(crate) x: Vec<f32>,
    /// What a norm made of it, `[tokens, hidden]`.
    pub(crate) normed: Input,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Heads, `[tokens, heads · head_dim]`.
    heads: Input,
    /// Before the sub-norm, where there is one.
    raw: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// What goes into the down projection, `[tokens, ffn]`.
    product: Input,
    /// What a half of a layer adds, `[tokens, hidden]`.
    delta: Vec<f32>,
    /// Sequence and position of each token.
    pub(crate) places: Vec<(usize, usize)>,
    /// Cosine and sine of each pair, `[tokens, head_dim / 2]`.
    pub(crate) angles: Vec<(f32, f32)>,
    pub(crate) logits: Vec<f32>,
}

/// The weights of an RMS norm.
#[derive(Debug)]
pub(crate) struct Norm(pub(crate) Vec<f32>);

/// A forward pass under way.
pub(crate) struct Run<'a, 'c> {
    pub(crate) machine: &'a Machine,
    pub(crate) config: &'a Config,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) steps: &'a mut [Step<'c>],
}

impl Run<'_, '_> {
    fn tokens(&self) -> usize {
        self.scratch.places.len()
    }

    /// `normed = RMS(x) · weight`.
    pub(crate) fn norm(&mut self, norm: &Norm) {
        let (Machine { kernels, pool }, hidden, eps) = (self.machine, self.config.hidden, self.config.norm_eps);
        let x = &self.scratch.x;
        pool.for_chunks(self.scratch.normed.fill(x.len()), hidden, |token, out| {
            kernels.rms_norm(&x[token * hidden..][..hidden], &norm.0, eps, out);
        });
    }

    /// `heads = Attention(rope(q·normed), rope(k·normed), v·normed)` over the cache, which gets the new keys and values; then the sub-norm
    /// of all heads together, if there is one.
    pub(crate) fn attention(&mut self, layer: usize, [q, k, v]: [&Linear; 3], sub_norm: Option<&Norm>) -> Result<()> {
        let (tokens, config) = (self.tokens(), self.config);
        let Machine { kernels, pool } = self.machine;
        let (d, group) = (config.head_dim, config.heads / config.kv_heads);
        let (width, kv_width, pairs) = (config.heads * d, config.kv_heads * d, d / 2);
        let s = &mut *self.scratch;
        for (linear, out, width) in [(q, &mut s.q, width), (k, &mut s.k, kv_width), (v, &mut s.v, kv_width)] {
            out.resize(tokens * width, 0.0);
            linear.apply(self.machine, &mut s.normed, out)?;
        }
        let (angles, places) = (&s.angles, &s.places);
        for (x, width) in [(&mut s.q, width), (&mut s.k, kv_width)] {
            pool.for_chunks(x, width, |token, x| kernels.rotate(x, &angles[token * pairs..][..pairs], config.rope.pairing));
        }
        for (token, &(step, position)) in places.iter().enumerate() {
            let (k, v) = (&s.k[token * kv_width..][..kv_width], &s.v[token * kv_width..][..kv_width]);
            self.steps[step].cache.write(layer, position, k, v);
        }
        let (queries, steps, scale) = (&s.q, &*self.steps, 1.0 / (d as f32).sqrt());
        let out = match sub_norm {
            None => s.heads.fill(tokens * width),
            Some(_) => {
                s.raw.resize(tokens * width, 0.0);
                &mut s.raw[..]
            }
        };
        pool.for_chunks(out, group * d, |part, out| {
            let (token, head) = (part / config.kv_heads, part % config.kv_heads);
            let (step, position) = places[token];
            let [keys, values] = steps[step].cache.head(layer, head);
            let attention = Attention { keys, values, len: position + 1, head_dim: d, scale };
            kernels.attend(&attention, &queries[token * width + head * group * d..][..group * d], out);
        });
        if let Some(norm) = sub_norm {
            let (raw, eps) = (&s.raw, config.norm_eps);
            pool.for_chunks(s.heads.fill(tokens * width), width, |token, out| {
                kernels.rms_norm(&raw[token * width..][..width], &norm.0, eps, out);
            });
        }
        Ok(())
    }

    /// `x += o · heads`.
    pub(crate) fn attention_out(&mut self, o: &Linear) -> Result<()> {
        let s = &mut *self.scratch;
        s.delta.resize(s.x.len(), 0.0);
        o.apply(self.machine, &mut s.heads, &mut s.delta)?;
        add(self.machine, self.config.hidden, s);
        Ok(())
    }

    /// `product = f(gate · normed) ⊙ (up · normed)`; then the sub-norm, if there is one.
    pub(crate) fn feed_forward(&mut self, [gate, up]: [&Linear; 2], sub_norm: Option<&Norm>) -> Result<()> {
        let (tokens, ffn, eps) = (self.tokens(), self.config.ffn, self.config.norm_eps);
        let Machine { kernels, pool } = self.machine;
        let s = &mut *self.scratch;
        for (linear, out) in [(gate, &mut s.gate), (up, &mut s.up)] {
            out.resize(tokens * ffn, 0.0);
            linear.apply(self.machine, &mut s.normed, out)?;
        }
        let (up, activation) = (&s.up, self.config.activation);
        pool.for_chunks(&mut s.gate, ffn, |token, gate| {
            let up = &up[token * ffn..][..ffn];
            match activation {
                Activation::Silu => kernels.silu_mul(gate, up),
                Activation::Relu2 => kernels.relu2_mul(gate, up),
            }
        });
        match sub_norm {
            None => s.product.swap(&mut s.gate),
            Some(norm) => {
                let gate = &s.gate;
                pool.for_chunks(s.product.fill(tokens * ffn), ffn, |token, out| {
                    kernels.rms_norm(&gate[token * ffn..][..ffn], &norm.0, eps, out);
                });
            }
        }
        Ok(())
    }

    /// `x += down · product`.
    pub(crate) fn feed_forward_out(&mut self, down: &Linear) -> Result<()> {
        let s = &mut *self.scratch;
        s.delta.resize(s.x.len(), 0.0);
        down.apply(self.machine, &mut s.product, &mut s.delta)?;
        add(self.machine, self.config.hidden, s);
        Ok(())
    }
}

/// `x += delta`, token by token.
fn add(machine: &Machine, hidden: usize, s: &mut Scratch) {
    let delta = &s.delta;
    machine.pool.for_chunks(&mut s.x, hidden, |token, x| machine.kernels.add(x, &delta[token * hidden..][..hidden]));
}

/// Says where activations stopped being numbers.
pub(crate) fn located(at: impl Fn() -> String) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Kernels(bitnet_kernels::Error::Matrix(bitnet_core::Error::NotFinite { .. })) => Error::NotFinite { at: at() },
        other => other,
    }
}
