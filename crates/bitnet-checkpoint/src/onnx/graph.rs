//! The nodes of a decoder.
//!
//! ```text
//! h = embedding[input_ids]
//! each layer:  x = RMS(h);  h += o_proj( [RMS_sub] attention([RMS_head] q_proj x, [RMS_head] k_proj x, v_proj x) )
//!              z = RMS(h);  h += down_proj( [RMS_sub] act(gate_proj z) · up_proj z )
//! logits = head · RMS(h)
//! ```
//!
//! Adding to `h` and the norm behind it are one node, `SkipSimplifiedLayerNormalization`. Norms in
//! brackets and biases are there where the model has tensors for them.

use super::{DATA, Facts, ROTARY, SUFFIXES, Weight};
use crate::Result;
use bitnet_formats::Error as FileError;
use bitnet_formats::arch::Activation;
use bitnet_formats::onnx::{
    Attribute, BlockFormat, Constant, Dim, Domain, ElementType, Model, Node, Value, Weights,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const MASK: &str = "attention_mask";
const LENGTHS: &str = "seqlens_k";
const TOTAL: &str = "total_sequence_length_i32";

/// The graph of a model with these tensors. `path` is the model's, for messages.
///
/// # Errors
/// [`crate::Error::File`] naming a tensor that is missing, has another shape, or has no place in
/// the graph.
pub(crate) fn build(
    path: &Path,
    facts: &Facts,
    weights: &BTreeMap<String, Weight>,
) -> Result<Model> {
    let mut graph = Graph {
        path,
        facts,
        weights,
        used: BTreeSet::new(),
        declared: BTreeSet::new(),
        model: Model::default(),
    };
    graph.inputs_and_outputs();
    graph.lengths();
    graph.rotary_tables();
    let mut hidden = graph.embedding()?;
    let mut added: Option<String> = None;
    for layer in 0..facts.layers {
        let name = format!("model.layers.{layer}");
        let norm = format!("{name}.input_layernorm.weight");
        let (normed, sum) = graph.add_and_norm(&norm, &hidden, added.as_deref())?;
        let attention = graph.attention(layer, &normed)?;
        let norm = format!("{name}.post_attention_layernorm.weight");
        let (normed, sum) = graph.add_and_norm(&norm, &sum, Some(&attention))?;
        added = Some(graph.feed_forward(&name, &normed)?);
        hidden = sum;
    }
    let (normed, _) = graph.add_and_norm("model.norm.weight", &hidden, added.as_deref())?;
    graph.head(&normed)?;
    graph.finish()
}

struct Graph<'a> {
    path: &'a Path,
    facts: &'a Facts,
    weights: &'a BTreeMap<String, Weight>,
    /// Tensors of the model that have a place.
    used: BTreeSet<&'a str>,
    /// Names of external tensors that the model has already.
    declared: BTreeSet<String>,
    model: Model,
}

impl<'a> Graph<'a> {
    fn inputs_and_outputs(&mut self) {
        let facts = self.facts;
        let (batch, sequence) = (Dim::Named("batch_size"), Dim::Named("sequence_length"));
        let (past, total) = (
            Dim::Named("past_sequence_length"),
            Dim::Named("total_sequence_length"),
        );
        let value = |name: &str, element, shape: &[Dim]| Value {
            name: name.into(),
            element,
            shape: shape.to_vec(),
        };
        let model = &mut self.model;
        let ids = value("input_ids", ElementType::I64, &[batch, sequence]);
        model.inputs.push(ids);
        model
            .inputs
            .push(value(MASK, ElementType::I64, &[batch, total]));
        let vocab = Dim::Fixed(facts.vocab);
        let logits = value("logits", ElementType::F32, &[batch, sequence, vocab]);
        model.outputs.push(logits);
        let (heads, dim) = (Dim::Fixed(facts.kv_heads), Dim::Fixed(facts.head_dim));
        for layer in 0..facts.layers {
            for kind in ["key", "value"] {
                let shape = [batch, heads, past, dim];
                let name = format!("past_key_values.{layer}.{kind}");
                model.inputs.push(value(&name, ElementType::F32, &shape));
                let shape = [batch, heads, total, dim];
                let name = format!("present.{layer}.{kind}");
                model.outputs.push(value(&name, ElementType::F32, &shape));
            }
        }
    }

    /// Adds a node whose one output, beside those that are named in `op`, is `<name>/output_0`.
    fn node(&mut self, op: Op<'_>, name: &str, inputs: &[&str]) -> String {
        let output = format!("{name}/output_0");
        self.node_to(op, name, inputs, &[&output]);
        output
    }

