//! A checkpoint to read: a safetensors file, a folder of them with config.json, or a GGUF file.
//!
//! [`Source::open`] reads and checks headers only. Tensors are read by position, so that memory
//! holds what the caller asks for and no more, several threads may read at once, and a file that
//! somebody truncates meanwhile is an error and not a signal.

use crate::document::{self, Document};
use crate::dtype::StoredType;
use crate::gguf;
use crate::hf::{BitnetConfig, Mode, Verdict, judge_scales};
use crate::logical::{self, Content, Quantized, Scales, Tensor};
use crate::output::Container;
use crate::safetensors::Header;
use crate::{Error, Result};
use bitnet_core::{Matrix, ZeroPoints};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// What kind of thing the path named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One `.safetensors` file.
    Safetensors,
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
    /// When it was last changed, if the system says.
    pub modified: Option<SystemTime>,
    file: File,
}

/// A tensor as it lies in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Its name in the file.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: StoredType,
    /// Index into [`Source::files`].
    pub file: usize,
    /// Where its bytes begin.
    pub offset: u64,
    /// Number of its bytes.
    pub len: u64,
}

impl Stored {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
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

/// An open checkpoint.
#[derive(Debug)]
pub struct Source {
    /// The path it was opened by.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Its files.
    pub files: Vec<SourceFile>,
    /// Every stored tensor, in the order of files and bytes.
    pub stored: Vec<Stored>,
    /// The model's tensors: several stored ones may make one of these.
    pub tensors: Vec<Tensor>,
    /// config.json of a folder.
    pub config: Option<Value>,
    /// `__metadata__` of the first safetensors file.
    pub metadata: Vec<(String, String)>,
    /// Keys and values of a GGUF.
    pub gguf: Vec<(String, gguf::Value)>,
    /// The document, if this engine wrote the file.
    pub document: Option<Document>,
    /// `quantization_config`, if the folder has one.
    pub bitnet: Option<BitnetConfig>,
    /// What was assumed where the files do not say it, each a sentence for a person.
    pub notes: Vec<String>,
    /// Index of each stored tensor by name, and of each of the model's.
    names: (HashMap<String, usize>, HashMap<String, usize>),
}

impl Source {
    /// Opens a checkpoint and checks all of its headers.
    ///
    /// # Errors
    /// Whatever makes the checkpoint unreadable, named with its file and tensor: see [`Error`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// [`Source::open`] for files that do not say everything about themselves.
    ///
    /// # Errors
    /// As [`Source::open`]; [`Error::Matrix`] for a layout that does not exist.
    pub fn open_with(path: &Path, options: &OpenOptions) -> Result<Self> {
        let meta = fs::metadata(path).map_err(Error::io(path, "open"))?;
        let mut source = Self {
            path: path.to_path_buf(),
            kind: Kind::Folder,
            files: vec![],
            stored: vec![],
            tensors: vec![],
            config: None,
            metadata: vec![],
            gguf: vec![],
            document: None,
            bitnet: None,
            notes: vec![],
            names: Default::default(),
        };
        if meta.is_dir() {
            source.open_folder(path)?;
        } else {
            let index = source.add_file(path)?;
            let mut magic = [0; 4];
            let has_magic = source.files[index].len >= 4;
            if has_magic {
                crate::io::read_at(&source.files[index].file, &mut magic, 0)
                    .map_err(Error::io(path, "read"))?;
            }
            if &magic == gguf::MAGIC || path.extension().is_some_and(|e| e == "gguf") {
                source.kind = Kind::Gguf;
                source.add_gguf(index)?;
            } else {
                source.kind = Kind::Safetensors;
                source.metadata = source.add_safetensors(index, None)?;
            }
        }
        source.read_document()?;
        source.tensors = logical::tensors(&source, options)?;
        let foreign = source.document.is_none()
            && source
                .stored
                .iter()
                .any(|s| s.dtype == StoredType::Ggml(gguf::GgmlType::I2S));
        if foreign {
            source.notes.push(format!(
                "I2_S codes are read in the order {}: the file does not say which of three it is",
                options.i2s_layout
            ));
        }
        source.names.1 = source
            .tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        source.check_scales()?;
        Ok(source)
    }

    fn add_file(&mut self, path: &Path) -> Result<usize> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
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
        Ok(self.files.len() - 1)
    }

    fn add_safetensors(
        &mut self,
        index: usize,
        only: Option<&dyn Fn(&str) -> bool>,
    ) -> Result<Vec<(String, String)>> {
        let file = &self.files[index];
        let header = Header::read(&file.path, &file.file, file.len)?;
        for t in header.tensors {
            if only.is_none_or(|only| only(&t.name)) {
                let dtype = StoredType::Plain(t.dtype);
                self.names.0.insert(t.name.clone(), self.stored.len());
                self.stored.push(Stored {
                    name: t.name,
                    shape: t.shape,
                    dtype,
                    file: index,
                    offset: t.offset,
                    len: t.len,
                });
            }
        }
        Ok(header.metadata)
    }

