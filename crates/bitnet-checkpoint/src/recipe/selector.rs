//! Which tensors of a checkpoint a recipe selects: its globs, compiled and checked.

use super::role::{self, Role};
use super::{Choices, DEFAULT_EXCLUDE, Format, Recipe, Rule, Target};
use crate::forms::Forms;
use crate::{Error, Result};
use bitnet_formats::{Content, Source, Tensor};
use globset::{GlobBuilder, GlobMatcher};
use std::collections::HashMap;

/// A glob in which `*` matches any characters.
pub fn compile(glob: &str) -> Result<GlobMatcher> {
    let matcher = GlobBuilder::new(glob)
        .literal_separator(false)
        .backslash_escape(true)
        .build();
    matcher
        .map(|g| g.compile_matcher())
        .map_err(|e| Error::Recipe(format!("glob '{glob}': {}", e.kind())))
}

impl Recipe {
    /// The choices for a weight of that name, whatever its shape and container: the first rule that
    /// matches over the default.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a glob that is not one.
    pub fn choices_for(&self, name: &str) -> Result<Choices> {
        Ok(self.rule_for(name)?.map_or_else(
            || self.default.clone(),
            |rule| rule.choices.over(&self.default),
        ))
    }

    /// The choices for a matrix of that name if it is to be quantized: the first rule that matches,
    /// else the default where `include` and `exclude` say so.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a glob that is not one.
    pub fn matrix_choices(&self, name: &str) -> Result<Option<Choices>> {
        let choices = match self.rule_for(name)? {
            Some(rule) => rule.choices.over(&self.default),
            None => {
                let matches = |globs: &[String]| -> Result<bool> {
                    globs
                        .iter()
                        .try_fold(false, |any, glob| Ok(any || compile(glob)?.is_match(name)))
                };
                if !matches(&self.include)? || matches(&self.exclude)? {
                    return Ok(None);
                }
                self.default.clone()
            }
        };
        Ok(choices.precision().is_some().then_some(choices))
    }

    /// The first rule that matches a name.
    pub fn rule_for(&self, name: &str) -> Result<Option<&Rule>> {
        for rule in &self.rules {
            if compile(&rule.glob)?.is_match(name) {
                return Ok(Some(rule));
            }
        }
        Ok(None)
    }

    /// Compiles the globs and checks that each of the user's own matches a tensor.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a glob that is not one, and for one that matches nothing (the default
    /// globs may).
    pub(crate) fn selector<'a>(&'a self, source: &Source) -> Result<Selector<'a>> {
        let all = |globs: &[String]| globs.iter().map(|g| compile(g)).collect::<Result<Vec<_>>>();
        let default = Self::default();
        let selector = Selector {
            recipe: self,
            include: all(&self.include)?,
            exclude: all(&self.exclude)?,
            rules: self
                .rules
                .iter()
                .map(|r| compile(&r.glob))
                .collect::<Result<_>>()?,
            roles: if self.is_default_selection() {
                role::roles(source)
            } else {
                HashMap::new()
            },
            forms: match &self.transposed {
                None => Forms::new(source),
                Some(globs) => Forms::with_transposed(source, &all(globs)?),
            },
        };
        let own = |own: &[String], default: &[String]| {
            own.iter()
                .filter(|g| !default.contains(g))
                .cloned()
                .collect::<Vec<_>>()
        };
        let mut globs = own(&self.include, &default.include);
        globs.extend(own(&self.exclude, &default.exclude));
        globs.extend(self.rules.iter().map(|r| r.glob.clone()));
        globs.extend(self.transposed.iter().flatten().cloned());
        for glob in globs {
            let matcher = compile(&glob)?;
            if !source.tensors().iter().any(|t| matcher.is_match(&t.name)) {
                return Err(Error::Recipe(format!(
                    "'{glob}' matches no tensor of {}",
                    source.path().display()
                )));
            }
        }
        for (rule, glob) in self.rules.iter().zip(&selector.rules) {
            let target = rule.choices.over(&self.default).target();
            if target != Target::Keep
                && !source
                    .tensors()
                    .iter()
                    .any(|t| glob.is_match(&t.name) && can_become(t, target))
            {
                let (glob, path) = (&rule.glob, source.path().display());
                return Err(Error::Recipe(format!(
                    "'{glob}' matches no tensor of {path} that can become {target}"
                )));
            }
        }
        Ok(selector)
    }

    /// Whether the recipe leaves the selection to the defaults, its own exclusions apart.
    fn is_default_selection(&self) -> bool {
        let excluded = |glob: &&str| self.exclude.iter().any(|own| own == glob);
        self.include == Self::default().include && DEFAULT_EXCLUDE.iter().all(excluded)
    }
}

