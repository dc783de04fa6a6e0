//! How a tensor is a batch of weight matrices, and which way round they are stored.
//!
//! A matrix of N outputs and K inputs is `[N, K]` here, and torch's `Linear` stores it so.
//! transformers' `Conv1D` (GPT-2) stores `[K, N]`, and some models stack experts as `[E, K, N]`.
//! The sources of evidence, strongest first:
//!
//! | evidence | says |
//! |---|---|
//! | the recipe's `transposed` | which matrices are `[K, N]`; nothing else counts then |
//! | the document of a file that is packed so | which were |
//! | the bias, of N numbers | of matrices that are not square |
//! | stacked experts `[2·I, H]` and `[H, I]`, or `[H, 2·I]` and `[I, H]` | both, also square ones |
//! | of three stacked experts, the two alike; which dimension is the model's width | all three |
//! | the other matrices of the module | of what is left |
//! | `model_type` of a family of `Conv1D` | of what is left in the blocks |

use crate::recipe::role::{Sizes, block};
use bitnet_formats::{Content, Source, Tensor};
use globset::GlobMatcher;
use std::collections::{BTreeMap, BTreeSet};

/// Models whose blocks are made of transformers' Conv1D.
const CONV1D_MODELS: &[&str] = &["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];

/// A tensor as a batch of weight matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixForm {
    /// Rows of all matrices together: outputs.
    pub rows: usize,
    /// Columns: inputs.
    pub cols: usize,
    /// Whether the tensor has the inputs first: its last two dimensions are `[cols, outputs]`.
    pub transposed: bool,
}

/// Why a matrix is taken for `[in, out]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Evidence {
    Recipe,
    File,
    Bias,
    Experts,
    Width,
    Neighbours,
    Family,
}

impl Evidence {
    /// The evidence for people.
    const fn name(self) -> &'static str {
        match self {
            Self::Recipe => "the recipe",
            Self::File => "the file's document",
            Self::Bias => "their biases",
            Self::Experts => "the shapes of the experts",
            Self::Width => "the model's width",
            Self::Neighbours => "the other weights of their modules",
            Self::Family => "model_type",
        }
    }
}

/// The forms of the tensors of a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct Forms {
    transposed: BTreeMap<String, Evidence>,
    stacked: BTreeSet<String>,
    /// Sources that disagree, each a sentence.
    pub(crate) notes: Vec<String>,
}

impl Forms {
    /// The forms by what the checkpoint shows.
    pub fn new(source: &Source) -> Self {
        let sizes = source.config().map(Sizes::read).unwrap_or_default();
        let stacked: BTreeSet<String> = source
            .tensors()
            .iter()
            .filter(|t| is_stack_of_experts(t, &sizes))
            .map(|t| t.name.clone())
            .collect();
        let mut forms = Self {
            stacked,
            ..Self::default()
        };
        let mut modules = forms.modules(source);
        for ((_, batch), members) in &mut modules {
            by_bias(source, *batch, members);
            if *batch > 1 {
                forms.notes.extend(by_experts(members));
                by_width(source, members, &sizes.widths);
            }
            by_neighbours(members);
        }
        forms
            .notes
            .extend(by_family(source, modules.values_mut().flatten()));
        let found = modules.into_values().flatten();
        forms.transposed = found
            .filter_map(|m| match m.found {
                Some((true, evidence)) => Some((m.tensor.name.clone(), evidence)),
                _ => None,
            })
            .collect();
        let packed = source.tensors().iter().filter(|t| is_packed_transposed(t));
        forms
            .transposed
            .extend(packed.map(|t| (t.name.clone(), Evidence::File)));
        forms
    }

    /// The forms with exactly those matrices transposed that a glob matches.
    pub(crate) fn with_transposed(source: &Source, globs: &[GlobMatcher]) -> Self {
        let matches = |t: &&Tensor| globs.iter().any(|g| g.is_match(&t.name));
        let matrices = source.tensors().iter().filter(|t| t.shape.len() >= 2);
        Self {
            transposed: matrices
                .filter(matches)
                .map(|t| (t.name.clone(), Evidence::Recipe))
                .collect(),
            notes: vec![],
            ..Self::new(source)
        }
    }

