//! Packing and unpacking of the wire layouts.

use super::plain;
use crate::kernels::Kernels;
use crate::parallel::lock;
use crate::pool::Pool;
use bitnet_core::pack::{FastPath, Layout};
use bitnet_core::{Error, Granularity, Matrix, MatrixSpec, Precision, Result, ZeroPoints};
use half::f16;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Values of a part, as far as whole rows allow.
const PART: usize = 256 * plain::BLOCK;
/// Outputs from this many bytes on are written past the caches: they would not stay there.
const STREAMED: usize = 16 << 20;
/// Shifts of four strided codes: the first in the low bits.
const LOW_FIRST: [u32; 4] = [0, 2, 4, 6];
/// Shifts of four strided codes: the first in the high bits.
const HIGH_FIRST: [u32; 4] = [6, 4, 2, 0];

/// The layouts whose rows are dense runs of codes.
#[derive(Clone, Copy)]
pub(super) enum DenseLayout {
    /// Four codes a byte, `value + bias`, up to `top`.
    TwoBit { bias: i8, top: u8 },
    /// Five trits a byte.
    Base3,
}

impl DenseLayout {
    /// `None` where the layout is another one.
    pub(super) fn new(layout: &dyn Layout, spec: &MatrixSpec) -> Option<Self> {
        match (layout.fast_path()?, spec.precision) {
            (FastPath::TwoBit, Precision::Ternary) => Some(Self::TwoBit { bias: 1, top: 2 }),
            (FastPath::TwoBit, Precision::Int2) => Some(Self::TwoBit { bias: 2, top: 3 }),
            (FastPath::BaseThree, Precision::Ternary) => Some(Self::Base3),
            _ => None,
        }
    }

    /// Values of a byte.
    pub(super) const fn values(self) -> usize {
        match self {
            Self::TwoBit { .. } => 4,
            Self::Base3 => 5,
        }
    }

    /// Packs the values of a row, or of rows without a gap between them; false for a value outside
    /// the alphabet.
    pub(super) fn pack(self, kernels: Kernels, values: &[i8], out: &mut [u8]) -> bool {
        match self {
            Self::TwoBit { bias, top } => kernels.table.pack_two_bit(values, bias, top, out),
            Self::Base3 => kernels.table.pack_base3(values, out),
        }
    }

    /// Unpacks a row, or rows without a gap between them; false for what no writer makes.
    fn unpack(self, kernels: Kernels, bytes: &[u8], values: &mut [i8], streamed: bool) -> bool {
        let table = kernels.table;
        match self {
            Self::TwoBit { bias, top } if streamed => {
                table.unpack_two_bit_streamed(bytes, bias, top, values)
            }
            Self::TwoBit { bias, top } => table.unpack_two_bit(bytes, bias, top, values),
            Self::Base3 => table.unpack_base3(bytes, values),
        }
    }

    /// Values that are contiguous in the bytes (a row, or many if no row ends within a byte), and
    /// how many of such runs make a part.
    fn runs(self, cols: usize) -> (usize, usize) {
        if cols.is_multiple_of(self.values()) {
            (PART, 1)
        } else {
            (cols, (PART / cols).max(1))
        }
    }
}

fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            expected,
            got,
        })
    }
}

/// Appends the packed bytes of `values`, `[planes · N, K]`, to `out`: [`Layout::pack_into`], faster
/// for `two-bit` and `base-3`.
///
/// # Errors
/// Those of [`Layout::pack_into`].
pub fn pack(
    kernels: Kernels,
    pool: &Pool,
    layout: &dyn Layout,
    spec: &MatrixSpec,
    values: &[i8],
    scales: &[f32],
    out: &mut Vec<u8>,
) -> Result<()> {
    let Some(dense) = DenseLayout::new(layout, spec).filter(|_| !values.is_empty()) else {
        return layout.pack_into(spec, values, scales, out);
    };
    layout.check(spec)?;
    check_len("values", spec.values_len(), values.len())?;
    let start = out.len();
    out.resize(start + layout.packed_len(spec).bound(), 0);
    let ok = AtomicBool::new(true);
    let (run, runs) = dense.runs(spec.cols);
    let bytes = run.div_ceil(dense.values());
    pool.for_each(
        values
            .chunks(run * runs)
            .zip(out[start..].chunks_mut(bytes * runs)),
        |(values, out)| {
            for (values, out) in values.chunks(run).zip(out.chunks_mut(bytes)) {
                if !dense.pack(kernels, values, out) {
                    ok.store(false, Ordering::Relaxed);
                }
            }
        },
    );
    if ok.into_inner() {
        return Ok(());
    }
    out.truncate(start);
    layout.pack_into(spec, values, scales, out)
}

