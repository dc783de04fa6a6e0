//! The tokenizer of a GGUF as tokenizer.json and tokenizer_config.json.

use super::frame::{self, Kind};
use super::kind;
use super::ranks::merges_of_scores;
use super::vocabulary::has_all_bytes;
use super::wordpiece;
use crate::arch::keys::GgufKeys;
use crate::arch::values::find;
use crate::gguf::{self, Array};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The tokenizer of a GGUF, in the terms of Hugging Face.
#[derive(Debug)]
pub struct GgufTokenizer<'a> {
    /// tokenizer.json. Its model has no vocabulary and no merges, if [`GgufTokenizer::merges`] has
    /// them.
    pub frame: Value,
    /// tokenizer_config.json.
    pub settings: Value,
    /// Names of all token ids, those of unused ones too.
    pub tokens: &'a [String],
    /// Sentences for a person about what was assumed.
    pub notes: Vec<String>,
    types: &'a [i32],
    merges: Option<Vec<(&'a str, &'a str)>>,
}

impl<'a> GgufTokenizer<'a> {
    /// The tokenizer in the metadata of a GGUF, or why it has none that is known here.
    ///
    /// # Errors
    /// A sentence that names the key, what was expected and what is there.
    pub fn read(metadata: &'a [(String, gguf::Value)]) -> Result<Self, String> {
        let keys = TokenizerKeys::read(metadata)?;
        let mut notes = vec![];
        let mut frame = frame::frame(&keys);
        let merges = match keys.kind {
            Kind::ByteLevel(_) | Kind::Ranked => Some(keys.listed_merges()?),
            Kind::Scored => Some(keys.scored_merges(&mut notes)?),
            Kind::Unigram | Kind::WordPiece => None,
        };
        match keys.kind {
            Kind::Unigram => keys.put_unigram(&mut frame)?,
            Kind::WordPiece => keys.put_words(&mut frame)?,
            _ => {}
        }
        Ok(Self {
            frame,
            settings: settings(metadata),
            tokens: keys.tokens,
            notes,
            types: keys.types,
            merges,
        })
    }

    /// The model's vocabulary: unused tokens are not in it.
    pub fn vocabulary(&self) -> impl Iterator<Item = (&'a str, usize)> {
        let tokens = self.tokens.iter().zip(self.types).enumerate();
        tokens
            .filter(|(_, (_, kind))| **kind != kind::UNUSED)
            .map(|(id, (token, _))| (token.as_str(), id))
    }

    /// The merges of byte pair encoding by rank; nothing for other models.
    pub fn merges(&self) -> Option<&[(&'a str, &'a str)]> {
        self.merges.as_deref()
    }
}

/// tokenizer.json and tokenizer_config.json of a GGUF.
///
/// # Errors
/// As [`GgufTokenizer::read`].
pub fn hf_tokenizer(metadata: &[(String, gguf::Value)]) -> Result<(Value, Value), String> {
    let mut tokenizer = GgufTokenizer::read(metadata)?;
    if let Some(merges) = tokenizer.merges() {
        let merges: Vec<Value> = merges.iter().map(|(a, b)| json!([a, b])).collect();
        let vocab: Map<String, Value> = tokenizer
            .vocabulary()
            .map(|(token, id)| (token.into(), id.into()))
            .collect();
        let model = &mut tokenizer.frame["model"];
        (model["vocab"], model["merges"]) = (vocab.into(), merges.into());
    }
    Ok((tokenizer.frame, tokenizer.settings))
}

/// tokenizer_config.json of a GGUF, whose vocabulary need not be one that is known here.
pub fn hf_tokenizer_settings(metadata: &[(String, gguf::Value)]) -> Value {
    settings(metadata)
}

/// The keys of a tokenizer that is known here.
pub(super) struct TokenizerKeys<'a> {
    pub(super) metadata: &'a [(String, gguf::Value)],
    pub(super) kind: Kind,
    pub(super) tokens: &'a [String],
    pub(super) types: &'a [i32],
}

impl<'a> TokenizerKeys<'a> {
    fn read(metadata: &'a [(String, gguf::Value)]) -> Result<Self, String> {
        let kind = Kind::read(metadata)?;
        let tokens = get(metadata, "tokens").and_then(gguf::Value::as_strings);
        let tokens = tokens.ok_or("tokenizer.ggml.tokens: expected a list of texts, got none")?;
        let types = match get(metadata, "token_type").and_then(gguf::Value::as_array) {
            Some(Array::I32(types)) if types.len() == tokens.len() => types,
            other => {
                let got = other.map_or("nothing".into(), |a| format!("{} of them", a.len()));
                return Err(format!(
                    "tokenizer.ggml.token_type: expected a number for each of {} tokens, got {got}",
                    tokens.len()
                ));
            }
        };
        Ok(Self {
            metadata,
            kind,
            tokens,
            types,
        })
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        get(self.metadata, key).and_then(gguf::Value::as_bool)
    }

