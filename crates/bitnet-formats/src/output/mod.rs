//! Writes a file tensor by tensor: atomic, resumable, and with the same bytes after any number of
//! interruptions.
//!
//! Data goes into `TARGET.bitnet-partial` at known offsets. Tensors whose size depends on their
//! values (compressing layouts) follow behind the rest. After each unit of work a line goes into
//! `TARGET.bitnet-journal`. A later run of the same job finds both, checks the bytes of every
//! journaled tensor against its checksum and continues after the last good one. At the end the
//! header is written into the space kept for it and the file gets its name:
//! [`replace`](crate::replace) has the protocol.

mod header;
mod journal;
mod plan;

pub use header::AUTO;
pub use plan::{FilePlan, OutputId, OutputTensor, OutputTensors};

pub use crate::container::Container;
use crate::document::Checksum;
use crate::dtype::ggml_type_of;
pub use crate::replace::{Existing, PARTIAL};
use crate::replace::{beside, create_partial, place_file};
use crate::{Error, Result, document, io};
use bitnet_core::pack::{self, PackedLen};
use header::{gguf_header, place, safetensors_header};
use journal::{JournalLine, Title, Written};
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

/// An unfinished file.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    partial: PathBuf,
    journal_path: PathBuf,
    file: File,
    journal: File,
    /// Holds the lock on the journal.
    _lock: File,
    plan: FilePlan,
    header_len: u64,
    /// Offsets of the tensors of known size, counted from the end of the header.
    offsets: Vec<Option<u64>>,
    /// Where the next tensor of unknown size goes, counted likewise.
    tail: u64,
    open: BTreeMap<OutputId, Open>,
    line: JournalLine,
    written: BTreeMap<OutputId, Written>,
    notes: Vec<serde_json::Value>,
}

