//! Special tokens of a tokenizer.json as keys of llama.cpp.

use super::plan::steps;
use super::to_gguf::{Pairs, key};
use crate::arch::end_ids::EndIds;
use crate::arch::values::shown;
use crate::gguf;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Where the special tokens of a model are named.
pub(super) struct Sources<'a> {
    pub(super) tokenizer: &'a Value,
    /// tokenizer_config.json.
    pub(super) settings: &'a Value,
    pub(super) config: &'a Value,
    pub(super) tokens: &'a [String],
    pub(super) ids: &'a HashMap<&'a str, usize>,
}

/// Writes the ids of special tokens, and which of them a text gets.
pub(super) fn put_special(
    sources: &Sources<'_>,
    unknown: Option<usize>,
    model: &str,
    pairs: &mut Pairs,
    notes: &mut Vec<String>,
) -> Result<(), String> {
    let id_of = |name: &str| special_id(sources.settings, sources.config, name, sources.ids);
    let template = Template::read(sources.tokenizer)?;
    let (cls, sep) = (id_of("cls"), id_of("sep"));
    if model == "bert" {
        let template = template.ok_or("its post-processor adds no special tokens")?;
        return put_bert(sources, &template, unknown, pairs);
    }
    let start = template.as_ref().map(|t| t.before.as_slice());
    let end = template.as_ref().map(|t| t.after.as_slice());
    let (bos, add_bos) = sources.added("add_bos_token", start, id_of("bos"), cls)?;
    let (eos, add_eos) = sources.added("add_eos_token", end, id_of("eos"), sep)?;
    for (name, id) in [
        ("bos_token_id", bos),
        ("eos_token_id", eos),
        ("padding_token_id", id_of("pad")),
        ("unknown_token_id", unknown.or_else(|| id_of("unk"))),
        ("seperator_token_id", sep),
        ("mask_token_id", id_of("mask")),
    ] {
        put_id(name, id, pairs);
    }
    if eos.is_none() {
        notes.push(
            "there is no end-of-text token: llama.cpp takes a token of its own choice for it"
                .into(),
        );
    }
    put_ends(sources.config, eos, sources.tokens, pairs, notes);
    pairs.push((key("add_bos_token"), add_bos.into()));
    pairs.push((key("add_eos_token"), add_eos.into()));
    Ok(())
}

/// The tokens of WordPiece: llama.cpp puts one before and one after every text.
fn put_bert(
    sources: &Sources<'_>,
    template: &Template,
    unknown: Option<usize>,
    pairs: &mut Pairs,
) -> Result<(), String> {
    let id_of = |name: &str| special_id(sources.settings, sources.config, name, sources.ids);
    let around = |side: &[String]| match side {
        [one] => sources.id(one),
        _ => Err(beside(side)),
    };
    let (before, after) = (around(&template.before)?, around(&template.after)?);
    let unknown = unknown
        .or_else(|| id_of("unk"))
        .ok_or("it names no unknown token")?;
    for (name, id) in [
        ("bos_token_id", Some(before)),
        ("cls_token_id", Some(before)),
        ("seperator_token_id", Some(after)),
        ("unknown_token_id", Some(unknown)),
        ("padding_token_id", id_of("pad")),
        ("mask_token_id", id_of("mask")),
    ] {
        put_id(name, id, pairs);
    }
    pairs.push((key("add_bos_token"), true.into()));
    pairs.push((key("add_sep_token"), true.into()));
    Ok(())
}

fn put_id(name: &str, id: Option<usize>, pairs: &mut Pairs) {
    if let Some(id) = id {
        pairs.push((key(name), gguf::Value::U32(id as u32)));
    }
}

fn beside(tokens: &[String]) -> String {
    format!(
        "its template puts {} beside the text",
        shown(Some(&json!(tokens)))
    )
}

impl Sources<'_> {
    fn id(&self, token: &str) -> Result<usize, String> {
        let id = self.ids.get(token).copied();
        id.ok_or_else(|| format!("its template has the token '{token}', which is not there"))
    }

    /// The token at one side of a text, and whether every text gets it. A template decides where
    /// there is one, as it does in `tokenizers`; else `setting` of tokenizer_config.json. `other` is
    /// the token that models for whole texts put there.
    fn added(
        &self,
        setting: &str,
        template: Option<&[String]>,
        named: Option<usize>,
        other: Option<usize>,
    ) -> Result<(Option<usize>, bool), String> {
        match template {
            None => Ok((named, named.is_some() && self.settings[setting] == true)),
            Some([]) => Ok((named, false)),
            Some([one]) => {
                let id = Some(self.id(one)?);
                if named.is_some() && id != named && id != other {
                    return Err(beside(std::slice::from_ref(one)));
                }
                Ok((id, true))
            }
            Some(more) => Err(beside(more)),
        }
    }
}

/// The special tokens that a post-processor puts around one text.
#[derive(Debug, Default, PartialEq, Eq)]
struct Template {
    before: Vec<String>,
    after: Vec<String>,
}

impl Template {
    fn read(tokenizer: &Value) -> Result<Option<Self>, String> {
        for step in steps(tokenizer, "post_processor", "processors") {
            match step["type"].as_str() {
                Some("ByteLevel") => {}
                Some("TemplateProcessing") => return Self::of_single(&step["single"]).map(Some),
                Some("BertProcessing" | "RobertaProcessing") => {
                    let token = |name: &str| step[name][0].as_str().map(|text| vec![text.into()]);
                    if let (Some(before), Some(after)) = (token("cls"), token("sep")) {
                        return Ok(Some(Self { before, after }));
                    }
                    return Err(format!("its post-processor has {}", shown(Some(step))));
                }
                _ => return Err(format!("its post-processor has {}", shown(Some(step)))),
            }
        }
        Ok(None)
    }

    fn of_single(single: &Value) -> Result<Self, String> {
        let mut template = Self::default();
        let mut has_text = false;
        for item in single.as_array().into_iter().flatten() {
            if item.get("Sequence").is_some() {
                has_text = true;
                continue;
            }
            let token = item["SpecialToken"]["id"].as_str();
            let token = token.ok_or_else(|| format!("its template has {}", shown(Some(item))))?;
            let side = if has_text {
                &mut template.after
            } else {
                &mut template.before
            };
            side.push(token.into());
        }
        if has_text {
            Ok(template)
        } else {
            Err("its template has no text".into())
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
