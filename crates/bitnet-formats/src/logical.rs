//! The model's tensors, apart from how many stored tensors each is made of.

use crate::document::Packed;
use crate::dtype::StoredType;
use crate::gguf::GgmlType;
use crate::hf::{BitnetConfig, Mode};
use crate::source::{Kind, OpenOptions, Source, Stored};
use crate::{Error, Result};
use bitnet_core::pack::{self, Layout, LayoutOrigin, PackedLen};
use bitnet_core::{Granularity, MatrixSpec, Precision, ScaleDtype, ZeroPoints};
use safetensors::Dtype;

/// A tensor of the model.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name in the model.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// What it is made of.
    pub content: Content,
}

/// What a tensor is made of.
#[derive(Debug, Clone)]
pub enum Content {
    /// A stored tensor that decodes to f32.
    Float(usize),
    /// A stored tensor of integers, or of a type without decoder; it can only be copied.
    Opaque(usize),
    /// A quantized matrix.
    Quantized(Quantized),
}

/// A quantized matrix in a file.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// Shape and conventions.
    pub spec: MatrixSpec,
    /// How the values are packed.
    pub layout: &'static dyn Layout,
    /// Stored tensor with the packed bytes.
    pub packed: usize,
    /// Where the scales are.
    pub scales: Scales,
    /// Stored tensor with the zero points.
    pub zero_points: Option<usize>,
}

/// Where the scales of a quantized matrix are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// The layout carries them.
    Inside,
    /// In a stored tensor, as they are or as 1/scale.
    Stored {
        /// The stored tensor.
        index: usize,
        /// Whether it holds 1/scale.
        reciprocal: bool,
    },
}

impl Tensor {
    /// The stored tensors that it is made of.
    pub fn stored(&self) -> Vec<usize> {
        match &self.content {
            Content::Float(i) | Content::Opaque(i) => vec![*i],
            Content::Quantized(q) => {
                let scale = match q.scales {
                    Scales::Stored { index, .. } => Some(index),
                    Scales::Inside => None,
                };
                [Some(q.packed), scale, q.zero_points]
                    .into_iter()
                    .flatten()
                    .collect()
            }
        }
    }

    /// Bytes in the file, scales and padding included.
    pub fn bytes(&self, source: &Source) -> u64 {
        self.stored().iter().map(|&i| source.stored[i].len).sum()
    }

    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Rows and columns as a weight matrix sees them: the first dimension, and all others together.
    /// `None` below two dimensions.
    pub fn matrix_shape(&self) -> Option<(usize, usize)> {
        match self.shape.as_slice() {
            [rows, rest @ ..] if !rest.is_empty() => Some((*rows, rest.iter().product())),
            _ => None,
        }
    }
}

/// Groups the stored tensors of a source.
pub(crate) fn tensors(source: &Source, options: &OpenOptions) -> Result<Vec<Tensor>> {
    let mut taken = vec![false; source.stored.len()];
    let mut found: Vec<(usize, Tensor)> = vec![];
    let mut take = |tensor: Tensor, found: &mut Vec<(usize, Tensor)>| {
        for i in tensor.stored() {
            if std::mem::replace(&mut taken[i], true) {
                let name = &source.stored[i].name;
                return Err(Error::tensor(
                    source.file_of(i),
                    name,
                    "a part of one quantized tensor",
                    format!("a part of '{}' too", tensor.name),
                ));
            }
        }
        found.push((tensor.stored().first().copied().unwrap_or(0), tensor));
        Ok(())
    };
    if let Some(document) = &source.document {
        for (name, packed) in &document.tensors {
            take(from_document(source, name, packed)?, &mut found)?;
        }
    } else if let Some(bitnet) = source.bitnet.filter(|b| b.mode == Mode::Offline) {
        for (i, stored) in source.stored.iter().enumerate() {
            if let Some(tensor) = from_hf(source, i, stored, bitnet)? {
                take(tensor, &mut found)?;
            }
        }
    } else if let Some((i, stored)) = orphan_scale(source) {
        return Err(Error::tensor(
            source.file_of(i),
            &stored.name,
            "a quantization_config in config.json that says what this scale means",
            "none",
        ));
    }
    for (i, stored) in source.stored.iter().enumerate() {
        if !taken[i] {
            let content = match foreign_block(source, i, stored, options)? {
                Some(q) => Content::Quantized(q),
                None if stored.dtype.is_float() => Content::Float(i),
                None => Content::Opaque(i),
            };
            found.push((
                i,
                Tensor {
                    name: stored.name.clone(),
                    shape: stored.shape.clone(),
                    content,
                },
            ));
        }
    }
    if source
        .bitnet
        .is_some_and(|b| b.mode == Mode::Offline && !b.linear_class.is_reciprocal())
    {
        refuse_biases(source, &found)?;
    }
    found.sort_by_key(|(first, _)| *first);
    Ok(found.into_iter().map(|(_, tensor)| tensor).collect())
}

