//! Weights in a rotated basis: the keys `prism.hadamard.*` of a GGUF and the `rotation` of our own
//! document, both checked against the tensors.
//!
//! ```text
//! rotate(x) = H · (s ⊙ x) in blocks along K     H: normalized Sylvester–Walsh–Hadamard
//! weight_names            y = W' · rotate(x)     the rows of W' are rotated rows of W
//! inverse_weight_names    h = s ⊙ (H · row)      tables whose rows are rotated, by token
//! ```
//!
//! Both lists say the same of a tensor: its rows are stored rotated. See docs/formats.md.

use crate::gguf::{Array, Value};
use crate::{Error, Result, prefixes};
use bitnet_core::hadamard::Hadamard;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// What the keys begin with.
pub const ROTATION_PREFIX: &str = "prism.hadamard";
/// The one transform that there is.
const TRANSFORM: &str = "normalized-sylvester-walsh-hadamard";
/// The one axis that there is.
const AXIS: &str = "input-last-dimension";
/// The one version that there is.
const VERSION: u64 = 1;
const KEYS: [&str; 10] = [
    "version",
    "transform",
    "axis",
    "block_size",
    "sign_mode",
    "sign_widths",
    "sign_values",
    "weight_names",
    "inverse_weight_names",
    "gdn_v_grouped",
];

/// What a file says about its rotation: the JSON of a document's `rotation`, and what the keys of a
/// GGUF amount to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotationFacts {
    /// The name of the transform.
    pub transform: String,
    /// Columns of a block.
    pub block_size: usize,
    /// For each width its signs as a text of `+` and `-`; none if all are 1.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub signs: Option<BTreeMap<usize, String>>,
    /// Matrices whose input is rotated before the product.
    #[serde(rename = "weight_names")]
    pub weights: Vec<String>,
    /// Tables whose rows are rotated back after the look-up.
    #[serde(
        rename = "inverse_weight_names",
        skip_serializing_if = "Vec::is_empty",
        default
    )]
    pub inverse_weights: Vec<String>,
    /// Whether the value heads of `ssm_out` are in another order in the rotated basis.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub gdn_v_grouped: bool,
}

/// Why a rotation is not one that this program knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotationError {
    /// The key.
    pub key: String,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub got: String,
}

impl RotationError {
    fn new(key: &str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// The error of a file.
    pub fn of_file(&self, path: &Path) -> Error {
        Error::config(path, &self.key, &self.expected, &self.got)
    }
}

/// What happens to the input of a matrix in a rotated basis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputRotation<'a> {
    /// The rotation.
    pub transform: &'a Hadamard,
    /// Whether the value heads of a gated delta net come in Hugging Face's order before it, those of
    /// a key after one another, whatever the order of the model.
    pub grouped_heads: bool,
}

/// Whether a tensor is the output matrix of a gated delta net in a GGUF.
fn is_delta_output(name: &str) -> bool {
    name.contains("ssm_out")
}

/// A checked rotation of a checkpoint's tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    facts: RotationFacts,
    /// The rotations by width.
    widths: BTreeMap<usize, Hadamard>,
    /// The width of each rotated tensor, by its name.
    tensors: HashMap<String, usize>,
    /// The tables of `inverse_weights`, by name.
    tables: Vec<String>,
}

/// Shape of the tensor of a name.
pub(crate) type Shapes<'a> = dyn Fn(&str) -> Option<Vec<usize>> + 'a;

impl Rotation {
    /// Checks facts against the tensors. `prefix` is that of the keys in messages.
    pub(crate) fn check(
        prefix: &str,
        facts: RotationFacts,
        shape: &Shapes<'_>,
        names: &mut dyn Iterator<Item = &str>,
    ) -> Result<Self, RotationError> {
        let bad = |key: &str, expected: &str, got: String| {
            RotationError::new(&format!("{prefix}.{key}"), expected, got)
        };
        if facts.transform != TRANSFORM {
            let got = Value::from(facts.transform.as_str()).preview(120);
            return Err(bad("transform", &format!("\"{TRANSFORM}\""), got));
        }
        let mut rotation = Self {
            widths: BTreeMap::new(),
            tensors: HashMap::new(),
            tables: vec![],
            facts,
        };
        let facts = rotation.facts.clone();
        if !facts.block_size.is_power_of_two() {
            let got = facts.block_size.to_string();
            return Err(bad("block_size", "a power of two", got));
        }
        let lists = [
            ("weight_names", &facts.weights),
            ("inverse_weight_names", &facts.inverse_weights),
        ];
        for (key, listed) in lists {
            for name in listed {
                let full = [name.clone(), format!("{name}.weight")];
                let Some((name, shape)) =
                    full.into_iter().find_map(|n| Some((n.clone(), shape(&n)?)))
                else {
                    let mut got = Value::from(name.as_str()).preview(120);
                    if let Some(nearest) = prefixes::nearest(name, &mut *names) {
                        got += &format!(", where the nearest name is '{nearest}'");
                    }
                    return Err(bad(key, "names of tensors in the file", got));
                };
                rotation
                    .add(&name, &shape)
                    .map_err(|(expected, got)| bad(key, &expected, got))?;
                if key == "inverse_weight_names" {
                    rotation.tables.push(name);
                }
            }
        }
        if rotation.tensors.is_empty() {
            return Err(bad("weight_names", "at least one name", "none".into()));
        }
        Ok(rotation)
    }

