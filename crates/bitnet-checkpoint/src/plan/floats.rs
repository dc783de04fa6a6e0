//! The share of weights that stay floats, why, and the rule that would change it.

use crate::recipe::{DEFAULT_EXCLUDE, Recipe, Selector, Stays};
use bitnet_formats::{Content, Source};
use std::collections::BTreeMap;

/// Reasons that the note lists.
const MOST_REASONS: usize = 3;
/// Shares below this are not worth a word.
const LEAST_SHARE: f64 = 0.01;
/// Layers of this share that the recipe does not reach are more than a person expects.
const SURPRISING_SHARE: f64 = 0.1;

/// Why matrices stay floats, in one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FloatShare {
    /// The sentence.
    pub text: String,
    /// Whether it is more than embeddings, heads and what the recipe names: worth saying to
    /// everybody.
    pub surprising: bool,
}

/// The tensors of one reason.
#[derive(Default)]
struct Group<'a> {
    weights: u64,
    largest: u64,
    names: Vec<&'a str>,
    example: &'a str,
}

/// What the matrices that `selector` leaves as they are amount to; `None` if it is next to nothing.
pub(super) fn float_share(source: &Source, selector: &Selector<'_>) -> Option<FloatShare> {
    let mut groups: BTreeMap<String, Group<'_>> = BTreeMap::new();
    let (mut all, mut floats, mut unexpected) = (0, 0, 0);
    for tensor in source.tensors() {
        let weights = tensor.elements() as u64;
        all += weights;
        let Content::Float(_) = tensor.content else {
            continue;
        };
        let Some(stays) = selector.stays(tensor) else {
            continue;
        };
        floats += weights;
        if tensor.shape.len() < 2 {
            continue;
        }
        if matches!(stays, Stays::Dimensions(_) | Stays::NotIncluded) {
            unexpected += weights;
        }
        let group = groups.entry(reason(stays, selector.recipe())).or_default();
        group.weights += weights;
        group.names.push(&tensor.name);
        if weights > group.largest {
            (group.largest, group.example) = (weights, &tensor.name);
        }
    }
    let share = |weights: u64| weights as f64 / all.max(1) as f64;
    let mut groups: Vec<_> = groups
        .into_iter()
        .filter(|(_, g)| share(g.weights) >= LEAST_SHARE)
        .collect();
    if groups.is_empty() {
        return None;
    }
    groups.sort_by_key(|(_, g)| std::cmp::Reverse(g.weights));
    let percent = |weights: u64| format!("{:.0}%", share(weights) * 100.0);
    let reasons: Vec<String> = groups
        .iter()
        .take(MOST_REASONS)
        .map(|(reason, g)| {
            let (share, glob) = (percent(g.weights), glob(g));
            format!(
                "{share} {reason}, e.g. {} (--rule '{glob}=ternary' quantizes them)",
                g.example
            )
        })
        .collect();
    Some(FloatShare {
        text: format!(
            "{} of the weights stay floats: {}",
            percent(floats),
            reasons.join("; ")
        ),
        surprising: share(unexpected) >= SURPRISING_SHARE,
    })
}

/// The reason for people.
fn reason(stays: Stays<'_>, recipe: &Recipe) -> String {
    match stays {
        Stays::Role(role) => role.name().into(),
        Stays::Excluded(glob) if DEFAULT_EXCLUDE.contains(&glob) => {
            "embeddings, heads, norms and routers by name".into()
        }
        Stays::Excluded(glob) => format!("excluded by '{glob}'"),
        Stays::Dimensions(n) => format!("tensors of {n} dimensions"),
        Stays::NotIncluded => format!("not included by '{}'", recipe.include.join("' or '")),
        Stays::Rule(glob) => format!("floats by the rule '{glob}'"),
    }
}

/// A glob that matches the tensors of a group: its only name, the module of experts that all of
/// them are in, or the largest one's name with `*` for its numbers.
fn glob(group: &Group<'_>) -> String {
    if let [name] = group.names[..] {
        return crate::recipe::escape(name);
    }
    for part in ["experts", "_exps"] {
        if group.names.iter().all(|name| name.contains(part)) {
            return format!("*{part}*");
        }
    }
    let number = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    let parts = group.example.split('.');
    let parts = parts.map(|p| {
        if number(p) {
            "*".into()
        } else {
            crate::recipe::escape(p)
        }
    });
    parts.collect::<Vec<String>>().join(".")
}
