//! Activations, laid out for the weights that they will meet.

use super::Prepacked;
use super::tiles::Columns;
use crate::stream::quantize_token;
use crate::{Error, Kernels, Pool};
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::scheme::Rounding;
use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

/// Activations `(M, K)`, int8 with a scale for each token, or floats; each row laid out in the
/// steps of the weights it will meet.
///
/// Weights of the same number of columns whose scales do not go by groups take the same
/// activations, whatever their precision.
#[derive(Debug, Clone)]
pub struct Activations {
    rows: usize,
    shape: Shape,
    data: Data,
    /// What the next quantization writes into: these stay as they are until it has succeeded.
    spare: Quantized,
    /// One token before it is laid out.
    token: activation::QuantizedActivations,
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
        Self {
            cols,
            group,
            padded: group.next_multiple_of(step),
        }
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
    Integers(Quantized),
    /// `[M, stride]`; padding is 0.
    Floats(Vec<f32>),
}

/// int8 values of some tokens.
#[derive(Debug, Clone, Default)]
struct Quantized {
    shape: Option<Shape>,
    /// `[M, stride]`; padding is 0.
    values: Vec<i8>,
    /// `[M]`.
    scales: Vec<f32>,
    /// Σ x, `[M, groups]`.
    sums: Vec<i32>,
}

impl Quantized {
    /// Room for `rows` tokens, with zeros as padding.
    fn prepare(&mut self, rows: usize, shape: Shape) {
        // Values of one shape never touch its padding.
        if self.shape.replace(shape) != Some(shape) {
            self.values.clear();
        }
        self.values.resize(rows * shape.stride(), 0);
        self.scales.resize(rows, 0.0);
        self.sums.resize(rows * shape.groups(), 0);
    }

    /// Memory for as much, so that the next quantization allocates nothing.
    fn reserve(&mut self, rows: usize, shape: Shape) {
        self.values
            .reserve((rows * shape.stride()).saturating_sub(self.values.len()));
        self.scales.reserve(rows.saturating_sub(self.scales.len()));
        self.sums
            .reserve((rows * shape.groups()).saturating_sub(self.sums.len()));
    }

    /// The place of one token.
    fn token(&mut self, token: usize, shape: Shape) -> (&mut [i8], &mut f32, &mut [i32]) {
        let (stride, groups) = (shape.stride(), shape.groups());
        (
            &mut self.values[token * stride..][..stride],
            &mut self.scales[token],
            &mut self.sums[token * groups..][..groups],
        )
    }

    /// Lays out the values of one token.
    fn put(&mut self, token: usize, shape: Shape, from: &[i8], from_scale: f32) {
        let (values, scale, sums) = self.token(token, shape);
        shape.lay_out(from, values);
        *scale = from_scale;
        for (sum, x) in sums.iter_mut().zip(from.chunks(shape.group)) {
            *sum = x.iter().map(|&v| i32::from(v)).sum();
        }
    }
}

fn length(expected: usize, got: usize) -> Error {
    bitnet_core::Error::Length {
        what: "activations",
        expected,
        got,
    }
    .into()
}

impl Activations {
    /// Quantizes `x`, `[M, K]` row-major, to int8 with one absmax scale for each token, for a
    /// product with `w`.
    ///
    /// # Errors
    /// [`Error::Matrix`] if `x` is not whole rows of K, or holds NaN or infinity.
    pub fn quantize(kernels: &Kernels, x: &[f32], w: &Prepacked) -> Result<Self, Error> {
        let mut activations = Self::from_values(&[], &[], w)?;
        activations.requantize(kernels, x)?;
        Ok(activations)
    }

    /// Lays out activations that are quantized already: `values` of `[M, K]` row-major, one scale
    /// for each of M tokens.
    ///
    /// # Errors
    /// [`Error::Matrix`] if the lengths do not fit.
    pub fn from_values(values: &[i8], scales: &[f32], w: &Prepacked) -> Result<Self, Error> {
        let (rows, shape) = (scales.len(), w.shape());
        if rows.checked_mul(shape.cols) != Some(values.len()) {
            return Err(length(rows.saturating_mul(shape.cols), values.len()));
        }
        let mut data = Quantized::default();
        data.prepare(rows, shape);
        for (token, &scale) in scales.iter().enumerate() {
            data.put(
                token,
                shape,
                &values[token * shape.cols..][..shape.cols],
                scale,
            );
        }
        Ok(Self::of(rows, shape, Data::Integers(data)))
    }

    fn of(rows: usize, shape: Shape, data: Data) -> Self {
        Self {
            rows,
            shape,
            data,
            spare: Quantized::default(),
            token: activation::QuantizedActivations {
                values: vec![],
                scales: vec![],
            },
        }
    }

    /// Lays out float activations, `[M, K]` row-major, for
    /// [`Kernels::matmul`](crate::Kernels::matmul) without rounding them.
    ///
    /// # Errors
    /// [`Error::Matrix`] if `x` is not whole rows of K, or `w` is not ternary in the two-bit
    /// stream: nothing else takes floats.
    pub fn floats(x: &[f32], w: &Prepacked) -> Result<Self, Error> {
        if !w.takes_floats() {
            let why = format!(
                "float activations go with ternary weights in the two-bit stream, not with {}",
                w.describe()
            );
            return Err(bitnet_core::Error::Unsupported {
                layout: "the kernels",
                why,
            }
            .into());
        }
        let shape = w.shape();
        let rows = whole_rows(x.len(), shape.cols)?;
        let mut values = vec![0.0; rows * shape.stride()];
        for (x, to) in x
            .chunks(shape.cols.max(1))
            .zip(values.chunks_mut(shape.stride().max(1)))
        {
            shape.lay_out(x, to);
        }
        Ok(Self::of(rows, shape, Data::Floats(values)))
    }

