//! Checks of a whole recipe: each wrong field is named.

use super::{Format, MAX_THREADS, Recipe, VERSION, compile};
use crate::{Error, Result};

impl Recipe {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming each wrong field.
    pub fn validate(&self) -> Result<()> {
        let mut wrong = vec![];
        if self.version != VERSION {
            wrong.push(format!("version: expected {VERSION}, got {}", self.version));
        }
        if self.format == Format::Onnx {
            wrong.push(
                "format: onnx takes a model as it is; write a folder, then bitnet convert FOLDER \
                 --format onnx"
                    .into(),
            );
        }
        self.default.problems("default", &mut wrong);
        let standard =
            |glob: &String| glob == "*.weight" || super::DEFAULT_EXCLUDE.contains(&glob.as_str());
        let transposed = self.transposed.clone().unwrap_or_default();
        for (list, globs) in [
            ("include", &self.include),
            ("exclude", &self.exclude),
            ("transposed", &transposed),
        ] {
            let bad = globs
                .iter()
                .filter(|g| !standard(g))
                .filter_map(|g| compile(g).err());
            wrong.extend(bad.map(|e| format!("{list}: {e}")));
        }
        for (i, rule) in self.rules.iter().enumerate() {
            wrong.extend(
                compile(&rule.glob)
                    .err()
                    .map(|e| format!("rule[{i}].match: {e}")),
            );
            rule.choices
                .over(&self.default)
                .problems(&format!("rule[{i}]"), &mut wrong);
        }
        if let Some(search) = &self.search {
            search.problems(&self.default, &mut wrong);
        }
        if let Some(control) = &self.control {
            control.problems(&mut wrong);
        }
        wrong.extend(
            self.compute
                .machine_check()
                .err()
                .map(|e| format!("compute.isa: {e}")),
        );
        if self.compute.threads > MAX_THREADS {
            wrong.push(format!(
                "compute.threads: expected at most {}, got {}",
                MAX_THREADS, self.compute.threads
            ));
        }
        Error::unless_empty(wrong)
    }
}
