//! Writing a file tensor by tensor: atomic, resumable, and with the same bytes however often it was
//! interrupted.
//!
//! Data goes into `TARGET.bitnet-partial` at offsets that are known beforehand; tensors whose size
//! depends on their values (compressing layouts) follow one another behind the rest. After each
//! unit of work a line goes into `TARGET.bitnet-journal`. A later run of the same job finds both,
//! checks the bytes of every journaled tensor against its checksum and goes on after the last good
//! one. At the end the header is written into the room kept for it and the file gets its name by a
//! rename.

use crate::document::{Checksum, Document};
use crate::dtype::StoredType;
use crate::gguf;
pub use crate::replace::{Existing, PARTIAL};
use crate::replace::{beside, create_partial, place_file};
use crate::{Error, Result, document, io, logical, safetensors};
use bitnet_core::pack::{self, PackedLen};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Ending of the journal beside it.
pub const JOURNAL: &str = "bitnet-journal";

/// The file to be written.
#[derive(Debug, Clone)]
pub enum Container {
    /// safetensors with this `__metadata__`, to which the document is added.
    Safetensors(Vec<(String, String)>),
    /// GGUF with these keys, to which the document is added.
    Gguf(Vec<(String, gguf::Value)>),
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct OutTensor {
    /// Its name in the file.
    pub name: String,
    /// Its shape; of a tensor with [`PackedLen::AtMost`] it is replaced by `[bytes]`.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: StoredType,
    /// Its size in bytes.
    pub len: PackedLen,
}

/// Everything that is known before the first byte is written.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The container and its own metadata.
    pub container: Container,
    /// The document, without checksums and digest.
    pub document: Document,
    /// The tensors, in the order in which the file lists them.
    pub tensors: Vec<OutTensor>,
    /// Anything that tells this job from another one: what was read, and how it is treated.
    pub job: String,
}

/// A finished tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Written {
    index: usize,
    offset: u64,
    len: u64,
    checksum: String,
}

/// A line of the journal: one unit of work.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Line {
    written: Vec<Written>,
    /// Layouts that were chosen while packing.
    layouts: BTreeMap<String, String>,
    /// What the caller wants back after a resume.
    note: serde_json::Value,
}

/// First line of the journal.
#[derive(Debug, Serialize, Deserialize)]
struct Title {
    job: String,
}

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
    layout: Layout,
    header_len: u64,
    /// Offsets of the tensors of known size, counted from the end of the header.
    offsets: Vec<Option<u64>>,
    /// Where the next tensor of unknown size goes, counted likewise.
    tail: u64,
    open: BTreeMap<usize, Open>,
    line: Line,
    written: BTreeMap<usize, Written>,
    notes: Vec<serde_json::Value>,
}

/// The document as the file holds it. Every checksum has 32 digits, so its length does not depend
/// on them.
fn document_json(document: &Document) -> String {
    // A document is plain data: serialising it cannot fail.
    serde_json::to_string(document).unwrap_or_default()
}

