//! Mixtures of experts: a router chooses some feed-forward layers for each token.
//!
//! ```text
//! p = softmax(router · z)                 over all experts
//! w = the k largest of p                  divided by their sum if the model says so
//! y = h + Σ wₑ · downₑ(f(gateₑ·z) ⊙ upₑ·z)   + σ(gate_s · z) · shared(z)
//! ```
//!
//! Each expert multiplies all its tokens of a batch at once. The outputs of a token are added in the
//! order of the experts' numbers, the shared expert last: so a token's result does not depend on the
//! tokens beside it.

use crate::Result;
use crate::config::Config;
use crate::forward::{ForwardPass, NormGain};
use crate::linear::{LayerInput, LinearLayer};
use crate::load::WeightProvider;
use crate::projections::{GatedBuffers, GatedWeights, Projections};
use bitnet_formats::arch::Experts;
use std::cmp::Ordering;

/// Weights of an expert.
#[derive(Debug)]
pub(crate) struct Expert {
    /// `(ffn, hidden)` each.
    pub(crate) gate_up: Projections<2>,
    /// `(hidden, ffn)`.
    pub(crate) down: LinearLayer,
}

/// Weights of the experts of a layer.
#[derive(Debug)]
pub(crate) struct ExpertBlock {
    /// `[hidden]`.
    norm: NormGain,
    /// `(experts, hidden)`.
    router: LinearLayer,
    experts: Vec<Expert>,
    shared: Option<SharedExpert>,
    /// Experts that a token uses.
    used: usize,
}

/// The expert that sees every token.
#[derive(Debug)]
struct SharedExpert {
    expert: Expert,
    /// `(1, hidden)`.
    gate: LinearLayer,
}

impl Expert {
    fn weights(&self, ffn: usize) -> GatedWeights<'_> {
        GatedWeights {
            gate_up: &self.gate_up,
            sub_norm: None,
            down: &self.down,
            ffn,
        }
    }

    fn linears(&self) -> impl Iterator<Item = &LinearLayer> {
        self.gate_up.layers().iter().chain([&self.down])
    }
}

impl ExpertBlock {
    /// Loads the module `mlp`.
    pub(crate) fn load(
        provider: &dyn WeightProvider,
        mlp: &str,
        norm: NormGain,
        facts: &Experts,
    ) -> Result<Self> {
        let hidden = provider.config().hidden;
        let linear = |module: &str, rows, cols| {
            provider.linear(&format!("{mlp}.{module}"), rows, cols, false)
        };
        let shared = match facts.shared_ffn {
            None => None,
            Some(ffn) => Some(SharedExpert {
                expert: Expert {
                    gate_up: Projections::Separate([
                        linear("shared_expert.gate_proj", ffn, hidden)?,
                        linear("shared_expert.up_proj", ffn, hidden)?,
                    ]),
                    down: linear("shared_expert.down_proj", hidden, ffn)?,
                },
                gate: linear("shared_expert_gate", 1, hidden)?,
            }),
        };
        Ok(Self {
            norm,
            router: linear("gate", facts.count, hidden)?,
            experts: provider.experts(mlp, [facts.count, facts.ffn, hidden])?,
            shared,
            used: facts.used,
        })
    }

    /// The linear layers that every token multiplies.
    pub(crate) fn for_all_tokens(&self) -> impl Iterator<Item = &LinearLayer> {
        let shared = self.shared.iter();
        let shared = shared.flat_map(|shared| shared.expert.linears().chain([&shared.gate]));
        [&self.router].into_iter().chain(shared)
    }

    /// The linear layers of which a token multiplies those of some experts.
    pub(crate) fn of_experts(&self) -> impl Iterator<Item = &LinearLayer> {
        self.experts.iter().flat_map(Expert::linears)
    }

    /// The part of [`Self::of_experts`] that a token multiplies, of a sum over all of them.
    pub(crate) fn used_share(&self, sum: usize) -> usize {
        sum / self.experts.len().max(1) * self.used
    }
}

/// The choices of a batch, and buffers of the tokens of an expert.
#[derive(Debug, Default)]
pub(crate) struct RoutingBuffers {
    /// `[tokens, experts]`.
    logits: Vec<f32>,
    /// `[tokens, used]`.
    choices: Vec<Choice>,
    /// The choices by expert, those of an expert by token: indices of `choices`.
    by_expert: Vec<usize>,
    /// Where the choices of each expert begin in `by_expert`, and the end.
    starts: Vec<usize>,
    /// The tokens of an expert, `[tokens of it, hidden]`.
    input: LayerInput,
    /// What it makes of them, `[tokens of it, hidden]`.
    output: Vec<f32>,
    /// Buffers of the experts and of the shared one: each width has its own, which stay.
    gated: GatedBuffers,
    shared: GatedBuffers,
    /// The logits of the shared expert's gate.
    gates: Vec<f32>,
}

