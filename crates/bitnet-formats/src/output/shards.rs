//! The files of an output: one, or the shards of a set. Which tensors each of them holds, their
//! names, and what each says of the set.
//!
//! | container | a set named `NAME` | says which file holds a tensor |
//! |---|---|---|
//! | safetensors | `NAME-00001-of-00003.safetensors` … | `NAME.safetensors.index.json` |
//! | GGUF | `NAME-00001-of-00003.gguf` … | `split.no`, `split.count`, `split.tensors.count` in each |
//!
//! The first shard carries the document of the whole set.

use super::plan::{FilePlan, OutputTensor};
use crate::container::{Container, gguf_alignment};
use crate::gguf::{self, GgufHeader};
use crate::{Error, Result, document};
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::BufReader;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Most shards: names have five digits, `split.count` has 16 bits.
const MAX_SHARDS: usize = 65535;

/// The most bytes of tensors in one file of a set. A tensor that is larger has a file of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardSize(u64);

impl ShardSize {
    /// A number of bytes.
    ///
    /// # Errors
    /// A sentence for 0.
    pub fn from_bytes(bytes: u64) -> Result<Self, String> {
        match bytes {
            0 => Err("expected more than 0 bytes".into()),
            n => Ok(Self(n)),
        }
    }

    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

/// Units and their bytes; the first letter alone is a decimal unit too, as in gguf-split.
const UNITS: [(&str, u64); 9] = [
    ("b", 1),
    ("kb", 1000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

impl FromStr for ShardSize {
    type Err = String;

    /// A number and a unit: `5GB`, `500MB`, `1.5GiB`.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, unit) = text.split_at(end.unwrap_or(text.len()));
        let unit = unit.trim().to_lowercase();
        let bytes = UNITS
            .iter()
            .find(|(name, _)| {
                *name == unit || (*name != "b" && name.strip_suffix('b') == Some(&unit))
            })
            .map(|(_, bytes)| *bytes);
        let number: Option<f64> = number.parse().ok();
        let (Some(number), Some(bytes)) = (number, bytes) else {
            let hint = match (number, unit.is_empty()) {
                (Some(_), true) => format!("; {text}GB, or {text}B for bytes?"),
                _ => String::new(),
            };
            return Err(format!(
                "expected a number and a unit, such as 5GB, 500MB or 2GiB (B, KB, MB, GB, TB, KiB, \
                 MiB, GiB, TiB){hint}"
            ));
        };
        // A float holds whole numbers up to 2^53, and a cast saturates.
        Self::from_bytes((number * bytes as f64) as u64)
    }
}

impl fmt::Display for ShardSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.0)
    }
}

/// The name of shard `index`, from 0, of `count`: `target` itself where there is one only.
pub(super) fn shard_path(target: &Path, index: usize, count: usize) -> PathBuf {
    if count == 1 {
        return target.to_path_buf();
    }
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let (stem, ending) = split_name(&name);
    target.with_file_name(format!("{stem}-{:05}-of-{count:05}{ending}", index + 1))
}

/// Stem and ending of a file's name; `.gguf` for a name without one.
fn split_name(name: &str) -> (&str, &str) {
    [".safetensors", ".gguf"]
        .into_iter()
        .find_map(|ending| Some((name.strip_suffix(ending)?, ending)))
        .unwrap_or((name, ".gguf"))
}

/// Stem, number from 1, and count, where a name without its ending is that of a shard.
fn parse_shard(stem: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (stem, index) = rest.rsplit_once('-')?;
    let number = |digits: &str| {
        (digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()))
            .then(|| digits.parse().ok())
            .flatten()
    };
    let (index, count): (usize, usize) = (number(index)?, number(count)?);
    (index >= 1 && index <= count).then_some((stem, index, count))
}

