//! What a job will do to each tensor, decided and checked before the first byte is written.

use crate::recipe::{Choices, Format, Recipe, Target};
use crate::{Error, Result};
use bitnet_core::pack::{self, Layout, PackedLen};
use bitnet_core::scheme::{ScaleForm, Scheme};
use bitnet_core::{Granularity, MatrixSpec, Precision, ScaleDtype, ZeroPoints};
use bitnet_formats::arch::{self, Architecture, HeadCounts};
use bitnet_formats::document::{self, Document, Packed};
use bitnet_formats::hf::{BitnetConfig, LinearClass, Mode};
use bitnet_formats::logical::ggml_type_of;
use bitnet_formats::output::{self, Container, OutTensor};
use bitnet_formats::{Content, Kind, Scales, Source, StoredType, Tensor, gguf};
use std::collections::BTreeMap;
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_128;

/// Name and version in the files that are written.
pub const GENERATOR: &str = concat!("bitnet-quant ", env!("CARGO_PKG_VERSION"));

/// What happens to one tensor.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    /// The stored bytes, as they are.
    Copy,
    /// Floats of this type.
    Cast(ScaleDtype),
    /// Packed values: made by a scheme, or (`None`) taken over from a quantized source.
    Pack(Pack),
    /// Bytes that no tensor of the source holds.
    Literal(Vec<u8>),
}

/// How values are packed.
#[derive(Debug, Clone)]
pub(crate) struct Pack {
    pub(crate) scheme: Option<Scheme>,
    pub(crate) spec: MatrixSpec,
    /// `None`: whichever is smallest.
    pub(crate) layout: Option<&'static dyn Layout>,
    /// Type and meaning of scales that are stored apart.
    pub(crate) scale_dtype: ScaleDtype,
    pub(crate) scale_form: ScaleForm,
}

/// One tensor's work.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    /// Index into the source's tensors; none for a literal.
    pub(crate) tensor: Option<usize>,
    /// Its name in the output.
    pub(crate) name: String,
    pub(crate) work: Work,
    /// For each row of the output the row of the source.
    pub(crate) rows: Option<Vec<usize>>,
    /// Indices of the written tensors: data, scales, zero points.
    pub(crate) data: usize,
    pub(crate) scale: Option<usize>,
    pub(crate) zero: Option<usize>,
    /// What a person should know, e.g. why a tensor is not quantized.
    pub(crate) note: Option<String>,
}

/// A file beside the tensors of a folder.
#[derive(Debug, Clone)]
pub(crate) enum Sidecar {
    /// A copy of this file.
    Copy(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// A job: everything that [`crate::checkpoint::run`] needs.
#[derive(Debug)]
pub struct Job<'a> {
    pub(crate) source: &'a Source,
    pub(crate) units: Vec<Unit>,
    pub(crate) layout: output::Layout,
    /// Files of the output folder by name; `None` if the output is one file.
    pub(crate) sidecars: Option<BTreeMap<String, Sidecar>>,
    /// What a person should know about the whole job.
    pub notes: Vec<String>,
}

/// Whether a path names a folder of tensors or one file.
fn is_folder(out: &std::path::Path) -> bool {
    !out.extension().is_some_and(|e| e == "safetensors" || e == "gguf")
}

impl<'a> Job<'a> {
    /// Quantizes the tensors that the recipe selects, and keeps the others.
    ///
    /// # Errors
    /// [`Error::Recipe`] for choices that do not exist, do not apply, or select nothing; [`Error::Tensor`] for a layout that cannot hold a tensor.
    pub fn quantize(source: &'a Source, recipe: &Recipe, out: &std::path::Path) -> Result<Self> {
        let selector = recipe.selector(source)?;
        let mut builder = Builder::new(source, recipe.format, out, recipe.linear_class)?;
        let mut count = 0;
        for (i, tensor) in source.tensors.iter().enumerate() {
            match selector.choices(tensor) {
                None => builder.keep(i)?,
                Some(choices) => {
                    // Also for floats: a choice that does not apply to them is an error.
                    choices.scheme(Granularity::Channel, ScaleDtype::F32, ScaleForm::Direct)?;
                    match choices.target() {
                        Target::Keep => builder.keep(i)?,
                        Target::Float(dtype) => builder.cast(i, dtype, None)?,
                        Target::Quantized(_) => {
                            count += 1;
                            builder.quantize(i, &choices)?;
                        }
                    }
                }
            }
        }
        if count == 0 && !source.tensors.iter().any(|t| selector.choices(t).is_some()) {
            return Err(Error::Recipe(format!("selects no tensor of {}; see --include and --exclude", source.path.display())));
        }
        builder.finish(serde_json::to_value(recipe).unwrap_or_default())
    }

