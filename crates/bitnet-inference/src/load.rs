//! Weights: from the tensors of a checkpoint, or made up.

use crate::blocks;
use crate::linear::{Linear, Machine, Weights};
use crate::run::Norm;
use crate::{Config, Error, Result};
use bitnet_core::ops::Ops;
use bitnet_core::{Granularity, MatrixSpec, Precision, named};
use bitnet_formats::arch;
use bitnet_formats::hf::{LinearClass, Mode};
use bitnet_formats::{Content, Kind, Quantized, Scales, Source, StoredType, Tensor};
use bitnet_kernels::dense::{BlockType, Blocks, Data, Matrix, quantize_int4, quantize_int8, zeros};
use bitnet_kernels::matmul::{Parts, Prepacked, Stream};
use std::collections::HashSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// What the inputs of ternary layers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActivationType {
    /// int8 in models that say they were trained so (architecture `bitnet`, a `quantization_config`
    /// of `bitnet`, or a recipe of ours that says it), floats in others.
    #[default]
    Auto,
    /// 8-bit integers with one absmax scale for each token.
    Int8,
    /// Floats.
    Float,
}

named!(ActivationType, "activations", {
    Auto = "auto",
    Int8 = "int8",
    Float = "float",
});

/// How weights with float activations are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FloatType {
    /// Without any loss: f32, f16 and bf16 as stored; the block types of GGUF and quantized layers
    /// of one plane without zero points as the integers they are, ternary ones in 2 bits; the rest
    /// as f32.
    #[default]
    Exact,
    /// Rounded to bf16: an error of 2⁻⁹ of each weight, 56 dB.
    Bf16,
    /// 8-bit integers with one f16 scale for each 32 columns (Q8_0): about 44 dB for normal
    /// weights. What has codes of 8 bits or fewer stays exact.
    Int8,
    /// 4-bit integers with one f16 scale for each 32 columns (Q4_0): about 20 dB for normal
    /// weights. What has codes of 4 bits or fewer stays exact.
    Int4,
}

impl FloatType {
    /// Whether weights that are held exactly in blocks are left so.
    fn keeps(self, kind: BlockType) -> bool {
        match self {
            Self::Exact => true,
            Self::Bf16 => false,
            Self::Int8 => kind.codes.bits() <= 8,
            Self::Int4 => kind.codes.bits() <= 4,
        }
    }
}

named!(FloatType, "type of weights", {
    Exact = "exact",
    Bf16 = "bf16",
    Int8 = "int8",
    Int4 = "int4",
});

/// What a graph takes its weights from. Names are those of Hugging Face, without `.weight`.
pub(crate) trait Provider: Sync {
    fn config(&self) -> &Config;
    /// Weights of a norm.
    fn norm(&self, module: &str, len: usize) -> Result<Norm>;
    /// A linear layer `(rows, cols)`.
    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear>;
    /// The embedding or the output matrix.
    fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<Matrix>;
}

/// Takes weights from a checkpoint.
pub(crate) struct Loader<'a> {
    pub(crate) source: &'a Source,
    pub(crate) config: &'a Config,
    pub(crate) machine: &'a Machine,
    /// int8 activations for ternary layers.
    pub(crate) int8: bool,
    /// How linear layers and the embedding are held where they are floats.
    pub(crate) floats: [FloatType; 2],
    pub(crate) used: Mutex<HashSet<String>>,
    /// Buffers that are not in use, at most one for each thread.
    pub(crate) buffers: Mutex<Vec<Vec<u8>>>,
    /// What rounding by choice did to linear layers and to the embedding.
    pub(crate) losses: Mutex<[Loss; 2]>,
}

/// Σ w² and Σ (w − rounded)² of weights that were rounded.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Loss {
    power: f64,
    error: f64,
}

impl Loss {
    fn of(w: &[f32], rounded: impl Iterator<Item = f32>) -> Self {
        let square = |x: f32| f64::from(x).powi(2);
        let sums = |(power, error), (&w, r)| (power + square(w), error + square(w - r));
        let (power, error) = w.iter().zip(rounded).fold((0.0, 0.0), sums);
        Self { power, error }
    }