    /// The form of a tensor; `None` below two dimensions.
    pub fn form(&self, tensor: &Tensor) -> Option<MatrixForm> {
        let transposed = self.transposed.contains_key(&tensor.name);
        match tensor.shape[..] {
            [ref batch @ .., cols, outputs] if transposed => Some(MatrixForm {
                rows: batch.iter().product::<usize>() * outputs,
                cols,
                transposed,
            }),
            [batch, rows, cols] if self.is_stack(&tensor.name) => Some(MatrixForm {
                rows: batch * rows,
                cols,
                transposed,
            }),
            [ref batch @ .., rows, cols] if is_packed_transposed(tensor) => Some(MatrixForm {
                rows: batch.iter().product::<usize>() * rows,
                cols,
                transposed,
            }),
            _ => tensor.matrix_shape().map(|(rows, cols)| MatrixForm {
                rows,
                cols,
                transposed,
            }),
        }
    }

    /// Whether a tensor is the weights of all experts of a layer, one matrix for each.
    pub(crate) fn is_stack(&self, name: &str) -> bool {
        self.stacked.contains(name)
    }

    /// How these tensors are known to be `[in, out]`: the evidence for people, with the number of
    /// tensors that rest on it.
    pub(crate) fn evidence<'n>(&self, names: impl Iterator<Item = &'n str>) -> String {
        let mut counts: BTreeMap<Evidence, usize> = BTreeMap::new();
        for evidence in names.filter_map(|name| self.transposed.get(name)) {
            *counts.entry(*evidence).or_default() += 1;
        }
        let parts = counts.iter().map(|(e, n)| match counts.len() {
            1 => format!("by {}", e.name()),
            _ => format!("{n} by {}", e.name()),
        });
        parts.collect::<Vec<_>>().join(", ")
    }

    /// The matrices of each module, by the module's name and the number of matrices in a tensor.
    fn modules<'a>(&self, source: &'a Source) -> BTreeMap<(&'a str, usize), Vec<Member<'a>>> {
        let mut modules: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for tensor in source.tensors() {
            let (batch, rows, cols) = match tensor.shape[..] {
                [rows, cols] => (1, rows, cols),
                [batch, rows, cols] if self.is_stack(&tensor.name) => (batch, rows, cols),
                _ => continue,
            };
            let member = Member {
                tensor,
                rows,
                cols,
                found: None,
            };
            let module = stem(&tensor.name).rsplit_once('.').map_or("", |(m, _)| m);
            modules.entry((module, batch)).or_default().push(member);
        }
        modules
    }
}

/// A matrix, or experts' matrices, of a module.
struct Member<'a> {
    tensor: &'a Tensor,
    /// The last two dimensions as they are stored.
    rows: usize,
    cols: usize,
    /// Whether it is `[in, out]`, and why.
    found: Option<(bool, Evidence)>,
}

/// Whether the file holds the transpose of a tensor.
fn is_packed_transposed(tensor: &Tensor) -> bool {
    matches!(&tensor.content, Content::Quantized(q) if q.transposed)
}