    /// Writes the same values and scales in another container or layout; float tensors stay as they are.
    ///
    /// # Errors
    /// As [`Job::quantize`]; also where the source holds scales that the layout cannot.
    pub fn convert(
        source: &'a Source,
        format: Format,
        layout: Option<&str>,
        linear_class: Option<LinearClass>,
        out: &std::path::Path,
    ) -> Result<Self> {
        let mut builder = Builder::new(source, format, out, linear_class)?;
        for (i, tensor) in source.tensors.iter().enumerate() {
            match (&tensor.content, layout) {
                (Content::Quantized(_), Some(layout)) => builder.recode(i, Some(layout))?,
                _ => builder.keep(i)?,
            }
        }
        builder.finish(serde_json::json!({"command": "convert", "format": format, "layout": layout}))
    }

    /// Writes every tensor as floats.
    ///
    /// # Errors
    /// As [`Job::quantize`].
    pub fn dequantize(source: &'a Source, dtype: ScaleDtype, out: &std::path::Path) -> Result<Self> {
        let mut builder = Builder::new(source, Format::Safetensors, out, None)?;
        for (i, tensor) in source.tensors.iter().enumerate() {
            match tensor.content {
                Content::Opaque(_) => builder.keep(i)?,
                _ => builder.cast(i, dtype, None)?,
            }
        }
        builder.finish(serde_json::json!({"command": "dequantize", "dtype": dtype}))
    }

    /// Bytes that will be read, for a progress bar.
    pub fn input_bytes(&self) -> u64 {
        self.units.iter().filter_map(|u| u.tensor).map(|t| self.source.tensors[t].bytes(self.source)).sum()
    }
}

/// How names and row orders change between containers.
#[derive(Debug, Clone, Copy)]
enum Naming {
    Same,
    ToGguf(Architecture, HeadCounts),
    ToHf(Architecture, HeadCounts),
}

struct Builder<'a> {
    source: &'a Source,
    format: Format,
    naming: Naming,
    linear_class: LinearClass,
    container: Container,
    units: Vec<Unit>,
    tensors: Vec<OutTensor>,
    packed: BTreeMap<String, Packed>,
    sidecars: Option<BTreeMap<String, Sidecar>>,
    config: Option<serde_json::Value>,
    notes: Vec<String>,
}

impl<'a> Builder<'a> {
    fn new(source: &'a Source, format: Format, out: &std::path::Path, linear_class: Option<LinearClass>) -> Result<Self> {
        if linear_class.is_some() && format != Format::HfBitnet {
            return Err(Error::Recipe("linear_class applies to format hf-bitnet only".into()));
        }
        let folder = format != Format::Gguf && is_folder(out);
        match (format, out.extension().and_then(|e| e.to_str())) {
            (Format::HfBitnet, Some(e @ ("safetensors" | "gguf"))) => {
                return Err(Error::Recipe(format!("format hf-bitnet writes a folder, and the output is named .{e}")));
            }
            (Format::Safetensors, Some("gguf")) => {
                return Err(Error::Recipe("format safetensors, and the output is named .gguf; give --format gguf".into()));
            }
            (Format::Gguf, Some("safetensors")) => {
                return Err(Error::Recipe("format gguf, and the output is named .safetensors".into()));
            }
            _ => {}
        }
        let mut builder = Self {
            source,
            format,
            naming: Naming::Same,
            linear_class: linear_class.unwrap_or(LinearClass::BitLinear),
            container: Container::Gguf(vec![]),
            units: vec![],
            tensors: vec![],
            packed: BTreeMap::new(),
            sidecars: None,
            config: source.config.clone(),
            notes: source.notes.clone(),
        };
        if source.bitnet.is_some_and(|b| b.mode == Mode::Online) {
            builder.notes.push(
                "quantization_mode online: the model makes these weights ternary in each forward pass; here they count as floats".into(),
            );
        }
        if format == Format::Gguf {
            builder.start_gguf()?;
        } else {
            let metadata = source.metadata.iter().filter(|(k, _)| k != document::KEY && k != "format").cloned();
            builder.container = Container::Safetensors([("format".into(), "pt".into())].into_iter().chain(metadata).collect());
            if folder {
                builder.start_folder()?;
            }
        }
        Ok(builder)
    }