impl Writer {
    /// Begins a file, or resumes one that an earlier run of the same job left.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written, [`Error::File`] if another process writes the
    /// same target or the header does not fit.
    pub fn open(target: &Path, mut plan: FilePlan) -> Result<Self> {
        let (partial, journal_path) = (beside(target, PARTIAL), beside(target, JOURNAL));
        fill_in(target, &mut plan)?;
        let (header_len, offsets, tail) = place(target, &plan)?;
        let lock = lock_journal(target, &journal_path)?;
        let file = match open_or_create(&partial) {
            Ok(file) => file,
            Err(error) => {
                let _ = fs::remove_file(&journal_path);
                return Err(error);
            }
        };
        let journal = OpenOptions::new()
            .append(true)
            .open(&journal_path)
            .map_err(Error::io(&journal_path, "write"))?;
        let mut writer = Self {
            target: target.to_path_buf(),
            partial,
            journal_path,
            file,
            journal,
            _lock: lock,
            plan,
            header_len,
            offsets,
            tail,
            open: BTreeMap::new(),
            line: JournalLine::default(),
            written: BTreeMap::new(),
            notes: vec![],
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
        let mut good = 0;
        let mut lines = text.split_inclusive(|&b| b == b'\n');
        let title: Option<Title> = lines
            .next()
            .and_then(|line| serde_json::from_slice(line).ok());
        if title.is_some_and(|title| title.job == self.plan.job) {
            good = text.iter().position(|&b| b == b'\n').map_or(0, |i| i + 1);
            for bytes in lines {
                let Ok(line) = serde_json::from_slice::<JournalLine>(bytes) else {
                    break;
                };
                if bytes.last() != Some(&b'\n') || !line.written.iter().all(|w| self.vouched(w)) {
                    break;
                }
                good += bytes.len();
                self.accept(line);
            }
        }
        self.journal
            .set_len(good as u64)
            .map_err(Error::io(&self.journal_path, "write"))?;
        if good == 0 {
            self.file = create_partial(&self.partial)?;
            let title = serde_json::to_string(&Title {
                job: self.plan.job.clone(),
            })
            .unwrap_or_default();
            writeln!(self.journal, "{title}").map_err(Error::io(&self.journal_path, "write"))?;
        }
        Ok(())
    }

    /// Whether the bytes of a journaled tensor are there and are the ones that were written.
    fn vouched(&self, written: &Written) -> bool {
        let Some(tensor) = self.plan.tensors.get(written.index.0) else {
            return false;
        };
        let place_fits = match self.offsets[written.index.0] {
            Some(offset) => {
                offset == written.offset && tensor.len == PackedLen::Exact(written.len as usize)
            }
            None => written.offset == self.tail && written.len <= tensor.len.bound() as u64,
        };
        let mut checksum = Checksum::default();
        let mut buffer = vec![0; (1 << 20).min(written.len as usize)];
        let mut done = 0;
        while place_fits && done < written.len {
            let n = (written.len - done).min(buffer.len() as u64);
            if io::read_at(
                &self.file,
                &mut buffer[..n as usize],
                self.header_len + written.offset + done,
            )
            .is_err()
            {
                return false;
            }
            checksum.update(&buffer[..n as usize]);
            done += n;
        }
        place_fits && checksum.hex() == written.checksum
    }

    fn accept(&mut self, line: JournalLine) {
        for w in line.written {
            if self.offsets[w.index.0].is_none() {
                self.tail = w.offset + w.len;
            }
            self.written.insert(w.index, w);
        }
        for (name, layout) in line.layouts {
            if let Some(packed) = self.plan.document.tensors.get_mut(&name) {
                packed.layout = layout;
            }
        }
        self.notes.push(line.note);
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
        let start = self.offsets[id.0].unwrap_or(self.tail);
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
        let at = self.header_len + open.offset + open.len;
        open.len += bytes.len() as u64;
        io::write_at(&self.file, bytes, at).map_err(Error::io(&self.partial, "write"))
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
            PackedLen::AtMost(_) => self.tail = open.offset + open.len,
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
        let mut text = serde_json::to_string(&line).unwrap_or_default();
        text.push('\n');
        self.journal
            .write_all(text.as_bytes())
            .map_err(Error::io(&self.journal_path, "write"))?;
        self.accept(line);
        Ok(())
    }

    /// Writes the header and gives the file its name. Returns the size of the file. Where that
    /// fails, nothing is left.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tensor`] if a tensor is missing.
    pub fn finish(mut self, existing: Existing) -> Result<u64> {
        let result = self.complete(existing);
        if result.is_err() {
            self.abandon();
        }
        result
    }

    fn complete(&mut self, existing: Existing) -> Result<u64> {
        let header = self.header()?;
        if header.len() as u64 != self.header_len {
            return Err(Error::file(
                &self.target,
                format!("a header of {} bytes", self.header_len),
                format!("{}", header.len()),
            ));
        }
        io::write_at(&self.file, &header, 0).map_err(Error::io(&self.partial, "write"))?;
        let len = self.header_len + self.tail;
        self.file
            .set_len(len)
            .map_err(Error::io(&self.partial, "write"))?;
        self.file
            .sync_all()
            .map_err(Error::io(&self.partial, "write"))?;
        self.journal
            .flush()
            .map_err(Error::io(&self.journal_path, "write"))?;
        // The journal first: a kill between the two leaves a file to be written again, and never a
        // finished one with a journal beside it.
        fs::remove_file(&self.journal_path).map_err(Error::io(&self.journal_path, "remove"))?;
        place_file(&self.partial, &self.target, existing)?;
        Ok(len)
    }

    /// The header with sizes and checksums of the written tensors.
    fn header(&self) -> Result<Vec<u8>> {
        let mut document = self.plan.document.clone();
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
            let checksum = written.checksum.clone();
            document.checksums.insert(tensor.name.clone(), checksum);
        }
        let shapes = tensors.iter();
        let shapes = shapes.map(|t| (t.name.as_str(), t.dtype.to_string(), &t.shape[..]));
        document.digest = document.compute_digest(shapes);
        match &self.plan.container {
            Container::Safetensors(metadata) => {
                let padded = Some(self.header_len as usize);
                safetensors_header(metadata, &document, &tensors, &offsets, padded)
                    .map_err(|got| Error::file(&self.target, "a header that fits", got))
            }
            Container::Gguf(metadata) => {
                Ok(gguf_header(&self.target, metadata, &document, &tensors)?.bytes)
            }
        }
    }

    /// Removes everything that was written.
    pub fn abandon(self) {
        let _ = fs::remove_file(&self.partial);
        let _ = fs::remove_file(&self.journal_path);
    }
}

/// Gives the document checksums of the right length, which the tensors will have.
fn fill_in(target: &Path, plan: &mut FilePlan) -> Result<()> {
    let blank = "0".repeat(32);
    let names = plan.tensors.iter().map(|t| t.name.clone());
    plan.document.checksums = names.map(|name| (name, blank.clone())).collect();
    plan.document.digest = blank;
    plan.document.metadata =
        document::metadata_checksum(&plan.container).map_err(|source| Error::Gguf {
            path: target.to_path_buf(),
            source,
        })?;
    Ok(())
}

/// Where the tensors of known size will lie in the file: offset from its beginning, and length.
///
/// # Errors
/// As [`Writer::open`].
pub fn regions(target: &Path, plan: &FilePlan) -> Result<BTreeMap<String, (u64, u64)>> {
    let mut plan = plan.clone();
    fill_in(target, &mut plan)?;
    let (header_len, offsets, _) = place(target, &plan)?;
    let tensors = plan.tensors.iter().zip(offsets);
    Ok(tensors
        .filter_map(|(tensor, offset)| {
            let region = (header_len + offset?, tensor.len.bound() as u64);
            Some((tensor.name.clone(), region))
        })
        .collect())
}

fn open_or_create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(Error::io(path, "create"))
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
