//! The tensors of a checkpoint, found by their Hugging Face names and checked.

use super::options::FloatType;
use super::rounding::RoundingError;
use crate::linear::KernelPool;
use crate::{Error, Result};
use bitnet_core::Matrix;
use bitnet_formats::arch::{self, Architecture};
use bitnet_formats::{Content, Kind, Source, Tensor};
use std::collections::HashSet;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Takes weights from a checkpoint.
pub(crate) struct CheckpointLoader<'a> {
    pub(crate) source: &'a Source,
    pub(crate) architecture: &'static Architecture,
    /// Whether the embedding is also the output matrix.
    pub(crate) tied: bool,
    pub(crate) runtime: &'a KernelPool,
    /// Whether ternary layers have int8 activations.
    pub(crate) int8: bool,
    /// Types in memory of linear layers and of the embedding, where their weights are floats.
    pub(crate) floats: [FloatType; 2],
    /// Names of the tensors that the graph has taken.
    pub(crate) used: Mutex<HashSet<String>>,
    /// Read buffers that are free, at most one for each thread.
    pub(crate) buffers: Mutex<Vec<Vec<u8>>>,
    /// Rounding errors of linear layers and of the embedding.
    pub(crate) rounding: Mutex<[RoundingError; 2]>,
}

/// A tensor and the file that holds it, or one matrix of a stack of them.
#[derive(Clone, Copy)]
pub(super) struct FoundTensor<'a> {
    pub(super) tensor: &'a Tensor,
    pub(super) path: &'a Path,
    /// The first row of the matrix among those of all matrices of the tensor.
    pub(super) first: usize,
    /// Rows and columns of the matrix.
    pub(super) shape: [usize; 2],
    /// Where one matrix of a stack keeps the values of all, if they can only be unpacked together.
    pub(super) unpacked: Option<&'a OnceLock<Matrix>>,
}

impl FoundTensor<'_> {
    pub(super) fn error(&self, expected: impl Into<String>, got: impl Into<String>) -> Error {
        bitnet_formats::Error::tensor(self.path, &self.tensor.name, expected, got).into()
    }

    /// Index of the first weight of the matrix in the tensor.
    pub(super) fn first_weight(&self) -> usize {
        self.first * self.shape[1]
    }

    /// The error of a matrix that the kernels reject.
    pub(super) fn kernel_error(&self, source: bitnet_kernels::Error) -> Error {
        Error::Matrix {
            path: self.path.to_path_buf(),
            tensor: self.tensor.name.clone(),
            source,
        }
    }

    /// Rejects NaN and infinity. `first` is the index of the first weight in the matrix.
    pub(super) fn check_finite(&self, first: usize, w: &[f32]) -> Result<()> {
        match w.iter().position(|w| !w.is_finite()) {
            None => Ok(()),
            Some(i) => Err(self.not_finite(first + i, w[i].is_nan())),
        }
    }

    pub(super) fn not_finite(&self, index: usize, nan: bool) -> Error {
        let got = if nan { "NaN" } else { "infinity" };
        let index = self.first_weight() + index;
        self.error("finite weights", format!("{got} at index {index}"))
    }
}

