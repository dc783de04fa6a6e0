//! Activations, laid out for the weights that they will meet.

use super::Prepacked;
use super::tiles::Columns;
use crate::Error;
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::scheme::Rounding;

/// Activations `(M, K)`, int8 with a scale for each token, or floats; each row laid out in the steps of the weights it will meet.
///
/// Weights of the same number of columns whose scales do not go by groups take the same activations, whatever their precision.
#[derive(Debug, Clone)]
pub struct Activations {
    rows: usize,
    shape: Shape,
    data: Data,
    /// Values before they are laid out.
    scratch: activation::Activations,
}

/// How the columns of a row are laid out: groups, each padded to whole steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) cols: usize,
    /// Columns of a scale group of the weights.
    pub(crate) group: usize,
    /// The same with its padding.
    pub(crate) padded: usize,
}

impl Shape {
    /// For `cols` columns in groups of `group`, `step` columns to a step.
    pub(crate) fn new(cols: usize, group: usize, step: usize) -> Self {
        // One group is padded so that it fits steps of 4, 8, 16, 20 and 32 columns.
        let step = if group < cols { step } else { 160 };
        Self { cols, group, padded: group.next_multiple_of(step) }
    }

    pub(crate) fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    fn stride(&self) -> usize {
        self.groups() * self.padded
    }

    /// Writes one row of `from` into its place, and leaves the padding.
    fn lay_out<T: Copy>(&self, from: &[T], to: &mut [T]) {
        for (from, to) in from.chunks(self.group).zip(to.chunks_mut(self.padded)) {
            to[..from.len()].copy_from_slice(from);
        }
    }
}

#[derive(Debug, Clone)]
enum Data {
    Integers {
        /// `[M, stride]`; padding is 0.
        values: Vec<i8>,
        /// `[M]`.
        scales: Vec<f32>,
        /// Σ x, `[M, groups]`.
        sums: Vec<i32>,
    },
    /// `[M, stride]`; padding is 0.
    Floats(Vec<f32>),
}

fn length(expected: usize, got: usize) -> Error {
    bitnet_core::Error::Length { what: "activations", expected, got }.into()
}

impl Activations {
    /// Quantizes `x`, `[M, K]` row-major, to int8 with one absmax scale for each token, for a product with `w`.
    ///
    /// # Errors
    /// [`Error::Matrix`] if `x` is not whole rows of K, or holds NaN or infinity.
    pub fn quantize(x: &[f32], w: &Prepacked) -> Result<Self, Error> {
        let mut activations = Self::from_values(&[], &[], w)?;
        activations.requantize(x)?;
        Ok(activations)
    }

    /// Lays out activations that are quantized already: `values` of `[M, K]` row-major, one scale for each of M tokens.
    ///
    /// # Errors
    /// [`Error::Matrix`] if the lengths do not fit.
    pub fn from_values(values: &[i8], scales: &[f32], w: &Prepacked) -> Result<Self, Error> {
        let (rows, shape) = (scales.len(), w.shape());
        if rows.checked_mul(shape.cols) != Some(values.len()) {
            return Err(length(rows.saturating_mul(shape.cols), values.len()));
        }
        let data = Data::Integers { values: vec![], scales: vec![], sums: vec![] };
        let mut activations = Self { rows, shape, data, scratch: activation::Activations { values: vec![], scales: vec![] } };
        activations.fill(values, scales);
        Ok(activations)
    }

    /// Lays out float activations, `[M, K]` row-major, for [`Kernels::matmul`](crate::Kernels::matmul) without rounding them.
    ///
    /// # Errors
    /// [`Error::Matrix`] if `x` is not whole rows of K, or `w` is not ternary in the two-bit stream: nothing else takes floats.
    pub fn floats(x: &[f32], w: &Prepacked) -> Result<Self, Error> {
        if !w.takes_floats() {
            let why = format!("float activations go with ternary weights in the two-bit stream, not with {}", w.describe());
            return Err(bitnet_core::Error::Unsupported { layout: "the kernels", why }.into());
        }
        let shape = w.shape();
        let rows = whole_rows(x.len(), shape.cols)?;
        let mut values = vec![0.0; rows * shape.stride()];
        for (x, to) in x.chunks(shape.cols.max(1)).zip(values.chunks_mut(shape.stride().max(1))) {
            shape.lay_out(x, to);
        }
        Ok(Self { rows, shape, data: Data::Floats(values), scratch: activation::Activations { values: vec![], scales: vec![] } })
    }

