//! PyTorch checkpoints: what `torch.save` writes of a dictionary of tensors.
//!
//! The file is a zip archive without compression: `data.pkl` is a pickle of the dictionary, in
//! which each tensor is a view of a storage, and `data/KEY` holds the bytes of a storage. Before 1.6
//! torch wrote the same pickle and storages one after another ([`legacy`]). The pickle is read
//! without running it: [`pickle::read`] takes what `torch.load(weights_only=True)` takes of
//! tensors and containers, and names what it does not take.

mod legacy;
mod pickle;

use crate::safetensors::Entry;
use crate::strided::Strided;
use crate::tensor::Access;
use crate::{Error, Result};
use pickle::{Id, Object, Objects, View};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use zip::{CompressionMethod, ZipArchive};

/// Largest pickle that is read: the names and shapes of a hundred thousand tensors are a quarter.
const MAX_PICKLE_BYTES: u64 = 64 << 20;

/// Largest tensor that repeats elements of a smaller storage.
const MAX_REPEATED_BYTES: u64 = 1 << 30;

/// First bytes of the archive.
const MAGIC: [u8; 4] = *b"PK\x03\x04";

/// Whether a file is a PyTorch checkpoint: by its first bytes, or by its name.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn is_pytorch(path: &Path, file: &File) -> Result<bool> {
    let start = legacy::start(path, file)?;
    let endings = ["bin", "pt", "pth"];
    let named = path
        .extension()
        .is_some_and(|e| endings.iter().any(|n| e == *n));
    Ok(start.starts_with(&MAGIC) || legacy::is_legacy(&start) || named)
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PytorchHeader {
    /// Tensors in the order of their first bytes, and how they lie there. Two may share bytes.
    pub(crate) tensors: Vec<(Entry, Access)>,
    /// What of the file is not in `tensors`, each a sentence for a person.
    pub(crate) notes: Vec<String>,
}

/// Where the bytes of a storage lie in the file.
struct Bytes {
    offset: u64,
    len: u64,
}

/// What is in a file: the last object of its pickle, all of them, and the storages by their keys.
type Content = (Id, Objects, HashMap<String, Bytes>);

impl PytorchHeader {
    /// Reads and checks the archive and the pickle; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for what `torch.save` did not write, is compressed, or names
    /// anything beside tensors and plain containers; [`Error::Tensor`] for a view that leaves its
    /// storage.
    pub(crate) fn read(path: &Path, file: &File) -> Result<Self> {
        let (top, objects, storages) = if legacy::is_legacy(&legacy::start(path, file)?) {
            legacy::read(path, file)?
        } else {
            read_archive(path, file)?
        };
        let (state, mut notes) = state_dict(path, &objects, top)?;
        let mut tensors: Vec<(Entry, Access)> = vec![];
        let mut positions: HashMap<String, usize> = HashMap::new();
        let mut others = 0;
        for (name, value) in state {
            let Object::Tensor(view) = objects.get(value) else {
                others += 1;
                continue;
            };
            let tensor = tensor(path, name, view, &storages)?;
            match positions.get(name) {
                Some(&i) => tensors[i] = tensor,
                None => {
                    positions.insert(name.into(), tensors.len());
                    tensors.push(tensor);
                }
            }
        }
        if others > 0 {
            notes.push(format!(
                "{}: {others} values that are no tensors are left out",
                path.display()
            ));
        }
        tensors.sort_by_key(|(t, _)| t.offset);
        Ok(Self { tensors, notes })
    }
}

/// The content of an archive.
fn read_archive(path: &Path, file: &File) -> Result<Content> {
    let bad = |got: String| Error::file(path, "an archive of torch.save", got);
    let archive = ZipArchive::new(BufReader::new(file))
        .map_err(|e| bad(format!("{e}: if it was cut short, download it again")))?;
    let (pickle, storages) = members(path, archive)?;
    let (top, objects) = pickle::read(&mut pickle.as_slice())
        .map_err(|e| Error::file(path, "a pickle of tensors", e))?;
    Ok((top, objects, storages))
}

