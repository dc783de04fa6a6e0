//! A decoder as an ONNX graph for onnxruntime.
//!
//! [`Facts`] are read from config.json, [`graph::build`] makes the nodes, and `plan/onnx.rs` says
//! what each tensor becomes. Names of inputs and outputs are those of onnxruntime-genai.

mod facts;
mod genai;
mod graph;
mod rotary;

pub(crate) use facts::Facts;
pub(crate) use genai::genai_config;
pub(crate) use graph::build;
pub(crate) use rotary::{RotaryFunction, RotaryTable};

use bitnet_formats::onnx::{BlockFormat, ElementType};

/// The graph.
pub(crate) const MODEL: &str = "model.onnx";
/// The weights, a safetensors file.
pub(crate) const DATA: &str = "model.onnx.data";
/// What onnxruntime-genai reads.
pub(crate) const GENAI: &str = "genai_config.json";
/// Stored names of the tables of rotary positions.
pub(crate) const ROTARY: [&str; 2] = ["cos_cache", "sin_cache"];

/// How the data file holds a tensor of the model.
#[derive(Debug, Clone)]
pub(crate) enum Weight {
    /// Floats, under the tensor's name.
    Floats {
        shape: Vec<usize>,
        element: ElementType,
    },
    /// Low-bit blocks, under the tensor's name with [`SUFFIXES`].
    Blocks(BlockFormat),
}

/// Endings of the stored names of codes, scales and zero points.
pub(crate) const SUFFIXES: [&str; 3] = ["_codes", "_scales", "_zero_points"];
