//! The order of rows, which differs where llama.cpp rotates other pairs of dimensions than Hugging
//! Face.

use super::architecture::{Architecture, LayerRule};
use super::delta::DeltaShape;
use super::delta_keys::gguf_shape;
use super::keys::GgufKeys;
use super::layers::LayerAttention;
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
    /// Sizes of gated delta nets.
    pub delta: Option<DeltaShape>,
}

/// What changes places in a matrix, between a Hugging Face folder and a GGUF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TensorOrder {
    /// For each row the row of the other container.
    Rows(Vec<usize>),
    /// For each column the column of the other container.
    Columns(Vec<usize>),
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
            delta: match Architecture::of(config.value) {
                Some(architecture) if architecture.layers == LayerRule::Delta => {
                    DeltaShape::read(&config, &LayerAttention::read(&config, architecture)?)?
                }
                _ => None,
            },
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
            delta: match keys.architecture.layers {
                LayerRule::Delta => Some(gguf_shape(&keys)?),
                _ => None,
            },
        })
    }
}

/// The sizes of a gated delta net whose heads change places, and the module of a tensor of it.
fn delta_module(counts: HeadCounts, hf_name: &str) -> Option<(DeltaShape, &str)> {
    let shape = counts
        .delta
        .filter(|d| d.key_heads > 1 && d.values_per_key() > 1)?;
    let (_, rest) = hf_name.split_once(".linear_attn.")?;
    Some((shape, rest.strip_suffix(".weight").unwrap_or(rest)))
}

/// The place of a head of v in a Hugging Face folder, where those of a key follow one another, by
/// its place in a GGUF, where head h belongs to key `h % key_heads`.
fn grouped(shape: &DeltaShape, tiled: usize) -> usize {
    let (turn, key) = (tiled / shape.key_heads, tiled % shape.key_heads);
    key * shape.values_per_key() + turn
}

/// The inverse of [`grouped`].
fn tiled(shape: &DeltaShape, grouped: usize) -> usize {
    let (key, turn) = (
        grouped / shape.values_per_key(),
        grouped % shape.values_per_key(),
    );
    turn * shape.key_heads + key
}

