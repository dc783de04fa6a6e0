//! Plans a job: decides and checks the output of each tensor before the first byte is written.

mod experts;
mod floats;
pub(crate) mod mlx;
mod onnx;
mod packing;
mod rotation;
pub(crate) mod sidecars;
mod surroundings;

pub use floats::FloatShare;

use crate::forms::Forms;
use crate::onnx::RotaryTable;
use crate::recipe::Compute;
use crate::recipe::{Format, Recipe, Target};
use crate::rows::OutputOrder;
use crate::target::weights_name;
use crate::{Error, Result};
use bitnet_core::pack::{self, Layout, PackedLen};
use bitnet_core::{Granularity, Matrix, MatrixSpec, ScaleDtype, ScaleForm, Scheme, ZeroPoints};
use bitnet_formats::arch::{Architecture, HeadCounts};
use bitnet_formats::document::{self, Document, PackedTensor};
use bitnet_formats::dtype::ggml_type_of;
use bitnet_formats::hf::{LinearClass, Mode};
use bitnet_formats::onnx::BlockFormat;
use bitnet_formats::output::{self, Container, OutputId, OutputTensor, OutputTensors, ShardSize};
use bitnet_formats::{Content, Source, StoredType, Tensor, TensorId, gguf};
use std::collections::BTreeMap;
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_128;

/// Name and version in the files that are written.
pub const GENERATOR: &str = concat!("bitnet-quant ", env!("CARGO_PKG_VERSION"));

/// The action on one tensor.
#[derive(Debug, Clone)]
pub(crate) enum Action {
    /// The stored bytes, as they are.
    Copy,
    /// Floats of this type.
    Cast(ScaleDtype),
    /// Floats of this type in the original basis, of a tensor that is stored in a rotated one.
    Unrotate(ScaleDtype),
    /// Packed values: quantized by a scheme, given by the caller, or those of a quantized source.
    Pack(Pack),
    /// Bytes that no tensor of the source holds.
    Literal(Vec<u8>),
    /// The values of a quantized source in blocks of ONNX operators.
    Blocks(BlockFormat),
    /// A table of rotary positions.
    Rotary(RotaryTable),
}

/// How values are packed.
#[derive(Debug, Clone)]
pub(crate) struct Pack {
    pub(crate) scheme: Option<Scheme>,
    pub(crate) spec: MatrixSpec,
    /// Whether the tensor has the inputs first.
    pub(crate) transposed: bool,
    /// `None`: whichever is smallest.
    pub(crate) layout: Option<&'static dyn Layout>,
    /// Type and meaning of scales that are stored apart.
    pub(crate) scale_dtype: ScaleDtype,
    pub(crate) scale_form: ScaleForm,
    /// Importance of the columns, if the scheme uses it.
    pub(crate) importance: Option<Vec<f32>>,
    /// Values that the source does not hold; only where there is no scheme.
    pub(crate) given: Option<Box<Matrix>>,
}

/// The job of one tensor.
#[derive(Debug, Clone)]
pub(crate) struct TensorJob {
    /// The tensor of the source; none for a literal.
    pub(crate) tensor: Option<TensorId>,
    /// Its name in the output.
    pub(crate) name: String,
    pub(crate) action: Action,
    /// For each row or column of the output that of the source.
    pub(crate) order: Option<OutputOrder>,
    /// Tensors of the source that follow the first one in the output.
    pub(crate) joined: Vec<TensorId>,
    /// The written tensors: data, scales, zero points.
    pub(crate) data: OutputId,
    pub(crate) scale: Option<OutputId>,
    pub(crate) zero: Option<OutputId>,
    /// A note for the user, e.g. why a tensor is not quantized.
    pub(crate) note: Option<String>,
}

impl TensorJob {
    /// The tensors of the source that it reads.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = TensorId> {
        self.tensor.into_iter().chain(self.joined.iter().copied())
    }
}

