//! The messages of `onnx.proto`. Numbers of fields stand where they are written.

use super::wire::Message;
use super::{IR_VERSION, OPSET};

/// Element types of tensors: `TensorProto.DataType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE binary32.
    F32,
    /// Bytes.
    U8,
    /// 32-bit integers.
    I32,
    /// 64-bit integers.
    I64,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl ElementType {
    /// Its number, also in attributes such as `to` of `Cast`.
    pub const fn number(self) -> i64 {
        match self {
            Self::F32 => 1,
            Self::U8 => 2,
            Self::I32 => 6,
            Self::I64 => 7,
            Self::F16 => 10,
            Self::Bf16 => 16,
        }
    }
}

/// Who defines an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// ONNX.
    Onnx,
    /// onnxruntime: `com.microsoft`.
    Microsoft,
}

impl Domain {
    const fn name(self) -> &'static str {
        match self {
            Self::Onnx => "",
            Self::Microsoft => "com.microsoft",
        }
    }
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// An integer, or 0 and 1 for false and true.
    Int(i64),
    /// A float.
    Float(f32),
}

/// An operation.
#[derive(Debug, Clone)]
pub struct Node {
    /// The operator.
    pub op: &'static str,
    /// Who defines it.
    pub domain: Domain,
    /// Its own name.
    pub name: String,
    /// Names of its inputs; empty for one that is left out.
    pub inputs: Vec<String>,
    /// Names of its outputs, likewise.
    pub outputs: Vec<String>,
    /// Attributes by name.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// A tensor of the external data.
#[derive(Debug, Clone)]
pub struct Weights {
    /// Its name in the graph.
    pub name: String,
    /// Its name among the stored tensors. Two tensors of a graph may share one.
    pub stored: String,
    /// Its element type.
    pub element: ElementType,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// Integers inside the model: shapes and axes.
#[derive(Debug, Clone)]
pub struct Constant {
    /// Its name.
    pub name: String,
    /// The shape: `[len]`, or `[]` for one number.
    pub shape: Vec<usize>,
    /// The numbers.
    pub values: Vec<i64>,
}

/// One dimension of an input or output.
#[derive(Debug, Clone, Copy)]
pub enum Dim {
    /// A number.
    Fixed(usize),
    /// Any number, the same wherever the name stands.
    Named(&'static str),
}

/// An input or output of the model.
#[derive(Debug, Clone)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub element: ElementType,
    /// Its dimensions.
    pub shape: Vec<Dim>,
}

/// A model: one graph, its nodes in an order in which they can run.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// Operations.
    pub nodes: Vec<Node>,
    /// Tensors of the external data.
    pub weights: Vec<Weights>,
    /// Integers.
    pub constants: Vec<Constant>,
    /// Inputs.
    pub inputs: Vec<Value>,
    /// Outputs.
    pub outputs: Vec<Value>,
}

impl Model {
    /// The bytes of the file. `data_file` is the name of the file with the external data, in the
    /// same folder; `region` gives offset and length of a stored tensor in it.
    pub fn encode(
        &self,
        generator: &str,
        data_file: &str,
        region: &dyn Fn(&str) -> (u64, u64),
    ) -> Vec<u8> {
        let mut model = Message::default();
        model.int(1, IR_VERSION);
        let (name, version) = generator.split_once(' ').unwrap_or((generator, ""));
        model.text(2, name);
        model.text(3, version);
        model.message(7, |graph| {
            for node in &self.nodes {
                graph.message(1, |message| node.encode(message));
            }
            graph.text(2, "main");
            for constant in &self.constants {
                graph.message(5, |message| constant.encode(message));
            }
            for weights in &self.weights {
                let region = region(&weights.stored);
                graph.message(5, |message| weights.encode(message, data_file, region));
            }
            for (field, values) in [(11, &self.inputs), (12, &self.outputs)] {
                for value in values {
                    graph.message(field, |message| value.encode(message));
                }
            }
        });
        for (domain, version) in [(Domain::Onnx, OPSET), (Domain::Microsoft, 1)] {
            model.message(8, |opset| {
                opset.text(1, domain.name());
                opset.int(2, version);
            });
        }
        model.into_bytes()
    }
}

impl Node {
    fn encode(&self, node: &mut Message) {
        self.inputs.iter().for_each(|name| node.text(1, name));
        self.outputs.iter().for_each(|name| node.text(2, name));
        node.text(3, &self.name);
        node.text(4, self.op);
        for (name, value) in &self.attributes {
            node.message(5, |attribute| {
                attribute.text(1, name);
                match value {
                    Attribute::Float(x) => {
                        attribute.float(2, *x);
                        attribute.int(20, 1);
                    }
                    Attribute::Int(n) => {
                        attribute.int(3, *n);
                        attribute.int(20, 2);
                    }
                }
            });
        }
        node.text(7, self.domain.name());
    }
}

/// Name, type and shape of a `TensorProto`.
fn tensor_head(tensor: &mut Message, name: &str, element: ElementType, shape: &[usize]) {
    shape.iter().for_each(|&n| tensor.int(1, n as i64));
    tensor.int(2, element.number());
    tensor.text(8, name);
}

impl Constant {
    fn encode(&self, tensor: &mut Message) {
        tensor_head(tensor, &self.name, ElementType::I64, &self.shape);
        let raw: Vec<u8> = self.values.iter().flat_map(|n| n.to_le_bytes()).collect();
        tensor.bytes(9, &raw);
    }
}

impl Weights {
    fn encode(&self, tensor: &mut Message, data_file: &str, (offset, len): (u64, u64)) {
        tensor_head(tensor, &self.name, self.element, &self.shape);
        let entries = [
            ("location", data_file.to_string()),
            ("offset", offset.to_string()),
            ("length", len.to_string()),
        ];
        for (key, value) in entries {
            tensor.message(13, |entry| {
                entry.text(1, key);
                entry.text(2, &value);
            });
        }
        // EXTERNAL of `DataLocation`.
        tensor.int(14, 1);
    }
}

impl Value {
    fn encode(&self, value: &mut Message) {
        value.text(1, &self.name);
        value.message(2, |kind| {
            kind.message(1, |tensor| {
                tensor.int(1, self.element.number());
                tensor.message(2, |shape| {
                    for dim in &self.shape {
                        shape.message(1, |message| match dim {
                            Dim::Fixed(n) => message.int(1, *n as i64),
                            Dim::Named(name) => message.text(2, name),
                        });
                    }
                });
            });
        });
    }
}