/// `total` indices, of which those from `first` on are heads of `unit` in another order.
fn permuted(
    shape: &DeltaShape,
    hf_name: &str,
    [first, unit, total]: [usize; 3],
    head_of: fn(&DeltaShape, usize) -> usize,
) -> Result<Vec<usize>> {
    let expected = first + shape.value_heads * unit;
    if total != expected {
        let expected = format!("{expected}, of {} value heads", shape.value_heads);
        let got = total.to_string();
        return Err(Error::tensor(Path::new("model"), hf_name, expected, got));
    }
    let heads = (0..shape.value_heads).map(|head| first + head_of(shape, head) * unit);
    let moved = heads.flat_map(|start| start..start + unit);
    Ok((0..first).chain(moved).collect())
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
        if let Some(moved) = self.value_heads(counts, hf_name, rows, grouped)? {
            return Ok(Some(moved));
        }
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
        if let Some(moved) = self.value_heads(counts, hf_name, rows, tiled)? {
            return Ok(Some(moved));
        }
        self.rows(counts, hf_name, rows, |head_dim, within| {
            2 * (within % (head_dim / 2)) + within / (head_dim / 2)
        })
    }

    /// For a GGUF tensor of a Hugging Face name and shape, what changes places: the rows of
    /// [`Architecture::gguf_rows`], or the columns of the output matrix of a gated delta net.
    ///
    /// # Errors
    /// As [`Architecture::gguf_rows`].
    pub fn gguf_order(
        &self,
        counts: HeadCounts,
        hf_name: &str,
        shape: &[usize],
    ) -> Result<Option<TensorOrder>> {
        if let Some(columns) = self.value_columns(counts, hf_name, shape, grouped)? {
            return Ok(Some(TensorOrder::Columns(columns)));
        }
        let rows = self.gguf_rows(counts, hf_name, shape.first().copied().unwrap_or(0))?;
        Ok(rows.map(TensorOrder::Rows))
    }

    /// The inverse of [`Architecture::gguf_order`].
    ///
    /// # Errors
    /// As [`Architecture::gguf_rows`].
    pub fn hf_order(
        &self,
        counts: HeadCounts,
        hf_name: &str,
        shape: &[usize],
    ) -> Result<Option<TensorOrder>> {
        if let Some(columns) = self.value_columns(counts, hf_name, shape, tiled)? {
            return Ok(Some(TensorOrder::Columns(columns)));
        }
        let rows = self.hf_rows(counts, hf_name, shape.first().copied().unwrap_or(0))?;
        Ok(rows.map(TensorOrder::Rows))
    }

    /// The rows of a gated delta net's tensor in the order of its value heads, where it has any.
    fn value_heads(
        &self,
        counts: HeadCounts,
        hf_name: &str,
        rows: usize,
        head_of: fn(&DeltaShape, usize) -> usize,
    ) -> Result<Option<Vec<usize>>> {
        let Some((shape, module)) = delta_module(counts, hf_name) else {
            return Ok(None);
        };
        // Rows before those of the value heads, and rows of a head.
        let (first, unit) = match module {
            "in_proj_qkv" | "conv1d" => (2 * shape.key_width(), shape.value_dim),
            "in_proj_z" => (0, shape.value_dim),
            "in_proj_b" | "in_proj_a" | "A_log" | "dt_bias" => (0, 1),
            _ => return Ok(None),
        };
        permuted(&shape, hf_name, [first, unit, rows], head_of).map(Some)
    }

    /// The columns of a gated delta net's output matrix in the order of its value heads.
    fn value_columns(
        &self,
        counts: HeadCounts,
        hf_name: &str,
        shape: &[usize],
        head_of: fn(&DeltaShape, usize) -> usize,
    ) -> Result<Option<Vec<usize>>> {
        match (delta_module(counts, hf_name), shape) {
            (Some((delta, "out_proj")), &[_, columns]) => {
                let sizes = [0, delta.value_dim, columns];
                permuted(&delta, hf_name, sizes, head_of).map(Some)
            }
            _ => Ok(None),
        }
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
    use super::super::known::{BITNET, LLAMA, QWEN35};
    use super::*;
    use serde_json::json;

    const COUNTS: HeadCounts = HeadCounts {
        heads: 4,
        kv_heads: 2,
        delta: None,
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

    /// numpy: the heads of `np.arange(6).reshape(2, 3).T.reshape(-1)`, in units of 4 or 1.
    #[test]
    fn value_heads_are_those_of_llama_cpps_converter() {
        let shape = DeltaShape {
            key_heads: 2,
            value_heads: 6,
            key_dim: 4,
            value_dim: 2,
            taps: 4,
        };
        let counts = HeadCounts {
            delta: Some(shape),
            ..COUNTS
        };
        let name = |module: &str| format!("model.layers.0.linear_attn.{module}");
        let rows = |module: &str, rows| QWEN35.gguf_rows(counts, &name(module), rows).unwrap();
        assert_eq!(rows("A_log", 6), Some(vec![0, 3, 1, 4, 2, 5]));
        let z = vec![0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11];
        assert_eq!(rows("in_proj_z.weight", 12), Some(z.clone()));
        let qkv: Vec<usize> = (0..16).chain(z.iter().map(|i| 16 + i)).collect();
        assert_eq!(rows("in_proj_qkv.weight", 28), Some(qkv.clone()));
        assert_eq!(rows("conv1d.weight", 28), Some(qkv));
        assert_eq!(rows("norm.weight", 2), None);
        let out = name("out_proj.weight");
        let there = QWEN35.gguf_order(counts, &out, &[48, 12]).unwrap();
        assert_eq!(there, Some(TensorOrder::Columns(z.clone())));
        let Some(TensorOrder::Columns(back)) = QWEN35.hf_order(counts, &out, &[48, 12]).unwrap()
        else {
            panic!("columns");
        };
        let both: Vec<usize> = back.iter().map(|&c| z[c]).collect();
        assert_eq!(both, (0..12).collect::<Vec<_>>());
        assert!(QWEN35.gguf_order(counts, &out, &[48, 13]).is_err());
        // As many values as keys: no order to change.
        let counts = HeadCounts {
            delta: Some(DeltaShape {
                key_heads: 6,
                ..shape
            }),
            ..COUNTS
        };
        assert_eq!(QWEN35.gguf_rows(counts, &name("A_log"), 6).unwrap(), None);
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
                kv_heads: 4,
                delta: None,
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
                kv_heads: 4,
                delta: None,
            }
        );
    }
}
