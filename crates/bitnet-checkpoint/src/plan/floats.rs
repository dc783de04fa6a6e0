//! The share of weights that stay floats, why, and the rule that would change it.

use crate::recipe::{DEFAULT_EXCLUDE, Format, Recipe, Selector, Stays};
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
    /// What the format does not hold, so that only another one changes it.
    refused: Option<Refused>,
}

/// Tensors of three or more dimensions in a format for linear layers.
enum Refused {
    /// Experts, which other formats quantize by default.
    Stack,
    Other,
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
        let stack = selector.forms().is_stack(&tensor.name);
        let group = groups
            .entry(reason(stays, stack, selector.recipe()))
            .or_default();
        group.weights += weights;
        group.names.push(&tensor.name);
        if tensor.shape.len() > 2 && selector.recipe().format == Format::HfBitnet {
            group.refused = Some(if stack {
                Refused::Stack
            } else {
                Refused::Other
            });
        }
        if weights > group.largest {
            (group.largest, group.example) = (weights, &tensor.name);
        }
    }
    let share = |weights: u64| weights as f64 / all.max(1) as f64;
    let mut largest: Vec<_> = groups
        .iter()
        .filter(|(_, g)| share(g.weights) >= LEAST_SHARE)
        .collect();
    if largest.is_empty() {
        return None;
    }
    largest.sort_by_key(|(_, g)| std::cmp::Reverse(g.weights));
    let percent = |weights: u64| format!("{:.0}%", share(weights) * 100.0);
    let reasons: Vec<String> = largest
        .iter()
        .take(MOST_REASONS)
        .map(|(reason, g)| {
            let change = match g.refused {
                Some(Refused::Stack) => "--format safetensors quantizes them".to_string(),
                Some(Refused::Other) => format!("--format safetensors with {}", rule(g, &groups)),
                None => rule(g, &groups),
            };
            format!(
                "{} {reason}, e.g. {} ({change})",
                percent(g.weights),
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
fn reason(stays: Stays<'_>, stack: bool, recipe: &Recipe) -> String {
    match stays {
        Stays::Dimensions(_) if stack => "stacked experts".into(),
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

/// The rule that quantizes the tensors of a group, and how many of them it reaches where those are
/// not all. It reaches no tensor of another group.
fn rule(group: &Group<'_>, groups: &BTreeMap<String, Group<'_>>) -> String {
    let others = groups.values().filter(|g| g.example != group.example);
    let others: Vec<&str> = others.flat_map(|g| g.names.iter().copied()).collect();
    let globs = globs(group).into_iter().filter_map(|glob| {
        let matcher = crate::recipe::compile(&glob).ok()?;
        let reached = group.names.iter().filter(|n| matcher.is_match(n)).count();
        (!others.iter().any(|name| matcher.is_match(name))).then_some((glob, reached))
    });
    // The first of those that reach most.
    let best = globs.reduce(|best, next| if next.1 > best.1 { next } else { best });
    let (glob, reached) = best.unwrap_or_else(|| (crate::recipe::escape(group.example), 1));
    let them = match reached == group.names.len() {
        true => "them".to_string(),
        false => format!("{reached} of them"),
    };
    format!("--rule '{glob}=ternary' quantizes {them}")
}

/// Globs for the tensors of a group: its only name, the module of experts that all of them are in,
/// the largest one's name with `*` for its numbers, or how all names begin and end.
fn globs(group: &Group<'_>) -> Vec<String> {
    let names = &group.names;
    if let [name] = names[..] {
        return vec![crate::recipe::escape(name)];
    }
    for part in ["experts", "_exps"] {
        if names.iter().all(|name| name.contains(part)) {
            return vec![format!("*{part}*")];
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
    let mut globs = vec![parts.collect::<Vec<String>>().join(".")];
    let common = |a: &mut dyn Iterator<Item = (char, char)>| {
        a.take_while(|(a, b)| a == b)
            .map(|(a, _)| a)
            .collect::<String>()
    };
    let example = group.example;
    let shortest = |ends: Vec<String>| ends.into_iter().min_by_key(String::len).unwrap_or_default();
    let begin = names
        .iter()
        .map(|n| common(&mut n.chars().zip(example.chars())));
    let begin = shortest(begin.collect());
    let end = names
        .iter()
        .map(|n| common(&mut n.chars().rev().zip(example.chars().rev())));
    let end: String = shortest(end.collect()).chars().rev().collect();
    // A beginning that names no module would reach whatever comes to mind.
    if begin.contains('.') && begin.len() + end.len() < example.len() {
        let (begin, end) = (crate::recipe::escape(&begin), crate::recipe::escape(&end));
        globs.push(format!("{begin}*{end}"));
    }
    globs
}