/// A file beside the tensors of a folder.
#[derive(Debug, Clone)]
pub(crate) enum Sidecar {
    /// A copy of this file.
    Copy(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// A job: everything that [`crate::job::run`] needs.
#[derive(Debug)]
pub struct Job<'a> {
    pub(crate) source: &'a Source,
    pub(crate) format: Format,
    pub(crate) tensor_jobs: Vec<TensorJob>,
    pub(crate) layout: output::FilePlan,
    /// Files of the output folder by name; `None` if the output is one file.
    pub(crate) sidecars: Option<BTreeMap<String, Sidecar>>,
    /// Notes for the user about the whole job.
    pub notes: Vec<String>,
    /// What the output lacks, each a sentence that a user wants to read whatever else he does not.
    pub losses: Vec<String>,
    /// What a quantized model keeps as floats, if that is worth a word.
    pub stays_float: Option<FloatShare>,
}

/// The size above which the weights of a folder are split where none is given: that of
/// transformers' `save_pretrained`.
pub const DEFAULT_SHARD_BYTES: u64 = 50_000_000_000;

fn default_shard_size() -> Option<ShardSize> {
    ShardSize::from_bytes(DEFAULT_SHARD_BYTES).ok()
}

/// Whether a path names a folder of tensors or one file.
fn is_folder(out: &std::path::Path) -> bool {
    !out.extension()
        .is_some_and(|e| e == "safetensors" || e == "gguf")
}

impl<'a> Job<'a> {
    /// Quantizes the tensors that the recipe selects, and keeps the others.
    ///
    /// # Errors
    /// [`Error::Recipe`] for choices that do not exist, do not apply, or select nothing;
    /// [`Error::Tensor`] for a layout that cannot hold a tensor.
    pub fn quantize(source: &'a Source, recipe: &Recipe, out: &std::path::Path) -> Result<Self> {
        Self::quantize_weighted(source, recipe, out, BTreeMap::new(), BTreeMap::new())
    }

    /// The same with given values and scales for the named tensors, as training with learned scales
    /// produces them. For these tensors the recipe decides only container and layout. If no layout
    /// of the container can hold a given matrix, the floats of the source stay.
    ///
    /// # Errors
    /// As [`Job::quantize`]; also for a matrix of another shape, or of a tensor that the recipe
    /// does not quantize.
    pub fn quantize_given(
        source: &'a Source,
        recipe: &Recipe,
        out: &std::path::Path,
        given: BTreeMap<String, Matrix>,
    ) -> Result<Self> {
        Self::quantize_weighted(source, recipe, out, BTreeMap::new(), given)
    }

    /// The same with errors weighted by the second moments of the channels, for the tensors in the
    /// calibration and the rules that use importance.
    ///
    /// # Errors
    /// As [`Job::quantize`]; also for a calibration of another model.
    pub fn quantize_calibrated(
        source: &'a Source,
        recipe: &Recipe,
        out: &std::path::Path,
        calibration: &crate::calibration::Calibration,
    ) -> Result<Self> {
        let importance: BTreeMap<_, _> = calibration
            .layers
            .iter()
            .map(|(name, l)| (name.clone(), l.second_moments()))
            .collect();
        if !source
            .tensors()
            .iter()
            .any(|t| importance.contains_key(&t.name))
        {
            return Err(Error::Recipe(format!(
                "the calibration has no tensor of {}",
                source.path().display()
            )));
        }
        Self::quantize_weighted(source, recipe, out, importance, BTreeMap::new())
    }

    fn quantize_weighted(
        source: &'a Source,
        recipe: &Recipe,
        out: &std::path::Path,
        importance: BTreeMap<String, Vec<f32>>,
        given: BTreeMap<String, Matrix>,
    ) -> Result<Self> {
        onnx::refuse_quantize(recipe.format)?;
        if recipe.search.is_some() {
            return Err(Error::Recipe(
                "the search must run first: search::resolve".into(),
            ));
        }
        let selector = recipe.selector(source)?.without_roles_of(given.keys());
        let mut builder = Builder::new(source, recipe.format, out, recipe.linear_class)?;
        (builder.importance, builder.given) = (importance, given);
        builder.forms = selector.forms().clone();
        let mut count = 0;
        for (i, tensor) in source.tensor_ids().zip(source.tensors()) {
            let choices = selector.choices(tensor);
            builder.for_each_output(i, |builder| {
                builder.check_joined(tensor, |other| selector.choices(other) == choices)?;
                let Some(choices) = &choices else {
                    return builder.keep(i);
                };
                // Floats too: a choice that does not apply to them is an error.
                choices.scheme(Granularity::Channel, ScaleDtype::F32, ScaleForm::Direct)?;
                match choices.target() {
                    Target::Keep => builder.keep(i),
                    Target::Float(dtype) => builder.cast(i, dtype, None),
                    Target::Quantized(_) => {
                        count += 1;
                        builder.quantize(i, choices)
                    }
                }
            })?;
        }
        builder.note_transposed();
        if let Some(name) = builder.given.keys().next() {
            return Err(Error::Recipe(format!(
                "values for '{name}', which the recipe does not quantize"
            )));
        }
        if count == 0
            && !source
                .tensors()
                .iter()
                .any(|t| selector.choices(t).is_some())
        {
            return Err(Error::Recipe(format!(
                "selects no tensor of {}; see --include and --exclude",
                source.path().display()
            )));
        }
        let resolved = Recipe {
            compute: Compute::default(),
            ..recipe.clone()
        };
        let stays_float = floats::float_share(source, &selector);
        let job = builder.finish(serde_json::to_value(resolved).unwrap_or_default())?;
        Ok(Self { stays_float, ..job })
    }

