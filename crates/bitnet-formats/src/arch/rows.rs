//! The order of rows, which differs where llama.cpp rotates other pairs of dimensions than Hugging
//! Face.

use super::architecture::Architecture;
use super::keys::GgufKeys;
use super::values::HfConfig;
use crate::{Error, Result, gguf};
use serde_json::Value;
use std::path::Path;

/// Numbers of attention heads, on which the row order depends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadCounts {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
}

impl HeadCounts {
    /// From a config.json: `num_attention_heads`, and `num_key_value_heads` or the architecture's
    /// default.
    ///
    /// # Errors
    /// [`Error::Config`] where the first is missing or one of them is no positive number.
    pub fn from_hf_config(config: &Value) -> Result<Self> {
        let config = HfConfig {
            path: Path::new("config.json"),
            value: config,
        };
        let heads = config.size("num_attention_heads")?;
        let defaults = Architecture::hf_defaults_of(config.value);
        let default = defaults.and_then(|d| d.kv_heads).unwrap_or(heads);
        Ok(Self {
            heads,
            kv_heads: config
                .optional_size("num_key_value_heads")?
                .unwrap_or(default),
        })
    }

    /// From GGUF metadata: `attention.head_count`, and `attention.head_count_kv` or as many.
    ///
    /// # Errors
    /// [`Error::Config`] where the first is missing or one of them is not one positive number for
    /// all layers.
    pub fn from_gguf(metadata: &[(String, gguf::Value)]) -> Result<Self> {
        let keys = GgufKeys::new(Path::new("GGUF metadata"), metadata)?;
        let heads = keys.size("attention.head_count")?;
        Ok(Self {
            heads,
            kv_heads: keys
                .optional_size("attention.head_count_kv")?
                .unwrap_or(heads),
        })
    }
}

impl Architecture {
    /// For each row of the GGUF tensor its row in the Hugging Face tensor; `None` if the order is
    /// the same.
    ///
    /// Rotary embeddings turn pairs of a head's dimensions. Hugging Face pairs i with i + d/2
    /// (rotate-half) in every model. llama.cpp does so for `bitnet` (`llama_model_rope_type` puts
    /// LLM_ARCH_BITNET among the NEOX ones, "the pairs of head values are offset by n_rot/2"), but
    /// pairs 2i with 2i + 1 for `llama` (NORM). So its converter permutes the rows of q and k,
    /// biases included, of `LlamaModel` (`reshape(heads, 2, d/2, …).swapaxes(1, 2)`), and leaves
    /// those of `BitnetModel` alone; bitnet.cpp's converters do the same, so the names
    /// `bitnet-b1.58` and `bitnet-25` mean the Hugging Face order as well.
    ///
    /// # Errors
    /// [`Error::Tensor`] where the rows are not whole heads of an even number of dimensions.
    pub fn gguf_rows(
        &self,
        counts: HeadCounts,
        hf_name: &str,
        rows: usize,
    ) -> Result<Option<Vec<usize>>> {
        // GGUF row (head, pair, half) is row (head, half, pair) here.
        self.rows(counts, hf_name, rows, |head_dim, within| {
            (within % 2) * (head_dim / 2) + within / 2
        })
    }

    /// For each row of the Hugging Face tensor its row in the GGUF tensor: the inverse of
    /// [`Architecture::gguf_rows`], where the conventions are described.
    ///
    /// # Errors
    /// As [`Architecture::gguf_rows`].
    pub fn hf_rows(
        &self,
        counts: HeadCounts,
        hf_name: &str,
        rows: usize,
    ) -> Result<Option<Vec<usize>>> {
        self.rows(counts, hf_name, rows, |head_dim, within| {
            2 * (within % (head_dim / 2)) + within / (head_dim / 2)
        })
    }

