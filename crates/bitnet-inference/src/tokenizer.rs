//! Text to tokens and back: tokenizer.json, or the vocabulary of a GGUF.

use crate::{Config, Error, Result};
use bitnet_formats::arch::hf_tokenizer;
use bitnet_formats::{Kind, Source};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// The tokenizer of a model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Token to put first where the settings ask for one and the tokenizer's own template does not add it.
    first: Option<u32>,
}

impl Tokenizer {
    /// The tokenizer of an open checkpoint.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none, it cannot be used, or it has tokens that the model has not.
    pub(crate) fn read(source: &Source, config: &Config) -> Result<Self> {
        let bad = |path: &Path, what: String| Error::Tokenizer { path: path.to_path_buf(), what };
        let (path, bytes, settings) = if source.kind == Kind::Gguf {
            let path = source.path.clone();
            let (tokenizer, settings) = hf_tokenizer(&source.gguf).ok_or_else(|| bad(&path, gguf_kind(source)))?;
            (path, tokenizer.to_string().into_bytes(), settings)
        } else {
            let path = source.path.join("tokenizer.json");
            let bytes = fs::read(&path).map_err(|e| bad(&path, e.to_string()))?;
            (path, bytes, read_json(&source.path.join("tokenizer_config.json"))?.unwrap_or(Value::Null))
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| bad(&path, e.to_string()))?;
        // Limits for training batches are no limits here.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| bad(&path, e.to_string()))?;
        let largest = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if largest > config.vocab {
            return Err(bad(&path, format!("expected at most {} tokens, the model's vocabulary, got {largest}", config.vocab)));
        }
        let mut tokenizer = Self { inner, first: None };
        if settings["add_bos_token"] == true
            && let Some(bos) = config.bos
            && tokenizer.encode("", true)?.first() != Some(&bos)
        {
            tokenizer.first = Some(bos);
        }
        Ok(tokenizer)
    }

    /// The tokens of a text. `special` adds those that the tokenizer puts around every text. The texts of special tokens become those tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the tokenizer finds none.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special).map_err(|e| Error::Tokenizer { path: "text".into(), what: e.to_string() })?;
        let first = self.first.filter(|_| special);
        Ok(first.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// The text of tokens, special ones left out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, true).map_err(|e| Error::Tokenizer { path: "tokens".into(), what: e.to_string() })
    }

    /// The id of a token by its text.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// The text of one token as the vocabulary has it, special ones too.
    pub fn name(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }
}

/// Why the vocabulary of a GGUF cannot be used.
fn gguf_kind(source: &Source) -> String {
    let get = |key: &str| source.gguf.iter().find(|(k, _)| k == key).map_or("none".into(), |(_, v)| v.preview(40));
    let (model, pre) = (get("tokenizer.ggml.model"), get("tokenizer.ggml.pre"));
    format!("expected a byte-level BPE vocabulary with words that are known, got model {model}, pre {pre}")
}

pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    match fs::read(path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(e) => Err(bitnet_formats::Error::file(path, "JSON", e.to_string()).into()),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(bitnet_formats::Error::io(path, "read")(e).into()),
    }
}

/// Text of tokens that come one at a time: never half a character.
///
/// Every piece is what the tokens since a safe point decode to, less what was said of them. So decoders that look at neighbours (spaces of sentence
/// pieces, bytes of one character) see them.
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    tokens: Vec<u32>,
    /// Tokens before this one are done with.
    start: usize,
    /// Tokens before this one have been said.
    said: usize,
}

impl<'t> TextStream<'t> {
    /// Text that follows `before`.
    pub fn new(tokenizer: &'t Tokenizer, before: &[u32]) -> Self {
        let tokens = before[before.len().saturating_sub(6)..].to_vec();
        let said = tokens.len();
        Self { tokenizer, tokens, start: 0, said }
    }

    /// The text that became certain with this token; empty in the middle of a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        let text = self.rest()?;
        if text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.advance();
        Ok(text)
    }

    /// What is left at the end, with � for an unfinished character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.rest()?;
        self.advance();
        Ok(text)
    }

    fn advance(&mut self) {
        if self.said < self.tokens.len() {
            self.start = self.said;
            self.said = self.tokens.len();
        }
        // The safe point moves on, so the buffer need not grow with the text.
        self.tokens.drain(..self.start);
        self.said -= self.start;
        self.start = 0;
    }

    fn rest(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.tokens[self.start..self.said])?;
        let all = self.tokenizer.decode(&self.tokens[self.start..])?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}
