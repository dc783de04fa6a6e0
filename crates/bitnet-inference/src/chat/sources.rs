//! Where the chat templates of a checkpoint are.

use crate::Result;
use crate::tokenizer::{read_json, read_text};
use bitnet_formats::arch::hf_tokenizer_settings;
use bitnet_formats::{Kind, Source};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// What a checkpoint has for chats.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Templates with their names. That of most models is named `default`.
    pub(super) templates: Vec<(String, String)>,
    /// Names and texts of the special tokens that a template may write.
    pub(super) specials: Vec<(String, String)>,
    /// What was assumed.
    pub(super) notes: Vec<String>,
}

/// Name of the template where a model has one.
pub(super) const DEFAULT: &str = "default";

impl Found {
    pub(super) fn read(source: &Source) -> Result<Self> {
        if source.kind() == Kind::Gguf {
            Ok(Self::of_gguf(source))
        } else {
            Self::of_folder(source)
        }
    }

    fn of_gguf(source: &Source) -> Self {
        const KEY: &str = "tokenizer.chat_template";
        let templates = source
            .gguf()
            .iter()
            .filter_map(|(key, value)| {
                let name = key.strip_prefix(KEY)?;
                let name = match name {
                    "" => DEFAULT,
                    named => named.strip_prefix('.')?,
                };
                Some((name.to_string(), value.as_str()?.to_string()))
            })
            .collect();
        let settings = hf_tokenizer_settings(source.gguf());
        Self {
            templates,
            specials: specials(&settings, &Value::Null),
            notes: vec![],
        }
    }

    /// As transformers: chat_template.jinja and the files of additional_chat_templates, then
    /// tokenizer_config.json, then chat_template.json, which transformers reads for models of text
    /// and images.
    fn of_folder(source: &Source) -> Result<Self> {
        let folder = source.path();
        let json = |name: &str| -> Result<Value> {
            Ok(read_json(&folder.join(name))?.unwrap_or(Value::Null))
        };
        let settings = json("tokenizer_config.json")?;
        let map = json("special_tokens_map.json").unwrap_or(Value::Null);
        let mut found = Self {
            specials: specials(&settings, &map),
            ..Self::default()
        };
        let mut jinja = additional(&folder.join("additional_chat_templates"))?;
        if let Some(text) = read_text(&folder.join("chat_template.jinja"))? {
            jinja.insert(0, (DEFAULT.to_string(), text));
        }
        let old = json("chat_template.json").unwrap_or(Value::Null);
        let places = [
            ("chat_template.jinja", jinja),
            ("tokenizer_config.json", named(&settings["chat_template"])),
            ("chat_template.json", named(&old["chat_template"])),
        ];
        let default = |all: &[(String, String)]| {
            all.iter()
                .find(|t| t.0 == DEFAULT)
                .map(|t| t.1.trim_end().to_string())
        };
        let mut used: Option<&str> = None;
        for (file, templates) in &places {
            let Some(first) = used else {
                if !templates.is_empty() {
                    used = Some(file);
                    found.templates.clone_from(templates);
                }
                continue;
            };
            let (ours, other) = (default(&found.templates), default(templates));
            if other.is_some() && ours.is_some() && ours != other {
                found.notes.push(format!(
                    "{}: {first} and {file} have different chat templates; that of {first} is \
                     used, as in transformers",
                    folder.display()
                ));
            }
            for template in templates {
                if found.templates.iter().all(|t| t.0 != template.0) {
                    found.templates.push(template.clone());
                }
            }
        }
        Ok(found)
    }
}

/// The templates of a folder, each named like its file, in the order of their names.
fn additional(folder: &Path) -> Result<Vec<(String, String)>> {
    let mut found = vec![];
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.file_stem().and_then(|stem| stem.to_str());
        if let Some(name) = name.filter(|_| path.extension().is_some_and(|e| e == "jinja"))
            && let Some(text) = read_text(&path)?
        {
            found.push((name.to_string(), text));
        }
    }
    found.sort();
    Ok(found)
}

/// One template, a list of named ones, or an object of them.
fn named(value: &Value) -> Vec<(String, String)> {
    let owned = |name: &str, text: &Value| Some((name.to_string(), text.as_str()?.to_string()));
    match value {
        Value::String(text) => vec![(DEFAULT.to_string(), text.clone())],
        Value::Array(list) => list
            .iter()
            .filter_map(|t| owned(t["name"].as_str()?, &t["template"]))
            .collect(),
        Value::Object(map) => map.iter().filter_map(|(k, v)| owned(k, v)).collect(),
        _ => vec![],
    }
}

/// The special tokens of tokenizer_config.json, and those that only special_tokens_map.json names.
fn specials(settings: &Value, map: &Value) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = vec![];
    let entries = [&settings["extra_special_tokens"], settings, map]
        .into_iter()
        .filter_map(Value::as_object)
        .flatten();
    for (name, token) in entries {
        let text = token.as_str().or_else(|| token["content"].as_str());
        if let Some(text) = text
            && name.ends_with("_token")
            && all.iter().all(|t| t.0 != *name)
        {
            all.push((name.clone(), text.to_string()));
        }
    }
    all
}
