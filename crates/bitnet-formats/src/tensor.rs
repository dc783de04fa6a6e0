//! Tensors: as they are stored in files, and as the model has them.

use crate::dtype::StoredType;
use crate::gguf::GgmlType;
use crate::strided::Strided;
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
    /// How its bytes lie in the file.
    pub(crate) access: Access,
}

/// How the bytes of a stored tensor lie in its file. Whatever it is, they are read row-major and
/// little-endian.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Access {
    /// As they are read.
    AsRead,
    /// Big-endian numbers of this type.
    BigEndian(GgmlType),
    /// A view with strides.
    Strided(Strided),
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
    /// Whether the tensor's shape is `[…, K, N]`: each matrix of it is the transpose of the packed
    /// one.
    pub transposed: bool,
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

    /// Rows and columns as a weight matrix sees them; `None` below two dimensions.
    ///
    /// Three dimensions `[E, N, K]`, e.g. stacked experts, are a batch of E matrices: E·N rows of K.
    /// Of a convolution `[O, I, …]` a row is all that makes one output: O rows.
    /// A packed matrix that is the transpose of the tensor has the rows and columns of its spec.
    pub fn matrix_shape(&self) -> Option<(usize, usize)> {
        if let Content::Quantized(q) = &self.content
            && q.transposed
        {
            return Some((q.spec.rows, q.spec.cols));
        }
        match self.shape.as_slice() {
            &[batch, rows, cols] if !self.is_convolution() => Some((batch * rows, cols)),
            [rows, rest @ ..] if !rest.is_empty() => Some((*rows, rest.iter().product())),
            _ => None,
        }
    }

    /// Whether the name is that of a parameter of experts: `….experts.…` or `…_exps.…`.
    pub fn is_of_experts(&self) -> bool {
        let mut parts = self.name.split('.');
        parts.any(|part| part == "experts" || part.ends_with("_exps"))
    }

    /// Whether a tensor of three or more dimensions ends in those of a kernel: more than three
    /// dimensions, or no experts and a last one below [`LARGEST_KERNEL`], one input for each
    /// output, or a name that says it.
    fn is_convolution(&self) -> bool {
        match self.shape[..] {
            [_, inputs, kernel] => {
                let small = kernel < LARGEST_KERNEL || inputs == 1;
                !self.is_of_experts() && (small || self.name.contains("conv"))
            }
            _ => self.shape.len() > 3,
        }
    }
}

/// Below this, the last of three dimensions is the size of a kernel and not the inputs of a matrix.
const LARGEST_KERNEL: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_a_batch_and_convolutions_are_not() {
        for (name, shape, expected) in [
            ("a.weight", &[4, 8][..], Some((4, 8))),
            ("mlp.experts.down_proj", &[8, 64, 128], Some((512, 128))),
            ("mlp.experts.down_proj", &[8, 64, 16], Some((512, 16))),
            ("blk.0.ffn_up_exps.weight", &[8, 16, 4], Some((128, 4))),
            ("mixer.conv1d.weight", &[64, 1, 4], Some((64, 4))),
            (
                "pos_conv_embed.conv.weight",
                &[768, 48, 128],
                Some((768, 48 * 128)),
            ),
            ("patch_embed.proj.weight", &[32, 3, 4, 4], Some((32, 48))),
            ("a.bias", &[4], None),
        ] {
            let content = Content::Float(StoredId(0));
            let tensor = Tensor {
                name: name.into(),
                shape: shape.to_vec(),
                content,
            };
            assert_eq!(tensor.matrix_shape(), expected, "{name}");
        }
    }
}
