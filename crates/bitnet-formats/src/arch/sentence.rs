//! The files that sentence-transformers puts beside a model: how an embedding is made of hidden
//! states.
//!
//! `modules.json` lists the steps; the folder of the step Pooling has a config.json with its mode,
//! and `config_sentence_transformers.json` has prompts.

use super::values::{HfConfig, shown};
use crate::{Error, Result, python_json};
use serde_json::Value;
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path};

/// How the hidden states of a text's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the first token, `[CLS]`.
    Cls,
    /// That of the last token.
    Last,
    /// The largest value of each dimension.
    Max,
}

bitnet_core::named!(Pooling, "pooling", {
    Mean = "mean",
    Cls = "cls",
    Last = "last",
    Max = "max",
});

impl Pooling {
    /// Its key in the config.json of the step Pooling, and its name in `pooling_mode`.
    const fn hf_names(self) -> (&'static str, &'static str) {
        match self {
            Self::Mean => ("pooling_mode_mean_tokens", "mean"),
            Self::Cls => ("pooling_mode_cls_token", "cls"),
            Self::Last => ("pooling_mode_lasttoken", "lasttoken"),
            Self::Max => ("pooling_mode_max_tokens", "max"),
        }
    }

    /// Its number under `pooling_type` of a GGUF; none for a pooling that llama.cpp has not.
    pub(super) const fn gguf_type(self) -> Option<u32> {
        match self {
            Self::Mean => Some(1),
            Self::Cls => Some(2),
            Self::Last => Some(3),
            Self::Max => None,
        }
    }

    pub(super) fn from_gguf_type(n: u64) -> Option<Self> {
        let is = |p: &&Self| p.gguf_type().is_some_and(|m| u64::from(m) == n);
        Self::ALL.iter().find(is).copied()
    }
}

/// What the files of sentence-transformers say of a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SentenceFiles {
    /// The pooling, if there is the step.
    pub pooling: Option<Pooling>,
    /// Whether vectors get the length 1: the step Normalize.
    pub normalize: bool,
    /// `max_seq_length`: most tokens of a text.
    pub max_tokens: Option<usize>,
    /// Name and text of each prompt, which is put before a text.
    pub prompts: Vec<(String, String)>,
    /// The prompt that every text gets unless another is named.
    pub default_prompt: Option<String>,
}

impl SentenceFiles {
    /// Reads the files of a folder; `None` if it has no modules.json. `hidden` is the model's
    /// number of dimensions.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] for a file that cannot be read; [`Error::Config`] for a
    /// step, a pooling or a setting that this program does not compute.
    pub fn read(folder: &Path, hidden: usize) -> Result<Option<Self>> {
        let path = folder.join("modules.json");
        let Some(modules) = read_json(&path)? else {
            return Ok(None);
        };
        let mut files = Self::default();
        let steps = modules
            .as_array()
            .ok_or_else(|| Error::file(&path, "a list of modules", shown(Some(&modules))))?;
        for (i, step) in steps.iter().enumerate() {
            files.step(folder, &path, i, step, hidden)?;
        }
        files.read_limits(&folder.join("sentence_bert_config.json"))?;
        files.read_prompts(&folder.join("config_sentence_transformers.json"))?;
        Ok(Some(files))
    }

    fn step(
        &mut self,
        folder: &Path,
        path: &Path,
        i: usize,
        step: &Value,
        hidden: usize,
    ) -> Result<()> {
        let kind = step["type"].as_str().unwrap_or_default();
        let kind = kind.rsplit('.').next().unwrap_or_default();
        let (pooled, normalized) = (self.pooling.is_some(), self.normalize);
        match kind {
            "Transformer" if i == 0 => Ok(()),
            "Pooling" if i > 0 && !pooled && !normalized => {
                let path = folder.join(step_folder(path, i, step)?).join("config.json");
                let value = read_json(&path)?.ok_or_else(|| {
                    Error::file(&path, "the config.json of the step Pooling", "no such file")
                })?;
                self.pooling = Some(pooling(
                    &HfConfig {
                        path: &path,
                        value: &value,
                    },
                    hidden,
                )?);
                Ok(())
            }
            "Normalize" if i > 0 && !normalized => {
                self.normalize = true;
                Ok(())
            }
            _ => Err(Error::config(
                path,
                format!("[{i}].type"),
                "Transformer, then Pooling, then Normalize or nothing: this program computes no \
                 other steps",
                shown(step.get("type")),
            )),
        }
    }

    fn read_limits(&mut self, path: &Path) -> Result<()> {
        let Some(value) = read_json(path)? else {
            return Ok(());
        };
        let config = HfConfig {
            path,
            value: &value,
        };
        if config.flag("do_lower_case")? {
            return Err(config.bad("do_lower_case", "false: the tokenizer alone changes a text"));
        }
        self.max_tokens = config.optional_size("max_seq_length")?;
        Ok(())
    }

    fn read_prompts(&mut self, path: &Path) -> Result<()> {
        let Some(value) = read_json(path)? else {
            return Ok(());
        };
        let config = HfConfig {
            path,
            value: &value,
        };
        let bad = || config.bad("prompts", "an object of texts");
        if let Some(prompts) = config.get("prompts") {
            for (name, text) in prompts.as_object().ok_or_else(bad)? {
                let text = text.as_str().ok_or_else(bad)?;
                self.prompts.push((name.clone(), text.into()));
            }
        }
        let key = "default_prompt_name";
        if let Some(name) = config.get(key) {
            let name = name.as_str().filter(|name| self.prompt(name).is_some());
            let name = name.ok_or_else(|| config.bad(key, "the name of a prompt, or null"))?;
            self.default_prompt = Some(name.into());
        }
        Ok(())
    }

