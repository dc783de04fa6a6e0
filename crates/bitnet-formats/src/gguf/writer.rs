//! Writing the header. The caller appends the data.

use super::error::{Error, Result};
use super::value::{Array, Value};
use super::{GgmlType, MAGIC, MAX_ARRAY_DEPTH, MAX_DIMS, MAX_HEADER_BYTES, VERSION, reader};

/// A tensor to be written: everything but its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufEntry {
    /// Name, unique in the file. ggml's own loader accepts at most 63 bytes.
    pub name: String,
    /// Dimensions, row-major, outermost first, at most four.
    pub shape: Vec<usize>,
    /// Type of the elements.
    pub ggml_type: GgmlType,
    /// Bytes of data; [`GgmlType::tensor_bytes`] of the shape.
    pub len: u64,
}

/// The bytes of a file before the data section, and where the data goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedHeader {
    /// GgufHeader with the padding behind it: the data section starts at `bytes.len()`.
    pub bytes: Vec<u8>,
    /// Where each tensor's data starts, counted from `bytes.len()`. In the order of the tensors,
    /// ascending.
    pub offsets: Vec<u64>,
    /// Bytes of the data section. The last tensor is padded too: ggml's own loader reads that
    /// padding.
    pub data_len: u64,
}

impl EncodedHeader {
    /// Bytes of the whole file.
    pub fn file_len(&self) -> u64 {
        self.bytes.len() as u64 + self.data_len
    }

    /// Zero bytes to write after the data of tensor `index`, which has `len` bytes.
    pub fn padding_after(&self, index: usize, len: u64) -> u64 {
        let start = self.offsets.get(index).copied().unwrap_or(self.data_len);
        let next = index
            .checked_add(1)
            .and_then(|next| self.offsets.get(next))
            .copied()
            .unwrap_or(self.data_len);
        next.saturating_sub(start.saturating_add(len))
    }
}

/// Encodes the header of a version 3 file whose tensors follow one another in the order given.
///
/// # Errors
/// Duplicate keys or names, more than four dimensions, a length that does not follow from shape and
/// type, arrays nested too deeply, an alignment that is not a power of two or, if it is not 32, not
/// announced under `general.alignment`.
pub fn encode_header(
    metadata: &[(String, Value)],
    tensors: &[GgufEntry],
    alignment: u32,
) -> Result<EncodedHeader> {
    if !alignment.is_power_of_two() {
        return Err(Error::Alignment { got: alignment });
    }
    let announced = reader::alignment(metadata)?;
    if announced != alignment {
        return Err(Error::AlignmentKey {
            expected: alignment,
            got: announced,
        });
    }
    reader::check_keys(metadata)?;
    reader::check_names(tensors.iter().map(|t| t.name.as_str()))?;

    check_q2_groups(tensors)?;

    let mut bytes = Vec::new();
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_string(&mut bytes, key);
        bytes.extend(value.type_id().to_le_bytes());
        put_value(&mut bytes, key, value)?;
    }
    let mut offsets = Vec::with_capacity(tensors.len());
    let mut data_len = 0u64;
    for tensor in tensors {
        offsets.push(data_len);
        put_tensor(&mut bytes, tensor, data_len)?;
        data_len = data_len
            .checked_add(tensor.len)
            .and_then(|end| end.checked_next_multiple_of(alignment.into()))
            .ok_or_else(|| {
                Error::TooLarge {
                    shape: tensor.shape.clone(),
                }
                .in_tensor(&tensor.name)
            })?;
    }
    let len = bytes.len() as u64;
    if len > MAX_HEADER_BYTES {
        return Err(Error::HeaderTooLarge {
            what: "GGUF header".into(),
            offset: 0,
            needed: len,
            limit: MAX_HEADER_BYTES,
        });
    }
    bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
    Ok(EncodedHeader {
        bytes,
        offsets,
        data_len,
    })
}

/// Refuses Q2_0 in groups of both sizes: offsets tell the size for a whole file.
fn check_q2_groups(tensors: &[GgufEntry]) -> Result<()> {
    let of = |ggml_type| tensors.iter().find(|t| t.ggml_type == ggml_type);
    match (of(GgmlType::Q2_0), of(GgmlType::Q2_0G128)) {
        (Some(first), Some(second)) => Err(Error::MixedQ2Groups {
            first: first.name.clone(),
            second: second.name.clone(),
        }),
        _ => Ok(()),
    }
}

fn put_tensor(out: &mut Vec<u8>, tensor: &GgufEntry, offset: u64) -> Result<()> {
    let GgufEntry {
        name,
        shape,
        ggml_type,
        len,
    } = tensor;
    if shape.len() > MAX_DIMS {
        return Err(Error::Dims {
            tensor: name.clone(),
            got: shape.len() as u64,
            max: MAX_DIMS,
        });
    }
    let expected = ggml_type
        .tensor_bytes(shape)
        .map_err(|error| error.in_tensor(name))?;
    if expected != *len {
        return Err(Error::Length {
            ggml_type: *ggml_type,
            expected,
            got: *len,
        }
        .in_tensor(name));
    }
    put_string(out, name);
    out.extend((shape.len() as u32).to_le_bytes());
    for &dim in shape.iter().rev() {
        out.extend((dim as u64).to_le_bytes());
    }
    out.extend(ggml_type.id().to_le_bytes());
    out.extend(offset.to_le_bytes());
    Ok(())
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

/// The value without its type id.
fn put_value(out: &mut Vec<u8>, key: &str, value: &Value) -> Result<()> {
    match value {
        Value::U8(n) => out.extend(n.to_le_bytes()),
        Value::I8(n) => out.extend(n.to_le_bytes()),
        Value::U16(n) => out.extend(n.to_le_bytes()),
        Value::I16(n) => out.extend(n.to_le_bytes()),
        Value::U32(n) => out.extend(n.to_le_bytes()),
        Value::I32(n) => out.extend(n.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::Bool(b) => out.push((*b).into()),
        Value::String(s) => put_string(out, s),
        Value::U64(n) => out.extend(n.to_le_bytes()),
        Value::I64(n) => out.extend(n.to_le_bytes()),
        Value::F64(x) => out.extend(x.to_le_bytes()),
        Value::Array(array) => {
            array.check_depth(key, MAX_ARRAY_DEPTH)?;
            put_array(out, array);
        }
    }
    Ok(())
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.type_id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(items) => out.extend(items),
        Array::I8(items) => items.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::U16(items) => items.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::I16(items) => items.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::U32(items) => items.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::I32(items) => items.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::F32(items) => items.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::Bool(items) => out.extend(items.iter().map(|&b| u8::from(b))),
        Array::String(items) => items.iter().for_each(|s| put_string(out, s)),
        Array::Array(items) => items.iter().for_each(|a| put_array(out, a)),
        Array::U64(items) => items.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::I64(items) => items.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::F64(items) => items.iter().for_each(|x| out.extend(x.to_le_bytes())),
    }
}
