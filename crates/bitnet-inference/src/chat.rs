//! Chat templates: jinja, as Hugging Face tokenizers and GGUF files carry them.

use crate::tokenizer::read_json;
use crate::{Error, Result};
use bitnet_formats::arch::gguf_bpe;
use bitnet_formats::{Kind, Source};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value as Jinja, context};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;

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

/// A compiled template, with the texts of the special tokens that it may name.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    specials: Vec<(&'static str, String)>,
}

/// Keys of `tokenizer_config.json` for the tokens that a template may name.
const SPECIALS: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

impl ChatTemplate {
    /// The template of an open checkpoint, if it has one.
    pub(crate) fn read(source: &Source) -> Result<Option<Self>> {
        let (file, settings) = if source.kind() == Kind::Gguf {
            let template = source
                .gguf()
                .iter()
                .find(|(k, _)| k == "tokenizer.chat_template")
                .and_then(|(_, v)| v.as_str());
            (
                template.map(str::to_string),
                gguf_bpe(source.gguf()).map(|t| t.settings),
            )
        } else {
            let path = source.path().join("chat_template.jinja");
            let file = match fs::read_to_string(&path) {
                Ok(text) => Some(text),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
                Err(e) => return Err(bitnet_formats::Error::io(&path, "read")(e).into()),
            };
            (
                file,
                read_json(&source.path().join("tokenizer_config.json"))?,
            )
        };
        let settings = settings.unwrap_or_else(|| json!({}));
        let Some(text) = file.or_else(|| named_default(&settings["chat_template"])) else {
            return Ok(None);
        };
        let specials = SPECIALS.into_iter().filter_map(|name| {
            let token = &settings[name];
            token
                .as_str()
                .or_else(|| token["content"].as_str())
                .map(|text| (name, text.to_string()))
        });
        Self::new(&text, specials.collect()).map(Some)
    }

    fn new(text: &str, specials: Vec<(&'static str, String)>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(bad)?,
        );
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment
            .add_template_owned("chat", text.to_string())
            .map_err(bad)?;
        Ok(Self {
            environment,
            specials,
        })
    }

    /// The text of a conversation up to the start of the answer.
    pub(crate) fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        let messages: Vec<Jinja> = messages
            .iter()
            .map(|m| context! { role => &m.role, content => &m.content })
            .collect();
        let mut all: BTreeMap<&str, Jinja> = self
            .specials
            .iter()
            .map(|(name, text)| (*name, Jinja::from(text.as_str())))
            .collect();
        all.insert("messages", Jinja::from(messages));
        all.insert("add_generation_prompt", Jinja::from(true));
        self.environment
            .get_template("chat")
            .and_then(|t| t.render(Jinja::from(all)))
            .map_err(bad)
    }
}

fn bad(error: minijinja::Error) -> Error {
    Error::Template(error.to_string())
}

/// The template, or the one named `default` if there are several.
fn named_default(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => named.iter().find(|t| t["name"] == "default")?["template"]
            .as_str()
            .map(Into::into),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}\
        {% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}\
        {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn templates_render_as_in_transformers() {
        let template = ChatTemplate::new(CHATML, vec![]).unwrap();
        let text = template.render(&[ChatMessage::new("user", "Hi")]).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        // b1.58-2B-4T: python's string methods, special tokens, line breaks after blocks.
        let text = "{% set loop_messages = messages %}{% for message in loop_messages %}\n\
            {% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}\
            {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}\
            {{ content }}{% endfor %}{% if add_generation_prompt %}\
            {{ 'Assistant: '.strip() + ' ' }}{% endif %}";
        let template =
            ChatTemplate::new(text, vec![("bos_token", "<|begin_of_text|>".into())]).unwrap();
        let text = template
            .render(&[ChatMessage::new("user", " Hi ")])
            .unwrap();
        assert_eq!(text, "<|begin_of_text|>User: Hi<|eot_id|>Assistant: ");
    }

    #[test]
    fn what_a_template_refuses_is_said() {
        let template =
            ChatTemplate::new("{{ raise_exception('only users speak here') }}", vec![]).unwrap();
        let message = template.render(&[]).unwrap_err().to_string();
        assert!(message.contains("only users speak here"), "{message}");
        assert!(ChatTemplate::new("{% if %}", vec![]).is_err());
    }
}