    fn add_gguf(&mut self, index: usize) -> Result<()> {
        let file = &self.files[index];
        let header = gguf::Header::read(&file.file, file.len).map_err(|source| Error::Gguf {
            path: file.path.clone(),
            source,
        })?;
        self.gguf = header.metadata;
        let parts = self
            .gguf
            .iter()
            .find(|(k, _)| k == "split.count")
            .and_then(|(_, v)| v.as_u64());
        if let Some(parts) = parts.filter(|&n| n > 1) {
            return Err(Error::config(
                &self.files[index].path,
                "split.count",
                "1: a GGUF in one file",
                format!("{parts} parts"),
            ));
        }
        self.stored = header
            .tensors
            .into_iter()
            .map(|t| Stored {
                name: t.name,
                shape: t.shape,
                dtype: StoredType::from_ggml(t.ggml_type),
                file: index,
                offset: t.offset,
                len: t.len,
            })
            .collect();
        self.names.0 = self
            .stored
            .iter()
            .enumerate()
            .map(|(i, s)| (s.name.clone(), i))
            .collect();
        Ok(())
    }

    fn open_folder(&mut self, path: &Path) -> Result<()> {
        let config_path = path.join("config.json");
        let config = read_json(&config_path)?;
        let index_path = path.join("model.safetensors.index.json");
        if index_path.exists() {
            let index = read_json(&index_path)?;
            let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
                return Err(Error::config(
                    &index_path,
                    "weight_map",
                    "an object of tensor names and files",
                    "none",
                ));
            };
            let mut shards: Vec<&str> = vec![];
            for (tensor, file) in map {
                match file.as_str() {
                    Some(f)
                        if !f.is_empty()
                            && Path::new(f).file_name().is_some_and(|name| name == f) =>
                    {
                        shards.push(f)
                    }
                    _ => {
                        return Err(Error::tensor(
                            &index_path,
                            tensor,
                            "a file name in the same folder",
                            file.to_string(),
                        ));
                    }
                }
            }
            shards.sort_unstable();
            shards.dedup();
            for shard in shards {
                let index = self.add_file(&path.join(shard))?;
                let metadata = self.add_safetensors(
                    index,
                    Some(&|name| map.get(name).and_then(Value::as_str) == Some(shard)),
                )?;
                if index == 0 {
                    self.metadata = metadata;
                }
            }
            for (tensor, file) in map {
                let file = file.as_str().unwrap_or_default();
                if self.find_stored(tensor).is_none() {
                    return Err(Error::tensor(
                        &path.join(file),
                        tensor,
                        "the tensor that the index puts here",
                        "none of that name",
                    ));
                }
            }
        } else {
            let mut found: Vec<PathBuf> = fs::read_dir(path)
                .map_err(Error::io(path, "list"))?
                .filter_map(|entry| entry.ok().map(|e| e.path()))
                .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
                .collect();
            found.sort();
            let model = path.join("model.safetensors");
            let file = match found.as_slice() {
                _ if found.contains(&model) => &model,
                [one] => one,
                [] => return Err(Error::file(path, "a .safetensors file", "none")),
                several => {
                    return Err(Error::file(
                        path,
                        "model.safetensors, or model.safetensors.index.json, or a single .safetensors file",
                        format!("{} of them and no index", several.len()),
                    ));
                }
            };
            let index = self.add_file(file)?;
            self.metadata = self.add_safetensors(index, None)?;
        }
        self.bitnet = BitnetConfig::read(&config_path, &config)?;
        self.config = Some(config);
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

    /// The container's own metadata.
    pub fn container(&self) -> Container {
        match self.kind {
            Kind::Gguf => Container::Gguf(self.gguf.clone()),
            Kind::Safetensors | Kind::Folder => Container::Safetensors(self.metadata.clone()),
        }
    }

    /// The file that holds a stored tensor.
    pub fn file_of(&self, stored: usize) -> &Path {
        &self.files[self.stored[stored].file].path
    }

    /// Index of the stored tensor of that name.
    pub fn find_stored(&self, name: &str) -> Option<usize> {
        self.names.0.get(name).copied()
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.names.1.get(name).map(|&i| &self.tensors[i])
    }