    fn add(&mut self, other: Self) {
        self.power += other.power;
        self.error += other.error;
    }

    /// Says what was rounded, if anything was.
    pub(crate) fn note(&self, what: &str, held: FloatType) -> Option<String> {
        let sqnr = 10.0 * (self.power / self.error).log10();
        match (self.power > 0.0, self.error > 0.0) {
            (false, _) => None,
            (true, true) => Some(format!(
                "{what} rounded to {held}: {sqnr:.1} dB above the error"
            )),
            (true, false) => Some(format!("{what} held in {held} without loss")),
        }
    }
}

/// Decodes whole rows from one on.
type ReadRows<'a> = dyn Fn(usize, &mut [f32]) -> Result<()> + Sync + 'a;

/// Weights that are decoded at once.
const STRIP: usize = 1 << 16;

impl Provider for Loader<'_> {
    fn config(&self) -> &Config {
        self.config
    }

    fn norm(&self, module: &str, len: usize) -> Result<Norm> {
        Ok(Norm(self.vector(&format!("{module}.weight"), len)?))
    }

    fn linear(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear> {
        let (tensor, path) = self.tensor(&format!("{module}.weight"), &[rows, cols])?;
        let bias = if bias {
            Some(self.vector(&format!("{module}.bias"), rows)?)
        } else {
            None
        };
        let multiplier = self.multiplier(module)?;
        let quantize = match &tensor.content {
            Content::Quantized(q) => {
                self.int8 && q.spec.precision == Precision::Ternary && q.spec.planes == 1
            }
            _ => self.int8 && self.is_online(module)?,
        };
        let whole = match &tensor.content {
            Content::Quantized(q) if quantize => self.prepacked(tensor, path, q, multiplier)?,
            _ => None,
        };
        let weights = if let Some(packed) = whole {
            Weights::Ternary(packed)
        } else if quantize {
            let mut matrix = match &tensor.content {
                Content::Quantized(q) => self.source.matrix(&tensor.name, q)?,
                _ => self.ternarize(tensor, path, rows, cols)?,
            };
            matrix.scales.iter_mut().for_each(|s| *s *= multiplier);
            let matrix = coarsest(matrix);
            let packed = Prepacked::new(&matrix, &self.machine.pool)
                .map_err(|source| matrix_error(path, tensor, source))?;
            Weights::Ternary(packed)
        } else {
            if self.is_online(module)? {
                let what = "int8 activations: weights that are made ternary on load are multiplied with nothing else";
                return Err(bitnet_formats::Error::tensor(
                    path,
                    &tensor.name,
                    what,
                    "float activations",
                )
                .into());
            }
            let mut matrix = self.dense(tensor, path, rows, cols, 0)?;
            if multiplier != 1.0 {
                let mut all = vec![0.0; rows * cols];
                all.chunks_mut(cols)
                    .enumerate()
                    .for_each(|(row, out)| matrix.row_into(row, out));
                all.iter_mut().for_each(|w| *w *= multiplier);
                matrix = Matrix::new(rows, cols, Data::F32(all))
                    .map_err(|source| matrix_error(path, tensor, source))?;
            }
            Weights::Dense(matrix)
        };
        Ok(Linear { weights, bias })
    }

    fn embedding(&self, module: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let (tensor, path) = self.tensor(&format!("{module}.weight"), &[rows, cols])?;
        self.dense(tensor, path, rows, cols, 1)
    }
}

fn matrix_error(path: &Path, tensor: &Tensor, source: bitnet_kernels::Error) -> Error {
    Error::Matrix {
        path: path.to_path_buf(),
        tensor: tensor.name.clone(),
        source,
    }
}

