//! Text from a model, token by token.

use crate::cache::{CacheType, KvCache};
use crate::run::{Scratch, Step, Want};
use crate::sample::{Sampler, Sampling};
use crate::tokenizer::TextStream;
use crate::{Error, Model, Result};
use std::time::{Duration, Instant};

/// Tokens of a prompt that go through the graph together.
pub(crate) const BATCH: usize = 512;

/// What is generated, and until when.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Most tokens.
    pub max_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Texts that end the generation; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after the model's own end of text.
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
    /// As many tokens as were asked for.
    MaxTokens,
    /// The context is full.
    Context,
}

/// A token of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text that became certain with it: whole characters, and nothing that may be the
    /// beginning of a stop text. The last token brings what was held back.
    pub text: String,
}

/// How long the parts of a generation took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Tokens of the prompt that were computed; those already in the cache are not among them.
    pub prompt_tokens: usize,
    /// Time for them.
    pub prompt: Duration,
    /// Decode steps: generated tokens after the first.
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

/// A sequence that grows: its cache, and the tokens in it.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    cache: KvCache,
    tokens: Vec<u32>,
    scratch: Scratch,
}

impl Model {
    /// An empty session with room for `context` tokens.
    ///
    /// # Errors
    /// [`Error::Option`] for no room at all, or more than the model was made for.
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
            scratch: Scratch::default(),
        })
    }

    /// What the model goes on with after a text, as an iterator of tokens. The context is the
    /// model's, or what the prompt and `max_tokens` need of it.
    ///
    /// # Errors
    /// [`Error::Context`] for a prompt that leaves no room, [`Error::EmptyPrompt`],
    /// [`Error::Tokenizer`], and [`Error::Option`] for sampling that means nothing.
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

    /// Positions that there is room for.
    pub fn context(&self) -> usize {
        self.cache.capacity()
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Forgets everything; the room stays.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.cache.truncate(0);
    }

    /// Makes `tokens` the content of the session: what it begins with already is kept, the rest
    /// computed. Returns the logits after the last one and the number of tokens that were computed.
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
        // The last token is computed again if need be: its logits are wanted.
        let same = self
            .tokens
            .iter()
            .zip(&tokens[..last])
            .take_while(|(a, b)| a == b)
            .count();
        self.tokens.truncate(same);
        self.cache.truncate(same);
        for part in tokens[same..].chunks(BATCH) {
            let end = self.tokens.len() + part.len();
            let want = if end == tokens.len() {
                Want::Last
            } else {
                Want::Nothing
            };
            self.model.forward(
                &mut [Step {
                    cache: &mut self.cache,
                    tokens: part,
                    want,
                }],
                &mut self.scratch,
            )?;
            self.tokens.extend_from_slice(part);
        }
        Ok((&self.scratch.logits, tokens.len() - same))
    }

    /// Appends one token; the logits after it.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn decode(&mut self, token: u32) -> Result<&[f32]> {
        let step = Step {
            cache: &mut self.cache,
            tokens: &[token],
            want: Want::Last,
        };
        self.model.forward(&mut [step], &mut self.scratch)?;
        self.tokens.push(token);
        Ok(&self.scratch.logits)
    }

    /// What the model goes on with after `prompt`; [`Generation::into_session`] gives the session
    /// back.
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

/// A text under way: an iterator of its tokens.
#[derive(Debug)]
pub struct Generation<'m> {
    session: Session<'m>,
    stream: TextStream<'m>,
    sampler: Sampler,
    options: GenerateOptions,
    /// Text that may be the beginning of a stop text.
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

    /// Why it ended; none while it has not.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// How long it took so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// The session with the prompt and what was generated, as far as it went through the model.
    pub fn into_session(self) -> Session<'m> {
        self.session
    }

    /// Makes a token of the text, and the one after it.
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

/// Bytes at the end of `text` that a stop text may begin with.
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
