//! Error between two checkpoints of the same model, tensor by tensor.

use crate::job::Progress;
use crate::rows::{OutputOrder, RowOrder, in_parallel, strip_rows, windows, with_original_rows};
use crate::{Error, Result};
use bitnet_core::stats::{CodeHistogram, ErrorStats};
use bitnet_formats::arch::{self, Architecture, ExpertTensor, HeadCounts};
use bitnet_formats::{Content, Kind, Source, Tensor};
use bitnet_kernels::Kernels;

/// Comparison of one pair of tensors.
#[derive(Debug, Clone)]
pub struct TensorComparison {
    /// Name in the original.
    pub name: String,
    /// Layout or element type in the second checkpoint.
    pub stored_as: String,
    /// Whether the second checkpoint holds low-bit values.
    pub quantized: bool,
    /// Error sums.
    pub error: ErrorStats,
    /// Order-0 entropy of the values in bits, if they are low-bit values.
    pub entropy: Option<f64>,
    /// Bytes in the second checkpoint, scales and padding included.
    pub bytes: u64,
}

/// Comparison of two checkpoints.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Every tensor of the original that holds weights, in its order.
    pub tensors: Vec<TensorComparison>,
}

impl TensorComparison {
    /// Bits per weight in the second checkpoint.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.error.count.max(1) as f64
    }
}

impl Comparison {
    /// Error sums over all tensors, or over those that are quantized.
    pub fn total(&self, only_quantized: Scope) -> ErrorStats {
        self.scoped(only_quantized)
            .fold(ErrorStats::default(), |sum, t| sum.merge(t.error))
    }

    /// Bits per weight over all tensors, or over those that are quantized.
    pub fn bits_per_weight(&self, scope: Scope) -> f64 {
        let bytes: u64 = self.scoped(scope).map(|t| t.bytes).sum();
        bytes as f64 * 8.0 / self.total(scope).count.max(1) as f64
    }

    fn scoped(&self, scope: Scope) -> impl Iterator<Item = &TensorComparison> {
        self.tensors
            .iter()
            .filter(move |t| scope == Scope::All || t.quantized)
    }
}

/// The tensors of a total.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All tensors.
    All,
    /// The tensors with low-bit values.
    Quantized,
}

/// Compares every float or quantized tensor of `original` with its counterpart in `quantized`.
///
/// Tensors are paired by name; between a Hugging Face folder and a GGUF by the names and the row
/// order of the architecture. What one of them stores in a rotated basis is turned back first.
///
/// # Errors
/// [`Error::Mismatch`] for a tensor that is missing or has another shape, [`Error::File`] for what
/// cannot be read.
pub fn compare(
    original: &Source,
    quantized: &Source,
    progress: &dyn Progress,
) -> Result<Comparison> {
    original.refuse_undecoded()?;
    quantized.refuse_undecoded()?;
    let pairing = TensorPairs::new(original, quantized)?;
    let kernels = Kernels::detect();
    let mut tensors = vec![];
    for tensor in original
        .tensors()
        .iter()
        .filter(|t| !matches!(t.content, Content::Opaque(_)))
    {
        progress.tensor(&tensor.name);
        let Some(Paired {
            tensor: other,
            order,
            shape,
            element,
        }) = pairing.find(tensor)?
        else {
            continue;
        };
        // One of several experts.
        let got = match order {
            Some(OutputOrder::Rows(RowOrder::Runs { .. })) => &other.shape[1..],
            _ => &other.shape[..],
        };
        if shape != got && shape[..] != [&[1], got].concat() {
            let what = format!(
                "tensor '{}': expected shape {shape:?}, got {:?}",
                other.name, other.shape
            );
            return Err(Error::Mismatch {
                path: quantized.path().to_path_buf(),
                what,
            });
        }
        let error = with_original_rows(original, tensor, None, kernels, |a| {
            with_original_rows(quantized, other, order.as_ref(), kernels, |b| {
                // Rows of blocks may be shorter than those of the matrix: go by the longer, which
                // holds whole ones of both.
                let cols = a.cols.max(b.cols).max(1);
                let (a, b) = (a.reshaped(cols), b.reshaped(cols));
                let mut error = ErrorStats::default();
                for window in windows(a.count, strip_rows(cols)) {
                    let parts = in_parallel(window.len(), |i, scratch| -> Result<ErrorStats> {
                        let range = window[i].clone();
                        a.read(range.clone(), &mut scratch.bytes, &mut scratch.weights)?;
                        b.read(range, &mut scratch.bytes, &mut scratch.back)?;
                        scratch.back.iter_mut().for_each(|w| *w = element(*w));
                        Ok(ErrorStats::measure(&scratch.weights, &scratch.back))
                    });
                    for part in parts {
                        error = error.merge(part?);
                    }
                }
                Ok(error)
            })
        })?;
        let (stored_as, entropy) = match &other.content {
            Content::Quantized(q) => {
                let matrix = quantized.matrix(&other.name, q)?;
                let mut histogram = CodeHistogram::default();
                histogram.add(&matrix.values);
                (q.layout.name().to_string(), Some(histogram.entropy_bits()))
            }
            Content::Float(i) | Content::Opaque(i) => {
                (quantized.stored(*i).dtype.to_string(), None)
            }
        };
        progress.advance(original.bytes_of(tensor));
        tensors.push(TensorComparison {
            name: tensor.name.clone(),
            stored_as,
            quantized: entropy.is_some(),
            error,
            entropy,
            bytes: quantized.bytes_of(other),
        });
    }
    Ok(Comparison { tensors })
}