/// Number, from 1, and count, where a file's name is that of a shard.
pub fn shard_number(path: &Path) -> Option<(usize, usize)> {
    let name = path.file_name()?.to_string_lossy();
    let (_, index, count) = parse_shard(split_name(&name).0)?;
    Some((index, count))
}

/// The index of a set of safetensors files.
pub(super) fn index_path(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_os_string();
    name.push(".index.json");
    name.into()
}

impl FilePlan {
    /// The tensors of each file. Those of one matrix stay together.
    pub(super) fn shards(&self) -> Vec<Range<usize>> {
        let all = 0..self.tensors.len();
        let Some(limit) = self.shard_size else {
            return vec![all];
        };
        let mut behind = std::collections::BTreeSet::new();
        for packed in self.document.tensors.values() {
            behind.extend(packed.scale.as_deref());
            behind.extend(packed.zero_point.as_deref());
        }
        let size = |tensor: &OutputTensor| {
            let len = tensor.len.bound() as u64;
            match &self.container {
                Container::Safetensors(_) => len,
                Container::Gguf(metadata) => {
                    len.next_multiple_of(gguf_alignment(metadata).max(1).into())
                }
            }
        };
        let mut shards = vec![];
        let (mut start, mut bytes, mut at) = (0, 0u64, 0);
        while at < all.end {
            let group = self
                .tensors
                .range(at + 1..all.end)
                .iter()
                .take_while(|t| behind.contains(t.name.as_str()))
                .count()
                + 1;
            let len: u64 = self.tensors.range(at..at + group).iter().map(size).sum();
            if at > start && bytes.saturating_add(len) > limit.bytes() {
                shards.push(start..at);
                (start, bytes) = (at, 0);
            }
            bytes = bytes.saturating_add(len);
            at += group;
        }
        shards.push(start..all.end);
        shards
    }

    /// The files that are written for a target: itself, or its shards, and for safetensors their
    /// index.
    pub fn files(&self, target: &Path) -> Vec<PathBuf> {
        let count = self.shards().len();
        let mut files: Vec<PathBuf> = (0..count).map(|i| shard_path(target, i, count)).collect();
        if count > 1 && matches!(self.container, Container::Safetensors(_)) {
            files.push(index_path(target));
        }
        files
    }

    /// Checks that the shards of a target can be named and counted.
    ///
    /// # Errors
    /// [`Error::File`] for more of them than a set can have, and for a target that is named as one
    /// of them.
    pub fn check_shards(&self, target: &Path) -> Result<()> {
        let count = self.shards().len();
        if count > MAX_SHARDS {
            return Err(Error::file(
                target,
                format!("at most {MAX_SHARDS} files in a set"),
                format!("{count} of them; give a larger --shard-size"),
            ));
        }
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let (stem, ending) = split_name(&name);
        match parse_shard(stem) {
            Some((stem, ..)) if count > 1 => Err(Error::file(
                target,
                format!("the name of a whole set, such as {stem}{ending}"),
                "the name of one of its files",
            )),
            _ => Ok(()),
        }
    }

    /// The container's metadata in file `index` of `count`.
    pub(super) fn metadata_of(&self, index: usize, count: usize) -> Container {
        match &self.container {
            Container::Gguf(metadata) if count > 1 => {
                let mut keys = if index == 0 { metadata.clone() } else { vec![] };
                keys.extend(split_keys(index, count, self.tensors.len()));
                Container::Gguf(keys)
            }
            whole => whole.clone(),
        }
    }
}

/// The keys of file `index`, from 0, of a GGUF set: u16, u16 and i32, as gguf-split writes them.
pub fn split_keys(index: usize, count: usize, tensors: usize) -> [(String, gguf::Value); 3] {
    // `check_shards` holds the numbers to the types' ranges; tensors are fewer than 2^31.
    [
        (gguf::SPLIT_NO.into(), gguf::Value::U16(index as u16)),
        (gguf::SPLIT_COUNT.into(), gguf::Value::U16(count as u16)),
        (gguf::SPLIT_TENSORS.into(), gguf::Value::I32(tensors as i32)),
    ]
}

