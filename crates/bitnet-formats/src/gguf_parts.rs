//! A GGUF model in one file, or in parts: `NAME-00001-of-00003.gguf` and so on.
//!
//! llama.cpp's `gguf-split` and gguf-py write parts. Each is a GGUF of some of the tensors with the
//! keys [`SPLIT_KEYS`]; the first part has the metadata of the model, and perhaps no tensors.

use crate::gguf::{ALIGNMENT_KEY, GgufHeader, SPLIT_KEYS, Value};
use crate::hints;
use crate::storage::Storage;
use crate::tensor::FileId;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Most parts: their names have five digits for it.
const MAX_PARTS: u64 = 99_999;

/// What a part says of itself.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// Its index, from 0.
    index: Option<u64>,
    /// Number of parts.
    count: Option<u64>,
    /// Number of tensors in all parts.
    tensors: Option<u64>,
}

impl Part {
    fn read(path: &Path, header: &GgufHeader) -> Result<Self> {
        let number = |key: &str| match header.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) => Ok(Some(n)),
                None => Err(Error::config(path, key, "a number", value.preview(40))),
            },
        };
        let [index, count, tensors] = SPLIT_KEYS;
        Ok(Self {
            index: number(index)?,
            count: number(count)?,
            tensors: number(tensors)?,
        })
    }
}

/// The end of the name of a part; `index` counts from 0.
fn name_end(index: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", index + 1)
}

/// The names of all parts of the model whose first part has this name.
pub(crate) fn names(first: &str) -> Option<Vec<String>> {
    let count = first.strip_suffix(".gguf")?.rsplit_once("-of-")?.1;
    let count: u64 = count.parse().ok().filter(|n| *n <= MAX_PARTS)?;
    let model = first.strip_suffix(&name_end(0, count))?;
    Some(all_names(model, count))
}

fn all_names(model: &str, count: u64) -> Vec<String> {
    (0..count)
        .map(|index| format!("{model}{}", name_end(index, count)))
        .collect()
}

impl Storage {
    /// Opens the GGUF that is file 0, with the other parts of its model if it is a part.
    pub(crate) fn open_gguf(&mut self, file_id: FileId) -> Result<()> {
        let header = self.gguf_header(file_id)?;
        let path = self.files[file_id.0].path.clone();
        let part = Part::read(&path, &header)?;
        match part.count {
            Some(count) if count > 1 => self.open_parts(&path, part, count),
            _ => {
                self.gguf = header.metadata.clone();
                self.gguf.retain(|(key, _)| !is_split_key(key));
                self.add_gguf(file_id, header)
            }
        }
    }

    /// Opens all parts of the model that the part at `path` belongs to.
    fn open_parts(&mut self, path: &Path, part: Part, count: u64) -> Result<()> {
        let paths = part_paths(path, part, count)?;
        self.files.clear();
        let mut first = part;
        let mut total = 0;
        for (i, path) in paths.iter().enumerate() {
            let file_id = self.add_file(path)?;
            let header = self.gguf_header(file_id)?;
            let part = Part::read(path, &header)?;
            check_part(path, part, (i as u64, count))?;
            if i == 0 {
                first = part;
                self.gguf = header.metadata.clone();
            } else {
                if part.tensors.is_some_and(|n| Some(n) != first.tensors) {
                    return Err(Error::config(
                        path,
                        SPLIT_KEYS[2],
                        format!("{} as in {}", number(first.tensors), paths[0].display()),
                        format!("{}: a part of another model", number(part.tensors)),
                    ));
                }
                self.note_other_metadata(path, &header);
            }
            total += header.tensors.len() as u64;
            self.add_gguf(file_id, header)?;
        }
        if first.tensors != Some(total) {
            return Err(Error::config(
                &paths[0],
                SPLIT_KEYS[2],
                format!("{total}, the tensors that the {count} parts have"),
                format!(
                    "{}: a part is of another model or damaged",
                    number(first.tensors)
                ),
            ));
        }
        self.gguf.retain(|(key, _)| !is_split_key(key));
        Ok(())
    }

    /// Says which metadata of a later part is not that of the first.
    fn note_other_metadata(&mut self, path: &Path, header: &GgufHeader) {
        let in_first = |key: &str| self.gguf.iter().find(|(k, _)| k == key).map(|(_, v)| v);
        let differs = |key: &str, value: &Value| {
            !is_split_key(key) && key != ALIGNMENT_KEY && in_first(key) != Some(value)
        };
        let mut others = header.metadata.iter().filter(|(k, v)| differs(k, v));
        if let Some((key, _)) = others.next() {
            let more = others.count();
            self.notes.push(format!(
                "{}: metadata that the first part does not have is not used: '{key}' and {more} \
                 more",
                path.display()
            ));
        }
    }
}

fn is_split_key(key: &str) -> bool {
    SPLIT_KEYS.contains(&key)
}

fn number(n: Option<u64>) -> String {
    n.map_or("none".into(), |n| n.to_string())
}

/// The paths of all parts, in order: beside the one that was named.
///
/// # Errors
/// [`Error::Config`] for a part whose name is not that of a part; [`Error::File`] if some are not
/// there.
fn part_paths(path: &Path, part: Part, count: u64) -> Result<Vec<PathBuf>> {
    let [index_key, count_key, _] = SPLIT_KEYS;
    if count > MAX_PARTS {
        let expected = format!("at most {MAX_PARTS} parts");
        return Err(Error::config(path, count_key, expected, count.to_string()));
    }
    let Some(index) = part.index.filter(|&index| index < count) else {
        let expected = format!("an index below the {count} of {count_key}");
        return Err(Error::config(path, index_key, expected, number(part.index)));
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let end = name_end(index, count);
    let Some(model) = name.strip_suffix(&end) else {
        return Err(Error::config(
            path,
            count_key,
            format!("a file whose name ends in '{end}', beside the other parts"),
            format!("part {} of {count} parts with another name", index + 1),
        ));
    };
    let names = all_names(model, count);
    let missing: Vec<String> = names
        .iter()
        .filter(|name| !path.with_file_name(name).exists())
        .cloned()
        .collect();
    if !missing.is_empty() {
        return Err(Error::file(
            path,
            format!("all {count} parts of the model in one folder"),
            format!(
                "{} of them; fetch the missing ones: {}",
                count - missing.len() as u64,
                hints::some(&missing)
            ),
        ));
    }
    Ok(names.iter().map(|name| path.with_file_name(name)).collect())
}

/// Checks that a file is the part that its name says.
fn check_part(path: &Path, part: Part, (index, count): (u64, u64)) -> Result<()> {
    let [index_key, count_key, _] = SPLIT_KEYS;
    if part.index.is_none() && part.count.is_none() {
        let expected = format!("part {} of {count} of a GGUF model", index + 1);
        let got = format!("a GGUF without the key {index_key}: it is no part");
        return Err(Error::file(path, expected, got));
    }
    if part.index != Some(index) {
        let expected = format!("{index}, as the name of the file says");
        let got = format!("{}: a part under the name of another", number(part.index));
        return Err(Error::config(path, index_key, expected, got));
    }
    // Only the first part needs the count.
    if part.count.is_some_and(|n| n != count) || (index == 0 && part.count.is_none()) {
        let expected = format!("{count}, as the name of the file says");
        return Err(Error::config(path, count_key, expected, number(part.count)));
    }
    Ok(())
}
