//! Weights in the kernel layout.

use super::coding::{CodeValues, Coding};
use super::shape::{PANEL, PaddedShape, STEP_BYTES};
use crate::kernels::Kernels;
use crate::lines::{CacheLine, Lines};
use bitnet_core::{MatrixSpec, Precision};
use std::ops::Range;

/// Weights `(N, K)` in the kernel layout. Private to this crate and this process: it is never
/// written to a file.
#[derive(Debug, Clone)]
pub struct Prepacked {
    pub(super) rows: usize,
    pub(super) planes: usize,
    pub(super) precision: Precision,
    pub(super) coding: Coding,
    pub(super) shape: PaddedShape,
    /// `[panels, planes, steps]` of 256 bytes.
    pub(super) data: Lines,
    pub(super) scales: PanelScales,
    pub(super) zeros: PanelZeroPoints,
}

/// Cache lines of a step.
pub(super) const LINES: usize = STEP_BYTES / 64;
/// A number for each row of a panel.
pub(super) type PanelFloats = [f32; PANEL];

#[derive(Debug, Clone)]
pub(super) enum PanelScales {
    /// One for each plane.
    Tensor(Vec<PanelFloats>),
    /// `[planes, panels, groups]`, missing rows 0.
    Rows(Vec<PanelFloats>),
}

#[derive(Debug, Clone)]
pub(super) enum PanelZeroPoints {
    None,
    /// `[panels, groups]`, the integers.
    Integers(Vec<[i32; PANEL]>),
    /// `[panels, groups]`, scale times zero point.
    Floats(Vec<PanelFloats>),
}

/// A [`Matrix`](bitnet_core::Matrix) without its values.
#[derive(Debug, Clone, Copy)]
pub struct MatrixParameters<'a> {
    /// Shape and conventions.
    pub spec: &'a MatrixSpec,
    /// Scales, as in [`Matrix::scales`](bitnet_core::Matrix::scales).
    pub scales: &'a [f32],
    /// Zero points, as in [`Matrix::zero_points`](bitnet_core::Matrix::zero_points).
    pub zero_points: &'a [f32],
}

impl Prepacked {
    /// The matrix `times` times under itself, where one scale is for all rows.
    pub(crate) fn repeated(&self, times: usize) -> Self {
        assert!(
            self.rows.is_multiple_of(PANEL)
                && matches!(
                    (&self.scales, &self.zeros),
                    (PanelScales::Tensor(_), PanelZeroPoints::None)
                )
        );
        let mut data = Lines::filled(CacheLine([0; 64]), self.data.len() * times);
        data.chunks_mut(self.data.len().max(1))
            .for_each(|copy| copy.copy_from_slice(&self.data));
        Self {
            rows: self.rows * times,
            data,
            scales: self.scales.clone(),
            zeros: PanelZeroPoints::None,
            ..*self
        }
    }

    /// N, the number of output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, the number of input features.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// Planes, each with scales of its own.
    pub fn planes(&self) -> usize {
        self.planes
    }

    /// Bytes of the codes, padding included.
    pub fn bytes(&self) -> usize {
        self.data.len() * 64
    }

    /// Bytes of everything it holds.
    pub fn memory(&self) -> usize {
        let rows = match &self.scales {
            PanelScales::Tensor(rows) | PanelScales::Rows(rows) => rows.len(),
        };
        let zeros = match &self.zeros {
            PanelZeroPoints::None => 0,
            PanelZeroPoints::Integers(rows) => rows.len(),
            PanelZeroPoints::Floats(rows) => rows.len(),
        };
        self.bytes() + (rows + zeros) * size_of::<PanelFloats>()
    }

    /// The kernel that a product with int8 activations runs, as instruction set and types, such as
    /// `avx512-w2a8`.
    pub fn kernel_name(&self, kernels: &Kernels) -> String {
        format!("{}-{}a8", kernels.isa(), self.describe())
    }

    /// Weight type, as kernel names have it.
    pub(crate) fn describe(&self) -> &'static str {
        match (self.precision, self.coding) {
            (Precision::Ternary, Coding::Trits) => "w1.6",
            (Precision::Ternary, _) => "w1.58",
            (Precision::Binary, _) => "w1",
            (Precision::Int2, _) => "w2",
            (Precision::Int3, _) => "w3",
            (Precision::Int4, _) => "w4",
            (Precision::Int8, _) => "w8",
        }
    }

    /// Whether float activations can meet it.
    pub(crate) fn takes_floats(&self) -> bool {
        self.precision == Precision::Ternary && self.coding == Coding::Bits2
    }

    pub(crate) fn shape(&self) -> PaddedShape {
        self.shape
    }

    pub(crate) fn coding(&self) -> Coding {
        self.coding
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Scale groups along a row; neighbours that share a scale are one.
    pub fn groups(&self) -> usize {
        self.shape.groups()
    }

    /// Columns of one group.
    pub(super) fn group_cols(&self, group: usize) -> Range<usize> {
        group * self.shape.group..self.cols().min((group + 1) * self.shape.group)
    }

    /// Steps of a whole row of a plane.
    pub(crate) fn steps(&self) -> usize {
        match self.groups() {
            0 => 0,
            n => self.group_steps(n - 1).end,
        }
    }

    /// Steps of one group.
    pub(crate) fn group_steps(&self, group: usize) -> Range<usize> {
        let step = self.coding.step();
        let first = group * self.shape.group.div_ceil(step);
        first..first + self.group_cols(group).len().div_ceil(step)
    }

    /// The codes of some steps of a plane of a panel.
    pub(crate) fn codes(&self, panel: usize, plane: usize, steps: Range<usize>) -> &[u8] {
        let first = ((panel * self.planes + plane) * self.steps() + steps.start) * LINES;
        Lines::bytes(&self.data[first..first + steps.len() * LINES])
    }

    /// The scale of each row of a panel in a group.
    pub(crate) fn scales(&self, panel: usize, plane: usize, group: usize) -> &PanelFloats {
        match &self.scales {
            PanelScales::Tensor(scales) => &scales[plane],
            PanelScales::Rows(scales) => {
                &scales[(plane * self.panels() + panel) * self.groups() + group]
            }
        }
    }

    /// The initial sums `−(offset + z) · Σ x` of a panel and a group; `x` is Σ x of the group.
    pub(crate) fn start(&self, panel: usize, group: usize, x: i32) -> [i32; PANEL] {
        let offset = CodeValues::new(self.precision).offset;
        match &self.zeros {
            PanelZeroPoints::Integers(zeros) => zeros[panel * self.groups() + group]
                .map(|z| (offset + z).wrapping_mul(x).wrapping_neg()),
            PanelZeroPoints::None | PanelZeroPoints::Floats(_) => {
                [offset.wrapping_mul(x).wrapping_neg(); PANEL]
            }
        }
    }

    /// Scale times float zero point of each row of a panel in a group.
    pub(crate) fn shift(&self, panel: usize, group: usize) -> Option<&PanelFloats> {
        match &self.zeros {
            PanelZeroPoints::Floats(zeros) => Some(&zeros[panel * self.groups() + group]),
            PanelZeroPoints::None | PanelZeroPoints::Integers(_) => None,
        }
    }
}
