//! Experts, which have other tensors in the other container: a GGUF stacks each projection of a
//! layer's experts in one tensor; folders have a tensor for each expert, or gate and up in one
//! stack. transformers reads both folders, and each expert apart is what it writes.

use super::{Builder, Naming};
use crate::recipe::Format;
use crate::rows::RowOrder;
use crate::{Error, Result};
use bitnet_formats::arch::{Architecture, ExpertTensor};
use bitnet_formats::{Content, Source, Tensor, TensorId};

/// An output that is some rows of a tensor, several tensors behind one another, or a tensor of
/// another shape.
#[derive(Debug, Clone)]
pub(super) struct Reshaped {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// The rows of the tensor.
    pub(super) rows: Option<RowOrder>,
    /// The tensors that follow the first.
    joined: Vec<TensorId>,
}

impl Reshaped {
    fn new(name: String, shape: Vec<usize>) -> Self {
        Self {
            name,
            shape,
            rows: None,
            joined: vec![],
        }
    }

    /// Rows of all matrices together.
    pub(super) fn matrix_rows(&self) -> usize {
        let outer = self.shape.split_last().map_or(&[][..], |(_, outer)| outer);
        outer.iter().product()
    }
}

/// The outputs of a tensor.
enum Outputs {
    /// One, with the shape that the tensor has.
    Same,
    /// These; none for a tensor that follows another in that one's output.
    Reshaped(Vec<Reshaped>),
}

impl Builder<'_> {
    /// Calls `plan` for each output of a tensor.
    pub(super) fn for_each_output(
        &mut self,
        index: TensorId,
        mut plan: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let outputs = match self.outputs(index)? {
            Outputs::Same => return plan(self),
            Outputs::Reshaped(outputs) => outputs,
        };
        let tensor = self.source.tensor(index);
        let moved = |output: &Reshaped| output.rows.is_some() || !output.joined.is_empty();
        if outputs.iter().any(moved) && self.is_rotated(tensor)? {
            let expected = "experts in their original basis, since they are split or joined here; \
                            'bitnet convert --unrotate' undoes a rotation within a container";
            let path = self.path(tensor);
            let got = "ones in a rotated basis";
            return Err(bitnet_formats::Error::tensor(&path, &tensor.name, expected, got).into());
        }
        for output in outputs {
            self.reshaped = Some(output);
            let planned = plan(self);
            self.reshaped = None;
            planned?;
        }
        Ok(())
    }

    /// The shape of the output of a tensor.
    pub(super) fn shape(&self, tensor: &Tensor) -> Vec<usize> {
        let shape = self.reshaped.as_ref().map(|output| &output.shape);
        shape.unwrap_or(&tensor.shape).clone()
    }

    /// The tensors that follow the planned one in its output.
    pub(super) fn joined(&self) -> &[TensorId] {
        self.reshaped.as_ref().map_or(&[], |output| &output.joined)
    }

    /// Refuses tensors that follow another one but are not treated `alike`.
    pub(super) fn check_joined(
        &self,
        first: &Tensor,
        alike: impl Fn(&Tensor) -> bool,
    ) -> Result<()> {
        let others = self.joined().iter().map(|&id| self.source.tensor(id));
        match others.into_iter().find(|&other| !alike(other)) {
            None => Ok(()),
            Some(other) => Err(Error::Recipe(format!(
                "'{}' and '{}' are one tensor in a GGUF, and the rules treat them differently; \
                 give them the same rule",
                first.name, other.name
            ))),
        }
    }

    fn outputs(&self, index: TensorId) -> Result<Outputs> {
        let (source, tensor) = (self.source, self.source.tensor(index));
        let (architecture, to_gguf) = match self.naming {
            Naming::ToGguf(architecture, _) => (architecture, true),
            Naming::ToHf(architecture, _) => (architecture, false),
            Naming::Same => return Ok(Outputs::Same),
        };
        if architecture.experts.is_none() {
            return Ok(Outputs::Same);
        }
        let reshaped = |name, shape| Ok(Outputs::Reshaped(vec![Reshaped::new(name, shape)]));
        if !to_gguf {
            let name = architecture.hf_tensor(&tensor.name);
            return match (name, &tensor.shape[..]) {
                (Some(name), &[hidden]) if name.ends_with(SHARED_GATE) => {
                    reshaped(name, vec![1, hidden])
                }
                // MLX has the stacks of a GGUF.
                _ if self.format == Format::Mlx => Ok(Outputs::Same),
                _ => Ok(split(architecture, tensor)),
            };
        }
        match (architecture.gguf_experts(&tensor.name), &tensor.shape[..]) {
            (Some(ExpertTensor::Down(name)), _) => reshaped(name, tensor.shape.clone()),
            (Some(ExpertTensor::GateUp(names)), &[count, both, cols]) if both % 2 == 0 => {
                let half = both / 2;
                let part = |(name, first)| Reshaped {
                    rows: Some(RowOrder::Runs {
                        first,
                        len: half,
                        stride: both,
                        count,
                    }),
                    ..Reshaped::new(name, vec![count, half, cols])
                };
                let parts = names.into_iter().zip([0, half]).map(part);
                Ok(Outputs::Reshaped(parts.collect()))
            }
            (Some(ExpertTensor::One { stack, expert: 0 }), &[rows, cols]) => {
                let joined = joined(source, tensor)?;
                Ok(Outputs::Reshaped(vec![Reshaped {
                    joined: joined.clone(),
                    ..Reshaped::new(stack, vec![joined.len() + 1, rows, cols])
                }]))
            }
            (Some(ExpertTensor::One { .. }), &[_, _]) => {
                // The first one says it if one is missing.
                let first = numbered(&tensor.name)
                    .map(|(before, _, after)| format!("{before}.experts.0.{after}"));
                match first.is_some_and(|first| source.find(&first).is_some()) {
                    true => Ok(Outputs::Reshaped(vec![])),
                    false => Err(missing(source, tensor, 0)),
                }
            }
            (None, &[1, hidden]) if tensor.name.ends_with(SHARED_GATE) => {
                let name = architecture.gguf_tensor(&tensor.name);
                name.map_or(Ok(Outputs::Same), |name| reshaped(name, vec![hidden]))
            }
            _ => Ok(Outputs::Same),
        }
    }
}

