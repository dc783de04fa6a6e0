//! The pickles of `torch.save`, by an interpreter that runs nothing.
//!
//! It knows the opcodes that build numbers, strings, tuples, lists and dictionaries, and the few
//! names by which torch rebuilds a tensor. Every other name is an error before anything is made of
//! it. Source of the opcodes: Python's `pickletools`.

use safetensors::Dtype;
use std::collections::HashMap;

/// Most objects of a pickle: a checkpoint has some ten for each tensor.
const MAX_OBJECTS: usize = 4 << 20;

/// An object of the pickle, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(u32);

/// What a name of the pickle stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, …)`, and `_v3`, which has
    /// the element type as its seventh argument. `_rebuild_tensor` has four arguments.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter(tensor, …)`
    RebuildParameter,
    /// `torch.Size(shape)`
    Size,
    /// A class of storages, by its element type.
    Storage(Dtype),
    /// `torch.storage.UntypedStorage`
    Bytes,
    /// An element type such as `torch.float16`.
    Element(Dtype),
}

/// The bytes that a tensor is a view of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage {
    /// Its key: that of its file in the archive, or of its bytes in a legacy file.
    pub(super) key: String,
    /// Element type; none for plain bytes.
    pub(super) dtype: Option<Dtype>,
    /// Number of elements of the whole file.
    pub(super) elements: u64,
    /// Elements of it before its first, in files of torch before 0.4.
    pub(super) start: u64,
}

/// A view of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View {
    pub(super) storage: Storage,
    pub(super) dtype: Dtype,
    /// Elements before its first.
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    /// Elements from one index to the next, for each dimension.
    pub(super) strides: Vec<u64>,
}

/// An object.
#[derive(Debug, Clone)]
pub(super) enum Object {
    /// A value that no tensor depends on.
    Other,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    /// In the order of the pickle; a key may come again and then replaces the earlier one.
    Dict(Vec<(Id, Id)>),
    Name(Name),
    Storage(Storage),
    Tensor(View),
}

/// The objects of a pickle.
#[derive(Debug, Default)]
pub(super) struct Objects(Vec<Object>);

impl Objects {
    pub(super) fn get(&self, id: Id) -> &Object {
        &self.0[id.0 as usize]
    }

    /// All storages that the pickle refers to; one may come several times.
    pub(super) fn storages(&self) -> impl Iterator<Item = &Storage> {
        self.0.iter().filter_map(|object| match object {
            Object::Storage(storage) => Some(storage),
            _ => None,
        })
    }

    fn push(&mut self, object: Object) -> Result<Id, String> {
        if self.0.len() >= MAX_OBJECTS {
            return Err(format!("more than {MAX_OBJECTS} objects"));
        }
        self.0.push(object);
        Ok(Id(self.0.len() as u32 - 1))
    }

    fn int(&self, id: Id) -> Result<u64, String> {
        match self.get(id) {
            Object::Int(n) => u64::try_from(*n).map_err(|_| format!("{n} where a size belongs")),
            other => Err(format!("{} where a size belongs", other.kind())),
        }
    }

    fn ints(&self, id: Id) -> Result<Vec<u64>, String> {
        match self.get(id) {
            Object::Tuple(items) | Object::List(items) => {
                items.iter().map(|&item| self.int(item)).collect()
            }
            other => Err(format!("{} where sizes belong", other.kind())),
        }
    }
}

