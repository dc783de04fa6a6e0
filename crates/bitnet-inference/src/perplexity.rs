//! How well a model predicts a text, and how far its predictions are from another model's.
//!
//! The text is cut into windows of `context` tokens, each `stride` after the one before. A window
//! scores the tokens that no window before it has scored, so every token but the first is scored
//! once, and with a stride of half the context every later one has half a context at least before
//! it.
//!
//! ```text
//! perplexity = exp(mean of −ln p(token | tokens before it in its window))
//! KL = mean of Σ_t p_ref(t) · ln(p_ref(t) / p(t))        same top = share of positions where both find the same token likeliest
//! ```
//!
//! Standard errors treat scored tokens as independent, which they nearly are.

use crate::cache::{CacheType, KvCache};
use crate::run::{Scratch, Step, Want};
use crate::{Error, Model, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a text is cut.
#[derive(Debug, Clone, Copy)]
pub struct Windows {
    /// Tokens of a window.
    pub context: usize,
    /// Tokens from the start of one window to that of the next; from 1 to `context`.
    pub stride: usize,
    /// How keys and values are kept.
    pub cache: CacheType,
}

impl Windows {
    /// Windows of a text of `len` tokens: its tokens, and of those the first that is scored.
    fn of(&self, len: usize) -> Result<Vec<(Range<usize>, usize)>> {
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
            // A window that begins with a token not scored yet has nothing to predict it from.
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

/// Mean and standard error of many numbers.
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

    /// How many.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean.
    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// The standard error of the mean, taking them as independent.
    pub fn error(&self) -> f64 {
        let n = self.count.max(2) as f64;
        ((self.squares / n - (self.sum / n).powi(2)).max(0.0) / (n - 1.0)).sqrt()
    }
}

/// What one model makes of a text.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// −ln p of the scored tokens, in nats.
    pub loss: Mean,
}

impl Perplexity {
    /// e to the mean loss.
    pub fn value(&self) -> f64 {
        self.loss.mean().exp()
    }

    /// Its standard error, by the derivative of exp.
    pub fn error(&self) -> f64 {
        self.value() * self.loss.error()
    }
}

/// What two models make of a text.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Comparison {
    /// The model.
    pub model: Perplexity,
    /// The reference.
    pub reference: Perplexity,
    /// The model's loss less the reference's, token by token: its error is smaller than those of
    /// the two, since they miss the same tokens.
    pub difference: Mean,
    /// Kullback–Leibler divergence from the reference, in nats.
    pub divergence: Mean,
    /// 1 where both find the same token likeliest, else 0.
    pub same_top: Mean,
}

/// What is told while it runs: tokens done and tokens in all.
pub type Progress<'a> = &'a dyn Fn(usize, usize);

/// The perplexity of a text under a model.
///
/// # Errors
/// [`Error::Option`] for windows that mean nothing or a text of less than two tokens; as
/// [`Model::forward`]; [`Error::Interrupted`].
pub fn perplexity(
    model: &Model,
    tokens: &[u32],
    windows: &Windows,
    progress: Progress<'_>,
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
            result.loss.add(-p.of(logits[0], next));
            Ok(())
        },
    )?;
    Ok(result)
}

/// Two models on the same text.
///
/// # Errors
/// As [`perplexity()`]; [`Error::Option`] for models with vocabularies of different sizes.
pub fn compare(
    model: &Model,
    reference: &Model,
    tokens: &[u32],
    windows: &Windows,
    progress: Progress<'_>,
    interrupt: &AtomicBool,
) -> Result<Comparison> {
    let (ours, theirs) = (model.config().vocab, reference.config().vocab);
    if ours != theirs {
        return Err(Error::Option {
            option: "reference",
            expected: "a model with the same vocabulary",
            got: format!("{theirs} tokens, not {ours}"),
        });
    }
    let mut result = Comparison::default();
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
            let (loss, other) = (-p.of(logits[0], next), -q.of(logits[1], next));
            result.model.loss.add(loss);
            result.reference.loss.add(other);
            result.difference.add(loss - other);
            let both = logits[0].iter().zip(logits[1]).zip(&shares);
            // Rounding may leave −1e-17 of a divergence that is 0.
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

/// The sum and the top of a softmax.
struct Softmax {
    log_sum: f64,
    top: usize,
}

impl Softmax {
    /// ln p of one token.
    fn of(&self, logits: &[f32], token: u32) -> f64 {
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

/// Tokens whose logits are in memory together.
const BATCH: usize = 64;

/// Calls `each` with every model's logits before a scored token, and that token.
fn sweep(
    models: &[&Model],
    tokens: &[u32],
    windows: &Windows,
    progress: Progress<'_>,
    interrupt: &AtomicBool,
    mut each: impl FnMut(&[&[f32]], u32) -> Result<()>,
) -> Result<()> {
    let all = windows.of(tokens.len())?;
    let mut caches: Vec<KvCache> = models
        .iter()
        .map(|m| KvCache::new(m.config(), windows.context, windows.cache))
        .collect();
    let mut scratches: Vec<Scratch> = models.iter().map(|_| Scratch::default()).collect();
    for (window, first) in all {
        caches.iter_mut().for_each(|c| c.truncate(0));
        // The logits of token i − 1 predict token i, so the last token of a window is not computed.
        let cuts = [
            (window.start, first - 1, Want::Nothing),
            (first - 1, window.end - 1, Want::All),
        ];
        for (start, end, want) in cuts {
            let batch = if want == Want::All {
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
                        &mut [Step {
                            cache,
                            tokens: part,
                            want,
                        }],
                        scratch,
                    )?);
                }
                if want == Want::All {
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
            .of(len)
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
            windows(1, 1).of(10).is_err()
                && windows(4, 0).of(10).is_err()
                && windows(4, 5).of(10).is_err()
                && windows(4, 2).of(1).is_err()
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