/// The glob that matches `name` and nothing else.
pub fn escape(name: &str) -> String {
    let mut glob = String::with_capacity(name.len());
    for c in name.chars() {
        if "?*[]{}\\".contains(c) {
            glob.push('\\');
        }
        glob.push(c);
    }
    glob
}

/// Whether a tensor holds numbers, and rows of them if it is to be quantized.
fn can_become(tensor: &Tensor, target: Target) -> bool {
    !matches!(tensor.content, Content::Opaque(_))
        && (!matches!(target, Target::Quantized(_)) || tensor.shape.len() >= 2)
}

/// A recipe with its globs compiled.
pub(crate) struct Selector<'a> {
    recipe: &'a Recipe,
    include: Vec<GlobMatcher>,
    exclude: Vec<GlobMatcher>,
    rules: Vec<GlobMatcher>,
    /// Weights that stay by default because of what they are.
    roles: HashMap<String, Role>,
    forms: Forms,
}

/// Why a tensor stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stays<'a> {
    /// A rule of this glob keeps it.
    Rule(&'a str),
    /// It has that many dimensions, and no rule.
    Dimensions(usize),
    /// No glob of `include` matches its name.
    NotIncluded,
    /// This glob of `exclude` matches its name.
    Excluded(&'a str),
    /// It is no ordinary linear layer.
    Role(Role),
}

impl<'a> Selector<'a> {
    /// The recipe.
    pub(crate) fn recipe(&self) -> &'a Recipe {
        self.recipe
    }

    /// The forms of the tensors, as the recipe says or the checkpoint shows.
    pub(crate) fn forms(&self) -> &Forms {
        &self.forms
    }

    /// Whether a rule decides about the tensor of that name.
    pub(crate) fn has_rule(&self, name: &str) -> bool {
        self.rules.iter().any(|g| g.is_match(name))
    }

    /// Weights whose values are given are selected by name alone.
    pub(crate) fn without_roles_of<'n>(mut self, names: impl Iterator<Item = &'n String>) -> Self {
        for name in names {
            self.roles.remove(name);
        }
        self
    }

    /// The choices for a tensor; `None` if it stays as it is.
    ///
    /// Only weights with at least two dimensions can be quantized. Include reaches those with
    /// exactly two, and stacked experts, whatever their names where it is the default; convolutions
    /// need a rule.
    pub(crate) fn choices(&self, tensor: &Tensor) -> Option<Choices> {
        if matches!(tensor.content, Content::Opaque(_)) {
            return None;
        }
        if let Some(i) = self.rule_of(tensor) {
            let choices = self.recipe.rules[i].choices.over(&self.recipe.default);
            return can_become(tensor, choices.target()).then_some(choices);
        }
        let selected = self.left_out(tensor).is_none();
        selected.then(|| self.recipe.default.clone())
    }

    /// Why a tensor of floats stays floats; `None` if it is to be quantized.
    pub(crate) fn stays(&self, tensor: &Tensor) -> Option<Stays<'a>> {
        let quantized = |choices: &Choices| matches!(choices.target(), Target::Quantized(_));
        match self.rule_of(tensor) {
            Some(_) if self.choices(tensor).as_ref().is_some_and(quantized) => None,
            Some(i) => Some(Stays::Rule(&self.recipe.rules[i].glob)),
            None => self.left_out(tensor),
        }
    }

    /// The first rule that matches.
    fn rule_of(&self, tensor: &Tensor) -> Option<usize> {
        self.rules.iter().position(|g| g.is_match(&tensor.name))
    }

    /// Why a tensor without a rule stays as it is.
    fn left_out(&self, tensor: &Tensor) -> Option<Stays<'a>> {
        let position = |globs: &[GlobMatcher]| globs.iter().position(|g| g.is_match(&tensor.name));
        // transformers' bitnet has no layer for stacked experts.
        let stack = self.recipe.format != Format::HfBitnet && self.forms.is_stack(&tensor.name);
        if tensor.shape.len() != 2 && !stack {
            return Some(Stays::Dimensions(tensor.shape.len()));
        }
        let by_default = stack && self.recipe.include == Recipe::default().include;
        if !by_default && position(&self.include).is_none() {
            return Some(Stays::NotIncluded);
        }
        if let Some(i) = position(&self.exclude) {
            return Some(Stays::Excluded(&self.recipe.exclude[i]));
        }
        self.roles.get(&tensor.name).copied().map(Stays::Role)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_escaped_name_matches_itself_alone() {
        for name in [
            r"back\slash.weight",
            "a[0].weight",
            "{a,b}?*",
            "plain.weight",
            "][",
        ] {
            let glob = compile(&escape(name)).unwrap();
            assert!(glob.is_match(name), "{name}");
            assert!(
                !glob.is_match(format!("{name}x")) && !glob.is_match("a"),
                "{name}"
            );
        }
    }
}
