//! The header of a file to be written, and where its tensors go.

use super::plan::OutputTensor;
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

/// What the header of one file says.
#[derive(Clone, Copy)]
pub(super) struct FileHeader<'a> {
    pub(super) path: &'a Path,
    pub(super) container: &'a Container,
    /// In the first file of a set only.
    pub(super) document: Option<&'a Document>,
    pub(super) tensors: &'a [OutputTensor],
}

/// Where the tensors of a file go.
pub(super) struct Placed {
    pub(super) header_len: u64,
    /// Of the tensors of known size, counted from the end of the header.
    pub(super) offsets: Vec<Option<u64>>,
    /// The end of those.
    pub(super) tail: u64,
}

impl FileHeader<'_> {
    pub(super) fn place(&self) -> Result<Placed> {
        match self.container {
            Container::Gguf(metadata) => {
                let header = self.gguf(metadata)?;
                Ok(Placed {
                    header_len: header.bytes.len() as u64,
                    offsets: header.offsets.iter().copied().map(Some).collect(),
                    tail: header.data_len,
                })
            }
            Container::Safetensors(metadata) => self.place_safetensors(metadata),
        }
    }

    /// [`FileHeader::place`] for safetensors: the header is as long as it can become.
    fn place_safetensors(&self, metadata: &[(String, String)]) -> Result<Placed> {
        // Widest elements first, so that every tensor is aligned to its elements without a
        // hole.
        let mut order: Vec<(usize, &OutputTensor)> = self
            .tensors
            .iter()
            .enumerate()
            .filter(|(_, t)| matches!(t.len, PackedLen::Exact(_)))
            .collect();
        let width = |dtype: StoredType| dtype.bytes(1).unwrap_or(1);
        order.sort_by_key(|(i, t)| (std::cmp::Reverse(width(t.dtype)), *i));
        let mut offsets = vec![None; self.tensors.len()];
        let mut tail = 0;
        for (i, tensor) in order {
            offsets[i] = Some(tail);
            tail += tensor.len.bound() as u64;
        }
        // The header can only become shorter: names and digests have fixed lengths, offsets and
        // sizes have upper bounds.
        let document = self.document.map(|document| {
            let mut document = document.clone();
            for packed in document.tensors.values_mut() {
                if packed.layout == AUTO {
                    packed.layout = pack::longest_own_name().into();
                }
            }
            document
        });
        let mut worst = self.tensors.to_vec();
        let mut end = tail;
        let bound = tail + worst.iter().map(|t| t.len.bound() as u64).sum::<u64>();
        let mut worst_offsets = vec![];
        for (tensor, offset) in worst.iter_mut().zip(&offsets) {
            worst_offsets.push(offset.unwrap_or(bound));
            if offset.is_none() {
                end += tensor.len.bound() as u64;
                tensor.shape = vec![tensor.len.bound()];
            }
            tensor.len = PackedLen::Exact(tensor.len.bound());
        }
        let worst = FileHeader {
            document: document.as_ref(),
            tensors: &worst,
            ..*self
        };
        let header = worst
            .safetensors(metadata, &worst_offsets, None)
            .map_err(|got| {
                let expected = format!("a header for {end} bytes of data that fits");
                Error::file(self.path, expected, got)
            })?;
        Ok(Placed {
            header_len: header.len() as u64,
            offsets,
            tail,
        })
    }

    /// The header, of `len` bytes.
    pub(super) fn encode(&self, offsets: &[u64], len: u64) -> Result<Vec<u8>> {
        let header = match self.container {
            Container::Safetensors(metadata) => self
                .safetensors(metadata, offsets, Some(len as usize))
                .map_err(|got| Error::file(self.path, "a header that fits", got))?,
            Container::Gguf(metadata) => self.gguf(metadata)?.bytes,
        };
        if header.len() as u64 == len {
            Ok(header)
        } else {
            let expected = format!("a header of {len} bytes");
            Err(Error::file(self.path, expected, header.len().to_string()))
        }
    }

    fn safetensors(
        &self,
        metadata: &[(String, String)],
        offsets: &[u64],
        padded: Option<usize>,
    ) -> Result<Vec<u8>, String> {
        let mut metadata = metadata.to_vec();
        metadata.extend(
            self.document
                .map(|d| (document::KEY.into(), document_json(d))),
        );
        let mut entries = vec![];
        for (tensor, &offset) in self.tensors.iter().zip(offsets) {
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

    fn gguf(&self, metadata: &[(String, gguf::Value)]) -> Result<gguf::EncodedHeader> {
        let mut metadata = metadata.to_vec();
        metadata.extend(
            self.document
                .map(|d| (document::KEY.into(), gguf::Value::from(document_json(d)))),
        );
        let tensors: Vec<gguf::GgufEntry> = self
            .tensors
            .iter()
            .map(|t| match (t.dtype.to_ggml(), t.len) {
                (Some(ggml_type), PackedLen::Exact(len)) => Ok(gguf::GgufEntry {
                    name: t.name.clone(),
                    shape: t.shape.clone(),
                    ggml_type,
                    len: len as u64,
                }),
                _ => Err(Error::tensor(
                    self.path,
                    &t.name,
                    "a type of known size that GGUF has",
                    t.dtype.to_string(),
                )),
            })
            .collect::<Result<_>>()?;
        let alignment = gguf_alignment(&metadata);
        gguf::encode_header(&metadata, &tensors, alignment).map_err(|source| Error::Gguf {
            path: self.path.to_path_buf(),
            source,
        })
    }
}

/// Name in the document until a layout is picked.
pub const AUTO: &str = "auto";
