//! The tokens that end a text: in a folder by two files, in a GGUF by three keys.

use super::values::{HfConfig, find};
use crate::{Error, Result, gguf, python_json};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// Keys of a GGUF whose tokens end a text in llama.cpp, without `tokenizer.ggml.`.
const GGUF_KEYS: [&str; 3] = ["eos_token_id", "eot_token_id", "eom_token_id"];

/// The tokens that end a text, all of them: `eos_token_id` of generation_config.json, else of
/// config.json.
///
/// # Errors
/// [`Error::Config`] for a value that is neither a token nor a list of tokens; [`Error::File`] for
/// a generation_config.json that is no JSON.
pub fn eos_ids(folder: &Path, config: &HfConfig) -> Result<Vec<u32>> {
    let path = folder.join("generation_config.json");
    let generation = match fs::read(&path) {
        Ok(bytes) => Some(python_json::parse(&path, &bytes)?),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(Error::io(&path, "read")(e)),
    };
    if let Some(value) = &generation {
        let generation = HfConfig { path: &path, value };
        let ids = generation.token_ids("eos_token_id")?;
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    config.token_ids("eos_token_id")
}

/// The tokens that end a text in a GGUF, each once.
pub(super) fn gguf_eos_ids(metadata: &[(String, gguf::Value)]) -> Vec<u64> {
    let mut ids = vec![];
    for key in GGUF_KEYS {
        let id = find(metadata, &format!("tokenizer.ggml.{key}"));
        if let Some(id) = id.and_then(gguf::Value::as_u64)
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    }
    ids
}

/// Where a GGUF names the tokens that end a text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct EndIds {
    /// `eot_token_id`: the end of a turn.
    pub(super) turn: Option<usize>,
    /// `eom_token_id`: the end of a message that expects more.
    pub(super) message: Option<usize>,
    /// Tokens for which no key is left.
    pub(super) lost: Vec<usize>,
}

impl EndIds {
    /// Distributes the tokens other than `eos` over the keys.
    pub(super) fn new(ids: &[usize], eos: Option<usize>, tokens: &[String]) -> Self {
        let mut ends = Self::default();
        let mut rest: Vec<usize> = ids.iter().copied().filter(|&id| Some(id) != eos).collect();
        rest.sort_by_key(|&id| !tokens.get(id).is_some_and(|t| t.contains("eom")));
        rest.dedup();
        for id in rest {
            let is_message = tokens.get(id).is_some_and(|t| t.contains("eom"));
            let slot = match (&ends.turn, &ends.message) {
                (_, None) if is_message => &mut ends.message,
                (None, _) => &mut ends.turn,
                (_, None) => &mut ends.message,
                _ => {
                    ends.lost.push(id);
                    continue;
                }
            };
            *slot = Some(id);
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_generation_config_comes_first_and_lists_stay_whole() {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({"eos_token_id": [1, 2]});
        let path = folder.path().join("generation_config.json");
        let read = |generation: &str| {
            fs::write(&path, generation).unwrap();
            let config = HfConfig {
                path: Path::new("config.json"),
                value: &config,
            };
            eos_ids(folder.path(), &config)
        };
        assert_eq!(read(r#"{"eos_token_id": [7, 8, 9]}"#).unwrap(), [7, 8, 9]);
        assert_eq!(read(r#"{"eos_token_id": 7, "x": NaN}"#).unwrap(), [7]);
        for none in ["{}", r#"{"eos_token_id": null}"#, r#"{"eos_token_id": []}"#] {
            assert_eq!(read(none).unwrap(), [1, 2]);
        }
        for bad in [r#"{"eos_token_id": -1}"#, "not json"] {
            let message = read(bad).unwrap_err().to_string();
            assert!(message.contains("generation_config.json"), "{message}");
        }
    }

    #[test]
    fn three_keys_for_the_ends_of_a_gguf() {
        let tokens = ["</s>", "<|eom_id|>", "<|eot_id|>", "<end>", "<stop>"].map(String::from);
        let ends = EndIds::new(&[0, 1, 2], Some(2), &tokens);
        assert_eq!((ends.turn, ends.message), (Some(0), Some(1)));
        let ends = EndIds::new(&[0, 2, 3, 4], Some(0), &tokens);
        assert_eq!(
            (ends.turn, ends.message, ends.lost),
            (Some(2), Some(3), vec![4])
        );
        assert_eq!(EndIds::new(&[0, 0], Some(0), &tokens), EndIds::default());
        let pairs = [
            ("tokenizer.ggml.eos_token_id".into(), gguf::Value::U32(3)),
            ("tokenizer.ggml.eot_token_id".into(), gguf::Value::U32(3)),
            ("tokenizer.ggml.eom_token_id".into(), gguf::Value::U32(5)),
        ];
        assert_eq!(gguf_eos_ids(&pairs), [3, 5]);
    }
}