/// Unpacks a matrix into `values`, `[planes · N, K]`, and returns the scales if the layout holds
/// them: [`Layout::unpack`], faster for `two-bit`, `base-3`, `hf-bitnet`, `tq1_0`, `tq2_0` and
/// `i2_s` in its three orders.
///
/// # Errors
/// Those of [`Layout::unpack`], and [`Error::Length`] if `values` is not the matrix. What `values`
/// holds then means nothing.
pub fn unpack(
    kernels: Kernels,
    pool: &Pool,
    layout: &dyn Layout,
    spec: &MatrixSpec,
    bytes: &[u8],
    values: &mut [i8],
) -> Result<Option<Vec<f32>>> {
    layout.check(spec)?;
    check_len("values", spec.values_len(), values.len())?;
    if !values.is_empty() && bytes.len() == layout.packed_len(spec).bound() {
        let job = UnpackJob {
            kernels,
            pool,
            spec,
        };
        let done = match DenseLayout::new(layout, spec) {
            Some(dense) => job.dense(dense, bytes, values).then_some(None),
            None => layout
                .fast_path()
                .and_then(|path| job.foreign(path, bytes, values)),
        };
        if let Some(scales) = done {
            return Ok(scales);
        }
    }
    // Either this layout has no loop of its own, or something is wrong and the layout knows what.
    let unpacked = layout.unpack(spec, bytes)?;
    values.copy_from_slice(&unpacked.values);
    Ok(unpacked.scales)
}

struct UnpackJob<'a> {
    kernels: Kernels,
    pool: &'a Pool,
    spec: &'a MatrixSpec,
}

