//! Values of a config.json and of a GGUF's metadata, and how messages show them.

use crate::{Error, Result, gguf, python_json};
use serde_json::Value;
use std::path::Path;

/// A config.json and where it is: typed access, with errors that name file and key. A null is no
/// value.
#[derive(Debug, Clone, Copy)]
pub struct HfConfig<'a> {
    /// The file, for messages.
    pub path: &'a Path,
    /// Its content.
    pub value: &'a Value,
}

impl<'a> HfConfig<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    /// The error for a key that is something else.
    pub fn bad(&self, key: &str, expected: &str) -> Error {
        Error::config(self.path, key, expected, shown(self.value.get(key)))
    }

    /// A positive number that fits the u32 of a GGUF key.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else, or missing.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    /// [`HfConfig::size`], or nothing.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let n = value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| *n > 0);
        n.map(|n| Some(n as usize))
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    /// A number of things, none of them included.
    pub(super) fn count(&self, key: &str) -> Result<usize> {
        let n = self.get(key).and_then(Value::as_u64);
        n.and_then(|n| u32::try_from(n).ok())
            .map(|n| n as usize)
            .ok_or_else(|| self.bad(key, "a number of layers"))
    }

    pub(super) fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .filter(|x| *x > 0.0 && x.is_finite())
            .map(Some)
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    /// The tokens of a key that holds one token or a list; none where it is missing.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let one = |v: &Value| {
            v.as_u64()
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(|| self.bad(key, "a token, or a list of tokens"))
        };
        match self.get(key) {
            None => Ok(vec![]),
            Some(Value::Array(all)) => all.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    /// A boolean; false where there is none.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else.
    pub fn flag(&self, key: &str) -> Result<bool> {
        self.flag_or(key, false)
    }

    /// A boolean; the default where there is none.
    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| self.bad(key, "true or false"))
        })
    }

    /// A positive number; the default where the key is missing.
    ///
    /// # Errors
    /// [`Error::Config`] if it is anything else, or missing without a default.
    pub fn float_or(&self, key: &str, default: Option<f64>) -> Result<f64> {
        self.optional_float(key)?
            .or(default)
            .ok_or_else(|| self.bad(key, "a positive number"))
    }
}

/// The value under a key of GGUF metadata.
pub(super) fn find<'a>(
    metadata: &'a [(String, gguf::Value)],
    key: &str,
) -> Option<&'a gguf::Value> {
    metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v)
}

/// A JSON value for a message.
pub(super) fn shown(value: Option<&Value>) -> String {
    match value {
        None => "none".into(),
        Some(value) => {
            let text = python_json::unmarked(&value.to_string());
            match text.char_indices().nth(120) {
                Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
                None => text,
            }
        }
    }
}
