//! Files and folders of a run.

use crate::Result;
use std::fs;
use std::path::Path;

/// Removes a file or folder, if it exists.
pub(super) fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(bitnet_formats::Error::io(path, "remove")(e).into())
        }
        _ => Ok(()),
    }
}

/// Writes a file under a temporary name and renames it.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("bitnet-partial");
    fs::write(&partial, bytes).map_err(bitnet_formats::Error::io(&partial, "write"))?;
    Ok(fs::rename(&partial, path).map_err(bitnet_formats::Error::io(path, "rename to"))?)
}