impl UnpackJob<'_> {
    /// Calls `each` on all parts and returns whether it was true for all of them.
    fn all<T: Send>(
        &self,
        parts: impl IntoIterator<Item = T>,
        part: impl Fn(T) -> bool + Sync,
    ) -> bool {
        let ok = AtomicBool::new(true);
        self.pool.for_each(parts, |p| {
            if !part(p) {
                ok.store(false, Ordering::Relaxed);
            }
        });
        ok.into_inner()
    }

    fn dense(&self, dense: DenseLayout, bytes: &[u8], values: &mut [i8]) -> bool {
        let streamed = values.len() >= STREAMED;
        let (run, runs) = dense.runs(self.spec.cols);
        let stride = run.div_ceil(dense.values());
        self.all(
            bytes
                .chunks(stride * runs)
                .zip(values.chunks_mut(run * runs)),
            |(bytes, values)| {
                bytes
                    .chunks(stride)
                    .zip(values.chunks_mut(run))
                    .fold(true, |ok, (b, v)| {
                        ok & dense.unpack(self.kernels, b, v, streamed)
                    })
            },
        )
    }

    /// Dequantizes row `row`; false for what no writer makes.
    fn dequantize_row(
        &self,
        dense: DenseLayout,
        scales: &[f32],
        row: usize,
        bytes: &[u8],
        out: &mut [f32],
    ) -> bool {
        let (mut values, mut ok, width) = ([0; plain::BLOCK], true, self.spec.granule_cols());
        let streamed = 4 * self.spec.weights_len() >= STREAMED;
        for (block, (bytes, out)) in bytes
            .chunks(plain::BLOCK / dense.values())
            .zip(out.chunks_mut(plain::BLOCK))
            .enumerate()
        {
            let values = &mut values[..out.len()];
            ok &= dense.unpack(self.kernels, bytes, values, false);
            let mut at = 0;
            while at < out.len() {
                let column = block * plain::BLOCK + at;
                let end = (at + width - column % width).min(out.len());
                let scale = scales[self.spec.scale_index(0, row, column)];
                let (values, out) = (&values[at..end], &mut out[at..end]);
                if streamed {
                    self.kernels.table.scale_streamed(values, scale, out);
                } else {
                    self.kernels.table.scale(values, scale, out);
                }
                at = end;
            }
        }
        ok
    }

    /// The scales if there are any; `None` for a layout without a loop of its own, and for bytes
    /// that no writer makes.
    fn foreign(&self, path: FastPath, bytes: &[u8], values: &mut [i8]) -> Option<Option<Vec<f32>>> {
        match path {
            FastPath::QuarterRows if self.spec.rows.is_multiple_of(4) => {
                self.quads(bytes, LOW_FIRST, values).then_some(None)
            }
            FastPath::GroupQuarters(_) | FastPath::FourRows => {
                let (codes, trailer) = bytes.split_at(values.len() / 4);
                let done = match path {
                    FastPath::GroupQuarters(128) => self.all(
                        codes.chunks(PART / 4).zip(values.chunks_mut(PART)),
                        |(b, v)| self.kernels.table.unpack_quads_32(b, HIGH_FIRST, v),
                    ),
                    FastPath::GroupQuarters(64) => self.all(
                        codes.chunks(PART / 4).zip(values.chunks_mut(PART)),
                        |(b, v)| self.kernels.table.unpack_quads_16(b, HIGH_FIRST, v),
                    ),
                    FastPath::GroupQuarters(_) => return None,
                    _ => {
                        let cols = self.spec.cols;
                        codes
                            .chunks(cols)
                            .zip(values.chunks_mut(4 * cols))
                            .fold(true, |ok, (b, v)| ok & self.quads(b, HIGH_FIRST, v))
                    }
                };
                let scale = f32::from_le_bytes([trailer[0], trailer[1], trailer[2], trailer[3]]);
                let stored = scale.is_finite()
                    && self.spec.scale_dtype.round(scale).to_bits() == scale.to_bits();
                (done && stored).then(|| Some(vec![scale]))
            }
            FastPath::Tq1 => self.blocks::<54>(52, bytes, values, |b, v| {
                self.kernels.table.unpack_tq1(b, v)
            }),
            FastPath::Tq2 => self.blocks::<66>(64, bytes, values, |b, v| {
                self.kernels.table.unpack_tq2(b, v)
            }),
            _ => None,
        }
    }

    /// Four codes a byte, a quarter of the values apart.
    fn quads(&self, bytes: &[u8], shifts: [u32; 4], values: &mut [i8]) -> bool {
        let m = bytes.len();
        let (front, back) = values.split_at_mut(2 * m);
        let ((a, b), (c, d)) = (front.split_at_mut(m), back.split_at_mut(m));
        let quarters = a
            .chunks_mut(PART)
            .zip(b.chunks_mut(PART))
            .zip(c.chunks_mut(PART))
            .zip(d.chunks_mut(PART));
        self.all(
            bytes.chunks(PART).zip(quarters),
            |(bytes, (((a, b), c), d))| {
                self.kernels.table.unpack_quads(bytes, shifts, [a, b, c, d])
            },
        )
    }

    /// Blocks of 256 values in `N` bytes, with an f16 scale at `scale_at`.
    fn blocks<const N: usize>(
        &self,
        scale_at: usize,
        bytes: &[u8],
        values: &mut [i8],
        unpack: impl Fn(&[[u8; N]], &mut [[i8; 256]]) -> bool + Sync,
    ) -> Option<Option<Vec<f32>>> {
        let per_row = self.spec.cols / 256;
        let per_part = per_row * (PART / self.spec.cols).max(1);
        let (blocks, values) = (bytes.as_chunks::<N>().0, values.as_chunks_mut::<256>().0);
        let found: Vec<Mutex<Vec<f32>>> = (0..blocks.len().div_ceil(per_part))
            .map(|_| Mutex::default())
            .collect();
        let done = self.all(
            blocks
                .chunks(per_part)
                .zip(values.chunks_mut(per_part))
                .zip(&found),
            |((blocks, values), found)| {
                let mut scales: Vec<f32> = vec![];
                let same = blocks.iter().enumerate().fold(true, |ok, (i, block)| {
                    let scale = f16::from_le_bytes([block[scale_at], block[scale_at + 1]]).to_f32();
                    // Granules come up in order: the first block of one is met when its scale is
                    // not there yet.
                    let known = match scales.get(self.spec.scale_index(
                        0,
                        i / per_row,
                        i % per_row * 256,
                    )) {
                        Some(known) => known.to_bits() == scale.to_bits(),
                        None => {
                            scales.push(scale);
                            true
                        }
                    };
                    ok & known & scale.is_finite()
                });
                *lock(found) = scales;
                unpack(blocks, values) && same
            },
        );
        let mut scales: Vec<f32> = found
            .into_iter()
            .flat_map(|f| f.into_inner().unwrap_or_else(|e| e.into_inner()))
            .collect();
        let mut one = true;
        if self.spec.granularity == Granularity::Tensor {
            one = scales.iter().all(|s| s.to_bits() == scales[0].to_bits());
            scales.truncate(1);
        }
        (done && one).then_some(Some(scales))
    }
}

