//! The parts of an output beside its tensors: metadata, names and row orders, config.json and the
//! other files of a folder.

use super::{Action, Builder, Naming, Sidecar, mlx, sidecars};
use crate::recipe::Format;
use crate::rows::OutputOrder;
use crate::{Error, Result};
use bitnet_core::codes::whole_groups;
use bitnet_core::pack::PackedLen;
use bitnet_formats::arch::{self, Architecture, ElementForm, HeadCounts};
use bitnet_formats::document;
use bitnet_formats::hf::{BitnetConfig, Mode};
use bitnet_formats::output::{Container, OutputTensor};
use bitnet_formats::{Content, Kind, StoredId, StoredType, Tensor, TensorId, gguf, python_json};
use std::collections::BTreeMap;

impl Builder<'_> {
    pub(super) fn start_gguf(&mut self) -> Result<()> {
        let source = self.source;
        if source.kind() == Kind::Gguf {
            let of_file = [document::KEY, "general.file_type"];
            let keep = |k: &str| !of_file.contains(&k) && !gguf::SPLIT_KEYS.contains(&k);
            self.container = Container::Gguf(
                source
                    .gguf()
                    .iter()
                    .filter(|(k, _)| keep(k))
                    .cloned()
                    .collect(),
            );
            return Ok(());
        }
        let Some(config) = source.config() else {
            return Err(Error::Recipe(format!(
                "GGUF needs the model's architecture: give the folder with config.json instead of {}",
                source.path().display()
            )));
        };
        let model = arch::gguf_metadata(source.path(), config)?;
        self.naming = Naming::ToGguf(model.architecture, HeadCounts::from_hf_config(config)?);
        self.notes.extend(model.notes);
        let ignored = source.tensors().iter().map(|t| t.name.as_str());
        let ignored = ignored.filter(|name| model.architecture.ignores(name));
        let ignored: Vec<String> = ignored.map(str::to_string).collect();
        if !ignored.is_empty() {
            self.notes.push(format!(
                "a GGUF of a {} has no place for {}: hidden states do not depend on them",
                model.architecture.name,
                sidecars::named(&ignored)
            ));
        }
        self.losses = model.losses;
        self.container = Container::Gguf(model.metadata);
        for (name, divisors) in model.rope_tensors {
            let bytes: Vec<u8> = divisors.iter().flat_map(|f| f.to_le_bytes()).collect();
            let data = self.add_out(
                name.into(),
                vec![divisors.len()],
                StoredType::F32,
                PackedLen::Exact(bytes.len()),
            );
            self.push(
                None,
                name.into(),
                Action::Literal(bytes),
                None,
                (data, None, None),
                None,
            );
        }
        Ok(())
    }

    pub(super) fn start_folder(&mut self) -> Result<()> {
        let source = self.source;
        let mut sidecars = BTreeMap::new();
        match source.kind() {
            Kind::Folder => sidecars = sidecars::of_folder(source, &mut self.notes)?,
            Kind::Gguf => {
                let shape = |name: &str| {
                    source
                        .find_stored(name)
                        .map(|i| source.stored(i).shape.clone())
                };
                self.config = Some(arch::hf_config(
                    source.path(),
                    source.gguf(),
                    &shape,
                    &|name| source.vector(name),
                )?);
                self.naming = Naming::ToHf(
                    Architecture::from_gguf(source.gguf())?,
                    HeadCounts::from_gguf(source.gguf())?,
                );
                match arch::hf_tokenizer(source.gguf()) {
                    Ok((tokenizer, config)) => {
                        for (name, json) in [
                            ("tokenizer.json", tokenizer),
                            ("tokenizer_config.json", config),
                        ] {
                            let text = serde_json::to_string_pretty(&json).unwrap_or_default();
                            sidecars.insert(name.into(), Sidecar::Bytes(text.into_bytes()));
                        }
                    }
                    Err(why) => self.notes.push(format!(
                        "the tokenizer of this GGUF has no form as a tokenizer.json; it is not \
                         written: {why}"
                    )),
                }
            }
            Kind::File => {
                return Err(Error::Recipe(format!(
                    "a folder needs the model's config.json: give the input as a folder, or an output that ends in .safetensors instead of {}",
                    source.path().display()
                )));
            }
        }
        self.sidecars = Some(sidecars);
        Ok(())
    }

    /// Writes a small tensor that has other elements or another shape in the other container: the
    /// gains of norms that count from 1, and parts of gated delta nets. Whether it is one.
    pub(super) fn converted(&mut self, index: TensorId, stored: StoredId) -> Result<bool> {
        let tensor = self.source.tensor(index);
        let (form, shape) = match self.naming {
            Naming::Same => return Ok(false),
            Naming::ToGguf(architecture, _) => {
                let name = &tensor.name;
                let shape = architecture.gguf_shape(name, &tensor.shape);
                (architecture.gguf_elements(name), shape)
            }
            Naming::ToHf(architecture, _) => match architecture.hf_tensor(&tensor.name) {
                Some(name) => {
                    let shape = architecture.hf_shape(&name, &tensor.shape);
                    (architecture.gguf_elements(&name), shape)
                }
                None => return Ok(false),
            },
        };
        let vector = tensor.shape.len() == 1 && form != ElementForm::Same;
        if !vector && shape == tensor.shape {
            return Ok(false);
        }
        let Some((name, order)) = self.rename(tensor)? else {
            return Ok(false);
        };
        let mut values = vec![0.0; tensor.elements()];
        let (source, len) = (self.source, values.len());
        source.read_floats(stored, 0..len, &mut vec![], &mut values)?;
        if let Some(OutputOrder::Rows(order)) = &order {
            let row = len / order.len().max(1);
            let rows = (0..order.len()).map(|r| order.row(r));
            let moved = rows.flat_map(|r| &values[r * row..][..row]);
            values = moved.copied().collect();
        }
        let element = |w: f32| match self.naming {
            Naming::ToHf(..) => form.to_hf(w),
            _ => form.to_gguf(w),
        };
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|&w| element(w).to_le_bytes())
            .collect();
        let size = PackedLen::Exact(bytes.len());
        let data = self.add_out(name.clone(), shape, StoredType::F32, size);
        let action = Action::Literal(bytes);
        self.push(Some(index), name, action, None, (data, None, None), None);
        Ok(true)
    }

    /// Refuses an order of columns that would tear apart what has one scale, in a tensor whose codes
    /// are kept.
    pub(super) fn check_groups(&self, tensor: &Tensor, order: Option<&OutputOrder>) -> Result<()> {
        let Some(OutputOrder::Columns(columns)) = order else {
            return Ok(());
        };
        let group = match &tensor.content {
            Content::Quantized(q) if q.transposed => columns.len(),
            Content::Quantized(q) if q.spec.granules_per_row() > 1 => q.spec.granule_cols(),
            Content::Quantized(_) => 1,
            Content::Float(stored) | Content::Opaque(stored) => {
                self.source.stored(*stored).dtype.block()
            }
        };
        if whole_groups(columns, group) {
            return Ok(());
        }
        let expected = "groups of columns within a value head, since heads change places between a \
                        folder and a GGUF; `bitnet dequantize` first";
        let got = format!("{group} columns with one scale");
        Err(bitnet_formats::Error::tensor(&self.path(tensor), &tensor.name, expected, got).into())
    }

    /// Refuses an order of columns in a rotated basis, which is not that of the original one.
    pub(super) fn check_basis(&self, tensor: &Tensor, order: Option<&OutputOrder>) -> Result<()> {
        if !matches!(order, Some(OutputOrder::Columns(_))) || !self.is_rotated(tensor)? {
            return Ok(());
        }
        let expected = "columns in their original basis, since heads change places between a \
                        folder and a GGUF; `bitnet convert --unrotate`";
        let got = "a rotated basis";
        Err(bitnet_formats::Error::tensor(&self.path(tensor), &tensor.name, expected, got).into())
    }

    /// Name and order of rows or columns in the output; `None` for a buffer that the other container does not
    /// store.
    pub(super) fn rename(&self, tensor: &Tensor) -> Result<Option<(String, Option<OutputOrder>)>> {
        if let Some(output) = &self.reshaped {
            let order = output.rows.clone().map(OutputOrder::Rows);
            return Ok(Some((output.name.clone(), order)));
        }
        if matches!(self.naming, Naming::Same) {
            return Ok(Some((tensor.name.clone(), None)));
        }
        if arch::is_rope_tensor(&tensor.name) {
            return Ok(None);
        }
        if let Naming::ToGguf(architecture, _) = self.naming
            && architecture.ignores(&tensor.name)
        {
            return Ok(None);
        }
        let unknown = |side: &str| {
            let expected = format!("a tensor that {side} has a name for");
            Error::from(bitnet_formats::Error::tensor(
                &self.path(tensor),
                &tensor.name,
                expected,
                "none",
            ))
        };
        Ok(Some(match self.naming {
            Naming::Same => (tensor.name.clone(), None),
            Naming::ToGguf(architecture, heads) => {
                let name = architecture.gguf_tensor(&tensor.name);
                let order = architecture.gguf_order(heads, &tensor.name, &tensor.shape);
                (name.ok_or_else(|| unknown("GGUF"))?, order?.map(Into::into))
            }
            Naming::ToHf(architecture, heads) => {
                let name = architecture.hf_tensor(&tensor.name);
                let name = name.ok_or_else(|| unknown("a Hugging Face folder"))?;
                let order = architecture.hf_order(heads, &name, &tensor.shape)?;
                (name, order.map(Into::into))
            }
        }))
    }

    /// Writes config.json of an output folder so that its quantization section matches the tensors.
    pub(super) fn finish_config(&mut self) -> Result<()> {
        let (Some(sidecars), Some(config)) = (&mut self.sidecars, &mut self.config) else {
            return Ok(());
        };
        let Some(object) = config.as_object_mut() else {
            return Ok(());
        };
        for key in ["quantization_config", "quantization", "compression_config"] {
            object.remove(key);
        }
        if self.format == Format::HfBitnet {
            // transformers expects packed weights for every linear layer that is not named here. It
            // never replaces an embedding: to name one is harmless, and its name proves nothing.
            let mut keep: Vec<String> = self
                .tensor_jobs
                .iter()
                .filter(|u| {
                    !matches!(u.action, Action::Pack(_)) && self.tensors[u.data].shape.len() == 2
                })
                .filter_map(|u| u.name.strip_suffix(".weight").map(str::to_string))
                .filter(|n| n.rsplit('.').next() != Some("embed_tokens"))
                .collect();
            // Without a list transformers leaves the head and the last module alone. The last one of
            // a model without a head may be packed.
            let causal = object
                .get("architectures")
                .and_then(|a| a[0].as_str())
                .is_none_or(|a| a.ends_with("ForCausalLM"));
            if (!keep.is_empty() || !causal) && !keep.iter().any(|k| k == "lm_head") {
                keep.push("lm_head".into());
            }
            if !causal {
                // Tied to the embedding, such a head is in no file.
                keep.extend(TIED_HEADS.iter().map(|&head| head.into()));
            }
            let bitnet = BitnetConfig {
                linear_class: self.linear_class,
                mode: Mode::Offline,
            };
            object.insert("quantization_config".into(), bitnet.to_json(&keep));
        } else if let Some(quantization) = mlx::config(&self.mlx) {
            object.insert("quantization".into(), quantization);
        } else if self.source.bitnet().is_some_and(|b| b.mode == Mode::Online) {
            let online = self
                .source
                .config()
                .and_then(|c| c.get("quantization_config"))
                .cloned()
                .unwrap_or_default();
            if self.packed.is_empty() {
                object.insert("quantization_config".into(), online);
            }
        }
        let mut text = python_json::to_text(config);
        text.push('\n');
        sidecars.insert("config.json".into(), Sidecar::Bytes(text.into_bytes()));
        Ok(())
    }
}

