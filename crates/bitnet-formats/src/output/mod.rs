//! Writes a file tensor by tensor: atomic, resumable, and with the same bytes after any number of
//! interruptions.
//!
//! Data goes into `TARGET.bitnet-partial` at known offsets. Tensors whose size depends on their
//! values (compressing layouts) follow behind the rest. After each unit of work a line goes into
//! `TARGET.bitnet-journal`. A later run of the same job finds both, checks the bytes of every
//! journaled tensor against its checksum and continues after the last good one. At the end the
//! header is written into the space kept for it and the file gets its name:
//! [`replace`](crate::replace) has the protocol.
//!
//! A set of shards is written in the same way, each of them beside its name, with one journal for
//! all of them, beside the name of the set. When all are complete, a last line in the journal says
//! so, and they get their names, the first shard last, since nothing opens a set without it:
//!
//! | step | under the names | the next run |
//! |---|---|---|
//! | some shards complete | old | resumes them |
//! | the journal says that all are | old | renames them |
//! | old first shard removed | old without its first | renames the others |
//! | all but the first renamed | new without its first | renames it |
//! | the first renamed | new | removes the journal |

mod files;
mod header;
mod journal;
mod plan;
mod shards;

pub use header::AUTO;
pub use plan::{FilePlan, OutputId, OutputTensor, OutputTensors};
pub use shards::{ShardSize, earlier_forms, shard_number, split_keys};

pub use crate::container::Container;
use crate::document::Checksum;
use crate::dtype::ggml_type_of;
use crate::replace::beside;
pub use crate::replace::{Existing, PARTIAL};
use crate::{Error, Result, document};
use bitnet_core::pack::{self, PackedLen};
use files::{Files, open_or_create};
use header::FileHeader;
use journal::{Found, JournalLine, Title, Written};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Ending of the journal beside it.
pub const JOURNAL: &str = "bitnet-journal";

/// A tensor that is being written.
#[derive(Debug)]
struct Open {
    offset: u64,
    len: u64,
    checksum: Checksum,
}

/// An unfinished file, or set of files.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    journal_path: PathBuf,
    files: Files,
    journal: File,
    /// Holds the lock on the journal.
    _lock: File,
    plan: FilePlan,
    /// Offsets of the tensors of known size, counted from the end of the header of their file.
    offsets: Vec<Option<u64>>,
    open: BTreeMap<OutputId, Open>,
    line: JournalLine,
    written: BTreeMap<OutputId, Written>,
    notes: Vec<serde_json::Value>,
    /// The files of the set replace others, in this run or in an earlier one that was killed.
    placing: bool,
}

impl Writer {
    /// Begins a file or a set of files, or resumes what an earlier run of the same job left.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written, [`Error::File`] if another process writes the
    /// same target, the header does not fit, or there are too many shards.
    pub fn open(target: &Path, mut plan: FilePlan) -> Result<Self> {
        let journal_path = beside(target, JOURNAL);
        let blank = "0".repeat(32);
        let names = plan.tensors.iter().map(|t| t.name.clone());
        plan.document.checksums = names.map(|name| (name, blank.clone())).collect();
        if let Some(index) = index_name(target, &plan) {
            plan.document.files.insert(index, blank.clone());
        }
        plan.document.digest = blank;
        plan.document.metadata =
            document::metadata_checksum(&plan.container).map_err(|source| Error::Gguf {
                path: target.to_path_buf(),
                source,
            })?;
        let (files, offsets) = Files::new(target, &plan)?;
        let lock = lock_journal(target, &journal_path)?;
        let journal = OpenOptions::new()
            .append(true)
            .open(&journal_path)
            .map_err(Error::io(&journal_path, "write"))?;
        let mut writer = Self {
            target: target.to_path_buf(),
            journal_path,
            files,
            journal,
            _lock: lock,
            plan,
            offsets,
            open: BTreeMap::new(),
            line: JournalLine::default(),
            written: BTreeMap::new(),
            notes: vec![],
            placing: false,
        };
        match writer.resume() {
            Ok(()) => Ok(writer),
            Err(error) => {
                writer.abandon();
                Err(error)
            }
        }
    }