/// Dequantizes a packed matrix into `out`, `[N, K]`: `scale · value`, planes added in order, as
/// [`Matrix::dequantize_row_into`] does. `scales` is read only where the layout does not hold them.
///
/// # Errors
/// Those of [`unpack`]; [`Error::Length`] if `scales` or `out` have the wrong length;
/// [`Error::Scheme`] for a matrix with zero points.
pub fn dequantize(
    kernels: Kernels,
    pool: &Pool,
    layout: &dyn Layout,
    spec: &MatrixSpec,
    bytes: &[u8],
    scales: &[f32],
    out: &mut [f32],
) -> Result<()> {
    layout.check(spec)?;
    check_len("weights", spec.weights_len(), out.len())?;
    if spec.zero_points != ZeroPoints::None {
        return Err(Error::Scheme(format!(
            "dequantizing packed bytes with {:?} zero points; they are not part of the layout",
            spec.zero_points
        )));
    }
    if !layout.stores_scales() {
        check_len("scales", spec.scales_len(), scales.len())?;
    }
    if out.is_empty() {
        return layout.unpack(spec, bytes).map(drop);
    }
    let right = spec.planes == 1 && bytes.len() == layout.packed_len(spec).bound();
    if let Some(dense) = DenseLayout::new(layout, spec).filter(|_| right) {
        let job = UnpackJob {
            kernels,
            pool,
            spec,
        };
        let rows = (PART / spec.cols).max(1);
        let stride = spec.cols.div_ceil(dense.values());
        let parts = bytes
            .chunks(stride * rows)
            .zip(out.chunks_mut(spec.cols * rows))
            .enumerate();
        let done = job.all(parts, |(part, (bytes, out))| {
            let first = part * rows;
            let rows = bytes
                .chunks(stride)
                .zip(out.chunks_mut(spec.cols))
                .enumerate();
            rows.fold(true, |ok, (i, (bytes, out))| {
                ok & job.dequantize_row(dense, scales, first + i, bytes, out)
            })
        });
        if done {
            return Ok(());
        }
    }
    let unpacked = layout.unpack(spec, bytes)?;
    let scales = unpacked.scales.unwrap_or_else(|| scales.to_vec());
    let matrix = Matrix {
        spec: spec.clone(),
        values: unpacked.values,
        scales,
        zero_points: vec![],
    };
    pool.for_each(out.chunks_mut(spec.cols).enumerate(), |(row, out)| {
        matrix.dequantize_row_into(row, out)
    });
    Ok(())
}