    /// Writes the same values and scales in another container or layout; float tensors do not
    /// change.
    ///
    /// # Errors
    /// As [`Job::quantize`]; also for scales that the layout cannot store.
    pub fn convert(
        source: &'a Source,
        format: Format,
        layout: Option<&str>,
        linear_class: Option<LinearClass>,
        out: &std::path::Path,
    ) -> Result<Self> {
        if format == Format::Onnx && linear_class.is_none() {
            return onnx::convert(source, layout, out);
        }
        let mut builder = Builder::new(source, format, out, linear_class)?;
        builder.convert(layout, Basis::Stored)?;
        builder
            .finish(serde_json::json!({"command": "convert", "format": format, "layout": layout}))
    }

    /// [`Job::convert`] with matrices of a rotated basis as floats in their original one.
    ///
    /// # Errors
    /// As [`Job::convert`]; also if nothing is in a rotated basis.
    pub fn unrotate(
        source: &'a Source,
        format: Format,
        layout: Option<&str>,
        linear_class: Option<LinearClass>,
        out: &std::path::Path,
    ) -> Result<Self> {
        let mut builder = Builder::new(source, format, out, linear_class)?;
        if source.rotation()?.is_none() {
            let path = source.path().display();
            return Err(Error::Recipe(format!(
                "{path} has no weights in a rotated basis; convert it without --unrotate"
            )));
        }
        builder.convert(layout, Basis::Original)?;
        let command = "convert --unrotate";
        builder.finish(serde_json::json!({"command": command, "format": format, "layout": layout}))
    }

    /// Writes every tensor as floats.
    ///
    /// # Errors
    /// As [`Job::quantize`].
    pub fn dequantize(
        source: &'a Source,
        dtype: ScaleDtype,
        out: &std::path::Path,
    ) -> Result<Self> {
        let mut builder = Builder::new(source, Format::Safetensors, out, None)?;
        for (i, tensor) in source.tensor_ids().zip(source.tensors()) {
            builder.for_each_output(i, |builder| match tensor.content {
                Content::Opaque(_) => builder.keep(i),
                _ if builder.is_rotated(tensor)? => builder.unrotate(i, dtype),
                _ => builder.cast(i, dtype, None),
            })?;
        }
        builder.finish(serde_json::json!({"command": "dequantize", "dtype": dtype}))
    }

    /// Writes files of at most `size` bytes of tensors: shards with an index in a folder, a split
    /// set of GGUF files. `out` is the target that the job was planned for.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a single safetensors file, which has no index; [`Error::File`] for too
    /// many shards.
    pub fn with_shard_size(mut self, size: ShardSize, out: &std::path::Path) -> Result<Self> {
        if self.sidecars.is_none() && matches!(self.layout.container, Container::Safetensors(_)) {
            return Err(Error::Recipe(format!(
                "{} is one file, which is never split; for shards give a folder (a name without an \
                 ending), or leave the shard size out",
                out.display()
            )));
        }
        if self.format == Format::Onnx {
            return Err(Error::Recipe(
                "format onnx has one file of weights; leave the shard size out".into(),
            ));
        }
        self.layout.shard_size = Some(size);
        self.layout.job += &format!("-{}", size.bytes());
        self.layout.check_shards(match &self.sidecars {
            Some(sidecars) => weights_name(sidecars).as_ref(),
            None => out,
        })?;
        Ok(self)
    }