    /// The text of a prompt.
    pub fn prompt(&self, name: &str) -> Option<&str> {
        let mut prompts = self.prompts.iter();
        prompts
            .find(|(n, _)| n == name)
            .map(|(_, text)| text.as_str())
    }
}

/// The folder of a step, which is one inside the model's.
fn step_folder<'a>(path: &Path, i: usize, step: &'a Value) -> Result<&'a Path> {
    let inside = |folder: &&Path| {
        folder
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
    };
    let folder = step["path"].as_str().map(Path::new).filter(inside);
    folder.ok_or_else(|| {
        let key = format!("[{i}].path");
        Error::config(
            path,
            key,
            "a folder inside the model's",
            shown(step.get("path")),
        )
    })
}

/// The one mode of a Pooling's config.json.
fn pooling(config: &HfConfig, hidden: usize) -> Result<Pooling> {
    let key = "word_embedding_dimension";
    if config.optional_size(key)?.is_some_and(|n| n != hidden) {
        return Err(config.bad(key, &format!("{hidden}, the model's hidden_size")));
    }
    if !config.flag_or("include_prompt", true)? {
        let expected = "true: this program pools the tokens of the prompt too";
        return Err(config.bad("include_prompt", expected));
    }
    let names = "mean, cls, last or max: this program computes one of them";
    let mut found = vec![];
    for (key, value) in config.value.as_object().into_iter().flatten() {
        if !key.starts_with("pooling_mode") || value.is_null() {
            continue;
        }
        let known = |p: &&Pooling| match value.as_str() {
            Some(mode) if key == "pooling_mode" => p.hf_names().1 == mode,
            _ => p.hf_names().0 == key,
        };
        let known = Pooling::ALL.iter().find(known);
        match (value, known) {
            (Value::Bool(false), _) if key != "pooling_mode" => {}
            (Value::Bool(true), Some(pooling)) if key != "pooling_mode" => found.push(*pooling),
            (Value::String(_), Some(pooling)) if key == "pooling_mode" => found.push(*pooling),
            _ => return Err(config.bad(key, names)),
        }
    }
    found.dedup();
    match found[..] {
        [one] => Ok(one),
        [] => Err(config.bad("pooling_mode_mean_tokens", names)),
        [_, second, ..] => Err(config.bad(second.hf_names().0, "false beside another mode")),
    }
}

fn read_json(path: &Path) -> Result<Option<Value>> {
    match fs::read(path) {
        Ok(bytes) => python_json::parse(path, &bytes).map(Some),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, "read")(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A folder of these files.
    fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("1_Pooling")).unwrap();
        for (name, value) in files {
            fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
        dir
    }

    fn step(kind: &str, path: &str) -> Value {
        json!({"path": path, "type": format!("sentence_transformers.models.{kind}")})
    }

    fn error(files: &[(&str, Value)]) -> String {
        let dir = folder(files);
        let error = SentenceFiles::read(dir.path(), 8).unwrap_err();
        error.to_string()
    }

    #[test]
    fn all_files_are_followed() {
        assert_eq!(SentenceFiles::read(folder(&[]).path(), 8).unwrap(), None);
        let steps = json!([
            step("Transformer", ""),
            step("Pooling", "1_Pooling"),
            step("Normalize", "2_Normalize")
        ]);
        for (mode, expected) in [
            (
                json!({"pooling_mode_lasttoken": true, "pooling_mode_cls_token": false}),
                Pooling::Last,
            ),
            (
                json!({"pooling_mode_cls_token": true, "word_embedding_dimension": 8}),
                Pooling::Cls,
            ),
            (json!({"pooling_mode": "mean"}), Pooling::Mean),
        ] {
            let dir = folder(&[
                ("modules.json", steps.clone()),
                ("1_Pooling/config.json", mode),
                (
                    "sentence_bert_config.json",
                    json!({"max_seq_length": 256, "do_lower_case": false}),
                ),
                (
                    "config_sentence_transformers.json",
                    json!({"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": null}),
                ),
            ]);
            let files = SentenceFiles::read(dir.path(), 8).unwrap().unwrap();
            assert_eq!(files.pooling, Some(expected));
            assert!(files.normalize && files.default_prompt.is_none());
            assert_eq!(
                (files.max_tokens, files.prompt("query")),
                (Some(256), Some("Q: "))
            );
        }
    }

    #[test]
    fn what_is_not_computed_is_named() {
        let pooled = |mode: Value| {
            let steps = json!([step("Transformer", ""), step("Pooling", "1_Pooling")]);
            error(&[("modules.json", steps), ("1_Pooling/config.json", mode)])
        };
        for (mode, key) in [
            (
                json!({"pooling_mode_weightedmean_tokens": true}),
                "pooling_mode_weightedmean_tokens",
            ),
            (
                json!({"pooling_mode_cls_token": true, "pooling_mode_max_tokens": true}),
                "false beside another mode",
            ),
            (json!({}), "pooling_mode_mean_tokens"),
            (json!({"pooling_mode": ["mean"]}), "pooling_mode"),
            (
                json!({"pooling_mode_cls_token": true, "include_prompt": false}),
                "include_prompt",
            ),
            (
                json!({"pooling_mode_cls_token": true, "word_embedding_dimension": 9}),
                "word_embedding_dimension",
            ),
        ] {
            let message = pooled(mode);
            assert!(
                message.contains(key) && message.contains("1_Pooling"),
                "{message}"
            );
        }
        let dense = json!([step("Transformer", ""), step("Dense", "2_Dense")]);
        assert!(error(&[("modules.json", dense)]).contains("Dense"));
        let outside = json!([step("Transformer", ""), step("Pooling", "../1_Pooling")]);
        assert!(error(&[("modules.json", outside)]).contains("[1].path"));
    }
}
