//! Model folders of Hugging Face as GGUF files of llama.cpp, and back: names, row order, metadata
//! and tokenizers of llama and bitnet.
//!
//! Everything but the tensors' bytes. To write a GGUF: [`gguf_metadata`] gives the keys,
//! [`gguf_name`] the names and [`row_order`] the rows that have to change places;
//! [`GgufMetadata::rope_freqs`] is one more tensor where there is one. The way back is
//! [`hf_config`], [`hf_tokenizer`], [`hf_name`] and [`hf_row_order`].

mod metadata;
mod names;
mod tokenizer;

pub use metadata::{
    GgufMetadata, HfConfig, HfRope, ROPE_FREQS, activation, gguf_metadata, hf_config,
};
pub use names::{gguf_name, hf_name};
pub use tokenizer::{GgufTokenizer, gguf_bpe, hf_tokenizer};

use crate::gguf;
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// A model architecture that has a place in both containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `llama` in both.
    Llama,
    /// `bitnet` in Hugging Face folders; `bitnet`, `bitnet-b1.58` or `bitnet-25` in GGUF files.
    Bitnet,
}

impl Architecture {
    /// From `model_type` of a config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for any other model type.
    pub fn from_hf_config(config: &Value) -> Result<Self> {
        let key = "model_type";
        match config.get(key).and_then(Value::as_str) {
            Some("llama") => Ok(Self::Llama),
            Some("bitnet") => Ok(Self::Bitnet),
            _ => Err(Error::config(
                Path::new("config.json"),
                key,
                "'llama' or 'bitnet'",
                shown(config.get(key)),
            )),
        }
    }

    /// From `general.architecture` of a GGUF.
    ///
    /// # Errors
    /// [`Error::Config`] for any other architecture.
    pub fn from_gguf(metadata: &[(String, gguf::Value)]) -> Result<Self> {
        let key = "general.architecture";
        match find(metadata, key).and_then(gguf::Value::as_str) {
            Some("llama") => Ok(Self::Llama),
            Some("bitnet" | "bitnet-b1.58" | "bitnet-25") => Ok(Self::Bitnet),
            got => {
                let got = got.map_or("none".into(), |s| format!("'{s}'"));
                Err(Error::config(
                    Path::new("GGUF metadata"),
                    key,
                    "'llama', 'bitnet', 'bitnet-b1.58' or 'bitnet-25'",
                    got,
                ))
            }
        }
    }

    /// What is written as `general.architecture`, and before each key of the architecture.
    ///
    /// For bitnet this is mainline llama.cpp's `bitnet`: it does not know the two other names.
    /// Without the key `bitnet.hidden_activation` it computes SiLU, so that key is always written.
    pub const fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Bitnet => "bitnet",
        }
    }
}

/// Numbers of attention heads: what the row order depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadCounts {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
}

impl HeadCounts {
    /// From a config.json: `num_attention_heads`, and `num_key_value_heads` or as many.
    ///
    /// # Errors
    /// [`Error::Config`] where the first is missing or one of them is no positive number.
    pub fn from_hf_config(config: &Value) -> Result<Self> {
        let config = HfConfig {
            path: Path::new("config.json"),
            value: config,
        };
        let heads = config.size("num_attention_heads")?;
        Ok(Self {
            heads,
            kv_heads: config
                .optional_size("num_key_value_heads")?
                .unwrap_or(heads),
        })
    }

    /// From GGUF metadata: `attention.head_count`, and `attention.head_count_kv` or as many.
    ///
    /// # Errors
    /// [`Error::Config`] where the first is missing or one of them is not one positive number for
    /// all layers.
    pub fn from_gguf(metadata: &[(String, gguf::Value)]) -> Result<Self> {
        let keys = metadata::Keys::new(Path::new("GGUF metadata"), metadata)?;
        let heads = keys.size("attention.head_count")?;
        Ok(Self {
            heads,
            kv_heads: keys
                .optional_size("attention.head_count_kv")?
                .unwrap_or(heads),
        })
    }
}

/// For each row of the GGUF tensor the row of the Hugging Face tensor to take; `None` where the
/// order is the same.
///
/// Rotary embeddings turn pairs of a head's dimensions. Hugging Face pairs i with i + d/2
/// (rotate-half) in every model. llama.cpp does so for `bitnet` (`llama_model_rope_type` puts
/// LLM_ARCH_BITNET among the NEOX ones, "the pairs of head values are offset by n_rot/2"), but
/// pairs 2i with 2i + 1 for `llama` (NORM). So its converter permutes the rows of q and k, biases
/// included, of `LlamaModel` (`reshape(heads, 2, d/2, …).swapaxes(1, 2)`), and leaves those of
/// `BitnetModel` alone; bitnet.cpp's converters do the same, so the names `bitnet-b1.58` and
/// `bitnet-25` mean the Hugging Face order as well.
///
/// # Errors
/// [`Error::Tensor`] where the rows are not whole heads of an even number of dimensions.
pub fn row_order(
    architecture: Architecture,
    counts: HeadCounts,
    hf_name: &str,
    rows: usize,
) -> Result<Option<Vec<usize>>> {
    // GGUF row (head, pair, half) is row (head, half, pair) here.
    order(architecture, counts, hf_name, rows, |head_dim, within| {
        (within % 2) * (head_dim / 2) + within / 2
    })
}