/// One scale for the tensor, if all blocks have the same one.
fn coarsest(mut matrix: bitnet_core::Matrix) -> bitnet_core::Matrix {
    let scale = matrix
        .scales
        .iter()
        .copied()
        .find(|s| *s != 0.0)
        .unwrap_or(0.0);
    if matrix.spec.granularity == Granularity::Tensor
        || matrix.scales.iter().any(|s| *s != scale && *s != 0.0)
    {
        return matrix;
    }
    if matrix.scales.contains(&0.0) && scale != 0.0 {
        // Under the scale 0 every value stands for 0; under another one only the value 0 does.
        let (cols, width, per_row) = (
            matrix.spec.cols,
            matrix.spec.granule_cols(),
            matrix.spec.granules_per_row(),
        );
        for (row, values) in matrix.values.chunks_mut(cols.max(1)).enumerate() {
            for (group, values) in values.chunks_mut(width).enumerate() {
                if matrix.scales[row * per_row + group] == 0.0 {
                    values.fill(0);
                }
            }
        }
    }
    matrix.spec.granularity = Granularity::Tensor;
    matrix.scales = vec![scale];
    matrix
}

impl Loader<'_> {
    /// The tensor of a Hugging Face name, and its file.
    fn tensor(&self, hf_name: &str, shape: &[usize]) -> Result<(&Tensor, &Path)> {
        let name = self.stored_name(hf_name);
        let Some(tensor) = self.source.find(&name) else {
            return Err(bitnet_formats::Error::tensor(
                &self.source.path,
                &name,
                format!("shape {shape:?}"),
                "no such tensor",
            )
            .into());
        };
        self.used
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name);
        let path = tensor
            .stored()
            .first()
            .map_or(self.source.path.as_path(), |&i| self.source.file_of(i));
        if tensor.shape != shape {
            let (expected, got) = (
                format!("shape {shape:?}, as config.json says"),
                format!("{:?}", tensor.shape),
            );
            return Err(bitnet_formats::Error::tensor(path, &tensor.name, expected, got).into());
        }
        if matches!(tensor.content, Content::Opaque(_)) {
            let got = tensor
                .stored()
                .first()
                .map_or(String::new(), |&i| self.source.stored[i].dtype.to_string());
            return Err(bitnet_formats::Error::tensor(
                path,
                &tensor.name,
                "weights of a type that this engine decodes",
                got,
            )
            .into());
        }
        Ok((tensor, path))
    }

    fn stored_name(&self, hf_name: &str) -> String {
        match self.source.kind {
            Kind::Gguf => {
                let name = self.config.architecture.gguf_tensor(hf_name);
                name.unwrap_or_else(|| hf_name.into())
            }
            Kind::Safetensors | Kind::Folder => hf_name.into(),
        }
    }

    fn vector(&self, hf_name: &str, len: usize) -> Result<Vec<f32>> {
        let (tensor, path) = self.tensor(hf_name, &[len])?;
        let mut out = vec![0.0; len];
        match &tensor.content {
            Content::Float(stored) => {
                self.source
                    .read_floats(*stored, 0..len, &mut vec![], &mut out)?
            }
            _ => {
                return Err(bitnet_formats::Error::tensor(
                    path,
                    &tensor.name,
                    "floats",
                    "quantized values",
                )
                .into());
            }
        }
        finite(path, tensor, 0, &out)?;
        Ok(out)
    }

    /// What `blk.N.<module>.scale` of a GGUF multiplies the layer by; 1 where there is none.
    fn multiplier(&self, module: &str) -> Result<f32> {
        let name = self.stored_name(&format!("{module}.weight"));
        let Some(name) = name
            .strip_suffix(".weight")
            .map(|n| format!("{n}.scale"))
            .filter(|_| self.source.kind == Kind::Gguf)
        else {
            return Ok(1.0);
        };
        let Some(stored) = self.source.find_stored(&name) else {
            return Ok(1.0);
        };
        self.used
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.clone());
        let mut scale = [0.0];
        let path = self.source.file_of(stored);
        if self.source.stored[stored].elements() != 1 {
            return Err(bitnet_formats::Error::tensor(
                path,
                &name,
                "one number",
                format!("shape {:?}", self.source.stored[stored].shape),
            )
            .into());
        }
        self.source
            .read_floats(stored, 0..1, &mut vec![], &mut scale)?;
        if !scale[0].is_finite() {
            return Err(bitnet_formats::Error::tensor(
                path,
                &name,
                "a finite number",
                scale[0].to_string(),
            )
            .into());
        }
        Ok(scale[0])
    }

    /// Ternary weights straight from their bytes, where one scale serves each row.
    fn prepacked(
        &self,
        tensor: &Tensor,
        path: &Path,
        q: &Quantized,
        multiplier: f32,
    ) -> Result<Option<Prepacked>> {
        let scales = match q.scales {
            Scales::Inside if multiplier != 1.0 => return Ok(None),
            Scales::Inside => vec![],
            Scales::Stored { index, reciprocal } => {
                let mut scales = vec![0.0; self.source.stored[index].elements()];
                self.source
                    .read_floats(index, 0..scales.len(), &mut vec![], &mut scales)?;
                scales
                    .iter_mut()
                    .for_each(|s| *s = if reciprocal { 1.0 / *s } else { *s } * multiplier);
                scales
            }
        };
        let buffers = || self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = buffers().pop().unwrap_or_default();
        self.source.read_all_into(q.packed, &mut bytes)?;
        let (Machine { kernels, pool }, parts) = (
            self.machine,
            Parts {
                spec: &q.spec,
                scales: &scales,
                zero_points: &[],
            },
        );
        let packed = Prepacked::from_wire(kernels, pool, q.layout, parts, &bytes, Stream::TwoBit);
        buffers().push(bytes);
        let packed = packed.map_err(|source| matrix_error(path, tensor, source))?;
        Ok((packed.groups() <= 1).then_some(packed))
    }

    /// Whether the float weights of a module are made ternary in each forward pass.
    fn is_online(&self, module: &str) -> Result<bool> {
        let Some(bitnet) = self.source.bitnet.filter(|b| b.mode == Mode::Online) else {
            return Ok(false);
        };
        let (path, config) = (
            self.source.path.join("config.json"),
            self.source.config.as_ref(),
        );
        let bad = |key: &str, expected: &str, got: String| {
            bitnet_formats::Error::config(
                &path,
                format!("quantization_config.{key}"),
                expected,
                got,
            )
        };
        if bitnet.linear_class != LinearClass::AutoBitLinear {
            return Err(bad(
                "linear_class",
                "autobitlinear: no other class has an online mode",
                bitnet.linear_class.name().into(),
            )
            .into());
        }
        let kept = config
            .and_then(|c| c.pointer("/quantization_config/modules_to_not_convert"))
            .filter(|v| !v.is_null());
        let Some(kept) = kept else { return Ok(true) };
        let expected = "a list of plain module names with lm_head among them";
        let names: Option<Vec<&str>> = kept
            .as_array()
            .and_then(|all| all.iter().map(|v| v.as_str()).collect());
        let names = names.filter(|all| {
            all.contains(&"lm_head")
                && all
                    .iter()
                    .all(|n| n.chars().all(|c| c.is_alphanumeric() || "._-".contains(c)))
        });
        let Some(names) = names else {
            return Err(bad("modules_to_not_convert", expected, kept.to_string()).into());
        };
        let prefix = |name: &str| {
            module
                .strip_prefix(name)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || name.ends_with('.'))
        };
        Ok(!names
            .iter()
            .any(|name| prefix(name) || module.ends_with(name)))
    }

    /// The absmean rule as each forward pass applies it: s = 1/max(mean|W|, 1e-5), values
    /// clamp(round(W·s), −1, 1), scale 1/s.
    fn ternarize(
        &self,
        tensor: &Tensor,
        path: &Path,
        rows: usize,
        cols: usize,
    ) -> Result<bitnet_core::Matrix> {
        let Content::Float(stored) = tensor.content else {
            return Err(bitnet_formats::Error::tensor(
                path,
                &tensor.name,
                "float weights, for quantization_mode is online",
                "packed ones",
            )
            .into());
        };
        let mut w = vec![0.0; rows * cols];
        self.source
            .read_floats(stored, 0..w.len(), &mut vec![], &mut w)?;
        finite(path, tensor, 0, &w)?;
        let inverse = 1.0 / (self.machine.kernels.moments(&w).mean_abs() as f32).max(1e-5);
        let values = w
            .iter()
            .map(|w| (w * inverse).round_ties_even().clamp(-1.0, 1.0) as i8)
            .collect();
        let spec = MatrixSpec::new(rows, cols, Precision::Ternary, Granularity::Tensor);
        Ok(bitnet_core::Matrix {
            spec,
            values,
            scales: vec![1.0 / inverse],
            zero_points: vec![],
        })
    }

    /// Weights for float activations; `part` is 0 for a linear layer and 1 for the embedding.
    fn dense(
        &self,
        tensor: &Tensor,
        path: &Path,
        rows: usize,
        cols: usize,
        part: usize,
    ) -> Result<Matrix> {
        let (choice, pool) = (self.floats[part], &self.machine.pool);
        // Blocks of GGUF are taken as they are, whatever else a recipe in the file says of them.
        let stored = match &tensor.content {
            Content::Quantized(q) => q.packed,
            Content::Float(stored) | Content::Opaque(stored) => *stored,
        };
        if let StoredType::Ggml(ggml_type) = self.source.stored[stored].dtype
            && let Some(kind) = blocks::type_of_gguf(ggml_type).filter(|kind| choice.keeps(*kind))
        {
            return Ok(
                blocks::of_gguf(pool, self.source, stored, ggml_type, kind, [rows, cols])?.into(),
            );
        }
        let read: Box<ReadRows<'_>> = match &tensor.content {
            Content::Quantized(q) => {
                let matrix = self.source.matrix(&tensor.name, q)?;
                if (matrix.spec.rows, matrix.spec.cols) != (rows, cols) {
                    let got = format!("{} × {}", matrix.spec.rows, matrix.spec.cols);
                    return Err(bitnet_formats::Error::tensor(
                        path,
                        &tensor.name,
                        format!("a matrix of {rows} × {cols}"),
                        got,
                    )
                    .into());
                }
                if let Some(kind) = blocks::type_of(&matrix).filter(|kind| choice.keeps(*kind)) {
                    return match blocks::of_matrix(pool, &matrix, kind) {
                        Ok(blocks) => Ok(blocks.into()),
                        Err(source) => Err(matrix_error(path, tensor, source)),
                    };
                }
                Box::new(move |first, out| {
                    out.chunks_mut(cols.max(1))
                        .enumerate()
                        .for_each(|(i, out)| matrix.dequantize_row_into(first + i, out));
                    Ok(())
                })
            }
            Content::Float(stored) | Content::Opaque(stored) => {
                let (source, stored) = (self.source, *stored);
                Box::new(move |first, out| {
                    let at = first * cols;
                    Ok(source.read_floats(stored, at..at + out.len(), &mut vec![], out)?)
                })
            }
        };
        let exact = match &tensor.content {
            Content::Float(i) => self.source.stored[*i].dtype.to_string(),
            _ => String::new(),
        };
        // Decodes whole rows from one on into a buffer, and checks them.
        let floats = |first: usize, count: usize| -> Result<Vec<f32>> {
            let mut floats = vec![0.0; count];
            read(first, &mut floats)?;
            finite(path, tensor, first * cols, &floats)?;
            Ok(floats)
        };
        let lost =
            |loss: Loss| self.losses.lock().unwrap_or_else(PoisonError::into_inner)[part].add(loss);
        let data = match (choice, exact.as_str()) {
            (FloatType::Exact, "F16") => Data::F16(self.halves(tensor, path, rows, cols, 0x7c00)?),
            (FloatType::Exact, "BF16") => {
                Data::Bf16(self.halves(tensor, path, rows, cols, 0x7f80)?)
            }
            (FloatType::Bf16, _) => Data::Bf16(self.strips(rows, cols, |first, out| {
                let w = floats(first, out.len())?;
                out.iter_mut()
                    .zip(&w)
                    .for_each(|(o, w)| *o = half::bf16::from_f32(*w).to_bits());
                lost(Loss::of(
                    &w,
                    out.iter().map(|&bits| half::bf16::from_bits(bits).to_f32()),
                ));
                Ok(())
            })?),
            (FloatType::Exact, _) => Data::F32(self.strips(rows, cols, |first, out| {
                floats(first, out.len()).map(|w| out.copy_from_slice(&w))
            })?),
            (FloatType::Int8 | FloatType::Int4, _) => {
                let kind = if choice == FloatType::Int8 {
                    BlockType::INT8
                } else {
                    BlockType::INT4
                };
                Data::Blocks(Blocks::new(pool, rows, cols, kind, |first, strip| {
                    let w = floats(first, strip.rows() * cols)?;
                    let (mut loss, mut rounded) = (Loss::default(), vec![0.0; cols]);
                    for (i, w) in w.chunks_exact(cols.max(1)).enumerate() {
                        let mut row = strip.row(i);
                        if choice == FloatType::Int8 {
                            quantize_int8(w, &mut row)
                        } else {
                            quantize_int4(w, &mut row)
                        }
                        strip.row_into(i, &mut rounded);
                        loss.add(Loss::of(w, rounded.iter().copied()));
                    }
                    lost(loss);
                    Ok::<(), Error>(())
                })?)
            }
        };
        Matrix::new(rows, cols, data).map_err(|source| matrix_error(path, tensor, source))
    }

    /// 16-bit floats as they are stored. All bits of `special` are set in those that are no finite
    /// numbers.
    fn halves(
        &self,
        tensor: &Tensor,
        path: &Path,
        rows: usize,
        cols: usize,
        special: u16,
    ) -> Result<Vec<u16>> {
        let stored = tensor.stored()[0];
        self.strips(rows, cols, |first, out: &mut [u16]| {
            let mut bytes = vec![0; 2 * out.len()];
            self.source
                .read(stored, 2 * (first * cols) as u64, &mut bytes)?;
            out.iter_mut()
                .zip(bytes.as_chunks().0)
                .for_each(|(out, bytes)| *out = u16::from_le_bytes(*bytes));
            match out.iter().position(|bits| bits & special == special) {
                None => Ok(()),
                Some(i) => Err(not_finite(
                    path,
                    tensor,
                    first * cols + i,
                    out[i] & !(special | 0x8000) != 0,
                )),
            }
        })
    }

    /// Row-major elements that `fill` writes, some rows from one on at a time, on the threads of
    /// the pool.
    fn strips<T: Copy + Default + Send>(
        &self,
        rows: usize,
        cols: usize,
        fill: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
    ) -> Result<Vec<T>> {
        let strip = (STRIP / cols.max(1)).max(1);
        let (mut all, failed) = (zeros::<T>(rows * cols), Mutex::new(None));
        self.machine
            .pool
            .for_chunks(&mut all, (strip * cols).max(1), |part, out| {
                if let Err(error) = fill(part * strip, out) {
                    failed
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .get_or_insert(error);
                }
            });
        failed
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(all), Err)
    }

    /// Refuses tensors that the graph has no place for: they would be left out in silence.
    pub(crate) fn check_all_used(&self) -> Result<()> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        for tensor in self
            .source
            .tensors
            .iter()
            .filter(|t| !used.contains(&t.name))
        {
            let name = tensor.name.as_str();
            // A tied head is the embedding whatever the file holds beside it, and rotation
            // frequencies are computed or read apart.
            let known = name.ends_with("rotary_emb.inv_freq")
                || name == arch::ROPE_FREQS
                || (self.config.tied && name == "lm_head.weight");
            if !known {
                let path = tensor
                    .stored()
                    .first()
                    .map_or(self.source.path.as_path(), |&i| self.source.file_of(i));
                let graph = self.config.architecture.name;
                let got = format!("one that it has no place for, of shape {:?}", tensor.shape);
                return Err(bitnet_formats::Error::tensor(
                    path,
                    name,
                    format!("a tensor of the {graph} graph with this config"),
                    got,
                )
                .into());
            }
        }
        Ok(())
    }
}

/// Refuses NaN and infinity; `first` is the index of the first weight.
fn finite(path: &Path, tensor: &Tensor, first: usize, w: &[f32]) -> Result<()> {
    match w.iter().position(|w| !w.is_finite()) {
        None => Ok(()),
        Some(i) => Err(not_finite(path, tensor, first + i, w[i].is_nan())),
    }
}

fn not_finite(path: &Path, tensor: &Tensor, index: usize, nan: bool) -> Error {
    let got = format!("{} at index {index}", if nan { "NaN" } else { "infinity" });
    bitnet_formats::Error::tensor(path, &tensor.name, "finite weights", got).into()
}
