//! Activations, prepacked for the weights of a product.

use super::prepacked::Prepacked;
use super::shape::PaddedShape;
use super::tiles::Columns;
use crate::error::Error;
use crate::kernels::Kernels;
use crate::parallel::lock;
use crate::pool::Pool;
use crate::stream::quantize_token;
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::scheme::Rounding;
use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

/// Activations `(M, K)`, int8 with a scale for each token, or floats; each row is padded to the
/// steps of the weights.
///
/// Weights of the same number of columns without scale groups take the same activations, in any
/// precision.
#[derive(Debug, Clone)]
pub struct PrepackedActivations {
    rows: usize,
    shape: PaddedShape,
    data: ActivationData,
    /// The buffer of the next quantization; `data` is unchanged until it has succeeded.
    spare: Int8Buffer,
    /// One token before it is prepacked.
    token: activation::QuantizedActivations,
}

#[derive(Debug, Clone)]
enum ActivationData {
    Integers(Int8Buffer),
    /// `[M, stride]`; padding is 0.
    Floats(Vec<f32>),
}

/// int8 values of some tokens.
#[derive(Debug, Clone, Default)]
struct Int8Buffer {
    shape: Option<PaddedShape>,
    /// `[M, stride]`; padding is 0.
    values: Vec<i8>,
    /// `[M]`.
    scales: Vec<f32>,
    /// Σ x, `[M, groups]`.
    sums: Vec<i32>,
}

impl Int8Buffer {
    /// Makes place for `rows` tokens, with zeros as padding.
    fn prepare(&mut self, rows: usize, shape: PaddedShape) {
        // Values of one shape never touch its padding.
        if self.shape.replace(shape) != Some(shape) {
            self.values.clear();
        }
        self.values.resize(rows * shape.stride(), 0);
        self.scales.resize(rows, 0.0);
        self.sums.resize(rows * shape.groups(), 0);
    }

    /// Reserves memory for `rows` tokens, so that the next quantization allocates nothing.
    fn reserve(&mut self, rows: usize, shape: PaddedShape) {
        self.values
            .reserve((rows * shape.stride()).saturating_sub(self.values.len()));
        self.scales.reserve(rows.saturating_sub(self.scales.len()));
        self.sums
            .reserve((rows * shape.groups()).saturating_sub(self.sums.len()));
    }

    /// The place of one token.
    fn token(&mut self, token: usize, shape: PaddedShape) -> (&mut [i8], &mut f32, &mut [i32]) {
        let (stride, groups) = (shape.stride(), shape.groups());
        (
            &mut self.values[token * stride..][..stride],
            &mut self.scales[token],
            &mut self.sums[token * groups..][..groups],
        )
    }

    /// Lays out the values of one token.
    fn put(&mut self, token: usize, shape: PaddedShape, from: &[i8], from_scale: f32) {
        let (values, scale, sums) = self.token(token, shape);
        shape.copy_row(from, values);
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

impl PrepackedActivations {
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
        let mut data = Int8Buffer::default();
        data.prepare(rows, shape);
        for (token, &scale) in scales.iter().enumerate() {
            data.put(
                token,
                shape,
                &values[token * shape.cols..][..shape.cols],
                scale,
            );
        }
        Ok(Self::with_data(rows, shape, ActivationData::Integers(data)))
    }

    fn with_data(rows: usize, shape: PaddedShape, data: ActivationData) -> Self {
        Self {
            rows,
            shape,
            data,
            spare: Int8Buffer::default(),
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
    /// stream: no other weights are multiplied with floats.
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
            shape.copy_row(x, to);
        }
        Ok(Self::with_data(rows, shape, ActivationData::Floats(values)))
    }

    /// Replaces the activations by quantized ones for the same weights. Allocates only for more
    /// tokens than ever before, for two buffers: the old values stay until the new ones are there.
    ///
    /// # Errors
    /// Those of [`PrepackedActivations::quantize`]; the old activations stay.
    pub fn requantize(&mut self, kernels: &Kernels, x: &[f32]) -> Result<(), Error> {
        self.requantize_in(kernels, self.shape, x, ActivationMethod::Int8)
    }

    /// [`PrepackedActivations::requantize`] of `rows` tokens for any weights, on the pool.
    /// `fill(token, x)` writes the K elements of a token into a buffer of the thread.
    ///
    /// # Errors
    /// Those of [`PrepackedActivations::quantize`], for the first token that has one; the old
    /// activations stay.
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
        let Int8Buffer {
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
                        let mut failed = lock(&failed);
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

    /// [`PrepackedActivations::requantize`] by any method and for any weights.
    ///
    /// # Errors
    /// Those of [`PrepackedActivations::quantize`]; the old activations stay.
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
        shape: PaddedShape,
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

    /// Swaps `data` and `spare`, after a quantization.
    fn adopt(&mut self, rows: usize, shape: PaddedShape) {
        (self.rows, self.shape) = (rows, shape);
        self.spare = match std::mem::replace(
            &mut self.data,
            ActivationData::Integers(std::mem::take(&mut self.spare)),
        ) {
            ActivationData::Integers(before) => before,
            ActivationData::Floats(_) => Int8Buffer::default(),
        };
        self.spare.reserve(rows, shape);
    }

    /// M, the number of tokens.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Whether a product with `w` can take these.
    pub fn fits(&self, w: &Prepacked) -> bool {
        self.shape == w.shape()
            && (w.takes_floats() || matches!(self.data, ActivationData::Integers(_)))
    }

    /// Panics unless these fit `w`.
    pub(crate) fn check(&self, w: &Prepacked) {
        let (here, there) = (self.shape, w.shape());
        assert!(
            self.fits(w),
            "activations prepacked for {} columns in groups of {} ({}), weights have {} in groups \
             of {} ({})",
            here.cols,
            here.group,
            here.padded,
            there.cols,
            there.group,
            there.padded
        );
    }

    /// The int8 ones.
    pub(crate) fn integers(&self) -> Option<Int8Activations<'_>> {
        match &self.data {
            ActivationData::Integers(Int8Buffer {
                values,
                scales,
                sums,
                ..
            }) => Some(Int8Activations {
                shape: self.shape,
                values,
                scales,
                sums,
            }),
            ActivationData::Floats(_) => None,
        }
    }

    /// The prepacked floats of one token, if these are floats.
    pub(crate) fn token(&self, token: usize) -> Option<&[f32]> {
        match &self.data {
            ActivationData::Integers(_) => None,
            ActivationData::Floats(values) => {
                Some(&values[token * self.shape.stride()..][..self.shape.stride()])
            }
        }
    }
}

/// An error about one token, its place among all of them.
fn placed(error: bitnet_core::Error, token: usize, shape: PaddedShape) -> bitnet_core::Error {
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
pub(crate) struct Int8Activations<'a> {
    shape: PaddedShape,
    values: &'a [i8],
    scales: &'a [f32],
    sums: &'a [i32],
}

impl<'a> Int8Activations<'a> {
    pub(crate) fn scale(&self, token: usize) -> f32 {
        self.scales[token]
    }

    pub(crate) fn sum(&self, token: usize, group: usize) -> i32 {
        self.sums[token * self.shape.groups() + group]
    }

    /// Every token from `token` on, from column `column` of `group` on.
    pub(crate) fn columns(&self, token: usize, group: usize, column: usize) -> Columns<'a> {
        let stride = self.shape.stride();
        Columns {
            values: &self.values[token * stride + group * self.shape.padded + column..],
            stride,
        }
    }
}
