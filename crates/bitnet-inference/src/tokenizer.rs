//! Text to tokens and back: tokenizer.json, or the vocabulary of a GGUF.

use crate::hostile::{check_growth, check_tables, check_text, without_panic};
use crate::{Error, Result};
use bitnet_formats::arch::GgufTokenizer;
use bitnet_formats::{Kind, Source, hints, python_json};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, TruncationParams};

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
    /// Reads the tokenizer of an open checkpoint. `rows` is the size of the embedding, `bos` the
    /// start token of the config.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none or it cannot be used.
    pub(crate) fn read(source: &Source, rows: usize, bos: Option<u32>) -> Result<Self> {
        without_panic(|| Self::read_trusting(source, rows, bos)).unwrap_or_else(|what| {
            Err(Error::Tokenizer {
                path: source.path().to_path_buf(),
                what,
            })
        })
    }

    /// [`Tokenizer::read`] that panics on some files.
    fn read_trusting(source: &Source, rows: usize, bos: Option<u32>) -> Result<Self> {
        let bad = |path: &Path, what: String| Error::Tokenizer {
            path: path.to_path_buf(),
            what,
        };
        let mut notes = vec![];
        let (path, inner, settings) = if source.kind() == Kind::Gguf {
            let path = source.path().to_path_buf();
            let tokenizer = GgufTokenizer::read(source.gguf()).map_err(|what| bad(&path, what))?;
            check_tables(&tokenizer.frame["normalizer"]).map_err(|what| bad(&path, what))?;
            let inner = build(&tokenizer).map_err(|e| bad(&path, e.to_string()))?;
            notes.extend(tokenizer.notes);
            (path, inner, tokenizer.settings)
        } else {
            let path = source.path().join("tokenizer.json");
            let none = || hints::no_tokenizer(&path).unwrap_or("there is none".into());
            let text = read_text(&path)?.ok_or_else(|| bad(&path, none()))?;
            check_text(&text).map_err(|what| bad(&path, what))?;
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
        notes.extend(beyond(&inner, rows));
        let notes = notes
            .into_iter()
            .map(|what| format!("{}: {what}", path.display()))
            .collect();
        let mut tokenizer = Self {
            inner,
            first: None,
            path,
            rows,
            notes,
        };
        if settings["add_bos_token"] == true
            && let Some(bos) = bos
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

    /// [`Tokenizer::encode`] with special tokens, cut to `most` tokens: those at the end of the
    /// text go, and the special tokens around it stay. Also the number of tokens that the text has.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; [`Error::Context`] if the special tokens alone are more.
    pub fn encode_within(&self, text: &str, most: usize) -> Result<(Vec<u32>, usize)> {
        let all = self.encode(text, true)?;
        if all.len() <= most {
            let len = all.len();
            return Ok((all, len));
        }
        let bad = |what: String| Error::Tokenizer {
            path: self.path.clone(),
            what,
        };
        let first = usize::from(self.first.is_some());
        let around = self.encode("", true)?.len();
        if around >= most {
            return Err(Error::Context {
                got: around + 1,
                context: most,
            });
        }
        let mut cut = self.clone();
        let truncation = TruncationParams {
            max_length: most - first,
            ..Default::default()
        };
        let set = cut.inner.with_truncation(Some(truncation));
        set.map_err(|e| bad(e.to_string()))?;
        let tokens = cut.encode(text, true)?;
        Ok((tokens, all.len()))
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
    let Some(merges) = gguf.merges() else {
        return gguf.frame.to_string().parse();
    };
    let vocab: Vocab = gguf
        .vocabulary()
        .map(|(token, id)| (token.into(), id as u32))
        .collect();
    let merges = merges.iter().map(|(a, b)| (a.to_string(), b.to_string()));
    let settings = &gguf.frame["model"];
    let mut model = BPE::builder()
        .vocab_and_merges(vocab, merges.collect())
        .ignore_merges(settings["ignore_merges"] == true)
        .byte_fallback(settings["byte_fallback"] == true)
        .fuse_unk(settings["fuse_unk"] == true);
    if let Some(unknown) = settings["unk_token"].as_str() {
        model = model.unk_token(unknown.into());
    }
    let model = model.build()?;
    let mut frame = gguf.frame.clone();
    frame["added_tokens"] = serde_json::json!([]);
    let mut inner: tokenizers::Tokenizer = frame.to_string().parse()?;
    inner.with_model(model);
    let added: Vec<AddedToken> = serde_json::from_value(gguf.frame["added_tokens"].clone())?;
    inner.add_tokens(added)?;
    Ok(inner)
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
    use bitnet_formats::arch::{gguf_metadata, hf_tokenizer};
    use bitnet_formats::gguf::{Array, Value as G};
    use serde_json::json;

    fn ids(tokenizer: &tokenizers::Tokenizer, text: &str) -> Vec<u32> {
        let encoding = tokenizer.encode_fast(text, true);
        encoding.unwrap().get_ids().to_vec()
    }

    /// The tokenizer as it is read, after comparing it with that of the tokenizer.json that is
    /// written.
    fn read(pairs: &[(String, G)]) -> tokenizers::Tokenizer {
        let direct = build(&GgufTokenizer::read(pairs).unwrap()).unwrap();
        let (json, _) = hf_tokenizer(pairs).unwrap();
        let read: tokenizers::Tokenizer = json.to_string().parse().unwrap();
        assert_eq!(
            direct.to_string(true).unwrap(),
            read.to_string(true).unwrap()
        );
        direct
    }

    #[test]
    fn a_vocabulary_of_gguf_is_its_tokenizer_json() {
        let names = ["<s>", "a", "b", "c", "ab", "abc", "<|user|>", "[PAD7]", "ġ"];
        let types = vec![3, 1, 1, 1, 1, 1, 4, 5, 1];
        let strings = |all: &[&str]| Array::String(all.iter().map(|s| s.to_string()).collect());
        for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "tekken"] {
            let pairs = [
                ("model", "gpt2".into()),
                ("pre", pre.into()),
                ("tokens", strings(&names).into()),
                ("token_type", Array::I32(types.clone()).into()),
                ("merges", strings(&["a b", "ab c"]).into()),
                ("bos_token_id", G::U32(0)),
                ("add_bos_token", true.into()),
            ]
            .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
            let tokenizer = read(&pairs);
            let got = ids(&tokenizer, "abcab<|user|>ba<s>");
            assert_eq!(got, [0, 5, 4, 6, 2, 1, 0], "{pre}");
        }
    }

    /// What scripts/make-tokenizer-golden.py wrote: tokenizers of every kind, and ids of
    /// `tokenizers`.
    #[test]
    fn a_tokenizer_that_goes_through_a_gguf_gives_the_same_ids() {
        let golden: Value =
            serde_json::from_str(include_str!("../tests/golden/tokenizers.json")).unwrap();
        let texts = golden["texts"].as_array().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for (name, case) in golden["cases"].as_object().unwrap() {
            let put = |file: &str, value: &Value| {
                fs::write(folder.path().join(file), value.to_string()).unwrap();
            };
            put("tokenizer.json", &case["tokenizer"]);
            put("tokenizer_config.json", &case["settings"]);
            let config = json!({
                "model_type": "llama",
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "vocab_size": 800,
                "max_position_embeddings": 64,
            });
            let made = gguf_metadata(folder.path(), &config).unwrap();
            assert_eq!(made.losses, [""; 0], "{name}");
            let find = |key: &str| {
                let key = format!("tokenizer.ggml.{key}");
                let found = made.metadata.iter().find(|(k, _)| *k == key);
                found.and_then(|(_, value)| value.as_str())
            };
            assert_eq!(find("model"), case["model"].as_str(), "{name}");
            assert_eq!(find("pre"), case["pre"].as_str(), "{name}");
            let tokenizer = read(&made.metadata);
            let expected = case["ids"].as_array().unwrap();
            for (text, expected) in texts.iter().zip(expected).filter(|(_, ids)| ids.is_array()) {
                let shown = text.as_str().unwrap();
                // Cut at line feeds, so unknown text before and behind one stays apart.
                if name == "spm-no-bytes" && shown.contains(['\n', '\r']) {
                    continue;
                }
                let got = ids(&tokenizer, shown);
                assert_eq!(json!(got), *expected, "{name}: {text}");
            }
        }
    }

    /// As many tokens as Gemma has, with scores: no merge is listed.
    #[test]
    fn a_large_vocabulary_with_scores_is_read_in_seconds() {
        let mut names: Vec<String> = (0..=255).map(|b| format!("<0x{b:02X}>")).collect();
        let letters = "abcdefghijklmnopqrstuvwxyz▁".chars();
        names.extend(letters.map(String::from));
        let (first, mut at) = (256, 0);
        while names.len() < 262_144 {
            // Each piece is an earlier one and a letter.
            let letter = names[first + (at * 7 + at / 27) % 27].clone();
            let next = format!("{}{letter}", names[first + at / 2]);
            at += 1;
            if next.len() < 48 {
                names.push(next);
            }
        }
        let mut seen = std::collections::HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        let scores = (0..names.len()).map(|i| -(i as f32)).collect();
        let types = (0..names.len()).map(|i| if i < first { 6 } else { 1 });
        let last = names.last().unwrap().clone();
        let pairs = [
            ("model", "llama".into()),
            ("token_type", Array::I32(types.collect()).into()),
            ("scores", Array::F32(scores).into()),
            ("tokens", Array::String(names.clone()).into()),
            ("add_bos_token", false.into()),
            ("add_space_prefix", false.into()),
        ]
        .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
        let start = std::time::Instant::now();
        let tokenizer = build(&GgufTokenizer::read(&pairs).unwrap()).unwrap();
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
        assert!(names.len() > 100_000, "{}", names.len());
        let text = tokenizer.decode(&ids(&tokenizer, &last), false).unwrap();
        assert_eq!(text, last.replace('▁', " "));
    }
}