/// An expert that a token uses.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Choice {
    expert: usize,
    weight: f32,
}

impl RoutingBuffers {
    /// Chooses experts by `logits`, `[tokens, count]`.
    fn choose(&mut self, facts: &Experts) {
        let (count, used) = (facts.count, facts.used);
        self.choices.clear();
        for logits in self.logits.chunks_exact(count) {
            choose(logits, facts, &mut self.choices);
        }
        // The choices of each expert are counted, then placed behind one another.
        self.starts.clear();
        self.starts.resize(count + 1, 0);
        for choice in &self.choices {
            self.starts[choice.expert + 1] += 1;
        }
        for i in 0..count {
            self.starts[i + 1] += self.starts[i];
        }
        self.by_expert.resize(self.choices.len(), 0);
        for (i, choice) in self.choices.iter().enumerate() {
            let place = &mut self.starts[choice.expert];
            self.by_expert[*place] = i;
            *place += 1;
        }
        // Each start is now the next one's.
        self.starts.rotate_right(1);
        self.starts[0] = 0;
        debug_assert_eq!(self.choices.len() % used.max(1), 0);
    }
}

/// The order of logits: NaN is above all numbers, as in `torch.topk`, and both zeros are equal.
fn compare(a: f32, b: f32) -> Ordering {
    let key = |x: f32| if x.is_nan() { f32::NAN } else { x + 0.0 };
    key(a).total_cmp(&key(b))
}

/// Appends the experts of a token, the most probable first; of equal logits the lower number, which
/// `torch.topk` leaves open.
fn choose(logits: &[f32], facts: &Experts, choices: &mut Vec<Choice>) {
    let first = choices.len();
    let mut last: Option<(f32, usize)> = None;
    for _ in 0..facts.used {
        let mut best: Option<(f32, usize)> = None;
        for (i, &logit) in logits.iter().enumerate() {
            let left = last.is_none_or(|(value, at)| match compare(logit, value) {
                Ordering::Less => true,
                Ordering::Equal => i > at,
                Ordering::Greater => false,
            });
            if left && best.is_none_or(|(value, _)| compare(logit, value).is_gt()) {
                best = Some((logit, i));
            }
        }
        let Some((logit, expert)) = best else { break };
        last = best;
        choices.push(Choice {
            expert,
            weight: logit,
        });
    }
    let chosen = &mut choices[first..];
    let top = f64::from(chosen.first().map_or(0.0, |choice| choice.weight));
    let power = |logit: f32| (f64::from(logit) - top).exp();
    let sum: f64 = match facts.normalized {
        true => chosen.iter().map(|choice| power(choice.weight)).sum(),
        false => logits.iter().map(|&logit| power(logit)).sum(),
    };
    for choice in chosen {
        choice.weight = (power(choice.weight) / sum) as f32;
    }
}

/// `1 / (1 + e^−x)`.
fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
}

/// `to += factor · x`.
fn add_scaled(to: &mut [f32], factor: f32, x: &[f32]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to += factor * x;
    }
}

