//! Files and folders that appear under their name whole or not at all.
//!
//! A target is written under a partial name beside it and renamed when it is complete. A folder
//! that replaces another needs two renames, since no system call here does it in one. A kill
//! leaves, after each step:
//!
//! | step | under the name | beside it | the next run |
//! |---|---|---|---|
//! | partial file or folder begun | old | part of the new | writes it again, or resumes it |
//! | file renamed | new | | |
//! | file linked, where the target must not exist | new | a second name of the new | removes that |
//! | old folder renamed to `PARTIAL-replaced` | | old and new, both whole | gives the old its name back |
//! | new folder renamed | new | old | removes the old |
//!
//! [`recover_folder`] does the last two. A writer calls it before it looks at its target. Files of
//! the old folder that are to stay get a second name in the new one before the first rename
//! ([`add_to_folder`]), so both are whole at every moment. An empty folder is removed instead of
//! renamed.

use crate::document::{self, Document};
use crate::safetensors::SafetensorsHeader;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};

/// Ending of an unfinished file or folder.
pub const PARTIAL: &str = "bitnet-partial";

/// What happens to a target that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is an error.
    Refuse,
    /// It is replaced when the new one is complete.
    Replace,
}

/// `TARGET.ENDING`. A slash at the end of the target is left out, behind which the ending would be
/// a name of its own.
pub fn beside(target: &Path, ending: &str) -> PathBuf {
    let mut name = target.components().as_path().as_os_str().to_os_string();
    name.push(".");
    name.push(ending);
    name.into()
}

/// Writes a file, or replaces one.
///
/// # Errors
/// [`Error::Io`]. The old file is then unchanged, and nothing is left beside it.
pub fn write_file(target: &Path, bytes: &[u8]) -> Result<()> {
    write_file_with(target, |file| file.write_all(bytes)).map(drop)
}

/// [`write_file`] with the bytes that `fill` writes. The file is returned open, behind its end.
///
/// # Errors
/// As [`write_file`].
pub fn write_file_with(
    target: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<File> {
    let partial = beside(target, PARTIAL);
    let mut file = create_partial(&partial)?;
    let written = (|| {
        fill(&mut file).map_err(Error::io(&partial, "write"))?;
        place_file(&partial, target, Existing::Replace)
    })();
    match written {
        Ok(()) => Ok(file),
        Err(error) => {
            let _ = fs::remove_file(&partial);
            Err(error)
        }
    }
}

/// Creates a partial file. An existing one is removed and not truncated: after a kill it may be a
/// second name of the finished target.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn create_partial(partial: &Path) -> Result<File> {
    match fs::remove_file(partial) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            return Err(Error::io(partial, "remove")(e));
        }
        _ => {}
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(partial)
        .map_err(Error::io(partial, "create"))
}

/// Gives a finished file its name.
///
/// # Errors
/// [`Error::Io`], also for a target that exists and must not be replaced.
pub fn place_file(partial: &Path, target: &Path, existing: Existing) -> Result<()> {
    let place = || {
        if existing == Existing::Replace {
            return fs::rename(partial, target);
        }
        // If another process took the name meanwhile, a link fails; a rename would replace it.
        match fs::hard_link(partial, target) {
            Ok(()) => fs::remove_file(partial),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(error),
            // A file system without links.
            Err(_) if !target.exists() => fs::rename(partial, target),
            Err(error) => Err(error),
        }
    };
    place().map_err(Error::io(target, "rename to"))
}

/// Gives a finished folder its name. The old file or folder keeps its bytes until then.
///
/// # Errors
/// [`Error::Io`], also for a target that exists and must not be replaced. The old one then has its
/// name.
pub fn place_folder(partial: &Path, target: &Path, existing: Existing) -> Result<()> {
    swap(partial, target, existing, &|_| ())
}

/// A moment between two steps of [`place_folder`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Begun,
    OldMoved,
    NewPlaced,
    OldRemoved,
}

fn swap(partial: &Path, target: &Path, existing: Existing, at: &dyn Fn(Moment)) -> Result<()> {
    at(Moment::Begun);
    if is_empty_folder(target) {
        fs::remove_dir(target).map_err(Error::io(target, "replace"))?;
    }
    if !target.exists() {
        fs::rename(partial, target).map_err(Error::io(target, "rename to"))?;
        at(Moment::NewPlaced);
        return Ok(());
    }
    if existing == Existing::Refuse {
        return Err(Error::io(target, "rename to")(
            ErrorKind::AlreadyExists.into(),
        ));
    }
    let replaced = replaced(partial);
    fs::rename(target, &replaced).map_err(Error::io(&replaced, "rename to"))?;
    at(Moment::OldMoved);
    if let Err(error) = fs::rename(partial, target) {
        let _ = fs::rename(&replaced, target);
        return Err(Error::io(target, "rename to")(error));
    }
    at(Moment::NewPlaced);
    remove(&replaced)?;
    at(Moment::OldRemoved);
    Ok(())
}

