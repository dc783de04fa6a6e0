//! What the config of a folder says about the quantization of its weights.

use crate::resolve::read_json;
use crate::storage::{Kind, Storage};
use serde_json::Value;

/// Files beside config.json that describe the quantization.
pub(crate) const FILES: [&str; 2] = ["quantize_config.json", "quant_config.json"];

/// The quantization section of config.json, or of the file beside it that older programs wrote.
#[derive(Debug, Default)]
pub(crate) struct Declared {
    section: Value,
}

impl Declared {
    pub(crate) fn read(storage: &Storage) -> Self {
        let sections = ["quantization_config", "quantization", "compression_config"];
        let in_config = |key: &&str| {
            let section = storage.config.as_ref()?.get(*key)?;
            section.is_object().then(|| section.clone())
        };
        let beside = |name: &&str| {
            let path = storage.path.join(name);
            (storage.kind == Kind::Folder && path.is_file())
                .then(|| read_json(&path).ok())
                .flatten()
        };
        let section = sections
            .iter()
            .find_map(in_config)
            .or_else(|| FILES.iter().find_map(beside))
            .unwrap_or_default();
        Self { section }
    }

    /// The value of the first of these keys.
    fn get(&self, keys: &[&str]) -> Option<&Value> {
        let found = keys.iter().find_map(|key| self.section.get(*key));
        found.filter(|v| !v.is_null())
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.get(&[key])?.as_str()
    }

    /// The method, in lower case.
    pub(crate) fn method(&self) -> Option<String> {
        self.text("quant_method").map(str::to_lowercase)
    }

    /// Bits and group size of a module: its own, or those of all.
    pub(crate) fn bits_and_group(&self, module: &str) -> (Option<usize>, Option<usize>) {
        let number = |of: &Value, keys: &[&str]| {
            let found = keys.iter().find_map(|key| of.get(*key));
            found.and_then(Value::as_u64).map(|n| n as usize)
        };
        let bits = |of| number(of, &["bits", "w_bit", "num_bits"]);
        let group = |of| number(of, &["group_size", "q_group_size"]);
        // compressed-tensors: one group of modules, all with the same weights.
        let mut groups = self.section.get("config_groups").and_then(Value::as_object);
        let groups = groups.take_if(|groups| groups.len() == 1);
        let weights = groups.and_then(|groups| groups.values().next()?.get("weights"));
        let own = self.section.get(module).filter(|of| of.is_object());
        let of = own.or(weights).unwrap_or(&self.section);
        (
            bits(of).or(bits(&self.section)),
            group(of).or(group(&self.section)),
        )
    }

    /// Rows and columns that share a scale.
    pub(crate) fn block(&self) -> Option<[usize; 2]> {
        let list = self.get(&["weight_block_size"])?.as_array()?;
        match list.as_slice() {
            [rows, cols] => Some([rows.as_u64()? as usize, cols.as_u64()? as usize])
                .filter(|block| !block.contains(&0)),
            _ => None,
        }
    }
}
