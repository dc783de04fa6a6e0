//! tokenizer.json as keys of llama.cpp.

use super::kind;
use super::plan::{Plan, SPACE, plan_bpe, plan_unigram, plan_wordpiece};
use super::special::{Sources, put_special};
use super::vocabulary::{byte_token, merges, outside, vocabulary};
use super::wordpiece;
use crate::arch::values::shown;
use crate::gguf::{self, Array};
use crate::{Error, Result, hints, python_json};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

pub(super) type Pairs = Vec<(String, gguf::Value)>;

/// The tokenizer's keys: `none` if GGUF cannot express it. What is lost goes into `losses`, other
/// differences into `notes`. `eos_token_id` of `config` has all tokens that end a text.
pub(in crate::arch) fn gguf_tokenizer(
    folder: &Path,
    config: &Value,
    vocab_size: usize,
    (losses, notes): (&mut Vec<String>, &mut Vec<String>),
) -> Result<Pairs> {
    let none = || vec![("tokenizer.ggml.model".into(), "none".into())];
    let lost = "the file has no tokenizer, so programs must work with token ids";
    let settings = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_else(|| json!({}));
    let path = folder.join("tokenizer.json");
    let Some(mut tokenizer) = read_json(&path)? else {
        let why = hints::no_tokenizer(&path);
        let why = why.unwrap_or("there is no tokenizer.json".into());
        losses.push(format!("{why}: {lost}"));
        return Ok(none());
    };
    let template = match fs::read_to_string(folder.join("chat_template.jinja")) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(Error::io(&folder.join("chat_template.jinja"), "read")(e)),
    };
    for (id, token) in take_out_beyond(&mut tokenizer, vocab_size) {
        losses.push(format!(
            "token {id} '{token}' of tokenizer.json is beyond the embedding's {vocab_size} rows and \
             is not in the file"
        ));
    }
    match express(&tokenizer, &settings, config, vocab_size) {
        Ok((mut pairs, said)) => {
            notes.extend(said);
            if let Some(template) = template.or_else(|| chat_template(&settings)) {
                pairs.push(("tokenizer.chat_template".into(), template.into()));
            }
            Ok(pairs)
        }
        Err(reason) => {
            losses.push(format!(
                "tokenizer.json cannot be expressed ({reason}): {lost}"
            ));
            Ok(none())
        }
    }
}

/// Takes out the added tokens behind the last row of the embedding. A model runs without them as
/// long as no text has one.
fn take_out_beyond(tokenizer: &mut Value, vocab_size: usize) -> Vec<(u64, String)> {
    let Some(added) = tokenizer.get_mut("added_tokens") else {
        return vec![];
    };
    let mut beyond = vec![];
    for token in added.as_array().into_iter().flatten() {
        if let (Some(id), Some(text)) = (token["id"].as_u64(), token["content"].as_str())
            && id >= vocab_size as u64
        {
            beyond.push((id, text.to_string()));
        }
    }
    if let Some(added) = added.as_array_mut() {
        added.retain(|token| token["id"].as_u64().is_none_or(|id| id < vocab_size as u64));
    }
    let vocabulary = tokenizer.pointer_mut("/model/vocab");
    if let Some(vocabulary) = vocabulary.and_then(Value::as_object_mut) {
        for (_, text) in &beyond {
            vocabulary.shift_remove(text);
        }
    }
    beyond
}

fn read_json(path: &Path) -> Result<Option<Value>> {
    match fs::read(path) {
        Ok(bytes) => python_json::parse(path, &bytes).map(Some),
        Err(e) if e.kind() == ErrorKind::NotFound => match hints::dangling_link(path) {
            Some(got) => Err(Error::file(path, "a file", got)),
            None => Ok(None),
        },
        Err(e) => Err(Error::io(path, "read")(e)),
    }
}

fn chat_template(settings: &Value) -> Option<String> {
    match settings.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default")?;
            default["template"].as_str().map(Into::into)
        }
        _ => None,
    }
}

