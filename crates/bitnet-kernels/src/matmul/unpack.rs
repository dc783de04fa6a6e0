//! From the kernel layout back to values.

use super::coding::{CodeValues, unpack};
use super::{PANEL, Prepacked};
use crate::Pool;
use std::sync::{Mutex, PoisonError};

impl Prepacked {
    /// The values `[planes, N, K]` that were prepacked.
    ///
    /// ```
    /// use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
    /// use bitnet_kernels::{Pool, matmul::Prepacked};
    /// let spec = MatrixSpec::new(2, 3, Precision::Ternary, Granularity::Tensor);
    /// let values = vec![1, 0, -1, 0, 1, 1];
    /// let matrix = Matrix { spec, values, scales: vec![0.5], zero_points: vec![] };
    /// let weights = Prepacked::new(&matrix, &Pool::single())?;
    /// assert_eq!(weights.unpack(&Pool::single()), matrix.values);
    /// # Ok::<(), bitnet_kernels::Error>(())
    /// ```
    pub fn unpack(&self, pool: &Pool) -> Vec<i8> {
        let (rows, cols, planes) = (self.rows(), self.cols(), self.planes());
        let mut values = vec![0; planes * rows * cols];
        let panels: Vec<_> = values
            .chunks_mut((rows * cols).max(1))
            .flat_map(|plane| plane.chunks_mut((PANEL * cols).max(1)))
            .map(Mutex::new)
            .collect();
        let per_plane = self.panels().max(1);
        pool.run(panels.len(), |part| {
            let mut values = panels[part].lock().unwrap_or_else(PoisonError::into_inner);
            self.unpack_panel(part % per_plane, part / per_plane, &mut values);
        });
        drop(panels);
        values
    }

    /// The values of the rows of one panel in one plane.
    fn unpack_panel(&self, panel: usize, plane: usize, values: &mut [i8]) {
        let (coding, cols) = (self.coding(), self.cols());
        let offset = CodeValues::new(self.precision).offset as u8;
        let (step, quad) = (coding.step(), 4 * PANEL);
        let mut codes = vec![0; coding.step_codes()];
        for group in 0..self.groups() {
            let group_cols = self.group_cols(group);
            for (number, index) in self.group_steps(group).enumerate() {
                unpack(
                    coding,
                    self.codes(panel, plane, index..index + 1),
                    &mut codes,
                );
                let first = group_cols.start + number * step;
                let last = group_cols.end.min(first + step);
                for (row, values) in values.chunks_mut(cols).enumerate() {
                    for (codes, values) in codes
                        .chunks_exact(quad)
                        .zip(values[first..last].chunks_mut(4))
                    {
                        let codes = &codes[4 * row..];
                        values.iter_mut().zip(codes).for_each(|(value, &code)| {
                            *value = code.wrapping_sub(offset).cast_signed();
                        });
                    }
                }
            }
        }
    }
}
