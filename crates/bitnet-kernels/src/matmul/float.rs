//! Ternary weights times float activations: sums of two products looked up for each two weights.
//!
//! Nibble i of a row's lane holds the codes of two columns of its step, `c = 8 · (i mod 2) + i div
//! 2` in the lower two bits and `c + 4` in the upper two. For each of the eight nibbles of a step
//! there is a table of the 16 values that the two products can add up to:
//!
//! ```text
//! table[i][code_c + 4 · code_{c+4}] = (code_c − 1) · x_c + (code_{c+4} − 1) · x_{c+4}
//! sums[i mod 2][r] += table[i][nibble i of lane r]          i = 0 … 7, step after step
//! ```
//!
//! A table depends on the activations alone and serves every row. One rounding for each two
//! products and one for each addition, always in this order: every instruction set gives the same
//! bits.

use super::shape::{PANEL, STEP_BYTES};

/// Columns of a step of ternary weights in two bits.
pub(crate) const STEP: usize = 16;
/// Floats of the tables of a step.
pub(crate) const STEP_TABLES: usize = 8 * 16;

/// FloatSums of even and of odd nibbles.
pub(crate) type FloatSums = [[f32; PANEL]; 2];

/// The tables of consecutive steps.
#[derive(Clone, Copy)]
pub(crate) struct FloatTables<'a>(pub(crate) &'a [f32]);

impl FloatTables<'_> {
    /// Checks what every loop rests on: tables for every step of the weights.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    pub(crate) fn check(&self, weights: &[u8]) {
        assert!(
            self.0.len() >= weights.len() / STEP_BYTES * STEP_TABLES,
            "tables for every step"
        );
    }
}

/// Fills the tables of whole steps of activations.
pub(crate) fn tables(x: &[f32], out: &mut [f32]) {
    for (x, tables) in x
        .as_chunks::<STEP>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<STEP_TABLES>().0)
    {
        for (i, table) in tables.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let column = 8 * (i % 2) + i / 2;
            let (a, b) = (x[column], x[column + 4]);
            for (codes, out) in table.iter_mut().enumerate() {
                *out = ((codes % 4) as f32 - 1.0) * a + ((codes / 4) as f32 - 1.0) * b;
            }
        }
    }
}

/// Adds the sums as they are defined.
pub(crate) fn table_sums(weights: &[u8], x: FloatTables<'_>, sums: &mut FloatSums) {
    x.check(weights);
    for (step, tables) in weights
        .as_chunks::<STEP_BYTES>()
        .0
        .iter()
        .zip(x.0.as_chunks::<STEP_TABLES>().0)
    {
        for (r, lane) in step.as_chunks::<4>().0.iter().enumerate() {
            let lane = u32::from_le_bytes(*lane);
            for (i, table) in tables.as_chunks::<16>().0.iter().enumerate() {
                sums[i % 2][r] += table[(lane >> (4 * i) & 15) as usize];
            }
        }
    }
}

/// `out (+)= (even + odd) · scale`, and after the last group `+ bias`.
pub(crate) fn finish(
    scales: &[f32; PANEL],
    first: bool,
    bias: Option<&[f32]>,
    [even, odd]: &FloatSums,
    out: &mut [f32],
) {
    for (r, out) in out.iter_mut().enumerate() {
        let value = (even[r] + odd[r]) * scales[r];
        *out = if first { value } else { *out + value };
        if let Some(bias) = bias {
            *out += bias[r];
        }
    }
}

/// The loop with registers for tables.
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::{FloatSums, FloatTables, PANEL, STEP_BYTES, STEP_TABLES};
    use std::arch::x86_64::*;

    /// A table is two registers: bit 3 of the nibble chooses between them.
    #[target_feature(enable = "avx2")]
    pub(crate) fn table_sums_256(weights: &[u8], x: FloatTables<'_>, sums: &mut FloatSums) {
        const ROWS: usize = 16;
        x.check(weights);
        for part in 0..PANEL / ROWS {
            // SAFETY: every access is to one of PANEL rows of a whole step of `weights`, to one of
            // the tables of this step, which `FloatTables::check` counted, or to one of PANEL sums;
            // none needs alignment.
            unsafe {
                let mut acc: [[__m256; 2]; 2] = std::array::from_fn(|o| {
                    std::array::from_fn(|v| {
                        _mm256_loadu_ps(sums[o].as_ptr().add(part * ROWS + 8 * v))
                    })
                });
                for step in 0..weights.len() / STEP_BYTES {
                    let at = weights.as_ptr().add(step * STEP_BYTES + part * ROWS * 4);
                    let mut w: [__m256i; 2] =
                        std::array::from_fn(|v| _mm256_loadu_si256(at.add(32 * v).cast()));
                    for i in 0..8 {
                        let table = x.0.as_ptr().add(step * STEP_TABLES + 16 * i);
                        let (low, high) = (_mm256_loadu_ps(table), _mm256_loadu_ps(table.add(8)));
                        for (w, acc) in w.iter_mut().zip(&mut acc[i % 2]) {
                            let found = _mm256_blendv_ps(
                                _mm256_permutevar8x32_ps(low, *w),
                                _mm256_permutevar8x32_ps(high, *w),
                                _mm256_castsi256_ps(_mm256_slli_epi32::<28>(*w)),
                            );
                            *acc = _mm256_add_ps(*acc, found);
                            *w = _mm256_srli_epi32::<4>(*w);
                        }
                    }
                }
                for (sums, acc) in sums.iter_mut().zip(acc) {
                    for (v, acc) in acc.into_iter().enumerate() {
                        _mm256_storeu_ps(sums.as_mut_ptr().add(part * ROWS + 8 * v), acc);
                    }
                }
            }
        }
    }

    /// A table is a register, and a lane's lower four bits are the place in it.
    #[target_feature(enable = "avx512f")]
    pub(crate) fn table_sums_512(weights: &[u8], x: FloatTables<'_>, sums: &mut FloatSums) {
        x.check(weights);
        // SAFETY: every access is to one of PANEL rows of a whole step of `weights`, to one of the
        // tables of this step, which `FloatTables::check` counted, or to one of PANEL sums; none
        // needs alignment.
        unsafe {
            let mut acc: [[__m512; 4]; 2] = std::array::from_fn(|o| {
                std::array::from_fn(|v| _mm512_loadu_ps(sums[o].as_ptr().add(16 * v)))
            });
            for step in 0..weights.len() / STEP_BYTES {
                let mut w: [__m512i; 4] = std::array::from_fn(|v| {
                    _mm512_loadu_si512(weights.as_ptr().add(step * STEP_BYTES + 64 * v).cast())
                });
                for i in 0..8 {
                    let table = _mm512_loadu_ps(x.0.as_ptr().add(step * STEP_TABLES + 16 * i));
                    for (w, acc) in w.iter_mut().zip(&mut acc[i % 2]) {
                        *acc = _mm512_add_ps(*acc, _mm512_permutexvar_ps(*w, table));
                        *w = _mm512_srli_epi32::<4>(*w);
                    }
                }
            }
            for (sums, acc) in sums.iter_mut().zip(acc) {
                for (v, acc) in acc.into_iter().enumerate() {
                    _mm512_storeu_ps(sums.as_mut_ptr().add(16 * v), acc);
                }
            }
        }
    }
}