impl Writer {
    /// Begins a file, or goes on with one that an earlier run of the same job left.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written, [`Error::File`] if another process writes the
    /// same target or the header does not fit.
    pub fn open(target: &Path, mut layout: Layout) -> Result<Self> {
        let (partial, journal_path) = (beside(target, PARTIAL), beside(target, JOURNAL));
        let blank = "0".repeat(32);
        layout.document.checksums = layout
            .tensors
            .iter()
            .map(|t| (t.name.clone(), blank.clone()))
            .collect();
        layout.document.digest = blank;
        layout.document.metadata =
            document::metadata_checksum(&layout.container).map_err(|source| Error::Gguf {
                path: target.to_path_buf(),
                source,
            })?;
        let (header_len, offsets, tail) = place(target, &layout)?;
        let create = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(Error::io(path, "create"))
        };
        let lock = create(&journal_path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::file(
                    target,
                    "to be the only process that writes it",
                    "another one at work",
                ));
            }
            Err(TryLockError::Error(source)) => {
                return Err(Error::Io {
                    path: journal_path,
                    action: "lock",
                    source,
                });
            }
        }
        let file = match create(&partial) {
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
        let line = Line {
            written: vec![],
            layouts: BTreeMap::new(),
            note: serde_json::Value::Null,
        };
        let mut writer = Self {
            target: target.to_path_buf(),
            partial,
            journal_path,
            file,
            journal,
            _lock: lock,
            layout,
            header_len,
            offsets,
            tail,
            open: BTreeMap::new(),
            line,
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

    /// Takes over what the journal vouches for, and cuts off the rest.
    fn resume(&mut self) -> Result<()> {
        let text = fs::read(&self.journal_path).map_err(Error::io(&self.journal_path, "read"))?;
        let mut good = 0;
        let mut lines = text.split_inclusive(|&b| b == b'\n');
        let title: Option<Title> = lines
            .next()
            .and_then(|line| serde_json::from_slice(line).ok());
        if title.is_some_and(|title| title.job == self.layout.job) {
            good = text.iter().position(|&b| b == b'\n').map_or(0, |i| i + 1);
            for bytes in lines {
                let Ok(line) = serde_json::from_slice::<Line>(bytes) else {
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
                job: self.layout.job.clone(),
            })
            .unwrap_or_default();
            writeln!(self.journal, "{title}").map_err(Error::io(&self.journal_path, "write"))?;
        }
        Ok(())
    }

    /// Whether the bytes of a journaled tensor are there and are the ones that were written.
    fn vouched(&self, written: &Written) -> bool {
        let Some(tensor) = self.layout.tensors.get(written.index) else {
            return false;
        };
        let place_fits = match self.offsets[written.index] {
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

    fn accept(&mut self, line: Line) {
        for w in line.written {
            if self.offsets[w.index].is_none() {
                self.tail = w.offset + w.len;
            }
            self.written.insert(w.index, w);
        }
        for (name, layout) in line.layouts {
            if let Some(packed) = self.layout.document.tensors.get_mut(&name) {
                packed.layout = layout;
            }
        }
        self.notes.push(line.note);
    }

    /// Notes of the units that are done, in the order in which they were.
    pub fn notes(&self) -> &[serde_json::Value] {
        &self.notes
    }

    /// Whether tensor `index` is written.
    pub fn is_done(&self, index: usize) -> bool {
        self.written.contains_key(&index)
    }

    /// Appends bytes to tensor `index`, the first of them at its beginning.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses, e.g. because the disk is full; [`Error::Tensor`] for
    /// more bytes than the tensor has.
    pub fn append(&mut self, index: usize, bytes: &[u8]) -> Result<()> {
        let start = self.offsets[index].unwrap_or(self.tail);
        let open = self.open.entry(index).or_insert_with(|| Open {
            offset: start,
            len: 0,
            checksum: Checksum::default(),
        });
        let bound = self.layout.tensors[index].len.bound() as u64;
        if open.len + bytes.len() as u64 > bound {
            let got = open.len + bytes.len() as u64;
            return Err(Error::tensor(
                &self.target,
                &self.layout.tensors[index].name,
                format!("at most {bound} bytes"),
                format!("{got}"),
            ));
        }
        open.checksum.update(bytes);
        let at = self.header_len + open.offset + open.len;
        open.len += bytes.len() as u64;
        io::write_at(&self.file, bytes, at).map_err(Error::io(&self.partial, "write"))
    }

    /// Tensor `index` is complete.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a tensor of known size did not get all of its bytes.
    pub fn end(&mut self, index: usize) -> Result<()> {
        self.append(index, &[])?;
        let Some(open) = self.open.remove(&index) else {
            return Ok(());
        };
        let tensor = &self.layout.tensors[index];
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
            index,
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
        let empty = Line {
            written: vec![],
            layouts: BTreeMap::new(),
            note: serde_json::Value::Null,
        };
        let mut line = std::mem::replace(&mut self.line, empty);
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
        let mut document = self.layout.document.clone();
        let mut tensors = self.layout.tensors.clone();
        for (index, tensor) in tensors.iter_mut().enumerate() {
            let Some(written) = self.written.get(&index) else {
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
            document
                .checksums
                .insert(tensor.name.clone(), written.checksum.clone());
        }
        document.digest = document.compute_digest(
            tensors
                .iter()
                .map(|t| (t.name.as_str(), t.dtype.to_string(), &t.shape[..])),
        );
        let header = match &self.layout.container {
            Container::Safetensors(metadata) => {
                let offsets: Vec<u64> = (0..tensors.len())
                    .map(|i| self.written[&i].offset)
                    .collect();
                safetensors_header(
                    metadata,
                    &document,
                    &tensors,
                    &offsets,
                    Some(self.header_len as usize),
                )
                .map_err(|got| Error::file(&self.target, "a header that fits", got))?
            }
            Container::Gguf(metadata) => {
                gguf_header(&self.target, metadata, &document, &tensors)?.bytes
            }
        };
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

    /// Removes everything that was written.
    pub fn abandon(self) {
        let _ = fs::remove_file(&self.partial);
        let _ = fs::remove_file(&self.journal_path);
    }
}

/// Length of the header, offsets of the tensors of known size, and the end of those.
fn place(target: &Path, layout: &Layout) -> Result<(u64, Vec<Option<u64>>, u64)> {
    let tensors = &layout.tensors;
    match &layout.container {
        Container::Gguf(metadata) => {
            let header = gguf_header(target, metadata, &layout.document, tensors)?;
            Ok((
                header.bytes.len() as u64,
                header.offsets.iter().copied().map(Some).collect(),
                header.data_len,
            ))
        }
        Container::Safetensors(metadata) => {
            // Widest elements first, so that every tensor is aligned to its elements without a
            // hole.
            let mut order: Vec<usize> = (0..tensors.len())
                .filter(|&i| matches!(tensors[i].len, PackedLen::Exact(_)))
                .collect();
            let width = |dtype: StoredType| dtype.bytes(1).unwrap_or(1);
            order.sort_by_key(|&i| (std::cmp::Reverse(width(tensors[i].dtype)), i));
            let mut offsets = vec![None; tensors.len()];
            let mut tail = 0;
            for i in order {
                offsets[i] = Some(tail);
                tail += tensors[i].len.bound() as u64;
            }
            // The header can only become shorter: names and digests have fixed lengths, offsets and
            // sizes have upper bounds.
            let mut document = layout.document.clone();
            for packed in document.tensors.values_mut() {
                if packed.layout == AUTO {
                    packed.layout = pack::longest_own_name().into();
                }
            }
            let mut worst = tensors.clone();
            let mut end = tail;
            let bound = tail + tensors.iter().map(|t| t.len.bound() as u64).sum::<u64>();
            let mut worst_offsets = vec![];
            for (tensor, offset) in worst.iter_mut().zip(&offsets) {
                worst_offsets.push(offset.unwrap_or(bound));
                if offset.is_none() {
                    end += tensor.len.bound() as u64;
                    tensor.shape = vec![tensor.len.bound()];
                }
                tensor.len = PackedLen::Exact(tensor.len.bound());
            }
            let header = safetensors_header(metadata, &document, &worst, &worst_offsets, None)
                .map_err(|got| {
                    Error::file(
                        target,
                        format!("a header for {end} bytes of data that fits"),
                        got,
                    )
                })?;
            Ok((header.len() as u64, offsets, tail))
        }
    }
}

/// Name in the document until a layout is picked.
pub const AUTO: &str = "auto";

fn safetensors_header(
    metadata: &[(String, String)],
    document: &Document,
    tensors: &[OutTensor],
    offsets: &[u64],
    padded: Option<usize>,
) -> Result<Vec<u8>, String> {
    let mut metadata = metadata.to_vec();
    metadata.push((document::KEY.into(), document_json(document)));
    let mut entries = vec![];
    for (tensor, &offset) in tensors.iter().zip(offsets) {
        let StoredType::Plain(dtype) = tensor.dtype else {
            return Err(format!(
                "tensor '{}' of type {}, which safetensors does not have",
                tensor.name, tensor.dtype
            ));
        };
        entries.push(safetensors::OutEntry {
            name: tensor.name.clone(),
            dtype,
            shape: tensor.shape.clone(),
            range: (offset, offset + tensor.len.bound() as u64),
        });
    }
    safetensors::encode_header(&metadata, &entries, padded)
}

fn gguf_header(
    target: &Path,
    metadata: &[(String, gguf::Value)],
    document: &Document,
    tensors: &[OutTensor],
) -> Result<gguf::EncodedHeader> {
    let mut metadata = metadata.to_vec();
    metadata.push((
        document::KEY.into(),
        gguf::Value::from(document_json(document)),
    ));
    let tensors: Vec<gguf::OutTensor> = tensors
        .iter()
        .map(|t| match (t.dtype.to_ggml(), t.len) {
            (Some(ggml_type), PackedLen::Exact(len)) => Ok(gguf::OutTensor {
                name: t.name.clone(),
                shape: t.shape.clone(),
                ggml_type,
                len: len as u64,
            }),
            _ => Err(Error::tensor(
                target,
                &t.name,
                "a type of known size that GGUF has",
                t.dtype.to_string(),
            )),
        })
        .collect::<Result<_>>()?;
    let alignment = metadata
        .iter()
        .find(|(k, _)| k == gguf::ALIGNMENT_KEY)
        .and_then(|(_, v)| v.as_u64());
    let alignment = alignment
        .and_then(|a| u32::try_from(a).ok())
        .unwrap_or(gguf::DEFAULT_ALIGNMENT);
    gguf::encode_header(&metadata, &tensors, alignment).map_err(|source| Error::Gguf {
        path: target.to_path_buf(),
        source,
    })
}

/// Whether a container can hold a layout.
pub fn stores(container: &Container, layout: &dyn pack::Layout) -> bool {
    match container {
        Container::Safetensors(_) => true,
        Container::Gguf(_) => logical::ggml_type_of(layout).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(job: &str, byte: u8) -> (Layout, [u8; 4]) {
        let layout = Layout {
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
            tensors: vec![OutTensor {
                name: "a".into(),
                shape: vec![4],
                dtype: StoredType::U8,
                len: PackedLen::Exact(4),
            }],
            job: job.into(),
        };
        (layout, [byte; 4])
    }

    fn write(target: &Path, job: &str, byte: u8) -> Result<Writer> {
        let (layout, bytes) = layout(job, byte);
        let mut writer = Writer::open(target, layout)?;
        writer.append(0, &bytes)?;
        writer.end(0)?;
        writer.commit(serde_json::Value::Null)?;
        Ok(writer)
    }

    /// A kill after the link and before the removal: the partial file and the finished one are the
    /// same, and what is written next must not reach the finished one.
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
            let writer = Writer::open(&target, layout(job, 2).0).unwrap();
            assert!(writer.is_done(0));
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
