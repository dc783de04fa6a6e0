//! The files of a checkpoint and the tensors stored in them.
//!
//! Opening reads and checks headers only, and the codes of GGUF types that may or may not be ternary
//! (`grouping`). Tensors are read by position: memory holds only the bytes
//! that a caller reads, threads can read at the same time, and a file that is truncated meanwhile
//! is an error and not a signal.

use crate::arch::Architecture;
use crate::container::Container;
use crate::document::{self, Checksum, Document, PackedTensor};
use crate::dtype::{StoredType, ggml_type_of_origin};
use crate::foreign::{Foreign, Loaded};
use crate::gguf;
use crate::hf::BitnetConfig;
use crate::hints;
use crate::output;
use crate::prefixes;
use crate::pytorch;
use crate::resolve::{self, Weights};
use crate::safetensors::SafetensorsHeader;
use crate::tensor::{Access, FileId, StoredId, StoredTensor};
use crate::{Error, Result};
use bitnet_core::pack;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

/// The kind of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One file of tensors without a config: safetensors or PyTorch.
    File,
    /// A folder with config.json and one or more safetensors files.
    Folder,
    /// A `.gguf` file.
    Gguf,
}

/// One file of the checkpoint.
#[derive(Debug)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes when it was opened.
    pub len: u64,
    /// Time of its last change, if the system has one.
    pub modified: Option<SystemTime>,
    file: File,
}

/// What a file may leave open.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Layout of I2_S tensors that another program wrote: `i2_s`, `i2_s-g64` or `i2_s-x4`. One type
    /// id stands for all three.
    pub i2s_layout: String,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            i2s_layout: "i2_s".into(),
        }
    }
}

/// An open checkpoint: files, stored tensors, config and metadata.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) path: PathBuf,
    pub(crate) kind: Kind,
    pub(crate) files: Vec<SourceFile>,
    /// In the order of files and bytes.
    pub(crate) stored: Vec<StoredTensor>,
    pub(crate) config: Option<Value>,
    pub(crate) metadata: Vec<(String, String)>,
    pub(crate) gguf: Vec<(String, gguf::Value)>,
    pub(crate) document: Option<Document>,
    pub(crate) bitnet: Option<BitnetConfig>,
    /// What was assumed or ignored, each a sentence for a person.
    pub(crate) notes: Vec<String>,
    /// Matrices that another program quantized, by the stored tensor that stands for each.
    pub(crate) foreign: BTreeMap<StoredId, Foreign>,
    /// Scales and codes of the one that was read last.
    pub(crate) loaded: Mutex<Option<(StoredId, Arc<Loaded>)>>,
    names: HashMap<String, StoredId>,
}

