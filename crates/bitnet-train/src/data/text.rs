//! Text as tokens, and windows of it.

use crate::variables::stream;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Files beside a tokenizer.json that say how it is used.
const BESIDE_TOKENIZER: [&str; 4] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// The tokens of text.
#[derive(Debug, Clone)]
pub enum Vocabulary {
    /// 256 tokens, one for each byte.
    Bytes,
    /// A tokenizer.json.
    File {
        /// Its path.
        path: PathBuf,
        /// The tokenizer.
        tokenizer: Box<tokenizers::Tokenizer>,
    },
}

impl Vocabulary {
    /// Reads a tokenizer.json.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it cannot be read or used.
    pub fn read(path: &Path) -> Result<Self> {
        let bad = |what: String| Error::Tokenizer {
            path: path.to_path_buf(),
            what,
        };
        let text = fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        let mut tokenizer: tokenizers::Tokenizer = text.parse().map_err(|e| bad(format!("{e}")))?;
        // Padding and truncation are for training batches.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| bad(e.to_string()))?;
        Ok(Self::File {
            path: path.to_path_buf(),
            tokenizer: Box::new(tokenizer),
        })
    }

    /// Size of the vocabulary: the largest token plus one.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::File { tokenizer, .. } => tokenizer
                .get_vocab(true)
                .into_values()
                .max()
                .map_or(0, |id| id as usize + 1),
        }
    }

    /// Whether the vocabulary is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens of a text, without the tokens that the tokenizer puts around texts.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::File { path, tokenizer } => {
                let encoding = tokenizer.encode_fast(text, false);
                let encoding = encoding.map_err(|e| Error::Tokenizer {
                    path: path.clone(),
                    what: e.to_string(),
                })?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// Contents of tokenizer.json, and of the files that belong to it, for this vocabulary.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the file cannot be read again.
    pub fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let text = |value: &Value| format!("{value:#}\n").into_bytes();
        match self {
            Self::Bytes => {
                let config = json!({
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "add_bos_token": false,
                    "add_eos_token": false,
                    "clean_up_tokenization_spaces": false,
                });
                Ok(vec![
                    ("tokenizer.json".into(), text(&byte_tokenizer())),
                    ("tokenizer_config.json".into(), text(&config)),
                ])
            }
            Self::File { path, .. } => {
                let mut files = vec![("tokenizer.json".into(), read_bytes(path)?)];
                for name in BESIDE_TOKENIZER {
                    let beside = path.with_file_name(name);
                    if beside.exists() {
                        files.push((name.into(), read_bytes(&beside)?));
                    }
                }
                Ok(files)
            }
        }
    }
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::Tokenizer {
        path: path.to_path_buf(),
        what: e.to_string(),
    })
}

/// A byte-level BPE without merges, in which token b is byte b.
///
/// Byte-level BPE writes each byte as a visible character (the table of GPT-2): visible characters
/// of Latin-1 stand for themselves, the other bytes are U+0100 and following, in order.
fn byte_tokenizer() -> Value {
    let visible = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut others = 0;
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..=255u8 {
        let code = if visible(byte) {
            u32::from(byte)
        } else {
            others += 1;
            255 + others
        };
        let letter = char::from_u32(code).map(String::from).unwrap_or_default();
        vocabulary.insert(letter, byte.into());
    }
    let byte_level = json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": false,
        "use_regex": false,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocabulary,
            "merges": [],
        },
    })
}

/// The tokens of a text in two parts.
#[derive(Debug, Clone)]
pub struct Text {
    /// Tokens to train on.
    pub train: Vec<u32>,
    /// Tokens to measure on.
    pub held_out: Vec<u32>,
}

