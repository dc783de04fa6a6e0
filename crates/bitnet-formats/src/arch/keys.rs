//! Typed access to the keys of a GGUF, with errors that name file and key.

use super::architecture::{Architecture, GgufName, LayerRule};
use super::values::find;
use crate::{Error, Result, gguf};
use std::path::Path;

/// The keys of a GGUF; those of its architecture by the part behind the prefix.
pub(super) struct GgufKeys<'a> {
    path: &'a Path,
    metadata: &'a [(String, gguf::Value)],
    /// The architecture.
    pub(super) architecture: &'static Architecture,
    /// The file's name for it: the prefix.
    pub(super) name: &'static GgufName,
}

impl<'a> GgufKeys<'a> {
    pub(super) fn new(path: &'a Path, metadata: &'a [(String, gguf::Value)]) -> Result<Self> {
        let (architecture, name) = Architecture::named(metadata)?;
        Ok(Self {
            path,
            metadata,
            architecture,
            name,
        })
    }

    /// The architecture of a config.json with the facts of this file: a llama with a window is a
    /// mistral.
    pub(super) fn hf_architecture(&self) -> &'static Architecture {
        let windows = self.architecture.layers == LayerRule::Uniform
            && self.get("attention.sliding_window").is_some();
        let other = self.architecture.with_windows().filter(|_| windows);
        other.unwrap_or(self.architecture)
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a gguf::Value> {
        let full = format!("{}.{key}", self.name.name);
        find(self.metadata, &full)
    }

    pub(super) fn bad(&self, key: &str, expected: &str) -> Error {
        let got = self.get(key).map_or("none".into(), |v| v.preview(120));
        Error::config(
            self.path,
            format!("{}.{key}", self.name.name),
            expected,
            got,
        )
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?
            .ok_or_else(|| self.bad(key, "a positive number"))
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
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

    pub(super) fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        // The shortest decimal of an f32, so that 1e-5 stays 1e-5.
        let float = match value {
            gguf::Value::F32(x) => x.to_string().parse().ok(),
            value => value.as_f64(),
        };
        float
            .filter(|x: &f64| *x > 0.0 && x.is_finite())
            .map(Some)
            .ok_or_else(|| self.bad(key, "a positive number"))
    }
}
