//! The cache of a sequence: keys and values of earlier tokens, and the states of gated delta nets.

use crate::Config;
use bitnet_formats::arch::TokenMixer;
use bitnet_kernels::dense::{Cached, DeltaTokens};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// Type of the keys and values in a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheType {
    /// f32, lossless.
    F32,
    /// f16.
    #[default]
    F16,
    /// 8-bit integers with one scale per position and head.
    Int8,
}

bitnet_core::named!(CacheType, "cache type", {
    F32 = "f32",
    F16 = "f16",
    Int8 = "int8",
});

/// Keys or values of one layer, `[kv_heads, capacity, head_dim]`.
#[derive(Debug, Clone)]
enum Store {
    F32(Vec<f32>),
    F16(Vec<u16>),
    /// Values, and scales of `[kv_heads, capacity]`.
    Int8(Vec<i8>, Vec<f32>),
}

/// What a layer keeps of a sequence.
#[derive(Debug, Clone)]
enum LayerCache {
    /// Keys and values.
    Attention([Store; 2]),
    /// The last inputs of the convolution of a gated delta net, `[taps − 1, channels]`, and its
    /// state, as [`DeltaTokens`] describes it, of each value head. Both are f32 in every cache: they
    /// are changed at each token, and would be rounded as often.
    DeltaNet(Vec<f32>, Vec<f32>),
}

/// Keys and values of one sequence in all layers, and states of those that are gated delta nets.
///
/// Keys and values of earlier tokens stay as they are, so a cache of them can be cut back to any
/// length. A state holds all tokens at once: [`KvCache::truncate`] can only empty it.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    pub(crate) len: usize,
}

impl KvCache {
    /// An empty cache for `capacity` positions.
    pub fn new(config: &Config, capacity: usize, kind: CacheType) -> Self {
        let positions = config.kv_heads * capacity;
        let elements = positions * config.head_dim;
        let store = || match kind {
            CacheType::F32 => Store::F32(vec![0.0; elements]),
            CacheType::F16 => Store::F16(vec![0; elements]),
            CacheType::Int8 => Store::Int8(vec![0; elements], vec![0.0; positions]),
        };
        let layer = |mixer: TokenMixer| match (mixer, config.delta) {
            (TokenMixer::DeltaNet, Some(shape)) => {
                let state = DeltaTokens::state_len(shape.key_dim, shape.value_dim);
                let inputs = (shape.taps - 1) * shape.conv_width();
                LayerCache::DeltaNet(vec![0.0; inputs], vec![0.0; shape.value_heads * state])
            }
            _ => LayerCache::Attention([store(), store()]),
        };
        let layers = config.attention.iter().map(|l| layer(l.mixer)).collect();
        Self {
            layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            capacity,
            len: 0,
        }
    }

    /// Number of filled positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is filled.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Largest number of positions.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Drops all positions from `len` on and returns how many are left: `len`, or fewer if there
    /// were fewer. A cache with the state of a gated delta net cannot go back to an earlier length:
    /// if it has more than `len` positions, it drops all, and the tokens have to be computed again.
    pub fn truncate(&mut self, len: usize) -> usize {
        if len < self.len {
            self.len = if self.has_states() { 0 } else { len };
        }
        if self.len == 0 {
            self.clear_states();
        }
        self.len
    }

    /// Whether a layer has a state, which no earlier length can be taken from.
    pub fn has_states(&self) -> bool {
        let state = |layer: &LayerCache| matches!(layer, LayerCache::DeltaNet(..));
        self.layers.iter().any(state)
    }

    fn clear_states(&mut self) {
        for layer in &mut self.layers {
            if let LayerCache::DeltaNet(inputs, states) = layer {
                inputs.fill(0.0);
                states.fill(0.0);
            }
        }
    }

    /// Empties a cache whose states a forward pass left half way.
    pub(crate) fn abandon(&mut self) {
        if self.has_states() {
            self.truncate(0);
        }
    }

    /// Size in bytes, all layers.
    pub fn bytes(&self) -> usize {
        let store = |s: &Store| match s {
            Store::F32(v) => 4 * v.len(),
            Store::F16(v) => 2 * v.len(),
            Store::Int8(v, s) => v.len() + 4 * s.len(),
        };
        let layer = |layer: &LayerCache| match layer {
            LayerCache::Attention(stores) => stores.iter().map(store).sum::<usize>(),
            LayerCache::DeltaNet(inputs, states) => 4 * (inputs.len() + states.len()),
        };
        self.layers.iter().map(layer).sum()
    }

    /// Writes the key and the value of one token for all heads.
    pub(crate) fn write(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let (d, capacity) = (self.head_dim, self.capacity);
        let LayerCache::Attention(stores) = &mut self.layers[layer] else {
            return;
        };
        for (store, x) in stores.iter_mut().zip([key, value]) {
            for (head, x) in x.chunks_exact(d).enumerate() {
                let at = head * capacity + position;
                match store {
                    Store::F32(all) => all[at * d..][..d].copy_from_slice(x),
                    Store::F16(all) => {
                        all[at * d..][..d]
                            .reinterpret_cast_mut::<half::f16>()
                            .convert_from_f32_slice(x);
                    }
                    Store::Int8(all, scales) => {
                        let top = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        let inverse = if top > 0.0 { 127.0 / top } else { 0.0 };
                        scales[at] = top / 127.0;
                        all[at * d..][..d]
                            .iter_mut()
                            .zip(x)
                            .for_each(|(to, &x)| *to = (x * inverse).round_ties_even() as i8);
                    }
                }
            }
        }
    }

    /// Keys and values of one head.
    pub(crate) fn head(&self, layer: usize, head: usize) -> [Cached<'_>; 2] {
        let (d, capacity) = (self.head_dim, self.capacity);
        debug_assert!(head < self.kv_heads);
        let elements = head * capacity * d..(head + 1) * capacity * d;
        let LayerCache::Attention(stores) = &self.layers[layer] else {
            return [Cached::F32(&[]); 2];
        };
        stores.each_ref().map(|store| match store {
            Store::F32(all) => Cached::F32(&all[elements.clone()]),
            Store::F16(all) => Cached::F16(&all[elements.clone()]),
            Store::Int8(all, scales) => Cached::Int8(
                &all[elements.clone()],
                &scales[head * capacity..][..capacity],
            ),
        })
    }

    /// The last inputs of the convolution and the states of a gated delta net.
    pub(crate) fn delta_state(&mut self, layer: usize) -> (&mut [f32], &mut [f32]) {
        match &mut self.layers[layer] {
            LayerCache::DeltaNet(inputs, states) => (inputs, states),
            LayerCache::Attention(_) => (&mut [], &mut []),
        }
    }
}
