//! Panels, steps and padding: the measures of the kernel layout.

/// Rows of a panel.
pub const PANEL: usize = 64;

/// Bytes of a step.
pub(crate) const STEP_BYTES: usize = 4 * PANEL;

/// The columns of a row: groups, each padded to whole steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PaddedShape {
    /// Without padding.
    pub(crate) cols: usize,
    /// Columns of a scale group of the weights.
    pub(crate) group: usize,
    /// The same with its padding.
    pub(crate) padded: usize,
}

impl PaddedShape {
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

    /// Scale groups of a row.
    pub(crate) fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Columns of a row with all padding.
    pub(crate) fn stride(&self) -> usize {
        self.groups() * self.padded
    }

    /// Writes one row of `from` into its place, and leaves the padding.
    pub(crate) fn copy_row<T: Copy>(&self, from: &[T], to: &mut [T]) {
        for (from, to) in from.chunks(self.group).zip(to.chunks_mut(self.padded)) {
            to[..from.len()].copy_from_slice(from);
        }
    }
}
