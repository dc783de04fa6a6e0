//! A file that appears under its name only when it is complete.

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::path::Path;

/// A file that is written under a temporary name beside its own and renamed when it is complete.
#[derive(Debug)]
pub struct OutputFile<'a> {
    path: &'a Path,
    file: tempfile::NamedTempFile,
}

impl<'a> OutputFile<'a> {
    /// Creates the temporary file. Call this before the measurements, so that a folder that cannot
    /// be written to is found first.
    ///
    /// # Errors
    /// If the path is a folder, or its folder cannot be written to.
    pub fn new(path: &'a Path) -> Result<Self> {
        let open = || -> Result<_> {
            if path.is_dir() {
                bail!("is a folder");
            }
            let folder = path
                .parent()
                .filter(|p| !p.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            Ok(tempfile::NamedTempFile::new_in(folder)?)
        };
        let file = open().with_context(|| path.display().to_string())?;
        Ok(Self { path, file })
    }

    /// Writes the text and renames the file.
    ///
    /// # Errors
    /// If writing or renaming fails.
    pub fn write(mut self, text: &str) -> Result<()> {
        let result = self
            .file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.persist(self.path).map(drop).map_err(|e| e.error));
        result.with_context(|| self.path.display().to_string())
    }
}
