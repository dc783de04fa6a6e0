//! Which stored tensors make up a tensor of the model: by the document, by the names of HF `bitnet`
//! folders, or by the block types of GGUF.

use crate::document::PackedTensor;
use crate::dtype::{StoredType, ggml_type_of_origin, layout_of};
use crate::gguf::GgmlType;
use crate::hf::{BitnetConfig, Mode};
use crate::storage::{Kind, OpenOptions, Storage};
use crate::tensor::{Content, ScaleSource, StoredId, StoredMatrix, Tensor};
use crate::{Error, Result};
use bitnet_core::pack::{self, LayoutOrigin, PackedLen};
use bitnet_core::{Granularity, MatrixSpec, Precision, ScaleDtype, ZeroPoints};
use safetensors::Dtype;

/// Bytes that are searched at once.
const SCANNED: usize = 1 << 20;

/// Groups stored tensors into the tensors of the model.
pub(crate) fn tensors(storage: &Storage, options: &OpenOptions) -> Result<Vec<Tensor>> {
    let mut taken = vec![false; storage.stored.len()];
    let mut found: Vec<Tensor> = vec![];
    for part in storage.foreign.values().flat_map(|f| &f.parts) {
        taken[part.0] = true;
    }
    let mut take = |tensor: Tensor, found: &mut Vec<Tensor>| {
        for id in tensor.stored() {
            if std::mem::replace(&mut taken[id.0], true) {
                let name = &storage.stored(id).name;
                return Err(Error::tensor(
                    storage.file_of(id),
                    name,
                    "a part of one quantized tensor",
                    format!("a part of '{}' too", tensor.name),
                ));
            }
        }
        found.push(tensor);
        Ok(())
    };
    if let Some(document) = &storage.document {
        for (name, packed) in &document.tensors {
            take(from_document(storage, name, packed)?, &mut found)?;
        }
    } else if let Some(bitnet) = storage.bitnet.filter(|b| b.mode == Mode::Offline) {
        for id in storage.ids() {
            if let Some(tensor) = from_hf(storage, id, bitnet)? {
                take(tensor, &mut found)?;
            }
        }
    } else if let Some(id) =
        orphan_scale(storage).filter(|id| storage.foreign.values().all(|f| !f.parts.contains(id)))
    {
        return Err(Error::tensor(
            storage.file_of(id),
            &storage.stored(id).name,
            "a quantization_config in config.json that says what this scale means",
            "none",
        ));
    }
    for id in storage.ids().filter(|id| !taken[id.0]) {
        let stored = storage.stored(id);
        let foreign = storage.foreign.get(&id).and_then(|f| f.ternary.clone());
        let content =
            match foreign.map_or_else(|| foreign_block(storage, id, options), |q| Ok(Some(q)))? {
                Some(q) => Content::Quantized(q),
                None if stored.dtype.is_float() => Content::Float(id),
                None => Content::Opaque(id),
            };
        found.push(Tensor {
            name: stored.name.clone(),
            shape: stored.shape.clone(),
            content,
        });
    }
    if storage
        .bitnet
        .is_some_and(|b| b.mode == Mode::Offline && !b.linear_class.is_reciprocal())
    {
        refuse_biases(storage, &found)?;
    }
    found.sort_by_key(|tensor| storage.position(tensor.first_stored()));
    Ok(found)
}

/// Refuses biases beside packed weights. `autobitlinear` multiplies the bias by the scale too, and
/// no other container can express that.
fn refuse_biases(storage: &Storage, found: &[Tensor]) -> Result<()> {
    let packed = |t: &&Tensor| match &t.content {
        Content::Quantized(q) => q.layout.origin() == LayoutOrigin::HfBitnet,
        _ => false,
    };
    for tensor in found.iter().filter(packed) {
        let bias = tensor
            .name
            .strip_suffix("weight")
            .and_then(|layer| storage.find_stored(&format!("{layer}bias")));
        if let Some(bias) = bias {
            let expected = "no bias beside a packed weight: linear_class autobitlinear scales it \
                            too, which is not supported";
            return Err(Error::tensor(
                storage.file_of(bias),
                &storage.stored(bias).name,
                expected,
                "one",
            ));
        }
    }
    Ok(())
}