impl Text {
    /// Reads text files and holds out the last `share` of the tokens of each.
    ///
    /// # Errors
    /// [`Error::Data`] for a file that is empty or not UTF-8, [`Error::File`] for a file that
    /// cannot be read, [`Error::Option`] for a share that is not between 0 and 1, and errors of
    /// [`Vocabulary::encode`].
    pub fn read(paths: &[PathBuf], vocabulary: &Vocabulary, share: f64) -> Result<Self> {
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::option("held_out", "a share between 0 and 1", share));
        }
        if paths.is_empty() {
            return Err(Error::option("text", "at least one file", "none"));
        }
        let mut all = Self {
            train: vec![],
            held_out: vec![],
        };
        for path in paths {
            let tokens = vocabulary.encode(&read(path)?)?;
            let kept = (tokens.len() as f64 * (1.0 - share)).round() as usize;
            all.train.extend_from_slice(&tokens[..kept]);
            all.held_out.extend_from_slice(&tokens[kept..]);
        }
        Ok(all)
    }

    /// Rejects a text that is too short for windows of `context` tokens.
    ///
    /// # Errors
    /// [`Error::Data`] with the path of the first file.
    pub fn check(&self, path: &Path, context: usize) -> Result<()> {
        for (what, tokens) in [("to learn from", &self.train), ("held out", &self.held_out)] {
            if tokens.len() <= context {
                return Err(Error::data(
                    path,
                    format!("more than {context} tokens {what}, the context"),
                    tokens.len(),
                ));
            }
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(bitnet_formats::Error::io(path, "read"))?;
    if bytes.is_empty() {
        return Err(Error::data(path, "a text", "an empty file"));
    }
    String::from_utf8(bytes).map_err(|e| {
        Error::data(
            path,
            "UTF-8",
            format!("other bytes at {}", e.utf8_error().valid_up_to()),
        )
    })
}

/// Batch number `index`: `size` windows of `context + 1` tokens at random positions. Returns tokens
/// `[size, context]` and their successors.
///
/// # Errors
/// None that depends on the tokens.
///
/// # Panics
/// If there are at most `context` tokens.
pub fn batch(
    tokens: &[u32],
    seed: u64,
    index: u64,
    size: usize,
    context: usize,
) -> candle_core::Result<(Tensor, Tensor)> {
    let mut random = stream(seed, &format!("windows {index}"));
    let starts: Vec<usize> = (0..size)
        .map(|_| random.below(tokens.len() - context))
        .collect();
    let cut = |offset: usize| {
        let all: Vec<u32> = starts
            .iter()
            .flat_map(|start| &tokens[start + offset..][..context])
            .copied()
            .collect();
        Tensor::from_vec(all, (size, context), &Device::Cpu)
    };
    Ok((cut(0)?, cut(1)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_tokens_are_those_of_their_tokenizer_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, &Vocabulary::Bytes.files().unwrap()[0].1).unwrap();
        let file = Vocabulary::read(&path).unwrap();
        assert_eq!(file.len(), 256);
        let text: String = (0u8..128)
            .map(char::from)
            .chain("für élève – 漢字 🙂\r\n\t  two  spaces".chars())
            .collect();
        assert_eq!(
            file.encode(&text).unwrap(),
            Vocabulary::Bytes.encode(&text).unwrap()
        );
        let Vocabulary::File { tokenizer, .. } = file else {
            unreachable!()
        };
        assert_eq!(
            tokenizer
                .decode(&Vocabulary::Bytes.encode(&text).unwrap(), true)
                .unwrap(),
            text
        );
    }

    #[test]
    fn the_end_of_each_text_is_held_out() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = ["aaaaaaaabb", "cccccccccccccccccdddd"]
            .iter()
            .map(|t| {
                let path = folder.path().join(&t[..1]);
                std::fs::write(&path, t).unwrap();
                path
            })
            .collect();
        let text = Text::read(&paths, &Vocabulary::Bytes, 0.2).unwrap();
        assert_eq!(text.train, [[97; 8].as_slice(), &[99; 17]].concat());
        assert_eq!(text.held_out, [98, 98, 100, 100, 100, 100]);
        assert!(
            text.check(&paths[0], 6)
                .unwrap_err()
                .to_string()
                .contains("more than 6 tokens held out, the context, got 6")
        );
        text.check(&paths[0], 5).unwrap();
        for (bytes, part) in [
            (&b""[..], "empty"),
            (&b"ab\xff"[..], "UTF-8, got other bytes at 2"),
        ] {
            std::fs::write(&paths[0], bytes).unwrap();
            assert!(
                Text::read(&paths[..1], &Vocabulary::Bytes, 0.1)
                    .unwrap_err()
                    .to_string()
                    .contains(part)
            );
        }
        assert!(
            Text::read(&paths, &Vocabulary::Bytes, 1.0).is_err()
                && Text::read(&[], &Vocabulary::Bytes, 0.1).is_err()
        );
    }

    #[test]
    fn targets_follow_inputs() {
        let tokens: Vec<u32> = (0..50).collect();
        let (x, y) = batch(&tokens, 1, 9, 4, 8).unwrap();
        let (x, y) = (x.to_vec2::<u32>().unwrap(), y.to_vec2::<u32>().unwrap());
        for (x, y) in x.iter().zip(&y) {
            assert!(
                x.iter().zip(y).all(|(x, y)| x + 1 == *y) && x.windows(2).all(|w| w[0] + 1 == w[1])
            );
        }
        assert_eq!(
            batch(&tokens, 1, 9, 4, 8)
                .unwrap()
                .0
                .to_vec2::<u32>()
                .unwrap(),
            x
        );
        assert_ne!(
            batch(&tokens, 1, 10, 4, 8)
                .unwrap()
                .0
                .to_vec2::<u32>()
                .unwrap(),
            x
        );
        // The only window that fits is the whole text.
        batch(&tokens, 1, 0, 1, 49).unwrap();
    }
}