/// `autobitlinear` multiplies the bias by the scale too, so a bias there is not the bias of the
/// layer. Nothing here knows how to say that in another container.
fn refuse_biases(source: &Source, found: &[(usize, Tensor)]) -> Result<()> {
    for (_, tensor) in found.iter().filter(
        |(_, t)| matches!(&t.content, Content::Quantized(q) if q.layout.origin() == LayoutOrigin::HfBitnet),
    ) {
        let bias = tensor
            .name
            .strip_suffix("weight")
            .and_then(|layer| source.find_stored(&format!("{layer}bias")));
        if let Some(bias) = bias {
            let expected = "no bias beside a packed weight: linear_class autobitlinear scales it too, which is not supported";
            return Err(Error::tensor(
                source.file_of(bias),
                &source.stored[bias].name,
                expected,
                "one",
            ));
        }
    }
    Ok(())
}

/// A packed weight with a scale, but nothing that says by which convention.
fn orphan_scale(source: &Source) -> Option<(usize, &Stored)> {
    source.stored.iter().enumerate().find(|(_, s)| {
        s.name
            .strip_suffix("_scale")
            .and_then(|weight| source.find_stored(weight))
            .is_some_and(|w| source.stored[w].dtype == StoredType::U8)
    })
}

fn from_document(source: &Source, name: &str, packed: &Packed) -> Result<Tensor> {
    let find = |stored: &str| {
        source.find_stored(stored).ok_or_else(|| {
            Error::tensor(
                &source.files[0].path,
                name,
                format!("a stored tensor '{stored}'"),
                "none of that name",
            )
        })
    };
    let path = &source.files[0].path;
    let layout = pack::by_name(&packed.layout).map_err(Error::matrix(path, name))?;
    if packed.reciprocal && packed.scale.is_none() {
        return Err(Error::tensor(
            path,
            name,
            "a stored scale, for it is said to be an inverse",
            "none",
        ));
    }
    let q = Quantized {
        spec: packed.spec.clone(),
        layout,
        packed: find(&packed.packed)?,
        scales: match &packed.scale {
            Some(scale) => Scales::Stored {
                index: find(scale)?,
                reciprocal: packed.reciprocal,
            },
            None => Scales::Inside,
        },
        zero_points: packed.zero_point.as_deref().map(find).transpose()?,
    };
    if let Some(bitnet) = source.bitnet
        && layout.origin() == LayoutOrigin::HfBitnet
        && bitnet.linear_class.is_reciprocal() != packed.reciprocal
    {
        return Err(Error::config(
            &source.path.join("config.json"),
            "quantization_config.linear_class",
            format!(
                "the convention of tensor '{name}', whose scale is stored {}",
                if packed.reciprocal {
                    "as 1/scale"
                } else {
                    "as it is"
                }
            ),
            format!("'{}'", bitnet.linear_class.name()),
        ));
    }
    check(source, name, &q)?;
    let elements = packed
        .shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d));
    if elements != Some(q.spec.weights_len()) {
        return Err(Error::tensor(
            path,
            name,
            format!("a shape of {} weights", q.spec.weights_len()),
            format!("{:?}", packed.shape),
        ));
    }
    Ok(Tensor {
        name: name.into(),
        shape: packed.shape.clone(),
        content: Content::Quantized(q),
    })
}

