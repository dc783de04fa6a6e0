//! Mixtures of experts: what a config.json and the keys of a GGUF say of them.

use super::architecture::Architecture;
use super::keys::GgufKeys;
use super::values::HfConfig;
use crate::Result;
use serde_json::Value;

/// How an architecture mixes experts: feed-forward layers of which a router chooses some for each
/// token, by the softmax of its logits over all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertRule {
    /// Whether llama.cpp divides the weights of the chosen experts by their sum: no key says so.
    pub gguf_normalized: bool,
    /// Whether each layer has one more expert, which sees every token: its output is multiplied by
    /// the sigmoid of a gate.
    pub shared: bool,
}

/// The experts of a decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Experts {
    /// `num_experts`.
    pub count: usize,
    /// `num_experts_per_tok`: how many a token uses.
    pub used: usize,
    /// `moe_intermediate_size`.
    pub ffn: usize,
    /// `norm_topk_prob`: whether the weights of the chosen experts are divided by their sum.
    pub normalized: bool,
    /// `shared_expert_intermediate_size`, where there is a shared expert.
    pub shared_ffn: Option<usize>,
    /// Whether each layer has experts; the others have one dense feed-forward.
    pub layers: Vec<bool>,
}

/// Most experts of a layer: known models have at most 512.
const MAX_EXPERTS: usize = 1 << 12;

/// The two names of the number of experts in a config.json.
const COUNT: [&str; 2] = ["num_experts", "num_local_experts"];

impl Experts {
    /// Those of a config.json; none in an architecture without experts.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key that is missing, is no value of its kind,
    /// or contradicts another.
    pub fn read(config: &HfConfig, architecture: &Architecture) -> Result<Option<Self>> {
        let Some(rule) = architecture.experts else {
            return Ok(None);
        };
        let [count, local] = [
            config.optional_size(COUNT[0])?,
            config.optional_size(COUNT[1])?,
        ];
        let count = match (count, local) {
            (Some(a), Some(b)) if a != b => {
                return Err(config.bad(COUNT[1], &format!("{a}, as num_experts says")));
            }
            (a, b) => a
                .or(b)
                .ok_or_else(|| config.bad(COUNT[0], "a positive number"))?,
        };
        if count > MAX_EXPERTS {
            return Err(config.bad(COUNT[0], &format!("at most {MAX_EXPERTS}")));
        }
        let key = "num_experts_per_tok";
        let used = config.size(key)?;
        if used > count {
            return Err(config.bad(key, &format!("at most {count}, the number of experts")));
        }
        let shared_ffn = match rule.shared {
            true => Some(config.size("shared_expert_intermediate_size")?),
            false => None,
        };
        Ok(Some(Self {
            count,
            used,
            ffn: config.size("moe_intermediate_size")?,
            normalized: config.flag("norm_topk_prob")?,
            shared_ffn,
            layers: sparse_layers(config)?,
        }))
    }

    /// Refuses what llama.cpp's graph of the architecture computes otherwise.
    pub(super) fn check_gguf(&self, config: &HfConfig, architecture: &Architecture) -> Result<()> {
        let name = architecture.name;
        let normalized = architecture
            .experts
            .is_some_and(|rule| rule.gguf_normalized);
        if self.normalized != normalized {
            let expected = format!("{normalized} in a GGUF of {name}, which no key says otherwise");
            return Err(config.bad("norm_topk_prob", &expected));
        }
        if !self.layers.iter().all(|sparse| *sparse) {
            let listed = config.get(DENSE).and_then(Value::as_array);
            let key = match listed.is_some_and(|listed| !listed.is_empty()) {
                true => DENSE,
                false => STEP,
            };
            let expected = format!("experts in each layer in a GGUF of {name}");
            return Err(config.bad(key, &expected));
        }
        Ok(())
    }
}

/// What a tensor of experts in a Hugging Face folder is in a GGUF, which has a tensor of three
/// dimensions for each projection of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpertTensor {
    /// `experts.gate_up_proj`, `[E, 2·ffn, hidden]`: gate and up of each expert, for two tensors.
    GateUp([String; 2]),
    /// `experts.down_proj`, `[E, hidden, ffn]`: this tensor.
    Down(String),
    /// `experts.N.….weight`: one matrix of a tensor.
    One {
        /// The tensor.
        stack: String,
        /// N.
        expert: usize,
    },
}

