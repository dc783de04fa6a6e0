//! The path that a job writes: what may be replaced, and how a folder gets its name.

use crate::plan::Sidecar;
use crate::{Error, Result};
use bitnet_formats::Source;
use bitnet_formats::replace::{self, Existing};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Rejects a target that is the input or a parent of it, or that exists without `--force`. A
/// directory may be replaced only if it is a model directory, and only by another one.
pub(crate) fn check_target(
    source: &Source,
    folder: bool,
    target: &Path,
    existing: Existing,
) -> Result<()> {
    if let Ok(target_path) = fs::canonicalize(target) {
        let inside =
            |path: &Path| fs::canonicalize(path).is_ok_and(|p| p.starts_with(&target_path));
        if inside(source.path()) || source.files().iter().any(|f| inside(&f.path)) {
            return Err(Error::SameFile {
                path: target.to_path_buf(),
            });
        }
        if existing == Existing::Refuse {
            return Err(Error::Exists {
                path: target.to_path_buf(),
            });
        }
        if target_path.is_dir() && !folder {
            return Err(
                bitnet_formats::Error::file(target, "a file to replace", "a directory").into(),
            );
        }
        if target_path.is_dir() && !is_model_folder(&target_path) {
            let expected = "a model to replace: config.json, weights and files beside them";
            return Err(bitnet_formats::Error::file(
                target,
                expected,
                "a directory with something else in it",
            )
            .into());
        }
    }
    Ok(())
}

/// Writes the other files of the model into the folder and renames it to the target.
pub(crate) fn place_folder(
    folder: &Path,
    sidecars: &BTreeMap<String, Sidecar>,
    target: &Path,
    existing: Existing,
) -> Result<()> {
    use bitnet_formats::Error as FileError;
    // Files that a killed run of another model left do not belong to this one.
    for entry in fs::read_dir(folder)
        .map_err(FileError::io(folder, "list"))?
        .filter_map(|e| e.ok())
    {
        if entry.file_name() != "model.safetensors" {
            fs::remove_file(entry.path()).map_err(FileError::io(&entry.path(), "remove"))?;
        }
    }
    for (name, sidecar) in sidecars {
        let path = folder.join(name);
        match sidecar {
            Sidecar::Copy(from) => fs::copy(from, &path).map(drop),
            Sidecar::Bytes(bytes) => fs::write(&path, bytes),
        }
        .map_err(FileError::io(&path, "write"))?;
    }
    if existing == Existing::Refuse && target.exists() {
        return Err(Error::Exists {
            path: target.to_path_buf(),
        });
    }
    Ok(replace::place_folder(folder, target, existing)?)
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