/// Locks a mutex whose value a panic cannot leave half changed.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> CheckpointLoader<'a> {
    pub(crate) fn new(
        source: &'a Source,
        (architecture, tied): (&'static Architecture, bool),
        runtime: &'a KernelPool,
        int8: bool,
        floats: [FloatType; 2],
    ) -> Self {
        Self {
            source,
            architecture,
            tied,
            runtime,
            int8,
            floats,
            used: Default::default(),
            buffers: Default::default(),
            rounding: Default::default(),
        }
    }

    /// Sentences on what was rounded by choice.
    pub(crate) fn rounding_notes(&self) -> Vec<String> {
        let rounding = locked(&self.rounding);
        let kinds = ["linear layers", "embedding and output matrix"];
        let all = rounding.iter().zip(kinds).zip(self.floats);
        all.filter_map(|((error, what), held)| error.note(what, held))
            .collect()
    }

    /// The tensor of a Hugging Face name, which must have this shape.
    pub(super) fn find(&self, hf_name: &str, shape: &[usize]) -> Result<FoundTensor<'a>> {
        let name = self.stored_name(hf_name);
        let Some(tensor) = self.source.find(&name) else {
            return Err(self.missing(&name, hf_name, shape));
        };
        locked(&self.used).insert(name);
        let mut found = self.found(tensor);
        // llama.cpp keeps a matrix of one row as a vector.
        let is_row = shape.len() == 2 && shape[0] == 1 && tensor.shape == shape[1..];
        if is_row {
            found.shape = [1, shape[1]];
        }
        if tensor.shape != shape && !is_row {
            return Err(found.error(
                format!("shape {shape:?}, as config.json says"),
                format!("{:?}", tensor.shape),
            ));
        }
        if matches!(&tensor.content, Content::Quantized(q) if q.transposed) {
            let got = "one that is packed transposed, as [out, in] of a tensor [in, out]";
            return Err(found.error("a matrix [out, in]", got));
        }
        if matches!(tensor.content, Content::Opaque(_)) {
            let stored = self.source.stored(tensor.first_stored());
            let got = stored.dtype.to_string();
            return Err(found.error("weights of a type that this engine decodes", got));
        }
        Ok(found)
    }

    /// The error of a tensor that is not there.
    fn missing(&self, name: &str, hf_name: &str, shape: &[usize]) -> Error {
        let mut got = "no such tensor".to_string();
        if hf_name == "lm_head.weight" {
            got += "; config.json needs tie_word_embeddings true if the embedding is the output \
                    matrix";
        } else if let Some(nearest) = self.source.nearest(name) {
            got += &format!("; the nearest name is '{nearest}'");
        }
        let expected = format!("shape {shape:?}");
        bitnet_formats::Error::tensor(self.source.path(), name, expected, got).into()
    }

    /// A tensor with its file, the first part's, and with its first matrix.
    fn found(&self, tensor: &'a Tensor) -> FoundTensor<'a> {
        FoundTensor {
            tensor,
            path: self.source.file_of_tensor(tensor),
            first: 0,
            shape: match tensor.shape[..] {
                [.., rows, cols] => [rows, cols],
                _ => [tensor.elements(), 1],
            },
            unpacked: None,
        }
    }

    pub(crate) fn stored_name(&self, hf_name: &str) -> String {
        match self.source.kind() {
            Kind::Gguf => {
                let name = self.architecture.gguf_tensor(hf_name);
                name.unwrap_or_else(|| hf_name.into())
            }
            Kind::File | Kind::Folder => hf_name.into(),
        }
    }

    /// A vector of floats: the gain of a norm or a bias.
    pub(crate) fn vector(&self, hf_name: &str, len: usize) -> Result<Vec<f32>> {
        self.floats(hf_name, &[len])
    }

    /// All elements of a small tensor of floats.
    pub(super) fn floats(&self, hf_name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let found = self.find(hf_name, shape)?;
        let len = shape.iter().product();
        let Content::Float(stored) = found.tensor.content else {
            return Err(found.error("floats", "quantized values"));
        };
        let mut out = vec![0.0; len];
        self.source
            .read_floats(stored, 0..len, &mut vec![], &mut out)?;
        found.check_finite(0, &out)?;
        Ok(out)
    }

    /// The number that `blk.N.<module>.scale` of a GGUF multiplies the layer with; 1 without it.
    pub(super) fn multiplier(&self, module: &str) -> Result<f32> {
        let name = self.stored_name(&format!("{module}.weight"));
        let Some(name) = name
            .strip_suffix(".weight")
            .map(|n| format!("{n}.scale"))
            .filter(|_| self.source.kind() == Kind::Gguf)
        else {
            return Ok(1.0);
        };
        let Some(stored) = self.source.find_stored(&name) else {
            return Ok(1.0);
        };
        locked(&self.used).insert(name.clone());
        let bad = |expected: &str, got: String| {
            let path = self.source.file_of(stored);
            bitnet_formats::Error::tensor(path, &name, expected, got)
        };
        if self.source.stored(stored).elements() != 1 {
            let shape = &self.source.stored(stored).shape;
            return Err(bad("one number", format!("shape {shape:?}")).into());
        }
        let mut scale = [0.0];
        self.source
            .read_floats(stored, 0..1, &mut vec![], &mut scale)?;
        if !scale[0].is_finite() {
            return Err(bad("a finite number", scale[0].to_string()).into());
        }
        Ok(scale[0])
    }

    /// Rejects tensors that the graph did not take, which would be ignored silently.
    pub(crate) fn check_all_used(&self) -> Result<()> {
        let used = locked(&self.used);
        for tensor in self.source.tensors() {
            let name = tensor.name.as_str();
            // A tied head is the embedding, whatever else the file holds. Rotation frequencies are
            // computed or read elsewhere.
            let known = used.contains(name)
                || arch::is_rope_tensor(name)
                || (self.tied && name == "lm_head.weight")
                || self.architecture.ignores(name);
            if known {
                continue;
            }
            let found = self.found(tensor);
            let graph = self.architecture.name;
            return Err(found.error(
                format!("a tensor of the {graph} graph with this config"),
                format!("one that it has no place for, of shape {:?}", tensor.shape),
            ));
        }
        Ok(())
    }
}
