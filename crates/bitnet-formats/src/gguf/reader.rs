//! Reading the header: metadata and where each tensor lies.

use super::cursor::{Cursor, HeaderPart};
use super::error::{Error, Result};
use super::q2_groups;
use super::value::{Array, Value, type_id};
use super::{
    ALIGNMENT_KEY, ByteOrder, DEFAULT_ALIGNMENT, GgmlType, MAGIC, MAX_ARRAY_DEPTH, MAX_DIMS,
};
use std::collections::HashSet;
use std::io::Read;

/// Everything before the tensor data, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufHeader {
    /// Version of the format, 1 to 3.
    pub version: u32,
    /// Byte order of the numbers in the file, tensor data included.
    pub byte_order: ByteOrder,
    /// Alignment of tensor data, a power of two.
    pub alignment: u32,
    /// Metadata in file order; no key occurs twice.
    pub metadata: Vec<(String, Value)>,
    /// Tensors in file order; no name occurs twice and no two share bytes.
    pub tensors: Vec<GgufTensor>,
    /// Offset of the data section from the start of the file.
    pub data_start: u64,
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name, unique in the file.
    pub name: String,
    /// Dimensions, row-major, outermost first: `[out, in]` for a weight. The file holds them the
    /// other way round.
    pub shape: Vec<usize>,
    /// Type of the elements.
    pub ggml_type: GgmlType,
    /// Offset of the data from the start of the file.
    pub offset: u64,
    /// Bytes of data; they all lie in the file.
    pub len: u64,
}

/// Type id and the smallest value: a pair without its key.
const MIN_VALUE_BYTES: u64 = 4 + 1;
/// Number of dimensions, type id and offset: a tensor info without its name.
const MIN_INFO_BYTES: u64 = 4 + 4 + 8;

impl GgufHeader {
    /// Reads the header of a file of `file_len` bytes.
    ///
    /// `reader` stands at the start of the file. Reads are buffered here, so afterwards its
    /// position means nothing.
    ///
    /// # Errors
    /// What is wrong, with the key or tensor and the offending number. Never panics, whatever the
    /// bytes.
    pub fn read(reader: impl Read, file_len: u64) -> Result<Self> {
        let mut cursor = Cursor::new(reader, file_len);
        let (version, byte_order) = read_start(&mut cursor)?;
        cursor.set_format(byte_order, version);
        let tensor_count = cursor.count(HeaderPart::Start)?;
        let pair_count = cursor.count(HeaderPart::Start)?;

        let min_pair = cursor.count_bytes() + MIN_VALUE_BYTES;
        cursor.need(HeaderPart::Pairs(pair_count), pair_count, min_pair)?;
        let mut metadata = Vec::new();
        for index in 0..pair_count {
            let mut key = cursor.string(HeaderPart::Key(index))?;
            let mut value = read_value(&mut cursor, &key)?;
            if version < 3 && take_nul(&mut key) {
                strip_nuls(&mut value);
            }
            metadata.push((key, value));
        }
        check_keys(&metadata)?;
        let alignment = alignment(&metadata)?;

        let min_tensor = cursor.count_bytes() + MIN_INFO_BYTES;
        cursor.need(HeaderPart::Tensors(tensor_count), tensor_count, min_tensor)?;
        let mut tensors = Vec::new();
        for index in 0..tensor_count {
            let mut tensor = read_tensor(&mut cursor, index)?;
            if version < 3 {
                take_nul(&mut tensor.name);
            }
            tensors.push(tensor);
        }
        if byte_order == ByteOrder::Big {
            check_byte_order(&tensors)?;
        }
        check_names(tensors.iter().map(|t| t.name.as_str()))?;

        // The header is limited in length and the alignment is a u32: no overflow.
        let data_start = cursor.pos().next_multiple_of(alignment.into());
        let data_len = file_len.saturating_sub(data_start);
        q2_groups::settle(&mut tensors, &metadata, alignment, data_len)?;
        for tensor in &mut tensors {
            place_tensor(tensor, alignment, data_start, file_len)?;
        }
        check_overlap(&tensors)?;
        Ok(Self {
            version,
            byte_order,
            alignment,
            metadata,
            tensors,
            data_start,
        })
    }

