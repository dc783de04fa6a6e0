//! Plans an ONNX folder: `model.onnx` with the graph, and `model.onnx.data` with the weights.
//!
//! The data is a safetensors file, which the graph refers to by offsets. So the writer, the journal
//! and the checksums are those of every other output.

use super::{Action, Builder, Job, Sidecar};
use crate::onnx::{self, Facts, RotaryFunction, RotaryTable, SUFFIXES, Weight};
use crate::recipe::Format;
use crate::rows::OutputOrder;
use crate::{Error, Result};
use bitnet_core::ScaleDtype;
use bitnet_core::pack::PackedLen;
use bitnet_formats::arch::{self, HfConfig};
use bitnet_formats::hf::Mode;
use bitnet_formats::onnx::{BlockFormat, ElementType};
use bitnet_formats::{Content, Kind, Source, StoredType, TensorId, document, output, python_json};
use std::collections::BTreeMap;
use std::path::Path;

/// The output matrix, which a tied model may store too.
const HEAD: &str = "lm_head.weight";

/// Refuses ONNX where something else than a conversion is asked for.
pub(super) fn refuse_quantize(format: Format) -> Result<()> {
    match format {
        Format::Onnx => Err(Error::Recipe(
            "format onnx takes a model as it is: write a folder first, then bitnet convert FOLDER \
             --format onnx --out OUT"
                .into(),
        )),
        Format::Safetensors | Format::HfBitnet | Format::Mlx | Format::Gguf => Ok(()),
    }
}

/// The job that writes a model as an ONNX folder.
pub(super) fn convert<'a>(source: &'a Source, layout: Option<&str>, out: &Path) -> Result<Job<'a>> {
    if let Some(layout) = layout {
        return Err(Error::Recipe(format!(
            "format onnx has blocks of its own, not layout {layout}"
        )));
    }
    if source.bitnet().is_some_and(|b| b.mode == Mode::Online) {
        let expected = "weights that are used as they are stored; run bitnet quantize first";
        let got = "'online', which makes them ternary in each forward pass";
        let path = source.path().join("config.json");
        let key = "quantization_config.quantization_mode";
        return Err(bitnet_formats::Error::config(&path, key, expected, got).into());
    }
    let mut builder = Builder::new(source, Format::Onnx, out, None)?;
    let facts = builder.onnx_facts()?;
    builder.onnx_losses(&facts);
    let mut weights = BTreeMap::new();
    for id in source.tensor_ids() {
        if let Some((name, weight)) = builder.onnx_tensor(id, &facts)? {
            weights.insert(name, weight);
        }
    }
    let model = onnx::build(source.path(), &facts, &weights)?;
    builder.rotary_tables(&facts);
    let mut genai = python_json::to_text(&onnx::genai_config(&facts));
    genai.push('\n');
    for (name, bytes) in [(onnx::GENAI, genai.into_bytes()), (onnx::MODEL, vec![])] {
        let sidecars = builder.sidecars.get_or_insert_default();
        sidecars.insert(name.into(), Sidecar::Bytes(bytes));
    }
    let mut job =
        builder.finish(serde_json::json!({"command": "convert", "format": Format::Onnx}))?;
    job.layout.shard_size = None;
    // The graph needs the offsets, and they are known from here on: the header has room for its
    // checksum already.
    let regions = output::regions(out, &job.layout)?;
    let region = |name: &str| regions.get(name).copied().unwrap_or_default();
    let bytes = model.encode(super::GENERATOR, onnx::DATA, &region);
    let sum = document::checksum(&bytes);
    job.layout.document.files.insert(onnx::MODEL.into(), sum);
    let sidecars = job.sidecars.get_or_insert_default();
    sidecars.insert(onnx::MODEL.into(), Sidecar::Bytes(bytes));
    Ok(job)
}

