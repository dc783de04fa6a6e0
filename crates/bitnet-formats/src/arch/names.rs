//! Tensor names: Hugging Face on one side, GGUF on the other.

use super::architecture::{Architecture, LayerRule, ModelKind};

/// How elements of a Hugging Face tensor are stored in a GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementForm {
    /// As they are.
    Same,
    /// `1 + w`: the weights of norms that multiply by it.
    PlusOne,
    /// `−e^w`: the logarithms of decay rates.
    NegatedExp,
}

impl ElementForm {
    /// An element as a GGUF stores it.
    pub fn to_gguf(self, w: f32) -> f32 {
        match self {
            Self::Same => w,
            Self::PlusOne => w + 1.0,
            Self::NegatedExp => -f64::from(w).exp() as f32,
        }
    }

    /// An element as a Hugging Face folder stores it.
    pub fn to_hf(self, w: f32) -> f32 {
        match self {
            Self::Same => w,
            Self::PlusOne => w - 1.0,
            Self::NegatedExp => f64::from(-w).ln() as f32,
        }
    }
}

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

    /// How the elements of a Hugging Face tensor are stored in a GGUF.
    pub fn gguf_elements(&self, hf: &str) -> ElementForm {
        if self.layers == LayerRule::Delta && hf.ends_with(".linear_attn.A_log") {
            return ElementForm::NegatedExp;
        }
        // The norm behind a gated delta net multiplies by w in every model.
        let from_one = hf.ends_with("norm.weight") && !hf.ends_with("linear_attn.norm.weight");
        match from_one && self.hf_norms_from_one {
            true => ElementForm::PlusOne,
            false => ElementForm::Same,
        }
    }

    /// The shape in a GGUF of a Hugging Face tensor: a depthwise convolution has no dimension of 1.
    pub fn gguf_shape(&self, hf: &str, shape: &[usize]) -> Vec<usize> {
        match shape {
            &[channels, 1, taps] if self.is_convolution(hf) => vec![channels, taps],
            _ => shape.to_vec(),
        }
    }

    /// The shape of a Hugging Face tensor that has this one in a GGUF.
    pub fn hf_shape(&self, hf: &str, shape: &[usize]) -> Vec<usize> {
        match shape {
            &[channels, taps] if self.is_convolution(hf) => vec![channels, 1, taps],
            _ => shape.to_vec(),
        }
    }

    fn is_convolution(&self, hf: &str) -> bool {
        self.layers == LayerRule::Delta && hf.ends_with(".linear_attn.conv1d.weight")
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
    use super::super::known::{ARCHITECTURES, BERT, GEMMA3, LLAMA, QWEN35};
    use super::*;

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
            .map(|norm| QWEN35.gguf_elements(&format!("model.layers.0.{norm}.weight")));
        assert_eq!(norms, [ElementForm::Same, ElementForm::PlusOne]);
        let form = QWEN35.gguf_elements("model.layers.2.linear_attn.A_log");
        assert!((form.to_gguf(0.5) + 1.648_721_3).abs() < 1e-6);
        assert!((form.to_hf(form.to_gguf(0.5)) - 0.5).abs() < 1e-6);
        let conv = "model.layers.2.linear_attn.conv1d.weight";
        assert_eq!(QWEN35.gguf_shape(conv, &[96, 1, 4]), [96, 4]);
        assert_eq!(QWEN35.hf_shape(conv, &[96, 4]), [96, 1, 4]);
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
                (GEMMA3.gguf_elements(&name), LLAMA.gguf_elements(&name)),
                (ElementForm::PlusOne, ElementForm::Same)
            );
        }
        let up = "model.layers.0.mlp.up_proj.weight";
        assert_eq!(GEMMA3.gguf_elements(up), ElementForm::Same);
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