    /// Adds a rotated tensor.
    fn add(&mut self, name: &str, shape: &[usize]) -> Result<(), (String, String)> {
        let &[_, .., width] = shape else {
            return Err((
                "names of matrices".into(),
                format!("'{name}' of shape {shape:?}"),
            ));
        };
        if !self.widths.contains_key(&width) {
            let signs = match &self.facts.signs {
                None => None,
                Some(signs) => Some(parse_signs(signs.get(&width).ok_or_else(|| {
                    let widths: Vec<_> = signs.keys().map(usize::to_string).collect();
                    (
                        format!("signs for the width {width} of '{name}'"),
                        format!("signs for the widths {}", widths.join(", ")),
                    )
                })?)),
            };
            let rotation = Hadamard::new(width, self.facts.block_size, signs.as_deref())
                .map_err(|e| (format!("a rotation of '{name}'"), e.to_string()))?;
            self.widths.insert(width, rotation);
        }
        self.tensors.insert(name.into(), width);
        Ok(())
    }

    /// What happens to the input of a matrix before the product; none if it is not rotated.
    pub fn of_input(&self, name: &str) -> Option<InputRotation<'_>> {
        let width = self.tensors.get(name)?;
        Some(InputRotation {
            transform: self.widths.get(width)?,
            grouped_heads: self.facts.gdn_v_grouped && is_delta_output(name),
        })
    }

    /// The rotation of a tensor's rows; none if they are stored as they are.
    ///
    /// # Errors
    /// [`RotationError`] for an `ssm_out` whose value heads are in another order: no conversion of
    /// this program undoes that. A graph follows it: [`Rotation::of_input`].
    pub fn of(&self, name: &str) -> Result<Option<&Hadamard>, RotationError> {
        let Some(width) = self.tensors.get(name) else {
            return Ok(None);
        };
        // Names of another container do not say which matrix it is.
        let known = self.tensors.keys().any(|name| is_delta_output(name));
        if self.facts.gdn_v_grouped && (is_delta_output(name) || !known) {
            return Err(RotationError::new(
                &format!("{ROTATION_PREFIX}.gdn_v_grouped"),
                format!(
                    "false: no conversion of this program reorders the value heads of '{name}'"
                ),
                "true; `bitnet convert` without --unrotate carries the tensor as it is",
            ));
        }
        Ok(self.widths.get(width))
    }

    /// Whether the rows of a tensor are stored rotated.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether a tensor is one of the tables that are rotated back after the look-up.
    pub fn is_table(&self, name: &str) -> bool {
        self.tables.iter().any(|table| table == name)
    }

    /// Number of rotated tensors.
    pub fn tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Columns of a block.
    pub fn block(&self) -> usize {
        self.facts.block_size
    }

    /// The facts with other names: `rename` gives the name in the output of a tensor of this
    /// checkpoint.
    pub fn renamed(&self, rename: &dyn Fn(&str) -> Option<String>) -> RotationFacts {
        let full = |name: &String| {
            let full = format!("{name}.weight");
            let name = if self.contains(name) { name } else { &full };
            rename(name)
        };
        let all = |names: &[String]| names.iter().filter_map(full).collect();
        RotationFacts {
            weights: all(&self.facts.weights),
            inverse_weights: all(&self.facts.inverse_weights),
            ..self.facts.clone()
        }
    }

    /// A sentence for a person.
    pub fn note(&self) -> String {
        format!(
            "{} matrices are stored in a rotated basis (normalized Walsh–Hadamard blocks of {}{}): \
             programs that do not read {ROTATION_PREFIX} compute with wrong weights",
            self.tensors(),
            self.block(),
            if self.facts.signs.is_some() {
                " with signs"
            } else {
                ""
            },
        )
    }
}