    /// The value of a metadata key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

/// Version and byte order.
fn read_start(cursor: &mut Cursor<impl Read>) -> Result<(u32, ByteOrder)> {
    let magic = cursor.bytes(HeaderPart::Start)?;
    if magic != *MAGIC {
        return Err(Error::Magic { got: magic });
    }
    let got = cursor.u32(HeaderPart::Start)?;
    // A small number whose bytes are in the other order.
    let (version, byte_order) = match got {
        swapped if swapped != 0 && swapped & 0xffff == 0 => (swapped.swap_bytes(), ByteOrder::Big),
        version => (version, ByteOrder::Little),
    };
    match version {
        1..=3 => Ok((version, byte_order)),
        got => Err(Error::Version { got }),
    }
}

/// Takes the zero byte off the end of a string and says whether there was one.
///
/// llama.cpp's programs of August 2023 (version 1, and the first files of version 2) counted the
/// zero that ends a string of C; its Python scripts did not. A key never ends in one otherwise.
fn take_nul(text: &mut String) -> bool {
    let found = text.ends_with('\0');
    if found {
        text.pop();
    }
    found
}

/// [`take_nul`] for every string of a value.
fn strip_nuls(value: &mut Value) {
    fn strip_array(array: &mut Array) {
        match array {
            Array::String(items) => {
                for item in items {
                    take_nul(item);
                }
            }
            Array::Array(items) => items.iter_mut().for_each(strip_array),
            _ => {}
        }
    }
    match value {
        Value::String(text) => {
            take_nul(text);
        }
        Value::Array(array) => strip_array(array),
        _ => {}
    }
}

/// Refuses a big-endian file with a tensor whose numbers cannot be found in its blocks.
fn check_byte_order(tensors: &[GgufTensor]) -> Result<()> {
    match tensors.iter().find(|t| !t.ggml_type.swaps()) {
        Some(tensor) => Err(Error::BigEndian {
            tensor: tensor.name.clone(),
            ggml_type: tensor.ggml_type,
        }),
        None => Ok(()),
    }
}

fn read_value(cursor: &mut Cursor<impl Read>, key: &str) -> Result<Value> {
    let place = HeaderPart::Value(key);
    let offset = cursor.pos();
    Ok(match cursor.u32(place)? {
        type_id::U8 => Value::U8(u8::from_le_bytes(cursor.number(place)?)),
        type_id::I8 => Value::I8(i8::from_le_bytes(cursor.number(place)?)),
        type_id::U16 => Value::U16(u16::from_le_bytes(cursor.number(place)?)),
        type_id::I16 => Value::I16(i16::from_le_bytes(cursor.number(place)?)),
        type_id::U32 => Value::U32(u32::from_le_bytes(cursor.number(place)?)),
        type_id::I32 => Value::I32(i32::from_le_bytes(cursor.number(place)?)),
        type_id::F32 => Value::F32(f32::from_le_bytes(cursor.number(place)?)),
        type_id::BOOL => Value::Bool(read_bool(cursor, key)?),
        type_id::STRING => Value::String(cursor.string(place)?),
        type_id::ARRAY => Value::Array(read_array(cursor, key, MAX_ARRAY_DEPTH)?),
        type_id::U64 => Value::U64(u64::from_le_bytes(cursor.number(place)?)),
        type_id::I64 => Value::I64(i64::from_le_bytes(cursor.number(place)?)),
        type_id::F64 => Value::F64(f64::from_le_bytes(cursor.number(place)?)),
        got => {
            return Err(Error::ValueType {
                key: key.into(),
                got,
                offset,
            });
        }
    })
}

fn read_array<R: Read>(cursor: &mut Cursor<R>, key: &str, depth: usize) -> Result<Array> {
    if depth == 0 {
        return Err(Error::ArrayDepth {
            key: key.into(),
            max: MAX_ARRAY_DEPTH,
        });
    }
    let place = HeaderPart::Value(key);
    let offset = cursor.pos();
    Ok(match cursor.u32(place)? {
        type_id::U8 => {
            Array::U8(cursor.list(place, 1, |c| c.number(place).map(u8::from_le_bytes))?)
        }
        type_id::I8 => {
            Array::I8(cursor.list(place, 1, |c| c.number(place).map(i8::from_le_bytes))?)
        }
        type_id::U16 => {
            Array::U16(cursor.list(place, 2, |c| c.number(place).map(u16::from_le_bytes))?)
        }
        type_id::I16 => {
            Array::I16(cursor.list(place, 2, |c| c.number(place).map(i16::from_le_bytes))?)
        }
        type_id::U32 => {
            Array::U32(cursor.list(place, 4, |c| c.number(place).map(u32::from_le_bytes))?)
        }
        type_id::I32 => {
            Array::I32(cursor.list(place, 4, |c| c.number(place).map(i32::from_le_bytes))?)
        }
        type_id::F32 => {
            Array::F32(cursor.list(place, 4, |c| c.number(place).map(f32::from_le_bytes))?)
        }
        type_id::BOOL => Array::Bool(cursor.list(place, 1, |c| read_bool(c, key))?),
        type_id::STRING => {
            Array::String(cursor.list(place, cursor.count_bytes(), |c| c.string(place))?)
        }
        type_id::ARRAY => {
            let header = 4 + cursor.count_bytes();
            Array::Array(cursor.list(place, header, |c| read_array(c, key, depth - 1))?)
        }
        type_id::U64 => {
            Array::U64(cursor.list(place, 8, |c| c.number(place).map(u64::from_le_bytes))?)
        }
        type_id::I64 => {
            Array::I64(cursor.list(place, 8, |c| c.number(place).map(i64::from_le_bytes))?)
        }
        type_id::F64 => {
            Array::F64(cursor.list(place, 8, |c| c.number(place).map(f64::from_le_bytes))?)
        }
        got => {
            return Err(Error::ValueType {
                key: key.into(),
                got,
                offset,
            });
        }
    })
}

fn read_bool(cursor: &mut Cursor<impl Read>, key: &str) -> Result<bool> {
    let offset = cursor.pos();
    match cursor.bytes(HeaderPart::Value(key))? {
        [0] => Ok(false),
        [1] => Ok(true),
        [got] => Err(Error::Bool {
            key: key.into(),
            got,
            offset,
        }),
    }
}

/// The tensor as the file describes it: its offset still counts from the start of the data section.
fn read_tensor(cursor: &mut Cursor<impl Read>, index: u64) -> Result<GgufTensor> {
    let name = cursor.string(HeaderPart::TensorName(index))?;
    let place = HeaderPart::Tensor(&name);
    let n_dims = cursor.u32(place)?;
    if n_dims as usize > MAX_DIMS {
        return Err(Error::Dims {
            tensor: name,
            got: n_dims.into(),
            max: MAX_DIMS,
        });
    }
    let mut shape = Vec::with_capacity(n_dims as usize);
    for _ in 0..n_dims {
        let dim = cursor.count(place)?;
        // A dimension that does not fit saturates, and the product below reports it.
        shape.push(usize::try_from(dim).unwrap_or(usize::MAX));
    }
    shape.reverse();
    let id = cursor.u32(place)?;
    let offset = cursor.u64(place)?;
    let Some(ggml_type) = GgmlType::from_id(id) else {
        return Err(Error::UnknownType { tensor: name, id });
    };
    let len = ggml_type
        .tensor_bytes(&shape)
        .map_err(|error| error.in_tensor(&name))?;
    Ok(GgufTensor {
        name,
        shape,
        ggml_type,
        offset,
        len,
    })
}

/// Checks the tensor's place in the data section and makes its offset absolute.
fn place_tensor(
    tensor: &mut GgufTensor,
    alignment: u32,
    data_start: u64,
    file_len: u64,
) -> Result<()> {
    let GgufTensor {
        ref name,
        offset,
        len,
        ..
    } = *tensor;
    if !offset.is_multiple_of(alignment.into()) {
        return Err(Error::Misaligned {
            tensor: name.clone(),
            offset,
            alignment,
        });
    }
    let available = file_len.saturating_sub(data_start);
    if data_start > file_len || offset.checked_add(len).is_none_or(|end| end > available) {
        return Err(Error::OutsideFile {
            tensor: name.clone(),
            offset,
            len,
            available,
        });
    }
    tensor.offset = data_start + offset;
    Ok(())
}

fn check_overlap(tensors: &[GgufTensor]) -> Result<()> {
    let mut sorted: Vec<&GgufTensor> = tensors.iter().filter(|t| t.len > 0).collect();
    sorted.sort_by_key(|t| t.offset);
    for pair in sorted.windows(2) {
        if let [first, second] = pair
            && first.offset + first.len > second.offset
        {
            return Err(Error::Overlap {
                first: first.name.clone(),
                first_end: first.offset + first.len,
                second: second.name.clone(),
                offset: second.offset,
            });
        }
    }
    Ok(())
}

pub(super) fn check_keys(metadata: &[(String, Value)]) -> Result<()> {
    let mut seen = HashSet::with_capacity(metadata.len());
    match metadata.iter().find(|(key, _)| !seen.insert(key.as_str())) {
        Some((key, _)) => Err(Error::DuplicateKey { key: key.clone() }),
        None => Ok(()),
    }
}

pub(super) fn check_names<'a>(mut names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = HashSet::new();
    match names.find(|&name| !seen.insert(name)) {
        Some(name) => Err(Error::DuplicateTensor {
            tensor: name.into(),
        }),
        None => Ok(()),
    }
}

/// The alignment that the metadata announces.
pub(super) fn alignment(metadata: &[(String, Value)]) -> Result<u32> {
    match metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some((_, Value::U32(got))) if got.is_power_of_two() => Ok(*got),
        Some((_, Value::U32(got))) => Err(Error::Alignment { got: *got }),
        Some((key, other)) => Err(Error::KeyType {
            key: key.clone(),
            expected: "u32",
            got: other.type_name(),
        }),
    }
}
