//! Perplexity of a model on a text, and divergence from a reference model.
//!
//! The text is cut into windows of `context` tokens that start `stride` tokens apart. A window
//! scores the tokens that no earlier window scored, so every token but the first is scored once.
//! With a stride of half the context, each token after the first window has at least half a context
//! before it.
//!
//! ```text
//! perplexity = exp(mean of −ln p(token | tokens before it in its window))
//! KL = mean of Σ_t p_ref(t) · ln(p_ref(t) / p(t))
//! same top = share of positions where both models have the same likeliest token
//! ```
//!
//! Standard errors treat the scored tokens as independent.

use crate::cache::{CacheType, KvCache};
use crate::forward::{ForwardBuffers, ForwardStep, WantedLogits};
use crate::{Error, Model, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a text is cut into windows.
#[derive(Debug, Clone, Copy)]
pub struct Windows {
    /// Tokens of a window.
    pub context: usize,
    /// Tokens between the starts of two windows, from 1 to `context`.
    pub stride: usize,
    /// Type of the KV cache.
    pub cache: CacheType,
}

impl Windows {
    /// The windows of a text of `len` tokens, each with its first scored token.
    fn split(&self, len: usize) -> Result<Vec<(Range<usize>, usize)>> {
        let bad = |option, expected, got: usize| {
            Err(Error::Option {
                option,
                expected,
                got: got.to_string(),
            })
        };
        if self.context < 2 {
            return bad("context", "at least 2 tokens", self.context);
        }
        if self.stride == 0 || self.stride > self.context {
            return bad("stride", "a number from 1 to the context", self.stride);
        }
        if len < 2 {
            return bad("text", "at least 2 tokens", len);
        }
        let (mut windows, mut scored, mut start) = (vec![], 1, 0);
        while scored < len {
            let end = (start + self.context).min(len);
            // The first token of a window has no context, so it is not scored.
            scored = scored.max(start + 1);
            if scored < end {
                windows.push((start..end, scored));
            }
            scored = scored.max(end);
            start += self.stride;
        }
        Ok(windows)
    }
}

/// Mean and standard error of numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Mean {
    count: u64,
    sum: f64,
    squares: f64,
}

impl Mean {
    fn add(&mut self, x: f64) {
        self.count += 1;
        self.sum += x;
        self.squares += x * x;
    }

    /// Count of the numbers.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Mean of the numbers.
    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// Standard error of the mean, for independent numbers.
    pub fn error(&self) -> f64 {
        let n = self.count.max(2) as f64;
        ((self.squares / n - (self.sum / n).powi(2)).max(0.0) / (n - 1.0)).sqrt()
    }
}

/// The loss of one model on a text.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// −ln p of the scored tokens, in nats.
    pub loss: Mean,
}

impl Perplexity {
    /// The perplexity, exp(mean loss).
    pub fn value(&self) -> f64 {
        self.loss.mean().exp()
    }

    /// Standard error of the perplexity, by the derivative of exp.
    pub fn error(&self) -> f64 {
        self.value() * self.loss.error()
    }
}

/// A model compared with a reference on a text.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PerplexityComparison {
    /// The model.
    pub model: Perplexity,
    /// The reference.
    pub reference: Perplexity,
    /// The model's loss minus the reference's, token by token. Its standard error is smaller than
    /// those of the two losses, because these are correlated.
    pub difference: Mean,
    /// Kullback–Leibler divergence from the reference, in nats.
    pub divergence: Mean,
    /// 1 where both have the same likeliest token, else 0.
    pub same_top: Mean,
}

/// Called with the number of tokens done and the total.
pub type TokenProgress<'a> = &'a dyn Fn(usize, usize);

/// Measures the perplexity of a model on a text.
///
/// # Errors
/// [`Error::Option`] for invalid windows or a text of less than two tokens; as
/// [`Model::forward`]; [`Error::Interrupted`].
pub fn perplexity(
    model: &Model,
    tokens: &[u32],
    windows: &Windows,
    progress: TokenProgress<'_>,
    interrupt: &AtomicBool,
) -> Result<Perplexity> {
    let mut result = Perplexity::default();
    sweep(
        &[model],
        tokens,
        windows,
        progress,
        interrupt,
        |logits, next| {
            let p = log_softmax(logits[0], &mut [])?;
            result.loss.add(-p.log_probability(logits[0], next));
            Ok(())
        },
    )?;
    Ok(result)
}

/// Compares a model with a reference on the same text.
///
/// # Errors
/// As [`perplexity()`]; [`Error::Option`] for models with vocabularies of different sizes.
pub fn compare(
    model: &Model,
    reference: &Model,
    tokens: &[u32],
    windows: &Windows,
    progress: TokenProgress<'_>,
    interrupt: &AtomicBool,
) -> Result<PerplexityComparison> {
    let (ours, theirs) = (model.config().vocab, reference.config().vocab);
    if ours != theirs {
        return Err(Error::Option {
            option: "reference",
            expected: "a model with the same vocabulary",
            got: format!("{theirs} tokens, not {ours}"),
        });
    }
    let mut result = PerplexityComparison::default();
    let mut shares = vec![0.0; theirs];
    sweep(
        &[model, reference],
        tokens,
        windows,
        progress,
        interrupt,
        |logits, next| {
            let p = log_softmax(logits[0], &mut [])?;
            let q = log_softmax(logits[1], &mut shares)?;
            let (loss, other) = (
                -p.log_probability(logits[0], next),
                -q.log_probability(logits[1], next),
            );
            result.model.loss.add(loss);
            result.reference.loss.add(other);
            result.difference.add(loss - other);
            let both = logits[0].iter().zip(logits[1]).zip(&shares);
            // Rounding may turn a divergence of 0 into −1e-17.
            let divergence: f64 = both
                .map(|((&a, &b), share)| {
                    share * ((f64::from(b) - q.log_sum) - (f64::from(a) - p.log_sum))
                })
                .sum();
            result.divergence.add(divergence.max(0.0));
            result.same_top.add(f64::from(u8::from(p.top == q.top)));
            Ok(())
        },
    )?;
    Ok(result)
}

