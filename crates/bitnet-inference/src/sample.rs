//! Sampling: the choice of the next token.

use crate::{Error, Result};
use bitnet_core::random::Random;

/// Options of sampling. The steps apply in this order, as in Hugging Face transformers:
/// repetition penalty, temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens whose probability is at least this share of the largest; 0 keeps all.
    pub min_p: f32,
    /// Penalty on tokens that occurred: divides positive logits, multiplies negative ones; 1 for no
    /// penalty.
    pub repetition_penalty: f32,
    /// Random seed. The same seed, model and prompt give the same text.
    pub seed: u64,
}

impl Default for Sampling {
    /// Always the likeliest token.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Rejects invalid numbers.
    ///
    /// # Errors
    /// [`Error::Option`] with the name of the number.
    pub fn check(&self) -> Result<()> {
        let check = |option, x: f32, ok: bool, expected| {
            if ok {
                Ok(())
            } else {
                Err(Error::Option {
                    option,
                    expected,
                    got: x.to_string(),
                })
            }
        };
        let share = |x: f32| (0.0..=1.0).contains(&x);
        check(
            "temperature",
            self.temperature,
            self.temperature.is_finite() && self.temperature >= 0.0,
            "a number of at least 0",
        )?;
        check(
            "top-p",
            self.top_p,
            share(self.top_p) && self.top_p > 0.0,
            "a share above 0 and at most 1",
        )?;
        check(
            "min-p",
            self.min_p,
            share(self.min_p),
            "a share from 0 to 1",
        )?;
        let penalty = self.repetition_penalty;
        check(
            "repetition penalty",
            penalty,
            penalty.is_finite() && penalty > 0.0,
            "a number above 0",
        )
    }
}

/// Chooses tokens by their logits.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: Random,
    /// Tokens and their logits, likeliest first once sorted.
    candidates: Vec<(u32, f32)>,
    probabilities: Vec<f64>,
    /// Whether a token has occurred.
    seen: Vec<bool>,
}

impl Sampler {
    /// A sampler with the random numbers of `sampling.seed`.
    ///
    /// # Errors
    /// As [`Sampling::check`].
    pub fn new(sampling: Sampling) -> Result<Self> {
        sampling.check()?;
        Ok(Self {
            random: Random::new(sampling.seed),
            sampling,
            candidates: vec![],
            probabilities: vec![],
            seen: vec![],
        })
    }

