//! int8 activations, laid out for the weights that they will meet.

use super::tiles::Columns;
use super::{Prepacked, STEP};
use crate::Error;
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::scheme::Rounding;

/// int8 activations `(M, K)`, each row laid out in the steps of the weights it will meet.
#[derive(Debug, Clone)]
pub struct Activations {
    rows: usize,
    cols: usize,
    /// Columns of a scale group of the weights.
    group: usize,
    groups: usize,
    /// `[M, stride]`; stride is whole steps, and a column that a step has and the matrix has not is 0.
    values: Vec<i8>,
    stride: usize,
    /// `[M]`.
    scales: Vec<f32>,
    /// Σ x, `[M, groups]`.
    sums: Vec<i32>,
    /// Values before they are laid out.
    scratch: activation::Activations,
}

impl Activations {
    /// Quantizes `x`, `[M, K]` row-major, to int8 with one absmax scale for each token, for a product with `w`.
    ///
    /// # Errors
    /// [`Error::Matrix`] if `x` is not whole rows of K, or holds NaN or infinity.
    pub fn quantize(x: &[f32], w: &Prepacked) -> Result<Self, Error> {
        let mut activations = Self::from_values(&[], &[], w)?;
        activations.requantize(x, w, ActivationMethod::Int8)?;
        Ok(activations)
    }

    /// Quantizes other activations by any method in place of these, for a product with `w`. Allocates only where these were never so many.
    ///
    /// # Errors
    /// As [`Activations::quantize`]; these are then as they were.
    pub fn requantize(&mut self, x: &[f32], w: &Prepacked, method: ActivationMethod) -> Result<(), Error> {
        let mut scratch = std::mem::replace(&mut self.scratch, activation::Activations { values: vec![], scales: vec![] });
        let how = (method, ActivationGranularity::Token, Rounding::HalfEven);
        let done = activation::quantize_into(x, w.cols(), how, &mut scratch);
        if done.is_ok() {
            self.lay_out(&scratch.values, &scratch.scales, w);
        }
        self.scratch = scratch;
        Ok(done?)
    }

    /// Lays out activations that are quantized already: `values` of `[M, K]` row-major, one scale for each of M tokens.
    ///
    /// # Errors
    /// [`Error::Matrix`] if the lengths do not fit.
    pub fn from_values(values: &[i8], scales: &[f32], w: &Prepacked) -> Result<Self, Error> {
        let (rows, cols) = (scales.len(), w.cols());
        if rows.checked_mul(cols) != Some(values.len()) {
            return Err(bitnet_core::Error::Length { what: "activations", expected: rows.saturating_mul(cols), got: values.len() }.into());
        }
        let scratch = activation::Activations { values: vec![], scales: vec![] };
        let mut new = Self { rows, cols, group: 0, groups: 0, values: vec![], stride: 0, scales: vec![], sums: vec![], scratch };
        new.lay_out(values, scales, w);
        Ok(new)
    }

    fn lay_out(&mut self, values: &[i8], scales: &[f32], w: &Prepacked) {
        let (rows, cols, group, stride) = (scales.len(), w.cols(), w.group(), w.steps() * STEP);
        (self.rows, self.cols, self.group, self.groups, self.stride) = (rows, cols, group, w.groups(), stride);
        self.scales.clear();
        self.scales.extend_from_slice(scales);
        self.values.clear();
        self.values.resize(rows * stride, 0);
        self.sums.clear();
        for row in 0..rows {
            let values = &values[row * cols..][..cols];
            for (g, from) in values.chunks(group).enumerate() {
                self.values[row * stride + w.group_steps(g).start * STEP..][..from.len()].copy_from_slice(from);
                self.sums.push(from.iter().map(|&v| i32::from(v)).sum());
            }
        }
    }

    /// M, the number of tokens.
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn scale(&self, token: usize) -> f32 {
        self.scales[token]
    }

    pub(crate) fn sum(&self, token: usize, group: usize) -> i32 {
        self.sums[token * self.groups + group]
    }

    /// Every token from `token` on, from column 0 of `step` on.
    pub(crate) fn from(&self, token: usize, step: usize) -> Columns<'_> {
        Columns { values: &self.values[token * self.stride + step * STEP..], stride: self.stride }
    }

    /// Panics unless these were laid out for `w`.
    pub(crate) fn check(&self, w: &Prepacked) {
        assert!(
            self.cols == w.cols() && self.group == w.group(),
            "activations laid out for {} columns in groups of {}, weights have {} in groups of {}",
            self.cols,
            self.group,
            w.cols(),
            w.group()
        );
    }
}
