//! Which stream of ternary weights is faster on this machine.

use super::activations::PrepackedActivations;
use super::coding::Stream;
use super::prepacked::Prepacked;
use super::shape::PANEL;
use crate::isa::Isa;
use crate::kernels::Kernels;
use crate::parallel::lock;
use crate::pool::Pool;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What [`Stream::auto`] found, by instruction set and threads.
static MEASURED: Mutex<BTreeMap<(Isa, usize), Stream>> = Mutex::new(BTreeMap::new());

impl Stream {
    /// The faster of the two for one token and more weights than caches hold, on this machine.
    /// Measured at the first call for the instruction set and number of threads, with 128 MiB in
    /// part of a second, and remembered.
    pub fn auto(kernels: &Kernels, pool: &Pool) -> Self {
        let mut measured = lock(&MEASURED);
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
        let panel = MatrixSpec::new(PANEL, COLS, Precision::Ternary, Granularity::Tensor);
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
        let w = one.repeated(ROWS / PANEL);
        let Ok(x) = PrepackedActivations::from_values(&vec![1; COLS], &[1.0], &w) else {
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