/// Names of the tied heads of encoders, beside `lm_head`.
const TIED_HEADS: &[&str] = &[
    "cls.predictions.decoder",
    "lm_head.decoder",
    "predictions.decoder",
    "vocab_projector",
    "generator_lm_head",
];

/// `general.file_type` of llama.cpp: the type of most bytes of the two-dimensional tensors, where
/// it has a number.
pub(super) fn file_type(tensors: &[OutputTensor]) -> Option<u32> {
    let mut bytes: BTreeMap<u32, usize> = BTreeMap::new();
    for tensor in tensors.iter().filter(|t| t.shape.len() > 1) {
        let number = match tensor.dtype.to_ggml()? {
            gguf::GgmlType::F32 => 0,
            gguf::GgmlType::F16 => 1,
            gguf::GgmlType::Q4_0 => 2,
            gguf::GgmlType::Q8_0 => 7,
            gguf::GgmlType::Bf16 => 32,
            gguf::GgmlType::Tq1_0 => 36,
            gguf::GgmlType::Tq2_0 => 37,
            gguf::GgmlType::I2S => 40,
            gguf::GgmlType::Pq2_0 => 141,
            gguf::GgmlType::Ptq1_0 => 143,
            _ => continue,
        };
        // Weights rather than bytes: a type is what most weights are.
        *bytes.entry(number).or_default() += tensor.shape.iter().product::<usize>();
    }
    bytes
        .into_iter()
        .max_by_key(|&(_, weights)| weights)
        .map(|(number, _)| number)
}