    /// Keeps what the journal lists with the right checksum, and truncates the rest.
    fn resume(&mut self) -> Result<()> {
        let text = fs::read(&self.journal_path).map_err(Error::io(&self.journal_path, "read"))?;
        let found = Found::new(&text);
        let same_job = found
            .title
            .as_ref()
            .is_some_and(|t| t.job == self.plan.job && t.shards == self.files.shards.len());
        let mut good = 0;
        if same_job {
            self.placing = found.is_placing(&self.plan.job);
            if self.placing {
                self.files.find_placed();
            }
            good = found.title_len;
            for bytes in &found.lines {
                let Ok(line) = serde_json::from_slice::<JournalLine>(bytes) else {
                    break;
                };
                if !line.written.iter().all(|w| self.vouched(w)) {
                    break;
                }
                good += bytes.len();
                self.accept(line);
            }
        }
        if self.placing && self.written.len() < self.plan.tensors.len() {
            // Damaged since: the files that have their names cannot be written to.
            good = 0;
        }
        if good > 0 {
            return self
                .journal
                .set_len(good as u64)
                .map_err(Error::io(&self.journal_path, "write"));
        }
        if let Some(title) = found.title {
            self.files.remove_partial(title.shards);
        }
        self.begin()
    }

    /// Begins with nothing.
    fn begin(&mut self) -> Result<()> {
        self.written.clear();
        self.notes.clear();
        self.journal
            .set_len(0)
            .map_err(Error::io(&self.journal_path, "write"))?;
        self.files.restart()?;
        let title = serde_json::to_string(&Title {
            job: self.plan.job.clone(),
            shards: self.files.shards.len(),
        })
        .unwrap_or_default();
        writeln!(self.journal, "{title}").map_err(Error::io(&self.journal_path, "write"))
    }

    /// Whether the bytes of a journaled tensor are there and are the ones that were written.
    fn vouched(&mut self, written: &Written) -> bool {
        let Some(tensor) = self.plan.tensors.get(written.index.0) else {
            return false;
        };
        let place_fits = match self.offsets[written.index.0] {
            Some(offset) => {
                offset == written.offset && tensor.len == PackedLen::Exact(written.len as usize)
            }
            None => {
                written.offset == self.files.shard(written.index).tail
                    && written.len <= tensor.len.bound() as u64
            }
        };
        if !place_fits {
            return false;
        }
        let mut checksum = Checksum::default();
        let mut buffer = vec![0; (1 << 20).min(written.len as usize)];
        let mut done = 0;
        while done < written.len {
            let n = (written.len - done).min(buffer.len() as u64) as usize;
            let read = self
                .files
                .read(written.index, &mut buffer[..n], written.offset + done);
            if read.is_err() {
                return false;
            }
            checksum.update(&buffer[..n]);
            done += n as u64;
        }
        checksum.hex() == written.checksum
    }

    fn accept(&mut self, line: JournalLine) {
        for w in line.written {
            if self.offsets[w.index.0].is_none() {
                self.files.shard_mut(w.index).tail = w.offset + w.len;
            }
            self.written.insert(w.index, w);
        }
        for (name, layout) in line.layouts {
            if let Some(packed) = self.plan.document.tensors.get_mut(&name) {
                packed.layout = layout;
            }
        }
        if !line.placing {
            self.notes.push(line.note);
        }
    }

    /// Notes of the units that are done, in the order in which they were.
    pub fn notes(&self) -> &[serde_json::Value] {
        &self.notes
    }

    /// Whether a tensor is written.
    pub fn is_done(&self, id: OutputId) -> bool {
        self.written.contains_key(&id)
    }

    /// Appends bytes to a tensor, the first of them at its beginning.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses, e.g. because the disk is full; [`Error::Tensor`] for
    /// more bytes than the tensor has.
    pub fn append(&mut self, id: OutputId, bytes: &[u8]) -> Result<()> {
        let start = self.offsets[id.0].unwrap_or(self.files.shard(id).tail);
        let open = self.open.entry(id).or_insert_with(|| Open {
            offset: start,
            len: 0,
            checksum: Checksum::default(),
        });
        let bound = self.plan.tensors[id].len.bound() as u64;
        if open.len + bytes.len() as u64 > bound {
            let got = open.len + bytes.len() as u64;
            return Err(Error::tensor(
                &self.target,
                &self.plan.tensors[id].name,
                format!("at most {bound} bytes"),
                format!("{got}"),
            ));
        }
        open.checksum.update(bytes);
        let at = open.offset + open.len;
        open.len += bytes.len() as u64;
        self.files.write(id, bytes, at)
    }

