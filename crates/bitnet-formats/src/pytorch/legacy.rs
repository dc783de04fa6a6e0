//! What `torch.save` wrote before 1.6, and writes with `_use_new_zipfile_serialization=False`.
//!
//! Pickles one after another: a magic number, a version, facts about the machine, the dictionary of
//! tensors, a list of keys. Then for each key its storage: the number of elements in 8 bytes, and
//! the elements. Numbers are little-endian, on whatever machine the file was written.

use super::pickle::{self, Id, Object, Objects, SHORT};
use super::{Bytes, Content, MAX_PICKLE_BYTES};
use crate::{Error, Result, io};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

/// The magic number as its pickle holds it.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// The version of the format, the only one.
const VERSION: i64 = 1001;

/// Bytes at the start of a file that tell what it is.
const START: u64 = 32;

/// Bytes that are read at first for the pickles.
const FIRST_READ: u64 = 1 << 20;

/// The first bytes of a file.
pub(super) fn start(path: &Path, file: &File) -> Result<Vec<u8>> {
    let len = file.metadata().map_err(Error::io(path, "open"))?.len();
    read_start(path, file, len.min(START))
}

fn read_start(path: &Path, file: &File, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    io::read_at(file, &mut bytes, 0).map_err(Error::io(path, "read"))?;
    Ok(bytes)
}

/// Whether a file that starts so is of this format: a pickle of the magic number.
pub(super) fn is_legacy(start: &[u8]) -> bool {
    start.first() == Some(&0x80) && start.windows(MAGIC.len()).any(|bytes| bytes == MAGIC)
}

/// The pickles of a file.
struct Pickles {
    top: Id,
    objects: Objects,
    /// Keys of the storages in the order of their bytes.
    keys: Vec<String>,
    /// Bytes of all pickles.
    len: u64,
}

/// The content of a file.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] for bytes that are no such file, and for a pickle that names
/// anything beside tensors and plain containers.
pub(super) fn read(path: &Path, file: &File) -> Result<Content> {
    let file_len = file.metadata().map_err(Error::io(path, "open"))?.len();
    let most = file_len.min(MAX_PICKLE_BYTES);
    let mut read = most.min(FIRST_READ);
    let pickles = loop {
        let bytes = read_start(path, file, read)?;
        match pickles(&bytes) {
            // Perhaps they go on behind what was read.
            Err(why) if why == SHORT && read < most => read = most.min(read * 4),
            Err(why) => return Err(Error::file(path, "a pickle of tensors", why)),
            Ok(pickles) => break pickles,
        }
    };
    let storages = storages(path, file, file_len, &pickles)?;
    Ok((pickles.top, pickles.objects, storages))
}

/// Reads the five pickles at the start of `bytes`.
fn pickles(bytes: &[u8]) -> Result<Pickles, String> {
    let mut input = bytes;
    pickle::read(&mut input)?;
    let (version, objects) = pickle::read(&mut input)?;
    match objects.get(version) {
        Object::Int(VERSION) => {}
        Object::Int(n) => return Err(format!("version {n} of the format, not {VERSION}")),
        other => return Err(format!("{} where the version belongs", other.kind())),
    }
    pickle::read(&mut input)?;
    let (top, objects) = pickle::read(&mut input)?;
    let (list, listed) = pickle::read(&mut input)?;
    let Object::List(items) = listed.get(list) else {
        let kind = listed.get(list).kind();
        return Err(format!("{kind} where the keys of the storages belong"));
    };
    let key = |&item: &Id| match listed.get(item) {
        Object::Text(key) => Ok(key.clone()),
        other => Err(format!(
            "{} where the key of a storage belongs",
            other.kind()
        )),
    };
    Ok(Pickles {
        top,
        objects,
        keys: items.iter().map(key).collect::<Result<_, _>>()?,
        len: (bytes.len() - input.len()) as u64,
    })
}

/// Where the storages lie behind the pickles.
fn storages(
    path: &Path,
    file: &File,
    file_len: u64,
    pickles: &Pickles,
) -> Result<HashMap<String, Bytes>> {
    // Number and bytes of the elements, as the dictionary has them.
    let declared: HashMap<&str, (u64, u64)> = pickles
        .objects
        .storages()
        .map(|s| {
            let size = s.dtype.map_or(1, |dtype| dtype.bitsize() as u64 / 8);
            (s.key.as_str(), (s.elements, size))
        })
        .collect();
    let bad = |expected: String, got: String| Error::file(path, expected, got);
    let mut all = HashMap::new();
    let mut at = pickles.len;
    for key in &pickles.keys {
        let Some(&(elements, size)) = declared.get(key.as_str()) else {
            let got = format!("'{key}'");
            return Err(bad("keys of storages that tensors have".into(), got));
        };
        let cut = |needed: Option<u64>| {
            let needed = needed.map_or("more".into(), |n| n.to_string());
            bad(
                format!("{needed} bytes with storage '{key}'"),
                format!("{file_len}: if it was cut short, download it again"),
            )
        };
        let data = at + 8;
        if data > file_len {
            return Err(cut(Some(data)));
        }
        let mut count = [0; 8];
        io::read_at(file, &mut count, at).map_err(Error::io(path, "read"))?;
        let count = u64::from_le_bytes(count);
        if count != elements {
            let expected = format!("{elements} elements in storage '{key}', as its tensors say");
            return Err(bad(expected, count.to_string()));
        }
        let len = elements.checked_mul(size);
        let end = len.and_then(|len| data.checked_add(len));
        let (Some(len), Some(end)) = (len, end.filter(|&end| end <= file_len)) else {
            return Err(cut(end));
        };
        all.insert(key.clone(), Bytes { offset: data, len });
        at = end;
    }
    Ok(all)
}
