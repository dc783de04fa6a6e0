//! Tensor names: Hugging Face on one side, GGUF on the other.

use super::architecture::{Architecture, ModelKind};

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
        // A bert of a larger model has names with its own before them.
        let hf = match self.kind {
            ModelKind::Encoder => hf.strip_prefix("bert.").unwrap_or(hf),
            ModelKind::Decoder => hf,
        };
        self.rename(hf, [self.kind.hf_layers(), "blk."], |(hf, gguf)| (hf, gguf))
    }

    /// The Hugging Face name of a GGUF tensor; the inverse of [`Architecture::gguf_tensor`].
    pub fn hf_tensor(&self, gguf: &str) -> Option<String> {
        self.rename(gguf, ["blk.", self.kind.hf_layers()], |(hf, gguf)| {
            (gguf, hf)
        })
    }

    /// Whether the graph and a GGUF have no place for a Hugging Face tensor: the pooler and the
    /// heads of an encoder, which do not belong to the hidden states, and a list of positions.
    pub fn ignores(&self, hf: &str) -> bool {
        let hf = hf.strip_prefix("bert.").unwrap_or(hf);
        let buffers = ["embeddings.position_ids", "embeddings.token_type_ids"];
        self.kind == ModelKind::Encoder
            && (buffers.contains(&hf)
                || ["pooler.", "cls.", "classifier."]
                    .iter()
                    .any(|head| hf.starts_with(head)))
    }

    /// What a GGUF adds to each element of a Hugging Face tensor: 1 to the weights of norms that
    /// multiply by `1 + w` in transformers.
    pub fn gguf_offset(&self, hf: &str) -> f32 {
        match hf.ends_with("norm.weight") {
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
        let (module, kind) = name.rsplit_once('.')?;
        if !matches!(kind, "weight" | "bias") {
            return None;
        }
        let find = |table: &[ModuleNames], module: &str| {
            let mut pairs = table.iter().map(|&pair| direction(pair));
            pairs.find(|(from, _)| *from == module).map(|(_, to)| to)
        };
        match module.strip_prefix(layers) {
            None => Some(format!("{}.{kind}", find(self.modules, module)?)),
            Some(rest) => {
                let (number, module) = rest.split_once('.')?;
                // The number is written back as it was read: one spelling for each layer.
                let layer: u32 = number
                    .parse()
                    .ok()
                    .filter(|n: &u32| n.to_string() == number)?;
                let module = find(self.layer_modules, module)?;
                Some(format!("{new_layers}{layer}.{module}.{kind}"))
            }
        }
    }
}

/// A module's name in Hugging Face folders and in GGUF files.
type ModuleNames = (&'static str, &'static str);

#[cfg(test)]
mod tests {
    use super::super::known::{ARCHITECTURES, BERT, GEMMA3, LLAMA};

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
                            format!("{}{n}.{hf}.{kind}", architecture.kind.hf_layers()),
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
    fn a_bert_inside_another_model() {
        let name = "bert.encoder.layer.3.output.LayerNorm.bias";
        let gguf = "blk.3.layer_output_norm.bias";
        assert_eq!(BERT.gguf_tensor(name).as_deref(), Some(gguf));
        assert_eq!(LLAMA.gguf_tensor(name), None);
        for name in [
            "pooler.dense.weight",
            "bert.embeddings.position_ids",
            "cls.predictions.bias",
        ] {
            assert!(BERT.ignores(name) && !LLAMA.ignores(name), "{name}");
        }
        assert!(!BERT.ignores(name));
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