    /// Bytes to read, for a progress bar.
    pub fn input_bytes(&self) -> u64 {
        self.tensor_jobs
            .iter()
            .flat_map(TensorJob::tensors)
            .map(|t| self.source.bytes_of(self.source.tensor(t)))
            .sum()
    }
}

/// The basis in which matrices are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Basis {
    /// The one that the source has.
    Stored,
    /// The original one.
    Original,
}

/// How names and row orders change between containers.
#[derive(Debug, Clone, Copy)]
enum Naming {
    Same,
    ToGguf(&'static Architecture, HeadCounts),
    ToHf(&'static Architecture, HeadCounts),
}

pub(crate) struct Builder<'a> {
    source: &'a Source,
    format: Format,
    naming: Naming,
    linear_class: LinearClass,
    container: Container,
    pub(crate) tensor_jobs: Vec<TensorJob>,
    pub(crate) tensors: OutputTensors,
    packed: BTreeMap<String, PackedTensor>,
    /// Group and bits of the modules in format mlx.
    mlx: BTreeMap<String, (usize, u32)>,
    pub(crate) sidecars: Option<BTreeMap<String, Sidecar>>,
    config: Option<serde_json::Value>,
    notes: Vec<String>,
    losses: Vec<String>,
    importance: BTreeMap<String, Vec<f32>>,
    given: BTreeMap<String, Matrix>,
    pub(crate) forms: Forms,
    /// The output that is planned, where it is not the tensor of the source as it is.
    reshaped: Option<experts::Reshaped>,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(
        source: &'a Source,
        format: Format,
        out: &std::path::Path,
        linear_class: Option<LinearClass>,
    ) -> Result<Self> {
        if linear_class.is_some() && format != Format::HfBitnet {
            return Err(Error::Recipe(
                "linear_class applies to format hf-bitnet only".into(),
            ));
        }
        let folder = format != Format::Gguf && is_folder(out);
        match (format, out.extension().and_then(|e| e.to_str())) {
            (Format::HfBitnet | Format::Mlx | Format::Onnx, Some(e @ ("safetensors" | "gguf"))) => {
                return Err(Error::Recipe(format!(
                    "format {format} writes a folder, and the output is named .{e}"
                )));
            }
            (Format::Safetensors, Some("gguf")) => {
                return Err(Error::Recipe(
                    "format safetensors, and the output is named .gguf; give --format gguf".into(),
                ));
            }
            (Format::Gguf, Some("safetensors")) => {
                return Err(Error::Recipe(
                    "format gguf, and the output is named .safetensors".into(),
                ));
            }
            _ => {}
        }
        source.refuse_undecoded()?;
        let mut builder = Self {
            source,
            format,
            naming: Naming::Same,
            linear_class: linear_class.unwrap_or(LinearClass::BitLinear),
            container: Container::Gguf(vec![]),
            tensor_jobs: vec![],
            tensors: OutputTensors::default(),
            packed: BTreeMap::new(),
            mlx: BTreeMap::new(),
            sidecars: None,
            config: source.config().cloned(),
            notes: source.notes().to_vec(),
            losses: vec![],
            importance: BTreeMap::new(),
            given: BTreeMap::new(),
            forms: Forms::default(),
            reshaped: None,
        };
        if source.bitnet().is_some_and(|b| b.mode == Mode::Online) {
            builder.notes.push(
                "quantization_mode online: the model makes these weights ternary in each forward \
                 pass; here they count as floats"
                    .into(),
            );
        }
        if format == Format::Gguf {
            builder.start_gguf()?;
        } else {
            let metadata = source
                .metadata()
                .iter()
                .filter(|(k, _)| k != document::KEY && k != "format")
                .cloned();
            builder.container = Container::Safetensors(
                [("format".into(), "pt".into())]
                    .into_iter()
                    .chain(metadata)
                    .collect(),
            );
            if folder {
                builder.start_folder()?;
            }
        }
        Ok(builder)
    }

    fn path(&self, tensor: &Tensor) -> PathBuf {
        self.source.file_of_tensor(tensor).to_path_buf()
    }

    fn tensor_error(&self, tensor: &Tensor) -> impl FnOnce(bitnet_core::Error) -> Error + use<> {
        let (path, tensor) = (self.path(tensor), tensor.name.clone());
        move |source| Error::Tensor {
            path,
            tensor,
            source,
        }
    }

    fn add_out(
        &mut self,
        name: String,
        shape: Vec<usize>,
        dtype: StoredType,
        len: PackedLen,
    ) -> OutputId {
        self.tensors.push(OutputTensor {
            name,
            shape,
            dtype,
            len,
        })
    }

    fn push(
        &mut self,
        tensor: Option<TensorId>,
        name: String,
        action: Action,
        order: Option<OutputOrder>,
        (data, scale, zero): (OutputId, Option<OutputId>, Option<OutputId>),
        note: Option<String>,
    ) {
        self.tensor_jobs.push(TensorJob {
            tensor,
            name,
            action,
            order,
            joined: self.joined().to_vec(),
            data,
            scale,
            zero,
            note,
        });
    }

    /// Copies a tensor, or casts it if the container cannot store its type.
    fn keep(&mut self, index: TensorId) -> Result<()> {
        let tensor = self.source.tensor(index);
        let stored = match &tensor.content {
            Content::Quantized(_) => return self.recode(index, None),
            Content::Float(stored) | Content::Opaque(stored) => *stored,
        };
        if self.converted(index, stored)? {
            return Ok(());
        }
        let dtype = self.source.stored(stored).dtype;
        match (self.format, dtype) {
            // llama.cpp takes one-dimensional weights as f32 only.
            (Format::Gguf, StoredType::Plain(_))
                if self.shape(tensor).len() == 1
                    && dtype.is_float()
                    && dtype != StoredType::F32 =>
            {
                return self.cast(index, ScaleDtype::F32, None);
            }
            (Format::Gguf, _) if dtype.to_ggml().is_none() && !dtype.is_float() => {
                return Err(self.tensor_error(tensor)(bitnet_core::Error::Unsupported {
                    layout: "gguf",
                    why: format!("it has no type {dtype}"),
                }));
            }
            (Format::Gguf, StoredType::Plain(_)) if dtype.to_ggml().is_none() => {
                let note = Some(format!("{dtype} decoded to f32"));
                return self.cast(index, ScaleDtype::F32, note);
            }
            (_, StoredType::Foreign(_))
            | (
                Format::Safetensors | Format::HfBitnet | Format::Mlx | Format::Onnx,
                StoredType::Ggml(_),
            ) if dtype.is_float() => {
                return self.cast(
                    index,
                    ScaleDtype::F32,
                    Some(format!("{dtype} decoded to f32")),
                );
            }
            (
                Format::Safetensors | Format::HfBitnet | Format::Mlx | Format::Onnx,
                StoredType::Ggml(_),
            ) => {
                return Err(self.tensor_error(tensor)(bitnet_core::Error::Unsupported {
                    layout: "safetensors",
                    why: format!("{dtype} has no decoder here"),
                }));
            }
            _ => {}
        }
        let Some((name, order)) = self.rename(tensor)? else {
            return Ok(());
        };
        self.check_groups(tensor, order.as_ref())?;
        self.check_basis(tensor, order.as_ref())?;
        let shape = self.shape(tensor);
        let elements: usize = shape.iter().product();
        let len = self.source.stored(stored).len as usize;
        let len = match elements == tensor.elements() {
            true => len,
            // Whole rows, which have whole bytes.
            false => (len as u128 * elements as u128 / tensor.elements().max(1) as u128) as usize,
        };
        let data = self.add_out(name.clone(), shape, dtype, PackedLen::Exact(len));
        self.push(
            Some(index),
            name,
            Action::Copy,
            order,
            (data, None, None),
            None,
        );
        Ok(())
    }

    fn cast(&mut self, index: TensorId, dtype: ScaleDtype, note: Option<String>) -> Result<()> {
        self.floats(index, dtype, Action::Cast(dtype), note)
    }

    /// Plans a tensor of floats, which `action` writes.
    fn floats(
        &mut self,
        index: TensorId,
        dtype: ScaleDtype,
        action: Action,
        note: Option<String>,
    ) -> Result<()> {
        let tensor = self.source.tensor(index);
        if let Content::Float(stored) = tensor.content
            && self.converted(index, stored)?
        {
            return Ok(());
        }
        let Some((name, order)) = self.rename(tensor)? else {
            return Ok(());
        };
        if !matches!(action, Action::Unrotate(_)) {
            self.check_basis(tensor, order.as_ref())?;
        }
        let shape = self.shape(tensor);
        let len = PackedLen::Exact(shape.iter().product::<usize>() * dtype.bytes());
        let data = self.add_out(name.clone(), shape, dtype.into(), len);
        self.push(Some(index), name, action, order, (data, None, None), note);
        Ok(())
    }

    fn pack(&mut self, index: TensorId, mut pack: Pack, note: Option<String>) -> Result<()> {
        let tensor = self.source.tensor(index);
        if pack.scheme.is_some_and(|s| s.uses_importance()) && self.reshaped.is_none() {
            pack.importance = self.importance.get(&tensor.name).cloned();
        }
        if pack.importance.is_some() {
            self.source.refuse_rotated(&tensor.name)?;
        }
        if let Some(h) = pack
            .importance
            .as_ref()
            .filter(|h| h.len() != pack.spec.cols)
        {
            let error = bitnet_core::Error::Length {
                what: "calibrated channels",
                expected: pack.spec.cols,
                got: h.len(),
            };
            return Err(self.tensor_error(tensor)(error));
        }
        let Some((name, order)) = self.rename(tensor)? else {
            return Ok(());
        };
        if pack.scheme.is_none() {
            self.check_groups(tensor, order.as_ref())?;
        }
        self.check_basis(tensor, order.as_ref())?;
        let spec = &pack.spec;
        let len = match pack.layout {
            Some(layout) => layout.packed_len(spec),
            None => PackedLen::AtMost(
                pack::layouts()
                    .iter()
                    .filter(|l| l.check(spec).is_ok())
                    .map(|l| l.packed_len(spec).bound())
                    .max()
                    .unwrap_or(0),
            ),
        };
        let layout_name = pack.layout.map_or(output::AUTO, |l| l.name());
        let (packed_name, shape, dtype) = match self.format {
            Format::Gguf => {
                let ggml = pack
                    .layout
                    .and_then(ggml_type_of)
                    .map(StoredType::Ggml)
                    .unwrap_or(StoredType::U8);
                (name.clone(), self.shape(tensor), ggml)
            }
            Format::HfBitnet => (
                name.clone(),
                vec![spec.rows.div_ceil(4), spec.cols],
                StoredType::U8,
            ),
            Format::Mlx => (
                name.clone(),
                vec![spec.rows, len.bound() / 4 / spec.rows.max(1)],
                StoredType::U32,
            ),
            Format::Safetensors | Format::Onnx => {
                (format!("{name}_packed"), vec![len.bound()], StoredType::U8)
            }
        };
        let data = self.add_out(packed_name.clone(), shape, dtype, len);
        let mut entry = PackedTensor {
            shape: self.shape(tensor),
            transposed: pack.transposed,
            spec: spec.clone(),
            scheme: pack.scheme,
            layout: layout_name.into(),
            packed: packed_name,
            scale: None,
            reciprocal: pack.scale_form == ScaleForm::Inverse,
            zero_point: None,
        };
        let (scale, zero) = if self.format == Format::Mlx {
            self.add_mlx_outs(&name, &pack)
        } else {
            let outs = self.add_scale_outs(&name, &pack, &mut entry);
            self.packed.insert(name.clone(), entry);
            outs
        };
        self.push(
            Some(index),
            name,
            Action::Pack(pack),
            order,
            (data, scale, zero),
            note,
        );
        Ok(())
    }

    /// Adds scales and biases under the names of MLX. The document says nothing of such a matrix:
    /// MLX's own names and config.json do.
    fn add_mlx_outs(&mut self, name: &str, pack: &Pack) -> (Option<OutputId>, Option<OutputId>) {
        let (spec, dtype) = (&pack.spec, pack.scale_dtype);
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let shape = vec![spec.rows, spec.granules_per_row()];
        let len = PackedLen::Exact(spec.scales_len() * dtype.bytes());
        let outs = ["scales", "biases"].map(|part| {
            let name = format!("{module}.{part}");
            Some(self.add_out(name, shape.clone(), dtype.into(), len))
        });
        let kind = (spec.granule_cols(), spec.precision.code_bits());
        self.mlx.insert(module.into(), kind);
        outs.into()
    }

    /// Adds the outputs of scales and zero points that are stored as tensors of their own.
    fn add_scale_outs(
        &mut self,
        name: &str,
        pack: &Pack,
        entry: &mut PackedTensor,
    ) -> (Option<OutputId>, Option<OutputId>) {
        let spec = &pack.spec;
        let stores_scales = pack.layout.is_some_and(|l| l.stores_scales());
        let (mut scale, mut zero) = (None, None);
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
            scale = Some(self.add_out(
                scale_name.clone(),
                scale_shape.clone(),
                pack.scale_dtype.into(),
                len,
            ));
            entry.scale = Some(scale_name);
        }
        if spec.zero_points != ZeroPoints::None {
            let (dtype, size) = match spec.zero_points {
                ZeroPoints::F32 => (StoredType::F32, 4),
                _ => (StoredType::I8, 1),
            };
            let zero_name = format!("{name}_zero_point");
            zero = Some(self.add_out(
                zero_name.clone(),
                scale_shape,
                dtype,
                PackedLen::Exact(spec.scales_len() * size),
            ));
            entry.zero_point = Some(zero_name);
        }
        (scale, zero)
    }