/// Pairs the tensors of two checkpoints by name.
struct TensorPairs<'a> {
    original: &'a Source,
    quantized: &'a Source,
    /// Architecture and heads, if one is a GGUF with ggml's names and the other is not.
    model: Option<(&'static Architecture, HeadCounts)>,
}

/// The counterpart of a tensor.
struct Paired<'a> {
    tensor: &'a Tensor,
    /// For each row or column of the original that of the counterpart.
    order: Option<OutputOrder>,
    /// The shape of the counterpart.
    shape: Vec<usize>,
    /// An element of the original, from that of the counterpart.
    element: Box<dyn Fn(f32) -> f32 + Sync>,
}

impl<'a> TensorPairs<'a> {
    fn new(original: &'a Source, quantized: &'a Source) -> Result<Self> {
        let ggml_names = |s: &Source| s.tensors().iter().any(|t| t.name.starts_with("blk."));
        let mut model = None;
        if ggml_names(original) != ggml_names(quantized) {
            let gguf = [original, quantized]
                .into_iter()
                .find(|s| s.kind() == Kind::Gguf);
            let Some(gguf) = gguf else {
                let what = "expected the original's tensor names, got those of a GGUF".to_string();
                return Err(Error::Mismatch {
                    path: quantized.path().to_path_buf(),
                    what,
                });
            };
            model = Some((
                Architecture::from_gguf(gguf.gguf())?,
                HeadCounts::from_gguf(gguf.gguf())?,
            ));
        }
        Ok(Self {
            original,
            quantized,
            model,
        })
    }

    /// The counterpart of a tensor. `None` for buffers that the other side derives.
    fn find(&self, tensor: &Tensor) -> Result<Option<Paired<'a>>> {
        let mut name = Some(tensor.name.clone());
        let (mut order, mut shape) = (None, tensor.shape.clone());
        let mut element: Box<dyn Fn(f32) -> f32 + Sync> = Box::new(|w| w);
        if let Some((architecture, heads)) = self.model {
            if arch::is_rope_tensor(&tensor.name) || architecture.ignores(&tensor.name) {
                return Ok(None);
            }
            if self.original.kind() == Kind::Gguf {
                name = architecture.hf_tensor(&tensor.name);
                if let Some(hf) = &name {
                    shape = architecture.hf_shape(hf, &tensor.shape);
                    order = architecture.gguf_order(heads, hf, &shape)?.map(Into::into);
                    let form = architecture.gguf_elements(hf);
                    element = Box::new(move |w| form.to_gguf(w));
                }
            } else {
                name = architecture.gguf_tensor(&tensor.name);
                shape = architecture.gguf_shape(&tensor.name, &tensor.shape);
                order = architecture
                    .hf_order(heads, &tensor.name, &shape)?
                    .map(Into::into);
                match architecture.gguf_experts(&tensor.name) {
                    Some(ExpertTensor::One { stack, expert }) => {
                        let rows = tensor.shape.first().copied().unwrap_or(0);
                        order = Some(OutputOrder::Rows(RowOrder::run(expert * rows, rows)));
                        name = Some(stack);
                    }
                    Some(ExpertTensor::Down(stack)) => name = Some(stack),
                    Some(ExpertTensor::GateUp(_)) | None => {}
                }
                let form = architecture.gguf_elements(&tensor.name);
                element = Box::new(move |w| form.to_hf(w));
            }
        }
        match name.as_deref().and_then(|name| self.quantized.find(name)) {
            Some(other) => Ok(Some(Paired {
                tensor: other,
                order,
                shape,
                element,
            })),
            None => {
                let what = format!(
                    "expected a tensor '{}', got none",
                    name.unwrap_or_else(|| tensor.name.clone())
                );
                Err(Error::Mismatch {
                    path: self.quantized.path().to_path_buf(),
                    what,
                })
            }
        }
    }
}