    /// Quantizes other activations in place of these, for weights that took these. Allocates only where there are more tokens than ever.
    ///
    /// # Errors
    /// As [`Activations::quantize`]; these are then as they were.
    pub fn requantize(&mut self, x: &[f32]) -> Result<(), Error> {
        self.requantize_in(self.shape, x, ActivationMethod::Int8)
    }

    /// The same by any method and for any weights.
    ///
    /// # Errors
    /// As [`Activations::quantize`]; these are then as they were.
    pub fn requantize_for(&mut self, w: &Prepacked, x: &[f32], method: ActivationMethod) -> Result<(), Error> {
        self.requantize_in(w.shape(), x, method)
    }

    fn requantize_in(&mut self, shape: Shape, x: &[f32], method: ActivationMethod) -> Result<(), Error> {
        whole_rows(x.len(), shape.cols)?;
        let how = (method, ActivationGranularity::Token, Rounding::HalfEven);
        let mut scratch = std::mem::replace(&mut self.scratch, activation::Activations { values: vec![], scales: vec![] });
        let done = activation::quantize_into(x, shape.cols, how, &mut scratch);
        if done.is_ok() {
            self.shape = shape;
            self.fill(&scratch.values, &scratch.scales);
        }
        self.scratch = scratch;
        Ok(done?)
    }

    fn fill(&mut self, from: &[i8], from_scales: &[f32]) {
        let shape = self.shape;
        self.rows = from_scales.len();
        let (mut values, mut scales, mut sums) = match std::mem::replace(&mut self.data, Data::Floats(vec![])) {
            Data::Integers { values, scales, sums } => (values, scales, sums),
            Data::Floats(_) => (vec![], vec![], vec![]),
        };
        values.clear();
        values.resize(self.rows * shape.stride(), 0);
        scales.clear();
        scales.extend_from_slice(from_scales);
        sums.clear();
        for (from, to) in from.chunks(shape.cols.max(1)).zip(values.chunks_mut(shape.stride().max(1))) {
            shape.lay_out(from, to);
            sums.extend(from.chunks(shape.group).map(|x| x.iter().map(|&v| i32::from(v)).sum::<i32>()));
        }
        self.data = Data::Integers { values, scales, sums };
    }

    /// M, the number of tokens.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Whether a product with `w` can take these.
    pub fn fits(&self, w: &Prepacked) -> bool {
        self.shape == w.shape() && (w.takes_floats() || matches!(self.data, Data::Integers { .. }))
    }

    /// Panics unless these fit `w`.
    pub(crate) fn check(&self, w: &Prepacked) {
        let (here, there) = (self.shape, w.shape());
        assert!(
            self.fits(w),
            "activations laid out for {} columns in groups of {} ({}), weights have {} in groups of {} ({})",
            here.cols,
            here.group,
            here.padded,
            there.cols,
            there.group,
            there.padded
        );
    }

    /// The int8 ones.
    pub(crate) fn integers(&self) -> Option<Integers<'_>> {
        match &self.data {
            Data::Integers { values, scales, sums } => Some(Integers { shape: self.shape, values, scales, sums }),
            Data::Floats(_) => None,
        }
    }

    /// The laid out floats of one token, if these are floats.
    pub(crate) fn token(&self, token: usize) -> Option<&[f32]> {
        match &self.data {
            Data::Integers { .. } => None,
            Data::Floats(values) => Some(&values[token * self.shape.stride()..][..self.shape.stride()]),
        }
    }
}

/// The number of tokens in `len` numbers.
fn whole_rows(len: usize, cols: usize) -> Result<usize, Error> {
    if cols == 0 || !len.is_multiple_of(cols) {
        return Err(length(len.next_multiple_of(cols.max(1)).max(cols), len));
    }
    Ok(len / cols)
}

/// int8 activations.
#[derive(Clone, Copy)]
pub(crate) struct Integers<'a> {
    shape: Shape,
    values: &'a [i8],
    scales: &'a [f32],
    sums: &'a [i32],
}

impl<'a> Integers<'a> {
    pub(crate) fn scale(&self, token: usize) -> f32 {
        self.scales[token]
    }

    pub(crate) fn sum(&self, token: usize, group: usize) -> i32 {
        self.sums[token * self.shape.groups() + group]
    }

    /// Every token from `token` on, from column `column` of `group` on.
    pub(crate) fn from(&self, token: usize, group: usize, column: usize) -> Columns<'a> {
        let stride = self.shape.stride();
        Columns { values: &self.values[token * stride + group * self.shape.padded + column..], stride }
    }
}
