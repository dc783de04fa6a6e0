//! Metadata values.

use super::error::{Error, Result};
use std::fmt::Write;

/// Type ids of metadata values.
pub(super) mod type_id {
    pub(in crate::gguf) const U8: u32 = 0;
    pub(in crate::gguf) const I8: u32 = 1;
    pub(in crate::gguf) const U16: u32 = 2;
    pub(in crate::gguf) const I16: u32 = 3;
    pub(in crate::gguf) const U32: u32 = 4;
    pub(in crate::gguf) const I32: u32 = 5;
    pub(in crate::gguf) const F32: u32 = 6;
    pub(in crate::gguf) const BOOL: u32 = 7;
    pub(in crate::gguf) const STRING: u32 = 8;
    pub(in crate::gguf) const ARRAY: u32 = 9;
    pub(in crate::gguf) const U64: u32 = 10;
    pub(in crate::gguf) const I64: u32 = 11;
    pub(in crate::gguf) const F64: u32 = 12;
}

/// Names of the value types by id.
const TYPE_NAMES: [&str; 13] = [
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64",
];

/// One metadata value. The width of a number is part of the file, so it is kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Unsigned 8-bit.
    U8(u8),
    /// Signed 8-bit.
    I8(i8),
    /// Unsigned 16-bit.
    U16(u16),
    /// Signed 16-bit.
    I16(i16),
    /// Unsigned 32-bit, the usual type of sizes.
    U32(u32),
    /// Signed 32-bit.
    I32(i32),
    /// Binary32.
    F32(f32),
    /// Boolean.
    Bool(bool),
    /// Text.
    String(String),
    /// Elements of one type.
    Array(Array),
    /// Unsigned 64-bit.
    U64(u64),
    /// Signed 64-bit.
    I64(i64),
    /// Binary64.
    F64(f64),
}

/// The elements of an array value.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Unsigned 8-bit.
    U8(Vec<u8>),
    /// Signed 8-bit.
    I8(Vec<i8>),
    /// Unsigned 16-bit.
    U16(Vec<u16>),
    /// Signed 16-bit.
    I16(Vec<i16>),
    /// Unsigned 32-bit.
    U32(Vec<u32>),
    /// Signed 32-bit.
    I32(Vec<i32>),
    /// Binary32.
    F32(Vec<f32>),
    /// Boolean.
    Bool(Vec<bool>),
    /// Text, such as the tokens of a vocabulary.
    String(Vec<String>),
    /// Arrays, whose element types may differ.
    Array(Vec<Array>),
    /// Unsigned 64-bit.
    U64(Vec<u64>),
    /// Signed 64-bit.
    I64(Vec<i64>),
    /// Binary64.
    F64(Vec<f64>),
}

/// Evaluates `$body` with `$items` bound to the vector inside an [`Array`], whatever its element
/// type.
macro_rules! with_items {
    ($array:expr, $items:ident => $body:expr) => {
        match $array {
            Array::U8($items) => $body,
            Array::I8($items) => $body,
            Array::U16($items) => $body,
            Array::I16($items) => $body,
            Array::U32($items) => $body,
            Array::I32($items) => $body,
            Array::F32($items) => $body,
            Array::Bool($items) => $body,
            Array::String($items) => $body,
            Array::Array($items) => $body,
            Array::U64($items) => $body,
            Array::I64($items) => $body,
            Array::F64($items) => $body,
        }
    };
}

