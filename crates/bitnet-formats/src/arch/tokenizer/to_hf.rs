//! Byte-level BPE of a GGUF as tokenizer.json and tokenizer_config.json.

use super::kind;
use super::pre::{PRE, PreTokenizer, Words};
use crate::arch::keys::GgufKeys;
use crate::arch::values::find;
use crate::gguf::{self, Array};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Byte-level BPE of a GGUF, in the terms of Hugging Face.
#[derive(Debug)]
pub struct GgufTokenizer<'a> {
    /// tokenizer.json, with no vocabulary and no merges in its model.
    pub frame: Value,
    /// tokenizer_config.json.
    pub settings: Value,
    /// Names of all token ids, those of unused ones too.
    pub tokens: &'a [String],
    types: &'a [i32],
    merges: &'a [String],
}

impl<'a> GgufTokenizer<'a> {
    /// The model's vocabulary: unused tokens are not in it.
    pub fn vocabulary(&self) -> impl Iterator<Item = (&'a str, usize)> {
        let tokens = self.tokens.iter().zip(self.types).enumerate();
        tokens
            .filter(|(_, (_, kind))| **kind != kind::UNUSED)
            .map(|(id, (token, _))| (token.as_str(), id))
    }

    /// The merges by rank.
    pub fn merges(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.merges.iter().filter_map(|m| m.split_once(' '))
    }
}

/// tokenizer.json and tokenizer_config.json of a GGUF with byte-level BPE; `None` for other
/// tokenizers, and for words that are not known here.
pub fn hf_tokenizer(metadata: &[(String, gguf::Value)]) -> Option<(Value, Value)> {
    let tokenizer = gguf_bpe(metadata)?;
    let vocab: Map<String, Value> = tokenizer
        .vocabulary()
        .map(|(token, id)| (token.into(), id.into()))
        .collect();
    let merges: Vec<Value> = tokenizer.merges().map(|(a, b)| json!([a, b])).collect();
    let GgufTokenizer {
        mut frame,
        settings,
        ..
    } = tokenizer;
    (frame["model"]["vocab"], frame["model"]["merges"]) = (vocab.into(), merges.into());
    Some((frame, settings))
}

/// The tokenizer of a GGUF with byte-level BPE, its large lists left where they are; `None` as for
/// [`hf_tokenizer`].
pub fn gguf_bpe(metadata: &[(String, gguf::Value)]) -> Option<GgufTokenizer<'_>> {
    let keys = TokenizerKeys::read(metadata)?;
    Some(GgufTokenizer {
        frame: keys.frame(),
        settings: keys.settings(),
        tokens: keys.tokens,
        types: keys.types,
        merges: keys.merges,
    })
}

/// The keys of byte-level BPE.
struct TokenizerKeys<'a> {
    metadata: &'a [(String, gguf::Value)],
    pre: PreTokenizer,
    tokens: &'a [String],
    types: &'a [i32],
    merges: &'a [String],
}

impl<'a> TokenizerKeys<'a> {
    fn read(metadata: &'a [(String, gguf::Value)]) -> Option<Self> {
        let get = |key: &str| find(metadata, &format!("tokenizer.ggml.{key}"));
        if get("model")?.as_str()? != "gpt2" {
            return None;
        }
        let pre = get("pre")?.as_str()?;
        let pre = PRE.into_iter().find(|known| known.name == pre)?;
        let tokens = get("tokens")?.as_strings()?;
        let types = match get("token_type")?.as_array()? {
            Array::I32(types) if types.len() == tokens.len() => types,
            _ => return None,
        };
        let merges = get("merges")?.as_strings()?;
        if merges.iter().any(|m| !m.contains(' ')) {
            return None;
        }
        Some(Self {
            metadata,
            pre,
            tokens,
            types,
            merges,
        })
    }