impl Architecture {
    /// What a tensor of experts is in a GGUF; `None` for every other tensor.
    ///
    /// ```
    /// use bitnet_formats::arch::{ExpertTensor, QWEN3_MOE};
    /// let stack = "blk.3.ffn_up_exps.weight".to_string();
    /// let one = QWEN3_MOE.gguf_experts("model.layers.3.mlp.experts.7.up_proj.weight");
    /// assert_eq!(one, Some(ExpertTensor::One { stack, expert: 7 }));
    /// ```
    pub fn gguf_experts(&self, hf: &str) -> Option<ExpertTensor> {
        let (mlp, rest) = hf.split_once(".experts.")?;
        let stack = |of: &str| self.gguf_tensor(&format!("{mlp}.switch_mlp.{of}"));
        match rest {
            "gate_up_proj" => Some(ExpertTensor::GateUp([
                stack("gate_proj.weight")?,
                stack("up_proj.weight")?,
            ])),
            "down_proj" => stack("down_proj.weight").map(ExpertTensor::Down),
            _ => {
                let (number, of) = rest.split_once('.')?;
                let expert: usize = number.parse().ok().filter(|_| of.ends_with(".weight"))?;
                // One spelling for each number.
                let stack = stack(of).filter(|_| expert.to_string() == number)?;
                Some(ExpertTensor::One { stack, expert })
            }
        }
    }

    /// For a tensor of experts in a GGUF the module of experts in a Hugging Face folder, and the
    /// part of a name behind the number of the expert.
    pub fn hf_experts(&self, gguf: &str) -> Option<(String, String)> {
        let hf = self.hf_tensor(gguf)?;
        let (mlp, of) = hf.split_once(".switch_mlp.")?;
        Some((format!("{mlp}.experts"), of.into()))
    }
}

/// llama.cpp's number of the softmax.
const SOFTMAX: u64 = 1;

const STEP: &str = "decoder_sparse_step";
const DENSE: &str = "mlp_only_layers";

/// Whether each layer has experts: each `decoder_sparse_step`-th, unless `mlp_only_layers` lists it.
fn sparse_layers(config: &HfConfig) -> Result<Vec<bool>> {
    let count = config.size("num_hidden_layers")?;
    let step = config.optional_size(STEP)?.unwrap_or(1);
    let mut layers: Vec<bool> = (1..=count).map(|n| n.is_multiple_of(step)).collect();
    let bad = || config.bad(DENSE, &format!("a list of layers below {count}"));
    if let Some(listed) = config.get(DENSE) {
        for layer in listed.as_array().ok_or_else(bad)? {
            let layer = layer.as_u64().and_then(|n| usize::try_from(n).ok());
            *layer.and_then(|n| layers.get_mut(n)).ok_or_else(bad)? = false;
        }
    }
    Ok(layers)
}