/// Ends a [`place_folder`] that was killed: the old one gets its name back if none stands there,
/// and goes if the new one does.
///
/// # Errors
/// [`Error::Io`].
pub fn recover_folder(partial: &Path, target: &Path) -> Result<()> {
    let replaced = replaced(partial);
    if !replaced.exists() {
        return Ok(());
    }
    if target.exists() {
        return remove(&replaced);
    }
    fs::rename(&replaced, target).map_err(Error::io(target, "rename to"))
}

/// Where the old one stands while the new one gets its name.
fn replaced(partial: &Path) -> PathBuf {
    let mut name = partial.as_os_str().to_os_string();
    name.push("-replaced");
    name.into()
}

/// Whether this is a folder, not a link to one, with nothing in it.
pub fn is_empty_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.is_dir())
        && fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// The files that this program wrote into a folder: those with a [`Document`], those that it lists,
/// and those of an index that it lists. Empty if none has one.
pub fn written_files(folder: &Path) -> BTreeSet<String> {
    let mut written = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let data = name.to_string_lossy().ends_with(".onnx.data");
        if (data || path.extension().is_some_and(|e| e == "safetensors"))
            && let Some(document) = document_of(&path)
        {
            written.insert(name.to_string_lossy().into_owned());
            written.extend(shards_of(folder, &document));
            written.extend(document.files.into_keys());
        }
    }
    written
}

/// The files that the index of a document names, if it is the one that was written.
fn shards_of(folder: &Path, document: &Document) -> BTreeSet<String> {
    let mut shards = BTreeSet::new();
    for (name, sum) in &document.files {
        let plain = Path::new(name)
            .file_name()
            .is_some_and(|n| n == name.as_str());
        let path = folder.join(name);
        let small = fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= MAX_INDEX_BYTES);
        if !(plain && small && name.ends_with(".safetensors.index.json")) {
            continue;
        }
        let Ok(bytes) = fs::read(&path) else { continue };
        if document::checksum(&bytes) != *sum {
            continue;
        }
        let index: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let files = index["weight_map"].as_object().into_iter().flatten();
        shards.extend(files.filter_map(|(_, file)| file.as_str().map(String::from)));
    }
    shards
}

/// Largest index that is read.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// The document of a safetensors file, if there is one that can be read.
fn document_of(path: &Path) -> Option<Document> {
    let file = File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    let header = SafetensorsHeader::read(path, &file, len).ok()?;
    let (_, text) = header.metadata.iter().find(|(k, _)| k == document::KEY)?;
    serde_json::from_str(text).ok()
}

/// Adds a file or a folder to another folder, as a second name where the system has links and as a
/// copy where it has not. The first name stays.
///
/// # Errors
/// [`Error::Io`], also for what is neither file nor folder.
pub fn add_to_folder(from: &Path, to: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(from).map_err(Error::io(from, "read"))?;
    if !meta.is_dir() {
        // On Linux this gives a symbolic link another name too, not its target.
        return match fs::hard_link(from, to) {
            Ok(()) => Ok(()),
            Err(_) => fs::copy(from, to).map(drop),
        }
        .map_err(Error::io(from, "keep"));
    }
    fs::create_dir(to).map_err(Error::io(to, "create"))?;
    for entry in fs::read_dir(from).map_err(Error::io(from, "list"))? {
        let name = entry.map_err(Error::io(from, "list"))?.file_name();
        add_to_folder(&from.join(&name), &to.join(&name))?;
    }
    fs::set_permissions(to, meta.permissions()).map_err(Error::io(to, "write"))
}

/// Removes a file or folder, if it exists.
///
/// # Errors
/// [`Error::Io`].
pub fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(path, "remove")(e)),
        _ => Ok(()),
    }
}

