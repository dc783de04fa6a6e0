//! F8 values or signed bytes times scales: of the tensor, of each row, or of blocks.

use super::decode::Loaded;
use crate::Result;
use crate::dtype::StoredType;
use crate::storage::Storage;
use crate::tensor::StoredId;

#[derive(Debug)]
pub(crate) struct Scaled {
    pub(super) values: StoredId,
    pub(super) scale: StoredId,
    /// Elements of each dimension that share a scale.
    pub(super) block: Vec<usize>,
    pub(super) shape: Vec<usize>,
    pub(super) cols: usize,
}

impl Scaled {
    pub(super) fn load(&self, storage: &Storage) -> Result<Loaded> {
        let scales = storage.floats(self.scale)?;
        Ok(Loaded {
            scales,
            ..Loaded::default()
        })
    }

    /// `w[r, c] = value[r, c] · scale[r / block, c / block]`.
    pub(super) fn row(
        &self,
        storage: &Storage,
        loaded: &Loaded,
        row: usize,
        bytes: &mut Vec<u8>,
        out: &mut [f32],
    ) -> Result<()> {
        let start = row * self.cols;
        if storage.stored(self.values).dtype == StoredType::I8 {
            bytes.resize(self.cols, 0);
            storage.read(self.values, start as u64, bytes)?;
            let values = bytes.iter().map(|&b| f32::from(b as i8));
            out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
        } else {
            storage.read_floats(self.values, start..start + self.cols, bytes, out)?;
        }
        // The first scale of the row: leading dimensions in row-major order.
        let (last, leading) = (self.shape.len() - 1, &self.shape[..self.shape.len() - 1]);
        let mut rest = row;
        let (mut first, mut stride) = (0, self.shape[last].div_ceil(self.block[last]));
        for (&n, &block) in leading.iter().zip(&self.block).rev() {
            first += rest % n / block * stride;
            rest /= n;
            stride *= n.div_ceil(block);
        }
        let scales = loaded.scales[first..].iter();
        for (out, scale) in out.chunks_mut(self.block[last]).zip(scales) {
            out.iter_mut().for_each(|w| *w *= scale);
        }
        Ok(())
    }
}