    /// Records a token of the text, for the repetition penalty.
    pub fn accept(&mut self, token: u32) {
        if self.sampling.repetition_penalty != 1.0 {
            let token = token as usize;
            if token >= self.seen.len() {
                self.seen.resize(token + 1, false);
            }
            self.seen[token] = true;
        }
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a logit is NaN or infinite.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32> {
        if !logits.iter().fold(true, |ok, x| ok & x.is_finite()) {
            return Err(Error::NotFinite {
                at: "output".into(),
            });
        }
        if self.sampling.temperature == 0.0 {
            return Ok(self.likeliest(logits));
        }
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        candidates.extend(logits.iter().enumerate().map(|(id, &logit)| {
            (
                id as u32,
                self.penalised(id, logit) / self.sampling.temperature,
            )
        }));
        self.candidates = candidates;
        let top = self
            .candidates
            .iter()
            .fold(f32::NEG_INFINITY, |m, c| m.max(c.1));
        self.filter(top);
        Ok(self.draw(top))
    }

    /// The logit of a token after the repetition penalty.
    fn penalised(&self, id: usize, logit: f32) -> f32 {
        let penalty = self.sampling.repetition_penalty;
        match self.seen.get(id) {
            Some(true) if logit > 0.0 => logit / penalty,
            Some(true) => logit * penalty,
            _ => logit,
        }
    }

    /// The first token with the largest logit.
    fn likeliest(&self, logits: &[f32]) -> u32 {
        let mut best = (0, f32::NEG_INFINITY);
        for (id, &logit) in logits.iter().enumerate() {
            let logit = self.penalised(id, logit);
            if logit > best.1 {
                best = (id, logit);
            }
        }
        best.0 as u32
    }

    /// Applies top-k, top-p and min-p to the candidates; `top` is the largest logit.
    fn filter(&mut self, top: f32) {
        let (s, candidates) = (&self.sampling, &mut self.candidates);
        if s.top_k > 0 && s.top_k < candidates.len() {
            likeliest_first(candidates, s.top_k);
            candidates.truncate(s.top_k);
        }
        if s.top_p < 1.0 {
            let all: f64 = candidates.iter().map(|c| weight(c.1, top)).sum();
            let enough = f64::from(s.top_p) * all;
            // Sorts the 64 likeliest, then twice as many, until they reach the share.
            let mut sorted = 64;
            let kept = loop {
                likeliest_first(candidates, sorted);
                let mut sum = 0.0;
                let reached = candidates.iter().take(sorted).position(|c| {
                    sum += weight(c.1, top);
                    sum >= enough
                });
                match reached {
                    Some(i) => break i + 1,
                    None if sorted >= candidates.len() => break candidates.len(),
                    None => sorted *= 2,
                }
            };
            candidates.truncate(kept);
        }
        if s.min_p > 0.0 {
            candidates.retain(|c| weight(c.1, top) >= f64::from(s.min_p));
        }
    }

    /// Draws one of the candidates by their probabilities.
    fn draw(&mut self, top: f32) -> u32 {
        self.probabilities.clear();
        self.probabilities
            .extend(self.candidates.iter().map(|c| weight(c.1, top)));
        let mut left = self.random.uniform() * self.probabilities.iter().sum::<f64>();
        for (candidate, p) in self.candidates.iter().zip(&self.probabilities) {
            left -= p;
            if left < 0.0 {
                return candidate.0;
            }
        }
        // Rounding may leave a rest; then it is the last candidate.
        self.candidates.last().map_or(0, |c| c.0)
    }
}

/// The probability of a logit relative to that of the largest, `top`.
fn weight(logit: f32, top: f32) -> f64 {
    f64::from(logit - top).exp()
}

/// Moves the `count` likeliest candidates to the front, sorted; ties by id.
fn likeliest_first(candidates: &mut [(u32, f32)], count: usize) {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let count = count.min(candidates.len());
    if count > 0 && count < candidates.len() {
        candidates.select_nth_unstable_by(count - 1, order);
    }
    candidates[..count].sort_unstable_by(order);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares of the tokens in many draws.
    fn shares(sampling: Sampling, logits: &[f32], seen: &[u32]) -> Vec<f64> {
        let mut sampler = Sampler::new(sampling).unwrap();
        seen.iter().for_each(|&t| sampler.accept(t));
        let mut counts = vec![0.0; logits.len()];
        let draws = 40_000;
        for _ in 0..draws {
            counts[sampler.next(logits).unwrap() as usize] += 1.0 / f64::from(draws);
        }
        counts
    }

    fn softmax(logits: &[f32]) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|w| w / sum).collect()
    }

    #[track_caller]
    fn near(got: &[f64], expected: &[f64]) {
        // Four standard deviations of a share of 40000 draws.
        assert!(
            got.iter().zip(expected).all(|(g, e)| (g - e).abs() < 0.01),
            "{got:?} and {expected:?}"
        );
    }

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.5, -1.0, 0.0];

    #[test]
    fn draws_follow_the_distribution() {
        let one = Sampling {
            temperature: 1.0,
            ..Default::default()
        };
        near(&shares(one.clone(), &LOGITS, &[]), &softmax(&LOGITS));
        near(
            &shares(
                Sampling {
                    temperature: 2.0,
                    ..one.clone()
                },
                &LOGITS,
                &[],
            ),
            &softmax(&LOGITS.map(|x| x / 2.0)),
        );
        let two = softmax(&[3.0, 2.5]);
        let expected = [0.0, two[0], two[1], 0.0, 0.0];
        near(
            &shares(
                Sampling {
                    top_k: 2,
                    ..one.clone()
                },
                &LOGITS,
                &[],
            ),
            &expected,
        );
        // The two likeliest have 0.88 together, the likeliest alone 0.55.
        near(
            &shares(
                Sampling {
                    top_p: 0.8,
                    ..one.clone()
                },
                &LOGITS,
                &[],
            ),
            &expected,
        );
        near(
            &shares(
                Sampling {
                    min_p: 0.5,
                    ..one.clone()
                },
                &LOGITS,
                &[],
            ),
            &expected,
        );
        let penalised = [1.0, 1.5, 2.5, -2.0, 0.0];
        near(
            &shares(
                Sampling {
                    repetition_penalty: 2.0,
                    ..one
                },
                &LOGITS,
                &[1, 3],
            ),
            &softmax(&penalised),
        );
    }

    #[test]
    fn top_p_over_many_equal_tokens_keeps_the_smaller_ids() {
        let sampling = Sampling {
            temperature: 1.0,
            top_p: 0.5,
            ..Default::default()
        };
        let mut sampler = Sampler::new(sampling).unwrap();
        for _ in 0..2000 {
            assert!(sampler.next(&[0.0; 1000]).unwrap() < 501);
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest_and_seeds_repeat() {
        let mut greedy = Sampler::new(Sampling::default()).unwrap();
        assert_eq!(greedy.next(&[0.0, 2.0, 2.0]).unwrap(), 1);
        let draw = |seed| {
            let mut s = Sampler::new(Sampling {
                temperature: 1.0,
                seed,
                ..Default::default()
            })
            .unwrap();
            (0..50)
                .map(|_| s.next(&LOGITS).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        for (sampling, name) in [
            (
                Sampling {
                    temperature: -1.0,
                    ..Default::default()
                },
                "temperature",
            ),
            (
                Sampling {
                    temperature: f32::NAN,
                    ..Default::default()
                },
                "temperature",
            ),
            (
                Sampling {
                    top_p: 0.0,
                    ..Default::default()
                },
                "top-p",
            ),
            (
                Sampling {
                    min_p: 1.5,
                    ..Default::default()
                },
                "min-p",
            ),
            (
                Sampling {
                    repetition_penalty: 0.0,
                    ..Default::default()
                },
                "repetition penalty",
            ),
        ] {
            assert!(
                Sampler::new(sampling)
                    .unwrap_err()
                    .to_string()
                    .contains(name)
            );
        }
        assert!(
            Sampler::new(Sampling::default())
                .unwrap()
                .next(&[0.0, f32::NAN])
                .is_err()
        );
    }
}