/// `+` and `-` as numbers; another character is 0, which no rotation takes.
fn parse_signs(text: &str) -> Vec<i8> {
    let sign = |c| match c {
        b'+' => 1,
        b'-' => -1,
        _ => 0,
    };
    text.bytes().map(sign).collect()
}

impl RotationFacts {
    /// The facts of a document.
    pub(crate) fn from_document(value: &serde_json::Value) -> Result<Self, RotationError> {
        serde_json::from_value(value.clone()).map_err(|e| {
            RotationError::new("rotation", "a rotation of docs/formats.md", e.to_string())
        })
    }

    /// The facts in a GGUF's keys; none if it has no key of the prefix.
    pub(crate) fn from_gguf(metadata: &[(String, Value)]) -> Result<Option<Self>, RotationError> {
        let keys = RotationKeys(metadata);
        if !metadata
            .iter()
            .any(|(key, _)| key.starts_with(ROTATION_PREFIX))
        {
            return Ok(None);
        }
        keys.check_known()?;
        if keys.integer("version")? != VERSION {
            return Err(keys.bad("version", &VERSION.to_string()));
        }
        let transform = keys.one_of("transform", &[TRANSFORM])?;
        keys.one_of("axis", &[AXIS])?;
        let block = keys.integer("block_size")?;
        let block_size = usize::try_from(block).map_err(|_| keys.bad("block_size", "a width"))?;
        let signs = keys.signs()?;
        let gdn_v_grouped = match keys.get("gdn_v_grouped") {
            None => false,
            Some(value) => value
                .as_bool()
                .ok_or_else(|| keys.bad("gdn_v_grouped", "true or false"))?,
        };
        Ok(Some(Self {
            transform: transform.into(),
            block_size,
            signs,
            weights: keys.names("weight_names")?,
            inverse_weights: keys.names("inverse_weight_names")?,
            gdn_v_grouped,
        }))
    }

    /// The keys of a GGUF.
    pub fn to_gguf(&self) -> Vec<(String, Value)> {
        let size = |n: usize| n as u32;
        let mut keys: Vec<(&str, Value)> = vec![
            ("version", (VERSION as u32).into()),
            ("transform", self.transform.as_str().into()),
            ("axis", AXIS.into()),
            ("block_size", size(self.block_size).into()),
        ];
        match &self.signs {
            None => keys.push(("sign_mode", "identity".into())),
            Some(signs) => {
                let widths = signs.keys().map(|&width| size(width)).collect();
                let values = signs.values().flat_map(|text| parse_signs(text)).collect();
                keys.push(("sign_mode", "explicit".into()));
                keys.push(("sign_widths", Array::U32(widths).into()));
                keys.push(("sign_values", Array::I8(values).into()));
            }
        }
        let names = |names: &[String]| Value::from(Array::String(names.to_vec()));
        keys.push(("weight_names", names(&self.weights)));
        if !self.inverse_weights.is_empty() {
            keys.push(("inverse_weight_names", names(&self.inverse_weights)));
        }
        if self.gdn_v_grouped {
            keys.push(("gdn_v_grouped", true.into()));
        }
        keys.into_iter()
            .map(|(key, value)| (format!("{ROTATION_PREFIX}.{key}"), value))
            .collect()
    }
}

/// The keys of a GGUF, by the part behind the prefix.
struct RotationKeys<'a>(&'a [(String, Value)]);