impl Value {
    /// The type in words, such as `u32`.
    pub const fn type_name(&self) -> &'static str {
        TYPE_NAMES[self.type_id() as usize]
    }

    /// The type's id in files.
    pub(super) const fn type_id(&self) -> u32 {
        match self {
            Self::U8(_) => type_id::U8,
            Self::I8(_) => type_id::I8,
            Self::U16(_) => type_id::U16,
            Self::I16(_) => type_id::I16,
            Self::U32(_) => type_id::U32,
            Self::I32(_) => type_id::I32,
            Self::F32(_) => type_id::F32,
            Self::Bool(_) => type_id::BOOL,
            Self::String(_) => type_id::STRING,
            Self::Array(_) => type_id::ARRAY,
            Self::U64(_) => type_id::U64,
            Self::I64(_) => type_id::I64,
            Self::F64(_) => type_id::F64,
        }
    }

    /// The text, if it is a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(s) = self {
            Some(s)
        } else {
            None
        }
    }

    /// The number, if it is a non-negative integer of any width.
    ///
    /// ```
    /// use bitnet_formats::gguf::Value;
    /// assert_eq!(Value::I32(7).as_u64(), Some(7));
    /// assert_eq!(Value::I32(-7).as_u64(), None);
    /// assert_eq!(Value::F32(7.0).as_u64(), None);
    /// ```
    pub fn as_u64(&self) -> Option<u64> {
        self.as_integer().and_then(|n| n.try_into().ok())
    }

    /// The number, if it is an integer of any width that fits an i64.
    pub fn as_i64(&self) -> Option<i64> {
        self.as_integer().and_then(|n| n.try_into().ok())
    }

    fn as_integer(&self) -> Option<i128> {
        match *self {
            Self::U8(n) => Some(n.into()),
            Self::I8(n) => Some(n.into()),
            Self::U16(n) => Some(n.into()),
            Self::I16(n) => Some(n.into()),
            Self::U32(n) => Some(n.into()),
            Self::I32(n) => Some(n.into()),
            Self::U64(n) => Some(n.into()),
            Self::I64(n) => Some(n.into()),
            _ => None,
        }
    }

    /// The number, if it is a float of either width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            _ => None,
        }
    }

    /// The boolean, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(b) = *self {
            Some(b)
        } else {
            None
        }
    }

    /// The elements, if it is an array.
    pub fn as_array(&self) -> Option<&Array> {
        if let Self::Array(a) = self {
            Some(a)
        } else {
            None
        }
    }

    /// The elements, if it is an array of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        if let Self::Array(Array::String(s)) = self {
            Some(s)
        } else {
            None
        }
    }

    /// Readable text of about `max_chars` characters at most; omitted elements are counted. Control
    /// characters in strings are escaped.
    ///
    /// ```
    /// use bitnet_formats::gguf::{Array, Value};
    /// assert_eq!(Value::from("a\u{1b}[31m").preview(80), r#""a\u{1b}[31m""#);
    /// assert_eq!(Value::from("abcdef").preview(3), r#""abc"… (6 characters)"#);
    /// assert_eq!(Value::Array(Array::U32(vec![1, 2, 3])).preview(80), "[1, 2, 3]");
    /// assert_eq!(Value::Array(Array::U32(vec![100; 1000])).preview(12), "[100, 100, … (1000 u32)]");
    /// ```
    pub fn preview(&self, max_chars: usize) -> String {
        match self {
            Self::U8(n) => n.to_string(),
            Self::I8(n) => n.to_string(),
            Self::U16(n) => n.to_string(),
            Self::I16(n) => n.to_string(),
            Self::U32(n) => n.to_string(),
            Self::I32(n) => n.to_string(),
            Self::U64(n) => n.to_string(),
            Self::I64(n) => n.to_string(),
            Self::F32(x) => format!("{x:?}"),
            Self::F64(x) => format!("{x:?}"),
            Self::Bool(b) => b.to_string(),
            Self::String(s) => text(s, max_chars),
            Self::Array(a) => a.preview(max_chars),
        }
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        with_items!(self, items => items.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type in words, such as `u32`.
    pub const fn type_name(&self) -> &'static str {
        TYPE_NAMES[self.type_id() as usize]
    }

    /// The element type's id in files.
    pub(super) const fn type_id(&self) -> u32 {
        match self {
            Self::U8(_) => type_id::U8,
            Self::I8(_) => type_id::I8,
            Self::U16(_) => type_id::U16,
            Self::I16(_) => type_id::I16,
            Self::U32(_) => type_id::U32,
            Self::I32(_) => type_id::I32,
            Self::F32(_) => type_id::F32,
            Self::Bool(_) => type_id::BOOL,
            Self::String(_) => type_id::STRING,
            Self::Array(_) => type_id::ARRAY,
            Self::U64(_) => type_id::U64,
            Self::I64(_) => type_id::I64,
            Self::F64(_) => type_id::F64,
        }
    }

    /// Checks the nesting; `key` names the array in the error.
    pub(super) fn check_depth(&self, key: &str, allowed: usize) -> Result<()> {
        match self {
            _ if allowed == 0 => Err(Error::ArrayDepth {
                key: key.into(),
                max: super::MAX_ARRAY_DEPTH,
            }),
            Self::Array(items) => items
                .iter()
                .try_for_each(|item| item.check_depth(key, allowed - 1)),
            _ => Ok(()),
        }
    }

    fn preview(&self, max_chars: usize) -> String {
        match self {
            Self::String(items) => list(items, max_chars, self.type_name(), |item, room| {
                text(item, room)
            }),
            Self::Array(items) => list(items, max_chars, self.type_name(), |item, room| {
                item.preview(room)
            }),
            Self::F32(items) => list(items, max_chars, self.type_name(), |item, _| {
                format!("{item:?}")
            }),
            Self::F64(items) => list(items, max_chars, self.type_name(), |item, _| {
                format!("{item:?}")
            }),
            Self::U8(items) => numbers(items, max_chars, self.type_name()),
            Self::I8(items) => numbers(items, max_chars, self.type_name()),
            Self::U16(items) => numbers(items, max_chars, self.type_name()),
            Self::I16(items) => numbers(items, max_chars, self.type_name()),
            Self::U32(items) => numbers(items, max_chars, self.type_name()),
            Self::I32(items) => numbers(items, max_chars, self.type_name()),
            Self::U64(items) => numbers(items, max_chars, self.type_name()),
            Self::I64(items) => numbers(items, max_chars, self.type_name()),
            Self::Bool(items) => numbers(items, max_chars, self.type_name()),
        }
    }
}

