//! The KV cache: keys and values of earlier tokens.

use crate::Config;
use bitnet_kernels::dense::Cached;
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

/// Keys and values of one sequence in all layers.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<[Store; 2]>,
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
        let layers = (0..config.layers).map(|_| [store(), store()]).collect();
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

    /// Drops all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Size in bytes, all layers.
    pub fn bytes(&self) -> usize {
        let store = |s: &Store| match s {
            Store::F32(v) => 4 * v.len(),
            Store::F16(v) => 2 * v.len(),
            Store::Int8(v, s) => v.len() + 4 * s.len(),
        };
        self.layers.iter().flatten().map(store).sum()
    }

    /// Writes the key and the value of one token for all heads.
    pub(crate) fn write(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let (d, capacity) = (self.head_dim, self.capacity);
        for (store, x) in self.layers[layer].iter_mut().zip([key, value]) {
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
        self.layers[layer].each_ref().map(|store| match store {
            Store::F32(all) => Cached::F32(&all[elements.clone()]),
            Store::F16(all) => Cached::F16(&all[elements.clone()]),
            Store::Int8(all, scales) => Cached::Int8(
                &all[elements.clone()],
                &scales[head * capacity..][..capacity],
            ),
        })
    }
}
