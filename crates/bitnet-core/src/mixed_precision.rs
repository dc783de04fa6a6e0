//! Kinds of layers, their parts, and the precision of each part.

use crate::{Error, Precision, Result, named};

/// Kinds of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LayerType {
    /// `y = x·Wᵀ`, W of shape `[out, in]`.
    #[default]
    Linear,
    /// Convolution over one or two axes, W of shape `[out, in / groups, …]`.
    Convolution,
    /// A table of rows that tokens select, `[vocabulary, width]`.
    Embedding,
    /// Normalization, a vector of gains.
    Normalization,
}

named!(LayerType, "layer type", {
    Linear = "linear",
    Convolution = "convolution",
    Embedding = "embedding",
    Normalization = "normalization",
});

/// Parts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ComponentType {
    /// The weight matrix.
    Weights,
    /// The layer's input.
    Activations,
    /// The vector added to the output.
    Bias,
}

named!(ComponentType, "component", {
    Weights = "weights",
    Activations = "activations",
    Bias = "bias",
});

impl LayerType {
    /// The precision of a component by default; `None`: it stays float.
    ///
    /// Matrices become ternary and their inputs int8 (b1.58). Tables become int8: a row that is
    /// looked up is used alone, so its errors do not average out. Gains and biases stay float: they
    /// are small.
    pub const fn default_precision(self, component: ComponentType) -> Option<Precision> {
        match (self, component) {
            (Self::Linear | Self::Convolution, ComponentType::Weights) => Some(Precision::Ternary),
            (Self::Linear | Self::Convolution, ComponentType::Activations)
            | (Self::Embedding, ComponentType::Weights) => Some(Precision::Int8),
            _ => None,
        }
    }
}

/// One layer: its kind and shapes, and the precisions that differ from those of its kind.
///
/// ```
/// use bitnet_core::Precision;
/// use bitnet_core::mixed_precision::{ComponentType, LayerPrecisionSpec, LayerType};
/// let conv = LayerPrecisionSpec {
///     layer_id: "conv1".into(),
///     layer_type: LayerType::Convolution,
///     input_shape: vec![1, 3, 224, 224],
///     output_shape: vec![1, 64, 112, 112],
///     weight_shape: vec![64, 3, 7, 7],
///     ..Default::default()
/// };
/// conv.validate()?;
/// assert_eq!(conv.precision(ComponentType::Weights), Some(Precision::Ternary));
/// # Ok::<(), bitnet_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerPrecisionSpec {
    /// Its name.
    pub layer_id: String,
    /// Its kind.
    pub layer_type: LayerType,
    /// Shape of the input, batch first; empty if unknown.
    pub input_shape: Vec<usize>,
    /// Shape of the output, batch first; empty if unknown.
    pub output_shape: Vec<usize>,
    /// Shape of the weights, output features first.
    pub weight_shape: Vec<usize>,
    /// Precision of the weights; `None` for [`LayerType::default_precision`].
    pub weights: Option<Precision>,
    /// Precision of the activations: [`Precision::Int8`], [`Precision::Int4`] or
    /// [`Precision::Binary`] (signs); `None` for the default.
    pub activations: Option<Precision>,
}

impl LayerPrecisionSpec {
    /// The precision of a component; `None`: it stays float.
    pub fn precision(&self, component: ComponentType) -> Option<Precision> {
        let own = match component {
            ComponentType::Weights => self.weights,
            ComponentType::Activations => self.activations,
            ComponentType::Bias => None,
        };
        own.or(self.layer_type.default_precision(component))
    }

    /// Checks that the shapes fit one another and that the precision of activations exists.
    ///
    /// # Errors
    /// [`Error::Scheme`] naming the layer and the two numbers that differ.
    pub fn validate(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Scheme(format!("layer '{}': {what}", self.layer_id)));
        let (w, x, y) = (&self.weight_shape, &self.input_shape, &self.output_shape);
        let dims = match self.layer_type {
            LayerType::Linear | LayerType::Embedding => 2..=2,
            LayerType::Convolution => 3..=4,
            LayerType::Normalization => 1..=1,
        };
        if !dims.contains(&w.len()) {
            return wrong(format!(
                "{} weights with {} to {} dimensions, got shape {w:?}",
                self.layer_type,
                dims.start(),
                dims.end()
            ));
        }
        // Axis of the features in input and output, and their number by the weights.
        let (input, output) = match self.layer_type {
            LayerType::Linear => (
                Some((x.len().wrapping_sub(1), w[1])),
                Some((y.len().wrapping_sub(1), w[0])),
            ),
            LayerType::Convolution => (None, Some((1, w[0]))),
            LayerType::Embedding => (None, Some((y.len().wrapping_sub(1), w[1]))),
            LayerType::Normalization => (
                Some((x.len().wrapping_sub(1), w[0])),
                Some((y.len().wrapping_sub(1), w[0])),
            ),
        };
        for (what, shape, features) in [("input", x, input), ("output", y, output)] {
            if let (Some((axis, expected)), false) = (features, shape.is_empty())
                && shape.get(axis) != Some(&expected)
            {
                return wrong(format!(
                    "{expected} {what} features for weights {w:?}, got {what} shape {shape:?}"
                ));
            }
        }
        if self.layer_type == LayerType::Convolution && !x.is_empty() {
            let channels = x.get(1).copied().unwrap_or(0);
            if w[1] == 0 || !channels.is_multiple_of(w[1]) || x.len() != w.len() {
                return wrong(format!(
                    "an input of {} dimensions with a multiple of {} channels, got {x:?}",
                    w.len(),
                    w[1]
                ));
            }
        }
        match self.activations {
            None | Some(Precision::Int8 | Precision::Int4 | Precision::Binary) => Ok(()),
            Some(other) => wrong(format!("activations int8, int4 or binary, got {other}")),
        }
    }
}