impl Storage {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(hints::open_error(path, "open"))?;
        let mut storage = Self {
            path: path.to_path_buf(),
            kind: Kind::Folder,
            files: vec![],
            stored: vec![],
            config: None,
            metadata: vec![],
            gguf: vec![],
            document: None,
            bitnet: None,
            notes: vec![],
            foreign: BTreeMap::new(),
            loaded: Mutex::default(),
            names: HashMap::new(),
        };
        if meta.is_dir() {
            storage.open_folder(path)?;
        } else {
            storage.open_file(path)?;
        }
        storage.read_document()?;
        storage.check_lone_shard()?;
        storage.forget_rewritten();
        storage.unwrap_names();
        storage.group_foreign()?;
        Ok(storage)
    }

    fn open_file(&mut self, path: &Path) -> Result<()> {
        let file_id = self.add_file(path)?;
        let file = &self.files[file_id.0];
        let mut magic = [0; 4];
        if file.len >= 4 {
            crate::io::read_at(&file.file, &mut magic, 0).map_err(Error::io(path, "read"))?;
        }
        if &magic == gguf::MAGIC || path.extension().is_some_and(|e| e == "gguf") {
            self.kind = Kind::Gguf;
            self.open_gguf(file_id)
        } else {
            self.kind = Kind::File;
            self.metadata = self.add_tensors(file_id, &|_| true)?;
            Ok(())
        }
    }

    pub(crate) fn add_file(&mut self, path: &Path) -> Result<FileId> {
        let file = File::open(path).map_err(hints::open_error(path, "open"))?;
        let meta = file.metadata().map_err(Error::io(path, "open"))?;
        if !meta.is_file() {
            return Err(Error::file(path, "a regular file", "something else"));
        }
        self.files.push(SourceFile {
            path: path.to_path_buf(),
            len: meta.len(),
            modified: meta.modified().ok(),
            file,
        });
        Ok(FileId(self.files.len() - 1))
    }

    /// The tensors of a safetensors or PyTorch file that `only` takes; its metadata.
    fn add_tensors(
        &mut self,
        file_id: FileId,
        only: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<(String, String)>> {
        let file = &self.files[file_id.0];
        let (metadata, tensors) = if pytorch::is_pytorch(&file.path, &file.file)? {
            let header = pytorch::PytorchHeader::read(&file.path, &file.file)?;
            self.notes.extend(header.notes);
            (vec![], header.tensors)
        } else {
            let header = self.safetensors_header(file_id)?;
            let tensors = header.tensors.into_iter().map(|t| (t, Access::AsRead));
            (header.metadata, tensors.collect())
        };
        let path = &self.files[file_id.0].path;
        for (t, access) in tensors.into_iter().filter(|(t, _)| only(&t.name)) {
            if self.names.contains_key(&t.name) {
                let expected = "a tensor that no other shard has";
                return Err(Error::tensor(path, &t.name, expected, "one"));
            }
            self.names
                .insert(t.name.clone(), StoredId(self.stored.len()));
            self.stored.push(StoredTensor {
                name: t.name,
                shape: t.shape,
                dtype: StoredType::Plain(t.dtype),
                file: file_id,
                offset: t.offset,
                len: t.len,
                access,
            });
        }
        Ok(metadata)
    }

    fn safetensors_header(&self, file_id: FileId) -> Result<SafetensorsHeader> {
        let file = &self.files[file_id.0];
        SafetensorsHeader::read(&file.path, &file.file, file.len).map_err(|error| {
            let content = hints::content_at(&file.path);
            content.map_or(error, |got| {
                Error::file(&file.path, "a safetensors file", got)
            })
        })
    }

    pub(crate) fn gguf_header(&self, file_id: FileId) -> Result<gguf::GgufHeader> {
        let file = &self.files[file_id.0];
        gguf::GgufHeader::read(&file.file, file.len).map_err(|source| {
            match hints::content_at(&file.path) {
                Some(got) => Error::file(&file.path, "a GGUF file", got),
                None => Error::Gguf {
                    path: file.path.clone(),
                    source,
                },
            }
        })
    }

    /// The tensors of a GGUF file.
    ///
    /// # Errors
    /// [`Error::Tensor`] for one that an earlier file has.
    pub(crate) fn add_gguf(&mut self, file_id: FileId, header: gguf::GgufHeader) -> Result<()> {
        for t in header.tensors {
            if let Some(earlier) = self.find_stored(&t.name) {
                let earlier = self.file_of(earlier).display();
                let got = format!("one that {earlier} has too");
                let path = &self.files[file_id.0].path;
                return Err(Error::tensor(path, &t.name, "a tensor of one part", got));
            }
            self.add_stored(StoredTensor {
                name: t.name,
                shape: t.shape,
                dtype: StoredType::from_ggml(t.ggml_type),
                file: file_id,
                offset: t.offset,
                len: t.len,
                access: match header.byte_order {
                    gguf::ByteOrder::Little => Access::AsRead,
                    gguf::ByteOrder::Big => Access::BigEndian(t.ggml_type),
                },
            });
        }
        Ok(())
    }

    fn open_folder(&mut self, path: &Path) -> Result<()> {
        let config_path = path.join("config.json");
        if fs::symlink_metadata(&config_path).is_err() {
            return Err(hints::no_model(path, "a model folder with config.json"));
        }
        let config = resolve::read_json(&config_path)?;
        match resolve::weights(path, &mut self.notes)? {
            Weights::File(file) => {
                let file_id = self.add_file(&file)?;
                self.metadata = self.add_tensors(file_id, &|_| true)?;
            }
            Weights::Index { path, map, shards } => self.add_shards(&path, &map, &shards)?,
        }
        self.bitnet = BitnetConfig::read(&config_path, &config)?;
        self.config = Some(config);
        Ok(())
    }

    /// The shards of an index. A tensor that the index does not list is kept; of one that is in
    /// several shards, the one that the index names.
    fn add_shards(
        &mut self,
        index_path: &Path,
        map: &Map<String, Value>,
        shards: &[String],
    ) -> Result<()> {
        let folder = index_path.parent().unwrap_or(Path::new(""));
        for shard in shards {
            let file_id = self.add_file(&folder.join(shard))?;
            let kept = |name: &str| match map.get(name) {
                Some(file) => file.as_str() == Some(shard),
                None => true,
            };
            let metadata = self.add_tensors(file_id, &kept)?;
            if file_id == FileId(0) {
                self.metadata = metadata;
            }
        }
        for (tensor, file) in map {
            let file = file.as_str().unwrap_or_default();
            if self.find_stored(tensor).is_none() {
                return Err(Error::tensor(
                    &folder.join(file),
                    tensor,
                    "the tensor that the index puts here",
                    "none of that name",
                ));
            }
        }
        let unlisted = |s: &&StoredTensor| !map.contains_key(&s.name);
        if let Some(first) = self.stored.iter().find(unlisted) {
            let count = self.stored.iter().filter(unlisted).count();
            self.notes.push(format!(
                "{count} tensors of the shards are not in the index and are kept; the first is '{}'",
                first.name
            ));
        }
        Ok(())
    }

    fn read_document(&mut self) -> Result<()> {
        let text = match self.kind {
            Kind::Gguf => self
                .gguf
                .iter()
                .find(|(k, _)| k == document::KEY)
                .and_then(|(_, v)| v.as_str()),
            _ => self
                .metadata
                .iter()
                .find(|(k, _)| k == document::KEY)
                .map(|(_, v)| v.as_str()),
        };
        let Some(text) = text else { return Ok(()) };
        let path = &self.files[0].path;
        let bad = |got: String| {
            Error::config(
                path,
                document::KEY,
                format!("a document of version {}", document::VERSION),
                got,
            )
        };
        let value: Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        match value.get("version").and_then(Value::as_u64) {
            Some(v) if v == u64::from(document::VERSION) => {}
            other => return Err(bad(other.map_or("none".into(), |v| format!("version {v}")))),
        }
        self.document = Some(serde_json::from_value(value).map_err(|e| bad(e.to_string()))?);
        Ok(())
    }

    /// One shard of a set, given as a file: refused where its document needs the others, else noted.
    fn check_lone_shard(&mut self) -> Result<()> {
        let number = output::shard_number(&self.path).filter(|(_, count)| *count > 1);
        let (Kind::File, Some((number, count))) = (self.kind, number) else {
            return Ok(());
        };
        let folder = self.path.parent().unwrap_or(Path::new(""));
        let of_set = format!(
            "file {number} of {count} of a set; give its folder ({})",
            folder.join("").display()
        );
        let checksums = self.document.iter().flat_map(|d| d.checksums.keys());
        if checksums
            .into_iter()
            .any(|name| self.find_stored(name).is_none())
        {
            return Err(Error::file(&self.path, "the whole model", of_set));
        }
        self.notes
            .push(format!("the other tensors are not read: this is {of_set}"));
        Ok(())
    }

    /// Takes off what wrappers put before the names of a model whose architecture is known. A file
    /// with a document has names of this program.
    fn unwrap_names(&mut self) {
        let architecture = self.config.as_ref().and_then(|config| {
            let name = config.get("model_type").and_then(Value::as_str)?;
            Architecture::by_name(name)
        });
        let (Some(architecture), None) = (architecture, &self.document) else {
            return;
        };
        let names = self.stored.iter().map(|s| s.name.as_str());
        let Some(names) = prefixes::unwrapped(architecture, names) else {
            return;
        };
        let example = self.stored.iter().zip(&names).find(|(s, n)| s.name != **n);
        if let Some((stored, name)) = example {
            self.notes.push(format!(
                "tensor names are read without what a wrapper added: '{}' as '{name}'",
                stored.name
            ));
        }
        for (stored, name) in self.stored.iter_mut().zip(names) {
            stored.name = name;
        }
        self.names = self
            .ids()
            .map(|id| (self.stored(id).name.clone(), id))
            .collect();
    }

    /// Forgets what the document says of tensors that another program has rewritten: they are what
    /// their types say. llama-quantize, for example, keeps the document and changes the types.
    fn forget_rewritten(&mut self) {
        let Some(document) = &self.document else {
            return;
        };
        let rewritten: Vec<String> = document
            .tensors
            .iter()
            .filter(|(name, packed)| self.is_rewritten(name, packed, document))
            .map(|(name, _)| name.clone())
            .collect();
        let Some(first) = rewritten.first() else {
            return;
        };
        self.notes.push(format!(
            "another program has rewritten {} tensors that {} packed, '{first}' first: they are \
             what their types say, and not what {} says",
            rewritten.len(),
            document.generator,
            document::KEY
        ));
        if let Some(document) = &mut self.document {
            document.tensors.retain(|name, _| !rewritten.contains(name));
        }
    }

    /// Whether a tensor that the document calls packed has another type and other bytes in the
    /// file. Another type with the same bytes is damage.
    fn is_rewritten(&self, name: &str, packed: &PackedTensor, document: &Document) -> bool {
        let stored = self.find_stored(&packed.packed);
        let dtype = stored.map(|id| self.stored(id).dtype);
        let Ok(layout) = pack::by_name(&packed.layout) else {
            return false;
        };
        match (self.kind, layout.origin(), dtype) {
            (Kind::Gguf, origin, Some(dtype)) => {
                let expected = ggml_type_of_origin(origin);
                let other_type = dtype.to_ggml() != expected && expected.is_some();
                other_type && stored.is_some_and(|id| self.has_other_bytes(id, document))
            }
            // Under the model's own name, in place of the packed tensor.
            (Kind::File | Kind::Folder, _, dtype) => {
                let own = self.find_stored(name).map(|id| self.stored(id).dtype);
                let packed_is_gone = dtype.is_none() || packed.packed == name;
                packed_is_gone && own.is_some_and(|dtype| dtype.is_float())
            }
            _ => false,
        }
    }

    /// Whether a stored tensor differs from its checksum in the document.
    fn has_other_bytes(&self, id: StoredId, document: &Document) -> bool {
        let tensor = self.stored(id);
        let Some(expected) = document.checksums.get(&tensor.name) else {
            return false;
        };
        let mut sum = Checksum::default();
        let mut bytes = vec![];
        let mut start = 0;
        while start < tensor.len {
            bytes.resize((tensor.len - start).min(1 << 20) as usize, 0);
            if self.read(id, start, &mut bytes).is_err() {
                return false;
            }
            sum.update(&bytes);
            start += bytes.len() as u64;
        }
        sum.hex() != *expected
    }

    /// Adds a tensor that stands for others; it replaces one of the same name.
    pub(crate) fn add_stored(&mut self, tensor: StoredTensor) -> StoredId {
        let id = StoredId(self.stored.len());
        self.names.insert(tensor.name.clone(), id);
        self.stored.push(tensor);
        id
    }

    /// The stored tensor.
    pub(crate) fn stored(&self, id: StoredId) -> &StoredTensor {
        &self.stored[id.0]
    }

    /// All stored tensors.
    pub(crate) fn ids(&self) -> impl Iterator<Item = StoredId> + use<> {
        (0..self.stored.len()).map(StoredId)
    }

    /// The container's own metadata.
    pub(crate) fn container(&self) -> Container {
        match self.kind {
            Kind::Gguf => Container::Gguf(self.gguf.clone()),
            Kind::File | Kind::Folder => Container::Safetensors(self.metadata.clone()),
        }
    }

    /// The file that holds a stored tensor.
    pub(crate) fn file_of(&self, stored: StoredId) -> &Path {
        &self.files[self.stored(stored).file.0].path
    }

    /// The stored tensor of that name.
    pub(crate) fn find_stored(&self, name: &str) -> Option<StoredId> {
        self.names.get(name).copied()
    }

    /// Fills `buffer` with the bytes of a stored tensor from byte `start` of it on.
    ///
    /// # Errors
    /// [`Error::Io`], also where the file has become shorter; [`Error::Tensor`] for a range outside
    /// the tensor.
    pub(crate) fn read(&self, stored: StoredId, start: u64, buffer: &mut [u8]) -> Result<()> {
        let tensor = self.stored(stored);
        let file = &self.files[tensor.file.0];
        match start.checked_add(buffer.len() as u64) {
            Some(end) if end <= tensor.len && !self.foreign.contains_key(&stored) => {
                let read = |at: u64, out: &mut [u8]| {
                    crate::io::read_at(&file.file, out, tensor.offset + at)
                };
                match &tensor.access {
                    Access::AsRead => read(start, buffer),
                    Access::BigEndian(ggml_type) => ggml_type.read_swapped(start, buffer, &read),
                    Access::Strided(view) => view.read(start, buffer, &read),
                }
                .map_err(Error::io(&file.path, "read"))
            }
            _ => Err(Error::tensor(
                &file.path,
                &tensor.name,
                format!("a range inside {} bytes", tensor.len),
                format!("{} bytes from {start}", buffer.len()),
            )),
        }
    }

    /// Decodes elements `range` of a stored float tensor into `out`. `bytes` is scratch that keeps
    /// its allocation.
    ///
    /// The range begins and ends at whole blocks of the type; whole rows always do.
    ///
    /// # Errors
    /// As [`Storage::read`], and [`Error::Tensor`] if the type holds no floats.
    pub(crate) fn read_floats(
        &self,
        stored: StoredId,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        out: &mut [f32],
    ) -> Result<()> {
        if self.foreign.contains_key(&stored) {
            let len = range.len();
            return self.read_foreign(stored, range.start, &mut out[..len]);
        }
        let tensor = self.stored(stored);
        // Piece by piece, so that the scratch stays small beside a long row. A multiple of every
        // block.
        const PIECE: usize = 1 << 18;
        for (piece, out) in out[..range.len()].chunks_mut(PIECE).enumerate() {
            let sizes = (
                tensor.dtype.bytes(range.start + piece * PIECE),
                tensor.dtype.bytes(out.len()),
            );
            let (Some(start), Some(len)) = sizes else {
                return Err(Error::tensor(
                    self.file_of(stored),
                    &tensor.name,
                    "elements of whole bytes",
                    tensor.dtype.to_string(),
                ));
            };
            bytes.resize(len, 0);
            self.read(stored, start as u64, bytes)?;
            tensor
                .dtype
                .decode(bytes, out)
                .map_err(|e| Error::tensor(self.file_of(stored), &tensor.name, "weights", e))?;
        }
        Ok(())
    }

    pub(crate) fn floats(&self, stored: StoredId) -> Result<Vec<f32>> {
        let n = self.stored(stored).elements();
        let mut out = vec![0.0; n];
        self.read_floats(stored, 0..n, &mut vec![], &mut out)?;
        Ok(out)
    }
}
