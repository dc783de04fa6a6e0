//! The operands: weights in the kernel layout, and activations laid out for them.

use super::{MAX_COLS, PANEL, STEP, STEP_BYTES};
use crate::Error;
use bitnet_core::activation::{ActivationGranularity, ActivationMethod, quantize};
use bitnet_core::scheme::Rounding;
use bitnet_core::{Granularity, Matrix, Precision};
use std::ops::Range;

/// Ternary weights `(N, K)` in the kernel layout. Private to this crate and this process: it is never written to a file.
#[derive(Debug, Clone)]
pub struct Prepacked {
    rows: usize,
    cols: usize,
    /// Columns of a scale group; all of them unless the scales go by group.
    group: usize,
    granularity: Granularity,
    data: Vec<Line>,
    scales: Vec<f32>,
}

/// 64 bytes that begin at a multiple of 64.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

/// Code of the value 0 in all four fields.
const ZERO: u8 = 0b01_01_01_01;

impl Prepacked {
    /// Lays a ternary matrix of one plane out for the kernels.
    ///
    /// # Errors
    /// [`Error::Matrix`] for another precision, several planes, or more than [`MAX_COLS`] columns, and for a matrix whose parts do not fit one another.
    pub fn new(matrix: &Matrix) -> Result<Self, Error> {
        matrix.validate()?;
        let spec = &matrix.spec;
        if spec.precision != Precision::Ternary || spec.planes != 1 {
            return Err(bitnet_core::Error::Unsupported {
                layout: "the ternary kernels",
                why: format!("{} planes of {}, one of ternary expected", spec.planes, spec.precision),
            }
            .into());
        }
        if spec.cols > MAX_COLS {
            return Err(bitnet_core::Error::Unsupported {
                layout: "the ternary kernels",
                why: format!("{} columns, at most {MAX_COLS}", spec.cols),
            }
            .into());
        }
        let group = match spec.granularity {
            Granularity::Group(g) => g.min(spec.cols.max(1)),
            Granularity::Tensor | Granularity::Channel => spec.cols.max(1),
        };
        let mut packed =
            Self { rows: spec.rows, cols: spec.cols, group, granularity: spec.granularity, data: vec![], scales: matrix.scales.clone() };
        let lines = packed.panels() * packed.steps() * STEP_BYTES / 64;
        packed.data = vec![Line([ZERO; 64]); lines];
        for row in 0..spec.rows {
            let values = &matrix.values[row * spec.cols..][..spec.cols];
            let (panel, lane) = (row / PANEL, row % PANEL);
            for g in 0..packed.groups() {
                let columns = g * group..((g + 1) * group).min(spec.cols);
                let first_step = packed.first_step(g);
                for (step, values) in values[columns].chunks(STEP).enumerate() {
                    let at = ((panel * packed.steps() + first_step + step) * STEP_BYTES) + 4 * lane;
                    for (i, &value) in values.iter().enumerate() {
                        let (field, byte) = (i / 4, at + i % 4);
                        let slot = &mut packed.data[byte / 64].0[byte % 64];
                        *slot = *slot & !(3 << (2 * field)) | ((value + 1) as u8) << (2 * field);
                    }
                }
            }
        }
        Ok(packed)
    }