/// The name of a layer by that of its weight.
fn stem(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Whether a tensor is `[E, …, …]` with a matrix for each expert: by its name, or because it is in a
/// block and has as many matrices as config.json has experts.
pub(crate) fn is_stack_of_experts(tensor: &Tensor, sizes: &Sizes) -> bool {
    let [first, second, _] = tensor.shape[..] else {
        return false;
    };
    let counted = sizes.experts == Some(first) && second > 1 && !tensor.name.contains("conv");
    tensor.is_of_experts() || (counted && block(&tensor.name).is_some())
}

/// A bias has a number for each output.
fn by_bias(source: &Source, batch: usize, members: &mut [Member<'_>]) {
    for m in members.iter_mut().filter(|m| m.rows != m.cols) {
        let names = [
            format!("{}.bias", stem(&m.tensor.name)),
            format!("{}_bias", m.tensor.name),
        ];
        let bias = names.iter().find_map(|name| source.find(name));
        let outputs = match bias.map(|b| &b.shape[..]) {
            Some(&[n]) if batch == 1 => n,
            Some(&[experts, n]) if experts == batch => n,
            _ => continue,
        };
        if outputs == m.cols || outputs == m.rows {
            m.found = Some((outputs == m.cols, Evidence::Bias));
        }
    }
}

/// Whether gate and up in one tensor, and down, are `[in, out]`: the first has twice the outputs
/// that the second has inputs, and takes what the second gives. At most one order fits.
fn order_of_experts(gate_up: (usize, usize), down: (usize, usize)) -> Option<bool> {
    let plain = gate_up.1 == down.0 && gate_up.0 == 2 * down.1;
    let transposed = gate_up.0 == down.1 && gate_up.1 == 2 * down.0;
    (plain != transposed).then_some(transposed)
}

/// The one pair of stacked experts whose shapes fit together. Returns what contradicts it.
fn by_experts(members: &mut [Member<'_>]) -> Option<String> {
    let shapes: Vec<_> = members.iter().map(|m| (m.rows, m.cols)).collect();
    let count = shapes.len();
    let pairs = (0..count).flat_map(|i| (0..count).map(move |j| (i, j)));
    let mut fits = pairs.filter_map(|(i, j)| {
        let transposed = order_of_experts(shapes[i], shapes[j])?;
        Some([(i, transposed), (j, transposed)])
    });
    let pair = fits.next()?;
    if fits.next().is_some() {
        return None;
    }
    let mut note = None;
    for (i, transposed) in pair {
        let member = &mut members[i];
        match member.found {
            Some((bias, _)) if bias != transposed => {
                note = Some(format!(
                    "{}: its bias says [{}], the shapes of the other experts [{}]; the bias counts",
                    member.tensor.name,
                    order(bias),
                    order(transposed)
                ));
            }
            Some(_) => {}
            None => member.found = Some((transposed, Evidence::Experts)),
        }
    }
    note
}

const fn order(transposed: bool) -> &'static str {
    if transposed { "in, out" } else { "out, in" }
}

/// Gate, up and down apart: the two of one shape take the model's width as input. The width is in
/// config.json, or that of the router beside them.
fn by_width(source: &Source, members: &mut [Member<'_>], widths: &[usize]) {
    let [a, b, c] = members else { return };
    let shape = |m: &Member<'_>| (m.rows, m.cols);
    let up = if shape(a) == shape(b) || shape(a) == shape(c) {
        shape(a)
    } else {
        shape(b)
    };
    let alike = members.iter().filter(|m| (m.rows, m.cols) == up).count();
    let others = members.iter().filter(|m| (m.cols, m.rows) == up).count();
    if (alike, others) != (2, 1) {
        return;
    }
    let experts = members[0].tensor.shape[0];
    let part = block(&members[0].tensor.name);
    let router = source.tensors().iter().find(|t| {
        t.shape.len() == 2 && t.shape[0] == experts && part.is_some() && block(&t.name) == part
    });
    let is_width = |n: usize| router.map_or(widths.contains(&n), |router| router.shape[1] == n);
    let transposed = match (is_width(up.0), is_width(up.1)) {
        (true, false) => true,
        (false, true) => false,
        _ => return,
    };
    for member in members.iter_mut().filter(|m| m.found.is_none()) {
        member.found = Some((transposed, Evidence::Width));
    }
}

/// What is square, or has no bias, is stored as the other matrices of its module are.
fn by_neighbours(members: &mut [Member<'_>]) {
    let known: BTreeSet<bool> = members.iter().filter_map(|m| Some(m.found?.0)).collect();
    let (Some(&transposed), 1) = (known.first(), known.len()) else {
        return;
    };
    let unknown = members.iter_mut().filter(|m| m.found.is_none());
    for member in unknown.filter(|m| m.rows == m.cols || m.tensor.shape.len() > 2) {
        member.found = Some((transposed, Evidence::Neighbours));
    }
}

/// The matrices in the blocks of a family, where nothing in the file contradicts. Returns what does.
fn by_family<'m, 'a: 'm>(
    source: &Source,
    members: impl Iterator<Item = &'m mut Member<'a>>,
) -> Option<String> {
    let model_type = source.config()?["model_type"].as_str()?;
    if !CONV1D_MODELS.contains(&model_type) {
        return None;
    }
    let in_blocks =
        |m: &&mut Member<'_>| m.tensor.shape.len() == 2 && block(&m.tensor.name).is_some();
    let members: Vec<_> = members.filter(in_blocks).collect();
    let plain = |m: &&&mut Member<'_>| matches!(m.found, Some((false, Evidence::Bias)));
    if let Some(contrary) = members.iter().find(plain) {
        return Some(format!(
            "config.json says {model_type}, whose weights transformers stores [in, out], but the \
             bias of {} shows [out, in]: only weights that their biases show are taken for [in, out]",
            contrary.tensor.name
        ));
    }
    for member in members.into_iter().filter(|m| m.found.is_none()) {
        member.found = Some((true, Evidence::Family));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_of_experts_fit_together_in_one_order() {
        // H, I: H ≠ 2·I, H = 2·I, H = I.
        for (h, i) in [(64, 96), (64, 32), (64, 64), (2880, 2880)] {
            for transposed in [false, true] {
                let turn = |(a, b): (usize, usize)| if transposed { (b, a) } else { (a, b) };
                let (gate_up, down) = (turn((2 * i, h)), turn((h, i)));
                assert_eq!(order_of_experts(gate_up, down), Some(transposed), "{h} {i}");
                assert_eq!(order_of_experts(down, gate_up), None, "{h} {i}");
            }
        }
        assert_eq!(order_of_experts((96, 64), (64, 96)), None);
    }
}
