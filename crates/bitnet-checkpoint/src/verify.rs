//! Checks that a file holds the bytes that were written.

use crate::rows::in_parallel;
use crate::{Error, Result};
use bitnet_formats::document::{self, Checksum, Document};
use bitnet_formats::output::{self, Container};
use bitnet_formats::safetensors::SafetensorsHeader;
use bitnet_formats::{Content, Kind, Source, StoredId, StoredTensor, StoredType, gguf};
use std::fs::File;
use std::path::Path;

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
    check_set(source, document, &mut damage)?;
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
        let inside = |part| matches!(part, std::path::Component::Normal(_));
        let plain = !name.is_empty() && std::path::Path::new(name).components().all(inside);
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

/// What each file of a set says beside its tensors.
fn check_set(source: &Source, document: &Document, damage: &mut Vec<Damage>) -> Result<()> {
    let (count, tensors) = (source.files().len(), source.stored_tensors().len());
    for (i, file) in source.files().iter().enumerate() {
        let path = &file.path;
        let what = match source.kind() {
            Kind::Gguf => {
                let keys = match i {
                    0 if count == 1 => source.gguf().to_vec(),
                    _ => open(path, gguf_metadata)?,
                };
                wrong_keys(&keys, i, count, tensors)
            }
            _ if i == 0 => None,
            // Each has the metadata of the first, without the document.
            Kind::Folder | Kind::File => {
                let metadata = open(path, safetensors_metadata)?;
                let got = document::metadata_checksum(&Container::Safetensors(metadata))
                    .unwrap_or_default();
                (got != document.metadata)
                    .then(|| format!("expected checksum {}, got {got}", document.metadata))
            }
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        damage.extend(what.map(|what| Damage {
            part: format!("metadata of {name}"),
            what,
        }));
    }
    Ok(())
}

/// The first key of a GGUF that does not say which file of the set it is. A set merged into one
/// file says that it is the first of none.
fn wrong_keys(
    keys: &[(String, gguf::Value)],
    index: usize,
    count: usize,
    tensors: usize,
) -> Option<String> {
    let expected = output::split_keys(index, count, tensors);
    if index > 0
        && let Some((key, _)) = keys
            .iter()
            .find(|(k, _)| !expected.iter().any(|(e, _)| e == k))
    {
        return Some(format!("expected the keys split.*, got {key}"));
    }
    expected.iter().find_map(|(key, value)| {
        let (_, got) = keys.iter().find(|(k, _)| k == key)?;
        let merged = count == 1 && key == gguf::SPLIT_COUNT && *got == gguf::Value::U16(0);
        (got != value && !merged).then(|| format!("{key}: expected {value:?}, got {got:?}"))
    })
}

fn open<T>(path: &Path, read: fn(&Path, &File, u64) -> bitnet_formats::Result<T>) -> Result<T> {
    let open = || File::open(path).and_then(|file| file.metadata().map(|m| (file, m.len())));
    let (file, len) = open().map_err(bitnet_formats::Error::io(path, "open"))?;
    Ok(read(path, &file, len)?)
}

fn gguf_metadata(
    path: &Path,
    file: &File,
    len: u64,
) -> bitnet_formats::Result<Vec<(String, gguf::Value)>> {
    match gguf::GgufHeader::read(file, len) {
        Ok(header) => Ok(header.metadata),
        Err(source) => Err(bitnet_formats::Error::Gguf {
            path: path.to_path_buf(),
            source,
        }),
    }
}

fn safetensors_metadata(
    path: &Path,
    file: &File,
    len: u64,
) -> bitnet_formats::Result<Vec<(String, String)>> {
    SafetensorsHeader::read(path, file, len).map(|header| header.metadata)
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