    /// llama.cpp keeps a name in 64 bytes with the zero behind it.
    fn check_gguf_names(&self) -> Result<()> {
        match self.tensors.iter().find(|t| t.name.len() >= 64) {
            Some(long) if self.format == Format::Gguf => Err(bitnet_formats::Error::tensor(
                self.source.path(),
                &long.name,
                "a name of at most 63 bytes, which is all that GGUF readers take",
                format!("{} bytes", long.name.len()),
            )
            .into()),
            _ => Ok(()),
        }
    }

    /// Floats that a model makes ternary in each forward pass need a config.json that says so.
    fn check_online(&self) -> Result<()> {
        let online = self.source.bitnet().is_some_and(|b| b.mode == Mode::Online);
        let says_so = self.format == Format::Safetensors && self.sidecars.is_some();
        if !online || says_so || !self.packed.is_empty() {
            return Ok(());
        }
        Err(bitnet_formats::Error::config(
            &self.source.path().join("config.json"),
            "quantization_config.quantization_mode",
            "offline, for a file that cannot say that its floats become ternary in each forward \
             pass; 'bitnet quantize --granularity tensor' makes them so once",
            "online",
        )
        .into())
    }

    fn finish(mut self, recipe: serde_json::Value) -> Result<Job<'a>> {
        self.check_gguf_names()?;
        self.check_online()?;
        let rotation = self.finish_rotation()?;
        if let Container::Gguf(metadata) = &mut self.container
            && let Some(file_type) = surroundings::file_type(&self.tensors)
        {
            let after = metadata
                .iter()
                .position(|(k, _)| k == "general.architecture")
                .map_or(0, |i| i + 1);
            metadata.insert(
                after,
                ("general.file_type".into(), gguf::Value::from(file_type)),
            );
        }
        self.finish_config()?;
        let mut files = BTreeMap::new();
        for (name, sidecar) in self.sidecars.iter().flatten() {
            let sum = match sidecar {
                Sidecar::Bytes(bytes) => document::checksum(bytes),
                Sidecar::Copy(path) => document::checksum(
                    &std::fs::read(path).map_err(bitnet_formats::Error::io(path, "read"))?,
                ),
            };
            files.insert(name.clone(), sum);
        }
        let document = Document {
            version: document::VERSION,
            generator: GENERATOR.into(),
            recipe,
            tensors: self.packed,
            rotation,
            checksums: BTreeMap::new(),
            files,
            metadata: String::new(),
            digest: String::new(),
        };
        let mut job = serde_json::to_string(&document).unwrap_or_default();
        for file in self.source.files() {
            job += &format!("\n{} {} {:?}", file.path.display(), file.len, file.modified);
        }
        for tensor_job in &self.tensor_jobs {
            job += &format!("\n{tensor_job:?}");
        }
        let job = format!("{:032x}", xxh3_128(job.as_bytes()));
        Ok(Job {
            source: self.source,
            format: self.format,
            tensor_jobs: self.tensor_jobs,
            layout: output::FilePlan {
                container: self.container,
                document,
                tensors: self.tensors,
                job,
                shard_size: self.sidecars.as_ref().and_then(|_| default_shard_size()),
            },
            sidecars: self.sidecars,
            notes: self.notes,
            losses: self.losses,
            stays_float: None,
        })
    }
}