/// Makes the names in a folder last through a power cut.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder)
        .and_then(|f| f.sync_all())
        .map_err(Error::io(folder, "write"))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn folder(path: &Path, content: &str) {
        fs::create_dir(path).unwrap();
        fs::write(path.join("config.json"), content).unwrap();
        fs::write(path.join("model.safetensors"), content).unwrap();
    }

    /// What both files of a folder hold.
    fn content(path: &Path) -> String {
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap();
        assert_eq!(read("config.json"), read("model.safetensors"));
        read("config.json")
    }

    fn names(path: &Path) -> Vec<String> {
        let entries = fs::read_dir(path).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_swap_killed_at_any_step_leaves_the_old_or_the_new() {
        let moments = [
            (Moment::Begun, "old"),
            (Moment::OldMoved, "old"),
            (Moment::NewPlaced, "new"),
            (Moment::OldRemoved, "new"),
        ];
        for (moment, expected) in moments {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("out");
            let partial = beside(&target, PARTIAL);
            folder(&target, "old");
            folder(&partial, "new");
            let killed = catch_unwind(AssertUnwindSafe(|| {
                swap(&partial, &target, Existing::Replace, &|at| {
                    assert_ne!(at, moment, "killed");
                })
            }));
            assert!(killed.is_err(), "{moment:?}");

            recover_folder(&partial, &target).unwrap();
            assert_eq!(content(&target), expected, "{moment:?}");
            let left = names(dir.path());
            assert!(
                left.iter().all(|n| !n.ends_with("-replaced")),
                "{moment:?}: {left:?}"
            );

            remove(&partial).unwrap();
            folder(&partial, "newer");
            place_folder(&partial, &target, Existing::Replace).unwrap();
            assert_eq!(content(&target), "newer");
            assert_eq!(names(dir.path()), ["out"]);
        }
    }

    #[test]
    fn a_new_folder_killed_at_any_step() {
        for (moment, there) in [(Moment::Begun, false), (Moment::NewPlaced, true)] {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("out");
            let partial = beside(&target, PARTIAL);
            folder(&partial, "new");
            let killed = catch_unwind(AssertUnwindSafe(|| {
                swap(&partial, &target, Existing::Refuse, &|at| {
                    assert_ne!(at, moment, "killed");
                })
            }));
            assert!(killed.is_err());
            recover_folder(&partial, &target).unwrap();
            assert_eq!(target.exists(), there);
            assert_eq!(names(dir.path()).len(), 1);
        }
    }

    #[test]
    fn an_empty_folder_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let partial = beside(&target, PARTIAL);
        fs::create_dir(&target).unwrap();
        folder(&partial, "new");
        place_folder(&partial, &target, Existing::Refuse).unwrap();
        assert_eq!(content(&target), "new");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn a_kept_folder_outlives_its_first_name() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        fs::create_dir_all(old.join("sub/empty")).unwrap();
        fs::write(old.join("sub/data.csv"), "mine").unwrap();
        fs::create_dir(&new).unwrap();
        add_to_folder(&old.join("sub"), &new.join("sub")).unwrap();
        remove(&old).unwrap();
        assert_eq!(names(&new.join("sub")), ["data.csv", "empty"]);
        assert_eq!(fs::read(new.join("sub/data.csv")).unwrap(), b"mine");
        assert!(written_files(&new).is_empty());
    }

    #[test]
    fn a_folder_that_may_not_be_replaced_stays() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let partial = beside(&target, PARTIAL);
        folder(&target, "old");
        folder(&partial, "new");
        let error = place_folder(&partial, &target, Existing::Refuse).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert_eq!(
            (content(&target), content(&partial)),
            ("old".into(), "new".into())
        );
    }

    #[test]
    fn a_file_killed_while_it_is_written_leaves_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("report.json");
        write_file(&target, b"old").unwrap();
        let killed = catch_unwind(|| {
            write_file_with(&target, |file| {
                file.write_all(b"ne")?;
                panic!("killed")
            })
        });
        assert!(killed.is_err());
        assert_eq!(fs::read(&target).unwrap(), b"old");
        write_file(&target, b"new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["report.json"]);

        let full = write_file_with(&target, |_| Err(ErrorKind::StorageFull.into()));
        assert!(
            full.unwrap_err()
                .to_string()
                .contains("report.json.bitnet-partial")
        );
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["report.json"]);
    }

    /// A kill between link and removal: the partial file is another name of the finished one.
    #[test]
    fn a_partial_file_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (target, partial) = (
            dir.path().join("out"),
            dir.path().join("out.bitnet-partial"),
        );
        fs::write(&target, b"whole").unwrap();
        fs::hard_link(&target, &partial).unwrap();
        create_partial(&partial).unwrap().write_all(b"new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        assert!(place_file(&partial, &target, Existing::Refuse).is_err());
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        place_file(&partial, &target, Existing::Replace).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
    }

    #[test]
    fn names_beside_a_target() {
        for target in ["a/out", "a/out/", "a//out"] {
            assert_eq!(
                beside(Path::new(target), PARTIAL),
                Path::new("a/out.bitnet-partial")
            );
        }
    }
}