    /// Fills `buffer` with the bytes of a stored tensor from byte `start` of it on.
    ///
    /// # Errors
    /// [`Error::Io`], also where the file has become shorter; [`Error::Tensor`] for a range outside
    /// the tensor.
    pub fn read(&self, stored: usize, start: u64, buffer: &mut [u8]) -> Result<()> {
        let tensor = &self.stored[stored];
        let file = &self.files[tensor.file];
        match start.checked_add(buffer.len() as u64) {
            Some(end) if end <= tensor.len => {
                crate::io::read_at(&file.file, buffer, tensor.offset + start)
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

    /// All bytes of a stored tensor.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn read_all(&self, stored: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![];
        self.read_all_into(stored, &mut bytes)?;
        Ok(bytes)
    }

    /// [`Source::read_all`] into a vector whose allocation is kept.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn read_all_into(&self, stored: usize, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.resize(self.stored[stored].len as usize, 0);
        self.read(stored, 0, bytes)
    }

    /// Decodes elements `range` of a stored float tensor into `out`. `bytes` is scratch that keeps
    /// its allocation.
    ///
    /// The range begins and ends at whole blocks of the type; whole rows always do.
    ///
    /// # Errors
    /// As [`Source::read`], and [`Error::Tensor`] if the type holds no floats.
    pub fn read_floats(
        &self,
        stored: usize,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        out: &mut [f32],
    ) -> Result<()> {
        let tensor = &self.stored[stored];
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

    /// Reads and unpacks a quantized tensor: values, scales and zero points, all checked.
    ///
    /// # Errors
    /// As [`Source::read`]; [`Error::Matrix`] for bytes that the layout cannot have written;
    /// [`Error::Tensor`] for a scale or zero point that is not finite.
    pub fn matrix(&self, name: &str, q: &Quantized) -> Result<Matrix> {
        let path = self.file_of(q.packed);
        let bytes = self.read_all(q.packed)?;
        let unpacked = q
            .layout
            .unpack(&q.spec, &bytes)
            .map_err(Error::matrix(path, name))?;
        let scales = match (q.scales, unpacked.scales) {
            (Scales::Inside, Some(scales)) => scales,
            (Scales::Inside, None) => {
                return Err(Error::tensor(
                    path,
                    name,
                    "a layout with scales inside",
                    q.layout.name(),
                ));
            }
            (Scales::Stored { index, reciprocal }, _) => {
                let mut scales = self.floats(index)?;
                if reciprocal {
                    scales.iter_mut().for_each(|s| *s = 1.0 / *s);
                }
                scales
            }
        };
        if let Some((i, s)) = scales.iter().enumerate().find(|(_, s)| !s.is_finite()) {
            return Err(Error::tensor(
                path,
                name,
                "finite scales",
                format!("{s} at index {i}"),
            ));
        }
        let zero_points = match (q.spec.zero_points, q.zero_points) {
            (ZeroPoints::None, _) | (_, None) => vec![],
            (ZeroPoints::I8, Some(index)) => self
                .read_all(index)?
                .into_iter()
                .map(|b| f32::from(b as i8))
                .collect(),
            (ZeroPoints::F32, Some(index)) => self.floats(index)?,
        };
        if let Some((i, z)) = zero_points.iter().enumerate().find(|(_, z)| !z.is_finite()) {
            return Err(Error::tensor(
                path,
                name,
                "finite zero points",
                format!("{z} at index {i}"),
            ));
        }
        let matrix = Matrix {
            spec: q.spec.clone(),
            values: unpacked.values,
            scales,
            zero_points,
        };
        matrix.validate().map_err(Error::matrix(path, name))?;
        Ok(matrix)
    }

    fn floats(&self, stored: usize) -> Result<Vec<f32>> {
        let n = self.stored[stored].elements();
        let mut out = vec![0.0; n];
        self.read_floats(stored, 0..n, &mut vec![], &mut out)?;
        Ok(out)
    }

    /// Refuses a folder whose scales plainly follow the other convention than its config says.
    ///
    /// Only tensors in the hf-bitnet layout are judged.
    fn check_scales(&self) -> Result<()> {
        let Some(BitnetConfig {
            linear_class,
            mode: Mode::Offline,
        }) = self.bitnet
        else {
            return Ok(());
        };
        let mut scales = vec![];
        for tensor in &self.tensors {
            if let Content::Quantized(Quantized {
                scales: Scales::Stored { index, reciprocal },
                spec,
                ..
            }) = &tensor.content
                && self.stored[*index].elements() == 1
            {
                let s = self.floats(*index)?[0];
                if !(s.is_finite() && s >= 0.0) || (*reciprocal && s == 0.0) {
                    return Err(Error::tensor(
                        self.file_of(*index),
                        &self.stored[*index].name,
                        "a positive scale",
                        s.to_string(),
                    ));
                }
                scales.push((if *reciprocal { 1.0 / s } else { s }, spec.cols));
            }
        }
        match judge_scales(&scales) {
            Verdict::Plausible => Ok(()),
            Verdict::Contradiction { gain, other } => Err(Error::config(
                &self.path.join("config.json"),
                "quantization_config.linear_class",
                "a scale convention that fits the numbers",
                format!(
                    "'{}', under which layers amplify {gain:.3e} times (the other convention: {other:.3}); one of config and weights is wrong",
                    linear_class.name()
                ),
            )),
        }
    }
}

/// Largest JSON file that is read.
const MAX_JSON_BYTES: u64 = 256 << 20;

fn read_json(path: &Path) -> Result<Value> {
    let meta = fs::metadata(path).map_err(Error::io(path, "open"))?;
    if meta.len() > MAX_JSON_BYTES {
        return Err(Error::file(
            path,
            format!("at most {MAX_JSON_BYTES} bytes of JSON"),
            format!("{}", meta.len()),
        ));
    }
    let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, "JSON", e.to_string()))
}
