//! The sizes of gated delta nets, from a config.json.

use super::layers::{LayerAttention, TokenMixer};
use super::values::HfConfig;
use crate::Result;

/// Largest number of taps of the convolution: that many rows are kept for each sequence.
pub(super) const MAX_TAPS: usize = 64;

/// Largest number of heads, and of elements of a head.
pub(super) const MAX_HEADS: usize = 1 << 12;

/// Largest number of elements of a layer's state, which each sequence has. The 27B has 2^19.6.
const MAX_STATE: usize = 1 << 25;

/// Sizes of the gated delta nets of a decoder. `bitnet-inference`'s `arch/delta.rs` has the
/// equations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaShape {
    /// Heads of q and k.
    pub key_heads: usize,
    /// Heads of v and of the state; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Elements of a head of q and k.
    pub key_dim: usize,
    /// Elements of a head of v.
    pub value_dim: usize,
    /// Taps of the convolution.
    pub taps: usize,
}

impl DeltaShape {
    /// The sizes that a config.json has for its gated delta nets, or those of Hugging Face's
    /// configuration class; none if no layer is one.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key that is no positive number, and for heads
    /// that do not divide.
    pub fn read(config: &HfConfig, layers: &[LayerAttention]) -> Result<Option<Self>> {
        if layers.iter().all(|l| l.mixer != TokenMixer::DeltaNet) {
            return Ok(None);
        }
        let size = |key: &str, default: usize, most: usize| {
            let n = config.optional_size(key)?.unwrap_or(default);
            match n <= most {
                true => Ok(n),
                false => Err(config.bad(key, &format!("at most {most}"))),
            }
        };
        let shape = Self {
            key_heads: size("linear_num_key_heads", 16, MAX_HEADS)?,
            value_heads: size("linear_num_value_heads", 32, MAX_HEADS)?,
            key_dim: size("linear_key_head_dim", 128, MAX_HEADS)?,
            value_dim: size("linear_value_head_dim", 128, MAX_HEADS)?,
            taps: size("linear_conv_kernel_dim", 4, MAX_TAPS)?,
        };
        if shape.value_width() * shape.key_dim > MAX_STATE {
            let expected = format!("a state of at most {MAX_STATE} elements in a layer");
            return Err(config.bad("linear_value_head_dim", &expected));
        }
        if !shape.value_heads.is_multiple_of(shape.key_heads) {
            let expected = format!("a multiple of linear_num_key_heads {}", shape.key_heads);
            return Err(config.bad("linear_num_value_heads", &expected));
        }
        Ok(Some(shape))
    }

    /// Elements of q or of k, all heads.
    pub const fn key_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Elements of v, all heads.
    pub const fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Elements of q, k and v, which pass through the convolution.
    pub const fn conv_width(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Value heads of a key head.
    pub const fn values_per_key(&self) -> usize {
        self.value_heads / self.key_heads
    }
}