    /// Quantizes other activations in place of these, for weights that took these. Allocates only
    /// where there are more tokens than ever, twice as much as they take: two buffers take turns.
    ///
    /// # Errors
    /// As [`Activations::quantize`]; these are then as they were.
    pub fn requantize(&mut self, kernels: &Kernels, x: &[f32]) -> Result<(), Error> {
        self.requantize_in(kernels, self.shape, x, ActivationMethod::Int8)
    }

    /// Quantizes `rows` tokens for any weights, on the pool: `fill(token, x)` writes the K elements
    /// of a token, which nobody else gets to see. As [`Activations::requantize`] otherwise.
    ///
    /// # Errors
    /// As [`Activations::quantize`], of the first such token; these are then as they were.
    pub fn requantize_rows(
        &mut self,
        kernels: &Kernels,
        pool: &Pool,
        w: &Prepacked,
        rows: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<(), Error> {
        thread_local! {
            static ROW: Cell<Vec<f32>> = const { Cell::new(vec![]) };
        }
        let (shape, failed) = (w.shape(), Mutex::new(None));
        self.spare.prepare(rows, shape);
        let Quantized {
            values,
            scales,
            sums,
            ..
        } = &mut self.spare;
        let lens = [shape.stride().max(1), 1, shape.groups().max(1)];
        pool.for_chunks_of_three(
            (values, scales, sums),
            lens,
            |token, values, scale, sums| {
                let mut row = ROW.take();
                row.resize(shape.cols, 0.0);
                fill(token, &mut row);
                match quantize_token(*kernels, &row, shape.group, shape.padded, values, sums) {
                    Ok(found) => scale[0] = found,
                    Err(e) => {
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        if failed.as_ref().is_none_or(|(first, _)| token < *first) {
                            *failed = Some((token, e));
                        }
                    }
                }
                ROW.set(row);
            },
        );
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some((token, e)) => Err(placed(e, token, shape).into()),
            None => {
                self.adopt(rows, shape);
                Ok(())
            }
        }
    }

    /// The same by any method and for any weights.
    ///
    /// # Errors
    /// As [`Activations::quantize`]; these are then as they were.
    pub fn requantize_for(
        &mut self,
        kernels: &Kernels,
        w: &Prepacked,
        x: &[f32],
        method: ActivationMethod,
    ) -> Result<(), Error> {
        self.requantize_in(kernels, w.shape(), x, method)
    }

    fn requantize_in(
        &mut self,
        kernels: &Kernels,
        shape: Shape,
        x: &[f32],
        method: ActivationMethod,
    ) -> Result<(), Error> {
        let rows = whole_rows(x.len(), shape.cols)?;
        self.spare.prepare(rows, shape);
        for (token, x) in x.chunks(shape.cols).enumerate() {
            let done = if method == ActivationMethod::Int8 {
                let (values, scale, sums) = self.spare.token(token, shape);
                quantize_token(*kernels, x, shape.group, shape.padded, values, sums)
                    .map(|s| *scale = s)
            } else {
                let how = (method, ActivationGranularity::Token, Rounding::HalfEven);
                let done = activation::quantize_into(x, shape.cols, how, &mut self.token);
                done.map(|()| {
                    self.spare
                        .put(token, shape, &self.token.values, self.token.scales[0])
                })
            };
            done.map_err(|e| placed(e, token, shape))?;
        }
        self.adopt(rows, shape);
        Ok(())
    }

    /// What is in `spare` is what these are from now on.
    fn adopt(&mut self, rows: usize, shape: Shape) {
        (self.rows, self.shape) = (rows, shape);
        self.spare = match std::mem::replace(
            &mut self.data,
            Data::Integers(std::mem::take(&mut self.spare)),
        ) {
            Data::Integers(before) => before,
            Data::Floats(_) => Quantized::default(),
        };
        self.spare.reserve(rows, shape);
    }

    /// M, the number of tokens.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Whether a product with `w` can take these.
    pub fn fits(&self, w: &Prepacked) -> bool {
        self.shape == w.shape() && (w.takes_floats() || matches!(self.data, Data::Integers(_)))
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
            Data::Integers(Quantized {
                values,
                scales,
                sums,
                ..
            }) => Some(Integers {
                shape: self.shape,
                values,
                scales,
                sums,
            }),
            Data::Floats(_) => None,
        }
    }

    /// The laid out floats of one token, if these are floats.
    pub(crate) fn token(&self, token: usize) -> Option<&[f32]> {
        match &self.data {
            Data::Integers(_) => None,
            Data::Floats(values) => {
                Some(&values[token * self.shape.stride()..][..self.shape.stride()])
            }
        }
    }
}

/// An error about one token, its place among all of them.
fn placed(error: bitnet_core::Error, token: usize, shape: Shape) -> bitnet_core::Error {
    match error {
        bitnet_core::Error::NotFinite { index, value } => bitnet_core::Error::NotFinite {
            index: token * shape.cols + index,
            value,
        },
        other => other,
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
        Columns {
            values: &self.values[token * stride + group * self.shape.padded + column..],
            stride,
        }
    }
}