/// The gate of the shared expert: a matrix of one row in a folder, a vector in a GGUF.
const SHARED_GATE: &str = "mlp.shared_expert_gate.weight";

/// A tensor for each expert of a stack in a GGUF.
fn split(architecture: &Architecture, tensor: &Tensor) -> Outputs {
    let experts = architecture.hf_experts(&tensor.name);
    let (Some((module, of)), &[count, rows, cols]) = (experts, &tensor.shape[..]) else {
        return Outputs::Same;
    };
    let expert = |i: usize| Reshaped {
        rows: Some(RowOrder::run(i * rows, rows)),
        ..Reshaped::new(format!("{module}.{i}.{of}"), vec![rows, cols])
    };
    Outputs::Reshaped((0..count).map(expert).collect())
}

/// The parts of the name of a numbered expert: before `.experts.`, number and rest.
fn numbered(name: &str) -> Option<(&str, usize, &str)> {
    let (before, rest) = name.split_once(".experts.")?;
    let (number, after) = rest.split_once('.')?;
    Some((before, number.parse().ok()?, after))
}

/// The experts that follow the first, each with the first's shape and type.
fn joined(source: &Source, first: &Tensor) -> Result<Vec<TensorId>> {
    let Some((before, _, after)) = numbered(&first.name) else {
        return Ok(vec![]);
    };
    let same = |t: &&Tensor| numbered(&t.name).is_some_and(|(a, _, b)| (a, b) == (before, after));
    let count = source.tensors().iter().filter(same).count();
    let mut all = vec![];
    for i in 1..count {
        let id = source.find_id(&format!("{before}.experts.{i}.{after}"));
        let id = id.ok_or_else(|| missing(source, first, i))?;
        let other = source.tensor(id);
        let kind = |tensor: &Tensor| match &tensor.content {
            Content::Float(id) | Content::Opaque(id) => {
                format!("{} {:?}", source.stored(*id).dtype, tensor.shape)
            }
            Content::Quantized(q) => {
                let spec = &q.spec;
                let (precision, granularity) = (spec.precision, spec.granularity);
                format!(
                    "{precision} {granularity} {:?} in {}",
                    tensor.shape,
                    q.layout.name()
                )
            }
        };
        if kind(first) != kind(other) {
            let expected = format!("{}, as the first expert has", kind(first));
            let path = source.file_of_tensor(other);
            let got = kind(other);
            return Err(bitnet_formats::Error::tensor(path, &other.name, expected, got).into());
        }
        all.push(id);
    }
    Ok(all)
}

fn missing(source: &Source, near: &Tensor, expert: usize) -> Error {
    let expected = format!("an expert {expert}, as all are one tensor in a GGUF");
    let path = source.file_of_tensor(near);
    bitnet_formats::Error::tensor(path, &near.name, expected, "none").into()
}