impl Object {
    /// What it is, for a person.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Other => "a value",
            Self::Int(_) => "a number",
            Self::Text(_) => "a string",
            Self::Tuple(_) => "a tuple",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Name(_) => "a name",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

/// Runs the pickle at the start of `input`; its last object and all others. What follows it stays
/// in `input`.
///
/// # Errors
/// A sentence: bytes that are no pickle, an opcode or a name beyond those above. [`SHORT`] if more
/// bytes may help.
pub(super) fn read(input: &mut &[u8]) -> Result<(Id, Objects), String> {
    let mut machine = Machine {
        input,
        objects: Objects::default(),
        stack: vec![],
        marks: vec![],
        memo: HashMap::new(),
    };
    let top = machine.run()?;
    *input = machine.input;
    Ok((top, machine.objects))
}

struct Machine<'a> {
    input: &'a [u8],
    objects: Objects,
    stack: Vec<Id>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let [opcode] = self.take()?;
            if opcode == b'.' {
                return self.pop();
            }
            let handled =
                self.scalar(opcode)? || self.container(opcode)? || self.reference(opcode)?;
            if !handled {
                return Err(format!("the opcode {opcode:#04x}, which no tensor needs"));
            }
        }
    }

    /// Numbers and strings.
    fn scalar(&mut self, opcode: u8) -> Result<bool, String> {
        let object = match opcode {
            // None, True, False, float.
            b'N' | 0x88 | 0x89 => Object::Other,
            b'G' => {
                self.take::<8>()?;
                Object::Other
            }
            b'J' => Object::Int(i32::from_le_bytes(self.take()?).into()),
            b'K' => Object::Int(self.take::<1>()?[0].into()),
            b'M' => Object::Int(u16::from_le_bytes(self.take()?).into()),
            0x8a => {
                let [len] = self.take()?;
                let bytes = self.bytes(len.into())?;
                match bytes.len() {
                    0..=8 => {
                        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                        let mut wide = [if negative { 0xff } else { 0 }; 8];
                        wide[..bytes.len()].copy_from_slice(bytes);
                        Object::Int(i64::from_le_bytes(wide))
                    }
                    _ => Object::Other,
                }
            }
            b'X' => self.text::<4>()?,
            0x8c => self.text::<1>()?,
            0x8d => self.text::<8>()?,
            // Strings of Python 2.
            b'T' => self.old_text::<4>()?,
            b'U' => self.old_text::<1>()?,
            // Bytes.
            b'B' => {
                self.counted::<4>()?;
                Object::Other
            }
            b'C' => {
                self.counted::<1>()?;
                Object::Other
            }
            _ => return Ok(false),
        };
        self.make(object)?;
        Ok(true)
    }

    /// Tuples, lists and dictionaries.
    fn container(&mut self, opcode: u8) -> Result<bool, String> {
        match opcode {
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b')' => self.make(Object::Tuple(vec![]))?,
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let first = self.stack.len().checked_sub(count).ok_or(SHORT)?;
                let items = self.stack.split_off(first);
                self.make(Object::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_mark()?;
                self.make(Object::Tuple(items))?;
            }
            b']' => self.make(Object::List(vec![]))?,
            b'l' => {
                let items = self.pop_mark()?;
                self.make(Object::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.append(&items)?;
            }
            b'}' => self.make(Object::Dict(vec![]))?,
            b'd' => {
                let items = self.pop_mark()?;
                self.make(Object::Dict(vec![]))?;
                self.set(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set(&items)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The memo, names, and what is made by them.
    fn reference(&mut self, opcode: u8) -> Result<bool, String> {
        match opcode {
            // PROTO and FRAME.
            0x80 => drop(self.take::<1>()?),
            0x95 => drop(self.take::<8>()?),
            b'q' => {
                let [index] = self.take()?;
                self.remember(index.into())?;
            }
            b'r' => {
                let index = u32::from_le_bytes(self.take()?);
                self.remember(index)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let [index] = self.take()?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.take()?);
                self.recall(index)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.make(Object::Name(named(&module, &name)?))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Object::Text(module), Object::Text(name)) =
                    (self.objects.get(module), self.objects.get(name))
                else {
                    return Err("a name that is no string".into());
                };
                let name = named(module, name)?;
                self.make(Object::Name(name))?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.make(Object::Storage(storage))?;
            }
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let made = self.call(function, arguments)?;
                self.stack.push(made);
            }
            // The state of an object: `_metadata` of a state dict.
            b'b' => drop(self.pop()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What torch stores by reference: `('storage', class, file, device, elements)`. Files that are
    /// no archive add `None`, or `(key, start, elements)` for a part of a storage.
    fn storage(&self, id: Id) -> Result<Storage, String> {
        let bad = || "a reference that is no storage of torch".to_string();
        let Object::Tuple(parts) = self.objects.get(id) else {
            return Err(bad());
        };
        let &[tag, class, key, _, elements, ref part @ ..] = parts.as_slice() else {
            return Err(bad());
        };
        let start = match part {
            [] => 0,
            &[part] => match self.objects.get(part) {
                Object::Other => 0,
                Object::Tuple(part) if part.len() == 3 => self.objects.int(part[1])?,
                _ => return Err(bad()),
            },
            _ => return Err(bad()),
        };
        let dtype = match (self.objects.get(tag), self.objects.get(class)) {
            (Object::Text(tag), Object::Name(Name::Storage(dtype))) if tag == "storage" => {
                Some(*dtype)
            }
            (Object::Text(tag), Object::Name(Name::Bytes)) if tag == "storage" => None,
            _ => return Err(bad()),
        };
        let Object::Text(key) = self.objects.get(key) else {
            return Err(bad());
        };
        Ok(Storage {
            key: key.clone(),
            dtype,
            elements: self.objects.int(elements)?,
            start,
        })
    }

    fn call(&mut self, function: Id, arguments: Id) -> Result<Id, String> {
        let Object::Name(name) = *self.objects.get(function) else {
            let kind = self.objects.get(function).kind();
            return Err(format!("a call of {kind}"));
        };
        let Object::Tuple(arguments) = self.objects.get(arguments) else {
            return Err("a call without a tuple of arguments".into());
        };
        match (name, arguments.as_slice()) {
            (Name::OrderedDict, []) => self.objects.push(Object::Dict(vec![])),
            (Name::Size | Name::RebuildParameter, &[first, ..]) => Ok(first),
            (Name::RebuildTensor, &[storage, offset, shape, strides, ref rest @ ..]) => {
                let dtype = rest.get(2).map(|&id| self.objects.get(id));
                let dtype = match dtype {
                    Some(Object::Name(Name::Element(dtype))) => Some(*dtype),
                    _ => None,
                };
                let view = self.view(storage, (offset, shape, strides), dtype)?;
                self.objects.push(Object::Tensor(view))
            }
            _ => Err(format!("{name:?} with {} arguments", arguments.len())),
        }
    }

    fn view(
        &self,
        storage: Id,
        (offset, shape, strides): (Id, Id, Id),
        dtype: Option<Dtype>,
    ) -> Result<View, String> {
        let Object::Storage(storage) = self.objects.get(storage) else {
            return Err("a tensor without a storage".into());
        };
        let shape = self.objects.ints(shape)?;
        let dtype = dtype.or(storage.dtype);
        Ok(View {
            storage: storage.clone(),
            dtype: dtype.ok_or("a tensor without an element type")?,
            offset: self.objects.int(offset)?,
            shape: shape
                .into_iter()
                .map(|n| usize::try_from(n).map_err(|e| e.to_string()))
                .collect::<Result<_, _>>()?,
            strides: self.objects.ints(strides)?,
        })
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self.input.split_first_chunk::<N>().ok_or(SHORT)?;
        self.input = rest;
        Ok(*head)
    }

    fn bytes(&mut self, len: u64) -> Result<&[u8], String> {
        let len = usize::try_from(len).map_err(|_| SHORT)?;
        let (head, rest) = self.input.split_at_checked(len).ok_or(SHORT)?;
        self.input = rest;
        Ok(head)
    }

    /// Bytes after their number in N bytes.
    fn counted<const N: usize>(&mut self) -> Result<&[u8], String> {
        let mut len = [0; 8];
        len[..N].copy_from_slice(&self.take::<N>()?);
        self.bytes(u64::from_le_bytes(len))
    }

    fn text<const N: usize>(&mut self) -> Result<Object, String> {
        let bytes = self.counted::<N>()?;
        let text = std::str::from_utf8(bytes).map_err(|e| format!("a string: {e}"))?;
        Ok(Object::Text(text.into()))
    }

    /// Text or bytes: Python 2 has one type for both.
    fn old_text<const N: usize>(&mut self) -> Result<Object, String> {
        let text = std::str::from_utf8(self.counted::<N>()?);
        Ok(text.map_or(Object::Other, |text| Object::Text(text.into())))
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.input.iter().position(|&b| b == b'\n').ok_or(SHORT)?;
        let line = String::from_utf8_lossy(&self.input[..end]).into_owned();
        self.input = &self.input[end + 1..];
        Ok(line)
    }

    fn make(&mut self, object: Object) -> Result<(), String> {
        let id = self.objects.push(object)?;
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(SHORT.into());
        }
        self.stack.pop().ok_or_else(|| SHORT.into())
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or(SHORT)?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Result<&mut Object, String> {
        let id = *self.stack.last().ok_or(SHORT)?;
        Ok(&mut self.objects.0[id.0 as usize])
    }

    fn append(&mut self, items: &[Id]) -> Result<(), String> {
        match self.top()? {
            Object::List(list) => list.extend(items),
            other => return Err(format!("an item for {}", other.kind())),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<(), String> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.top()? {
            Object::Dict(dict) if rest.is_empty() => {
                dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
            }
            other => return Err(format!("keys and values for {}", other.kind())),
        }
        Ok(())
    }

    fn remember(&mut self, index: u32) -> Result<(), String> {
        let id = *self.stack.last().ok_or(SHORT)?;
        self.memo.insert(index, id);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), String> {
        let id = self.memo.get(&index).ok_or("a reference to nothing")?;
        self.stack.push(*id);
        Ok(())
    }
}

/// The error of a pickle that was cut.
pub(super) const SHORT: &str = "a pickle that ends early";

/// The meaning of a name.
fn named(module: &str, name: &str) -> Result<Name, String> {
    let known = match (module, name) {
        ("collections", "OrderedDict") => Some(Name::OrderedDict),
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3") => {
            Some(Name::RebuildTensor)
        }
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
            Some(Name::RebuildParameter)
        }
        ("torch", "Size") => Some(Name::Size),
        ("torch" | "torch.storage", "UntypedStorage") => Some(Name::Bytes),
        ("torch", name) => match name.strip_suffix("Storage") {
            Some(class) => storage_type(class).map(Name::Storage),
            None => element_type(name).map(Name::Element),
        },
        _ => None,
    };
    known.ok_or_else(|| {
        format!("the name {module}.{name}: tensors and plain containers are read, and no code runs")
    })
}

fn storage_type(class: &str) -> Option<Dtype> {
    Some(match class {
        "Double" => Dtype::F64,
        "Float" => Dtype::F32,
        "Half" => Dtype::F16,
        "BFloat16" => Dtype::BF16,
        "Long" => Dtype::I64,
        "Int" => Dtype::I32,
        "Short" => Dtype::I16,
        "Char" => Dtype::I8,
        "Byte" => Dtype::U8,
        "Bool" => Dtype::BOOL,
        _ => return None,
    })
}

fn element_type(name: &str) -> Option<Dtype> {
    Some(match name {
        "float64" => Dtype::F64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "int64" => Dtype::I64,
        "int32" => Dtype::I32,
        "int16" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint64" => Dtype::U64,
        "uint32" => Dtype::U32,
        "uint16" => Dtype::U16,
        "uint8" => Dtype::U8,
        "bool" => Dtype::BOOL,
        _ => return None,
    })
}
