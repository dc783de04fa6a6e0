//! Lists the tensors of a checkpoint with their real bits per weight, and finds suspicious ones.

use crate::Result;
use crate::forms::{Forms, MatrixForm};
use crate::rows::{in_parallel, strip_rows, windows, with_rows};
use bitnet_core::ops::{Moments, Ops};
use bitnet_core::pack::Layout;
use bitnet_core::{Granularity, MatrixSpec, Precision, ScaleDtype, pack};
use bitnet_formats::arch::ROTATION_PREFIX;
use bitnet_formats::hf::{Verdict, judge_scales};
use bitnet_formats::{Content, Kind, Source, StoredType, Tensor};
use bitnet_kernels::Kernels;
use std::collections::{BTreeMap, BTreeSet};

const LLAMA_CPP: &str = "llama.cpp";

/// One tensor of a checkpoint.
#[derive(Debug, Clone)]
pub struct TensorSummary {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Element type, or wire layout.
    pub stored_as: String,
    /// Alphabet, granularity and planes, if it is quantized.
    pub spec: Option<MatrixSpec>,
    /// Whether the packed matrix is the transpose of the tensor.
    pub transposed: bool,
    /// Bytes in the file, scales and padding included.
    pub bytes: u64,
}

/// A suspicious property of a tensor, or a note for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The tensor.
    pub tensor: String,
    /// Short name of the check.
    pub check: &'static str,
    /// The observation.
    pub what: String,
}

impl TensorSummary {
    /// Number of weights.
    pub fn weights(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }

    /// Bits per weight, scales and padding included.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.weights().max(1) as f64
    }
}

/// Lists every tensor; reads no weights.
pub fn tensors(source: &Source) -> Vec<TensorSummary> {
    source
        .tensors()
        .iter()
        .map(|tensor| {
            let (stored_as, spec) = match &tensor.content {
                Content::Quantized(q) => (q.layout.name().to_string(), Some(q.spec.clone())),
                Content::Float(i) | Content::Opaque(i) => {
                    (source.stored(*i).dtype.to_string(), None)
                }
            };
            TensorSummary {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                stored_as,
                spec,
                transposed: matches!(&tensor.content, Content::Quantized(q) if q.transposed),
                bytes: source.bytes_of(tensor),
            }
        })
        .collect()
}

/// The programs that open a GGUF, by the types of its tensors: each with the types that only it
/// reads, or llama.cpp alone where no type is of a fork. Empty for other files.
pub fn opened_by(source: &Source) -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let mut programs: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    if source.kind() != Kind::Gguf {
        return programs;
    }
    for stored in source.stored_tensors() {
        if let Some(ggml_type) = stored.dtype.to_ggml() {
            let types = programs.entry(ggml_type.opened_by()).or_default();
            types.insert(ggml_type.name());
        }
    }
    if programs.len() > 1 {
        programs.remove(LLAMA_CPP);
    }
    programs
}

/// Reads all weights and reports suspicious tensors. The checks are `dead`, `not-finite`,
/// `rotation` (a basis that other programs do not read), `already-ternary`, `already-quantized`, `corrupt` (e.g. code 3), `scale` (convention against
/// numbers), `k` (columns that block layouts do not divide) and `tied` (a head that config.json
/// ties to another embedding).
///
/// # Errors
/// [`crate::Error::File`] for what cannot be read.
pub fn lint(source: &Source, kernels: Kernels) -> Result<Vec<Finding>> {
    let mut findings = vec![];
    let forms = Forms::new(source);
    if let Some(finding) = rotation(source) {
        findings.push(finding);
    }
    for tensor in source.tensors() {
        let mut find = |check, what: String| {
            findings.push(Finding {
                tensor: tensor.name.clone(),
                check,
                what,
            })
        };
        match &tensor.content {
            Content::Opaque(stored) => {
                if let StoredType::Foreign(foreign) = source.stored(*stored).dtype {
                    find(
                        "already-quantized",
                        format!("stored as {foreign}: not read"),
                    );
                }
            }
            Content::Quantized(q) => match source.matrix(&tensor.name, q) {
                Err(error) => find("corrupt", error.to_string()),
                Ok(matrix) => {
                    if matrix.scales.iter().all(|&s| s == 0.0)
                        || (matrix.zero_points.is_empty() && matrix.values.iter().all(|&v| v == 0))
                    {
                        find("dead", "every weight is 0".into());
                    }
                    if matrix.spec.precision == Precision::Ternary
                        && matrix.spec.granularity == Granularity::Tensor
                        && let Verdict::Contradiction { gain, other } =
                            judge_scales(&[(matrix.scales[0].abs(), matrix.spec.cols)])
                    {
                        find(
                            "scale",
                            format!(
                                "the layer amplifies {gain:.3e} times, with the inverse scale {other:.3}: is it 1/scale?"
                            ),
                        );
                    }
                }
            },
            Content::Float(stored) => {
                let dtype = source.stored(*stored).dtype;
                if dtype.block() > 1 || matches!(dtype, StoredType::Foreign(_)) {
                    find(
                        "already-quantized",
                        format!("stored as {dtype}: quantizing it again adds to the error it has"),
                    );
                }
                lint_floats(source, tensor, forms.form(tensor), kernels, &mut find)?;
            }
        }
    }
    if source.untied_head() {
        findings.push(Finding {
            tensor: "lm_head.weight".into(),
            check: "tied",
            what: "tie_word_embeddings in config.json is true, but this tensor differs from \
                   model.embed_tokens.weight: transformers before 5 uses the embedding in its place"
                .into(),
        });
    }
    Ok(findings)
}