impl Builder<'_> {
    fn onnx_facts(&self) -> Result<Facts> {
        let folder = self.source.path();
        let path = match self.source.kind() {
            Kind::Folder => folder.join("config.json"),
            Kind::Gguf | Kind::File => folder.to_path_buf(),
        };
        let config = self.config.as_ref().unwrap_or(&serde_json::Value::Null);
        let mut facts = Facts::read(&path, config)?;
        if self.source.kind() == Kind::Folder {
            let (path, value) = (&path, config);
            facts.eos = arch::eos_ids(folder, &HfConfig { path, value })?;
        }
        Ok(facts)
    }

    /// What the graph does not do that the model does elsewhere.
    fn onnx_losses(&mut self, facts: &Facts) {
        if facts.architecture.int8_activations || self.source.bitnet().is_some() {
            self.losses.push(
                "the ONNX graph multiplies float activations; the model was trained with activations \
                 rounded to int8 for each token, so its logits differ a little"
                    .into(),
            );
        }
    }

    /// Plans a tensor of the model: its name and what the data file holds. `None` for one that the
    /// graph does not need.
    fn onnx_tensor(&mut self, id: TensorId, facts: &Facts) -> Result<Option<(String, Weight)>> {
        let tensor = self.source.tensor(id);
        let Some((name, rows)) = self.rename(tensor)? else {
            return Ok(None);
        };
        let buffer = name.ends_with("rotary_emb.inv_freq");
        if buffer || (facts.tied && name == HEAD) {
            return Ok(None);
        }
        let stored = match &tensor.content {
            Content::Quantized(matrix) => {
                let format = BlockFormat::of(&matrix.spec).map_err(self.tensor_error(tensor))?;
                self.push_blocks(id, &name, rows, &format);
                return Ok(Some((name, Weight::Blocks(format))));
            }
            Content::Float(stored) => *stored,
            Content::Opaque(stored) => {
                let dtype = self.source.stored(*stored).dtype;
                return Err(self.tensor_error(tensor)(bitnet_core::Error::Unsupported {
                    layout: "onnx",
                    why: format!("the graph has no place for a tensor of type {dtype}"),
                }));
            }
        };
        let stored = self.source.stored(stored);
        // Matrices keep their type, vectors are f32.
        let kept = ScaleDtype::ALL.iter().copied().find(|&dtype| {
            StoredType::from(dtype) == stored.dtype
                && (tensor.shape.len() > 1 || dtype == ScaleDtype::F32)
        });
        let dtype = kept.unwrap_or(ScaleDtype::F32);
        let len = PackedLen::Exact(tensor.elements() * dtype.bytes());
        let data = self.add_out(name.clone(), tensor.shape.clone(), dtype.into(), len);
        let action = kept.map_or(Action::Cast(ScaleDtype::F32), |_| Action::Copy);
        let decoded = !matches!(stored.dtype, StoredType::Plain(_));
        let note = decoded.then(|| format!("{} decoded to f32", stored.dtype));
        let ids = (data, None, None);
        self.push(Some(id), name.clone(), action, rows, ids, note);
        let element = match dtype {
            ScaleDtype::F32 => ElementType::F32,
            ScaleDtype::F16 => ElementType::F16,
            ScaleDtype::Bf16 => ElementType::Bf16,
        };
        let shape = tensor.shape.clone();
        Ok(Some((name, Weight::Floats { shape, element })))
    }

    fn push_blocks(
        &mut self,
        id: TensorId,
        name: &str,
        rows: Option<OutputOrder>,
        format: &BlockFormat,
    ) {
        let (n, blocks) = (format.rows, format.blocks());
        let [codes, scales, zeros] = SUFFIXES.map(|suffix| format!("{name}{suffix}"));
        let mut add = |name, shape: Vec<usize>, dtype: StoredType, bytes| {
            let len = PackedLen::Exact(shape.iter().product::<usize>() * bytes);
            self.add_out(name, shape, dtype, len)
        };
        let shape = vec![n, blocks, format.block_bytes()];
        let data = add(codes, shape, StoredType::U8, 1);
        let scale = add(scales, vec![n, blocks], StoredType::F32, 4);
        let shape = vec![n, format.zero_point_bytes()];
        let zero = format
            .zero_points
            .then(|| add(zeros, shape, StoredType::U8, 1));
        let action = Action::Blocks(format.clone());
        let ids = (data, Some(scale), zero);
        self.push(Some(id), name.into(), action, rows, ids, None);
    }

    fn rotary_tables(&mut self, facts: &Facts) {
        let functions = [RotaryFunction::Cos, RotaryFunction::Sin];
        for (name, function) in onnx::ROTARY.into_iter().zip(functions) {
            let table = RotaryTable {
                function,
                positions: facts.context,
                frequencies: facts.frequencies.clone(),
                factor: facts.attention_factor,
            };
            let shape = vec![table.positions, table.frequencies.len()];
            let len = PackedLen::Exact(table.len());
            let data = self.add_out(name.into(), shape, StoredType::F32, len);
            let action = Action::Rotary(table);
            self.push(None, name.into(), action, None, (data, None, None), None);
        }
    }
}
