//! Which files of a model folder go into the result beside the tensors.
//!
//! A hub folder often holds the same weights for other frameworks, and states of the training. The
//! result gets what a model needs: configuration, tokenizer, templates, code, documents.

use super::Sidecar;
use crate::Result;
use bitnet_formats::output::{JOURNAL, PARTIAL};
use bitnet_formats::{Error as FileError, Source, hints};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Endings of configuration, vocabularies, templates, code and documents.
const ENDINGS: &[&str] = &[
    "json", "jsonl", "txt", "md", "rst", "jinja", "jinja2", "yaml", "yml", "toml", "cfg", "ini",
    "csv", "tsv", "py", "model", "spm", "bpe", "vocab", "tiktoken",
];

/// Endings of pictures in a model card. They are copied up to [`MAX_PICTURE`].
const PICTURES: &[&str] = &["png", "jpg", "jpeg", "gif", "svg", "webp"];

/// Bytes of the largest picture that is copied.
const MAX_PICTURE: u64 = 1 << 20;

/// Beginnings of names of licences and the like, whatever their ending.
const DOCUMENTS: &[&str] = &[
    "license",
    "licence",
    "notice",
    "copying",
    "readme",
    "use_policy",
    "authors",
    "citation",
];

/// What other quantizers write beside weights that the result has as floats.
const QUANTIZER_CONFIGS: [&str; 2] = ["quantize_config.json", "quant_config.json"];

/// Bytes of the largest file without an ending that is copied.
const MAX_PLAIN: u64 = 1 << 20;

/// How many names a note lists.
const MOST_NAMES: usize = 8;

/// The files of the source's folder to copy. What stays behind is named in `notes`.
pub(super) fn of_folder(
    source: &Source,
    notes: &mut Vec<String>,
) -> Result<BTreeMap<String, Sidecar>> {
    let folder = source.path();
    let mut sidecars = BTreeMap::new();
    let mut left_out = vec![];
    let steps = step_folders(folder);
    let list = fs::read_dir(folder).map_err(FileError::io(folder, "list"))?;
    for entry in list.filter_map(|e| e.ok()) {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let of_quantizer = QUANTIZER_CONFIGS.contains(&name.as_str()) && source.has_foreign();
        if of_quantizer
            || name.starts_with('.')
            || [PARTIAL, JOURNAL].iter().any(|w| name.ends_with(w))
        {
            continue;
        }
        if path.is_dir() {
            let config = format!("{name}/config.json");
            if steps.contains(&name) {
                if path.join("config.json").is_file() {
                    sidecars.insert(config, Sidecar::Copy(path.join("config.json")));
                }
                continue;
            }
            notes.push(format!("the folder {name} is not copied"));
        } else if let Some(link) = hints::dangling_link(&path).filter(|_| has_ending(&name)) {
            let expected = "a file to copy into the result";
            return Err(FileError::file(&path, expected, link).into());
        } else if is_needed(&path, &name) {
            sidecars.insert(name, Sidecar::Copy(path));
        } else if !name.ends_with(".index.json") && !source.files().iter().any(|f| f.path == path) {
            left_out.push(name);
        }
    }
    if !left_out.is_empty() {
        left_out.sort();
        notes.push(format!(
            "not copied, since the result does not need {}: {}",
            if left_out.len() == 1 { "it" } else { "them" },
            named(&left_out)
        ));
    }
    Ok(sidecars)
}

/// The folders of the steps that sentence-transformers lists in modules.json.
fn step_folders(folder: &Path) -> Vec<String> {
    let modules = fs::read(folder.join("modules.json")).unwrap_or_default();
    let modules: serde_json::Value = serde_json::from_slice(&modules).unwrap_or_default();
    let steps = modules.as_array().into_iter().flatten();
    let names = steps.filter_map(|step| step["path"].as_str());
    names.map(String::from).collect()
}

/// Names for a note: the first of them, and how many more there are.
pub(crate) fn named(names: &[String]) -> String {
    let shown = names.iter().take(MOST_NAMES).map(String::as_str);
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if names.len() > MOST_NAMES {
        text += &format!(" and {} more", names.len() - MOST_NAMES);
    }
    text
}

/// Whether a model needs the file, by its kind.
fn is_needed(path: &Path, name: &str) -> bool {
    let size =
        fs::metadata(path).map_or(u64::MAX, |m| if m.is_file() { m.len() } else { u64::MAX });
    let name = name.to_lowercase();
    if size == u64::MAX || name.ends_with(".index.json") || name == "trainer_state.json" {
        return false;
    }
    if DOCUMENTS.iter().any(|d| name.starts_with(d)) {
        return size <= MAX_PLAIN;
    }
    match name.rsplit_once('.') {
        None => size <= MAX_PLAIN,
        Some((_, ending)) if PICTURES.contains(&ending) => size <= MAX_PICTURE,
        Some(_) => has_ending(&name),
    }
}

/// Whether the name has one of [`ENDINGS`].
fn has_ending(name: &str) -> bool {
    let name = name.to_lowercase();
    ENDINGS.iter().any(|e| name.ends_with(&format!(".{e}")))
}
