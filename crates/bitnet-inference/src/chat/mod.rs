//! Chat templates: jinja, as Hugging Face tokenizers and GGUF files carry them.
//!
//! A template sees what it sees in transformers: `messages`, `tools`, `documents`, the special
//! tokens, `raise_exception`, `strftime_now`, and python's methods and `%`.

mod python;
mod rewrite;
mod sources;

use crate::{Error, Result};
use bitnet_formats::Source;
use jiff::ZonedDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value as Jinja, context};
use sources::{DEFAULT, Found};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// The speaker: `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl ChatMessage {
    /// A message by `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// Functions that a model may call, for templates that describe them to it.
#[derive(Debug, Clone)]
pub struct Tools(Jinja);

impl Tools {
    /// Tools as a JSON list of objects, in the form of the OpenAI API:
    /// `[{"type": "function", "function": {"name": …, "description": …, "parameters": …}}]`.
    ///
    /// # Errors
    /// [`Error::Template`] for a text that is no such list.
    pub fn from_json(text: &str) -> Result<Self> {
        let bad = |got: String| {
            Error::Template(format!("tools: expected a JSON list of objects, got {got}"))
        };
        let list: Vec<serde_json::Map<String, serde_json::Value>> =
            serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        Ok(Self(Jinja::from(minijinja::value::Serde(list))))
    }
}

/// Fuel of a rendering: what minijinja spends on some 60 MB of text, or as many steps.
const FUEL: u64 = 1_000_000;

/// Further fuel for each message.
const FUEL_PER_MESSAGE: u64 = 10_000;

/// Largest template in bytes. Those of models have at most some 30 thousand.
const MAX_TEMPLATE: usize = 1 << 20;

/// The templates of a model, with the texts of the special tokens that they may name.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    /// The file or folder, for messages.
    path: PathBuf,
    environment: Environment<'static>,
    /// Each template that there is, with the reason if it cannot be used.
    names: BTreeMap<String, Option<String>>,
    specials: Vec<(String, String)>,
    notes: Vec<String>,
}

impl ChatTemplate {
    /// The templates of an open checkpoint, if it has any. One that does not parse is an error only
    /// when it renders a conversation.
    ///
    /// # Errors
    /// [`Error::File`] for a file that cannot be read.
    pub(crate) fn read(source: &Source) -> Result<Option<Self>> {
        let found = Found::read(source)?;
        if found.templates.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self::new(source.path(), found, None)))
    }

    /// The templates; `now` is the time that they see instead of the present.
    fn new(path: &Path, found: Found, now: Option<ZonedDateTime>) -> Self {
        let mut environment = environment(now);
        let mut names = BTreeMap::new();
        for (name, text) in found.templates {
            let added = if text.len() > MAX_TEMPLATE {
                Err(format!(
                    "expected at most {MAX_TEMPLATE} bytes, got {}",
                    text.len()
                ))
            } else {
                rewrite::rewrite(&text).and_then(|text| {
                    environment
                        .add_template_owned(name.clone(), text)
                        .map_err(|e| reason(&e))
                })
            };
            names.insert(name, added.err());
        }
        Self {
            path: path.to_path_buf(),
            environment,
            names,
            specials: found.specials,
            notes: found.notes,
        }
    }

    /// Sentences about what was assumed.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The text of a conversation up to the start of the answer.
    pub(crate) fn render(&self, messages: &[ChatMessage], tools: Option<&Tools>) -> Result<String> {
        let messages: Vec<Jinja> = messages
            .iter()
            .map(|m| context! { role => &m.role, content => &m.content })
            .collect();
        self.render_values(Jinja::from(messages), tools)
    }

    fn render_values(&self, messages: Jinja, tools: Option<&Tools>) -> Result<String> {
        let bad = |what: &str| Error::Template(format!("{}: {what}", self.path.display()));
        let name = self.name(tools.is_some()).map_err(|e| bad(&e))?;
        let tools = tools.map_or(Jinja::from(()), |t| t.0.clone());
        let mut all: BTreeMap<&str, Jinja> = self
            .specials
            .iter()
            .map(|(name, text)| (name.as_str(), Jinja::from(text.as_str())))
            .collect();
        let count = messages.len().unwrap_or(0) as u64;
        all.insert("messages", messages);
        all.insert("tools", tools);
        all.insert("documents", Jinja::from(()));
        all.insert("add_generation_prompt", Jinja::from(true));
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + count * FUEL_PER_MESSAGE));
        environment
            .get_template(name)
            .and_then(|t| t.render(Jinja::from(all)))
            .map_err(|e| bad(&reason(&e)))
    }

    /// The name of the template to use, as transformers chooses it.
    fn name(&self, tools: bool) -> Result<&str, String> {
        let name = match self.names.len() {
            1 => self.names.keys().next(),
            _ => ["tool_use", DEFAULT]
                .iter()
                .skip(usize::from(!tools))
                .find_map(|name| self.names.get_key_value(*name))
                .map(|(name, _)| name),
        };
        let Some(name) = name else {
            let names: Vec<&str> = self.names.keys().map(String::as_str).collect();
            return Err(format!(
                "expected a template named {DEFAULT}, got {}",
                names.join(", ")
            ));
        };
        match &self.names[name] {
            None => Ok(name),
            Some(reason) => Err(reason.clone()),
        }
    }
}

/// The jinja of transformers.
fn environment(now: Option<ZonedDateTime>) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    if let Ok(syntax) = syntax {
        environment.set_syntax(syntax);
    }
    // `default` with a name such as x.json would escape.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python::method);
    minijinja_contrib::add_to_environment(&mut environment);
    environment.add_filter("tojson", python::to_json);
    environment.add_filter("truncate", python::truncate);
    environment.add_filter("wordcount", python::word_count);
    environment.add_filter("center", python::center);
    environment.add_test("sequence", python::is_sequence);
    environment.add_function(rewrite::PERCENT, python::percent);
    environment.add_function("strftime_now", move |form: &str| {
        let now = now.clone().unwrap_or_else(ZonedDateTime::now);
        python::strftime(form, &now)
    });
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment
}

/// One line about an error of a template, with what caused it.
fn reason(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text += &format!(": {inner}");
        cause = inner.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests;