    /// Bytes of a list.
    pub(super) fn bytes(&self, key: &str) -> Option<Vec<u8>> {
        match get(self.metadata, key)?.as_array()? {
            Array::U8(bytes) => Some(bytes.clone()),
            Array::I8(bytes) => Some(bytes.iter().map(|b| *b as u8).collect()),
            _ => None,
        }
    }

    /// The merges of `tokenizer.ggml.merges`.
    fn listed_merges(&self) -> Result<Vec<(&'a str, &'a str)>, String> {
        let merges = get(self.metadata, "merges").and_then(gguf::Value::as_strings);
        let merges = merges.ok_or("tokenizer.ggml.merges: expected a list of texts, got none")?;
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in merges {
            pairs.push(merge.split_once(' ').ok_or_else(|| {
                format!("tokenizer.ggml.merges: expected two tokens, got {merge:?}")
            })?);
        }
        Ok(pairs)
    }

    fn scores(&self) -> Result<Vec<f32>, String> {
        let scores = match get(self.metadata, "scores").and_then(gguf::Value::as_array) {
            Some(Array::F32(scores)) => scores.clone(),
            Some(Array::I32(scores)) => scores.iter().map(|&n| n as f32).collect(),
            _ => vec![],
        };
        if scores.len() != self.tokens.len() {
            return Err(format!(
                "tokenizer.ggml.scores: expected a number for each of {} tokens, got {}",
                self.tokens.len(),
                scores.len()
            ));
        }
        Ok(scores)
    }

    /// Merges that find what llama.cpp finds by scores.
    fn scored_merges(&self, notes: &mut Vec<String>) -> Result<Vec<(&'a str, &'a str)>, String> {
        if !has_all_bytes(self.tokens.iter().map(String::as_str)) {
            return Err(
                "tokenizer.ggml.tokens: expected tokens of all 256 bytes, <0x00> to \
                        <0xFF>, got fewer"
                    .into(),
            );
        }
        let scores = self.scores()?;
        let pieces: Vec<(&str, f32)> = (self.tokens.iter().zip(self.types).zip(scores))
            .filter(|((_, kind), _)| **kind == kind::NORMAL)
            .map(|((token, _), score)| (token.as_str(), score))
            .collect();
        let (merges, equal) =
            merges_of_scores(&pieces).map_err(|why| format!("tokenizer.ggml.scores: {why}"))?;
        if equal > 0 {
            notes.push(format!(
                "tokenizer.ggml.scores: {equal} tokens have the score of another token; where two \
                 of them overlap in a text, llama.cpp takes the first of the text, this program \
                 the one with the smaller id"
            ));
        }
        Ok(merges)
    }

    /// The vocabulary of a Unigram model: each id, with its score.
    fn put_unigram(&self, frame: &mut Value) -> Result<(), String> {
        let scores = self.scores()?;
        if let Some(score) = scores.iter().find(|score| !score.is_finite()) {
            return Err(format!(
                "tokenizer.ggml.scores: expected finite numbers, got {score}"
            ));
        }
        let unknown = self.token_of("unknown_token_id");
        let (_, unknown) = unknown.ok_or(
            "tokenizer.ggml.unknown_token_id: expected the id of a token, got none with a token",
        )?;
        let entries = self.tokens.iter().zip(scores);
        let vocab: Vec<Value> = entries.map(|(t, score)| json!([t, score])).collect();
        frame["model"]["unk_id"] = unknown.into();
        frame["model"]["vocab"] = vocab.into();
        Ok(())
    }

    /// The vocabulary of a WordPiece model.
    fn put_words(&self, frame: &mut Value) -> Result<(), String> {
        let vocab: Map<String, Value> = (self.tokens.iter().zip(self.types).enumerate())
            .filter(|(_, (_, kind))| **kind != kind::UNUSED)
            .map(|(id, (token, kind))| (wordpiece::to_hf(token, *kind), id.into()))
            .collect();
        let unknown = self.token_of("unknown_token_id");
        let (unknown, id) = unknown.ok_or(
            "tokenizer.ggml.unknown_token_id: expected the id of a token, got none with a token",
        )?;
        let kind = self.types.get(id as usize).copied().unwrap_or_default();
        frame["model"]["unk_token"] = wordpiece::to_hf(unknown, kind).into();
        frame["model"]["vocab"] = vocab.into();
        Ok(())
    }

    /// The token that a key names by its id, or that llama.cpp takes without the key.
    pub(super) fn token_of(&self, key: &str) -> Option<(&'a String, u64)> {
        token_of(self.metadata, key)
    }

