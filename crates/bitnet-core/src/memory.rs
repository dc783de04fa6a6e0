//! Packed matrices that know their layout, and a pool of scratch memory.

use crate::pack::{self, Layout};
use crate::{Matrix, MatrixSpec, Result};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A matrix in the bytes of a wire layout, with its scales as they are stored.
///
/// ```
/// use bitnet_core::memory::BitNetTensor;
/// use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, pack};
/// let spec = MatrixSpec::new(2, 8, Precision::Ternary, Granularity::Channel);
/// let matrix = Matrix { spec, values: [1, 0, -1, 1].repeat(4), scales: vec![0.5, 2.0], zero_points: vec![] };
/// let packed = BitNetTensor::pack(&matrix, Some(pack::by_name("two-bit")?))?;
/// assert_eq!(packed.memory_footprint(), 4 + 8); // two bits for each of 16 values, two f32 scales
/// assert_eq!(packed.unpack()?, matrix);
/// # Ok::<(), bitnet_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct BitNetTensor {
    spec: MatrixSpec,
    layout: &'static dyn Layout,
    bytes: Vec<u8>,
    /// Little-endian scales of `spec.scale_dtype`; empty where the layout carries them.
    scales: Vec<u8>,
    zero_points: Vec<f32>,
}

impl BitNetTensor {
    /// Packs a matrix, with `None` in the smallest of our own layouts.
    ///
    /// # Errors
    /// What [`Matrix::validate`] and [`Layout::pack_into`] find.
    pub fn pack(matrix: &Matrix, layout: Option<&'static dyn Layout>) -> Result<Self> {
        matrix.validate()?;
        let (layout, bytes) = match layout {
            None => pack::auto(&matrix.spec, &matrix.values, &matrix.scales)?,
            Some(layout) => {
                let mut bytes = vec![];
                layout.pack_into(&matrix.spec, &matrix.values, &matrix.scales, &mut bytes)?;
                (layout, bytes)
            }
        };
        let mut scales = vec![];
        if !layout.stores_scales() {
            matrix
                .scales
                .iter()
                .for_each(|&s| matrix.spec.scale_dtype.write(s, &mut scales));
        }
        Ok(Self {
            spec: matrix.spec.clone(),
            layout,
            bytes,
            scales,
            zero_points: matrix.zero_points.clone(),
        })
    }

    /// Unpacks values and scales.
    ///
    /// # Errors
    /// Those of [`Layout::unpack`].
    pub fn unpack(&self) -> Result<Matrix> {
        let unpacked = self.layout.unpack(&self.spec, &self.bytes)?;
        let scales = match unpacked.scales {
            Some(scales) => scales,
            None => self
                .scales
                .chunks_exact(self.spec.scale_dtype.bytes())
                .map(|b| self.spec.scale_dtype.read(b))
                .collect(),
        };
        let matrix = Matrix {
            spec: self.spec.clone(),
            values: unpacked.values,
            scales,
            zero_points: self.zero_points.clone(),
        };
        matrix.validate()?;
        Ok(matrix)
    }

    /// Shape and conventions.
    pub fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    /// The wire layout.
    pub fn layout(&self) -> &'static dyn Layout {
        self.layout
    }

    /// The packed values.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of values, scales and zero points. Integer zero points count one byte each, as they
    /// are stored.
    pub fn memory_footprint(&self) -> usize {
        self.bytes.len() + self.scales.len() + self.zero_points.len() * self.spec.zero_point_bytes()
    }
}

/// Scratch memory for many threads: slices that begin at a multiple of 64 bytes and go back to the
/// pool when they are dropped.
///
/// Lengths are rounded up to powers of two, each with its own stack and lock. Memory is allocated
/// only when the stack is empty, and never freed before the pool.
///
/// ```
/// use bitnet_core::memory::HybridMemoryPool;
/// let pool = HybridMemoryPool::new();
/// pool.take(1000)[0] = 1.0;
/// let again = pool.take(600); // the same memory, with unspecified contents
/// assert_eq!((again.len(), pool.allocations()), (600, 1));
/// ```
pub struct HybridMemoryPool {
    /// One stack of buffers for each power of two.
    shelves: [Mutex<Vec<Vec<f32>>>; usize::BITS as usize],
    buffers: AtomicUsize,
    bytes: AtomicUsize,
}

/// Alignment of pooled memory, a cache line.
const ALIGN: usize = 64;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while the lock is held leaves the stack valid.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for HybridMemoryPool {
    fn default() -> Self {
        let shelves = std::array::from_fn(|_| Mutex::new(vec![]));
        Self {
            shelves,
            buffers: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
        }
    }
}

impl HybridMemoryPool {
    /// An empty pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// `len` floats with unspecified contents.
    pub fn take(&self, len: usize) -> PooledFloats<'_> {
        let class = len.max(ALIGN).next_power_of_two();
        let shelf = &self.shelves[class.ilog2() as usize];
        let taken = lock(shelf).pop();
        let buffer = taken.unwrap_or_else(|| {
            let buffer = vec![0.0; class + ALIGN / size_of::<f32>()];
            self.buffers.fetch_add(1, Ordering::Relaxed);
            self.bytes
                .fetch_add(size_of_val(&buffer[..]), Ordering::Relaxed);
            buffer
        });
        let start = match buffer.as_ptr().align_offset(ALIGN) {
            offset if offset < ALIGN => offset,
            // The specification of `align_offset` allows it to know nothing.
            _ => 0,
        };
        PooledFloats {
            shelf,
            buffer,
            start,
            len,
        }
    }

    /// Buffers that were ever allocated.
    pub fn allocations(&self) -> usize {
        self.buffers.load(Ordering::Relaxed)
    }

    /// Bytes that the pool owns, lent ones included.
    pub fn memory_footprint(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for HybridMemoryPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "HybridMemoryPool {{ {} buffers, {} bytes }}",
            self.allocations(),
            self.memory_footprint()
        )
    }
}

/// Floats lent by a pool.
pub struct PooledFloats<'a> {
    shelf: &'a Mutex<Vec<Vec<f32>>>,
    buffer: Vec<f32>,
    start: usize,
    len: usize,
}

impl Deref for PooledFloats<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[self.start..][..self.len]
    }
}

impl DerefMut for PooledFloats<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[self.start..][..self.len]
    }
}

impl Drop for PooledFloats<'_> {
    fn drop(&mut self) {
        lock(self.shelf).push(std::mem::take(&mut self.buffer));
    }
}

impl fmt::Debug for PooledFloats<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_and_comes_back() {
        let pool = HybridMemoryPool::new();
        for len in [0, 1, 63, 64, 65, 1000, 4096] {
            let floats = pool.take(len);
            assert_eq!((floats.len(), floats.as_ptr() as usize % 64), (len, 0));
        }
        let before = (pool.allocations(), pool.memory_footprint());
        for len in [0, 64, 65, 700, 4000] {
            pool.take(len).fill(1.0);
        }
        assert_eq!((pool.allocations(), pool.memory_footprint()), before);
        let (a, b) = (pool.take(10), pool.take(10));
        assert_ne!(a.as_ptr(), b.as_ptr());
    }
}