/// The logarithm of the denominator of a softmax, and its likeliest token.
struct Softmax {
    log_sum: f64,
    top: usize,
}

impl Softmax {
    /// ln p of one token.
    fn log_probability(&self, logits: &[f32], token: u32) -> f64 {
        f64::from(logits[token as usize]) - self.log_sum
    }
}

/// Fills `shares` with the probabilities, if it is as long as the logits.
fn log_softmax(logits: &[f32], shares: &mut [f64]) -> Result<Softmax> {
    let (top, max) = logits
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (i, &x)| {
            if x > best.1 { (i, x) } else { best }
        });
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    if !sum.is_finite() {
        return Err(Error::NotFinite {
            at: "output".into(),
        });
    }
    let log_sum = sum.ln() + f64::from(max);
    shares
        .iter_mut()
        .zip(logits)
        .for_each(|(s, &x)| *s = (f64::from(x) - log_sum).exp());
    Ok(Softmax { log_sum, top })
}

/// Number of tokens whose logits are in memory at once.
const BATCH: usize = 64;

/// Calls `each` for every scored token with the logits of all models at the token before it.
fn sweep(
    models: &[&Model],
    tokens: &[u32],
    windows: &Windows,
    progress: TokenProgress<'_>,
    interrupt: &AtomicBool,
    mut each: impl FnMut(&[&[f32]], u32) -> Result<()>,
) -> Result<()> {
    let all = windows.split(tokens.len())?;
    let mut caches: Vec<KvCache> = models
        .iter()
        .map(|m| KvCache::new(m.config(), windows.context, windows.cache))
        .collect();
    let mut scratches: Vec<ForwardBuffers> =
        models.iter().map(|_| ForwardBuffers::default()).collect();
    for (window, first) in all {
        caches.iter_mut().for_each(|c| _ = c.truncate(0));
        // The logits of token i − 1 predict token i, so the last token of a window is left out.
        let cuts = [
            (window.start, first - 1, WantedLogits::Nothing),
            (first - 1, window.end - 1, WantedLogits::All),
        ];
        for (start, end, want) in cuts {
            let batch = if want == WantedLogits::All {
                BATCH
            } else {
                crate::generate::BATCH
            };
            for at in (start..end).step_by(batch) {
                if interrupt.load(Ordering::Relaxed) {
                    return Err(Error::Interrupted);
                }
                let part = &tokens[at..end.min(at + batch)];
                let mut logits: Vec<&[f32]> = vec![];
                for ((model, cache), scratch) in models.iter().zip(&mut caches).zip(&mut scratches)
                {
                    logits.push(model.forward(
                        &mut [ForwardStep {
                            cache,
                            tokens: part,
                            want,
                        }],
                        scratch,
                    )?);
                }
                if want == WantedLogits::All {
                    for i in 0..part.len() {
                        let rows: Vec<&[f32]> = logits
                            .iter()
                            .zip(models)
                            .map(|(l, m)| &l[i * m.config().vocab..][..m.config().vocab])
                            .collect();
                        each(&rows, tokens[at + i + 1])?;
                    }
                }
                progress(at + part.len(), tokens.len());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_scored_once() {
        for (len, context, stride) in [
            (2, 2, 1),
            (10, 4, 2),
            (11, 4, 4),
            (100, 16, 8),
            (5, 100, 50),
            (17, 8, 3),
        ] {
            let windows = Windows {
                context,
                stride,
                cache: CacheType::F16,
            }
            .split(len)
            .unwrap();
            let mut scored = vec![0; len];
            for (window, first) in &windows {
                assert!(window.len() <= context && window.start < *first && *first < window.end);
                (*first..window.end).for_each(|i| scored[i] += 1);
            }
            assert_eq!(scored[0], 0);
            // Windows that do not overlap cannot predict their first token.
            let lost = if stride == context {
                (1..len).filter(|i| i % context == 0).count()
            } else {
                0
            };
            assert_eq!(
                scored[1..].iter().filter(|&&n| n == 1).count(),
                len - 1 - lost,
                "{len} {context} {stride}"
            );
        }
    }

    #[test]
    fn windows_that_mean_nothing_are_refused() {
        let windows = |context, stride| Windows {
            context,
            stride,
            cache: CacheType::F16,
        };
        assert!(
            windows(1, 1).split(10).is_err()
                && windows(4, 0).split(10).is_err()
                && windows(4, 5).split(10).is_err()
                && windows(4, 2).split(1).is_err()
        );
    }

    #[test]
    fn mean_and_error_are_those_of_the_definition() {
        let mut mean = Mean::default();
        [1.0, 2.0, 4.0, 7.0].into_iter().for_each(|x| mean.add(x));
        assert_eq!(mean.mean(), 3.5);
        // numpy: np.std([1, 2, 4, 7], ddof=1) / 2
        assert!((mean.error() - 1.322_875_655_532_295_3).abs() < 1e-12);
    }
}
