//! Which stream of ternary weights.

use super::{Activations, Prepacked};
use crate::{Isa, Kernels, Pool};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many bits of memory a ternary weight takes in the kernel layout. The sums are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Four in a byte: the fastest out of a cache, and what float activations take.
    TwoBit,
    /// Five in a byte, 1.6 bits: a fifth less to read, and more work for each weight. Scale groups
    /// that are no multiple of 20 columns are padded.
    Trits,
}

/// What [`Stream::auto`] found, by instruction set and threads.
static MEASURED: Mutex<BTreeMap<(Isa, usize), Stream>> = Mutex::new(BTreeMap::new());

impl Stream {
    /// The faster of the two for one token and more weights than caches hold, on this machine.
    /// Measured at the first call for the instruction set and number of threads, with 128 MiB in
    /// part of a second, and remembered.
    pub fn auto(kernels: &Kernels, pool: &Pool) -> Self {
        let mut measured = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
        *measured
            .entry((kernels.isa(), pool.threads()))
            .or_insert_with(|| {
                let (two_bit, trits) = (
                    Self::TwoBit.time(kernels, pool),
                    Self::Trits.time(kernels, pool),
                );
                if trits < two_bit {
                    Self::Trits
                } else {
                    Self::TwoBit
                }
            })
    }

    /// The shortest of some products.
    fn time(self, kernels: &Kernels, pool: &Pool) -> Duration {
        const ROWS: usize = 1 << 15;
        const COLS: usize = 1 << 14;
        const TURNS: usize = 5;
        // Rows of one panel, repeated: the kernels do not look at the values.
        let panel = MatrixSpec::new(super::PANEL, COLS, Precision::Ternary, Granularity::Tensor);
        let values = (0..panel.values_len())
            .map(|i| (i * 7 % 3) as i8 - 1)
            .collect();
        let matrix = Matrix {
            values,
            scales: vec![1.0],
            zero_points: vec![],
            spec: panel,
        };
        let Ok(one) = Prepacked::with_stream(&matrix, self, pool) else {
            return Duration::MAX;
        };
        let w = one.repeated(ROWS / super::PANEL);
        let Ok(x) = Activations::from_values(&vec![1; COLS], &[1.0], &w) else {
            return Duration::MAX;
        };
        let mut y = vec![0.0; w.rows()];
        let turn = |y: &mut [f32]| {
            let begin = Instant::now();
            kernels.matmul(pool, &w, &x, None, y);
            begin.elapsed()
        };
        (0..TURNS)
            .map(|_| turn(&mut y))
            .min()
            .unwrap_or(Duration::MAX)
    }
}