/// Matrices in a rotated basis, or why what the file says of one is not understood.
fn rotation(source: &Source) -> Option<Finding> {
    let what = match source.rotation() {
        Ok(rotation) => rotation?.note(),
        Err(error) => format!("{error}: the model can be listed only"),
    };
    Some(Finding {
        tensor: ROTATION_PREFIX.into(),
        check: "rotation",
        what,
    })
}

fn lint_floats(
    source: &Source,
    tensor: &Tensor,
    form: Option<MatrixForm>,
    kernels: Kernels,
    find: &mut dyn FnMut(&'static str, String),
) -> Result<()> {
    let (all, ternary_rows, rows) = with_rows(source, tensor, None, |rows| {
        let rows = match form {
            Some(form) => rows.in_form(form),
            None => rows.reshaped(rows.cols),
        };
        let mut all = Moments::EMPTY;
        let mut ternary_rows = 0;
        for window in windows(rows.count, strip_rows(rows.cols)) {
            let parts = in_parallel(window.len(), |i, scratch| -> Result<(Moments, usize)> {
                rows.read(window[i].clone(), &mut scratch.bytes, &mut scratch.weights)?;
                let mut part = (Moments::EMPTY, 0);
                for row in scratch.weights.chunks(rows.cols.max(1)) {
                    let moments = kernels.moments(row);
                    let ternary = moments.ternary_magnitude().is_some() || moments.max_abs() == 0.0;
                    part = (part.0.merge(moments), part.1 + usize::from(ternary));
                }
                Ok(part)
            });
            for part in parts {
                let part = part?;
                all = all.merge(part.0);
                ternary_rows += part.1;
            }
        }
        Ok((all, ternary_rows, rows.count))
    })?;
    let Some(MatrixForm { cols, .. }) = form else {
        if !all.finite {
            find("not-finite", "NaN or infinity".into());
        }
        return Ok(());
    };
    if !all.finite {
        find(
            "not-finite",
            "NaN or infinity: it cannot be quantized".into(),
        );
    } else if all.count > 0 && all.max_abs() == 0.0 {
        find("dead", "every weight is 0".into());
    } else if let Some(s) = all.ternary_magnitude() {
        find(
            "already-ternary",
            format!("every weight is -{s}, 0 or {s}: quantizing keeps codes and scale"),
        );
    } else if rows > 1 && cols > 2 && ternary_rows == rows {
        find("already-ternary", "each row has one magnitude: quantize with granularity channel to keep codes and scales".into());
    }
    if tensor.shape.len() == 2 {
        let refused: Vec<&str> = pack::layouts()
            .iter()
            .filter(|l| l.stores_scales() && !fits(**l, cols))
            .map(|l| l.name())
            .collect();
        if !refused.is_empty() {
            find(
                "k",
                format!(
                    "{cols} columns do not divide into the blocks of {}",
                    refused.join(", ")
                ),
            );
        }
    }
    Ok(())
}

/// Whether a block layout takes rows of that many columns, with any scheme.
fn fits(layout: &dyn Layout, cols: usize) -> bool {
    Precision::ALL.iter().any(|&precision| {
        ScaleDtype::ALL.iter().any(|&dtype| {
            let spec = MatrixSpec {
                scale_dtype: dtype,
                ..MatrixSpec::new(4, cols, precision, Granularity::Tensor)
            };
            layout.check(&spec).is_ok()
        })
    })
}
