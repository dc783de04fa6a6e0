//! The header of a file to be written, and where its tensors go.

use super::plan::{FilePlan, OutputTensor};
use crate::container::{Container, gguf_alignment};
use crate::document::{self, Document};
use crate::dtype::StoredType;
use crate::{Error, Result, gguf, safetensors};
use bitnet_core::pack::{self, PackedLen};
use std::path::Path;

/// The document as the file holds it. Every checksum has 32 digits, so its length does not depend
/// on them.
fn document_json(document: &Document) -> String {
    // A document is plain data: serialising it cannot fail.
    serde_json::to_string(document).unwrap_or_default()
}

/// Length of the header, offsets of the tensors of known size, and the end of those.
pub(super) fn place(target: &Path, plan: &FilePlan) -> Result<(u64, Vec<Option<u64>>, u64)> {
    let tensors = &plan.tensors;
    match &plan.container {
        Container::Gguf(metadata) => {
            let header = gguf_header(target, metadata, &plan.document, tensors)?;
            Ok((
                header.bytes.len() as u64,
                header.offsets.iter().copied().map(Some).collect(),
                header.data_len,
            ))
        }
        Container::Safetensors(metadata) => place_safetensors(target, metadata, plan),
    }
}

/// [`place`] for safetensors: the header is as long as it can become.
fn place_safetensors(
    target: &Path,
    metadata: &[(String, String)],
    plan: &FilePlan,
) -> Result<(u64, Vec<Option<u64>>, u64)> {
    let tensors = &plan.tensors;
    // Widest elements first, so that every tensor is aligned to its elements without a
    // hole.
    let mut order: Vec<(usize, &OutputTensor)> = tensors
        .iter()
        .enumerate()
        .filter(|(_, t)| matches!(t.len, PackedLen::Exact(_)))
        .collect();
    let width = |dtype: StoredType| dtype.bytes(1).unwrap_or(1);
    order.sort_by_key(|(i, t)| (std::cmp::Reverse(width(t.dtype)), *i));
    let mut offsets = vec![None; tensors.len()];
    let mut tail = 0;
    for (i, tensor) in order {
        offsets[i] = Some(tail);
        tail += tensor.len.bound() as u64;
    }
    // The header can only become shorter: names and digests have fixed lengths, offsets and
    // sizes have upper bounds.
    let mut document = plan.document.clone();
    for packed in document.tensors.values_mut() {
        if packed.layout == AUTO {
            packed.layout = pack::longest_own_name().into();
        }
    }
    let mut worst = tensors.to_vec();
    let mut end = tail;
    let bound = tail + tensors.iter().map(|t| t.len.bound() as u64).sum::<u64>();
    let mut worst_offsets = vec![];
    for (tensor, offset) in worst.iter_mut().zip(&offsets) {
        worst_offsets.push(offset.unwrap_or(bound));
        if offset.is_none() {
            end += tensor.len.bound() as u64;
            tensor.shape = vec![tensor.len.bound()];
        }
        tensor.len = PackedLen::Exact(tensor.len.bound());
    }
    let header =
        safetensors_header(metadata, &document, &worst, &worst_offsets, None).map_err(|got| {
            Error::file(
                target,
                format!("a header for {end} bytes of data that fits"),
                got,
            )
        })?;
    Ok((header.len() as u64, offsets, tail))
}

/// Name in the document until a layout is picked.
pub const AUTO: &str = "auto";

pub(super) fn safetensors_header(
    metadata: &[(String, String)],
    document: &Document,
    tensors: &[OutputTensor],
    offsets: &[u64],
    padded: Option<usize>,
) -> Result<Vec<u8>, String> {
    let mut metadata = metadata.to_vec();
    metadata.push((document::KEY.into(), document_json(document)));
    let mut entries = vec![];
    for (tensor, &offset) in tensors.iter().zip(offsets) {
        let StoredType::Plain(dtype) = tensor.dtype else {
            return Err(format!(
                "tensor '{}' of type {}, which safetensors does not have",
                tensor.name, tensor.dtype
            ));
        };
        entries.push(safetensors::OutEntry {
            name: tensor.name.clone(),
            dtype,
            shape: tensor.shape.clone(),
            range: (offset, offset + tensor.len.bound() as u64),
        });
    }
    safetensors::encode_header(&metadata, &entries, padded)
}

pub(super) fn gguf_header(
    target: &Path,
    metadata: &[(String, gguf::Value)],
    document: &Document,
    tensors: &[OutputTensor],
) -> Result<gguf::EncodedHeader> {
    let mut metadata = metadata.to_vec();
    metadata.push((
        document::KEY.into(),
        gguf::Value::from(document_json(document)),
    ));
    let tensors: Vec<gguf::GgufEntry> = tensors
        .iter()
        .map(|t| match (t.dtype.to_ggml(), t.len) {
            (Some(ggml_type), PackedLen::Exact(len)) => Ok(gguf::GgufEntry {
                name: t.name.clone(),
                shape: t.shape.clone(),
                ggml_type,
                len: len as u64,
            }),
            _ => Err(Error::tensor(
                target,
                &t.name,
                "a type of known size that GGUF has",
                t.dtype.to_string(),
            )),
        })
        .collect::<Result<_>>()?;
    let alignment = gguf_alignment(&metadata);
    gguf::encode_header(&metadata, &tensors, alignment).map_err(|source| Error::Gguf {
        path: target.to_path_buf(),
        source,
    })
}