    /// The tokens that are looked for in a text before it is cut.
    pub(super) fn added_tokens(&self) -> Vec<Value> {
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

    /// A template that adds special tokens, if any are added.
    pub(super) fn template(&self) -> Option<Value> {
        let (add_bos, add_eos) = adds(self.metadata);
        let words = matches!(self.kind, Kind::WordPiece);
        let end = if words {
            "seperator_token_id"
        } else {
            "eos_token_id"
        };
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut specials = Map::new();
        for (adds, key, at) in [
            (add_bos || words, "bos_token_id", 0),
            (add_eos || words, end, usize::MAX),
        ] {
            if let Some((token, id)) = self.token_of(key).filter(|_| adds) {
                let item = json!({"SpecialToken": {"id": token, "type_id": 0}});
                single.insert(at.min(single.len()), item);
                let special = json!({"id": token, "ids": [id], "tokens": [token]});
                specials.insert(token.clone(), special);
            }
        }
        if specials.is_empty() {
            return None;
        }
        let mut pair = single.clone();
        // WordPiece has one token before both texts, and one after each.
        let second = single.iter().skip(usize::from(words));
        pair.extend(second.map(second_text));
        Some(json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": specials,
        }))
    }
}

fn get<'a>(metadata: &'a [(String, gguf::Value)], key: &str) -> Option<&'a gguf::Value> {
    find(metadata, &format!("tokenizer.ggml.{key}"))
}

fn model(metadata: &[(String, gguf::Value)]) -> &str {
    let model = get(metadata, "model").and_then(gguf::Value::as_str);
    model.unwrap_or_default()
}

/// Ids that llama.cpp takes where a file has no key.
const DEFAULT_IDS: [(&str, &str, u64); 11] = [
    ("llama", "bos_token_id", 1),
    ("llama", "eos_token_id", 2),
    ("llama", "unknown_token_id", 0),
    ("t5", "eos_token_id", 1),
    ("t5", "unknown_token_id", 2),
    ("t5", "padding_token_id", 0),
    ("bert", "bos_token_id", 101),
    ("bert", "unknown_token_id", 100),
    ("bert", "seperator_token_id", 102),
    ("bert", "padding_token_id", 0),
    ("bert", "mask_token_id", 103),
];

fn token_of<'a>(metadata: &'a [(String, gguf::Value)], key: &str) -> Option<(&'a String, u64)> {
    let id = match get(metadata, key) {
        Some(id) => id.as_u64()?,
        None => {
            let model = model(metadata);
            let mut ids = DEFAULT_IDS.iter();
            ids.find(|(m, k, _)| (*m, *k) == (model, key))?.2
        }
    };
    let tokens = get(metadata, "tokens")?.as_strings()?;
    Some((tokens.get(usize::try_from(id).ok()?)?, id))
}

/// Whether texts begin and end with a special token.
fn adds(metadata: &[(String, gguf::Value)]) -> (bool, bool) {
    let flag = |key: &str| get(metadata, key).and_then(gguf::Value::as_bool);
    let (bos, eos) = match Kind::read(metadata) {
        Ok(Kind::ByteLevel(pre)) => (pre.adds_bos, false),
        Ok(Kind::Scored) => (true, false),
        Ok(Kind::Unigram) => (false, true),
        _ => (false, false),
    };
    // llama.cpp takes no other value for Gemma 4.
    let gemma = model(metadata) == "gemma4";
    (
        gemma || flag("add_bos_token").unwrap_or(bos),
        flag("add_eos_token").unwrap_or(eos),
    )
}

/// tokenizer_config.json.
fn settings(metadata: &[(String, gguf::Value)]) -> Value {
    let (add_bos, add_eos) = adds(metadata);
    let words = model(metadata) == "bert";
    let mut settings = json!({
        "clean_up_tokenization_spaces": false,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    if !words {
        settings["add_bos_token"] = add_bos.into();
        settings["add_eos_token"] = add_eos.into();
    }
    for (name, key) in [
        (
            if words { "cls_token" } else { "bos_token" },
            "bos_token_id",
        ),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
        ("sep_token", "seperator_token_id"),
        ("mask_token", "mask_token_id"),
    ] {
        if let Some((token, _)) = token_of(metadata, key) {
            settings[name] = token.as_str().into();
        }
    }
    let template = find(metadata, "tokenizer.chat_template");
    if let Some(template) = template.and_then(gguf::Value::as_str) {
        settings["chat_template"] = template.into();
    }
    let keys = GgufKeys::new(Path::new("GGUF metadata"), metadata).ok();
    if let Some(length) = keys.and_then(|k| k.size("context_length").ok()) {
        settings["model_max_length"] = length.into();
    }
    settings
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
