//! A checkpoint to read: a safetensors file, a folder of them with config.json, or a GGUF file.

use crate::arch::{
    Architecture, InputRotation, ROTATION_PREFIX, Rotation, RotationError, RotationFacts,
};
use crate::container::Container;
use crate::document::Document;
use crate::dtype::StoredType;
use crate::grouping;
use crate::hf::{BitnetConfig, Mode, Verdict, judge_scales};
use crate::prefixes;
use crate::storage::Storage;
pub use crate::storage::{Kind, OpenOptions, SourceFile};
use crate::tensor::{Content, ScaleSource, StoredId, StoredMatrix, StoredTensor, Tensor, TensorId};
use crate::{Error, Result, gguf};
use bitnet_core::hadamard::Hadamard;
use bitnet_core::{Matrix, ZeroPoints};
use serde_json::Value;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// The output matrix and the embedding in a folder.
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Bytes that are compared at once.
const COMPARED: u64 = 1 << 20;

/// An open checkpoint. Its headers are read and checked; bytes of tensors are read on demand,
/// except where config.json and the weights disagree about the output matrix.
#[derive(Debug)]
pub struct Source {
    storage: Storage,
    tensors: Vec<Tensor>,
    names: HashMap<String, TensorId>,
    notes: Vec<String>,
    untied_head: bool,
    rotation: Result<Option<Rotation>, RotationError>,
}

impl Source {
    /// Opens a checkpoint and checks all of its headers.
    ///
    /// # Errors
    /// Whatever makes the checkpoint unreadable, named with its file and tensor: see [`Error`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// [`Source::open`] for files that leave something open.
    ///
    /// # Errors
    /// As [`Source::open`]; [`Error::Matrix`] for a layout that does not exist.
    pub fn open_with(path: &Path, options: &OpenOptions) -> Result<Self> {
        let storage = Storage::open(path)?;
        let tensors = grouping::tensors(&storage, options)?;
        let i2s = StoredType::Ggml(gguf::GgmlType::I2S);
        let mut notes = storage.notes.clone();
        if storage.document.is_none() && storage.stored.iter().any(|s| s.dtype == i2s) {
            notes.push(format!(
                "I2_S codes are read in the order {}: the file does not say which of three it is",
                options.i2s_layout
            ));
        }
        notes.extend(storage.foreign_notes());
        let names = tensors.iter().enumerate();
        let names = names.map(|(i, t)| (t.name.clone(), TensorId(i))).collect();
        let mut source = Self {
            storage,
            tensors,
            names,
            notes,
            untied_head: false,
            rotation: Ok(None),
        };
        source.check_scales()?;
        source.resolve_head()?;
        source.rotation = source.read_rotation();
        Ok(source)
    }

    /// The path given to [`Source::open`].
    pub fn path(&self) -> &Path {
        &self.storage.path
    }

    /// File, folder or GGUF.
    pub fn kind(&self) -> Kind {
        self.storage.kind
    }

    /// Its files.
    pub fn files(&self) -> &[SourceFile] {
        &self.storage.files
    }

    /// config.json of a folder. `tie_word_embeddings` is false where [`Source::untied_head`] is
    /// true, whatever the file says.
    pub fn config(&self) -> Option<&Value> {
        self.storage.config.as_ref()
    }

    /// Whether config.json ties the output matrix to the embedding, but the weights have a
    /// different `lm_head.weight`. That one is the output matrix then, as in transformers 5.
    pub fn untied_head(&self) -> bool {
        self.untied_head
    }

