//! Tensors: as they are stored in files, and as the model has them.

use crate::dtype::StoredType;
use bitnet_core::MatrixSpec;
use bitnet_core::pack::Layout;

/// A stored tensor of one [`Source`](crate::Source).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoredId(pub(crate) usize);

/// A file of one [`Source`](crate::Source).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FileId(pub(crate) usize);

/// A tensor of the model in one [`Source`](crate::Source).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorId(pub(crate) usize);

/// A tensor as it lies in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// Its name in the file.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: StoredType,
    /// The file that holds it.
    pub(crate) file: FileId,
    /// Where its bytes begin.
    pub offset: u64,
    /// Number of its bytes.
    pub len: u64,
}

impl StoredTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A tensor of the model.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name in the model.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// What it is made of.
    pub content: Content,
}

/// What a tensor is made of.
#[derive(Debug, Clone)]
pub enum Content {
    /// A stored tensor that decodes to f32.
    Float(StoredId),
    /// A stored tensor of integers, or of a type without decoder; it can only be copied.
    Opaque(StoredId),
    /// A quantized matrix.
    Quantized(StoredMatrix),
}

/// A quantized matrix in a file.
#[derive(Debug, Clone)]
pub struct StoredMatrix {
    /// Shape and conventions.
    pub spec: MatrixSpec,
    /// How the values are packed.
    pub layout: &'static dyn Layout,
    /// Stored tensor with the packed bytes.
    pub packed: StoredId,
    /// Where the scales are.
    pub scales: ScaleSource,
    /// Stored tensor with the zero points.
    pub zero_points: Option<StoredId>,
}

/// Where the scales of a quantized matrix are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleSource {
    /// The layout carries them.
    Inside,
    /// In a stored tensor, as they are or as 1/scale.
    Stored {
        /// The stored tensor.
        id: StoredId,
        /// Whether it holds 1/scale.
        reciprocal: bool,
    },
}

impl Tensor {
    /// The stored tensors that it is made of.
    pub fn stored(&self) -> Vec<StoredId> {
        match &self.content {
            Content::Float(id) | Content::Opaque(id) => vec![*id],
            Content::Quantized(q) => {
                let scale = match q.scales {
                    ScaleSource::Stored { id, .. } => Some(id),
                    ScaleSource::Inside => None,
                };
                [Some(q.packed), scale, q.zero_points]
                    .into_iter()
                    .flatten()
                    .collect()
            }
        }
    }

    /// The first of them: floats, or packed values.
    pub fn first_stored(&self) -> StoredId {
        match &self.content {
            Content::Float(id) | Content::Opaque(id) => *id,
            Content::Quantized(q) => q.packed,
        }
    }

    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Rows and columns as a weight matrix sees them: the first dimension, and all others together.
    /// `None` below two dimensions.
    pub fn matrix_shape(&self) -> Option<(usize, usize)> {
        match self.shape.as_slice() {
            [rows, rest @ ..] if !rest.is_empty() => Some((*rows, rest.iter().product())),
            _ => None,
        }
    }
}
