//! Weights that stay floats by default because of what they are: by shape and config.json, since
//! families give embeddings, heads and routers many names.

use crate::forms::is_stack_of_experts;
use bitnet_formats::{Source, Tensor};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};

/// What a matrix is, if it is no ordinary linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// Embedding or output head: one of its dimensions is the vocabulary.
    Vocabulary,
    /// Position embedding: a row for each position.
    Position,
    /// Output of a classifier: a row for each label.
    Classifier,
    /// Router of a mixture of experts: at most a row for each expert.
    Router,
    /// Relative positions: a row for each bucket, a column for each head.
    RelativePosition,
}

impl Role {
    /// The role for people, in the plural.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Vocabulary => "embeddings and heads",
            Self::Position => "position embeddings",
            Self::Classifier => "classifiers",
            Self::Router => "routers",
            Self::RelativePosition => "relative positions",
        }
    }
}

/// The sizes that roles are known by.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    vocabulary: Vec<usize>,
    positions: Vec<usize>,
    labels: Option<usize>,
    buckets: Option<usize>,
    pub(crate) experts: Option<usize>,
    /// Inputs and outputs of blocks.
    pub(crate) widths: Vec<usize>,
}

impl Sizes {
    pub(crate) fn read(config: &Value) -> Self {
        let mut sizes = Self::default();
        sizes.collect(config);
        let classifies = config["architectures"][0]
            .as_str()
            .is_some_and(|a| a.contains("Classification") || a.contains("RewardModel"));
        if sizes.labels.is_none() && classifies {
            // transformers writes labels only where there are not two of them.
            sizes.labels = Some(2);
        }
        sizes
    }

    /// Reads the sizes of a config and of the configs in it, e.g. text_config.
    fn collect(&mut self, config: &Value) {
        for (key, value) in config.as_object().into_iter().flatten() {
            let size = value.as_u64().map(|n| n as usize).filter(|&n| n > 0);
            match (key.as_str(), size) {
                ("num_labels", Some(n)) => self.labels = Some(n),
                ("relative_attention_num_buckets", Some(n)) => self.buckets = Some(n),
                (
                    "num_local_experts" | "num_experts" | "n_routed_experts" | "moe_num_experts"
                    | "num_routed_experts" | "ffn_num_experts",
                    Some(n),
                ) => self.experts = Some(n),
                (
                    "n_positions"
                    | "n_ctx"
                    | "max_position_embeddings"
                    | "max_source_positions"
                    | "max_target_positions"
                    | "max_sequence_length",
                    Some(n),
                ) => self.positions.push(n),
                ("hidden_size" | "d_model" | "n_embd", Some(n)) => self.widths.push(n),
                (key, Some(n)) if key.ends_with("vocab_size") => self.vocabulary.push(n),
                ("id2label", _) => self.labels = value.as_object().map(|labels| labels.len()),
                _ if value.is_object() => self.collect(value),
                _ => {}
            }
        }
    }
}

/// The matrices of a checkpoint that have a role.
pub(crate) fn roles(source: &Source) -> HashMap<String, Role> {
    let mut sizes = source.config().map(Sizes::read).unwrap_or_default();
    if sizes.vocabulary.is_empty() {
        sizes.vocabulary.extend(largest_rows(source.tensors()));
    }
    let experts = experts(source.tensors(), &sizes);
    let mut roles = HashMap::new();
    for tensor in source.tensors() {
        let [rows, cols] = tensor.shape[..] else {
            continue;
        };
        let role = match block(&tensor.name) {
            Some(block) => block_role(tensor, rows, cols, &sizes, experts.get(block)),
            None => model_role(rows, cols, &sizes),
        };
        roles.extend(role.map(|role| (tensor.name.clone(), role)));
    }
    roles
}

/// The role of a matrix that the model has once.
fn model_role(rows: usize, cols: usize, sizes: &Sizes) -> Option<Role> {
    if sizes.vocabulary.contains(&rows) || sizes.vocabulary.contains(&cols) {
        Some(Role::Vocabulary)
    } else if sizes.positions.contains(&rows) {
        Some(Role::Position)
    } else if sizes.labels == Some(rows) {
        Some(Role::Classifier)
    } else {
        None
    }
}