impl<'a> RotationKeys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        let full = format!("{ROTATION_PREFIX}.{key}");
        super::values::find(self.0, &full)
    }

    fn bad(&self, key: &str, expected: &str) -> RotationError {
        let got = self.get(key).map_or("none".into(), |v| v.preview(120));
        RotationError::new(&format!("{ROTATION_PREFIX}.{key}"), expected, got)
    }

    /// Refuses keys of the prefix that are not in the contract.
    fn check_known(&self) -> Result<(), RotationError> {
        let of_prefix = self
            .0
            .iter()
            .filter(|(k, _)| k.starts_with(ROTATION_PREFIX));
        for (key, value) in of_prefix {
            let behind = key[ROTATION_PREFIX.len()..].strip_prefix('.');
            if !behind.is_some_and(|key| KEYS.contains(&key)) {
                let expected = format!("one of the keys {}", KEYS.join(", "));
                return Err(RotationError::new(key, expected, value.preview(120)));
            }
        }
        Ok(())
    }

    fn integer(&self, key: &str) -> Result<u64, RotationError> {
        let value = self.get(key).and_then(Value::as_u64);
        value.ok_or_else(|| self.bad(key, "a positive number"))
    }

    fn one_of(&self, key: &str, known: &[&'static str]) -> Result<&'static str, RotationError> {
        let text = self.get(key).and_then(Value::as_str);
        let found = known.iter().find(|k| text == Some(**k));
        found.copied().ok_or_else(|| {
            let quoted: Vec<_> = known.iter().map(|k| format!("\"{k}\"")).collect();
            self.bad(key, &quoted.join(" or "))
        })
    }

    fn names(&self, key: &str) -> Result<Vec<String>, RotationError> {
        match self.get(key) {
            None if key == "inverse_weight_names" => Ok(vec![]),
            Some(Value::Array(array)) if array.is_empty() => Ok(vec![]),
            value => value
                .and_then(Value::as_strings)
                .map(<[String]>::to_vec)
                .ok_or_else(|| self.bad(key, "a list of names")),
        }
    }

    fn integers(&self, key: &str) -> Result<Vec<i64>, RotationError> {
        match self.get(key) {
            None => Ok(vec![]),
            Some(value) => value
                .as_array()
                .and_then(integers)
                .ok_or_else(|| self.bad(key, "a list of whole numbers")),
        }
    }

    /// Signs by width; none for `identity`.
    fn signs(&self) -> Result<Option<BTreeMap<usize, String>>, RotationError> {
        let mode = self.one_of("sign_mode", &["identity", "explicit"])?;
        let (widths, values) = (self.integers("sign_widths")?, self.integers("sign_values")?);
        if let Some(at) = values.iter().position(|s| s.unsigned_abs() != 1) {
            let got = format!("{} at index {at}", values[at]);
            let key = format!("{ROTATION_PREFIX}.sign_values");
            return Err(RotationError::new(&key, "1 and -1 only", got));
        }
        if mode == "identity" {
            let expected = "no sign of -1, since sign_mode is \"identity\"";
            return match values.contains(&-1) {
                true => Err(self.bad("sign_values", expected)),
                false => Ok(None),
            };
        }
        if widths.is_empty() {
            return Err(self.bad(
                "sign_widths",
                "at least one width, since sign_mode is \"explicit\"",
            ));
        }
        let (mut signs, mut rest) = (BTreeMap::new(), &values[..]);
        for &width in &widths {
            let n = usize::try_from(width).ok().filter(|n| *n > 0);
            let n = n.ok_or_else(|| self.bad("sign_widths", "positive widths"))?;
            let Some((of_width, after)) = rest.split_at_checked(n) else {
                return Err(self.wrong_count(&widths, values.len()));
            };
            let text = of_width
                .iter()
                .map(|s| if *s < 0 { '-' } else { '+' })
                .collect();
            if signs.insert(n, text).is_some() {
                return Err(self.bad("sign_widths", "each width once"));
            }
            rest = after;
        }
        match rest {
            [] => Ok(Some(signs)),
            _ => Err(self.wrong_count(&widths, values.len())),
        }
    }

    fn wrong_count(&self, widths: &[i64], got: usize) -> RotationError {
        let sum = widths.iter().fold(0i64, |sum, w| sum.saturating_add(*w));
        let expected = format!("{sum} signs, the sum of sign_widths");
        let key = format!("{ROTATION_PREFIX}.sign_values");
        RotationError::new(&key, expected, got.to_string())
    }
}

/// The elements of an array of integers of any width.
fn integers(array: &Array) -> Option<Vec<i64>> {
    fn all<T: Copy + TryInto<i64>>(items: &[T]) -> Option<Vec<i64>> {
        items.iter().map(|n| (*n).try_into().ok()).collect()
    }
    match array {
        Array::U8(items) => all(items),
        Array::I8(items) => all(items),
        Array::U16(items) => all(items),
        Array::I16(items) => all(items),
        Array::U32(items) => all(items),
        Array::I32(items) => all(items),
        Array::U64(items) => all(items),
        Array::I64(items) => all(items),
        empty if empty.is_empty() => Some(vec![]),
        _ => None,
    }
}

#[cfg(test)]
#[path = "rotation_tests.rs"]
mod tests;
