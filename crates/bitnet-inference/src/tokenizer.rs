//! Text to tokens and back: tokenizer.json, or the vocabulary of a GGUF.

use crate::hostile::{check_growth, check_tables, without_panic};
use crate::{Config, Error, Result};
use bitnet_formats::arch::{GgufTokenizer, gguf_bpe};
use bitnet_formats::{Kind, Source, hints, python_json};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};

/// The tokenizer of a model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Start token that the settings request and the tokenizer's own template does not add.
    first: Option<u32>,
    /// The file, for messages.
    path: PathBuf,
    /// Rows of the embedding.
    rows: usize,
    notes: Vec<String>,
}

impl Tokenizer {
    /// Reads the tokenizer of an open checkpoint.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none or it cannot be used.
    pub(crate) fn read(source: &Source, config: &Config) -> Result<Self> {
        without_panic(|| Self::read_trusting(source, config)).unwrap_or_else(|what| {
            Err(Error::Tokenizer {
                path: source.path().to_path_buf(),
                what,
            })
        })
    }

    /// [`Tokenizer::read`] that panics on some files.
    fn read_trusting(source: &Source, config: &Config) -> Result<Self> {
        let bad = |path: &Path, what: String| Error::Tokenizer {
            path: path.to_path_buf(),
            what,
        };
        let (path, inner, settings) = if source.kind() == Kind::Gguf {
            let path = source.path().to_path_buf();
            let tokenizer = gguf_bpe(source.gguf()).ok_or_else(|| bad(&path, gguf_kind(source)))?;
            let inner = build(&tokenizer).map_err(|e| bad(&path, e.to_string()))?;
            (path, inner, tokenizer.settings)
        } else {
            let path = source.path().join("tokenizer.json");
            let none = || hints::no_tokenizer(&path).unwrap_or("there is none".into());
            let text = read_text(&path)?.ok_or_else(|| bad(&path, none()))?;
            check_tables(&text).map_err(|what| bad(&path, what))?;
            // Not `from_bytes`, which is generic: it would compile the parser into this crate.
            let mut inner: tokenizers::Tokenizer =
                text.parse().map_err(|e| bad(&path, format!("{e}")))?;
            // Padding and truncation are for training batches.
            inner.with_padding(None);
            inner
                .with_truncation(None)
                .map_err(|e| bad(&path, e.to_string()))?;
            let normalizer = serde_json::to_value(inner.get_normalizer()).unwrap_or_default();
            check_growth(&normalizer).map_err(|what| bad(&path, what))?;
            let settings = read_json(&source.path().join("tokenizer_config.json"))?;
            (path, inner, settings.unwrap_or(Value::Null))
        };
        let notes = beyond(&inner, config.vocab)
            .map(|what| format!("{}: {what}", path.display()))
            .into_iter()
            .collect();
        let mut tokenizer = Self {
            inner,
            first: None,
            path,
            rows: config.vocab,
            notes,
        };
        if settings["add_bos_token"] == true
            && let Some(bos) = config.bos
            && tokenizer.encode("", true)?.first() != Some(&bos)
        {
            tokenizer.first = Some(bos);
        }
        Ok(tokenizer)
    }

    /// The tokens of a text. `special` adds the tokens that the tokenizer puts around every text.
    /// The names of special tokens in the text become those tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails, or gives a token that the embedding has no row
    /// for.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let bad = |what: String| Error::Tokenizer {
            path: self.path.clone(),
            what,
        };
        let encoding = without_panic(|| self.inner.encode_fast(text, special))
            .map_err(bad)?
            .map_err(|e| bad(e.to_string()))?;
        if let Some(&id) = encoding
            .get_ids()
            .iter()
            .find(|&&id| id as usize >= self.rows)
        {
            return Err(bad(format!(
                "the text has token {id} {:?}, and the embedding has {} rows: leave it out, or \
                 give the embedding more rows",
                self.name(id).unwrap_or_default(),
                self.rows
            )));
        }
        let first = self.first.filter(|_| special);
        Ok(first
            .into_iter()
            .chain(encoding.get_ids().iter().copied())
            .collect())
    }

    /// The start token, if these tokens of a text have it twice: the text begins with it, and
    /// [`Tokenizer::encode`] adds it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn doubled_start(&self, tokens: &[u32]) -> Result<Option<u32>> {
        let &[first, second, ..] = tokens else {
            return Ok(None);
        };
        if first != second {
            return Ok(None);
        }
        let (plain, with) = (self.encode("a", false)?, self.encode("a", true)?);
        let added = with.len() > plain.len() && with[1..].starts_with(&plain);
        Ok((added && with[0] == first).then_some(first))
    }

    /// Sentences for the user about what was assumed.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The text of tokens, without special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let bad = |what: String| Error::Tokenizer {
            path: self.path.clone(),
            what,
        };
        without_panic(|| self.inner.decode(tokens, true))
            .map_err(bad)?
            .map_err(|e| bad(e.to_string()))
    }

    /// The id of a token by its text.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// The text of a token in the vocabulary, also of a special token.
    pub fn name(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }
}