    fn rows(
        &self,
        counts: HeadCounts,
        hf_name: &str,
        rows: usize,
        source: fn(usize, usize) -> usize,
    ) -> Result<Option<Vec<usize>>> {
        let module = hf_name
            .strip_suffix(".weight")
            .or_else(|| hf_name.strip_suffix(".bias"))
            .unwrap_or_default();
        let heads = match self.gguf_adjacent_pairs {
            true if module.ends_with(".self_attn.q_proj") => counts.heads,
            true if module.ends_with(".self_attn.k_proj") => counts.kv_heads,
            _ => return Ok(None),
        };
        if heads == 0
            || rows == 0
            || !rows.is_multiple_of(heads)
            || !(rows / heads).is_multiple_of(2)
        {
            let expected = format!("rows of {heads} heads with an even number each");
            return Err(Error::tensor(
                Path::new("model"),
                hf_name,
                expected,
                format!("{rows} rows"),
            ));
        }
        let head_dim = rows / heads;
        Ok(Some(
            (0..rows)
                .map(|row| row / head_dim * head_dim + source(head_dim, row % head_dim))
                .collect(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::known::{BITNET, LLAMA};
    use super::*;
    use serde_json::json;

    const COUNTS: HeadCounts = HeadCounts {
        heads: 4,
        kv_heads: 2,
    };

    #[test]
    fn row_order_is_that_of_llama_cpps_converter() {
        // numpy: np.arange(16).reshape(2, 2, 4).swapaxes(1, 2).reshape(-1)
        let two_heads_of_eight = vec![0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15];
        // numpy: np.arange(16).reshape(4, 2, 2).swapaxes(1, 2).reshape(-1)
        let four_heads_of_four = vec![0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15];
        let order = |name: &str| LLAMA.gguf_rows(COUNTS, name, 16).unwrap();
        assert_eq!(
            order("model.layers.3.self_attn.k_proj.weight"),
            Some(two_heads_of_eight)
        );
        for kind in ["weight", "bias"] {
            assert_eq!(
                order(&format!("model.layers.3.self_attn.q_proj.{kind}")),
                Some(four_heads_of_four.clone())
            );
        }
    }

    #[test]
    fn the_inverse_undoes_it() {
        for (name, rows) in [
            ("model.layers.0.self_attn.q_proj.weight", 4 * 10),
            ("model.layers.0.self_attn.k_proj.bias", 2 * 64),
        ] {
            let there = LLAMA.gguf_rows(COUNTS, name, rows).unwrap().unwrap();
            let back = LLAMA.hf_rows(COUNTS, name, rows).unwrap().unwrap();
            let both: Vec<usize> = back.iter().map(|&row| there[row]).collect();
            assert_eq!(both, (0..rows).collect::<Vec<_>>(), "{name}");
            assert_ne!(
                there, back,
                "the permutation is not its own inverse, or this test says little"
            );
        }
    }

    #[test]
    fn everything_else_keeps_its_order() {
        for name in [
            "v_proj.weight",
            "o_proj.weight",
            "q_proj.weight_scale",
            "attn_sub_norm.weight",
        ] {
            let name = format!("model.layers.0.self_attn.{name}");
            assert_eq!(LLAMA.gguf_rows(COUNTS, &name, 16).unwrap(), None, "{name}");
        }
        assert_eq!(
            BITNET
                .gguf_rows(COUNTS, "model.layers.0.self_attn.q_proj.weight", 16)
                .unwrap(),
            None
        );
    }

    #[test]
    fn rows_that_are_no_heads_are_refused() {
        for rows in [0, 15, 4, 12] {
            let message = LLAMA
                .gguf_rows(COUNTS, "model.layers.0.self_attn.q_proj.weight", rows)
                .unwrap_err()
                .to_string();
            assert!(
                message.contains("4 heads") && message.contains(&format!("{rows} rows")),
                "{message}"
            );
        }
    }

    #[test]
    fn head_counts() {
        let counts = |json| HeadCounts::from_hf_config(&json);
        assert_eq!(
            counts(json!({"num_attention_heads": 4, "num_key_value_heads": 2})).unwrap(),
            COUNTS
        );
        assert_eq!(
            counts(json!({"num_attention_heads": 4})).unwrap(),
            HeadCounts {
                heads: 4,
                kv_heads: 4
            }
        );
        let mistral = json!({"model_type": "mistral", "num_attention_heads": 32});
        assert_eq!(counts(mistral).unwrap().kv_heads, 8);
        for (json, key) in [
            (json!({}), "num_attention_heads"),
            (
                json!({"num_attention_heads": 4, "num_key_value_heads": 0}),
                "num_key_value_heads",
            ),
        ] {
            assert!(counts(json).unwrap_err().to_string().contains(key));
        }
        let gguf = [
            ("general.architecture".into(), "llama".into()),
            ("llama.attention.head_count".into(), gguf::Value::U32(4)),
        ];
        assert_eq!(
            HeadCounts::from_gguf(&gguf).unwrap(),
            HeadCounts {
                heads: 4,
                kv_heads: 4
            }
        );
    }
}