    fn start_gguf(&mut self) -> Result<()> {
        let source = self.source;
        if source.kind == Kind::Gguf {
            let keep = |k: &str| k != document::KEY && k != "general.file_type";
            self.container = Container::Gguf(source.gguf.iter().filter(|(k, _)| keep(k)).cloned().collect());
            return Ok(());
        }
        let Some(config) = &source.config else {
            return Err(Error::Recipe(format!(
                "GGUF needs the model's architecture: give the folder with config.json instead of {}",
                source.path.display()
            )));
        };
        let model = arch::gguf_metadata(&source.path, config)?;
        self.naming = Naming::ToGguf(model.architecture, HeadCounts::from_hf_config(config)?);
        self.notes = model.notes;
        self.container = Container::Gguf(model.metadata);
        if let Some(freqs) = model.rope_freqs {
            let bytes: Vec<u8> = freqs.iter().flat_map(|f| f.to_le_bytes()).collect();
            let data = self.add_out(arch::ROPE_FREQS.into(), vec![freqs.len()], StoredType::F32, PackedLen::Exact(bytes.len()));
            self.push(None, arch::ROPE_FREQS.into(), Work::Literal(bytes), None, (data, None, None), None);
        }
        Ok(())
    }

    fn start_folder(&mut self) -> Result<()> {
        let source = self.source;
        let mut sidecars = BTreeMap::new();
        match source.kind {
            Kind::Folder => {
                let list = std::fs::read_dir(&source.path).map_err(bitnet_formats::Error::io(&source.path, "list"))?;
                for entry in list.filter_map(|e| e.ok()) {
                    let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
                    let weights = [".safetensors", ".bin", ".gguf", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".index.json"];
                    let ours = [output::PARTIAL, output::JOURNAL];
                    if path.is_dir() && !name.starts_with('.') && !ours.iter().any(|w| name.ends_with(w)) {
                        self.notes.push(format!("the folder {name} is not copied"));
                    }
                    if path.is_file() && !name.starts_with('.') && !weights.iter().chain(&ours).any(|w| name.ends_with(w)) {
                        sidecars.insert(name, Sidecar::Copy(path));
                    }
                }
            }
            Kind::Gguf => {
                let shape = |name: &str| source.find_stored(name).map(|i| source.stored[i].shape.clone());
                self.config = Some(arch::hf_config(&source.path, &source.gguf, &shape)?);
                self.naming = Naming::ToHf(Architecture::from_gguf(&source.gguf)?, HeadCounts::from_gguf(&source.gguf)?);
                match arch::hf_tokenizer(&source.gguf) {
                    Some((tokenizer, config)) => {
                        for (name, json) in [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)] {
                            let text = serde_json::to_string_pretty(&json).unwrap_or_default();
                            sidecars.insert(name.into(), Sidecar::Bytes(text.into_bytes()));
                        }
                    }
                    None => self.notes.push("the tokenizer of this GGUF cannot be said as a tokenizer.json; it is not written".into()),
                }
            }
            Kind::Safetensors => {
                return Err(Error::Recipe(format!(
                    "a folder needs the model's config.json: give the input as a folder, or an output that ends in .safetensors instead of {}",
                    source.path.display()
                )));
            }
        }
        self.sidecars = Some(sidecars);
        Ok(())
    }

    fn path(&self, tensor: &Tensor) -> PathBuf {
        tensor.stored().first().map_or_else(|| self.source.path.clone(), |&i| self.source.file_of(i).to_path_buf())
    }

    fn tensor_error(&self, tensor: &Tensor) -> impl FnOnce(bitnet_core::Error) -> Error + use<> {
        let (path, tensor) = (self.path(tensor), tensor.name.clone());
        move |source| Error::Tensor { path, tensor, source }
    }

    fn add_out(&mut self, name: String, shape: Vec<usize>, dtype: StoredType, len: PackedLen) -> usize {
        self.tensors.push(OutTensor { name, shape, dtype, len });
        self.tensors.len() - 1
    }

    fn push(
        &mut self,
        tensor: Option<usize>,
        name: String,
        work: Work,
        rows: Option<Vec<usize>>,
        (data, scale, zero): (usize, Option<usize>, Option<usize>),
        note: Option<String>,
    ) {
        self.units.push(Unit { tensor, name, work, rows, data, scale, zero, note });
    }

    /// Name and row order in the output; `None` for a buffer that the other container has no place for.
    fn rename(&self, tensor: &Tensor) -> Result<Option<(String, Option<Vec<usize>>)>> {
        if matches!(self.naming, Naming::Same) {
            return Ok(Some((tensor.name.clone(), None)));
        }
        if tensor.name.ends_with("rotary_emb.inv_freq") || tensor.name == arch::ROPE_FREQS {
            return Ok(None);
        }
        let unknown = |side: &str| {
            let expected = format!("a tensor that {side} has a name for");
            Error::from(bitnet_formats::Error::tensor(&self.path(tensor), &tensor.name, expected, "none"))
        };
        let rows = tensor.shape.first().copied().unwrap_or(0);
        Ok(Some(match self.naming {
            Naming::Same => (tensor.name.clone(), None),
            Naming::ToGguf(architecture, heads) => {
                let name = arch::gguf_name(&tensor.name).ok_or_else(|| unknown("GGUF"))?;
                (name, arch::row_order(architecture, heads, &tensor.name, rows)?)
            }
            Naming::ToHf(architecture, heads) => {
                let name = arch::hf_name(&tensor.name).ok_or_else(|| unknown("a Hugging Face folder"))?;
                let order = arch::hf_row_order(architecture, heads, &name, rows)?;
                (name, order)
            }
        }))
    }

    /// The tensor as it is, as far as the container can hold it.
    fn keep(&mut self, index: usize) -> Result<()> {
        let tensor = &self.source.tensors[index];
        let stored = match &tensor.content {
            Content::Quantized(_) => return self.recode(index, None),
            Content::Float(stored) | Content::Opaque(stored) => *stored,
        };
        let dtype = self.source.stored[stored].dtype;
        match (self.format, dtype) {
            // llama.cpp takes one-dimensional weights as f32 only.
            (Format::Gguf, StoredType::Plain(_)) if tensor.shape.len() == 1 && dtype.is_float() && dtype != StoredType::F32 => {
                return self.cast(index, ScaleDtype::F32, None);
            }
            (Format::Gguf, _) if dtype.to_ggml().is_none() => {
                return Err(self.tensor_error(tensor)(bitnet_core::Error::Unsupported {
                    layout: "gguf",
                    why: format!("it has no type {dtype}"),
                }));
            }
            (Format::Safetensors | Format::HfBitnet, StoredType::Ggml(_)) if dtype.is_float() => {
                return self.cast(index, ScaleDtype::F32, Some(format!("{dtype} decoded to f32")));
            }
            (Format::Safetensors | Format::HfBitnet, StoredType::Ggml(_)) => {
                return Err(self.tensor_error(tensor)(bitnet_core::Error::Unsupported {
                    layout: "safetensors",
                    why: format!("{dtype} has no decoder here"),
                }));
            }
            _ => {}
        }
        let Some((name, rows)) = self.rename(tensor)? else { return Ok(()) };
        let len = PackedLen::Exact(self.source.stored[stored].len as usize);
        let data = self.add_out(name.clone(), tensor.shape.clone(), dtype, len);
        self.push(Some(index), name, Work::Copy, rows, (data, None, None), None);
        Ok(())
    }

    fn cast(&mut self, index: usize, dtype: ScaleDtype, note: Option<String>) -> Result<()> {
        let tensor = &self.source.tensors[index];
        let Some((name, rows)) = self.rename(tensor)? else { return Ok(()) };
        let len = PackedLen::Exact(tensor.elements() * dtype.bytes());
        let data = self.add_out(name.clone(), tensor.shape.clone(), dtype.into(), len);
        self.push(Some(index), name, Work::Cast(dtype), rows, (data, None, None), note);
        Ok(())
    }

    fn quantize(&mut self, index: usize, choices: &Choices) -> Result<()> {
        let tensor = &self.source.tensors[index];
        let Target::Quantized(precision) = choices.target() else { return self.keep(index) };
        let Some((rows, cols)) = tensor.matrix_shape() else { return self.keep(index) };
        let named = match choices.layout.as_deref() {
            None => None,
            Some(output::AUTO) if self.format == Format::Safetensors => return self.quantize_auto(index, choices),
            Some(output::AUTO) => {
                return Err(Error::Recipe("layout auto picks among our own layouts, which only safetensors holds".into()));
            }
            Some(name) => Some(pack::by_name(name)?),
        };
        let allowed: Vec<&'static dyn Layout> = match named {
            Some(layout) if output::stores(&self.container, layout.name()) && self.format != Format::HfBitnet => vec![layout],
            Some(layout) if self.format == Format::HfBitnet && layout.name() == "hf-bitnet" => vec![layout],
            Some(layout) => {
                return Err(Error::Recipe(format!("format {} does not hold layout {}", self.format_name(), layout.name())));
            }
            None => default_layouts(self.format, precision)?,
        };
        if self.format == Format::HfBitnet {
            if let Some(dtype) = choices.scale_dtype.filter(|&d| d != self.model_dtype()) {
                let model = self.model_dtype();
                return Err(Error::Recipe(format!("format hf-bitnet stores scales in the model's type {model}, not {dtype}")));
            }
            let bias = tensor.name.strip_suffix("weight").and_then(|layer| self.source.find(&format!("{layer}bias")));
            if let (Some(bias), LinearClass::AutoBitLinear) = (bias, self.linear_class) {
                let why = format!("linear_class autobitlinear multiplies the bias '{}' by the scale too; bitlinear does not", bias.name);
                return Err(self.tensor_error(tensor)(bitnet_core::Error::Unsupported { layout: "hf-bitnet", why }));
            }
        }
        let mut first_refusal = None;
        let mut possible = false;
        for &layout in &allowed {
            for (granularity, dtype) in self.scale_choices(layout, choices) {
                let form = if self.format == Format::HfBitnet && self.linear_class.is_reciprocal() {
                    ScaleForm::Inverse
                } else {
                    ScaleForm::Direct
                };
                let Some(scheme) = choices.scheme(granularity, dtype, form)? else { return self.keep(index) };
                let spec = scheme.spec(rows, cols).map_err(self.tensor_error(tensor))?;
                match layout.check(&spec) {
                    Ok(()) if self.format == Format::HfBitnet && rows % 4 != 0 => {
                        first_refusal.get_or_insert(bitnet_core::Error::Unsupported {
                            layout: layout.name(),
                            why: format!("transformers needs a multiple of 4 rows, and it has {rows}"),
                        });
                    }
                    Ok(()) => {
                        let pack = Pack { scheme: Some(scheme), spec, layout: Some(layout), scale_dtype: dtype, scale_form: form };
                        return self.pack(index, pack, None);
                    }
                    Err(why) => {
                        // Whether the shape is to blame, or what the user asked for.
                        let free = Choices { granularity: None, scale_dtype: None, ..choices.clone() };
                        possible |= self.scale_choices(layout, &free).iter().any(|&(g, d)| {
                            choices
                                .scheme(g, d, form)
                                .ok()
                                .flatten()
                                .and_then(|s| s.spec(rows, cols).ok())
                                .is_some_and(|s| layout.check(&s).is_ok())
                        });
                        first_refusal.get_or_insert(why);
                    }
                }
            }
        }
        let refusal = first_refusal.unwrap_or_else(|| bitnet_core::Error::Scheme("no layout".into()));
        let fallback = named.is_none() && !possible && self.format != Format::Safetensors;
        if !fallback {
            return Err(self.tensor_error(tensor)(refusal));
        }
        let note = format!("not quantized: {refusal}");
        match self.format {
            Format::Gguf => self.cast(index, ScaleDtype::F16, Some(format!("{note}; kept as F16"))),
            _ => {
                self.keep(index)?;
                if let Some(unit) = self.units.last_mut() {
                    unit.note = Some(note);
                }
                Ok(())
            }
        }
    }

    fn quantize_auto(&mut self, index: usize, choices: &Choices) -> Result<()> {
        let tensor = &self.source.tensors[index];
        let Some((rows, cols)) = tensor.matrix_shape() else { return self.keep(index) };
        let granularity = choices.granularity.unwrap_or(Granularity::Channel);
        let dtype = choices.scale_dtype.unwrap_or(ScaleDtype::F32);
        let Some(scheme) = choices.scheme(granularity, dtype, ScaleForm::Direct)? else { return self.keep(index) };
        let spec = scheme.spec(rows, cols).map_err(self.tensor_error(tensor))?;
        self.pack(index, Pack { scheme: Some(scheme), spec, layout: None, scale_dtype: dtype, scale_form: ScaleForm::Direct }, None)
    }

    /// Granularities and scale types to try for a layout: what was chosen, else the finest that costs nothing.
    fn scale_choices(&self, layout: &dyn Layout, choices: &Choices) -> Vec<(Granularity, ScaleDtype)> {
        let granularities: Vec<Granularity> = match choices.granularity {
            Some(granularity) => vec![granularity],
            None if self.format == Format::HfBitnet || layout.name() == "hf-bitnet" => vec![Granularity::Tensor],
            None if layout.stores_scales() => {
                [32, 64, 128, 256].map(Granularity::Group).into_iter().chain([Granularity::Channel, Granularity::Tensor]).collect()
            }
            None => vec![Granularity::Channel],
        };
        let dtypes = match choices.scale_dtype {
            Some(dtype) => vec![dtype],
            None if layout.stores_scales() => vec![ScaleDtype::F16, ScaleDtype::F32],
            None if self.format == Format::HfBitnet => vec![self.model_dtype()],
            None => vec![ScaleDtype::F32],
        };
        granularities.iter().flat_map(|&g| dtypes.iter().map(move |&d| (g, d))).collect()
    }

    /// The type of a stored tensor of scales.
    fn scale_dtype_of(&self, stored: usize) -> ScaleDtype {
        let dtype = self.source.stored[stored].dtype;
        ScaleDtype::ALL.iter().copied().find(|&d| StoredType::from(d) == dtype).unwrap_or(ScaleDtype::F32)
    }

    /// The type of the model's weights, as its config says.
    fn model_dtype(&self) -> ScaleDtype {
        let dtype = |key: &str| self.config.as_ref().and_then(|c| c.get(key)).and_then(|v| v.as_str());
        match dtype("dtype").or(dtype("torch_dtype")) {
            Some("bfloat16") => ScaleDtype::Bf16,
            Some("float16") => ScaleDtype::F16,
            _ => ScaleDtype::F32,
        }
    }

    fn format_name(&self) -> &'static str {
        match self.format {
            Format::Safetensors => "safetensors",
            Format::HfBitnet => "hf-bitnet",
            Format::Gguf => "gguf",
        }
    }

    /// The values of a quantized source as they are, in a layout of that name or in one that suits.
    fn recode(&mut self, index: usize, layout: Option<&str>) -> Result<()> {
        let tensor = &self.source.tensors[index];
        let Content::Quantized(q) = &tensor.content else { return self.keep(index) };
        let layouts = match (layout, self.format) {
            (Some(output::AUTO), Format::Safetensors) => {
                let pack = Pack {
                    scheme: None,
                    spec: q.spec.clone(),
                    layout: None,
                    scale_dtype: q.spec.scale_dtype,
                    scale_form: ScaleForm::Direct,
                };
                return self.pack(index, pack, None);
            }
            (Some(name), _) => vec![pack::by_name(name)?],
            (None, Format::HfBitnet) => default_layouts(self.format, q.spec.precision)?,
            (None, _) if output::stores(&self.container, q.layout.name()) && q.layout.name() != "hf-bitnet" => vec![q.layout],
            (None, _) => default_layouts(self.format, q.spec.precision)?,
        };
        let mut refusal = None;
        for layout in layouts {
            if !output::stores(&self.container, layout.name()) || (self.format == Format::HfBitnet && layout.name() != "hf-bitnet") {
                return Err(Error::Recipe(format!("format {} does not hold layout {}", self.format_name(), layout.name())));
            }
            let granularities =
                [q.spec.granularity].into_iter().chain([32, 64, 128, 256].map(Granularity::Group)).chain([Granularity::Tensor]);
            for granularity in granularities {
                for dtype in [q.spec.scale_dtype, ScaleDtype::F16, ScaleDtype::F32] {
                    let spec = MatrixSpec { granularity, scale_dtype: dtype, ..q.spec.clone() };
                    match layout.check(&spec) {
                        Err(why) => refusal = refusal.or(Some(why)),
                        Ok(()) => {
                            let hf = self.format == Format::HfBitnet;
                            let form = if hf && self.linear_class.is_reciprocal() { ScaleForm::Inverse } else { ScaleForm::Direct };
                            // The type of the stored numbers, and the type that every scale has when it is read again.
                            let (stored, spec) = match (form, q.scales) {
                                (ScaleForm::Inverse, Scales::Stored { index, reciprocal: true }) => (self.scale_dtype_of(index), spec),
                                (ScaleForm::Inverse, _) => (ScaleDtype::F32, MatrixSpec { scale_dtype: ScaleDtype::F32, ..spec }),
                                // transformers gives weight_scale the type of the model.
                                (ScaleForm::Direct, _) if hf => {
                                    (self.model_dtype(), MatrixSpec { scale_dtype: self.model_dtype(), ..spec })
                                }
                                (ScaleForm::Direct, _) => (dtype, spec),
                            };
                            let from = q.spec.scale_dtype;
                            let note = match form {
                                ScaleForm::Inverse if spec.scale_dtype == from && stored != ScaleDtype::F32 => None,
                                ScaleForm::Inverse => {
                                    Some("codes exact, scales to the last bit of f32: their inverses are stored".to_string())
                                }
                                ScaleForm::Direct if spec.scale_dtype == from || spec.scale_dtype == ScaleDtype::F32 => None,
                                ScaleForm::Direct => Some(format!("codes exact, scales rounded from {from} to {stored}")),
                            };
                            let pack = Pack { scheme: None, spec, layout: Some(layout), scale_dtype: stored, scale_form: form };
                            return self.pack(index, pack, note);
                        }
                    }
                }
            }
        }
        Err(self.tensor_error(tensor)(refusal.unwrap_or_else(|| bitnet_core::Error::Scheme("no layout".into()))))
    }

    fn pack(&mut self, index: usize, pack: Pack, note: Option<String>) -> Result<()> {
        let tensor = &self.source.tensors[index];
        let Some((name, rows)) = self.rename(tensor)? else { return Ok(()) };
        let spec = &pack.spec;
        let len = match pack.layout {
            Some(layout) => layout.packed_len(spec),
            None => PackedLen::AtMost(
                pack::layouts().iter().filter(|l| l.check(spec).is_ok()).map(|l| l.packed_len(spec).bound()).max().unwrap_or(0),
            ),
        };
        let stores_scales = pack.layout.is_some_and(|l| l.stores_scales());
        let layout_name = pack.layout.map_or(output::AUTO, |l| l.name());
        let (packed_name, shape, dtype) = match self.format {
            Format::Gguf => {
                let ggml = ggml_type_of(layout_name).map(StoredType::Ggml).unwrap_or(StoredType::U8);
                (name.clone(), tensor.shape.clone(), ggml)
            }
            Format::HfBitnet => (name.clone(), vec![spec.rows.div_ceil(4), spec.cols], StoredType::U8),
            Format::Safetensors => (format!("{name}_packed"), vec![len.bound()], StoredType::U8),
        };
        let data = self.add_out(packed_name.clone(), shape, dtype, len);
        let mut scale = None;
        let mut zero = None;
        let mut entry = Packed {
            shape: tensor.shape.clone(),
            spec: spec.clone(),
            scheme: pack.scheme,
            layout: layout_name.into(),
            packed: packed_name,
            scale: None,
            reciprocal: pack.scale_form == ScaleForm::Inverse,
            zero_point: None,
        };
        let per_plane = spec.scales_len() / spec.planes;
        let mut scale_shape = match spec.granularity {
            Granularity::Group(_) => vec![spec.rows, spec.granules_per_row()],
            _ => vec![per_plane],
        };
        if spec.planes > 1 {
            scale_shape.insert(0, spec.planes);
        }
        if !stores_scales {
            let scale_name = format!("{name}_scale");
            let len = PackedLen::Exact(spec.scales_len() * pack.scale_dtype.bytes());
            scale = Some(self.add_out(scale_name.clone(), scale_shape.clone(), pack.scale_dtype.into(), len));
            entry.scale = Some(scale_name);
        }
        if spec.zero_points != ZeroPoints::None {
            let (dtype, size) = match spec.zero_points {
                ZeroPoints::F32 => (StoredType::F32, 4),
                _ => (StoredType::I8, 1),
            };
            let zero_name = format!("{name}_zero_point");
            zero = Some(self.add_out(zero_name.clone(), scale_shape, dtype, PackedLen::Exact(spec.scales_len() * size)));
            entry.zero_point = Some(zero_name);
        }
        self.packed.insert(name.clone(), entry);
        self.push(Some(index), name, Work::Pack(pack), rows, (data, scale, zero), note);
        Ok(())
    }

    fn finish(mut self, recipe: serde_json::Value) -> Result<Job<'a>> {
        if let Container::Gguf(metadata) = &mut self.container
            && let Some(file_type) = file_type(&self.tensors)
        {
            let after = metadata.iter().position(|(k, _)| k == "general.architecture").map_or(0, |i| i + 1);
            metadata.insert(after, ("general.file_type".into(), gguf::Value::from(file_type)));
        }
        self.finish_config()?;
        let mut files = BTreeMap::new();
        for (name, sidecar) in self.sidecars.iter().flatten() {
            let sum = match sidecar {
                Sidecar::Bytes(bytes) => document::checksum(bytes),
                Sidecar::Copy(path) => document::checksum(&std::fs::read(path).map_err(bitnet_formats::Error::io(path, "read"))?),
            };
            files.insert(name.clone(), sum);
        }
        let document = Document {
            version: document::VERSION,
            generator: GENERATOR.into(),
            recipe,
            tensors: self.packed,
            checksums: BTreeMap::new(),
            files,
            metadata: String::new(),
            digest: String::new(),
        };
        let mut job = serde_json::to_string(&document).unwrap_or_default();
        for file in &self.source.files {
            job += &format!("\n{} {} {:?}", file.path.display(), file.len, file.modified);
        }
        for unit in &self.units {
            job += &format!("\n{unit:?}");
        }
        let job = format!("{:032x}", xxh3_128(job.as_bytes()));
        Ok(Job {
            source: self.source,
            units: self.units,
            layout: output::Layout { container: self.container, document, tensors: self.tensors, job },
            sidecars: self.sidecars,
            notes: self.notes,
        })
    }

    /// config.json of an output folder: what it says about quantization must be true of the tensors beside it.
    fn finish_config(&mut self) -> Result<()> {
        let (Some(sidecars), Some(config)) = (&mut self.sidecars, &mut self.config) else { return Ok(()) };
        let Some(object) = config.as_object_mut() else { return Ok(()) };
        object.remove("quantization_config");
        if self.format == Format::HfBitnet {
            // Linear layers that stay as they are must be named, or transformers expects packed weights for them.
            let mut keep: Vec<String> = self
                .units
                .iter()
                .filter(|u| !matches!(u.work, Work::Pack(_)) && self.tensors[u.data].shape.len() == 2)
                .filter_map(|u| u.name.strip_suffix(".weight").map(str::to_string))
                .filter(|n| !n.contains("embed") && !n.contains("norm"))
                .collect();
            if !keep.is_empty() && !keep.iter().any(|k| k == "lm_head") {
                keep.push("lm_head".into());
            }
            let bitnet = BitnetConfig { linear_class: self.linear_class, mode: Mode::Offline };
            object.insert("quantization_config".into(), bitnet.to_json(&keep));
        } else if self.source.bitnet.is_some_and(|b| b.mode == Mode::Online) {
            let online = self.source.config.as_ref().and_then(|c| c.get("quantization_config")).cloned().unwrap_or_default();
            if self.packed.is_empty() {
                object.insert("quantization_config".into(), online);
            }
        }
        let mut text = serde_json::to_string_pretty(config).unwrap_or_default();
        text.push('\n');
        sidecars.insert("config.json".into(), Sidecar::Bytes(text.into_bytes()));
        Ok(())
    }
}