    fn get(&self, key: &str) -> Option<&'a gguf::Value> {
        find(self.metadata, &format!("tokenizer.ggml.{key}"))
    }

    /// The token that a key names by its id.
    fn token_of(&self, key: &str) -> Option<(&'a String, u64)> {
        let id = self.get(key).and_then(gguf::Value::as_u64)?;
        Some((self.tokens.get(id as usize)?, id))
    }

    /// Whether texts begin and end with a special token.
    fn adds(&self) -> (bool, bool) {
        let flag = |key: &str| self.get(key).and_then(gguf::Value::as_bool);
        (
            flag("add_bos_token").unwrap_or(self.pre.adds_bos),
            flag("add_eos_token").unwrap_or(false),
        )
    }

    /// tokenizer.json, with no vocabulary and no merges.
    fn frame(&self) -> Value {
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": null,
            "pre_tokenizer": self.pre_tokenizer(),
            "post_processor": self.post_processor(),
            "decoder": byte_level(true, false, true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.pre.ignore_merges,
                "vocab": {},
                "merges": [],
            },
        })
    }

    fn added_tokens(&self) -> Vec<Value> {
        let mut added = vec![];
        for (id, (token, &kind)) in self.tokens.iter().zip(self.types).enumerate() {
            if matches!(kind, kind::CONTROL | kind::USER_DEFINED | kind::UNKNOWN) {
                added.push(json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": kind != kind::USER_DEFINED,
                }));
            }
        }
        added
    }

    fn pre_tokenizer(&self) -> Value {
        let steps = match self.pre.words {
            Words::Gpt2 => return byte_level(false, true, true),
            Words::DigitsGpt2 => [
                json!({"type": "Digits", "individual_digits": true}),
                byte_level(false, true, true),
            ],
            Words::Regex(regex) => [
                json!({
                    "type": "Split",
                    "pattern": {"Regex": regex},
                    "behavior": "Isolated",
                    "invert": false,
                }),
                byte_level(false, true, false),
            ],
        };
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    /// A template that adds special tokens, if any are added.
    fn post_processor(&self) -> Value {
        let (add_bos, add_eos) = self.adds();
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut specials = Map::new();
        for (adds, key, at) in [
            (add_bos, "bos_token_id", 0),
            (add_eos, "eos_token_id", usize::MAX),
        ] {
            if let Some((token, id)) = self.token_of(key).filter(|_| adds) {
                let item = json!({"SpecialToken": {"id": token, "type_id": 0}});
                single.insert(at.min(single.len()), item);
                let special = json!({"id": token, "ids": [id], "tokens": [token]});
                specials.insert(token.clone(), special);
            }
        }
        let bytes = byte_level(true, false, true);
        if specials.is_empty() {
            return bytes;
        }
        let mut pair = single.clone();
        pair.extend(single.iter().map(second_text));
        let template = json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": specials,
        });
        json!({"type": "Sequence", "processors": [bytes, template]})
    }

    /// tokenizer_config.json.
    fn settings(&self) -> Value {
        let (add_bos, add_eos) = self.adds();
        let mut settings = json!({
            "add_bos_token": add_bos,
            "add_eos_token": add_eos,
            "clean_up_tokenization_spaces": false,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        for (name, key) in [
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        ] {
            if let Some((token, _)) = self.token_of(key) {
                settings[name] = token.as_str().into();
            }
        }
        let template = find(self.metadata, "tokenizer.chat_template");
        if let Some(template) = template.and_then(gguf::Value::as_str) {
            settings["chat_template"] = template.into();
        }
        let keys = GgufKeys::new(Path::new("GGUF metadata"), self.metadata).ok();
        if let Some(length) = keys.and_then(|k| k.size("context_length").ok()) {
            settings["model_max_length"] = length.into();
        }
        settings
    }
}

fn byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    })
}

/// An item of a template for one text, as it stands for the second of two.
fn second_text(item: &Value) -> Value {
    let mut item = item.clone();
    for part in ["Sequence", "SpecialToken"] {
        if let Some(part_of_item) = item.get_mut(part) {
            part_of_item["type_id"] = 1.into();
            if part == "Sequence" {
                part_of_item["id"] = "B".into();
            }
        }
    }
    item
}
