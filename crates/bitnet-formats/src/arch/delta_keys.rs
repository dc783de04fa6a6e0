//! Gated delta nets in the keys of a GGUF, by llama.cpp's names.

use super::architecture::Architecture;
use super::decoder::HfDecoder;
use super::delta::{DeltaShape, MAX_HEADS, MAX_TAPS};
use super::keys::GgufKeys;
use super::layers::TokenMixer;
use super::metadata::NewKeys;
use super::values::HfConfig;
use crate::{Result, gguf};
use serde_json::Value;

const INTERVAL: &str = "full_attention_interval";

/// llama.cpp's qwen35: one layer in so many has attention, unless a key says it.
const QWEN35_INTERVAL: usize = 4;

impl NewKeys {
    /// The keys of gated delta nets and of the layers that have attention.
    pub(super) fn delta_net(
        &mut self,
        config: &HfConfig,
        architecture: &Architecture,
        decoder: &HfDecoder,
    ) -> Result<()> {
        let Some(shape) = decoder.delta else {
            let expected = format!(
                "'linear_attention' in a layer at least, in a GGUF of {}",
                architecture.name
            );
            return Err(config.bad("layer_types", &expected));
        };
        let attends = |i: usize| decoder.layers[i].mixer == TokenMixer::Attention;
        let layers = decoder.layers.len();
        let interval = match (0..layers).find(|i| attends(*i)) {
            Some(first) => first + 1,
            // The usual number, if no layer has it.
            None => QWEN35_INTERVAL.max(layers + 1),
        };
        if (0..layers).any(|i| attends(i) != (i + 1).is_multiple_of(interval)) {
            let expected = format!(
                "full attention in each n-th layer and no other, in a GGUF of {}",
                architecture.name
            );
            return Err(config.bad("layer_types", &expected));
        }
        self.size(INTERVAL, interval);
        self.size("ssm.conv_kernel", shape.taps);
        self.size("ssm.group_count", shape.key_heads);
        self.size("ssm.inner_size", shape.value_width());
        self.size("ssm.state_size", shape.key_dim);
        self.size("ssm.time_step_rank", shape.value_heads);
        // How many pairs turn by each of the three positions of a picture's part, which are equal
        // in a text; a fourth is not used.
        let pairs = decoder.rope.dims / 2;
        let sections = [pairs.div_ceil(3), (pairs + 1) / 3, pairs / 3, 0];
        let sections = sections.iter().map(|&n| n as i32);
        self.put(
            "rope.dimension_sections",
            gguf::Value::Array(gguf::Array::I32(sections.collect())),
        );
        Ok(())
    }
}

/// The keys of a config.json about gated delta nets.
pub(super) fn add_delta_net(keys: &GgufKeys, config: &mut Value) -> Result<()> {
    let shape = gguf_shape(keys)?;
    let interval = keys.optional_size(INTERVAL)?.unwrap_or(QWEN35_INTERVAL);
    config["full_attention_interval"] = interval.into();
    config["linear_conv_kernel_dim"] = shape.taps.into();
    config["linear_num_key_heads"] = shape.key_heads.into();
    config["linear_num_value_heads"] = shape.value_heads.into();
    config["linear_key_head_dim"] = shape.key_dim.into();
    config["linear_value_head_dim"] = shape.value_dim.into();
    Ok(())
}

/// The sizes that the keys of a GGUF have.
pub(super) fn gguf_shape(keys: &GgufKeys) -> Result<DeltaShape> {
    let size = |key: &str, most: usize| match keys.size(key)? {
        n if n > most => Err(keys.bad(key, &format!("at most {most}"))),
        n => Ok(n),
    };
    let value_heads = size("ssm.time_step_rank", MAX_HEADS)?;
    let key = "ssm.inner_size";
    let inner = size(key, value_heads * MAX_HEADS)?;
    if !inner.is_multiple_of(value_heads) {
        return Err(keys.bad(key, &format!("a multiple of {value_heads} heads")));
    }
    let key = "ssm.group_count";
    let key_heads = keys.size(key)?;
    if !value_heads.is_multiple_of(key_heads) {
        return Err(keys.bad(key, &format!("a divisor of {value_heads} heads")));
    }
    Ok(DeltaShape {
        key_heads,
        value_heads,
        key_dim: size("ssm.state_size", MAX_HEADS)?,
        value_dim: inner / value_heads,
        taps: size("ssm.conv_kernel", MAX_TAPS)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn keys(change: (&str, u32)) -> Vec<(String, gguf::Value)> {
        let mut all = vec![("general.architecture".into(), "qwen35".into())];
        for (key, n) in [
            ("ssm.conv_kernel", 4),
            ("ssm.group_count", 16),
            ("ssm.inner_size", 6144),
            ("ssm.state_size", 128),
            ("ssm.time_step_rank", 48),
        ] {
            let n = if key == change.0 { change.1 } else { n };
            all.push((format!("qwen35.{key}"), gguf::Value::U32(n)));
        }
        all
    }

    #[test]
    fn sizes_of_the_27b() {
        let all = keys(("", 0));
        let keys = GgufKeys::new(Path::new("x.gguf"), &all).unwrap();
        let shape = gguf_shape(&keys).unwrap();
        assert_eq!((shape.value_dim, shape.conv_width()), (128, 10_240));
        let mut config = json!({});
        add_delta_net(&keys, &mut config).unwrap();
        assert_eq!(config["full_attention_interval"], 4);
        assert_eq!(config["linear_num_value_heads"], 48);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused_by_their_key() {
        for (key, n) in [
            ("ssm.conv_kernel", 65),
            ("ssm.group_count", 7),
            ("ssm.inner_size", 6145),
            ("ssm.inner_size", u32::MAX),
            ("ssm.state_size", 0),
            ("ssm.state_size", u32::MAX),
            ("ssm.time_step_rank", u32::MAX),
        ] {
            let all = keys((key, n));
            let keys = GgufKeys::new(Path::new("x.gguf"), &all).unwrap();
            let message = gguf_shape(&keys).unwrap_err().to_string();
            let expected = format!("x.gguf: qwen35.{key}: expected");
            assert!(message.starts_with(&expected), "{message}");
        }
    }
}