    /// `__metadata__` of the first safetensors file.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.storage.metadata
    }

    /// Keys and values of a GGUF.
    pub fn gguf(&self) -> &[(String, gguf::Value)] {
        &self.storage.gguf
    }

    /// The document, if this engine wrote the file.
    pub fn document(&self) -> Option<&Document> {
        self.storage.document.as_ref()
    }

    /// `quantization_config`, if the folder has one.
    pub fn bitnet(&self) -> Option<BitnetConfig> {
        self.storage.bitnet
    }

    /// Assumptions about what the files leave open, each a sentence for a person.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The model's tensors: several stored ones may make one of these.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// All tensors of the model, in the order of [`Source::tensors`].
    pub fn tensor_ids(&self) -> impl Iterator<Item = TensorId> + use<> {
        (0..self.tensors.len()).map(TensorId)
    }

    /// A tensor of the model.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.0]
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.find_id(name).map(|id| self.tensor(id))
    }

    /// The id of the tensor of that name.
    pub fn find_id(&self, name: &str) -> Option<TensorId> {
        self.names.get(name).copied()
    }

    /// The name of a tensor that differs least from `name`, for messages.
    pub fn nearest(&self, name: &str) -> Option<&str> {
        prefixes::nearest(name, self.tensors.iter().map(|t| t.name.as_str()))
    }

    /// Every stored tensor, in the order of files and bytes.
    pub fn stored_tensors(&self) -> &[StoredTensor] {
        &self.storage.stored
    }

    /// All stored tensors, in the order of [`Source::stored_tensors`].
    pub fn stored_ids(&self) -> impl Iterator<Item = StoredId> + use<> {
        self.storage.ids()
    }

    /// A stored tensor.
    pub fn stored(&self, id: StoredId) -> &StoredTensor {
        self.storage.stored(id)
    }

    /// The stored tensor of that name.
    pub fn find_stored(&self, name: &str) -> Option<StoredId> {
        self.storage.find_stored(name)
    }

    /// The file that holds a stored tensor.
    pub fn file_of(&self, stored: StoredId) -> &Path {
        self.storage.file_of(stored)
    }

    /// The file that holds a tensor, or the first part of it.
    pub fn file_of_tensor(&self, tensor: &Tensor) -> &Path {
        self.file_of(tensor.first_stored())
    }

    /// Bytes of a tensor in the file, scales and padding included.
    pub fn bytes_of(&self, tensor: &Tensor) -> u64 {
        let parts = tensor.stored().into_iter();
        parts.map(|id| self.stored(id).len).sum()
    }

    /// The container's own metadata.
    pub fn container(&self) -> Container {
        self.storage.container()
    }

    /// What another program quantized, and how it is read: a sentence for each type of it.
    pub fn already_quantized(&self) -> Vec<String> {
        self.storage.foreign_notes()
    }

    /// Whether another program quantized weights of it.
    pub fn has_foreign(&self) -> bool {
        !self.storage.foreign.is_empty()
    }

    /// Checks that every matrix can be read: an error for one that another program packed in a way
    /// that is not decoded, and for a rotation that is not known. Such a matrix can be listed, and
    /// nothing else.
    ///
    /// # Errors
    /// [`Error::File`] with the method, the number of matrices and the next step; those of
    /// [`Source::rotation`].
    pub fn refuse_undecoded(&self) -> Result<()> {
        self.storage.refuse_undecoded()?;
        self.rotation().map(drop)
    }

    /// Which matrices are stored in a rotated basis; none if all are stored as they are.
    ///
    /// # Errors
    /// [`Error::Config`] for a rotation that is not known.
    pub fn rotation(&self) -> Result<Option<&Rotation>> {
        match &self.rotation {
            Ok(rotation) => Ok(rotation.as_ref()),
            Err(error) => Err(error.of_file(&self.storage.files[0].path)),
        }
    }

    /// The rotation of a tensor's rows; none if they are stored as they are.
    ///
    /// # Errors
    /// As [`Source::rotation`] and [`Rotation::of`].
    pub fn rotation_of(&self, name: &str) -> Result<Option<&Hadamard>> {
        match self.rotation()? {
            None => Ok(None),
            Some(rotation) => rotation
                .of(name)
                .map_err(|error| error.of_file(&self.storage.files[0].path)),
        }
    }

    /// What happens to the input of a matrix before the product; none if it is not rotated.
    ///
    /// # Errors
    /// As [`Source::rotation`].
    pub fn input_rotation(&self, name: &str) -> Result<Option<InputRotation<'_>>> {
        Ok(self
            .rotation()?
            .and_then(|rotation| rotation.of_input(name)))
    }

    /// Checks that the rows of a tensor are stored as they are, for readers that know no rotation.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the next step, and those of [`Source::rotation`].
    pub fn refuse_rotated(&self, name: &str) -> Result<()> {
        match self.rotation()? {
            Some(rotation) if rotation.contains(name) => {
                let got = "a rotated basis; `bitnet convert --unrotate` writes floats in the original one";
                Err(Error::tensor(
                    self.path(),
                    name,
                    "weights in their original basis",
                    got,
                ))
            }
            _ => Ok(()),
        }
    }

    /// The rotation that the keys or the document name, checked against the tensors.
    fn read_rotation(&self) -> Result<Option<Rotation>, RotationError> {
        let shape = |name: &str| self.find(name).map(|tensor| tensor.shape.clone());
        let names = &mut self.tensors.iter().map(|tensor| tensor.name.as_str());
        let said = self
            .document()
            .and_then(|document| document.rotation.as_ref());
        let (prefix, facts) = match (self.kind(), said) {
            (Kind::Gguf, None) => (ROTATION_PREFIX, RotationFacts::from_gguf(self.gguf())?),
            (Kind::Gguf, Some(_)) => {
                return Err(RotationError {
                    key: "bitnet.document.rotation".into(),
                    expected: format!("none in a GGUF, whose keys {ROTATION_PREFIX} say it"),
                    got: "one".into(),
                });
            }
            (_, None) => return Ok(None),
            (_, Some(value)) => ("rotation", Some(RotationFacts::from_document(value)?)),
        };
        facts
            .map(|facts| Rotation::check(prefix, facts, &shape, names))
            .transpose()
    }

    /// Fills `buffer` with the bytes of a stored tensor from byte `start` of it on.
    ///
    /// # Errors
    /// [`Error::Io`], also where the file has become shorter; [`Error::Tensor`] for a range outside
    /// the tensor.
    pub fn read(&self, stored: StoredId, start: u64, buffer: &mut [u8]) -> Result<()> {
        self.storage.read(stored, start, buffer)
    }

    /// All bytes of a stored tensor.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn read_all(&self, stored: StoredId) -> Result<Vec<u8>> {
        let mut bytes = vec![];
        self.read_all_into(stored, &mut bytes)?;
        Ok(bytes)
    }

    /// [`Source::read_all`] into a vector whose allocation is kept.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn read_all_into(&self, stored: StoredId, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.resize(self.stored(stored).len as usize, 0);
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
        stored: StoredId,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        out: &mut [f32],
    ) -> Result<()> {
        self.storage.read_floats(stored, range, bytes, out)
    }

    /// The floats of a stored vector of at most 65,536 elements; `None` where there is no tensor of
    /// this name.
    ///
    /// # Errors
    /// As [`Source::read_floats`], and [`Error::Tensor`] for another shape.
    pub fn vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(stored) = self.find_stored(name) else {
            return Ok(None);
        };
        let shape = &self.stored(stored).shape;
        let &[len @ 0..=65_536] = &shape[..] else {
            let expected = "a vector of at most 65536 elements";
            return Err(Error::tensor(
                self.file_of(stored),
                name,
                expected,
                format!("{shape:?}"),
            ));
        };
        let mut out = vec![0.0; len];
        self.read_floats(stored, 0..len, &mut vec![], &mut out)?;
        Ok(Some(out))
    }

    /// Reads and unpacks a quantized tensor: values, scales and zero points, all checked.
    ///
    /// # Errors
    /// As [`Source::read`]; [`Error::Matrix`] for bytes that the layout cannot have written;
    /// [`Error::Tensor`] for a scale or zero point that is not finite.
    pub fn matrix(&self, name: &str, q: &StoredMatrix) -> Result<Matrix> {
        let path = self.file_of(q.packed);
        let bytes = self.read_all(q.packed)?;
        let unpacked = q
            .layout
            .unpack(&q.spec, &bytes)
            .map_err(Error::matrix(path, name))?;
        let scales = match (q.scales, unpacked.scales) {
            (ScaleSource::Inside, Some(scales)) => scales,
            (ScaleSource::Inside, None) => {
                return Err(Error::tensor(
                    path,
                    name,
                    "a layout with scales inside",
                    q.layout.name(),
                ));
            }
            (ScaleSource::Stored { id, reciprocal }, _) => {
                let mut scales = self.storage.floats(id)?;
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
            (ZeroPoints::I8, Some(id)) => self
                .read_all(id)?
                .into_iter()
                .map(|b| f32::from(b as i8))
                .collect(),
            (ZeroPoints::F32, Some(id)) => self.storage.floats(id)?,
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

    /// Refuses a folder whose scales clearly follow the convention that its config does not name.
    ///
    /// Only tensors in the hf-bitnet layout are judged.
    fn check_scales(&self) -> Result<()> {
        let Some(BitnetConfig {
            linear_class,
            mode: Mode::Offline,
        }) = self.storage.bitnet
        else {
            return Ok(());
        };
        let mut scales = vec![];
        for tensor in &self.tensors {
            if let Content::Quantized(StoredMatrix {
                scales: ScaleSource::Stored { id, reciprocal },
                spec,
                ..
            }) = &tensor.content
                && self.stored(*id).elements() == 1
            {
                let s = self.storage.floats(*id)?[0];
                if !(s.is_finite() && s >= 0.0) || (*reciprocal && s == 0.0) {
                    return Err(Error::tensor(
                        self.file_of(*id),
                        &self.stored(*id).name,
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
                &self.path().join("config.json"),
                "quantization_config.linear_class",
                "a scale convention that fits the numbers",
                format!(
                    "'{}', under which layers amplify {gain:.3e} times \
                     (the other convention: {other:.3}); one of config and weights is wrong",
                    linear_class.name()
                ),
            )),
        }
    }

    /// Compares the output matrix with the embedding where config.json calls them one matrix.
    fn resolve_head(&mut self) -> Result<()> {
        const KEY: &str = "tie_word_embeddings";
        let tied = |config: &Value| match config.get(KEY) {
            Some(Value::Null) | None => {
                Architecture::hf_defaults_of(config).is_some_and(|d| d.tied)
            }
            Some(value) => *value == Value::Bool(true),
        };
        if !self.config().is_some_and(tied) {
            return Ok(());
        }
        let (Some(head), Some(embedding)) = (self.find(HEAD), self.find(EMBEDDING)) else {
            return Ok(());
        };
        if head.shape != embedding.shape {
            self.notes.push(format!(
                "{HEAD} is not used: {KEY} in config.json is true, and its shape {:?} is not that \
                 of {EMBEDDING}",
                head.shape
            ));
            return Ok(());
        }
        if self.same_bytes(head.first_stored(), embedding.first_stored())? {
            return Ok(());
        }
        self.notes.push(format!(
            "{KEY} in config.json is true, but {HEAD} is there and differs from {EMBEDDING}: it is \
             the output matrix"
        ));
        self.untied_head = true;
        if let Some(config) = &mut self.storage.config {
            config[KEY] = false.into();
        }
        Ok(())
    }

    /// Whether two stored tensors have the same type and bytes.
    fn same_bytes(&self, a: StoredId, b: StoredId) -> Result<bool> {
        let (len, other) = (self.stored(a).len, self.stored(b));
        if len != other.len || self.stored(a).dtype != other.dtype {
            return Ok(false);
        }
        let (mut left, mut right) = (vec![], vec![]);
        let mut start = 0;
        while start < len {
            let size = (len - start).min(COMPARED) as usize;
            left.resize(size, 0);
            right.resize(size, 0);
            self.read(a, start, &mut left)?;
            self.read(b, start, &mut right)?;
            if left != right {
                return Ok(false);
            }
            start += size as u64;
        }
        Ok(true)
    }
}