/// A scale of a packed weight in a folder whose config.json does not name the convention.
fn orphan_scale(storage: &Storage) -> Option<StoredId> {
    storage.ids().find(|&id| {
        let weight = storage.stored(id).name.strip_suffix("_scale");
        weight
            .and_then(|weight| storage.find_stored(weight))
            .is_some_and(|w| storage.stored(w).dtype == StoredType::U8)
    })
}

fn from_document(storage: &Storage, name: &str, packed: &PackedTensor) -> Result<Tensor> {
    let find = |stored: &str| {
        storage.find_stored(stored).ok_or_else(|| {
            Error::tensor(
                &storage.files[0].path,
                name,
                format!("a stored tensor '{stored}'"),
                "none of that name",
            )
        })
    };
    let path = &storage.files[0].path;
    let layout = pack::by_name(&packed.layout).map_err(Error::matrix(path, name))?;
    if packed.reciprocal && packed.scale.is_none() {
        return Err(Error::tensor(
            path,
            name,
            "a stored scale, since the document calls it an inverse",
            "none",
        ));
    }
    let q = StoredMatrix {
        spec: packed.spec.clone(),
        transposed: packed.transposed,
        layout,
        packed: find(&packed.packed)?,
        scales: match &packed.scale {
            Some(scale) => ScaleSource::Stored {
                id: find(scale)?,
                reciprocal: packed.reciprocal,
            },
            None => ScaleSource::Inside,
        },
        zero_points: packed.zero_point.as_deref().map(find).transpose()?,
    };
    if let Some(bitnet) = storage.bitnet
        && layout.origin() == LayoutOrigin::HfBitnet
        && bitnet.linear_class.is_reciprocal() != packed.reciprocal
    {
        return Err(Error::config(
            &storage.path.join("config.json"),
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
    check(storage, name, &q)?;
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
    if packed.transposed && !is_transpose(&packed.shape, &q.spec) {
        return Err(Error::tensor(
            path,
            name,
            format!(
                "a shape that ends in {} inputs and has {} outputs in all, since it is transposed",
                q.spec.cols, q.spec.rows
            ),
            format!("{:?}", packed.shape),
        ));
    }
    Ok(Tensor {
        name: name.into(),
        shape: packed.shape.clone(),
        content: Content::Quantized(q),
    })
}

/// Whether a shape `[…, K, N]` has the matrices of a spec, transposed.
fn is_transpose(shape: &[usize], spec: &MatrixSpec) -> bool {
    match shape {
        [batch @ .., cols, rows] => {
            let outputs = batch.iter().try_fold(*rows, |n, &d| n.checked_mul(d));
            *cols == spec.cols && outputs == Some(spec.rows)
        }
        _ => false,
    }
}

/// Checks sizes and types of the stored tensors against the spec.
fn check(storage: &Storage, name: &str, q: &StoredMatrix) -> Result<()> {
    let path = storage.file_of(q.packed);
    q.spec.validate().map_err(Error::matrix(path, name))?;
    q.layout.check(&q.spec).map_err(Error::matrix(path, name))?;
    let expected = match storage.kind {
        Kind::Gguf => ggml_type_of_origin(q.layout.origin()).map(StoredType::Ggml),
        Kind::File | Kind::Folder => Some(StoredType::U8),
    };
    let got = storage.stored(q.packed).dtype;
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
    let got = storage.stored(q.packed).len;
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
    check_scales(storage, name, q)?;
    match (q.spec.zero_points, q.zero_points) {
        (ZeroPoints::None, None) => Ok(()),
        (ZeroPoints::I8, Some(id)) => sized(storage, q, id, StoredType::Plain(Dtype::I8)),
        (ZeroPoints::F32, Some(id)) => sized(storage, q, id, StoredType::F32),
        (expected, got) => Err(Error::tensor(
            path,
            name,
            format!("{expected:?} zero points"),
            got.map_or("none", |_| "a tensor of them"),
        )),
    }
}

/// The part of [`check`] about scales.
fn check_scales(storage: &Storage, name: &str, q: &StoredMatrix) -> Result<()> {
    let bad = |expected: &str, got: &str| {
        let path = storage.file_of(q.packed);
        Err(Error::tensor(path, name, expected, got))
    };
    let (layout, dtype) = (q.layout, q.spec.scale_dtype);
    match q.scales {
        ScaleSource::Inside if layout.stores_scales() => Ok(()),
        ScaleSource::Inside => bad("a stored tensor of scales", "none"),
        ScaleSource::Stored { .. } if layout.stores_scales() => bad(
            &format!("no stored scales: layout {} carries them", layout.name()),
            "a tensor of scales",
        ),
        ScaleSource::Stored {
            reciprocal: true, ..
        } if dtype != ScaleDtype::F32 => bad(
            "scales of f32: the stored numbers are their inverses",
            dtype.name(),
        ),
        // The stored number has its own type: the scale itself is 1/x in f32.
        ScaleSource::Stored {
            id,
            reciprocal: true,
        } => sized(storage, q, id, storage.stored(id).dtype),
        ScaleSource::Stored {
            id,
            reciprocal: false,
        } => sized(storage, q, id, dtype.into()),
    }
}

/// Checks type and number of stored scales or zero points.
fn sized(storage: &Storage, q: &StoredMatrix, id: StoredId, dtype: StoredType) -> Result<()> {
    let stored = storage.stored(id);
    if stored.dtype == dtype && stored.elements() == q.spec.scales_len() {
        return Ok(());
    }
    Err(Error::tensor(
        storage.file_of(q.packed),
        &stored.name,
        format!("{} elements of {dtype}", q.spec.scales_len()),
        format!("{} of {}", stored.elements(), stored.dtype),
    ))
}

/// A `weight` of packed bytes with its `weight_scale`, as HF `bitnet` folders have them.
fn from_hf(storage: &Storage, id: StoredId, bitnet: BitnetConfig) -> Result<Option<Tensor>> {
    let stored = storage.stored(id);
    if stored.dtype != StoredType::U8 || !stored.name.ends_with(".weight") {
        return Ok(None);
    }
    let path = storage.file_of(id);
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
    let Some(scale) = storage.find_stored(&scale_name) else {
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
    let scale_dtype = match storage.stored(scale).dtype {
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
    let q = StoredMatrix {
        spec,
        transposed: false,
        layout,
        packed: id,
        scales: ScaleSource::Stored {
            id: scale,
            reciprocal,
        },
        zero_points: None,
    };
    check(storage, name, &q)?;
    Ok(Some(Tensor {
        name: name.clone(),
        shape: vec![rows, cols],
        content: Content::Quantized(q),
    }))
}

/// Whether `found` is true of some blocks of a stored tensor. Reads it up to the first of them.
pub(crate) fn any_blocks(
    storage: &Storage,
    id: StoredId,
    block_bytes: usize,
    found: fn(&[u8]) -> bool,
) -> Result<bool> {
    let len = storage.stored(id).len;
    let piece = (SCANNED / block_bytes * block_bytes) as u64;
    let (mut start, mut bytes) = (0, vec![]);
    while start < len {
        bytes.resize((len - start).min(piece) as usize, 0);
        storage.read(id, start, &mut bytes)?;
        if found(&bytes) {
            return Ok(true);
        }
        start += piece;
    }
    Ok(false)
}

/// A ternary, binary or two-bit GGUF tensor of another writer: one scale for each block. Where codes
/// of the type may be outside the ternary alphabet, they are read to know the precision.
fn foreign_block(
    storage: &Storage,
    id: StoredId,
    options: &OpenOptions,
) -> Result<Option<StoredMatrix>> {
    let stored = storage.stored(id);
    let StoredType::Ggml(ggml) = stored.dtype else {
        return Ok(None);
    };
    if storage.kind != Kind::Gguf || stored.shape.is_empty() {
        return Ok(None);
    }
    let path = storage.file_of(id);
    let cols = stored.shape[stored.shape.len() - 1];
    let rows = stored.elements() / cols.max(1);
    let layout = if ggml == GgmlType::I2S {
        pack::by_name(&options.i2s_layout).map_err(Error::matrix(path, &stored.name))?
    } else {
        match layout_of(ggml) {
            Some(layout) => layout,
            None => return Ok(None),
        }
    };
    let Some(mut spec) = layout.foreign_spec(rows, cols) else {
        return Ok(None);
    };
    if let Some((precision, wider)) = layout.wider()
        && any_blocks(storage, id, ggml.block_bytes(), wider)?
    {
        spec.precision = precision;
    }
    let q = StoredMatrix {
        spec,
        transposed: false,
        layout,
        packed: id,
        scales: ScaleSource::Inside,
        zero_points: None,
    };
    check(storage, &stored.name, &q)?;
    Ok(Some(q))
}
