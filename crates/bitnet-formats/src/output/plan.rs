//! The plan of a file: everything that is known before its first byte is written.

use super::shards::ShardSize;
use crate::container::Container;
use crate::document::Document;
use crate::dtype::StoredType;
use bitnet_core::pack::PackedLen;
use serde::{Deserialize, Serialize};
use std::ops::{Deref, Index, Range};

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct OutputTensor {
    /// Its name in the file.
    pub name: String,
    /// Its shape; of a tensor with [`PackedLen::AtMost`] it is replaced by `[bytes]`.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: StoredType,
    /// Its size in bytes.
    pub len: PackedLen,
}

/// A file to be written.
#[derive(Debug, Clone)]
pub struct FilePlan {
    /// The container and its own metadata.
    pub container: Container,
    /// The document, without checksums and digest.
    pub document: Document,
    /// The tensors, in the order in which the file lists them.
    pub tensors: OutputTensors,
    /// Identity of the job: a checksum over its input and settings.
    pub job: String,
    /// Above this size the tensors go into several files; `None` for always one.
    pub shard_size: Option<ShardSize>,
}

/// A tensor of a [`FilePlan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OutputId(pub(super) usize);

/// The tensors of a file to be written.
#[derive(Debug, Clone, Default)]
pub struct OutputTensors(Vec<OutputTensor>);

impl OutputTensors {
    /// Adds a tensor behind the others.
    pub fn push(&mut self, tensor: OutputTensor) -> OutputId {
        self.0.push(tensor);
        OutputId(self.0.len() - 1)
    }

    /// Removes all but the first `len` tensors.
    pub fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }

    /// Those at these positions.
    pub(super) fn range(&self, range: Range<usize>) -> &[OutputTensor] {
        &self.0[range]
    }

    /// The tensors' ids, in order.
    pub(super) fn ids(&self) -> impl Iterator<Item = OutputId> + use<> {
        (0..self.0.len()).map(OutputId)
    }
}

impl Deref for OutputTensors {
    type Target = [OutputTensor];
    fn deref(&self) -> &[OutputTensor] {
        &self.0
    }
}

impl Index<OutputId> for OutputTensors {
    type Output = OutputTensor;
    fn index(&self, id: OutputId) -> &OutputTensor {
        &self.0[id.0]
    }
}
