//! The path that a job writes: what may be replaced, and how a folder gets its name.

use crate::onnx;
use crate::plan::Sidecar;
use crate::plan::sidecars::named;
use crate::{Error, Result};
use bitnet_formats::Source;
use bitnet_formats::output::earlier_forms;
use bitnet_formats::replace::{self, Existing};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Name of the weights in a folder with these other files.
pub(crate) fn weights_name(sidecars: &BTreeMap<String, Sidecar>) -> &'static str {
    match sidecars.contains_key(onnx::MODEL) {
        true => onnx::DATA,
        false => "model.safetensors",
    }
}

/// What a job writes.
pub(crate) struct Outputs<'a> {
    /// The files of a new folder beside its weights; `None` for files that are not in a folder of
    /// their own.
    pub(crate) sidecars: Option<&'a BTreeMap<String, Sidecar>>,
    /// The weights: names in the folder, or paths.
    pub(crate) weights: Vec<PathBuf>,
}

impl Outputs<'_> {
    /// Whether a new folder has a file of that name, or a folder with a file.
    fn holds(&self, name: &str) -> bool {
        let files = self.sidecars.into_iter().flat_map(BTreeMap::keys);
        let sidecar = files.into_iter().any(|file| is_within(file, name));
        sidecar || self.weights.iter().any(|w| w == Path::new(name))
    }
}

/// Rejects a target that is the input or a parent of it, or that exists without `--force`; an empty
/// folder may be used without. A folder may be replaced only by another one, if it holds a model,
/// and if what stays in it cannot be taken for a part of the new one.
pub(crate) fn check_target(
    source: &Source,
    outputs: &Outputs<'_>,
    target: &Path,
    existing: Existing,
) -> Result<()> {
    if outputs.sidecars.is_none() {
        let earlier = earlier_forms(target, &outputs.weights);
        let there = outputs.weights.iter().chain(&earlier);
        // A file of the target's own name that another program wrote stays beside a new set.
        let own = (existing == Existing::Refuse).then_some(target);
        for path in there.map(PathBuf::as_path).chain(own) {
            check_path(source, outputs, path, existing)?;
        }
        return Ok(());
    }
    check_path(source, outputs, target, existing)
}

fn check_path(
    source: &Source,
    outputs: &Outputs<'_>,
    target: &Path,
    existing: Existing,
) -> Result<()> {
    let Ok(target_path) = fs::canonicalize(target) else {
        return Ok(());
    };
    let inside = |path: &Path| fs::canonicalize(path).is_ok_and(|p| p.starts_with(&target_path));
    if inside(source.path()) || source.files().iter().any(|f| inside(&f.path)) {
        return Err(Error::SameFile {
            path: target.to_path_buf(),
        });
    }
    // A partial folder beside "." would be inside it.
    if outputs.sidecars.is_some()
        && target.file_name().is_some()
        && replace::is_empty_folder(target)
    {
        return Ok(());
    }
    if existing == Existing::Refuse {
        return Err(Error::Exists {
            path: target.to_path_buf(),
        });
    }
    match outputs.sidecars {
        _ if !target_path.is_dir() => Ok(()),
        None => Err(bitnet_formats::Error::file(target, "a file to replace", "a directory").into()),
        Some(_) => kept_entries(target, outputs).map(drop),
    }
}

/// Whether the path of a file in a folder is the entry `name` or in it.
fn is_within(file: &str, name: &str) -> bool {
    file.strip_prefix(name)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What stays of a folder that is replaced: everything but the files that this program wrote. Where
/// no document lists those, everything but the files that the new folder has.
fn kept_entries(target: &Path, outputs: &Outputs<'_>) -> Result<Vec<String>> {
    use bitnet_formats::Error as FileError;
    let written = replace::written_files(target);
    let mut kept = vec![];
    for entry in fs::read_dir(target).map_err(FileError::io(target, "list"))? {
        let name = entry.map_err(FileError::io(target, "list"))?.file_name();
        let name = name.to_string_lossy().into_owned();
        let ours = if written.is_empty() {
            outputs.holds(&name)
        } else {
            written.iter().any(|file| is_within(file, &name))
        };
        if !ours {
            kept.push(name);
        }
    }
    kept.sort();
    if written.is_empty() && !is_model_folder(target) {
        let expected = "a model to replace: config.json, weights and files beside them";
        let got = match kept.is_empty() {
            true => "a directory with something else in it".into(),
            false => format!("a directory with {}; choose another name", named(&kept)),
        };
        return Err(FileError::file(target, expected, got).into());
    }
    let weights =
        |name: &String| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    if let Some(name) = kept
        .iter()
        .find(|name| outputs.holds(name) || weights(name))
    {
        let got = format!(
            "{name}, which no document of this program lists; move it away, or choose another name"
        );
        let expected = "a folder whose own files can stay beside the new ones";
        return Err(FileError::file(target, expected, got).into());
    }
    Ok(kept)
}

/// Writes the other files of the model into the folder, adds what stays of the old one, and renames
/// it to the target. Returns the names of what stays.
pub(crate) fn place_folder(
    folder: &Path,
    outputs: &Outputs<'_>,
    target: &Path,
    existing: Existing,
) -> Result<Vec<String>> {
    use bitnet_formats::Error as FileError;
    // Files that a killed run of another model left do not belong to this one.
    for entry in fs::read_dir(folder)
        .map_err(FileError::io(folder, "list"))?
        .filter_map(|e| e.ok())
    {
        let name = entry.file_name();
        if !outputs.weights.iter().any(|w| w.as_os_str() == name) {
            replace::remove(&entry.path())?;
        }
    }
    for (name, sidecar) in outputs.sidecars.into_iter().flatten() {
        let path = folder.join(name);
        if let Some((parent, _)) = name.rsplit_once('/') {
            let parent = folder.join(parent);
            fs::create_dir_all(&parent).map_err(FileError::io(&parent, "create"))?;
        }
        match sidecar {
            Sidecar::Copy(from) => fs::copy(from, &path).map(drop),
            Sidecar::Bytes(bytes) => fs::write(&path, bytes),
        }
        .map_err(FileError::io(&path, "write"))?;
    }
    let mut kept = vec![];
    if target.exists() && !replace::is_empty_folder(target) {
        if existing == Existing::Refuse {
            return Err(Error::Exists {
                path: target.to_path_buf(),
            });
        }
        // Of a link only the name is replaced: its folder and all in it stay where they are.
        if fs::symlink_metadata(target).is_ok_and(|m| m.is_dir()) {
            kept = kept_entries(target, outputs)?;
        }
        for name in &kept {
            replace::add_to_folder(&target.join(name), &folder.join(name))?;
        }
    }
    replace::place_folder(folder, target, existing)?;
    Ok(kept)
}

/// Whether a folder is a model folder: only files, among them config.json and weights.
fn is_model_folder(path: &Path) -> bool {
    let Ok(entries) = fs::read_dir(path) else {
        return false;
    };
    let mut weights = false;
    for entry in entries {
        let Ok(entry) = entry else { return false };
        if !entry.path().is_file() {
            return false;
        }
        weights |= entry
            .file_name()
            .to_string_lossy()
            .ends_with(".safetensors");
    }
    weights && path.join("config.json").is_file()
}
