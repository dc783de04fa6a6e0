//! Generation of text, token by token.

use crate::cache::{CacheType, KvCache};
use crate::forward::{ForwardBuffers, ForwardStep, WantedLogits};
use crate::sample::{Sampler, Sampling};
use crate::tokenizer::TextStream;
use crate::{Error, Model, Result};
use std::time::{Duration, Instant};

/// Number of prompt tokens that one forward pass computes.
pub(crate) const BATCH: usize = 512;

/// Options of a generation.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Largest number of tokens.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end the generation and are not part of it.
    pub stop: Vec<String>,
    /// Whether to continue after the model's end of text.
    pub ignore_eos: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 128,
            sampling: Sampling::default(),
            stop: vec![],
            ignore_eos: false,
        }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended the text.
    EndOfText,
    /// A stop text appeared.
    Stop,
    /// `max_tokens` tokens were generated.
    MaxTokens,
    /// The context is full.
    Context,
}

/// A token of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text that is complete with it: whole characters, without a possible start of a stop
    /// text. The last token has the rest.
    pub text: String,
}

/// Times of a generation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Number of prompt tokens that were computed, without those that were in the cache.
    pub prompt_tokens: usize,
    /// Time for them.
    pub prompt: Duration,
    /// Number of decode steps: generated tokens after the first.
    pub decoded_tokens: usize,
    /// Time for them.
    pub decode: Duration,
}

impl Timings {
    /// Tokens of the prompt per second.
    pub fn prompt_speed(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt.as_secs_f64().max(1e-9)
    }

    /// Decoded tokens per second.
    pub fn decode_speed(&self) -> f64 {
        self.decoded_tokens as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// A sequence that grows: its tokens and their cache.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    cache: KvCache,
    tokens: Vec<u32>,
    scratch: ForwardBuffers,
}

impl Model {
    /// An empty session for `context` tokens.
    ///
    /// # Errors
    /// [`Error::Option`] for a context of 0 or beyond that of the model.
    pub fn session(&self, context: usize, cache: CacheType) -> Result<Session<'_>> {
        if context == 0 || context > self.config().context {
            let got = format!(
                "{context}, and the model was made for at most {}",
                self.config().context
            );
            return Err(Error::Option {
                option: "context",
                expected: "a number of positions that the model has",
                got,
            });
        }
        Ok(Session {
            model: self,
            cache: KvCache::new(self.config(), context, cache),
            tokens: Vec::with_capacity(context),
            scratch: ForwardBuffers::default(),
        })
    }

    /// Continues a text: an iterator of tokens. The context is the model's, or as much of it as the
    /// prompt and `max_tokens` need.
    ///
    /// # Errors
    /// [`Error::Context`] for a prompt that leaves no room, [`Error::EmptyPrompt`],
    /// [`Error::Tokenizer`], and [`Error::Option`] for invalid sampling options.
    pub fn generate(&self, prompt: &str, options: &GenerateOptions) -> Result<Generation<'_>> {
        let tokens = self.tokenizer()?.encode(prompt, true)?;
        let context = tokens
            .len()
            .saturating_add(options.max_tokens)
            .clamp(1, self.config().context);
        self.session(context, CacheType::default())?
            .into_generation(&tokens, options)
    }
}

impl<'m> Session<'m> {
    /// Tokens in the cache.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Largest number of tokens.
    pub fn context(&self) -> usize {
        self.cache.capacity()
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Drops all tokens; the memory stays.
    pub fn clear(&mut self) {
        self.tokens.clear();
        let _ = self.cache.truncate(0);
    }

    /// Sets the tokens of the session. Keeps the cache of the common prefix and computes the rest; a
    /// model with gated delta nets computes all, unless the new tokens continue the old ones.
    /// Returns the logits after the last token and the number of computed tokens.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<(&[f32], usize)> {
        let context = self.cache.capacity();
        if tokens.len() > context {
            return Err(Error::Context {
                got: tokens.len(),
                context,
            });
        }
        let Some(last) = tokens.len().checked_sub(1) else {
            return Err(Error::EmptyPrompt);
        };
        // The last token is always computed, because its logits are needed.
        let same = self
            .tokens
            .iter()
            .zip(&tokens[..last])
            .take_while(|(a, b)| a == b)
            .count();
        let same = self.cache.truncate(same);
        self.tokens.truncate(same);
        for part in tokens[same..].chunks(BATCH) {
            let end = self.tokens.len() + part.len();
            let want = if end == tokens.len() {
                WantedLogits::Last
            } else {
                WantedLogits::Nothing
            };
            self.forward(part, want)?;
        }
        Ok((&self.scratch.logits, tokens.len() - same))
    }

