//! Hugging Face `bitnet` folders: `quantization_config` and its two scale conventions.
//!
//! The convention is read from config.json and nowhere else. Numbers that plainly contradict it are
//! an error, because a reciprocal taken for a scale gives a model that runs and generates noise.

use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// What `weight_scale` means on disk. The names are those of config.json.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearClass {
    /// `bitlinear`, the default: the file holds 1/scale.
    BitLinear,
    /// `autobitlinear`: the file holds the scale.
    AutoBitLinear,
}

bitnet_core::named!(LinearClass, "linear_class", {
    BitLinear = "bitlinear",
    AutoBitLinear = "autobitlinear",
});

impl LinearClass {
    /// Whether the file holds 1/scale.
    pub const fn is_reciprocal(self) -> bool {
        matches!(self, Self::BitLinear)
    }
}

/// Whether the weights on disk are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Packed ternary weights.
    Offline,
    /// Float weights that the model makes ternary in each forward pass.
    Online,
}

/// A checked `quantization_config` with `quant_method` `bitnet`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitnetConfig {
    /// What `weight_scale` means.
    pub linear_class: LinearClass,
    /// What the weights are.
    pub mode: Mode,
}

impl BitnetConfig {
    /// Reads the config of a model. `None` if the model has no `quantization_config`, or one of
    /// another method.
    ///
    /// # Errors
    /// [`Error::Config`] for strings that the two fields do not have.
    pub fn read(path: &Path, config: &Value) -> Result<Option<Self>> {
        let Some(quantization) = config.get("quantization_config").filter(|q| !q.is_null()) else {
            return Ok(None);
        };
        let field = |key: &str, default: &str| match quantization.get(key) {
            None | Some(Value::Null) => Ok(default.to_string()),
            Some(Value::String(s)) => Ok(s.clone()),
            Some(other) => Err(Error::config(
                path,
                format!("quantization_config.{key}"),
                "a string",
                other.to_string(),
            )),
        };
        let method = field("quant_method", "")?;
        // Matrices of other methods are recognised by their tensors.
        if method != "bitnet" {
            return Ok(None);
        }
        let class = field("linear_class", "bitlinear")?;
        let linear_class = class.parse().map_err(|_| {
            Error::config(
                path,
                "quantization_config.linear_class",
                "bitlinear or autobitlinear",
                format!("'{class}'"),
            )
        })?;
        let mode = match field("quantization_mode", "offline")?.as_str() {
            "offline" => Mode::Offline,
            "online" => Mode::Online,
            other => {
                return Err(Error::config(
                    path,
                    "quantization_config.quantization_mode",
                    "offline or online",
                    format!("'{other}'"),
                ));
            }
        };
        if quantization
            .get("use_rms_norm")
            .is_some_and(|v| v.as_bool() != Some(false) && !v.is_null())
        {
            let got = quantization["use_rms_norm"].to_string();
            return Err(Error::config(
                path,
                "quantization_config.use_rms_norm",
                "false: the extra norm is not supported yet",
                got,
            ));
        }
        Ok(Some(Self { linear_class, mode }))
    }

    /// The JSON for config.json. `keep` names the modules that stay as they are.
    pub fn to_json(self, keep: &[String]) -> Value {
        json!({
            "quant_method": "bitnet",
            "linear_class": self.linear_class.name(),
            "quantization_mode": match self.mode { Mode::Offline => "offline", Mode::Online => "online" },
            "modules_to_not_convert": if keep.is_empty() { Value::Null } else { json!(keep) },
            "use_rms_norm": false,
            "rms_norm_eps": 1e-6,
        })
    }
}

/// Whether scales read under one convention are plausible.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// They may be right.
    Plausible,
    /// They are absurd, and the other convention would make them ordinary.
    Contradiction {
        /// Geometric mean of the layers' gains as read.
        gain: f64,
        /// The same under the other convention.
        other: f64,
    },
}

/// Judges scales (as multiplied on dequantize) with the input sizes of their layers.
///
/// A layer with ternary weights of scale s and K inputs amplifies by about `g = s·√K`. Trained
/// layers lie around 1, those before a norm reach some tens. Under the wrong convention g becomes
/// K/g. Only a gain above 300 or below 1/300 whose counterpart lies within 1/30 … 30 is called a
/// contradiction: then a person must look, and no guess is made.
pub fn judge_scales(scales: &[(f32, usize)]) -> Verdict {
    let live: Vec<_> = scales
        .iter()
        .filter(|(s, _)| *s > 0.0 && s.is_finite())
        .collect();
    if live.is_empty() {
        return Verdict::Plausible;
    }
    let mean = |f: &dyn Fn(f64, f64) -> f64| {
        (live
            .iter()
            .map(|&&(s, k)| f(f64::from(s), k as f64).ln())
            .sum::<f64>()
            / live.len() as f64)
            .exp()
    };
    let gain = mean(&|s, k| s * k.sqrt());
    let other = mean(&|s, k| k.sqrt() / s);
    let ordinary = |g: f64| (1.0 / 30.0..=30.0).contains(&g);
    let absurd = |g: f64| !(1.0 / 300.0..=300.0).contains(&g);
    if absurd(gain) && ordinary(other) {
        Verdict::Contradiction { gain, other }
    } else {
        Verdict::Plausible
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: Value) -> Result<Option<BitnetConfig>> {
        BitnetConfig::read(Path::new("config.json"), &json)
    }

    #[test]
    fn defaults_and_both_conventions() {
        assert_eq!(read(json!({})).unwrap(), None);
        let default = read(json!({"quantization_config": {"quant_method": "bitnet"}}))
            .unwrap()
            .unwrap();
        assert_eq!(
            default,
            BitnetConfig {
                linear_class: LinearClass::BitLinear,
                mode: Mode::Offline
            }
        );
        for linear_class in [LinearClass::BitLinear, LinearClass::AutoBitLinear] {
            let config = BitnetConfig {
                linear_class,
                mode: Mode::Online,
            };
            assert_eq!(
                read(json!({"quantization_config": config.to_json(&[])})).unwrap(),
                Some(config)
            );
        }
    }

    #[test]
    fn unknown_strings_are_errors() {
        for (key, value) in [
            ("linear_class", "Bitlinear"),
            ("quantization_mode", "offlin"),
        ] {
            let mut json = json!({"quant_method": "bitnet"});
            json[key] = value.into();
            let message = read(json!({"quantization_config": json}))
                .unwrap_err()
                .to_string();
            assert!(
                message.contains(key) && message.contains(value),
                "{message}"
            );
        }
    }

    #[test]
    fn a_turned_round_scale_is_seen_and_ordinary_ones_are_not() {
        // Initialised like a transformer: mean|W| = 0.016 at K = 2560, read as it is and turned
        // round.
        assert_eq!(
            judge_scales(&[(0.016, 2560), (0.012, 6912)]),
            Verdict::Plausible
        );
        assert!(matches!(
            judge_scales(&[(1.0 / 0.016, 2560), (1.0 / 0.012, 6912)]),
            Verdict::Contradiction { .. }
        ));
        // b1.58-2B-4T has scales around 1 before sub-norms: large, but not absurd.
        assert_eq!(
            judge_scales(&[(1.2, 2560), (2.5, 2560)]),
            Verdict::Plausible
        );
        assert_eq!(judge_scales(&[(0.0, 10)]), Verdict::Plausible);
    }
}