fn numbers<T: ToString>(items: &[T], max_chars: usize, type_name: &str) -> String {
    list(items, max_chars, type_name, |item, _| item.to_string())
}

/// `[a, b, c]`, or as many elements as fit and the number of all.
fn list<T>(
    items: &[T],
    max_chars: usize,
    type_name: &str,
    show: impl Fn(&T, usize) -> String,
) -> String {
    let mut out = String::from("[");
    for (index, item) in items.iter().enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        let room = max_chars.saturating_sub(out.len());
        let shown = show(item, room);
        if shown.len() + separator.len() > room {
            // Writing to a String cannot fail.
            let _ = write!(out, "{separator}… ({} {type_name})", items.len());
            break;
        }
        out.push_str(separator);
        out.push_str(&shown);
    }
    out.push(']');
    out
}

fn text(s: &str, max_chars: usize) -> String {
    match s.char_indices().nth(max_chars) {
        Some((end, _)) => format!(
            "{:?}… ({} characters)",
            s.get(..end).unwrap_or_default(),
            s.chars().count()
        ),
        None => format!("{s:?}"),
    }
}

impl From<&str> for Value {
    fn from(s: &str) -> Self {
        Self::String(s.into())
    }
}

impl From<String> for Value {
    fn from(s: String) -> Self {
        Self::String(s)
    }
}

impl From<u32> for Value {
    fn from(n: u32) -> Self {
        Self::U32(n)
    }
}

impl From<f32> for Value {
    fn from(x: f32) -> Self {
        Self::F32(x)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}

impl From<Array> for Value {
    fn from(array: Array) -> Self {
        Self::Array(array)
    }
}