/// Checks that the stored tensors have the sizes and types that the spec asks for.
fn check(source: &Source, name: &str, q: &Quantized) -> Result<()> {
    let path = source.file_of(q.packed);
    q.spec.validate().map_err(Error::matrix(path, name))?;
    q.layout.check(&q.spec).map_err(Error::matrix(path, name))?;
    let expected = match source.kind {
        Kind::Gguf => match q.layout.origin() {
            LayoutOrigin::Ggml(id) | LayoutOrigin::GgmlVariant(id) => {
                GgmlType::from_id(id).map(StoredType::Ggml)
            }
            LayoutOrigin::Own | LayoutOrigin::HfBitnet => None,
        },
        Kind::Safetensors | Kind::Folder => Some(StoredType::U8),
    };
    let got = source.stored[q.packed].dtype;
    if expected != Some(got) {
        let expected = expected.map_or_else(
            || "a layout that GGUF has".into(),
            |t| format!("type {t}, in which layout {} is stored", q.layout.name()),
        );
        return Err(Error::tensor(
            path,
            name,
            expected,
            format!("{got}: another program has changed the file"),
        ));
    }
    let got = source.stored[q.packed].len;
    let fits = match q.layout.packed_len(&q.spec) {
        PackedLen::Exact(n) => got == n as u64,
        PackedLen::AtMost(n) => got <= n as u64,
    };
    if !fits {
        return Err(Error::tensor(
            path,
            name,
            format!("{:?} packed bytes", q.layout.packed_len(&q.spec)),
            format!("{got}"),
        ));
    }
    let sized = |index: usize, dtype: StoredType| {
        let stored = &source.stored[index];
        if stored.dtype == dtype && stored.elements() == q.spec.scales_len() {
            return Ok(());
        }
        Err(Error::tensor(
            path,
            &stored.name,
            format!("{} elements of {dtype}", q.spec.scales_len()),
            format!("{} of {}", stored.elements(), stored.dtype),
        ))
    };
    if q.layout.stores_scales() && q.scales != Scales::Inside {
        return Err(Error::tensor(
            path,
            name,
            format!(
                "no stored scales, for layout {} carries them",
                q.layout.name()
            ),
            "a tensor of scales",
        ));
    }
    match q.scales {
        Scales::Inside if !q.layout.stores_scales() => {
            return Err(Error::tensor(
                path,
                name,
                "a stored tensor of scales",
                "none",
            ));
        }
        Scales::Inside => {}
        Scales::Stored {
            reciprocal: true, ..
        } if q.spec.scale_dtype != ScaleDtype::F32 => {
            return Err(Error::tensor(
                path,
                name,
                "scales of f32, for they are inverses of what is stored",
                q.spec.scale_dtype.name(),
            ));
        }
        // The stored number has its own type: the scale itself is 1/x in f32.
        Scales::Stored {
            index,
            reciprocal: true,
        } => sized(index, source.stored[index].dtype)?,
        Scales::Stored {
            index,
            reciprocal: false,
        } => sized(index, q.spec.scale_dtype.into())?,
    }
    match (q.spec.zero_points, q.zero_points) {
        (ZeroPoints::None, None) => Ok(()),
        (ZeroPoints::I8, Some(index)) => sized(index, StoredType::Plain(Dtype::I8)),
        (ZeroPoints::F32, Some(index)) => sized(index, StoredType::F32),
        (expected, got) => Err(Error::tensor(
            path,
            name,
            format!("{expected:?} zero points"),
            format!("{got:?}"),
        )),
    }
}

