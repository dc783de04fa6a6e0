//! Which tensors of a checkpoint a recipe selects: its globs, compiled and checked.

use super::{Choices, Recipe, Rule, Target};
use crate::{Error, Result};
use bitnet_formats::{Content, Source, Tensor};
use globset::{GlobBuilder, GlobMatcher};

/// A glob in which `*` matches any characters.
pub fn compile(glob: &str) -> Result<GlobMatcher> {
    let matcher = GlobBuilder::new(glob).literal_separator(false).build();
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
}

/// The glob that matches `name` and nothing else.
pub fn escape(name: &str) -> String {
    globset::escape(name)
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
}

impl Selector<'_> {
    /// Whether a rule decides about the tensor of that name.
    pub(crate) fn has_rule(&self, name: &str) -> bool {
        self.rules.iter().any(|g| g.is_match(name))
    }

    /// The choices for a tensor; `None` if it stays as it is.
    ///
    /// Only weights with at least two dimensions can be quantized. Include reaches those with
    /// exactly two; convolutions need a rule.
    pub(crate) fn choices(&self, tensor: &Tensor) -> Option<Choices> {
        if matches!(tensor.content, Content::Opaque(_)) {
            return None;
        }
        let matches = |globs: &[GlobMatcher]| globs.iter().any(|g| g.is_match(&tensor.name));
        if let Some(i) = self.rules.iter().position(|g| g.is_match(&tensor.name)) {
            let choices = self.recipe.rules[i].choices.over(&self.recipe.default);
            return can_become(tensor, choices.target()).then_some(choices);
        }
        let selected = tensor.shape.len() == 2 && matches(&self.include) && !matches(&self.exclude);
        selected.then(|| self.recipe.default.clone())
    }
}
