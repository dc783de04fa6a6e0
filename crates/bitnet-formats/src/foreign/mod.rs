//! Matrices that another program quantized: GPTQ, AWQ, MLX, compressed-tensors, FP8 with scales.
//!
//! Such a matrix is several stored tensors: codes, scales, zero points. [`recognise`] finds them by
//! names, types and shapes. Each becomes one more stored tensor of the type [`StoredType::Foreign`]
//! whose elements decode to f32, so that every reader of floats reads it. One of MLX that is ternary
//! is read as values and scales. A matrix that is recognised and not decoded is opaque;
//! [`Storage::refuse_undecoded`] names it.
//!
//! Values are products in f32 of the stored scale and the integer (or F8) value. A reader that
//! multiplies in f16 or bf16 has the same number rounded to that type.

mod declared;
mod decode;
mod packed;
mod recognise;
mod scaled;
mod ternary;

pub(crate) use declared::Declared;
pub(crate) use decode::{Coding, Loaded};

use crate::document::Document;
use crate::dtype::StoredType;
use crate::storage::{Kind, Storage};
use crate::tensor::{Access, StoredId, StoredMatrix, StoredTensor};
use crate::{Error, Result};
use std::fmt;
use std::sync::Arc;

/// The program or format that quantized a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ForeignMethod {
    /// GPTQ: `qweight`, `qzeros`, `scales`, `g_idx`.
    Gptq,
    /// AWQ: `qweight`, `qzeros`, `scales`, packed along the outputs.
    Awq,
    /// MLX: U32 `weight`, `scales`, `biases`.
    Mlx,
    /// compressed-tensors, format pack-quantized: `weight_packed`, `weight_scale`.
    CompressedTensors,
    /// F8 values with scales.
    Fp8,
    /// Signed bytes with scales.
    Int8,
    /// bitsandbytes.
    Bitsandbytes,
    /// MXFP4: pairs of 4-bit floats with a scale E8M0 per 32 of them.
    Mxfp4,
    /// NVFP4: pairs of 4-bit floats with a scale E4M3 per 16 of them.
    Nvfp4,
    /// Packed in a way that this program does not know.
    Unknown,
}

impl ForeignMethod {
    fn name(self) -> &'static str {
        match self {
            Self::Gptq => "GPTQ",
            Self::Awq => "AWQ",
            Self::Mlx => "MLX",
            Self::CompressedTensors => "compressed-tensors",
            Self::Fp8 => "FP8",
            Self::Int8 => "INT8",
            Self::Bitsandbytes => "bitsandbytes",
            Self::Mxfp4 => "MXFP4",
            Self::Nvfp4 => "NVFP4",
            Self::Unknown => "packed",
        }
    }
}

/// How another program quantized a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignType {
    /// Its method.
    pub method: ForeignMethod,
    /// Bits of a value; 0 if they are not known.
    pub bits: u8,
    /// Weights of a row that share a scale; 0 if no such number is known.
    pub group: usize,
    /// Whether its values can be read.
    pub decodes: bool,
}

impl fmt::Display for ForeignType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.method.name().to_string();
        if self.bits > 0 {
            text += &format!(" {}-bit", self.bits);
        }
        if self.group > 0 {
            text += &format!(" group {}", self.group);
        }
        f.pad(&text)
    }
}

/// A matrix that another program quantized, as it is recognised.
#[derive(Debug)]
pub(crate) struct Foreign {
    /// Its name in the model.
    pub(crate) name: String,
    /// Its shape in the model, or of the first part where it is not known.
    pub(crate) shape: Vec<usize>,
    pub(crate) foreign_type: ForeignType,
    /// Its stored tensors, the codes first.
    pub(crate) parts: Vec<StoredId>,
    /// How to decode it, or why it cannot be read and the next step.
    pub(crate) coding: Result<Coding, String>,
    /// The matrix as ternary values and scales, if it is one.
    pub(crate) ternary: Option<StoredMatrix>,
}

impl Storage {
    /// Finds the matrices that another program quantized, and adds each as a stored tensor.
    pub(crate) fn group_foreign(&mut self) -> Result<()> {
        // Of a folder in the form of MLX the document lists no tensors.
        let listed = |d: &Document| !d.tensors.is_empty();
        if self.kind == Kind::Gguf
            || self.document.as_ref().is_some_and(listed)
            || self.bitnet.is_some()
        {
            return Ok(());
        }
        let declared = Declared::read(self);
        for mut matrix in recognise::matrices(self, &declared) {
            matrix.ternary = self.ternary(&matrix)?;
            let parts = matrix.parts.iter().map(|&id| self.stored(id));
            let len = parts.map(|part| part.len).sum();
            let first = self.stored(matrix.parts[0]);
            let tensor = StoredTensor {
                name: matrix.name.clone(),
                shape: matrix.shape.clone(),
                dtype: StoredType::Foreign(matrix.foreign_type),
                file: first.file,
                offset: first.offset,
                len,
                access: Access::AsRead,
            };
            let id = self.add_stored(tensor);
            self.foreign.insert(id, matrix);
        }
        Ok(())
    }

