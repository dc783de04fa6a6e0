//! Cosines and sines of rotary positions, which `GroupQueryAttention` reads as tables.

use std::ops::Range;

/// Which of the two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RotaryFunction {
    /// cos(p·ω)
    Cos,
    /// sin(p·ω)
    Sin,
}

/// A table `[positions, frequencies]` of f32.
#[derive(Debug, Clone)]
pub(crate) struct RotaryTable {
    pub(crate) function: RotaryFunction,
    pub(crate) positions: usize,
    /// Radians per position.
    pub(crate) frequencies: Vec<f32>,
    /// Multiplier of the values.
    pub(crate) factor: f32,
}

impl RotaryTable {
    /// Bytes of the table.
    pub(crate) fn len(&self) -> usize {
        self.positions * self.frequencies.len() * 4
    }

    /// Bytes of the rows of these positions. The angle is rounded to f32, as other programs do it.
    pub(crate) fn rows(&self, positions: Range<usize>) -> Vec<u8> {
        let mut out = Vec::with_capacity(positions.len() * self.frequencies.len() * 4);
        for position in positions {
            for &frequency in &self.frequencies {
                let angle = f64::from(position as f32 * frequency);
                let value = match self.function {
                    RotaryFunction::Cos => angle.cos(),
                    RotaryFunction::Sin => angle.sin(),
                };
                out.extend((value as f32 * self.factor).to_le_bytes());
            }
        }
        out
    }
}