/// For each row of the Hugging Face tensor the row of the GGUF tensor to take: the inverse of
/// [`row_order`], which says more.
///
/// # Errors
/// As [`row_order`].
pub fn hf_row_order(
    architecture: Architecture,
    counts: HeadCounts,
    hf_name: &str,
    rows: usize,
) -> Result<Option<Vec<usize>>> {
    order(architecture, counts, hf_name, rows, |head_dim, within| {
        2 * (within % (head_dim / 2)) + within / (head_dim / 2)
    })
}

fn order(
    architecture: Architecture,
    counts: HeadCounts,
    hf_name: &str,
    rows: usize,
    source: fn(usize, usize) -> usize,
) -> Result<Option<Vec<usize>>> {
    let module = hf_name
        .strip_suffix(".weight")
        .or_else(|| hf_name.strip_suffix(".bias"))
        .unwrap_or_default();
    let heads = match architecture {
        Architecture::Llama if module.ends_with(".self_attn.q_proj") => counts.heads,
        Architecture::Llama if module.ends_with(".self_attn.k_proj") => counts.kv_heads,
        _ => return Ok(None),
    };
    if heads == 0 || rows == 0 || !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
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

/// The value under a key of GGUF metadata.
fn find<'a>(metadata: &'a [(String, gguf::Value)], key: &str) -> Option<&'a gguf::Value> {
    metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v)
}

/// A JSON value for a message.
fn shown(value: Option<&Value>) -> String {
    match value {
        None => "none".into(),
        Some(value) => {
            let text = value.to_string();
            match text.char_indices().nth(120) {
                Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
                None => text,
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
        let order = |name: &str| row_order(Architecture::Llama, COUNTS, name, 16).unwrap();
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
            let there = row_order(Architecture::Llama, COUNTS, name, rows)
                .unwrap()
                .unwrap();
            let back = hf_row_order(Architecture::Llama, COUNTS, name, rows)
                .unwrap()
                .unwrap();
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
            assert_eq!(
                row_order(Architecture::Llama, COUNTS, &name, 16).unwrap(),
                None,
                "{name}"
            );
        }
        assert_eq!(
            row_order(
                Architecture::Bitnet,
                COUNTS,
                "model.layers.0.self_attn.q_proj.weight",
                16
            )
            .unwrap(),
            None
        );
    }

    #[test]
    fn rows_that_are_no_heads_are_refused() {
        for rows in [0, 15, 4, 12] {
            let message = row_order(
                Architecture::Llama,
                COUNTS,
                "model.layers.0.self_attn.q_proj.weight",
                rows,
            )
            .unwrap_err()
            .to_string();
            assert!(
                message.contains("4 heads") && message.contains(&format!("{rows} rows")),
                "{message}"
            );
        }
    }

    #[test]
    fn architectures_and_what_is_not_one() {
        assert_eq!(
            Architecture::from_hf_config(&json!({"model_type": "llama"})).unwrap(),
            Architecture::Llama
        );
        assert_eq!(
            Architecture::from_hf_config(&json!({"model_type": "bitnet"})).unwrap(),
            Architecture::Bitnet
        );
        for (config, got) in [
            (json!({"model_type": "qwen3"}), "\"qwen3\""),
            (json!({}), "none"),
        ] {
            let message = Architecture::from_hf_config(&config)
                .unwrap_err()
                .to_string();
            assert!(
                message.contains("'llama' or 'bitnet'") && message.contains(got),
                "{message}"
            );
        }
        let named =
            |name: &str| Architecture::from_gguf(&[("general.architecture".into(), name.into())]);
        assert_eq!(named("llama").unwrap(), Architecture::Llama);
        for name in ["bitnet", "bitnet-b1.58", "bitnet-25"] {
            assert_eq!(named(name).unwrap(), Architecture::Bitnet);
        }
        assert!(
            named("gemma")
                .unwrap_err()
                .to_string()
                .contains("got 'gemma'")
        );
        assert!(
            Architecture::from_gguf(&[])
                .unwrap_err()
                .to_string()
                .contains("got none")
        );
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
