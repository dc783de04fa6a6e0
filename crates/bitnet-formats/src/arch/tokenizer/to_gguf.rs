//! tokenizer.json as keys of llama.cpp.

use super::kind;
use super::plan::{Plan, SPACE, plan_bpe, plan_unigram, steps};
use super::vocabulary::{byte_token, merges, outside, scores_of_merges, vocabulary};
use crate::arch::end_ids::EndIds;
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
        losses.push(format!("there is no tokenizer.json: {lost}"));
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
    let (tokens, mut scores) = vocabulary(model, vocab_size)?;
    let plan = match model["type"].as_str() {
        Some("BPE") => plan_bpe(tokenizer, &tokens, &merges, &mut notes)?,
        Some("Unigram") => plan_unigram(tokenizer, &mut notes)?,
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
    let tokens = slots.names(&mut notes);
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if ids.insert(token.as_str(), id).is_some() {
            return Err(format!("token '{token}' is there twice"));
        }
    }
    if plan.model == "llama" && scores.is_none() {
        scores = Some(scores_of_merges(&tokens, &merges));
    }

    let mut pairs = identity(&plan);
    let id_of = |name: &str| special_id(settings, config, name, &ids);
    let special = SpecialIds {
        bos: id_of("bos"),
        eos: id_of("eos"),
        pad: id_of("pad"),
        unknown: unknown.or_else(|| id_of("unk")),
    };
    special.put(&mut pairs, &mut notes);
    put_ends(config, special.eos, &tokens, &mut pairs, &mut notes);
    for (name, side, id) in [
        ("add_bos_token", Side::Start, special.bos),
        ("add_eos_token", Side::End, special.eos),
    ] {
        let token = id.and_then(|id| tokens.get(id)).map(String::as_str);
        let adds = adds(tokenizer, settings, side, token)?;
        pairs.push((key(name), adds.into()));
    }
    pairs.push((key("add_space_prefix"), plan.prefix.into()));
    if let Some(scores) = scores {
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

fn key(name: &str) -> String {
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
        let bytes = plan.model == "llama" || plan.model == "t5";
        let kind_of = |token: &Option<String>| match token.as_deref() {
            Some(text) if bytes && byte_token(text).is_some() => kind::BYTE,
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
        for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let (Some(id), Some(text)) = (added["id"].as_u64(), added["content"].as_str()) else {
                return Err(format!("an added token is {}", shown(Some(added))));
            };
            let id = id as usize;
            let Some(slot) = self.tokens.get_mut(id) else {
                return Err(outside(text, id, vocab_size));
            };
            let special = added["special"].as_bool().unwrap_or(false);
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

/// Ids of the special tokens that GGUF has keys for.
struct SpecialIds {
    bos: Option<usize>,
    eos: Option<usize>,
    pad: Option<usize>,
    unknown: Option<usize>,
}

impl SpecialIds {
    fn put(&self, pairs: &mut Pairs, notes: &mut Vec<String>) {
        for (name, id) in [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("padding_token_id", self.pad),
            ("unknown_token_id", self.unknown),
        ] {
            if let Some(id) = id {
                pairs.push((key(name), gguf::Value::U32(id as u32)));
            }
        }
        if self.eos.is_none() {
            notes.push(
                "there is no end-of-text token: llama.cpp takes a token of its own choice for it"
                    .into(),
            );
        }
    }
}

/// Names the other tokens that end a text, and notes what the file cannot say of them.
fn put_ends(
    config: &Value,
    eos: Option<usize>,
    tokens: &[String],
    pairs: &mut Pairs,
    notes: &mut Vec<String>,
) {
    let value = &config["eos_token_id"];
    let list = value
        .as_array()
        .map_or(std::slice::from_ref(value), |all| all);
    let ids = list.iter().filter_map(Value::as_u64).map(|id| id as usize);
    let ids: Vec<usize> = ids.filter(|id| *id < tokens.len()).collect();
    let name = |id: usize| tokens.get(id).map_or("", String::as_str);
    let ends = EndIds::new(&ids, eos, tokens);
    for (key_name, id) in [("eot_token_id", ends.turn), ("eom_token_id", ends.message)] {
        if let Some(id) = id {
            pairs.push((key(key_name), gguf::Value::U32(id as u32)));
        }
    }
    for id in ends.lost {
        notes.push(format!(
            "token {id} '{}' ends a text in the folder and not in the GGUF, which names three such \
             tokens at most",
            name(id)
        ));
    }
    if let Some(eos) = eos.filter(|eos| !ids.is_empty() && !ids.contains(eos)) {
        notes.push(format!(
            "token {eos} '{}', the eos_token of tokenizer_config.json, ends a text in the GGUF and \
             not in the folder, whose eos_token_id is {value}",
            name(eos)
        ));
    }
}

/// The id of a special token: by its text in tokenizer_config.json, else by number in config.json.
fn special_id(
    settings: &Value,
    config: &Value,
    name: &str,
    ids: &HashMap<&str, usize>,
) -> Option<usize> {
    let token = &settings[format!("{name}_token")];
    let text = token.as_str().or_else(|| token["content"].as_str());
    if let Some(&id) = text.and_then(|text| ids.get(text)) {
        return Some(id);
    }
    let id = &config[format!("{name}_token_id")];
    let id = id.as_u64().or_else(|| id[0].as_u64())? as usize;
    (id < ids.len()).then_some(id)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Start,
    End,
}

/// Whether the tokenizer puts `token` at this side of every text. A template decides where there is
/// one, as it does in `tokenizers`.
fn adds(
    tokenizer: &Value,
    settings: &Value,
    side: Side,
    token: Option<&str>,
) -> Result<bool, String> {
    let processors = steps(tokenizer, "post_processor", "processors");
    for step in &processors {
        match step["type"].as_str() {
            Some("ByteLevel") => {}
            Some("TemplateProcessing") => {
                let single = step["single"].as_array().map_or(&[][..], Vec::as_slice);
                let at = single
                    .iter()
                    .position(|item| item.get("Sequence").is_some())
                    .ok_or("its template has no text")?;
                let around = if side == Side::Start {
                    &single[..at]
                } else {
                    &single[at + 1..]
                };
                return match around {
                    [] => Ok(false),
                    [one] if token.is_some() && one["SpecialToken"]["id"].as_str() == token => {
                        Ok(true)
                    }
                    _ => Err(format!(
                        "its template puts {} beside the text",
                        shown(Some(&json!(around)))
                    )),
                };
            }
            _ => return Err(format!("its post-processor has {}", shown(Some(step)))),
        }
    }
    let key = if side == Side::Start {
        "add_bos_token"
    } else {
        "add_eos_token"
    };
    Ok(token.is_some() && settings[key] == true)
}