    /// Appends a token and returns the logits after it.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn decode(&mut self, token: u32) -> Result<&[f32]> {
        self.forward(&[token], WantedLogits::Last)?;
        Ok(&self.scratch.logits)
    }

    /// Computes tokens after those of the session.
    fn forward(&mut self, tokens: &[u32], want: WantedLogits) -> Result<()> {
        let step = ForwardStep {
            cache: &mut self.cache,
            tokens,
            want,
        };
        if let Err(error) = self.model.forward(&mut [step], &mut self.scratch) {
            // A cache with states may be empty now.
            self.tokens.truncate(self.cache.len());
            return Err(error);
        }
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    /// Generates after `prompt`. [`Generation::into_session`] returns the session.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn into_generation(
        self,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<Generation<'m>> {
        Generation::new(self, prompt, options)
    }
}

/// A generation in progress: an iterator of its tokens.
#[derive(Debug)]
pub struct Generation<'m> {
    session: Session<'m>,
    stream: TextStream<'m>,
    sampler: Sampler,
    options: GenerateOptions,
    /// Text that may be the start of a stop text.
    held: String,
    /// The token after those in the session.
    next: u32,
    made: usize,
    finish: Option<Finish>,
    failed: bool,
    timings: Timings,
}

impl<'m> Generation<'m> {
    fn new(mut session: Session<'m>, prompt: &[u32], options: &GenerateOptions) -> Result<Self> {
        let mut sampler = Sampler::new(options.sampling.clone())?;
        let stream = TextStream::new(session.model.tokenizer()?, prompt);
        let begin = Instant::now();
        let (logits, computed) = session.prefill(prompt)?;
        prompt.iter().for_each(|&t| sampler.accept(t));
        let next = sampler.next(logits)?;
        let timings = Timings {
            prompt_tokens: computed,
            prompt: begin.elapsed(),
            ..Timings::default()
        };
        let finish = (options.max_tokens == 0).then_some(Finish::MaxTokens);
        Ok(Self {
            session,
            stream,
            sampler,
            options: options.clone(),
            held: String::new(),
            next,
            made: 0,
            finish,
            failed: false,
            timings,
        })
    }

    /// Why the generation ended; none while it runs.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// The times so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// The session with the prompt and the generated tokens, as far as the model has computed them.
    pub fn into_session(self) -> Session<'m> {
        self.session
    }

    /// Returns the next token and computes the one after it.
    fn step(&mut self) -> Result<Token> {
        let id = self.next;
        self.made += 1;
        if !self.options.ignore_eos && self.session.model.config().eos.contains(&id) {
            self.finish = Some(Finish::EndOfText);
        } else {
            self.held += &self.stream.push(id)?;
            if let Some(at) = self
                .options
                .stop
                .iter()
                .filter(|s| !s.is_empty())
                .filter_map(|s| self.held.find(s.as_str()))
                .min()
            {
                self.held.truncate(at);
                self.finish = Some(Finish::Stop);
                return Ok(Token {
                    id,
                    text: std::mem::take(&mut self.held),
                });
            }
            if self.made >= self.options.max_tokens {
                self.finish = Some(Finish::MaxTokens);
            } else if self.session.tokens.len() >= self.session.context() {
                self.finish = Some(Finish::Context);
            }
        }
        if self.finish.is_some() {
            self.held += &self.stream.finish()?;
            return Ok(Token {
                id,
                text: std::mem::take(&mut self.held),
            });
        }
        let begin = Instant::now();
        self.sampler.accept(id);
        let logits = self.session.decode(id)?;
        self.next = self.sampler.next(logits)?;
        self.timings.decoded_tokens += 1;
        self.timings.decode += begin.elapsed();
        let certain = self.held.len() - stop_prefix(&self.held, &self.options.stop);
        let rest = self.held.split_off(certain);
        Ok(Token {
            id,
            text: std::mem::replace(&mut self.held, rest),
        })
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finish.is_some() || self.failed {
            return None;
        }
        let token = self.step();
        self.failed = token.is_err();
        Some(token)
    }
}

/// Number of bytes at the end of `text` that may be the start of a stop text.
fn stop_prefix(text: &str, stop: &[String]) -> usize {
    let longest = |stop: &String| {
        (1..stop.len())
            .rev()
            .find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]))
    };
    stop.iter().filter_map(longest).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::stop_prefix;

    #[test]
    fn what_may_become_a_stop_text_is_held() {
        let stop = ["END".to_string(), "\n\n".to_string(), "é".to_string()];
        for (text, held) in [
            ("the E", 1),
            ("the EN", 2),
            ("the ENx", 0),
            ("a\n", 1),
            ("", 0),
            ("END", 0),
        ] {
            assert_eq!(stop_prefix(text, &stop), held, "{text:?}");
        }
    }
}