    fn node_to(&mut self, op: Op<'_>, name: &str, inputs: &[&str], outputs: &[&str]) {
        let own = |names: &[&str]| names.iter().map(|&n| n.into()).collect();
        self.model.nodes.push(Node {
            op: op.name,
            domain: op.domain,
            name: name.into(),
            inputs: own(inputs),
            outputs: own(outputs),
            attributes: op.attributes.to_vec(),
        });
    }

    fn constant(&mut self, name: &str, shape: &[usize], values: &[i64]) -> String {
        if self.declared.insert(name.into()) {
            self.model.constants.push(Constant {
                name: name.into(),
                shape: shape.to_vec(),
                values: values.to_vec(),
            });
        }
        name.into()
    }

    /// Declares a tensor of the data file, once.
    fn external(&mut self, name: &str, stored: &str, element: ElementType, shape: &[usize]) {
        if self.declared.insert(name.into()) {
            self.model.weights.push(Weights {
                name: name.into(),
                stored: stored.into(),
                element,
                shape: shape.to_vec(),
            });
        }
    }

    /// `GroupQueryAttention` wants the last valid position of each sequence, and how long the
    /// longest one is.
    fn lengths(&mut self) {
        let int32 = [("to", Attribute::Int(ElementType::I32.number()))];
        let one = self.constant("/model/constants/one", &[1], &[1]);
        let sum = self.node(
            Op::onnx("ReduceSum", &[("keepdims", Attribute::Int(0))]),
            "/model/attn_mask/ReduceSum",
            &[MASK, &one],
        );
        let last = self.node(Op::onnx("Sub", &[]), "/model/attn_mask/Sub", &[&sum, &one]);
        let cast = Op::onnx("Cast", &int32);
        self.node_to(cast, "/model/attn_mask/Sub/Cast", &[&last], &[LENGTHS]);
        let shape = self.node(Op::onnx("Shape", &[]), "/model/attn_mask/Shape", &[MASK]);
        let axis = self.constant("/model/constants/axis_1", &[], &[1]);
        let total = self.node(
            Op::onnx("Gather", &[]),
            "/model/attn_mask/Gather",
            &[&shape, &axis],
        );
        let cast = Op::onnx("Cast", &int32);
        self.node_to(cast, "/model/attn_mask/Gather/Cast", &[&total], &[TOTAL]);
    }

    fn rotary_tables(&mut self) {
        let shape = [self.facts.context, self.facts.head_dim / 2];
        for name in ROTARY {
            self.external(name, name, ElementType::F32, &shape);
        }
    }

    fn refuse(
        &self,
        tensor: &str,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> FileError {
        FileError::tensor(self.path, tensor, expected, got)
    }

    fn find(&mut self, name: &str) -> Option<&'a Weight> {
        let (name, weight) = self.weights.get_key_value(name)?;
        self.used.insert(name);
        Some(weight)
    }

    /// A tensor of floats of this shape, declared, as f32. `None` if there is no such tensor.
    fn floats(&mut self, name: &str, shape: &[usize]) -> Result<Option<String>> {
        let Some(weight) = self.find(name) else {
            return Ok(None);
        };
        let Weight::Floats {
            shape: got,
            element,
        } = weight
        else {
            let expected = "floats in a norm or a bias";
            return Err(self.refuse(name, expected, "a quantized matrix").into());
        };
        if got != shape {
            let (expected, got) = (format!("shape {shape:?}"), format!("{got:?}"));
            return Err(self.refuse(name, expected, got).into());
        }
        self.external(name, name, *element, shape);
        Ok(Some(self.as_f32(name, *element)))
    }

    /// The name of the same values as f32.
    fn as_f32(&mut self, name: &str, element: ElementType) -> String {
        if element == ElementType::F32 {
            return name.into();
        }
        let node = format!("/{name}/Cast");
        if !self.declared.insert(node.clone()) {
            return format!("{node}/output_0");
        }
        let to = [("to", Attribute::Int(ElementType::F32.number()))];
        self.node(Op::onnx("Cast", &to), &node, &[name])
    }

