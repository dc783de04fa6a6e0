//! Options of loading: types of weights in memory and of activations.

use bitnet_core::named;
use bitnet_kernels::dense::BlockType;

/// Type of the inputs of ternary layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActivationType {
    /// int8 in models whose files say that they were trained with it (architecture `bitnet`, a
    /// `quantization_config` of `bitnet`, or our recipe in the file), floats in others.
    #[default]
    Auto,
    /// 8-bit integers with one absmax scale per token.
    Int8,
    /// Floats.
    Float,
}

named!(ActivationType, "activations", {
    Auto = "auto",
    Int8 = "int8",
    Float = "float",
});

/// Type in memory of weights with float activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FloatType {
    /// Lossless. f32, f16 and bf16 stay as stored. Block types of GGUF, and quantized layers of one
    /// plane without zero points, stay integers (ternary layers in 2 bits). Other weights become
    /// f32.
    #[default]
    Exact,
    /// Rounded to bf16: an error of 2⁻⁹ of each weight, 56 dB.
    Bf16,
    /// 8-bit integers with one f16 scale per 32 columns (Q8_0): about 44 dB for normal weights.
    /// Weights stored with codes of 8 bits or fewer stay exact.
    Int8,
    /// 4-bit integers with one f16 scale per 32 columns (Q4_0): about 20 dB for normal weights.
    /// Weights stored with codes of 4 bits or fewer stay exact.
    Int4,
}

impl FloatType {
    /// Whether weights that are stored in blocks of `kind` keep them.
    pub(super) fn keeps(self, kind: BlockType) -> bool {
        match self {
            Self::Exact => true,
            Self::Bf16 => false,
            Self::Int8 => kind.codes.bits() <= 8,
            Self::Int4 => kind.codes.bits() <= 4,
        }
    }
}

named!(FloatType, "type of weights", {
    Exact = "exact",
    Bf16 = "bf16",
    Int8 = "int8",
    Int4 = "int4",
});