/// The pickle, and where the storages lie.
fn members(
    path: &Path,
    mut archive: ZipArchive<BufReader<&File>>,
) -> Result<(Vec<u8>, HashMap<String, Bytes>)> {
    let bad = |got: String| Error::file(path, "an archive of torch.save", got);
    let mut all = HashMap::new();
    let mut pickle = None;
    for i in 0..archive.len() {
        let mut member = archive.by_index(i).map_err(|e| bad(e.to_string()))?;
        let name = member.name().map_err(|e| bad(e.to_string()))?.into_owned();
        // The folder of everything has the name of the file that was saved.
        let name = name.split_once('/').map_or(name.as_str(), |(_, name)| name);
        if member.compression() != CompressionMethod::Stored {
            return Err(bad(format!("'{name}' compressed: save it with torch.save")));
        }
        if name == "data.pkl" {
            if member.size() > MAX_PICKLE_BYTES {
                let size = member.size();
                let most = format!("a pickle of at most {MAX_PICKLE_BYTES} bytes");
                return Err(Error::file(path, most, size.to_string()));
            }
            let mut bytes = vec![];
            let read = member.read_to_end(&mut bytes);
            read.map_err(Error::io(path, "read"))?;
            pickle = Some(bytes);
        } else if name == "byteorder" {
            let mut order = String::new();
            let read = member.by_ref().take(16).read_to_string(&mut order);
            read.map_err(Error::io(path, "read"))?;
            if order != "little" {
                return Err(bad(format!("numbers in the byte order '{order}'")));
            }
        } else if let (Some(key), Some(offset)) = (name.strip_prefix("data/"), member.data_start())
        {
            let len = member.size();
            all.insert(key.to_string(), Bytes { offset, len });
        }
    }
    let pickle = pickle.ok_or_else(|| bad("no data.pkl".into()))?;
    Ok((pickle, all))
}

/// Values by their names, in the order of the pickle.
type Named<'a> = Vec<(&'a str, Id)>;

/// The dictionary of tensors: the pickle itself, or the only one in it. And what to say about it.
fn state_dict<'a>(path: &Path, objects: &'a Objects, top: Id) -> Result<(Named<'a>, Vec<String>)> {
    let named = |id: Id| -> Option<Named<'a>> {
        let Object::Dict(pairs) = objects.get(id) else {
            return None;
        };
        let text = |&(key, value): &(Id, Id)| match objects.get(key) {
            Object::Text(name) => Some((name.as_str(), value)),
            _ => None,
        };
        Some(pairs.iter().filter_map(text).collect())
    };
    let has_tensors = |pairs: &[(&str, Id)]| {
        let mut values = pairs.iter().map(|&(_, value)| objects.get(value));
        values.any(|value| matches!(value, Object::Tensor(_)))
    };
    let Some(pairs) = named(top) else {
        let kind = objects.get(top).kind();
        return Err(Error::file(path, "a dictionary of tensors", kind));
    };
    if has_tensors(&pairs) {
        return Ok((pairs, vec![]));
    }
    let inner: Vec<_> = pairs
        .iter()
        .filter_map(|&(key, value)| Some((key, named(value).filter(|pairs| has_tensors(pairs))?)))
        .collect();
    match inner.as_slice() {
        [(key, found)] => {
            let path = path.display();
            let note = format!("{path}: the tensors are those of its entry '{key}'");
            Ok((found.clone(), vec![note]))
        }
        [] => Err(Error::file(
            path,
            "a dictionary of tensors",
            "one without tensors",
        )),
        several => {
            let keys: Vec<&str> = several.iter().map(|(key, _)| *key).collect();
            let got = format!("{}: save the one that is the model", keys.join(", "));
            Err(Error::file(path, "one dictionary of tensors", got))
        }
    }
}

/// A tensor, and where its bytes lie.
fn tensor(
    path: &Path,
    name: &str,
    view: &View,
    storages: &HashMap<String, Bytes>,
) -> Result<(Entry, Access)> {
    let bad = |expected: &str, got: String| Error::tensor(path, name, expected, got);
    let key = &view.storage.key;
    let Some(bytes) = storages.get(key) else {
        return Err(bad("a storage of the file", format!("'{key}'")));
    };
    let size = view.dtype.bitsize() as u64 / 8;
    let (shape, strides) = (&view.shape, &view.strides);
    let outside = || {
        bad(
            &format!("a view inside the {} bytes of storage '{key}'", bytes.len),
            format!(
                "shape {shape:?} with strides {strides:?} from element {}",
                view.offset
            ),
        )
    };
    let start = view.storage.start.checked_add(view.offset);
    let start = start.and_then(|start| start.checked_mul(size));
    let start = start.filter(|&start| start <= bytes.len);
    let start = start.ok_or_else(outside)?;
    let mut entry = Entry {
        name: name.into(),
        shape: shape.clone(),
        dtype: view.dtype,
        offset: bytes.offset + start,
        len: 0,
    };
    if shape.contains(&0) && shape.len() == strides.len() {
        return Ok((entry, Access::AsRead));
    }
    let strided = Strided::new(shape, strides, size).ok_or_else(outside)?;
    if strided.span() > bytes.len - start {
        return Err(outside());
    }
    // `Strided::new` has checked the product.
    entry.len = shape.iter().map(|&n| n as u64).product::<u64>() * size;
    if entry.len > bytes.len.max(MAX_REPEATED_BYTES) {
        let got = format!("shape {shape:?} with strides {strides:?}");
        let most = format!("at most {MAX_REPEATED_BYTES} bytes of repeated elements");
        return Err(bad(&most, got));
    }
    let access = match strided.is_contiguous() {
        true => Access::AsRead,
        false => Access::Strided(strided),
    };
    Ok((entry, access))
}
