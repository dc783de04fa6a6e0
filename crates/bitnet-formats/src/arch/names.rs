//! Tensor names: Hugging Face on one side, GGUF on the other.

use super::architecture::Architecture;

impl Architecture {
    /// The GGUF name of a Hugging Face tensor; `None` for a name that GGUF has no place for.
    ///
    /// ```
    /// use bitnet_formats::arch::LLAMA;
    /// let (hf, gguf) = ("model.layers.7.self_attn.o_proj.weight", "blk.7.attn_output.weight");
    /// assert_eq!(LLAMA.gguf_tensor(hf).as_deref(), Some(gguf));
    /// assert_eq!(LLAMA.hf_tensor(gguf).as_deref(), Some(hf));
    /// assert_eq!(LLAMA.gguf_tensor("model.layers.7.self_attn.rotary_emb.inv_freq"), None);
    /// ```
    pub fn gguf_tensor(&self, hf: &str) -> Option<String> {
        self.rename(hf, ["model.layers.", "blk."], |(hf, gguf)| (hf, gguf))
    }

    /// The Hugging Face name of a GGUF tensor; the inverse of [`Architecture::gguf_tensor`].
    pub fn hf_tensor(&self, gguf: &str) -> Option<String> {
        self.rename(gguf, ["blk.", "model.layers."], |(hf, gguf)| (gguf, hf))
    }

    /// What a GGUF adds to each element of a Hugging Face tensor: 1 to the weights of norms that
    /// multiply by `1 + w` in transformers.
    pub fn gguf_offset(&self, hf: &str) -> f32 {
        // The norm behind a gated delta net multiplies by w in every model.
        match hf.ends_with("norm.weight") && !hf.ends_with("linear_attn.norm.weight") {
            true if self.hf_norms_from_one => 1.0,
            _ => 0.0,
        }
    }

    fn rename(
        &self,
        name: &str,
        [layers, new_layers]: [&str; 2],
        direction: fn(ModuleNames) -> ModuleNames,
    ) -> Option<String> {
        let find = |table: &[ModuleNames], module: &str| {
            let mut pairs = table.iter().map(|&pair| direction(pair));
            pairs.find(|(from, _)| *from == module).map(|(_, to)| to)
        };
        let with_kind = |table: &[ModuleNames], name: &str| {
            let (module, kind) = name.rsplit_once('.')?;
            let known = matches!(kind, "weight" | "bias");
            known.then_some(format!("{}.{kind}", find(table, module)?))
        };
        let Some(rest) = name.strip_prefix(layers) else {
            return with_kind(self.modules, name);
        };
        let (number, rest) = rest.split_once('.')?;
        // The number is written back as it was read: one spelling for each layer.
        let layer: u32 = number
            .parse()
            .ok()
            .filter(|n: &u32| n.to_string() == number)?;
        let to = find(self.layer_tensors, rest)
            .map(String::from)
            .or_else(|| with_kind(self.layer_modules, rest))?;
        Some(format!("{new_layers}{layer}.{to}"))
    }
}

/// A module's name in Hugging Face folders and in GGUF files.
type ModuleNames = (&'static str, &'static str);

#[cfg(test)]
mod tests {
    use super::super::known::{ARCHITECTURES, GEMMA3, LLAMA, QWEN35};

    #[test]
    fn every_name_goes_round() {
        for architecture in ARCHITECTURES {
            let (modules, layer) = (architecture.modules, architecture.layer_modules);
            let mut seen = std::collections::BTreeSet::new();
            for kind in ["weight", "bias"] {
                let global = modules
                    .iter()
                    .map(|(hf, gguf)| (format!("{hf}.{kind}"), format!("{gguf}.{kind}")));
                let layers = [0, 9, 131].into_iter().flat_map(|n| {
                    layer.iter().map(move |(hf, gguf)| {
                        (
                            format!("model.layers.{n}.{hf}.{kind}"),
                            format!("blk.{n}.{gguf}.{kind}"),
                        )
                    })
                });
                for (hf, gguf) in global.chain(layers) {
                    assert_eq!(architecture.gguf_tensor(&hf).as_ref(), Some(&gguf), "{hf}");
                    assert_eq!(architecture.hf_tensor(&gguf).as_ref(), Some(&hf), "{gguf}");
                    assert!(seen.insert(hf) && seen.insert(gguf), "names are distinct");
                }
            }
            assert_eq!(seen.len(), 2 * 2 * (modules.len() + 3 * layer.len()));
        }
    }

    #[test]
    fn tensors_of_a_delta_net() {
        for (hf, gguf) in [
            ("model.layers.2.linear_attn.A_log", "blk.2.ssm_a"),
            ("model.layers.2.linear_attn.dt_bias", "blk.2.ssm_dt.bias"),
        ] {
            assert_eq!(QWEN35.gguf_tensor(hf).as_deref(), Some(gguf));
            assert_eq!(QWEN35.hf_tensor(gguf).as_deref(), Some(hf));
            assert_eq!(LLAMA.gguf_tensor(hf), None);
        }
        // Its norm multiplies by w, those of the layer by 1 + w.
        let norms = ["linear_attn.norm", "input_layernorm"]
            .map(|norm| QWEN35.gguf_offset(&format!("model.layers.0.{norm}.weight")));
        assert_eq!(norms, [0.0, 1.0]);
    }

    #[test]
    fn norms_that_count_from_one() {
        for name in [
            "model.norm",
            "model.layers.3.self_attn.q_norm",
            "model.layers.0.input_layernorm",
        ] {
            let name = format!("{name}.weight");
            assert_eq!(
                (GEMMA3.gguf_offset(&name), LLAMA.gguf_offset(&name)),
                (1.0, 0.0)
            );
        }
        assert_eq!(GEMMA3.gguf_offset("model.layers.0.mlp.up_proj.weight"), 0.0);
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
            assert_eq!(LLAMA.gguf_tensor(name), None, "{name}");
        }
        for name in [
            "rope_freqs.weight",
            "blk.0.attn_q.scale",
            "blk.0.ffn_gate_inp.weight",
            "blk.-1.ffn_up.weight",
            "lm_head.weight",
        ] {
            assert_eq!(LLAMA.hf_tensor(name), None, "{name}");
        }
    }
}
