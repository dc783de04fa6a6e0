//! safetensors headers: read with every field checked, and written.
//!
//! A file is a u64 length, that many bytes of JSON (an object of tensors with dtype, shape and byte
//! range, and a map of strings called `__metadata__`), then the tensors' bytes without holes. The
//! reader checks all of it before anybody reads a tensor.

use crate::dtype::StoredType;
use crate::{Error, Result};
use safetensors::tensor::TensorInfo;
use serde::de::{self, MapAccess, Visitor};
use std::fmt;
use std::fs::File;
use std::path::Path;

/// Largest header that is read, the limit of the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its element type.
    pub dtype: safetensors::Dtype,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// Number of its bytes.
    pub len: u64,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq)]
pub struct SafetensorsHeader {
    /// `__metadata__`, in file order.
    pub metadata: Vec<(String, String)>,
    /// Tensors in the order of their bytes.
    pub tensors: Vec<Entry>,
}

/// One key of the header's object.
enum Item {
    Metadata(Vec<(String, String)>),
    Tensor(String, TensorInfo),
}

/// The header's object, duplicates and all.
struct Items(Vec<Item>);

struct Strings(Vec<(String, String)>);

impl<'de> de::Deserialize<'de> for Strings {
    fn deserialize<D: de::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Strings;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings to strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
                let mut all = vec![];
                while let Some(pair) = map.next_entry()? {
                    all.push(pair);
                }
                Ok(Strings(all))
            }
        }
        d.deserialize_map(V)
    }
}

impl<'de> de::Deserialize<'de> for Items {
    fn deserialize<D: de::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Items;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Items, A::Error> {
                let mut all = vec![];
                while let Some(key) = map.next_key::<String>()? {
                    all.push(if key == "__metadata__" {
                        Item::Metadata(map.next_value::<Strings>()?.0)
                    } else {
                        let info = map
                            .next_value()
                            .map_err(|e| de::Error::custom(format!("tensor '{key}': {e}")))?;
                        Item::Tensor(key, info)
                    });
                }
                Ok(Items(all))
            }
        }
        d.deserialize_map(V)
    }
}

impl SafetensorsHeader {
    /// Reads and checks the header of `file`; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`] and [`Error::Tensor`]: a file that is too short, a header
    /// that is longer than the file or than [`MAX_HEADER_BYTES`], JSON that is not a header, a name
    /// twice, a byte range that does not fit the shape, overlaps another, leaves a hole or leaves
    /// the file.
    pub fn read(path: &Path, file: &File, file_len: u64) -> Result<Self> {
        if file_len < 8 {
            return Err(Error::file(
                path,
                "a safetensors file of at least 8 bytes",
                format!("{file_len} bytes"),
            ));
        }
        let mut size = [0; 8];
        crate::io::read_at(file, &mut size, 0).map_err(Error::io(path, "read"))?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER_BYTES {
            return Err(Error::file(
                path,
                format!("a safetensors header of at most {MAX_HEADER_BYTES} bytes"),
                format!("{size}"),
            ));
        }
        if size > file_len - 8 {
            return Err(Error::file(
                path,
                format!("a safetensors header inside the {file_len} bytes of the file"),
                format!("{size} bytes"),
            ));
        }
        let mut json = vec![0; size as usize];
        crate::io::read_at(file, &mut json, 8).map_err(Error::io(path, "read"))?;
        let items: Items = serde_json::from_slice(&json)
            .map_err(|e| Error::file(path, "a safetensors header in JSON", e.to_string()))?;
        let data_len = file_len - 8 - size;
        let mut header = Self {
            metadata: vec![],
            tensors: vec![],
        };
        for item in items.0 {
            match item {
                Item::Metadata(metadata) if header.metadata.is_empty() => {
                    header.metadata = metadata
                }
                Item::Metadata(_) => return Err(Error::file(path, "one __metadata__", "several")),
                Item::Tensor(name, info) => {
                    let len = checked_len(path, &name, &info, data_len)?;
                    header.tensors.push(Entry {
                        name,
                        shape: info.shape,
                        dtype: info.dtype,
                        offset: 8 + size + info.data_offsets.0 as u64,
                        len,
                    });
                }
            }
        }
        header.check_names(path)?;
        header.tensors.sort_by_key(|t| (t.offset, t.len));
        header.check_order(path, 8 + size, file_len)?;
        Ok(header)
    }

