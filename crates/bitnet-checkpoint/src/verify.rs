//! Checks that a file holds the bytes that were written.

use crate::rows::in_parallel;
use crate::{Error, Result};
use bitnet_formats::document::{self, Checksum, Document};
use bitnet_formats::{Content, Source, StoredId, StoredTensor, StoredType};

/// A damaged part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The stored tensor, or `document`.
    pub part: String,
    /// Expected and found.
    pub what: String,
}

/// The result of [`verify`].
#[derive(Debug, Clone)]
pub struct Verification {
    /// Stored tensors whose checksum was computed.
    pub checked: usize,
    /// Bytes read.
    pub bytes: u64,
    /// The damaged parts; empty if the file is as written.
    pub damage: Vec<Damage>,
}

/// Compares every stored tensor, the container's metadata and the files written beside it with
/// their checksums and the document with its digest, and unpacks every quantized tensor.
///
/// # Errors
/// [`Error::File`] if the file carries no checksums, or cannot be read.
pub fn verify(source: &Source) -> Result<Verification> {
    let Some(document) = source.document() else {
        return Err(bitnet_formats::Error::file(
            source.path(),
            "a file with checksums in a bitnet.document",
            "none",
        )
        .into());
    };
    let mut damage = vec![];
    check_digest(source, document, &mut damage);
    check_surroundings(source, document, &mut damage)?;
    let ids: Vec<StoredId> = source
        .stored_ids()
        .filter(|&id| has_bytes(source.stored(id)))
        .collect();
    let sums = in_parallel(ids.len(), |i, _| checksum(source, ids[i]));
    for (stored, sum) in stored_tensors(source).zip(sums) {
        let sum = sum?;
        match document.checksums.get(&stored.name) {
            Some(expected) if *expected == sum => {}
            Some(expected) => damage.push(Damage {
                part: stored.name.clone(),
                what: format!("expected checksum {expected}, got {sum}"),
            }),
            None => damage.push(Damage {
                part: stored.name.clone(),
                what: "expected a checksum in the document, got none".into(),
            }),
        }
    }
    for name in document
        .checksums
        .keys()
        .filter(|name| source.find_stored(name).is_none())
    {
        damage.push(Damage {
            part: name.clone(),
            what: "expected a stored tensor, got none".into(),
        });
    }
    for tensor in source.tensors() {
        let Content::Quantized(q) = &tensor.content else {
            continue;
        };
        if let Err(error) = source.matrix(&tensor.name, q) {
            damage.push(Damage {
                part: tensor.name.clone(),
                what: error.to_string(),
            });
        }
    }
    Ok(Verification {
        checked: stored_tensors(source).count(),
        bytes: stored_tensors(source).map(|s| s.len).sum(),
        damage,
    })
}

/// Whether a stored tensor is in the files, and not one that stands for several of them.
fn has_bytes(stored: &StoredTensor) -> bool {
    !matches!(stored.dtype, StoredType::Foreign(_))
}

fn stored_tensors(source: &Source) -> impl Iterator<Item = &StoredTensor> {
    source.stored_tensors().iter().filter(|s| has_bytes(s))
}

fn check_digest(source: &Source, document: &Document, damage: &mut Vec<Damage>) {
    let got = document.compute_digest(
        stored_tensors(source).map(|s| (s.name.as_str(), s.dtype.to_string(), &s.shape[..])),
    );
    if got != document.digest {
        damage.push(Damage {
            part: "document".into(),
            what: format!("expected digest {}, got {got}", document.digest),
        });
    }
}

/// The container's own metadata, and the files beside it.
fn check_surroundings(
    source: &Source,
    document: &Document,
    damage: &mut Vec<Damage>,
) -> Result<()> {
    let path = &source.files()[0].path;
    let got = document::metadata_checksum(&source.container()).map_err(|error| {
        bitnet_formats::Error::Gguf {
            path: path.clone(),
            source: error,
        }
    })?;
    if got != document.metadata {
        damage.push(Damage {
            part: "metadata".into(),
            what: format!("expected checksum {}, got {got}", document.metadata),
        });
    }
    let folder = path.parent().unwrap_or(std::path::Path::new("."));
    for (name, expected) in &document.files {
        // The name comes from a file: it must not lead out of the folder.
        let plain = std::path::Path::new(name)
            .file_name()
            .is_some_and(|n| n == name.as_str());
        let got = match plain.then(|| std::fs::read(folder.join(name))) {
            Some(Ok(bytes)) => document::checksum(&bytes),
            Some(Err(error)) => error.to_string(),
            None => "no plain name".into(),
        };
        if got != *expected {
            damage.push(Damage {
                part: name.clone(),
                what: format!("expected checksum {expected}, got {got}"),
            });
        }
    }
    Ok(())
}

fn checksum(source: &Source, stored: StoredId) -> Result<String> {
    let len = source.stored(stored).len;
    let mut buffer = vec![0; len.min(1 << 20) as usize];
    let mut sum = Checksum::default();
    let mut at = 0;
    while at < len {
        let n = (len - at).min(buffer.len() as u64) as usize;
        source
            .read(stored, at, &mut buffer[..n])
            .map_err(Error::from)?;
        sum.update(&buffer[..n]);
        at += n as u64;
    }
    Ok(sum.hex())
}
