//! What kind of tokenizer a GGUF has, and the tokenizer.json of each kind without its vocabulary.

use super::charsmap;
use super::plan::LINES;
use super::pre::{PRE, PreTokenizer, byte_level, hf_pre_tokenizer, split};
use super::to_hf::TokenizerKeys;
use crate::arch::values::find;
use crate::gguf;
use serde_json::{Value, json};

/// The kinds of tokenizers that GGUF names by `tokenizer.ggml.model` and `tokenizer.ggml.pre`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// BPE on GPT-2's byte alphabet.
    ByteLevel(&'static PreTokenizer),
    /// BPE on text with ▁ for a space, by rank.
    Ranked,
    /// BPE on text with ▁ for a space, by score.
    Scored,
    Unigram,
    WordPiece,
}

impl Kind {
    pub(super) fn read(metadata: &[(String, gguf::Value)]) -> Result<Self, String> {
        let text = |key: &str| {
            let value = find(metadata, &format!("tokenizer.ggml.{key}"));
            value.and_then(gguf::Value::as_str)
        };
        let Some(model) = text("model") else {
            return Err("tokenizer.ggml.model: expected the kind of a tokenizer, got none".into());
        };
        let pre = text("pre");
        match (model, pre) {
            ("llama", _) => Ok(Self::Scored),
            ("t5", _) => Ok(Self::Unigram),
            ("bert", _) => Ok(Self::WordPiece),
            ("gemma4", _) | ("gpt2", Some("sarvam-moe" | "gemma4")) => Ok(Self::Ranked),
            ("gpt2", Some(pre)) => {
                let known = PRE.iter().find(|known| known.names.contains(&pre));
                known.map(Self::ByteLevel).ok_or_else(|| {
                    format!(
                        "tokenizer.ggml.pre: expected one of {}, got {pre:?}",
                        known_names().join(", ")
                    )
                })
            }
            ("gpt2", None) => Err(format!(
                "tokenizer.ggml.pre: expected one of {}, got none; convert the model again with a \
                 newer llama.cpp, which writes it",
                known_names().join(", ")
            )),
            _ => Err(format!(
                "tokenizer.ggml.model: expected gpt2, llama, t5, bert or gemma4, got {model:?}"
            )),
        }
    }
}

fn known_names() -> Vec<&'static str> {
    let byte_level = PRE.iter().map(PreTokenizer::name);
    byte_level.chain(["sarvam-moe", "gemma4"]).collect()
}

/// The parts of a tokenizer.json that differ.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
}

/// tokenizer.json, with no vocabulary and no merges.
pub(super) fn frame(keys: &TokenizerKeys<'_>) -> Value {
    let parts = match keys.kind {
        Kind::ByteLevel(pre) => byte_level_parts(pre),
        Kind::Ranked => ranked(keys),
        Kind::Scored => scored(keys),
        Kind::Unigram => unigram(keys),
        Kind::WordPiece => wordpiece(keys),
    };
    let mut post_processor = keys.template();
    if matches!(keys.kind, Kind::ByteLevel(_)) {
        let bytes = byte_level(true, false, true);
        post_processor = Some(match post_processor {
            None => bytes,
            Some(template) => json!({"type": "Sequence", "processors": [bytes, template]}),
        });
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": keys.added_tokens(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": parts.decoder,
        "model": parts.model,
    })
}

/// A BPE model without its vocabulary.
fn bpe(unknown: Option<&str>, byte_fallback: Value, ignore_merges: Value) -> Value {
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": unknown.is_some(),
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {},
        "merges": [],
    })
}

fn byte_level_parts(pre: &PreTokenizer) -> Parts {
    Parts {
        normalizer: Value::Null,
        pre_tokenizer: hf_pre_tokenizer(pre.steps),
        decoder: byte_level(true, false, true),
        model: bpe(None, false.into(), pre.ignore_merges.into()),
    }
}

/// Spaces as tokens write them.
fn to_marks() -> Value {
    json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
}

/// Tokens of text with ▁ for a space, and bytes, as text.
fn from_marks(prefix: bool) -> Value {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

fn ranked(keys: &TokenizerKeys<'_>) -> Parts {
    let unknown = keys.token_of("unknown_token_id");
    let unknown = unknown.map(|(token, _)| token.as_str());
    Parts {
        normalizer: to_marks(),
        pre_tokenizer: split(LINES),
        decoder: from_marks(false),
        model: bpe(unknown, true.into(), false.into()),
    }
}

fn scored(keys: &TokenizerKeys<'_>) -> Parts {
    let prefix = keys.flag("add_space_prefix").unwrap_or(true);
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let unknown = keys.token_of("unknown_token_id");
    Parts {
        normalizer: if prefix {
            json!({"type": "Sequence", "normalizers": [prepend, to_marks()]})
        } else {
            to_marks()
        },
        pre_tokenizer: Value::Null,
        decoder: from_marks(prefix),
        model: bpe(
            unknown.map(|(token, _)| token.as_str()),
            true.into(),
            false.into(),
        ),
    }
}

fn unigram(keys: &TokenizerKeys<'_>) -> Parts {
    let collapse = keys.flag("remove_extra_whitespaces").unwrap_or(false);
    let prefix = collapse || keys.flag("add_space_prefix").unwrap_or(false);
    let replace = |regex: &str, content: &str| json!({"type": "Replace", "pattern": {"Regex": regex}, "content": content});
    let mut normalizers = vec![];
    if let Some(table) = keys.bytes("precompiled_charsmap") {
        let table = charsmap::encode(&table);
        normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": table}));
    }
    if collapse {
        normalizers.push(json!({"type": "Strip", "strip_left": false, "strip_right": true}));
        normalizers.push(replace(" {2,}", "▁"));
    }
    let metaspace = json!({
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": if prefix { "always" } else { "never" },
        "split": false,
    });
    Parts {
        normalizer: if normalizers.is_empty() {
            Value::Null
        } else {
            json!({"type": "Sequence", "normalizers": normalizers})
        },
        pre_tokenizer: metaspace.clone(),
        decoder: metaspace,
        model: json!({"type": "Unigram", "unk_id": null, "vocab": [], "byte_fallback": false}),
    }
}

fn wordpiece(keys: &TokenizerKeys<'_>) -> Parts {
    let lowercase = keys.flag("normalizer.lowercase").unwrap_or(true);
    let strip = keys.flag("normalizer.strip_accents").unwrap_or(lowercase);
    Parts {
        normalizer: json!({
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": true,
            "strip_accents": strip,
            "lowercase": lowercase,
        }),
        pre_tokenizer: json!({"type": "BertPreTokenizer"}),
        decoder: json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        model: json!({
            "type": "WordPiece",
            "unk_token": null,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {},
        }),
    }
}
