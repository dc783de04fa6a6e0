//! The steps that graphs are made of, over all tokens of a batch, and their buffers.

use crate::cache::KvCache;
use crate::linear::{Input, Linear, Machine};
use crate::{Activation, Config};
use crate::{Error, Result};
use bitnet_kernels::dense::{Attention, TokenHeads};

/// Tokens of a long batch whose attention is computed together.
const TOGETHER: usize = 16;

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

/// Buffers of a forward pass. They grow to the largest batch and are used again: a pass that fits
/// allocates nothing for itself.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The residual stream, `[tokens, hidden]`.
    pub(crate) x: Vec<f32>,
    /// What a norm made of it, `[tokens, hidden]`.
    pub(crate) normed: Input,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// What goes into the output projection, `[tokens, heads · head_dim]`.
    heads: Input,
    /// What attention gives, `[tokens, heads · head_dim]`, before the sub-norm if there is one.
    attended: Vec<f32>,
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
    /// `normed = RMS(x) · weight`, as input of `layers`.
    pub(crate) fn norm(&mut self, norm: &Norm, layers: &[&Linear]) -> Result<()> {
        let (kernels, hidden, eps) = (
            &self.machine.kernels,
            self.config.hidden,
            self.config.norm_eps,
        );
        let x = &self.scratch.x;
        self.scratch.normed.write(
            self.machine,
            layers,
            (x.len() / hidden, hidden),
            |token, out| {
                kernels.rms_norm(&x[token * hidden..][..hidden], &norm.0, eps, out);
            },
        )
    }

    /// `attended = Attention(rope(q·normed), rope(k·normed), v·normed)` over the cache, which gets
    /// the new keys and values. After the last layer's nothing remains of the tokens whose logits
    /// nobody wants.
    pub(crate) fn attention(&mut self, layer: usize, [q, k, v]: [&Linear; 3]) -> Result<()> {
        let (tokens, config) = (self.scratch.places.len(), self.config);
        let Machine { kernels, pool } = self.machine;
        let (d, group) = (config.head_dim, config.heads / config.kv_heads);
        let (width, kv_width, pairs) = (config.heads * d, config.kv_heads * d, d / 2);
        let s = &mut *self.scratch;
        for (linear, out, width) in [
            (q, &mut s.q, width),
            (k, &mut s.k, kv_width),
            (v, &mut s.v, kv_width),
        ] {
            out.resize(tokens * width, 0.0);
            linear.apply(self.machine, &mut s.normed, out)?;
        }
        let (angles, places) = (&s.angles, &s.places);
        for (x, width) in [(&mut s.q, width), (&mut s.k, kv_width)] {
            pool.for_chunks(x, width, |token, x| {
                kernels.rotate(x, &angles[token * pairs..][..pairs], config.rope.pairing)
            });
        }
        for (token, &(step, position)) in places.iter().enumerate() {
            let (k, v) = (
                &s.k[token * kv_width..][..kv_width],
                &s.v[token * kv_width..][..kv_width],
            );
            self.steps[step].cache.write(layer, position, k, v);
        }
        let (queries, steps, scale) = (&s.q, &*self.steps, 1.0 / (d as f32).sqrt());
        s.attended.resize(tokens * width, 0.0);
        let attention = |(step, position): (usize, usize), head: usize| {
            let [keys, values] = steps[step].cache.head(layer, head);
            Attention {
                keys,
                values,
                len: position + 1,
                head_dim: d,
                scale,
            }
        };
        if tokens < 2 * TOGETHER {
            pool.for_chunks(&mut s.attended, group * d, |part, out| {
                let (token, head) = (part / config.kv_heads, part % config.kv_heads);
                kernels.attend(
                    &attention(places[token], head),
                    &queries[token * width + head * group * d..][..group * d],
                    out,
                );
            });
        } else {
            pool.for_chunks(&mut s.attended, TOGETHER * width, |part, out| {
                let places = &places[part * TOGETHER..][..out.len() / width];
                let mut first = 0;
                for run in places.chunk_by(|a, b| a.0 == b.0) {
                    for head in 0..config.kv_heads {
                        let (at, start) = (
                            TokenHeads {
                                tokens: run.len(),
                                width: group * d,
                                stride: width,
                            },
                            first * width + head * group * d,
                        );
                        let queries = &queries[part * TOGETHER * width + start..];
                        kernels.attend_run(
                            &attention(run[0], head),
                            at,
                            queries,
                            &mut out[start..],
                        );
                    }
                    first += run.len();
                }
            });
        }
        if layer + 1 == config.layers {
            self.keep_wanted();
        }
        Ok(())
    }

    /// Moves what there is of the tokens whose logits are wanted to the front, and lets go of the
    /// rest.
    fn keep_wanted(&mut self) {
        let (hidden, width) = (self.config.hidden, self.config.heads * self.config.head_dim);
        let (mut first, mut wanted) = (0, 0);
        for step in self.steps.iter() {
            let end = first + step.tokens.len();
            let from = match step.want {
                Want::Nothing => end,
                Want::Last => end - 1,
                Want::All => first,
            };
            self.scratch
                .x
                .copy_within(from * hidden..end * hidden, wanted * hidden);
            self.scratch
                .attended
                .copy_within(from * width..end * width, wanted * width);
            wanted += end - from;
            first = end;
        }
        self.scratch.x.truncate(wanted * hidden);
        self.scratch.attended.truncate(wanted * width);
    }

    /// `x += o · heads`, where `heads` is what attention gave, or its sub-norm if there is one.
    pub(crate) fn attention_out(&mut self, o: &Linear, sub_norm: Option<&Norm>) -> Result<()> {
        let (kernels, width, eps) = (
            &self.machine.kernels,
            self.config.heads * self.config.head_dim,
            self.config.norm_eps,
        );
        let s = &mut *self.scratch;
        let attended = &s.attended;
        s.heads.write(
            self.machine,
            &[o],
            (attended.len() / width, width),
            |token, out| {
                let attended = &attended[token * width..][..width];
                match sub_norm {
                    None => out.copy_from_slice(attended),
                    Some(norm) => kernels.rms_norm(attended, &norm.0, eps, out),
                }
            },
        )?;
        s.delta.resize(s.x.len(), 0.0);
        o.apply(self.machine, &mut s.heads, &mut s.delta)?;
        add(self.machine, self.config.hidden, s);
        Ok(())
    }

    /// `x += down · product`, where `product = f(gate · normed) ⊙ (up · normed)`, or the sub-norm
    /// of this if there is one.
    pub(crate) fn feed_forward(
        &mut self,
        [gate, up]: [&Linear; 2],
        down: &Linear,
        sub_norm: Option<&Norm>,
    ) -> Result<()> {
        let (ffn, eps, kernels) = (self.config.ffn, self.config.norm_eps, &self.machine.kernels);
        let s = &mut *self.scratch;
        let tokens = s.x.len() / self.config.hidden;
        for (linear, out) in [(gate, &mut s.gate), (up, &mut s.up)] {
            out.resize(tokens * ffn, 0.0);
            linear.apply(self.machine, &mut s.normed, out)?;
        }
        let (gate, up, activation) = (&s.gate, &s.up, self.config.activation);
        s.product
            .write(self.machine, &[down], (tokens, ffn), |token, out| {
                let (gate, up) = (&gate[token * ffn..][..ffn], &up[token * ffn..][..ffn]);
                match activation {
                    Activation::Silu => kernels.silu_mul(gate, up, out),
                    Activation::Relu2 => kernels.relu2_mul(gate, up, out),
                }
                if let Some(norm) = sub_norm {
                    kernels.rms_norm_in_place(out, &norm.0, eps);
                }
            })?;
        s.delta.resize(s.x.len(), 0.0);
        down.apply(self.machine, &mut s.product, &mut s.delta)?;
        add(self.machine, self.config.hidden, s);
        Ok(())
    }
}

/// `x += delta`, token by token.
fn add(machine: &Machine, hidden: usize, s: &mut Scratch) {
    let delta = &s.delta;
    machine.pool.for_chunks(&mut s.x, hidden, |token, x| {
        machine.kernels.add(x, &delta[token * hidden..][..hidden])
    });
}

/// Says where activations stopped being numbers.
pub(crate) fn located(at: impl Fn() -> String) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Kernels(bitnet_kernels::Error::Matrix(bitnet_core::Error::NotFinite { .. })) => {
            Error::NotFinite { at: at() }
        }
        other => other,
    }
}
