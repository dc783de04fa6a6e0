//! Tensor names: Hugging Face llama and bitnet on one side, GGUF on the other.

/// Modules outside the layers.
const GLOBAL: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Modules of one layer: `model.layers.N.` here, `blk.N.` there.
const LAYER: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.attn_sub_norm", "attn_sub_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.ffn_sub_norm", "ffn_sub_norm"),
];

/// The GGUF name of a Hugging Face llama or bitnet tensor; `None` for a name that GGUF has no place
/// for.
///
/// ```
/// use bitnet_formats::arch::{gguf_name, hf_name};
/// assert_eq!(gguf_name("model.layers.7.self_attn.o_proj.weight").as_deref(), Some("blk.7.attn_output.weight"));
/// assert_eq!(hf_name("blk.7.attn_output.weight").as_deref(), Some("model.layers.7.self_attn.o_proj.weight"));
/// assert_eq!(gguf_name("model.layers.7.self_attn.rotary_emb.inv_freq"), None);
/// ```
pub fn gguf_name(hf_name: &str) -> Option<String> {
    rename(hf_name, "model.layers.", "blk.", |(hf, gguf)| (hf, gguf))
}

/// The Hugging Face name of a GGUF tensor of a llama or bitnet model; the inverse of [`gguf_name`].
pub fn hf_name(gguf_name: &str) -> Option<String> {
    rename(gguf_name, "blk.", "model.layers.", |(hf, gguf)| (gguf, hf))
}

fn rename(
    name: &str,
    layers: &str,
    new_layers: &str,
    pair: fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let find = |table: &[(&'static str, &'static str)], module: &str| {
        table
            .iter()
            .map(|&p| pair(p))
            .find(|(from, _)| *from == module)
            .map(|(_, to)| to)
    };
    match module.strip_prefix(layers) {
        None => Some(format!("{}.{kind}", find(&GLOBAL, module)?)),
        Some(rest) => {
            let (number, module) = rest.split_once('.')?;
            // The number is written back as it was read: one spelling for each layer.
            let layer: u32 = number
                .parse()
                .ok()
                .filter(|n: &u32| n.to_string() == number)?;
            Some(format!(
                "{new_layers}{layer}.{}.{kind}",
                find(&LAYER, module)?
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_goes_round() {
        let mut seen = std::collections::BTreeSet::new();
        for kind in ["weight", "bias"] {
            let global =
                GLOBAL.map(|(hf, gguf)| (format!("{hf}.{kind}"), format!("{gguf}.{kind}")));
            let layers = [0, 9, 131].into_iter().flat_map(|n| {
                LAYER.map(|(hf, gguf)| {
                    (
                        format!("model.layers.{n}.{hf}.{kind}"),
                        format!("blk.{n}.{gguf}.{kind}"),
                    )
                })
            });
            for (hf, gguf) in global.into_iter().chain(layers) {
                assert_eq!(gguf_name(&hf).as_ref(), Some(&gguf), "{hf}");
                assert_eq!(hf_name(&gguf).as_ref(), Some(&hf), "{gguf}");
                assert!(seen.insert(hf) && seen.insert(gguf), "names are distinct");
            }
        }
        assert_eq!(seen.len(), 2 * 2 * (3 + 3 * 11));
    }

    #[test]
    fn other_names_have_none() {
        for name in [
            "",
            "weight",
            "model.embed_tokens",
            "model.embed_tokens.weight_scale",
            "model.layers.x.mlp.up_proj.weight",
            "model.layers.07.mlp.up_proj.weight",
            "model.layers.0.mlp.experts.weight",
            "model.layers.0.weight",
            "blk.0.attn_q.weight",
        ] {
            assert_eq!(gguf_name(name), None, "{name}");
        }
        for name in [
            "rope_freqs.weight",
            "blk.0.attn_q.scale",
            "blk.0.ffn_gate_inp.weight",
            "blk.-1.ffn_up.weight",
            "lm_head.weight",
        ] {
            assert_eq!(hf_name(name), None, "{name}");
        }
    }
}
