//! What a path holds where no checkpoint is, and the next step: the end of error messages.

use crate::gguf_parts;
use crate::python_json;
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

/// The folder of snapshots in a Hugging Face cache.
const SNAPSHOTS: &str = "snapshots";

/// The error of a file or folder that the system does not open: a link that leads nowhere and the
/// id of a model on the Hugging Face hub are named as such.
pub fn open_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| {
        if source.kind() == ErrorKind::NotFound {
            if let Some(got) = dangling_link(&path) {
                return Error::file(&path, "a file", got);
            }
            if is_hub_id(&path) {
                return Error::file(
                    &path,
                    "a file or folder on this machine",
                    "nothing of that name; if it is an id on the Hugging Face hub, fetch it first \
                     (hf download ID --local-dir FOLDER) and give the folder: this program does \
                     not download",
                );
            }
        }
        Error::io(&path, action)(source)
    }
}

/// Where a link leads that leads nowhere, in words; `None` for anything else.
pub fn dangling_link(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    let gone = fs::metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound);
    gone.then(|| {
        format!(
            "a link that leads to {}, which is not there; copy the model with what its links lead \
             to (cp -rL)",
            target.display()
        )
    })
}

/// Why there is no tokenizer.json at `path`, and what makes one.
pub fn no_tokenizer(path: &Path) -> Option<String> {
    if let Some(link) = dangling_link(path) {
        return Some(link);
    }
    let model = path.with_file_name("tokenizer.model");
    (!path.exists() && model.is_file()).then(|| {
        "only tokenizer.model is there; transformers makes a tokenizer.json of it: \
         AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            .into()
    })
}

/// Whether a path that does not exist reads like `organisation/model`.
fn is_hub_id(path: &Path) -> bool {
    let plain = |name: &str| {
        name.chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    let parts: Vec<_> = path.components().collect();
    let ending = path.extension().and_then(|e| e.to_str());
    match parts.as_slice() {
        [Component::Normal(owner), Component::Normal(name)] => {
            owner.to_str().is_some_and(plain)
                && name.to_str().is_some_and(plain)
                && !matches!(ending, Some("safetensors" | "gguf" | "json"))
                && !Path::new(owner).exists()
        }
        _ => false,
    }
}

/// What a file is that is no checkpoint, by its first bytes, and the next step.
pub(crate) fn file_content(start: &[u8]) -> Option<&'static str> {
    let text = start.trim_ascii_start();
    let begins = |word: &[u8]| {
        text.get(..word.len())
            .is_some_and(|t| t.eq_ignore_ascii_case(word))
    };
    Some(if begins(b"version https://git-lfs") {
        "a git-lfs pointer and not the file itself; run `git lfs pull` in the folder"
    } else if begins(b"<!doctype") || begins(b"<html") || begins(b"<head") {
        "an HTML page; download the file itself (on the hub: /resolve/ instead of /blob/ in the \
         address)"
    } else if start.starts_with(b"PK\x03\x04") || start.starts_with(&[0x80, 2]) {
        "a PyTorch or zip file; load it with transformers and write it with \
         save_pretrained(FOLDER, safe_serialization=True)"
    } else if start.starts_with(b"\x89HDF") {
        "an HDF5 file of Keras; load it with transformers (from_tf=True) and write it with \
         save_pretrained(FOLDER, safe_serialization=True)"
    } else if start.starts_with(&[0x1f, 0x8b]) {
        "a gzip file; unpack it first"
    } else if begins(b"Entry not found") || begins(b"Invalid username or password") {
        "the error text of a download; download the file again"
    } else {
        return None;
    })
}

/// [`file_content`] of a file at a path.
pub(crate) fn content_at(path: &Path) -> Option<&'static str> {
    let mut start = vec![];
    File::open(path)
        .and_then(|file| file.take(64).read_to_end(&mut start))
        .ok()?;
    file_content(&start)
}

/// The error of a folder that lacks config.json or weights. `missing` says which.
pub(crate) fn no_model(folder: &Path, missing: &str) -> Error {
    match Listing::read(folder) {
        Ok(listing) => Error::file(folder, missing, listing.content(folder)),
        Err(error) => error,
    }
}

/// Whether a folder is an adapter to another model and not a model.
pub(crate) fn is_adapter(folder: &Path) -> bool {
    folder.join("adapter_config.json").is_file()
}

/// The names in a folder, sorted.
struct Listing {
    files: Vec<String>,
    folders: Vec<String>,
}

