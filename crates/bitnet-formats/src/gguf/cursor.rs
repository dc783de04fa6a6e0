//! A forward-only reader that never allocates more than the file can hold.

use super::error::{Error, Result};
use super::{ByteOrder, MAX_HEADER_BYTES};
use std::fmt;
use std::io::{BufReader, Read};

/// What is being read, for messages.
#[derive(Debug, Clone, Copy)]
pub(super) enum HeaderPart<'a> {
    /// The fixed fields at the start.
    Start,
    /// The key of the metadata pair with this index.
    Key(u64),
    /// The value of this key.
    Value(&'a str),
    /// The name of the tensor with this index.
    TensorName(u64),
    /// The info of this tensor.
    Tensor(&'a str),
    /// All metadata pairs, with their number.
    Pairs(u64),
    /// All tensor infos, with their number.
    Tensors(u64),
}

impl fmt::Display for HeaderPart<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("GGUF header"),
            Self::Key(index) => write!(f, "metadata key {index}"),
            Self::Value(key) => write!(f, "value of key '{key}'"),
            Self::TensorName(index) => write!(f, "name of tensor {index}"),
            Self::Tensor(name) => write!(f, "info of tensor '{name}'"),
            Self::Pairs(count) => write!(f, "list of {count} metadata pairs"),
            Self::Tensors(count) => write!(f, "list of {count} tensors"),
        }
    }
}

/// Elements reserved before the first of them is read.
const MAX_RESERVE: usize = 1 << 14;

pub(super) struct Cursor<R> {
    inner: BufReader<R>,
    pos: u64,
    file_len: u64,
    byte_order: ByteOrder,
    /// Bytes of a count, a length or a dimension.
    count_bytes: u64,
}

impl<R: Read> Cursor<R> {
    pub(super) fn new(reader: R, file_len: u64) -> Self {
        Self {
            inner: BufReader::with_capacity(1 << 16, reader),
            pos: 0,
            file_len,
            byte_order: ByteOrder::Little,
            count_bytes: 8,
        }
    }

    /// Sets how the rest is read: the byte order of numbers, and the width of counts, lengths and
    /// dimensions, which are u32 in version 1.
    pub(super) fn set_format(&mut self, byte_order: ByteOrder, version: u32) {
        self.byte_order = byte_order;
        self.count_bytes = if version == 1 { 4 } else { 8 };
    }

    /// Bytes of a count, a length or a dimension.
    pub(super) fn count_bytes(&self) -> u64 {
        self.count_bytes
    }

    /// Offset of the next byte.
    pub(super) fn pos(&self) -> u64 {
        self.pos
    }

    /// Checks that `count` items of at least `bytes` bytes can follow.
    pub(super) fn need(&self, place: HeaderPart<'_>, count: u64, bytes: u64) -> Result<()> {
        let needed = count.saturating_mul(bytes);
        let left = self.file_len.saturating_sub(self.pos);
        if needed > left {
            return Err(Error::Truncated {
                what: place.to_string(),
                offset: self.pos,
                needed,
                left,
            });
        }
        if needed > MAX_HEADER_BYTES.saturating_sub(self.pos) {
            return Err(Error::HeaderTooLarge {
                what: place.to_string(),
                offset: self.pos,
                needed,
                limit: MAX_HEADER_BYTES,
            });
        }
        Ok(())
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        self.inner.read_exact(out).map_err(|source| Error::Io {
            offset: self.pos,
            source,
        })?;
        self.pos += out.len() as u64;
        Ok(())
    }

    pub(super) fn bytes<const N: usize>(&mut self, place: HeaderPart<'_>) -> Result<[u8; N]> {
        self.need(place, 1, N as u64)?;
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    /// The bytes of a number, least significant first.
    pub(super) fn number<const N: usize>(&mut self, place: HeaderPart<'_>) -> Result<[u8; N]> {
        let mut bytes = self.bytes(place)?;
        if self.byte_order == ByteOrder::Big {
            bytes.reverse();
        }
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, place: HeaderPart<'_>) -> Result<u32> {
        self.number(place).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, place: HeaderPart<'_>) -> Result<u64> {
        self.number(place).map(u64::from_le_bytes)
    }

    /// A count, a length or a dimension.
    pub(super) fn count(&mut self, place: HeaderPart<'_>) -> Result<u64> {
        match self.count_bytes {
            4 => self.u32(place).map(u64::from),
            _ => self.u64(place),
        }
    }

    pub(super) fn string(&mut self, place: HeaderPart<'_>) -> Result<String> {
        let len = self.count(place)?;
        self.need(place, len, 1)?;
        let offset = self.pos;
        // At most MAX_HEADER_BYTES, so that it fits.
        let mut out = vec![0; len as usize];
        self.fill(&mut out)?;
        String::from_utf8(out).map_err(|error| Error::Utf8 {
            what: place.to_string(),
            offset,
            source: error.utf8_error(),
        })
    }

    /// A count, then as many items of at least `bytes` bytes, each read by `item`.
    pub(super) fn list<T>(
        &mut self,
        place: HeaderPart<'_>,
        bytes: u64,
        mut item: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let count = self.count(place)?;
        self.need(place, count, bytes)?;
        let mut out = Vec::with_capacity((count as usize).min(MAX_RESERVE));
        for _ in 0..count {
            out.push(item(self)?);
        }
        Ok(out)
    }
}