/// Builds the tokenizer of a GGUF. It equals that of its tokenizer.json, but the vocabulary is not
/// written and parsed as JSON.
fn build(gguf: &GgufTokenizer<'_>) -> tokenizers::Result<tokenizers::Tokenizer> {
    let vocab: Vocab = gguf
        .vocabulary()
        .map(|(token, id)| (token.into(), id as u32))
        .collect();
    let merges = gguf.merges().map(|(a, b)| (a.into(), b.into())).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(gguf.frame["model"]["ignore_merges"] == true)
        .build()?;
    let mut frame = gguf.frame.clone();
    frame["added_tokens"] = serde_json::json!([]);
    let mut inner: tokenizers::Tokenizer = frame.to_string().parse()?;
    inner.with_model(model);
    let added: Vec<AddedToken> = serde_json::from_value(gguf.frame["added_tokens"].clone())?;
    inner.add_tokens(added)?;
    Ok(inner)
}

/// Why the vocabulary of a GGUF cannot be used.
fn gguf_kind(source: &Source) -> String {
    let get = |key: &str| {
        source
            .gguf()
            .iter()
            .find(|(k, _)| k == key)
            .map_or("none".into(), |(_, v)| v.preview(40))
    };
    let (model, pre) = (get("tokenizer.ggml.model"), get("tokenizer.ggml.pre"));
    format!(
        "expected a byte-level BPE vocabulary with words that are known, got model {model}, pre \
         {pre}"
    )
}

/// Says which tokens have no row in an embedding of `rows` rows.
fn beyond(inner: &tokenizers::Tokenizer, rows: usize) -> Option<String> {
    let mut tokens: Vec<(u32, String)> = inner
        .get_vocab(true)
        .into_iter()
        .filter(|(_, id)| *id as usize >= rows)
        .map(|(name, id)| (id, name))
        .collect();
    tokens.sort();
    let (id, name) = tokens.first()?;
    let more = match tokens.len() - 1 {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    Some(format!(
        "token {id} {name:?}{more} is beyond the embedding's {rows} rows; a text that has it is \
         refused"
    ))
}

/// The text of a file, if there is one, without the byte order mark that some editors write.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(match text.strip_prefix('\u{feff}') {
            Some(rest) => rest.to_string(),
            None => text,
        })),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(bitnet_formats::Error::io(path, "read")(e).into()),
    }
}

/// The JSON of a file, if there is one, as Python writes it.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    let text = read_text(path)?;
    let json = text.map(|text| python_json::parse(path, text.as_bytes()));
    Ok(json.transpose()?)
}

/// Decodes tokens one at a time into whole characters.
///
/// Each piece is the text of the tokens since a safe point, without the part that was returned
/// before. So decoders that depend on neighbours (spaces of sentence pieces, bytes of one
/// character) see them.
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    tokens: Vec<u32>,
    /// Index of the safe point.
    start: usize,
    /// Number of tokens whose text was returned.
    returned: usize,
}

impl<'t> TextStream<'t> {
    /// A stream of text that follows the tokens `before`.
    pub fn new(tokenizer: &'t Tokenizer, before: &[u32]) -> Self {
        let tokens = before[before.len().saturating_sub(6)..].to_vec();
        let returned = tokens.len();
        Self {
            tokenizer,
            tokens,
            start: 0,
            returned,
        }
    }

    /// The text that is complete with this token; empty in the middle of a character.
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

    /// The rest of the text, with � for an incomplete character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.rest()?;
        self.advance();
        Ok(text)
    }

    fn advance(&mut self) {
        if self.returned < self.tokens.len() {
            self.start = self.returned;
            self.returned = self.tokens.len();
        }
        // Drops the tokens before the safe point, so that the buffer does not grow with the text.
        self.tokens.drain(..self.start);
        self.returned -= self.start;
        self.start = 0;
    }

    fn rest(&self) -> Result<String> {
        let before = self
            .tokenizer
            .decode(&self.tokens[self.start..self.returned])?;
        let all = self.tokenizer.decode(&self.tokens[self.start..])?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_formats::arch::hf_tokenizer;
    use bitnet_formats::gguf::Array;

    #[test]
    fn a_vocabulary_of_gguf_is_its_tokenizer_json() {
        let names = ["<s>", "a", "b", "c", "ab", "abc", "<|user|>", "[PAD7]", "ġ"];
        let types = vec![3, 1, 1, 1, 1, 1, 4, 5, 1];
        let strings = |all: &[&str]| Array::String(all.iter().map(|s| s.to_string()).collect());
        for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
            let pairs = [
                ("model", "gpt2".into()),
                ("pre", pre.into()),
                ("tokens", strings(&names).into()),
                ("token_type", Array::I32(types.clone()).into()),
                ("merges", strings(&["a b", "ab c"]).into()),
                ("bos_token_id", bitnet_formats::gguf::Value::U32(0)),
                ("add_bos_token", true.into()),
            ]
            .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
            let direct = build(&gguf_bpe(&pairs).unwrap()).unwrap();
            let (json, _) = hf_tokenizer(&pairs).unwrap();
            let read: tokenizers::Tokenizer = json.to_string().parse().unwrap();
            assert_eq!(
                direct.to_string(true).unwrap(),
                read.to_string(true).unwrap(),
                "{pre}"
            );
            let encode = |t: &tokenizers::Tokenizer| {
                t.encode_fast("abcab<|user|>ba<s>", true)
                    .unwrap()
                    .get_ids()
                    .to_vec()
            };
            assert_eq!(encode(&direct), encode(&read));
            assert_eq!(encode(&direct)[..2], [0, 5], "{pre}");
        }
    }
}