    fn matrix(&mut self, name: &str, (rows, cols): (usize, usize)) -> Result<&'a Weight> {
        let Some(weight) = self.find(name) else {
            return Err(self.refuse(name, "a weight of the model", "none").into());
        };
        let (shape, expected) = (weight.shape(), format!("shape [{rows}, {cols}]"));
        match shape == [rows, cols] {
            true => Ok(weight),
            false => Err(self.refuse(name, expected, format!("{shape:?}")).into()),
        }
    }

    fn embedding(&mut self) -> Result<String> {
        let (vocab, hidden) = (self.facts.vocab, self.facts.hidden);
        match self.matrix(EMBEDDING, (vocab, hidden))? {
            Weight::Floats { shape, element } => {
                self.external(EMBEDDING, EMBEDDING, *element, shape);
                let name = "/model/embed_tokens/Gather";
                let inputs = [EMBEDDING, "input_ids"];
                let rows = self.node(Op::onnx("Gather", &[]), name, &inputs);
                Ok(self.as_f32(&rows, *element))
            }
            Weight::Blocks(format) => self.quantized_rows(format),
        }
    }

    /// Rows of a quantized embedding. It shares its bytes with the output matrix, whose codes have
    /// one dimension more: without padding they are the same.
    fn quantized_rows(&mut self, format: &BlockFormat) -> Result<String> {
        if !format.cols.is_multiple_of(format.block) {
            let expected = format!(
                "an embedding of a multiple of {} columns, which blocks fill",
                format.block
            );
            let got = format!("{}; give it as floats: quantize without it", format.cols);
            return Err(self.refuse(EMBEDDING, expected, got).into());
        }
        let [codes, scales, zeros] = SUFFIXES.map(|suffix| format!("{EMBEDDING}{suffix}"));
        let rows = [
            format!("{codes}_rows"),
            format!("{scales}_rows"),
            format!("{zeros}_rows"),
        ];
        let (n, width) = (format.rows, format.blocks() * format.block_bytes());
        self.external(&rows[0], &codes, ElementType::U8, &[n, width]);
        self.external(&rows[1], &scales, ElementType::F32, &[n, format.blocks()]);
        let mut inputs = vec![rows[0].as_str(), "input_ids", &rows[1]];
        if format.zero_points {
            let shape = [n, format.zero_point_bytes()];
            self.external(&rows[2], &zeros, ElementType::U8, &shape);
            inputs.push(&rows[2]);
        }
        let attributes = [
            ("bits", Attribute::Int(format.bits as i64)),
            ("block_size", Attribute::Int(format.block as i64)),
            ("gather_axis", Attribute::Int(0)),
            ("quantize_axis", Attribute::Int(1)),
        ];
        let op = Op::microsoft("GatherBlockQuantized", &attributes);
        Ok(self.node(op, "/model/embed_tokens/GatherBlockQuantized", &inputs))
    }

    /// x·Wᵀ with a module's weight `[rows, cols]`, plus its bias if it has one.
    fn linear(&mut self, module: &str, shape: (usize, usize), input: &str) -> Result<String> {
        let weight = self.matrix(&format!("{module}.weight"), shape)?;
        let product = self.product(module, &format!("{module}.weight"), weight, input, None);
        match self.floats(&format!("{module}.bias"), &[shape.0])? {
            None => Ok(product),
            Some(bias) => Ok(self.node(
                Op::onnx("Add", &[]),
                &format!("{}/Add", path_of(module)),
                &[&product, &bias],
            )),
        }
    }

    fn product(
        &mut self,
        module: &str,
        tensor: &str,
        weight: &Weight,
        input: &str,
        output: Option<&str>,
    ) -> String {
        let name = format!("{}/MatMul", path_of(module));
        let output = output.map_or(format!("{name}/output_0"), Into::into);
        match weight {
            Weight::Floats { shape, element } => {
                self.external(tensor, tensor, *element, shape);
                let floats = self.as_f32(tensor, *element);
                let transposed = [("transB", Attribute::Int(1))];
                let op = Op::microsoft("FusedMatMul", &transposed);
                self.node_to(op, &name, &[input, &floats], &[&output]);
            }
            Weight::Blocks(format) => {
                let names = SUFFIXES.map(|suffix| format!("{tensor}{suffix}"));
                let (n, blocks) = (format.rows, format.blocks());
                let codes = [n, blocks, format.block_bytes()];
                self.external(&names[0], &names[0], ElementType::U8, &codes);
                self.external(&names[1], &names[1], ElementType::F32, &[n * blocks]);
                let mut inputs = vec![input, &names[0], &names[1]];
                if format.zero_points {
                    let shape = [n * format.zero_point_bytes()];
                    self.external(&names[2], &names[2], ElementType::U8, &shape);
                    inputs.push(&names[2]);
                }
                let attributes = [
                    ("K", Attribute::Int(format.cols as i64)),
                    ("N", Attribute::Int(n as i64)),
                    ("bits", Attribute::Int(format.bits as i64)),
                    ("block_size", Attribute::Int(format.block as i64)),
                ];
                let op = Op::microsoft("MatMulNBits", &attributes);
                self.node_to(op, &name, &inputs, &[&output]);
            }
        }
        output
    }

    /// RMS norm over the last dimension.
    fn norm(&mut self, tensor: &str, width: usize, input: &str) -> Result<String> {
        let Some(weight) = self.floats(tensor, &[width])? else {
            return Err(self.refuse(tensor, "a norm of the model", "none").into());
        };
        let attributes = [
            ("axis", Attribute::Int(-1)),
            ("epsilon", Attribute::Float(self.facts.norm_eps)),
        ];
        let op = Op::onnx("RMSNormalization", &attributes);
        let name = format!("{}/RMSNormalization", path_of(tensor));
        Ok(self.node(op, &name, &[input, &weight]))
    }

    /// `hidden + added`, and its RMS norm: (normed, sum).
    fn add_and_norm(
        &mut self,
        tensor: &str,
        hidden: &str,
        added: Option<&str>,
    ) -> Result<(String, String)> {
        let width = self.facts.hidden;
        let Some(added) = added else {
            return Ok((self.norm(tensor, width, hidden)?, hidden.into()));
        };
        let Some(weight) = self.floats(tensor, &[width])? else {
            return Err(self.refuse(tensor, "a norm of the model", "none").into());
        };
        let name = format!("{}/SkipLayerNorm", path_of(tensor));
        let (normed, sum) = (format!("{name}/output_0"), format!("{name}/output_3"));
        let attributes = [("epsilon", Attribute::Float(self.facts.norm_eps))];
        let op = Op::microsoft("SkipSimplifiedLayerNormalization", &attributes);
        let inputs = [hidden, added, &weight];
        self.node_to(op, &name, &inputs, &[&normed, "", "", &sum]);
        Ok((normed, sum))
    }

    /// RMS norm of each head of q or k, in a graph that has one.
    fn head_norm(&mut self, module: &str, heads: usize, input: String) -> Result<String> {
        let tensor = format!("{module}.weight");
        if !self.facts.graph.head_norms {
            return Ok(input);
        }
        let (dim, name) = (self.facts.head_dim, path_of(module));
        let split = [0, 0, heads as i64, dim as i64];
        let split = self.constant(&format!("/model/constants/heads_{heads}"), &[4], &split);
        let joined = [0, 0, (heads * dim) as i64];
        let joined = self.constant(&format!("/model/constants/joined_{heads}"), &[3], &joined);
        let reshape = Op::onnx("Reshape", &[]);
        let input = self.node(reshape, &format!("{name}/Reshape_1"), &[&input, &split]);
        let normed = self.norm(&tensor, dim, &input)?;
        let reshape = Op::onnx("Reshape", &[]);
        Ok(self.node(reshape, &format!("{name}/Reshape_2"), &[&normed, &joined]))
    }

    fn attention(&mut self, layer: usize, input: &str) -> Result<String> {
        let facts = self.facts;
        let module = format!("model.layers.{layer}.self_attn");
        let (width, kv_width) = (
            facts.heads * facts.head_dim,
            facts.kv_heads * facts.head_dim,
        );
        let q = self.linear(&format!("{module}.q_proj"), (width, facts.hidden), input)?;
        let k = self.linear(&format!("{module}.k_proj"), (kv_width, facts.hidden), input)?;
        let v = self.linear(&format!("{module}.v_proj"), (kv_width, facts.hidden), input)?;
        let q = self.head_norm(&format!("{module}.q_norm"), facts.heads, q)?;
        let k = self.head_norm(&format!("{module}.k_norm"), facts.kv_heads, k)?;
        let attributes = [
            ("num_heads", Attribute::Int(facts.heads as i64)),
            ("kv_num_heads", Attribute::Int(facts.kv_heads as i64)),
            ("do_rotary", Attribute::Int(1)),
            ("rotary_interleaved", Attribute::Int(0)),
        ];
        let op = Op::microsoft("GroupQueryAttention", &attributes);
        let name = format!("{}/GroupQueryAttention", path_of(&module));
        let past = ["key", "value"].map(|kind| format!("past_key_values.{layer}.{kind}"));
        let present = ["key", "value"].map(|kind| format!("present.{layer}.{kind}"));
        let output = format!("{name}/output_0");
        let [cos, sin] = ROTARY;
        let inputs = [&q, &k, &v, &past[0], &past[1], LENGTHS, TOTAL, cos, sin];
        self.node_to(op, &name, &inputs, &[&output, &present[0], &present[1]]);
        let norm = format!("{module}.attn_sub_norm.weight");
        let output = match facts.graph.sub_norms {
            true => self.norm(&norm, width, &output)?,
            false => output,
        };
        self.linear(&format!("{module}.o_proj"), (facts.hidden, width), &output)
    }

    fn feed_forward(&mut self, layer: &str, input: &str) -> Result<String> {
        let (module, facts) = (format!("{layer}.mlp"), self.facts);
        let shape = (facts.ffn, facts.hidden);
        let gate = self.linear(&format!("{module}.gate_proj"), shape, input)?;
        let up = self.linear(&format!("{module}.up_proj"), shape, input)?;
        let path = path_of(&module);
        let act = format!("{path}/act_fn");
        let gate = match facts.activation {
            Activation::Silu => {
                let sigmoid = Op::onnx("Sigmoid", &[]);
                let sigmoid = self.node(sigmoid, &format!("{act}/Sigmoid"), &[&gate]);
                self.node(
                    Op::onnx("Mul", &[]),
                    &format!("{act}/Mul"),
                    &[&gate, &sigmoid],
                )
            }
            Activation::Relu2 => {
                let relu = self.node(Op::onnx("Relu", &[]), &format!("{act}/Relu"), &[&gate]);
                self.node(Op::onnx("Mul", &[]), &format!("{act}/Mul"), &[&relu, &relu])
            }
            // Facts::read refuses it.
            Activation::GeluTanh => gate,
        };
        let product = Op::onnx("Mul", &[]);
        let product = self.node(product, &format!("{path}/Mul"), &[&gate, &up]);
        let norm = format!("{module}.ffn_sub_norm.weight");
        let product = match facts.graph.sub_norms {
            true => self.norm(&norm, facts.ffn, &product)?,
            false => product,
        };
        self.linear(
            &format!("{module}.down_proj"),
            (facts.hidden, facts.ffn),
            &product,
        )
    }

    fn head(&mut self, input: &str) -> Result<()> {
        let shape = (self.facts.vocab, self.facts.hidden);
        let tensor = match self.facts.tied {
            true => {
                // A copy of the embedding, or one that nothing reads: `Source` has compared them.
                self.find(HEAD);
                EMBEDDING
            }
            false => HEAD,
        };
        let weight = self.matrix(tensor, shape)?;
        self.product("lm_head", tensor, weight, input, Some("logits"));
        Ok(())
    }

    /// The model, if each tensor has a place in it.
    fn finish(self) -> Result<Model> {
        match self
            .weights
            .keys()
            .find(|name| !self.used.contains(name.as_str()))
        {
            Some(name) => {
                let expected = format!(
                    "a tensor that the graph of {} has; {DATA} and its graph hold the whole model",
                    self.facts.architecture.name
                );
                Err(self
                    .refuse(name, expected, "one that it does not have")
                    .into())
            }
            None => Ok(self.model),
        }
    }
}

impl Weight {
    fn shape(&self) -> Vec<usize> {
        match self {
            Self::Floats { shape, .. } => shape.clone(),
            Self::Blocks(format) => vec![format.rows, format.cols],
        }
    }
}

/// An operator with its attributes.
#[derive(Clone, Copy)]
struct Op<'a> {
    name: &'static str,
    domain: Domain,
    attributes: &'a [(&'static str, Attribute)],
}

impl<'a> Op<'a> {
    fn onnx(name: &'static str, attributes: &'a [(&'static str, Attribute)]) -> Self {
        let domain = Domain::Onnx;
        Self {
            name,
            domain,
            attributes,
        }
    }

    fn microsoft(name: &'static str, attributes: &'a [(&'static str, Attribute)]) -> Self {
        let domain = Domain::Microsoft;
        Self {
            name,
            domain,
            attributes,
        }
    }
}

/// The path of a module's nodes, as onnxruntime-genai names them: `/model/layers.0/mlp/up_proj`.
fn path_of(module: &str) -> String {
    let mut path = String::new();
    for part in module.trim_end_matches(".weight").split('.') {
        let number = part.bytes().all(|b| b.is_ascii_digit());
        path.push(if number { '.' } else { '/' });
        path += part;
    }
    path
}