/// Keys and notes, or why GGUF cannot express the tokenizer.
pub(super) fn express(
    tokenizer: &Value,
    settings: &Value,
    config: &Value,
    vocab_size: usize,
) -> Result<(Pairs, Vec<String>), String> {
    let model = &tokenizer["model"];
    let mut notes = vec![];
    let merges = merges(model)?;
    let (tokens, scores) = vocabulary(model, vocab_size)?;
    let mut plan = match model["type"].as_str() {
        Some("BPE") => plan_bpe(tokenizer, &tokens, &merges, &mut notes)?,
        Some("Unigram") => plan_unigram(tokenizer, &tokens, &mut notes)?,
        Some("WordPiece") => plan_wordpiece(tokenizer, &mut notes)?,
        _ => return Err(format!("its model is {}", shown(model.get("type")))),
    };
    let unknown = unknown_id(model, &tokens);
    let mut slots = Slots::new(tokens, &plan);
    slots.add(tokenizer, &plan, &mut notes)?;
    let unknown_kind = unknown.and_then(|id| slots.types.get_mut(id));
    if let Some(kind) = unknown_kind.filter(|_| plan.spaces) {
        *kind = kind::UNKNOWN;
    }
    let types = std::mem::take(&mut slots.types);
    let mut tokens = slots.names(&mut notes);
    if plan.model == "bert" {
        let marked = tokens.iter().zip(&types);
        tokens = marked
            .map(|(t, kind)| wordpiece::to_gguf(t, *kind))
            .collect();
    }
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if ids.insert(token.as_str(), id).is_some() {
            return Err(format!("token '{token}' is there twice"));
        }
    }

    let mut pairs = identity(&plan);
    let sources = Sources {
        tokenizer,
        settings,
        config,
        tokens: &tokens,
        ids: &ids,
    };
    put_special(&sources, unknown, plan.model, &mut pairs, &mut notes)?;
    if plan.model != "bert" {
        pairs.push((key("add_space_prefix"), plan.prefix.into()));
    }
    pairs.append(&mut plan.more);
    if let Some(mut scores) = plan.scores.or(scores) {
        // llama.cpp finds unused tokens in a text too.
        let unused = scores.iter_mut().zip(&types);
        unused
            .filter(|(_, kind)| **kind == kind::UNUSED)
            .for_each(|(score, _)| *score = UNUSED_SCORE);
        pairs.push((key("scores"), Array::F32(scores).into()));
    }
    pairs.push((key("token_type"), Array::I32(types).into()));
    pairs.push((key("tokens"), Array::String(tokens).into()));
    if plan.model == "gpt2" {
        let merges = merges.into_iter().map(|(a, b)| format!("{a} {b}"));
        pairs.push((key("merges"), Array::String(merges.collect()).into()));
    }
    Ok((pairs, notes))
}

/// The score of a row of the embedding without a token.
const UNUSED_SCORE: f32 = -1e6;

pub(super) fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

/// The keys that name the tokenizer of llama.cpp.
fn identity(plan: &Plan) -> Pairs {
    let mut pairs: Pairs = vec![(key("model"), plan.model.into())];
    if let Some(pre) = plan.pre {
        pairs.push((key("pre"), pre.into()));
    }
    pairs
}

/// The model's token for unknown text.
fn unknown_id(model: &Value, tokens: &[Option<String>]) -> Option<usize> {
    match model["unk_id"].as_u64() {
        Some(id) => Some(id as usize),
        None => model["unk_token"]
            .as_str()
            .and_then(|text| tokens.iter().position(|t| t.as_deref() == Some(text))),
    }
}

/// The rows of the embedding: a token for each, or none, and its type.
struct Slots {
    tokens: Vec<Option<String>>,
    types: Vec<i32>,
}

impl Slots {
    /// The model's own tokens.
    fn new(tokens: Vec<Option<String>>, plan: &Plan) -> Self {
        let kind_of = |token: &Option<String>| match token.as_deref() {
            Some(text) if plan.bytes && byte_token(text).is_some() => kind::BYTE,
            Some(_) => kind::NORMAL,
            None => kind::UNUSED,
        };
        let types = tokens.iter().map(kind_of).collect();
        Self { tokens, types }
    }

    /// The tokens of `added_tokens`, which are looked for in the text before it is cut.
    fn add(
        &mut self,
        tokenizer: &Value,
        plan: &Plan,
        notes: &mut Vec<String>,
    ) -> Result<(), String> {
        let vocab_size = self.tokens.len();
        let mut normalized = None;
        for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let (Some(id), Some(text)) = (added["id"].as_u64(), added["content"].as_str()) else {
                return Err(format!("an added token is {}", shown(Some(added))));
            };
            let id = id as usize;
            let Some(slot) = self.tokens.get_mut(id) else {
                return Err(outside(text, id, vocab_size));
            };
            let special = added["special"].as_bool().unwrap_or(false);
            if added["normalized"] == true && (plan.spaces || plan.model == "bert") {
                normalized.get_or_insert(text);
            }
            if ["lstrip", "rstrip", "single_word"]
                .iter()
                .any(|flag| added[*flag] == true)
            {
                notes.push(format!(
                    "token '{text}' takes the spaces beside it or stands as a single word only: \
                     llama.cpp does not"
                ));
            }
            // The text is searched as it came, with spaces.
            *slot = Some(if special || !plan.spaces {
                text.into()
            } else {
                text.replace(SPACE, " ")
            });
            self.types[id] = if special {
                kind::CONTROL
            } else {
                kind::USER_DEFINED
            };
        }
        notes.extend(normalized.map(|text| {
            format!(
                "the tokenizer looks for added tokens such as '{text}' in the normalized text, \
                 llama.cpp in the text as it is"
            )
        }));
        Ok(())
    }

    /// A name for each row.
    fn names(self, notes: &mut Vec<String>) -> Vec<String> {
        let unused = self.tokens.iter().filter(|t| t.is_none()).count();
        if unused > 0 {
            notes.push(format!(
                "{unused} rows of the embedding have no token; they are named [PAD…]"
            ));
        }
        let named =
            |(i, token): (usize, Option<String>)| token.unwrap_or_else(|| format!("[PAD{i}]"));
        self.tokens.into_iter().enumerate().map(named).collect()
    }
}