impl Listing {
    fn read(folder: &Path) -> Result<Self> {
        let (mut files, mut folders) = (vec![], vec![]);
        for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
            let Ok(entry) = entry else { continue };
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.path().is_dir() {
                folders.push(name);
            } else {
                files.push(name);
            }
        }
        files.sort();
        folders.sort();
        Ok(Self { files, folders })
    }

    fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file == name)
    }

    fn ending(&self, ending: &str) -> Vec<&str> {
        let files = self.files.iter().map(String::as_str);
        files.filter(|name| name.ends_with(ending)).collect()
    }

    /// What the folder is, and the next step.
    fn content(&self, folder: &Path) -> String {
        if self.has("adapter_config.json") {
            return adapter(folder);
        }
        if let Some(snapshot) = snapshot(folder) {
            return format!(
                "the root of a model in the Hugging Face cache; give the folder of one version, {}",
                snapshot.display()
            );
        }
        let mut readable = self.ending(".safetensors");
        for ending in [".bin", ".pt", ".pth"] {
            readable.extend(self.ending(ending));
        }
        let ggufs = self.ending(".gguf");
        if let (Some(first), []) = (ggufs.first(), readable.as_slice()) {
            let file = beside(folder, first);
            let parts = gguf_parts::names(first);
            return match (ggufs.len(), parts) {
                (1, _) => format!("a folder of one .gguf file; give the file, {file}"),
                (n, Some(parts)) if parts == ggufs => {
                    format!("a folder of one GGUF model in {n} parts; give the first, {file}")
                }
                _ => format!("a folder of .gguf files; give the file, {file}"),
            };
        }
        if let (Some(first), []) = (self.ending(".onnx").first(), readable.as_slice()) {
            return format!(
                "an ONNX model, {first}, which this program writes and does not read; give the \
                 folder that it was made from"
            );
        }
        let foreign = [".ckpt", ".h5", ".msgpack"];
        let foreign = foreign.iter().find_map(|e| self.ending(e).first().copied());
        if let (Some(name), []) = (foreign, readable.as_slice()) {
            return format!(
                "weights in a format that this program does not read, {name}; load them with \
                 transformers and write them with \
                 save_pretrained(FOLDER, safe_serialization=True)"
            );
        }
        if self.has("consolidated.safetensors") && !self.has("config.json") {
            return "consolidated.safetensors, the original layout of its publisher; give the \
                    folder in the layout of transformers, which has config.json"
                .into();
        }
        if let [first, ..] = readable.as_slice() {
            return format!(
                "{first} without it; put the model's config.json beside it, or give the file, {}",
                beside(folder, first)
            );
        }
        let inner = self.folders.iter().find(|name| {
            let inner = folder.join(name);
            inner.join("config.json").is_file()
        });
        if let Some(inner) = inner {
            return format!("a folder of folders; give {}", beside(folder, inner));
        }
        match self.files.as_slice() {
            [] if self.folders.is_empty() => "an empty folder".into(),
            [] => format!("folders alone: {}", some(&self.folders)),
            files => format!("none among {}", some(files)),
        }
    }
}

/// The first names of a list, for a message.
pub(crate) fn some(names: &[String]) -> String {
    let shown = names.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
    match names.len() {
        0..=4 => shown,
        n => format!("{shown} and {} more", n - 4),
    }
}

fn beside(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

/// An adapter in words, with the model that it belongs to.
fn adapter(folder: &Path) -> String {
    let path = folder.join("adapter_config.json");
    let config = fs::read(&path)
        .ok()
        .and_then(|bytes| python_json::parse(&path, &bytes).ok());
    let text = |key: &str| {
        let value = config.as_ref()?.get(key)?;
        value.as_str().map(str::to_string)
    };
    let kind = text("peft_type").unwrap_or_else(|| "peft".into());
    let base = match text("base_model_name_or_path") {
        Some(base) => format!("its base model '{base}'"),
        None => "its base model, which adapter_config.json does not name".into(),
    };
    format!(
        "a {kind} adapter (adapter_config.json); merge it into {base} first (peft: \
         merge_and_unload, then save_pretrained) and give that folder"
    )
}

/// The folder of the version that a root of the hub cache names, if the folder is one.
fn snapshot(root: &Path) -> Option<PathBuf> {
    let snapshots = root.join(SNAPSHOTS);
    if !snapshots.is_dir() || !(root.join("refs").is_dir() || root.join("blobs").is_dir()) {
        return None;
    }
    let named = fs::read_to_string(root.join("refs/main")).ok();
    if let Some(named) = named.map(|name| snapshots.join(name.trim()))
        && named.is_dir()
    {
        return Some(named);
    }
    let mut all: Vec<PathBuf> = fs::read_dir(&snapshots)
        .ok()?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .collect();
    all.sort();
    Some(all.pop().unwrap_or(snapshots))
}

/// The name of a model by its folder: the repository's where the folder is a snapshot of the
/// Hugging Face cache, else the folder's own.
pub(crate) fn model_name(folder: &Path) -> Option<String> {
    let folder = folder.canonicalize().ok()?;
    let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned());
    let repository = folder.parent().filter(|p| p.ends_with(SNAPSHOTS));
    let repository = repository.and_then(Path::parent).and_then(name);
    let repository = repository
        .as_deref()
        .and_then(|r| r.strip_prefix("models--"));
    match repository {
        Some(id) => Some(id.split_once("--").map_or(id, |(_, model)| model).into()),
        None => name(&folder),
    }
}