/// The role of a matrix that each block has; `experts` of the part of the block it is in.
fn block_role(
    tensor: &Tensor,
    rows: usize,
    cols: usize,
    sizes: &Sizes,
    experts: Option<&usize>,
) -> Option<Role> {
    let name = tensor.name.as_str();
    let table = sizes.buckets == Some(rows) && cols < rows;
    if table || name.contains("relative_attention_bias") || name.contains("relative_position") {
        return Some(Role::RelativePosition);
    }
    // `mlp.router.weight` beside `mlp.experts.…`; in a shared expert only the exact number counts.
    let depth = name.strip_prefix(block(name)?)?.matches('.').count();
    let &experts = experts?;
    let beside = depth == 2 && rows <= experts;
    (!tensor.is_of_experts() && (beside || rows == experts)).then_some(Role::Router)
}

/// The part of a block that a tensor is in: `model.layers.0.mlp` of `model.layers.0.mlp.gate.weight`.
/// `None` for a tensor that is in no block.
pub(crate) fn block(name: &str) -> Option<&str> {
    let mut end = 0;
    let mut parts = name.split('.');
    for part in parts.by_ref() {
        end += part.len() + 1;
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            let submodule = parts.next()?;
            return name.get(..end + submodule.len());
        }
    }
    None
}

/// The number of experts by part of a block: what the config says, the first dimension of stacked
/// experts, or how many are numbered.
fn experts<'a>(tensors: &'a [Tensor], sizes: &Sizes) -> BTreeMap<&'a str, usize> {
    let mut experts = BTreeMap::new();
    for tensor in tensors {
        let Some(block) = block(&tensor.name) else {
            continue;
        };
        let numbered = || {
            let (_, rest) = tensor.name.split_once(".experts.")?;
            let number: usize = rest.split('.').next()?.parse().ok()?;
            Some(number + 1)
        };
        let count = match tensor.shape[..] {
            [first, _, _] if is_stack_of_experts(tensor, sizes) => Some(first),
            _ => numbered(),
        };
        if let Some(count) = count.map(|n| sizes.experts.unwrap_or(n)) {
            let most = experts.entry(block).or_insert(count);
            *most = count.max(*most);
        }
    }
    experts
}

/// The vocabulary of a model without a config: the most rows of the matrices that it has once, if
/// blocks have no dimension of that size, and if there are more rows than columns.
fn largest_rows(tensors: &[Tensor]) -> Option<usize> {
    let matrices = tensors.iter().filter(|t| t.shape.len() >= 2);
    let (inner, outer): (Vec<_>, Vec<_>) = matrices.partition(|t| block(&t.name).is_some());
    let rows = |t: &&Tensor| t.shape[0];
    let largest = outer.into_iter().max_by_key(rows)?;
    let rows = rows(&largest);
    let unlike = inner.iter().all(|t| !t.shape.contains(&rows));
    (!inner.is_empty() && unlike && largest.shape[1..].iter().product::<usize>() < rows)
        .then_some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn blocks_of_names() {
        for (name, expected) in [
            ("model.layers.0.mlp.gate.weight", Some("model.layers.0.mlp")),
            ("h.11.attn.c_attn.weight", Some("h.11.attn")),
            ("wte.weight", None),
            ("blk.3", None),
        ] {
            assert_eq!(block(name), expected, "{name}");
        }
    }

    #[test]
    fn sizes_of_configs() {
        let sizes = Sizes::read(&json!({
            "architectures": ["LlamaForSequenceClassification"],
            "text_config": {"vocab_size": 7, "num_experts": 4},
            "max_position_embeddings": 9,
        }));
        assert_eq!((sizes.vocabulary, sizes.positions), (vec![7], vec![9]));
        assert_eq!((sizes.labels, sizes.experts), (Some(2), Some(4)));
        let labels = json!({"id2label": {"0": "a", "1": "b", "2": "c"}, "vocab_size": null});
        assert_eq!(Sizes::read(&labels).labels, Some(3));
    }
}