    /// N, the number of output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, the number of input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of the codes, padding included.
    pub fn bytes(&self) -> usize {
        self.data.len() * 64
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Scale groups along a row.
    pub(crate) fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    fn steps_per_group(&self) -> usize {
        self.group.div_ceil(STEP)
    }

    fn first_step(&self, group: usize) -> usize {
        group * self.steps_per_group()
    }

    /// Steps of a whole row.
    pub(crate) fn steps(&self) -> usize {
        match self.groups() {
            0 => 0,
            n => self.first_step(n - 1) + (self.cols - (n - 1) * self.group).div_ceil(STEP),
        }
    }

    /// Steps of one group.
    pub(crate) fn group_steps(&self, group: usize) -> Range<usize> {
        self.first_step(group)..self.first_step(group + 1).min(self.steps())
    }

    /// The codes of one panel in one group: whole steps.
    pub(crate) fn group_bytes(&self, panel: usize, group: usize) -> &[u8] {
        let steps = self.group_steps(group);
        let first = (panel * self.steps() + steps.start) * (STEP_BYTES / 64);
        let lines = &self.data[first..first + steps.len() * (STEP_BYTES / 64)];
        // SAFETY: a `Line` is 64 bytes without padding, so the slice is `64 · lines.len()` initialised bytes.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 64) }
    }

    /// `out (+)= scale · sum` for the rows from `first` on: sets where `group` is the first, adds where it is not.
    pub(crate) fn scale_into(&self, group: usize, first: usize, sums: &[i32; PANEL], out: &mut [f32]) {
        for (i, (out, &sum)) in out.iter_mut().zip(sums).enumerate() {
            let scale = match self.granularity {
                Granularity::Tensor => self.scales[0],
                Granularity::Channel => self.scales[first + i],
                Granularity::Group(_) => self.scales[(first + i) * self.groups() + group],
            };
            let term = sum as f32 * scale;
            *out = if group == 0 { term } else { *out + term };
        }
    }

    /// Panics unless `x` was laid out for these weights: the one check that every kernel rests on.
    pub(crate) fn check(&self, x: &Activations) {
        assert!(
            x.cols == self.cols && x.group == self.group && x.stride == self.steps() * STEP,
            "activations laid out for {} columns in groups of {}, weights have {} in groups of {}",
            x.cols,
            x.group,
            self.cols,
            self.group
        );
    }
}

/// int8 activations `(M, K)`, each row laid out in the steps of the weights it will meet.
#[derive(Debug, Clone)]
pub struct Activations {
    rows: usize,
    cols: usize,
    group: usize,
    /// Bytes of a row: whole steps.
    stride: usize,
    steps_per_group: usize,
    values: Vec<i8>,
    /// One for each token.
    scales: Vec<f32>,
    /// Σ x of each token and group.
    sums: Vec<i32>,
    groups: usize,
}

impl Activations {
    /// Quantizes `x`, `[M, K]` row-major, to int8 with one absmax scale for each token, for a product with `w`.
    ///
    /// # Errors
    /// [`Error::Matrix`] if `x` is not whole rows of K, or holds NaN or infinity.
    pub fn quantize(x: &[f32], w: &Prepacked) -> Result<Self, Error> {
        let q = quantize(x, w.cols.max(1), ActivationMethod::Int8, ActivationGranularity::Token, Rounding::HalfEven)?;
        Self::from_values(&q.values, &q.scales, w)
    }

    /// Lays out activations that are quantized already: `values` of `[M, K]` row-major, one scale for each of M tokens.
    ///
    /// # Errors
    /// [`Error::Matrix`] if the lengths do not fit.
    pub fn from_values(values: &[i8], scales: &[f32], w: &Prepacked) -> Result<Self, Error> {
        let rows = scales.len();
        if values.len() != rows * w.cols {
            return Err(bitnet_core::Error::Length { what: "activations", expected: rows * w.cols, got: values.len() }.into());
        }
        let stride = w.steps() * STEP;
        let mut x = Self {
            rows,
            cols: w.cols,
            group: w.group,
            stride,
            steps_per_group: w.steps_per_group(),
            values: vec![0; rows * stride],
            scales: scales.to_vec(),
            sums: Vec::with_capacity(rows * w.groups()),
            groups: w.groups(),
        };
        for row in 0..rows {
            for group in 0..w.groups() {
                let columns = group * w.group..((group + 1) * w.group).min(w.cols);
                let from = &values[row * w.cols..][columns];
                x.values[row * stride + w.first_step(group) * STEP..][..from.len()].copy_from_slice(from);
                x.sums.push(from.iter().map(|&v| i32::from(v)).sum());
            }
        }
        Ok(x)
    }

    /// M, the number of tokens.
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    pub(crate) fn scale(&self, token: usize) -> f32 {
        self.scales[token]
    }

    pub(crate) fn sum(&self, token: usize, group: usize) -> i32 {
        self.sums[token * self.groups + group]
    }

    /// The values of `tokens` rows from `token` on, beginning at the first step of `group`; a row follows every [`Activations::stride`] bytes.
    pub(crate) fn group(&self, token: usize, tokens: usize, group: usize) -> &[i8] {
        &self.values[token * self.stride + group * self.steps_per_group * STEP..(token + tokens) * self.stride]
    }
}