/// The index of a set: for each tensor its file, as transformers and huggingface_hub write it.
pub(super) fn index_json(files: &[(String, &[OutputTensor])]) -> Vec<u8> {
    let mut map = BTreeMap::new();
    let mut total = 0;
    for (file, tensors) in files {
        for tensor in *tensors {
            total += tensor.len.bound() as u64;
            map.insert(tensor.name.as_str(), file.as_str());
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let mut text = serde_json::to_string_pretty(&index).unwrap_or_default();
    text.push('\n');
    text.into_bytes()
}

/// GGUF files of this program that hold an earlier output of the same name in another form: the
/// file `target`, or its sets of other counts. Each set from its last file to its first: a set that
/// lost its last file is not opened, and what is left of it is still known by its first.
pub fn earlier_forms(target: &Path, written: &[PathBuf]) -> Vec<PathBuf> {
    let mut forms = vec![];
    let target = target.components().as_path();
    if !written.iter().any(|w| w == target) && has_document(target) {
        forms.push(target.to_path_buf());
    }
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let stem = split_name(&name).0;
    let mut sets: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if let Some((of, index, count)) = name.strip_suffix(".gguf").and_then(parse_shard)
            && of == stem
        {
            sets.entry(count).or_default().push(index - 1);
        }
    }
    for (count, mut indexes) in sets {
        let path = |index: &usize| shard_path(target, *index, count);
        if count == 1 || written.contains(&path(&0)) || !has_document(&path(&0)) {
            continue;
        }
        indexes.sort_unstable();
        forms.extend(indexes.iter().rev().map(path));
    }
    forms
}

/// Whether a file is a GGUF that this program wrote.
fn has_document(path: &Path) -> bool {
    let Ok(file) = File::open(path) else {
        return false;
    };
    let len = file.metadata().map_or(0, |m| m.len());
    GgufHeader::read(BufReader::new(file), len)
        .is_ok_and(|header| header.metadata.iter().any(|(key, _)| key == document::KEY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("5GB", 5_000_000_000),
            ("500MB", 500_000_000),
            ("2GiB", 2 << 30),
            ("1.5gb", 1_500_000_000),
            ("300 KiB", 300 << 10),
            ("4096B", 4096),
            ("2G", 2_000_000_000),
            ("7m", 7_000_000),
        ] {
            assert_eq!(
                text.parse::<ShardSize>().map(ShardSize::bytes),
                Ok(bytes),
                "{text}"
            );
        }
        for text in [
            "", "5", "GB", "5GX", "-5GB", "5 G B", "1.2.3GB", "0GB", "0.1B", "NaN", "5GBB", "1e3MB",
        ] {
            let error = text.parse::<ShardSize>().unwrap_err();
            assert!(error.starts_with("expected"), "{text}: {error}");
        }
        assert!("5".parse::<ShardSize>().unwrap_err().contains("5GB"));
    }

    #[test]
    fn names() {
        let path = Path::new("a/model.safetensors");
        assert_eq!(shard_path(path, 0, 1), path);
        assert_eq!(
            shard_path(path, 1, 3),
            Path::new("a/model-00002-of-00003.safetensors")
        );
        assert_eq!(
            index_path(path),
            Path::new("a/model.safetensors.index.json")
        );
        assert_eq!(
            shard_path(Path::new("q.gguf"), 0, 2),
            Path::new("q-00001-of-00002.gguf")
        );
        assert_eq!(
            shard_number(Path::new("a/m-x-00002-of-00003.gguf")),
            Some((2, 3))
        );
        for name in [
            "m-0002-of-00003.gguf",
            "m-00004-of-00003.gguf",
            "m-00000-of-00003.gguf",
            "m.gguf",
            "m-+0001-of-00003.gguf",
        ] {
            assert_eq!(shard_number(Path::new(name)), None, "{name}");
        }
    }
}