/// A `weight` of packed bytes with its `weight_scale`, as HF `bitnet` folders have them.
fn from_hf(
    source: &Source,
    index: usize,
    stored: &Stored,
    bitnet: BitnetConfig,
) -> Result<Option<Tensor>> {
    if stored.dtype != StoredType::U8 || !stored.name.ends_with(".weight") {
        return Ok(None);
    }
    let path = source.file_of(index);
    let name = &stored.name;
    let [packed_rows, cols] = stored.shape[..] else {
        return Err(Error::tensor(
            path,
            name,
            "a packed matrix [out/4, in]",
            format!("shape {:?}", stored.shape),
        ));
    };
    let scale_name = format!("{name}_scale");
    let Some(scale) = source.find_stored(&scale_name) else {
        return Err(Error::tensor(
            path,
            name,
            format!("a scale '{scale_name}' beside the packed weight"),
            "none",
        ));
    };
    let rows = packed_rows
        .checked_mul(4)
        .ok_or_else(|| Error::tensor(path, name, "countable rows", format!("4 × {packed_rows}")))?;
    let reciprocal = bitnet.linear_class.is_reciprocal();
    let scale_dtype = match source.stored[scale].dtype {
        _ if reciprocal => ScaleDtype::F32,
        StoredType::Plain(Dtype::F32) => ScaleDtype::F32,
        StoredType::Plain(Dtype::F16) => ScaleDtype::F16,
        StoredType::Plain(Dtype::BF16) => ScaleDtype::Bf16,
        other => {
            return Err(Error::tensor(
                path,
                &scale_name,
                "a scale of f32, f16 or bf16",
                other.to_string(),
            ));
        }
    };
    let spec = MatrixSpec {
        scale_dtype,
        ..MatrixSpec::new(rows, cols, Precision::Ternary, Granularity::Tensor)
    };
    let Some(layout) = pack::of_origin(LayoutOrigin::HfBitnet).next() else {
        return Ok(None);
    };
    let q = Quantized {
        spec,
        layout,
        packed: index,
        scales: Scales::Stored {
            index: scale,
            reciprocal,
        },
        zero_points: None,
    };
    check(source, name, &q)?;
    Ok(Some(Tensor {
        name: name.clone(),
        shape: vec![rows, cols],
        content: Content::Quantized(q),
    }))
}

/// A ternary or binary GGUF tensor that somebody else wrote: one scale for each block.
fn foreign_block(
    source: &Source,
    index: usize,
    stored: &Stored,
    options: &OpenOptions,
) -> Result<Option<Quantized>> {
    let StoredType::Ggml(ggml) = stored.dtype else {
        return Ok(None);
    };
    if source.kind != Kind::Gguf || stored.shape.is_empty() {
        return Ok(None);
    }
    let path = source.file_of(index);
    let cols = stored.shape[stored.shape.len() - 1];
    let rows = stored.elements() / cols.max(1);
    let layout = if ggml == GgmlType::I2S {
        pack::by_name(&options.i2s_layout).map_err(Error::matrix(path, &stored.name))?
    } else {
        match pack::of_ggml_type(ggml.id()).next() {
            Some(layout) => layout,
            None => return Ok(None),
        }
    };
    let Some(spec) = layout.foreign_spec(rows, cols) else {
        return Ok(None);
    };
    let q = Quantized {
        spec,
        layout,
        packed: index,
        scales: Scales::Inside,
        zero_points: None,
    };
    check(source, &stored.name, &q)?;
    Ok(Some(q))
}

/// The GGUF type that stores a wire layout, if there is one.
pub fn ggml_type_of(layout: &dyn Layout) -> Option<GgmlType> {
    match layout.origin() {
        LayoutOrigin::Ggml(id) => GgmlType::from_id(id),
        LayoutOrigin::Own | LayoutOrigin::HfBitnet | LayoutOrigin::GgmlVariant(_) => None,
    }
}
