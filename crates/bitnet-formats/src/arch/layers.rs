//! What each layer of a decoder sees and how it rotates, from a config.json.

use super::architecture::{Architecture, LayerRule};
use super::values::HfConfig;
use crate::Result;
use serde_json::Value;

/// Largest number of layers: a list of this length is made before any tensor is looked at.
const MAX_LAYERS: usize = 1 << 12;

/// The rotary positions of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRope {
    /// None.
    None,
    /// Those of the model.
    Global,
    /// Those of layers with a window.
    Local,
}

/// How a layer mixes the tokens of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenMixer {
    /// Softmax attention over keys and values.
    Attention,
    /// A gated delta net, which has a state instead of keys and values.
    DeltaNet,
}

/// What a layer sees and how it rotates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerAttention {
    /// Largest number of positions that a token sees, itself included; none for all.
    pub window: Option<usize>,
    /// Its rotary positions.
    pub rope: LayerRope,
    /// How it mixes tokens.
    pub mixer: TokenMixer,
}

impl LayerAttention {
    /// A layer that sees all positions and rotates.
    pub const FULL: Self = Self {
        window: None,
        rope: LayerRope::Global,
        mixer: TokenMixer::Attention,
    };

    /// A gated delta net.
    pub const DELTA_NET: Self = Self {
        window: None,
        rope: LayerRope::None,
        mixer: TokenMixer::DeltaNet,
    };

    /// Those of each layer of a config.json.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key of another type, for lists of another
    /// length, and for a kind of layer that is not known.
    pub fn read(config: &HfConfig, architecture: &Architecture) -> Result<Vec<Self>> {
        let count = config.size("num_hidden_layers")?;
        if count > MAX_LAYERS {
            return Err(config.bad("num_hidden_layers", &format!("at most {MAX_LAYERS}")));
        }
        let mut layers = vec![Self::FULL; count];
        let size = "sliding_window";
        match architecture.layers {
            LayerRule::Uniform => {}
            LayerRule::Window => {
                let window = config.optional_size(size)?;
                layers.iter_mut().for_each(|layer| layer.window = window);
            }
            LayerRule::SwitchedWindow => {
                if config.flag("use_sliding_window")? {
                    let window = config.optional_size(size)?;
                    layers.iter_mut().for_each(|layer| layer.window = window);
                }
            }
            LayerRule::UpperWindow => {
                if config.flag("use_sliding_window")? {
                    let from = match config.get("max_window_layers") {
                        None => 28,
                        Some(_) => config.count("max_window_layers")?,
                    };
                    set_windows(config, &mut layers, |i, _| i >= from)?;
                } else {
                    set_windows(config, &mut layers, |_, _| false)?;
                }
                check_switch(config, &layers)?;
            }
            LayerRule::SomeRotate => {
                set_rotation(config, &mut layers)?;
                let on = config.flag("use_sliding_window")? && config.get(size).is_some();
                set_windows(config, &mut layers, |_, l| on && l.rope == LayerRope::None)?;
                check_switch(config, &layers)?;
            }
            LayerRule::Local => {
                let pattern = config.optional_size("sliding_window_pattern")?.unwrap_or(6);
                set_windows(config, &mut layers, |i, _| !(i + 1).is_multiple_of(pattern))?;
                for layer in layers.iter_mut().filter(|layer| layer.window.is_some()) {
                    layer.rope = LayerRope::Local;
                }
            }
            LayerRule::Delta => set_delta_nets(config, &mut layers)?,
        }
        Ok(layers)
    }
}

/// Gives `sliding_window` to the layers that `layer_types` names, or else those of `default`.
fn set_windows(
    config: &HfConfig,
    layers: &mut [LayerAttention],
    default: impl Fn(usize, &LayerAttention) -> bool,
) -> Result<()> {
    let key = "layer_types";
    let types = list(config, key, layers.len())?;
    for (i, layer) in layers.iter_mut().enumerate() {
        let windowed = match types.map(|types| types[i].as_str()) {
            None => default(i, layer),
            Some(Some("full_attention")) => false,
            Some(Some("sliding_attention")) => true,
            Some(_) => return Err(config.bad(key, "'full_attention' or 'sliding_attention'")),
        };
        if windowed {
            layer.window = Some(config.size("sliding_window")?);
        }
    }
    Ok(())
}

/// Refuses windows in `layer_types` where `use_sliding_window` is off.
fn check_switch(config: &HfConfig, layers: &[LayerAttention]) -> Result<()> {
    let key = "use_sliding_window";
    if !config.flag(key)? && layers.iter().any(|layer| layer.window.is_some()) {
        return Err(config.bad(key, "true, since layer_types names layers with a window"));
    }
    Ok(())
}