/// Layouts to try for a precision when none is named.
fn default_layouts(format: Format, precision: Precision) -> Result<Vec<&'static dyn Layout>> {
    let names: &[&str] = match (format, precision) {
        (Format::Safetensors, Precision::Binary) => &["one-bit"],
        (Format::Safetensors, Precision::Ternary | Precision::Int2) => &["two-bit"],
        (Format::Safetensors, Precision::Int3) => &["three-bit"],
        (Format::Safetensors, Precision::Int4) => &["four-bit"],
        (Format::Safetensors, Precision::Int8) => &["i8"],
        (Format::HfBitnet, Precision::Ternary) => &["hf-bitnet"],
        (Format::Gguf, Precision::Ternary) => &["tq2_0", "q2_0"],
        (Format::Gguf, Precision::Binary) => &["q1_0"],
        (Format::Gguf, Precision::Int4) => &["q4_0"],
        (Format::Gguf, Precision::Int8) => &["q8_0"],
        (Format::HfBitnet, other) => return Err(Error::Recipe(format!("format hf-bitnet holds ternary weights, not {other}"))),
        (Format::Gguf, other) => return Err(Error::Recipe(format!("format gguf has no type for {other}"))),
    };
    names.iter().map(|name| Ok(pack::by_name(name)?)).collect()
}

/// `general.file_type` of llama.cpp: the type of most bytes of the two-dimensional tensors, where it has a number.
fn file_type(tensors: &[OutTensor]) -> Option<u32> {
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
            _ => continue,
        };
        // Weights rather than bytes: a type is what most weights are.
        *bytes.entry(number).or_default() += tensor.shape.iter().product::<usize>();
    }
    bytes.into_iter().max_by_key(|&(_, weights)| weights).map(|(number, _)| number)
}