    /// The position in the files of a stored tensor: of its first part, if it has parts.
    pub(crate) fn position(&self, id: StoredId) -> StoredId {
        self.foreign.get(&id).map_or(id, |f| f.parts[0])
    }

    /// Decodes elements from `start` on into `out`.
    pub(crate) fn read_foreign(&self, id: StoredId, start: usize, out: &mut [f32]) -> Result<()> {
        let Some(matrix) = self.foreign.get(&id) else {
            return Ok(());
        };
        let coding = matrix.coding.as_ref().map_err(|why| {
            let (path, got) = (self.file_of(id), format!("{}: {why}", matrix.foreign_type));
            Error::tensor(path, &matrix.name, "weights that this program reads", got)
        })?;
        let loaded = {
            let mut last = self
                .loaded
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            match &*last {
                Some((of, loaded)) if *of == id => loaded.clone(),
                _ => {
                    *last = None;
                    let loaded = Arc::new(coding.load(self, matrix)?);
                    *last = Some((id, loaded.clone()));
                    loaded
                }
            }
        };
        coding.read(self, &loaded, start, out)
    }

    /// Sentences about the matrices that another program quantized: one for each type of them.
    pub(crate) fn foreign_notes(&self) -> Vec<String> {
        if let Some(method) = self.unused_method() {
            return vec![format!(
                "quant_method is '{method}', and no tensor is packed: the weights are read as the \
                 floats that they are"
            )];
        }
        let ternary: Vec<_> = self
            .foreign
            .values()
            .filter(|f| f.ternary.is_some())
            .collect();
        let ternary = ternary.first().map(|first| {
            let (count, of) = (count(ternary.len()), first.foreign_type);
            format!("{count} {of} whose values are ternary: read as values and scales")
        });
        let types = self.foreign_types().into_iter();
        let types = types.filter_map(|(of, mut matrices)| {
            matrices.retain(|f| f.ternary.is_none());
            (!matrices.is_empty()).then_some((of, matrices))
        });
        let floats = types.map(|(foreign_type, matrices)| {
            let count = count(matrices.len());
            match &matrices[0].coding {
                Ok(_) => format!(
                    "{count} {foreign_type}, quantized already: read as the floats that they \
                     stand for{}",
                    self.assumed(foreign_type.method)
                ),
                Err(why) => format!(
                    "{count} {foreign_type}, quantized already ('{}', …): not read: {why}",
                    matrices[0].name
                ),
            }
        });
        ternary.into_iter().chain(floats).collect()
    }

    /// What the files leave open about a method, and what is assumed.
    fn assumed(&self, method: ForeignMethod) -> &'static str {
        let open = method == ForeignMethod::Gptq
            && Declared::read(self).text("checkpoint_format").is_none();
        if open {
            "; no config names the checkpoint_format: zero points count as stored less one, as in \
             the first version of GPTQ"
        } else {
            ""
        }
    }

    /// The method that the config names where no matrix is quantized.
    fn unused_method(&self) -> Option<String> {
        let quantized = !self.foreign.is_empty() || self.bitnet.is_some();
        let none = !quantized && self.document.is_none();
        none.then(|| Declared::read(self).method()).flatten()
    }

    /// An error if a matrix is packed in a way that this program does not decode.
    ///
    /// # Errors
    /// [`Error::File`] that names method, count and first matrix, and the next step.
    pub(crate) fn refuse_undecoded(&self) -> Result<()> {
        for (foreign_type, matrices) in self.foreign_types() {
            if let Err(why) = &matrices[0].coding {
                return Err(Error::file(
                    &self.path,
                    "weights that this program reads",
                    format!(
                        "{} {foreign_type}, quantized already ('{}', …): {why}",
                        count(matrices.len()),
                        matrices[0].name
                    ),
                ));
            }
        }
        Ok(())
    }

    fn foreign_types(&self) -> Vec<(ForeignType, Vec<&Foreign>)> {
        let mut types: Vec<(ForeignType, Vec<&Foreign>)> = vec![];
        for matrix in self.foreign.values() {
            match types.iter_mut().find(|(t, _)| *t == matrix.foreign_type) {
                Some((_, matrices)) => matrices.push(matrix),
                None => types.push((matrix.foreign_type, vec![matrix])),
            }
        }
        types
    }
}

fn count(n: usize) -> String {
    match n {
        1 => "1 matrix is".into(),
        n => format!("{n} matrices are"),
    }
}