    fn check_names(&self, path: &Path) -> Result<()> {
        let mut names: Vec<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::tensor(
                path,
                twice[0],
                "one tensor of that name",
                "two",
            ));
        }
        Ok(())
    }

    /// The tensors fill the file from `start` on, one after another.
    fn check_order(&self, path: &Path, start: u64, file_len: u64) -> Result<()> {
        let mut at = start;
        for tensor in &self.tensors {
            if tensor.offset != at {
                let what = if tensor.offset < at {
                    "an overlap with the one before"
                } else {
                    "a hole before it"
                };
                return Err(Error::tensor(
                    path,
                    &tensor.name,
                    format!("data from byte {at} on"),
                    format!("{what}, from byte {}", tensor.offset),
                ));
            }
            at += tensor.len;
        }
        if at != file_len {
            return Err(Error::file(
                path,
                format!("{at} bytes, as the header says"),
                format!("{file_len}"),
            ));
        }
        Ok(())
    }
}

/// Bytes of a tensor, if its byte range has as many and lies inside the data.
fn checked_len(path: &Path, name: &str, info: &TensorInfo, data_len: u64) -> Result<u64> {
    let (begin, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
    let count = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let bytes = count
        .and_then(|n| StoredType::Plain(info.dtype).bytes(n))
        .map(|n| n as u64);
    let Some(bytes) = bytes else {
        return Err(Error::tensor(
            path,
            name,
            "a shape of whole, countable bytes",
            format!("{:?} {:?}", info.dtype, info.shape),
        ));
    };
    if begin > end || end > data_len {
        return Err(Error::tensor(
            path,
            name,
            format!("a byte range inside 0..{data_len}"),
            format!("{begin}..{end}"),
        ));
    }
    if end - begin != bytes {
        return Err(Error::tensor(
            path,
            name,
            format!("{bytes} bytes for {:?} {:?}", info.dtype, info.shape),
            format!("{}", end - begin),
        ));
    }
    Ok(bytes)
}

/// A tensor of a header to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct OutEntry {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: safetensors::Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its byte range, counted from the end of the header.
    pub range: (u64, u64),
}

/// Encodes a header, padded with spaces to `padded_len` bytes including the 8 of the length, or to
/// the next multiple of 8 if `None`.
///
/// # Errors
/// A sentence if the header does not fit `padded_len` or [`MAX_HEADER_BYTES`].
pub fn encode_header(
    metadata: &[(String, String)],
    tensors: &[OutEntry],
    padded_len: Option<usize>,
) -> Result<Vec<u8>, String> {
    let mut object = serde_json::Map::new();
    if !metadata.is_empty() {
        let strings: serde_json::Map<_, _> = metadata
            .iter()
            .map(|(k, v)| (k.clone(), v.as_str().into()))
            .collect();
        object.insert("__metadata__".into(), strings.into());
    }
    for OutEntry {
        name,
        dtype,
        shape,
        range: (begin, end),
    } in tensors
    {
        object.insert(
            name.clone(),
            serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}),
        );
    }
    let json = serde_json::Value::Object(object).to_string();
    let len = padded_len.unwrap_or((8 + json.len()).next_multiple_of(8));
    if 8 + json.len() > len || len as u64 > MAX_HEADER_BYTES {
        return Err(format!(
            "a header of {} bytes, where {} fit",
            8 + json.len(),
            len.min(MAX_HEADER_BYTES as usize)
        ));
    }
    let mut bytes = Vec::with_capacity(len);
    bytes.extend((len as u64 - 8).to_le_bytes());
    bytes.extend(json.as_bytes());
    bytes.resize(len, b' ');
    Ok(bytes)
}