    /// A tensor is complete.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a tensor of known size did not get all of its bytes.
    pub fn end(&mut self, id: OutputId) -> Result<()> {
        self.append(id, &[])?;
        let Some(open) = self.open.remove(&id) else {
            return Ok(());
        };
        let tensor = &self.plan.tensors[id];
        match tensor.len {
            PackedLen::Exact(n) if open.len != n as u64 => {
                return Err(Error::tensor(
                    &self.target,
                    &tensor.name,
                    format!("{n} bytes"),
                    format!("{}", open.len),
                ));
            }
            PackedLen::Exact(_) => {}
            PackedLen::AtMost(_) => self.files.shard_mut(id).tail = open.offset + open.len,
        }
        self.line.written.push(Written {
            index: id,
            offset: open.offset,
            len: open.len,
            checksum: open.checksum.hex(),
        });
        Ok(())
    }

    /// Records which layout `auto` picked for a tensor of the document.
    pub fn set_layout(&mut self, name: &str, layout: &str) {
        self.line.layouts.insert(name.into(), layout.into());
    }

    /// Ends a unit of work: everything since the last one will not be done again.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(&mut self, note: serde_json::Value) -> Result<()> {
        let mut line = std::mem::take(&mut self.line);
        line.note = note;
        self.write_line(&line)?;
        self.accept(line);
        Ok(())
    }

    fn write_line(&mut self, line: &JournalLine) -> Result<()> {
        let mut text = serde_json::to_string(line).unwrap_or_default();
        text.push('\n');
        self.journal
            .write_all(text.as_bytes())
            .map_err(Error::io(&self.journal_path, "write"))
    }

    /// Writes the headers and gives the files their names. Returns their size. Where that fails,
    /// nothing is left, unless files of an old set are gone already: then the same job resumes.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tensor`] if a tensor is missing.
    pub fn finish(mut self, existing: Existing) -> Result<u64> {
        let result = self.complete(existing);
        if result.is_err() && !self.placing {
            self.discard();
        }
        result
    }

    fn complete(&mut self, existing: Existing) -> Result<u64> {
        let (tensors, offsets) = self.finished()?;
        let index = self.index(&tensors);
        let document = self.document(&tensors, index.as_deref());
        let mut len = 0;
        for i in 0..self.files.shards.len() {
            let shard = &self.files.shards[i];
            let range = shard.tensors.clone();
            let header = FileHeader {
                path: &shard.path,
                container: &shard.container,
                document: (i == 0).then_some(&document),
                tensors: &tensors[range.clone()],
            };
            let header = header.encode(&offsets[range], shard.header_len)?;
            len += self.files.end(i, &header)?;
        }
        self.place(existing, index.as_deref())?;
        if existing == Existing::Replace && matches!(self.plan.container, Container::Gguf(_)) {
            let written: Vec<PathBuf> = self.files.shards.iter().map(|s| s.path.clone()).collect();
            for old in earlier_forms(&self.target, &written) {
                fs::remove_file(&old).map_err(Error::io(&old, "remove"))?;
            }
        }
        Ok(len)
    }

    /// Gives the files their names.
    fn place(&mut self, existing: Existing, index: Option<&[u8]>) -> Result<()> {
        let remove_journal = |path: &Path| fs::remove_file(path).map_err(Error::io(path, "remove"));
        if self.files.shards.len() == 1 {
            // The journal first: a kill between the two leaves a file to be written again, and
            // never a finished one with a journal beside it.
            remove_journal(&self.journal_path)?;
            return self.files.place(existing, index);
        }
        // The journal last: a kill between two renames leaves a set whose other names the next run
        // gives.
        let existing = if self.placing {
            Existing::Replace
        } else {
            self.write_line(&JournalLine {
                placing: true,
                ..JournalLine::default()
            })?;
            self.placing = existing == Existing::Replace;
            existing
        };
        self.journal
            .sync_all()
            .map_err(Error::io(&self.journal_path, "write"))?;
        self.files.place(existing, index)?;
        remove_journal(&self.journal_path)
    }

    /// The tensors with the sizes that they turned out to have, and their offsets.
    fn finished(&self) -> Result<(Vec<OutputTensor>, Vec<u64>)> {
        let (mut tensors, mut offsets) = (self.plan.tensors.to_vec(), vec![]);
        for (id, tensor) in self.plan.tensors.ids().zip(&mut tensors) {
            let Some(written) = self.written.get(&id) else {
                return Err(Error::tensor(
                    &self.target,
                    &tensor.name,
                    "a written tensor",
                    "none",
                ));
            };
            if matches!(tensor.len, PackedLen::AtMost(_)) {
                tensor.shape = vec![written.len as usize];
            }
            tensor.len = PackedLen::Exact(written.len as usize);
            offsets.push(written.offset);
        }
        Ok((tensors, offsets))
    }

    /// The index of a set of safetensors files.
    fn index(&self, tensors: &[OutputTensor]) -> Option<Vec<u8>> {
        index_name(&self.target, &self.plan)?;
        let files: Vec<(String, &[OutputTensor])> = self
            .files
            .shards
            .iter()
            .map(|s| (file_name(&s.path), &tensors[s.tensors.clone()]))
            .collect();
        Some(shards::index_json(&files))
    }

    /// The document with all checksums.
    fn document(&self, tensors: &[OutputTensor], index: Option<&[u8]>) -> document::Document {
        let mut document = self.plan.document.clone();
        for (id, written) in &self.written {
            let name = self.plan.tensors[*id].name.clone();
            document.checksums.insert(name, written.checksum.clone());
        }
        if let (Some(name), Some(index)) = (index_name(&self.target, &self.plan), index) {
            document.files.insert(name, document::checksum(index));
        }
        let shapes = tensors.iter();
        let shapes = shapes.map(|t| (t.name.as_str(), t.dtype.to_string(), &t.shape[..]));
        document.digest = document.compute_digest(shapes);
        document
    }

    /// Removes everything that was written.
    pub fn abandon(mut self) {
        self.discard();
    }

    fn discard(&mut self) {
        self.files.abandon();
        let _ = fs::remove_file(&self.journal_path);
    }
}