impl ForwardPass<'_, '_> {
    /// `delta = the weighted outputs of the experts of RMS(x)`.
    pub(crate) fn experts(&mut self, block: &ExpertBlock) -> Result<()> {
        let (config, runtime): (&Config, _) = (self.config, self.runtime);
        let Some(facts) = &config.experts else {
            return Ok(());
        };
        // For no layers: floats in the original basis, from which each layer's input is made.
        self.norm(&block.norm, &[])?;
        let hidden = config.hidden;
        let s = &mut *self.buffers;
        let tokens = s.x.len() / hidden;
        let r = &mut s.routing;
        r.logits.resize(tokens * facts.count, 0.0);
        block.router.apply(runtime, &mut s.normed, &mut r.logits)?;
        r.choose(facts);
        s.delta.clear();
        s.delta.resize(tokens * hidden, 0.0);
        for (i, expert) in block.experts.iter().enumerate() {
            let chosen = &r.by_expert[r.starts[i]..r.starts[i + 1]];
            if chosen.is_empty() {
                continue;
            }
            let x = s.normed.floats(runtime, None);
            let row = |token: usize, out: &mut [f32]| {
                let token = chosen[token] / facts.used;
                out.copy_from_slice(&x[token * hidden..][..hidden]);
            };
            let shape = (chosen.len(), hidden);
            expert
                .gate_up
                .with(|layers| r.input.write(runtime, layers, shape, row))?;
            r.output.resize(chosen.len() * hidden, 0.0);
            let weights = expert.weights(facts.ffn);
            r.gated
                .apply((runtime, config), &weights, &mut r.input, &mut r.output)?;
            for (&choice, output) in chosen.iter().zip(r.output.chunks_exact(hidden)) {
                let delta = &mut s.delta[choice / facts.used * hidden..][..hidden];
                add_scaled(delta, r.choices[choice].weight, output);
            }
        }
        if let (Some(shared), Some(ffn)) = (&block.shared, facts.shared_ffn) {
            r.gates.resize(tokens, 0.0);
            shared.gate.apply(runtime, &mut s.normed, &mut r.gates)?;
            r.output.resize(tokens * hidden, 0.0);
            let weights = shared.expert.weights(ffn);
            r.shared
                .apply((runtime, config), &weights, &mut s.normed, &mut r.output)?;
            let outputs = r.output.chunks_exact(hidden);
            for ((delta, output), &gate) in
                s.delta.chunks_exact_mut(hidden).zip(outputs).zip(&r.gates)
            {
                add_scaled(delta, sigmoid(gate), output);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(count: usize, used: usize, normalized: bool) -> Experts {
        Experts {
            count,
            used,
            ffn: 1,
            normalized,
            shared_ffn: None,
            layers: vec![],
        }
    }

    fn chosen(logits: &[f32], used: usize, normalized: bool) -> Vec<(usize, f32)> {
        let mut choices = vec![];
        choose(logits, &facts(logits.len(), used, normalized), &mut choices);
        choices.iter().map(|c| (c.expert, c.weight)).collect()
    }

    /// softmax of 0, ln 2, ln 5, ln 2 is 0.1, 0.2, 0.5, 0.2.
    #[test]
    fn softmax_over_all_then_the_largest() {
        let logits = [1.0, 2.0, 5.0, 2.0].map(|p: f32| p.ln());
        let close = |got: Vec<(usize, f32)>, expected: &[(usize, f32)]| {
            assert_eq!(got.len(), expected.len());
            for (a, b) in got.iter().zip(expected) {
                assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-6, "{got:?}");
            }
        };
        close(chosen(&logits, 2, false), &[(2, 0.5), (1, 0.2)]);
        close(chosen(&logits, 2, true), &[(2, 5.0 / 7.0), (1, 2.0 / 7.0)]);
        let all = [(2, 0.5), (1, 0.2), (3, 0.2), (0, 0.1)];
        close(chosen(&logits, 4, false), &all);
        close(chosen(&logits, 4, true), &all);
    }

    #[test]
    fn ties_and_what_is_no_number() {
        let order = |logits: &[f32], used| -> Vec<usize> {
            chosen(logits, used, true).iter().map(|c| c.0).collect()
        };
        assert_eq!(order(&[0.0, -0.0, 0.0], 3), [0, 1, 2]);
        assert_eq!(order(&[1.0, 3.0, 3.0, 1.0], 3), [1, 2, 0]);
        // torch.topk takes NaN for the largest.
        let nan = f32::NAN;
        assert_eq!(order(&[1.0, nan, 2.0, -nan, 0.0, 5.0], 3), [1, 3, 5]);
        assert_eq!(
            order(&[f32::INFINITY, f32::NEG_INFINITY, nan], 3),
            [2, 0, 1]
        );
        let large = chosen(&[1e30, -1e30], 2, false);
        assert_eq!(large, [(0, 1.0), (1, 0.0)]);
    }

    #[test]
    fn choices_by_expert() {
        let mut routing = RoutingBuffers {
            logits: vec![0.0, 2.0, 1.0, 3.0, 0.0, 1.0, 0.0, 2.0, 1.0],
            ..RoutingBuffers::default()
        };
        for _ in 0..2 {
            routing.choose(&facts(3, 2, true));
            // Tokens 0, 1 and 2 use experts (1, 2), (0, 2) and (1, 2).
            assert_eq!(routing.starts, [0, 1, 3, 6]);
            assert_eq!(routing.by_expert, [2, 0, 4, 1, 3, 5]);
        }
    }
}
