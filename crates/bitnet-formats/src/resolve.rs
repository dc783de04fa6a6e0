//! Which files of a model folder hold its weights.
//!
//! The order is that of transformers: `model.safetensors`, then an index of shards, then the only
//! file of weights; without safetensors, `pytorch_model.bin`, then its index. Where two of them are there, a note says which one is read.

use crate::hints;
use crate::python_json;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

const MODEL: &str = "model.safetensors";
const PYTORCH_MODEL: &str = "pytorch_model.bin";
const INDEX_ENDING: &str = ".safetensors.index.json";

/// The files of weights in a folder.
pub(crate) enum Weights {
    /// One file.
    File(PathBuf),
    /// An index, and for each tensor the shard that it names.
    Index {
        path: PathBuf,
        map: Map<String, Value>,
        /// Names of the shards, each once.
        shards: Vec<String>,
    },
}

/// Chooses the files of weights, and notes what is ignored.
///
/// # Errors
/// [`Error::File`] for a folder without weights, or with several files and no index; errors of the
/// index.
pub(crate) fn weights(folder: &Path, notes: &mut Vec<String>) -> Result<Weights> {
    let (files, indexes) = candidates(folder, notes)?;
    let model = folder.join(MODEL);
    let has_model = files.contains(&model);
    if hints::is_adapter(folder) && !has_model && indexes.is_empty() {
        return Err(hints::no_model(folder, "a model"));
    }
    let own_index = folder.join(format!("model{INDEX_ENDING}"));
    let index = match indexes.as_slice() {
        all if all.contains(&own_index) => Some(own_index),
        [one] => Some(one.clone()),
        [] => None,
        [a, b, ..] if !has_model => {
            let got = format!("{} and {}", file_name(a), file_name(b));
            return Err(Error::file(folder, "one index of shards", got));
        }
        _ => None,
    };
    let single = match files.as_slice() {
        _ if has_model => Some(&model),
        [one] => Some(one),
        _ => None,
    };
    let Some(index) = index else {
        return match (single, files.len()) {
            (Some(file), _) => Ok(Weights::File(file.clone())),
            (None, 0) => pytorch(folder),
            (None, several) => Err(Error::file(
                folder,
                "model.safetensors, or model.safetensors.index.json, or a single .safetensors file",
                format!("{several} of them and no index"),
            )),
        };
    };
    if let Some(file) = single
        && let Some(note) = ignored_index(folder, file, &index)?
    {
        notes.push(note);
        return Ok(Weights::File(file.clone()));
    }
    through(folder, index)
}

/// The weights in PyTorch's own format.
fn pytorch(folder: &Path) -> Result<Weights> {
    let model = folder.join(PYTORCH_MODEL);
    let index = folder.join(format!("{PYTORCH_MODEL}.index.json"));
    if is_there(&model) {
        Ok(Weights::File(model))
    } else if is_there(&index) {
        through(folder, index)
    } else {
        Err(hints::no_model(folder, "a .safetensors file"))
    }
}

/// The shards of an index, all of which are there.
fn through(folder: &Path, index: PathBuf) -> Result<Weights> {
    let map = weight_map(&index)?;
    let shards = shards(&index, &map)?;
    check_present(folder, &index, &shards)?;
    Ok(Weights::Index {
        path: index,
        map,
        shards,
    })
}

/// The files of weights and the indexes. Links that lead nowhere are noted.
fn candidates(folder: &Path, notes: &mut Vec<String>) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut files, mut indexes) = (vec![], vec![]);
    let mut names: Vec<PathBuf> = fs::read_dir(folder)
        .map_err(Error::io(folder, "list"))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .collect();
    names.sort();
    for path in names {
        let name = file_name(&path);
        if name.ends_with(".safetensors") {
            files.push(path);
        } else if name.ends_with(INDEX_ENDING) {
            indexes.push(path);
        } else if let Some(link) = hints::dangling_link(&path) {
            notes.push(format!("{name} is {link}"));
        }
    }
    Ok((files, indexes))
}

/// Why `file` is read and the index beside it is not; `None` where the index counts.
fn ignored_index(folder: &Path, file: &Path, index: &Path) -> Result<Option<String>> {
    let (file_name, index_name) = (file_name(file), file_name(index));
    let shards = weight_map(index).and_then(|map| shards(index, &map));
    let is_model = file_name == MODEL;
    let reason = match &shards {
        Ok(shards) if shards.contains(&file_name) => return Ok(None),
        Ok(shards) if shards.iter().all(|s| !is_there(&folder.join(s))) => {
            "whose shards are not there".to_string()
        }
        Ok(_) if is_model => "whose shards are there too: transformers reads the same file".into(),
        Err(error) if is_model => format!("which cannot be read ({error})"),
        Ok(_) | Err(_) => return Ok(None),
    };
    Ok(Some(format!(
        "the weights are read from {file_name}, and not through {index_name}, {reason}"
    )))
}

/// Whether there is a file, or a link to one that should be there.
fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// `weight_map` of an index.
fn weight_map(index: &Path) -> Result<Map<String, Value>> {
    match read_json(index)?.get_mut("weight_map").map(Value::take) {
        Some(Value::Object(map)) => Ok(map),
        _ => Err(Error::config(
            index,
            "weight_map",
            "an object of tensor names and files",
            "none",
        )),
    }
}

/// The files that an index names, each once.
fn shards(index: &Path, map: &Map<String, Value>) -> Result<Vec<String>> {
    let mut shards: Vec<String> = vec![];
    for (tensor, file) in map {
        match file.as_str() {
            Some(f) if !f.is_empty() && Path::new(f).file_name().is_some_and(|name| name == f) => {
                shards.push(f.into())
            }
            _ => {
                let expected = "a file name in the same folder";
                return Err(Error::tensor(index, tensor, expected, file.to_string()));
            }
        }
    }
    shards.sort_unstable();
    shards.dedup();
    Ok(shards)
}

/// Refuses an index of which shards are missing, with their number.
fn check_present(folder: &Path, index: &Path, shards: &[String]) -> Result<()> {
    let missing: Vec<&String> = shards
        .iter()
        .filter(|shard| !is_there(&folder.join(shard)))
        .collect();
    let Some(first) = missing.first() else {
        return Ok(());
    };
    Err(Error::file(
        &folder.join(first),
        format!("a shard that {} names", file_name(index)),
        format!(
            "no such file; {} of {} shards are missing: download them",
            missing.len(),
            shards.len()
        ),
    ))
}

/// Largest JSON file that is read.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// Reads a JSON file of a model folder.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let meta = fs::metadata(path).map_err(hints::open_error(path, "open"))?;
    if meta.len() > MAX_JSON_BYTES {
        let expected = format!("at most {MAX_JSON_BYTES} bytes of JSON");
        return Err(Error::file(path, expected, meta.len().to_string()));
    }
    let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
    python_json::parse(path, &bytes)
}
