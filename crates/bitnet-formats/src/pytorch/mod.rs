//! PyTorch checkpoints: what `torch.save` writes of a dictionary of tensors.
//!
//! The file is a zip archive without compression: `data.pkl` is a pickle of the dictionary, in
//! which each tensor is a view of a storage, and `data/KEY` holds the bytes of a storage. The
//! pickle is read without running it: [`read`] takes what `torch.load(weights_only=True)` takes of
//! tensors and containers, and names what it does not take.

mod pickle;

use crate::safetensors::Entry;
use crate::{Error, Result};
use pickle::{Id, Object, Objects, View};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use zip::{CompressionMethod, ZipArchive};

/// Largest pickle that is read: the names and shapes of a hundred thousand tensors are a quarter.
const MAX_PICKLE_BYTES: u64 = 64 << 20;

/// First bytes of the archive.
const MAGIC: [u8; 4] = *b"PK\x03\x04";

/// First bytes of what torch wrote before it wrote archives.
const OLD_MAGIC: [u8; 4] = [0x80, 0x02, 0x8a, 0x0a];

/// Whether a file is a PyTorch checkpoint: by its first bytes, or by its name.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] for one that is no archive yet.
pub(crate) fn is_pytorch(path: &Path, file: &File) -> Result<bool> {
    let mut magic = [0; 4];
    let len = file.metadata().map_err(Error::io(path, "open"))?.len();
    if len >= 4 {
        crate::io::read_at(file, &mut magic, 0).map_err(Error::io(path, "read"))?;
    }
    if magic == OLD_MAGIC {
        let got = "a pickle without one, as torch wrote before 1.6: load it and save it again";
        return Err(Error::file(path, "an archive of torch.save", got));
    }
    let endings = ["bin", "pt", "pth"];
    let named = path
        .extension()
        .is_some_and(|e| endings.iter().any(|n| e == *n));
    Ok(magic == MAGIC || named)
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PytorchHeader {
    /// Tensors in the order of their bytes. Two may share bytes.
    pub(crate) tensors: Vec<Entry>,
    /// What of the file is not in `tensors`, each a sentence for a person.
    pub(crate) notes: Vec<String>,
}

/// A member of the archive.
struct Member {
    offset: u64,
    len: u64,
}

impl PytorchHeader {
    /// Reads and checks the archive and the pickle; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for what is no archive of `torch.save`, is compressed, or
    /// names anything beside tensors and plain containers; [`Error::Tensor`] for a view that is
    /// not contiguous or leaves its storage.
    pub(crate) fn read(path: &Path, file: &File) -> Result<Self> {
        let bad = |got: String| Error::file(path, "an archive of torch.save", got);
        let archive = ZipArchive::new(BufReader::new(file))
            .map_err(|e| bad(format!("{e}: if it was cut short, download it again")))?;
        let (pickle, members) = members(path, archive)?;
        let (top, objects) =
            pickle::read(&pickle).map_err(|e| Error::file(path, "a pickle of tensors", e))?;
        let (state, mut notes) = state_dict(path, &objects, top)?;
        let mut tensors: Vec<Entry> = vec![];
        let mut positions: HashMap<String, usize> = HashMap::new();
        let mut others = 0;
        for (name, value) in state {
            let Object::Tensor(view) = objects.get(value) else {
                others += 1;
                continue;
            };
            let entry = entry(path, name, view, &members)?;
            match positions.get(name) {
                Some(&i) => tensors[i] = entry,
                None => {
                    positions.insert(name.into(), tensors.len());
                    tensors.push(entry);
                }
            }
        }
        if others > 0 {
            notes.push(format!(
                "{}: {others} values that are no tensors are left out",
                path.display()
            ));
        }
        tensors.sort_by_key(|t| t.offset);
        Ok(Self { tensors, notes })
    }
}

/// The pickle, and where the storages lie.
fn members(
    path: &Path,
    mut archive: ZipArchive<BufReader<&File>>,
) -> Result<(Vec<u8>, HashMap<String, Member>)> {
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
        } else if let Some(offset) = member.data_start() {
            let len = member.size();
            all.insert(name.to_string(), Member { offset, len });
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

/// Where the bytes of a view lie.
fn entry(path: &Path, name: &str, view: &View, members: &HashMap<String, Member>) -> Result<Entry> {
    let bad = |expected: &str, got: String| Error::tensor(path, name, expected, got);
    if !is_contiguous(view) {
        let (shape, strides) = (&view.shape, &view.strides);
        let got = format!("shape {shape:?} with strides {strides:?}: save it with .contiguous()");
        return Err(bad("a contiguous tensor", got));
    }
    let key = format!("data/{}", view.storage.key);
    let Some(member) = members.get(&key) else {
        return Err(bad("a storage of the archive", format!("'{key}'")));
    };
    let bits = view.dtype.bitsize() as u64;
    let elements = view.shape.iter().try_fold(1u64, |product, &n| {
        product.checked_mul(u64::try_from(n).ok()?)
    });
    let range = elements.and_then(|n| {
        let (len, start) = (n.checked_mul(bits)? / 8, view.offset.checked_mul(bits)? / 8);
        start.checked_add(len).map(|end| (start, len, end))
    });
    match range {
        Some((start, len, end)) if end <= member.len => Ok(Entry {
            name: name.into(),
            shape: view.shape.clone(),
            dtype: view.dtype,
            offset: member.offset + start,
            len,
        }),
        _ => Err(bad(
            &format!("a view inside the {} bytes of '{key}'", member.len),
            format!("shape {:?} from element {}", view.shape, view.offset),
        )),
    }
}

/// Whether the elements lie in the order of their indices, without gaps. Strides of dimensions
/// with one element say nothing.
fn is_contiguous(view: &View) -> bool {
    if view.shape.len() != view.strides.len() {
        return false;
    }
    let mut expected = Some(1u64);
    for (&n, &stride) in view.shape.iter().zip(&view.strides).rev() {
        if n > 1 && expected != Some(stride) {
            return false;
        }
        expected = expected.and_then(|e| e.checked_mul(n as u64));
    }
    view.shape.contains(&0) || expected.is_some()
}
