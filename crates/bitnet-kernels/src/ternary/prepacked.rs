//! Ternary weights in the kernel layout.

use super::{MAX_COLS, PANEL, STEP, STEP_BYTES};
use crate::lines::{Line, Lines};
use crate::{Error, Pool};
use bitnet_core::{Granularity, Matrix, Precision, ZeroPoints};
use std::ops::Range;
use std::sync::Mutex;

/// Ternary weights `(N, K)` in the kernel layout. Private to this crate and this process: it is never written to a file.
#[derive(Debug, Clone)]
pub struct Prepacked {
    rows: usize,
    cols: usize,
    /// Columns of a scale group; all of them unless the scales go by group.
    group: usize,
    /// `[panels, steps]` of 256 bytes.
    data: Lines,
    scales: Scales,
}

/// Lines of a step.
const LINES: usize = STEP_BYTES / 64;
/// Code of the value 0 in all four fields.
const ZERO: u8 = 0b01_01_01_01;

#[derive(Debug, Clone)]
enum Scales {
    /// One for all.
    Tensor(Box<[f32; PANEL]>),
    /// `[panels, groups]`, missing rows 0.
    Rows(Vec<[f32; PANEL]>),
}

fn unsupported(why: String) -> Error {
    bitnet_core::Error::Unsupported { layout: "the ternary kernels", why }.into()
}

impl Prepacked {
    /// Lays a ternary matrix of one plane out for the kernels.
    ///
    /// # Errors
    /// [`Error::Matrix`] for another precision, several planes, zero points, a value that is not a trit, or more than [`MAX_COLS`]
    /// columns, and for a matrix whose parts do not fit one another.
    pub fn new(matrix: &Matrix, pool: &Pool) -> Result<Self, Error> {
        matrix.validate()?;
        let spec = &matrix.spec;
        if spec.precision != Precision::Ternary || spec.planes != 1 || spec.zero_points != ZeroPoints::None {
            return Err(unsupported(format!("{} planes of {}, zero points {:?}", spec.planes, spec.precision, spec.zero_points)));
        }
        if spec.cols > MAX_COLS {
            return Err(unsupported(format!("{} columns, at most {MAX_COLS}", spec.cols)));
        }
        let group = match spec.granularity {
            Granularity::Group(g) => g.min(spec.cols.max(1)),
            Granularity::Tensor | Granularity::Channel => spec.cols.max(1),
        };
        let data = Lines::filled(Line([ZERO; 64]), 0);
        let mut packed = Self { rows: spec.rows, cols: spec.cols, group, data, scales: Scales::Rows(vec![]) };
        let panel_lines = packed.steps() * LINES;
        packed.scales = match spec.granularity {
            Granularity::Tensor => Scales::Tensor(Box::new([matrix.scales[0]; PANEL])),
            Granularity::Channel | Granularity::Group(_) => {
                let groups = packed.groups();
                let mut scales = vec![[0.0; PANEL]; packed.panels() * groups];
                for (i, &scale) in matrix.scales.iter().enumerate() {
                    let (row, g) = (i / groups, i % groups);
                    scales[row / PANEL * groups + g][row % PANEL] = scale;
                }
                Scales::Rows(scales)
            }
        };
        let mut data = Lines::filled(Line([ZERO; 64]), packed.panels() * panel_lines);
        let panels: Vec<_> = data.chunks_mut(panel_lines.max(1)).map(Mutex::new).collect();
        let broken = Mutex::new(None::<usize>);
        pool.run(panels.len(), |panel| {
            // One part has each panel, so the lock is free; a poisoned one belongs to a part that panicked, which ends the run.
            let mut lines = panels[panel].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(index) = packed.lay_out(panel, &matrix.values, &mut lines) {
                let mut first = broken.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                *first = Some(first.map_or(index, |f| f.min(index)));
            }
        });
        drop(panels);
        if let Some(index) = broken.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            return Err(unsupported(format!("value {} at {index} is not -1, 0 or 1", matrix.values[index])));
        }
        packed.data = data;
        Ok(packed)
    }

    /// Writes the codes of one panel; the index of a value that is not a trit.
    fn lay_out(&self, panel: usize, values: &[i8], lines: &mut [Line]) -> Option<usize> {
        for row in panel * PANEL..self.rows.min((panel + 1) * PANEL) {
            let at = 4 * (row % PANEL);
            let values = &values[row * self.cols..][..self.cols];
            // Without an early exit this runs in wide registers; the search for the place is for the one row that needs it.
            if values.iter().fold(false, |bad, v| bad | !(-1..=1).contains(v)) {
                return values.iter().position(|v| !(-1..=1).contains(v)).map(|i| row * self.cols + i);
            }
            for (g, values) in values.chunks(self.group).enumerate() {
                let steps = lines[self.group_steps(g).start * LINES..].chunks_mut(LINES);
                for (step, values) in steps.zip(values.chunks(STEP)) {
                    let mut trits = [0; STEP];
                    trits[..values.len()].copy_from_slice(values);
                    let quads = trits.as_chunks::<4>().0.iter().map(|q| u32::from_le_bytes(q.map(|v| (v + 1) as u8)));
                    let codes = quads.rev().fold(0, |codes, quad| codes << 2 | quad);
                    step[at / 64].0[at % 64..][..4].copy_from_slice(&codes.to_le_bytes());
                }
            }
        }
        None
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

    pub(crate) fn group(&self) -> usize {
        self.group
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Scale groups along a row.
    pub(crate) fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Steps of a whole row.
    pub(crate) fn steps(&self) -> usize {
        match self.groups() {
            0 => 0,
            n => self.group_steps(n - 1).end,
        }
    }

    /// Steps of one group.
    pub(crate) fn group_steps(&self, group: usize) -> Range<usize> {
        let first = group * self.group.div_ceil(STEP);
        let cols = self.group.min(self.cols - group * self.group);
        first..first + cols.div_ceil(STEP)
    }

    /// The codes of some steps of a panel.
    pub(crate) fn codes(&self, panel: usize, steps: Range<usize>) -> &[u8] {
        let first = (panel * self.steps() + steps.start) * LINES;
        Lines::bytes(&self.data[first..first + steps.len() * LINES])
    }

    /// The scale of each row of a panel in a group.
    pub(crate) fn scales(&self, panel: usize, group: usize) -> &[f32; PANEL] {
        match &self.scales {
            Scales::Tensor(scales) => scales,
            Scales::Rows(scales) => &scales[panel * self.groups() + group],
        }
    }
}
