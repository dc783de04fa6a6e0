//! The document that quantized files carry: recipe, how each tensor is packed, and a checksum of
//! each stored tensor.
//!
//! It is JSON under the key [`KEY`], in `__metadata__` of safetensors and among the keys of GGUF.
//! docs/formats.md specifies it.

use crate::container::{Container, gguf_alignment};
use crate::gguf;
use bitnet_core::{MatrixSpec, Scheme};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Metadata key of the document.
pub const KEY: &str = "bitnet.document";
/// Version that this code writes and reads.
pub const VERSION: u32 = 1;

/// What a quantized file records besides its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// [`VERSION`].
    pub version: u32,
    /// Program and version that wrote the file.
    pub generator: String,
    /// The command's recipe, all defaults filled in.
    pub recipe: serde_json::Value,
    /// Quantized tensors by their name in the original model.
    pub tensors: BTreeMap<String, PackedTensor>,
    /// Tensors whose rows are stored in a rotated basis:
    /// [`RotationFacts`](crate::arch::RotationFacts). Only in safetensors; a GGUF says it in keys.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rotation: Option<serde_json::Value>,
    /// xxh3-128 of the bytes of each stored tensor, 32 hex digits, by stored name.
    pub checksums: BTreeMap<String, String>,
    /// xxh3-128 of each file that the writer put beside this one (config.json, tokenizer), by name.
    pub files: BTreeMap<String, String>,
    /// xxh3-128 of the container's own metadata, the document excepted: [`metadata_checksum`].
    pub metadata: String,
    /// xxh3-128 over all the rest of the document and over name, type and shape of each stored
    /// tensor, by name.
    pub digest: String,
}

/// How one quantized tensor is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedTensor {
    /// Shape of the original tensor.
    pub shape: Vec<usize>,
    /// Whether the original stores each matrix as `[K, N]`, inputs first. The packed matrix is
    /// always `[N, K]`.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub transposed: bool,
    /// The matrix.
    pub spec: MatrixSpec,
    /// The scheme that made it; absent if it was read already quantized.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub scheme: Option<Scheme>,
    /// Name of the wire layout.
    pub layout: String,
    /// Stored tensor with the packed bytes.
    pub packed: String,
    /// Stored tensor with the scales, unless the layout carries them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub scale: Option<String>,
    /// Whether the stored scale is 1/scale (HF `bitlinear`).
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub reciprocal: bool,
    /// Stored tensor with the zero points, if there are any.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub zero_point: Option<String>,
}

impl Document {
    /// The digest that belongs to the document and to these stored tensors: (name, type, shape).
    pub fn compute_digest<'a>(
        &self,
        stored: impl Iterator<Item = (&'a str, String, &'a [usize])>,
    ) -> String {
        let mut hasher = Xxh3::new();
        let body = Self {
            digest: String::new(),
            ..self.clone()
        };
        // A document is plain data: serialising it cannot fail.
        hasher.update(serde_json::to_string(&body).unwrap_or_default().as_bytes());
        let mut stored: Vec<_> = stored.collect();
        stored.sort();
        for (name, dtype, shape) in stored {
            hasher.update(format!("\n{name} {dtype} {shape:?}").as_bytes());
        }
        format!("{:032x}", hasher.digest128())
    }
}

/// xxh3-128 of a container's own metadata, the document excepted.
///
/// Of safetensors: key, a zero byte, value and a zero byte of each entry of `__metadata__`, by key.
/// Of GGUF: the header of a file that has these keys, in file order, and no tensors. The keys of a
/// part ([`gguf::SPLIT_KEYS`]) are excepted too.
///
/// # Errors
/// [`gguf::Error`] for keys that no GGUF can have.
pub fn metadata_checksum(container: &Container) -> Result<String, gguf::Error> {
    match container {
        Container::Safetensors(metadata) => {
            let mut pairs: Vec<_> = metadata.iter().filter(|(k, _)| k != KEY).collect();
            pairs.sort();
            let mut sum = Checksum::default();
            for (key, value) in pairs {
                sum.update(format!("{key}\0{value}\0").as_bytes());
            }
            Ok(sum.hex())
        }
        Container::Gguf(metadata) => {
            let is_own = |key: &str| key != KEY && !gguf::SPLIT_KEYS.contains(&key);
            let own: Vec<_> = metadata
                .iter()
                .filter(|(k, _)| is_own(k))
                .cloned()
                .collect();
            let alignment = gguf_alignment(&own);
            Ok(checksum(&gguf::encode_header(&own, &[], alignment)?.bytes))
        }
    }
}

/// xxh3-128 of `bytes` as 32 hex digits.
pub fn checksum(bytes: &[u8]) -> String {
    format!("{:032x}", xxh3_128(bytes))
}

/// A checksum of bytes that come in pieces.
#[derive(Clone, Default)]
pub struct Checksum(Xxh3);

impl Checksum {
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all bytes so far, as [`checksum`] gives it.
    pub fn hex(&self) -> String {
        format!("{:032x}", self.0.digest128())
    }
}

impl std::fmt::Debug for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Checksum").field(&self.hex()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of docs/formats.md, whose numbers come from Python's xxhash.
    #[test]
    fn the_digest_of_the_example_in_the_docs() {
        let docs = include_str!("../../../docs/formats.md");
        let text = docs
            .lines()
            .find(|line| line.starts_with(r#"{"version":1,"#))
            .unwrap();
        let document: Document = serde_json::from_str(text).unwrap();
        let metadata = Container::Safetensors(vec![
            ("format".into(), "pt".into()),
            (KEY.into(), text.into()),
        ]);
        assert_eq!(metadata_checksum(&metadata).unwrap(), document.metadata);
        let digest = document
            .compute_digest([("w_packed", "U8".to_string(), &[4usize, 75][..])].into_iter());
        assert!(docs.contains(&format!("`{digest}`")), "{digest}");
    }
}