/// Takes the rotation from the layers that `no_rope_layers` gives a 0, or from one in
/// `no_rope_layer_interval`.
fn set_rotation(config: &HfConfig, layers: &mut [LayerAttention]) -> Result<()> {
    let (key, interval) = ("no_rope_layers", "no_rope_layer_interval");
    let listed = list(config, key, layers.len())?;
    let interval = config.optional_size(interval)?.unwrap_or(4);
    for (i, layer) in layers.iter_mut().enumerate() {
        let rotates = match listed.map(|listed| listed[i].as_u64()) {
            None => !(i + 1).is_multiple_of(interval),
            Some(Some(0)) => false,
            Some(Some(1)) => true,
            Some(_) => return Err(config.bad(key, "1 for a layer that rotates, else 0")),
        };
        if !rotates {
            layer.rope = LayerRope::None;
        }
    }
    Ok(())
}

/// Makes gated delta nets of the layers that `layer_types` names, or of all but one in
/// `full_attention_interval`.
fn set_delta_nets(config: &HfConfig, layers: &mut [LayerAttention]) -> Result<()> {
    let key = "layer_types";
    let types = list(config, key, layers.len())?;
    let interval = config
        .optional_size("full_attention_interval")?
        .unwrap_or(4);
    for (i, layer) in layers.iter_mut().enumerate() {
        let delta = match types.map(|types| types[i].as_str()) {
            None => !(i + 1).is_multiple_of(interval),
            Some(Some("full_attention")) => false,
            Some(Some("linear_attention")) => true,
            Some(_) => return Err(config.bad(key, "'full_attention' or 'linear_attention'")),
        };
        if delta {
            *layer = LayerAttention::DELTA_NET;
        }
    }
    Ok(())
}

/// A list with an entry for each layer, if the key is there.
fn list<'a>(config: &HfConfig<'a>, key: &str, count: usize) -> Result<Option<&'a Vec<Value>>> {
    let Some(value) = config.get(key) else {
        return Ok(None);
    };
    let list = value.as_array().filter(|list| list.len() == count);
    list.map(Some).ok_or_else(|| {
        config.bad(
            key,
            &format!("a list with an entry for each of {count} layers"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::known::{GEMMA3, MISTRAL, QWEN3, QWEN3_MOE, QWEN35, SMOLLM3};
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn read(architecture: &Architecture, mut value: Value) -> Result<String> {
        value["num_hidden_layers"] = 6.into();
        let config = HfConfig {
            path: Path::new("config.json"),
            value: &value,
        };
        let layers = LayerAttention::read(&config, architecture)?;
        let shown = layers.iter().map(|l| {
            let rope = match l.rope {
                _ if l.mixer == TokenMixer::DeltaNet => 'd',
                LayerRope::None => '-',
                LayerRope::Global => 'g',
                LayerRope::Local => 'l',
            };
            format!("{rope}{}", l.window.unwrap_or(0))
        });
        Ok(shown.collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn windows_and_rotation_of_each_layer() {
        for (architecture, value, expected) in [
            (&MISTRAL, json!({"sliding_window": 8}), "g8 g8 g8 g8 g8 g8"),
            (
                &MISTRAL,
                json!({"sliding_window": null}),
                "g0 g0 g0 g0 g0 g0",
            ),
            (
                &QWEN3,
                json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 4}),
                "g0 g0 g0 g0 g8 g8",
            ),
            (
                &QWEN3,
                json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0}),
                "g8 g8 g8 g8 g8 g8",
            ),
            (
                &QWEN3,
                json!({"use_sliding_window": false, "sliding_window": 8, "max_window_layers": 0}),
                "g0 g0 g0 g0 g0 g0",
            ),
            (
                &QWEN3_MOE,
                json!({"use_sliding_window": true, "sliding_window": 8}),
                "g8 g8 g8 g8 g8 g8",
            ),
            (
                &QWEN3_MOE,
                json!({"use_sliding_window": false, "sliding_window": 8}),
                "g0 g0 g0 g0 g0 g0",
            ),
            (&SMOLLM3, json!({}), "g0 g0 g0 -0 g0 g0"),
            (
                &SMOLLM3,
                json!({"no_rope_layers": [0, 1, 1, 1, 0, 1], "use_sliding_window": true,
                       "sliding_window": 5}),
                "-5 g0 g0 g0 -5 g0",
            ),
            (&GEMMA3, json!({"sliding_window": 4}), "l4 l4 l4 l4 l4 g0"),
            (
                &GEMMA3,
                json!({"sliding_window": 4, "sliding_window_pattern": 3}),
                "l4 l4 g0 l4 l4 g0",
            ),
            (&QWEN35, json!({}), "d0 d0 d0 g0 d0 d0"),
            (
                &QWEN35,
                json!({"full_attention_interval": 3}),
                "d0 d0 g0 d0 d0 g0",
            ),
        ] {
            assert_eq!(
                read(architecture, value.clone()).unwrap(),
                expected,
                "{value}"
            );
        }
        let full = "full_attention";
        for (value, key) in [
            (json!({"layer_types": [full]}), "layer_types"),
            (
                json!({"layer_types": [full, full, full, full, full, "chunked_attention"]}),
                "layer_types",
            ),
            (json!({"sliding_window": 0}), "sliding_window"),
            (json!({}), "sliding_window"),
        ] {
            let message = read(&GEMMA3, value).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }
}