/// Whether an earlier run of the same job was killed while the files of its set got their names:
/// then those that are there are its own.
pub fn is_placing(target: &Path, plan: &FilePlan) -> bool {
    fs::read(beside(target, JOURNAL)).is_ok_and(|text| Found::new(&text).is_placing(&plan.job))
}

/// The name of the index, for a set of safetensors files.
fn index_name(target: &Path, plan: &FilePlan) -> Option<String> {
    let sharded = plan.shards().len() > 1 && matches!(plan.container, Container::Safetensors(_));
    sharded.then(|| file_name(&shards::index_path(target)))
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Locks the journal, and with it the target.
fn lock_journal(target: &Path, journal: &Path) -> Result<File> {
    let lock = open_or_create(journal)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(Error::file(
            target,
            "to be the only process that writes it",
            "another one at work",
        )),
        Err(TryLockError::Error(source)) => Err(Error::Io {
            path: journal.to_path_buf(),
            action: "lock",
            source,
        }),
    }
}

/// Whether a container can hold a layout.
pub fn stores(container: &Container, layout: &dyn pack::Layout) -> bool {
    match container {
        Container::Safetensors(_) => true,
        Container::Gguf(_) => ggml_type_of(layout).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::Document;
    use crate::dtype::StoredType;

    fn plan(job: &str) -> (FilePlan, OutputId) {
        let mut tensors = OutputTensors::default();
        let id = tensors.push(OutputTensor {
            name: "a".into(),
            shape: vec![4],
            dtype: StoredType::U8,
            len: PackedLen::Exact(4),
        });
        let plan = FilePlan {
            container: Container::Safetensors(vec![]),
            document: Document {
                version: document::VERSION,
                generator: "test".into(),
                recipe: serde_json::Value::Null,
                tensors: BTreeMap::new(),
                checksums: BTreeMap::new(),
                files: BTreeMap::new(),
                metadata: String::new(),
                digest: String::new(),
            },
            tensors,
            job: job.into(),
            shard_size: None,
        };
        (plan, id)
    }

    fn write(target: &Path, job: &str, byte: u8) -> Result<Writer> {
        let (plan, id) = plan(job);
        let mut writer = Writer::open(target, plan)?;
        writer.append(id, &[byte; 4])?;
        writer.end(id)?;
        writer.commit(serde_json::Value::Null)?;
        Ok(writer)
    }

    /// A kill after the link and before the removal: the partial file and the finished one are the
    /// same, and a new run must not write to the finished one.
    #[test]
    fn a_second_name_of_the_finished_file_is_not_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.safetensors");
        write(&target, "one", 1)
            .unwrap()
            .finish(Existing::Refuse)
            .unwrap();
        let whole = fs::read(&target).unwrap();
        for job in ["one", "two"] {
            fs::hard_link(&target, beside(&target, PARTIAL)).unwrap();
            // Killed once more, before it ends.
            let writer = write(&target, job, 2).unwrap();
            drop(writer);
            assert_eq!(fs::read(&target).unwrap(), whole, "{job}");
            let (plan, id) = plan(job);
            let writer = Writer::open(&target, plan).unwrap();
            assert!(writer.is_done(id));
            writer.abandon();
            assert_eq!(fs::read(&target).unwrap(), whole, "{job}");
        }
        write(&target, "two", 2)
            .unwrap()
            .finish(Existing::Replace)
            .unwrap();
        assert_ne!(fs::read(&target).unwrap(), whole);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