/// The keys of a config.json for the experts of a GGUF; `shape` as in
/// [`hf_config`](super::hf_config).
pub(super) fn add_experts(
    keys: &GgufKeys,
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
    config: &mut Value,
) -> Result<()> {
    let Some(rule) = keys.architecture.experts else {
        return Ok(());
    };
    // What llama.cpp's graphs take as given.
    let key = "expert_gating_func";
    if keys.get(key).is_some_and(|v| v.as_u64() != Some(SOFTMAX)) {
        return Err(keys.bad(key, &format!("{SOFTMAX}, a softmax over all experts")));
    }
    let (key, normalized) = ("expert_weights_norm", rule.gguf_normalized);
    if keys
        .get(key)
        .is_some_and(|v| v.as_bool() != Some(normalized))
    {
        return Err(keys.bad(key, &normalized.to_string()));
    }
    // Files older than the keys: the sizes of the matrices.
    let ffn_of = |tensor: &str| {
        let shape = shape(&format!("blk.0.{tensor}.weight"));
        shape.and_then(|shape| shape.iter().rev().nth(1).copied())
    };
    let ffn = |key: &str, tensor: &str| match (keys.optional_size(key)?, ffn_of(tensor)) {
        (Some(n), _) | (None, Some(n)) => Ok(n),
        (None, None) => Err(keys.bad(key, "a positive number")),
    };
    config["num_experts"] = keys.size("expert_count")?.into();
    config["num_experts_per_tok"] = keys.size("expert_used_count")?.into();
    config["moe_intermediate_size"] = ffn("expert_feed_forward_length", "ffn_gate_exps")?.into();
    if rule.shared {
        let key = "expert_shared_feed_forward_length";
        config["shared_expert_intermediate_size"] = ffn(key, "ffn_gate_shexp")?.into();
    }
    config["norm_topk_prob"] = rule.gguf_normalized.into();
    config["decoder_sparse_step"] = 1.into();
    config["mlp_only_layers"] = Value::Array(vec![]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::known::{QWEN2_MOE, QWEN3, QWEN3_MOE};
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn read(architecture: &Architecture, change: Value) -> Result<Option<Experts>> {
        let mut value = json!({
            "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
        });
        for (key, new) in change.as_object().into_iter().flatten() {
            value[key] = new.clone();
        }
        let config = HfConfig {
            path: Path::new("config.json"),
            value: &value,
        };
        Experts::read(&config, architecture)
    }

    #[test]
    fn experts_of_each_layer() {
        assert_eq!(read(&QWEN3, json!({})).unwrap(), None);
        let plain = Experts {
            count: 8,
            used: 2,
            ffn: 32,
            normalized: false,
            shared_ffn: None,
            layers: vec![true; 4],
        };
        let of = |value| read(&QWEN3_MOE, value).unwrap().unwrap();
        assert_eq!(of(json!({})), plain);
        // transformers 5 writes the number under another name.
        let renamed = json!({"num_experts": null, "num_local_experts": 8});
        assert_eq!(of(renamed), plain);
        assert!(of(json!({"norm_topk_prob": true})).normalized);
        for (value, layers) in [
            (
                json!({"decoder_sparse_step": 2}),
                [false, true, false, true],
            ),
            (
                json!({"mlp_only_layers": [0, 2]}),
                [false, true, false, true],
            ),
            (
                json!({"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
                [false, true, false, false],
            ),
        ] {
            assert_eq!(of(value).layers, layers);
        }
        let shared = read(&QWEN2_MOE, json!({})).unwrap().unwrap();
        assert_eq!(shared.shared_ffn, Some(48));
    }

    #[test]
    fn tensors_of_experts() {
        let gguf = |name: &str| format!("blk.2.{name}.weight");
        let of = |name: &str| QWEN3_MOE.gguf_experts(&format!("model.layers.2.mlp.{name}"));
        let both = [gguf("ffn_gate_exps"), gguf("ffn_up_exps")];
        assert_eq!(of("experts.gate_up_proj"), Some(ExpertTensor::GateUp(both)));
        let down = gguf("ffn_down_exps");
        assert_eq!(
            of("experts.down_proj"),
            Some(ExpertTensor::Down(down.clone()))
        );
        let one = ExpertTensor::One {
            stack: down.clone(),
            expert: 10,
        };
        assert_eq!(of("experts.10.down_proj.weight"), Some(one));
        for other in [
            "experts.1.down_proj.bias",
            "experts.01.down_proj.weight",
            "experts.x.down_proj.weight",
            "experts.1.other.weight",
            "gate.weight",
            "shared_expert.up_proj.weight",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
        assert_eq!(
            QWEN3.gguf_experts("model.layers.2.mlp.experts.down_proj"),
            None
        );
        let experts = "model.layers.2.mlp.experts".to_string();
        let expected = Some((experts, "down_proj.weight".into()));
        assert_eq!(QWEN3_MOE.hf_experts(&down), expected);
        assert_eq!(QWEN3_MOE.hf_experts(&gguf("ffn_down")), None);
    }

    #[test]
    fn keys_that_fit_nothing_are_refused_by_name() {
        for (value, parts) in [
            (json!({"num_experts": null}), ["num_experts", "positive"]),
            (json!({"num_experts": 0}), ["num_experts", "positive"]),
            (json!({"num_experts": 1 << 20}), ["num_experts", "at most"]),
            (json!({"num_local_experts": 4}), ["num_local_experts", "8"]),
            (
                json!({"num_experts_per_tok": 9}),
                ["num_experts_per_tok", "at most 8"],
            ),
            (
                json!({"moe_intermediate_size": null}),
                ["moe_intermediate_size", "null"],
            ),
            (
                json!({"norm_topk_prob": 1}),
                ["norm_topk_prob", "true or false"],
            ),
            (
                json!({"mlp_only_layers": [4]}),
                ["mlp_only_layers", "below 4"],
            ),
            (json!({"mlp_only_layers": 1}), ["mlp_only_layers", "a list"]),
            (
                json!({"decoder_sparse_step": 0}),
                ["decoder_sparse_step", "positive"],
            ),
        ] {
            let message = read(&QWEN3_MOE, value).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }
}
