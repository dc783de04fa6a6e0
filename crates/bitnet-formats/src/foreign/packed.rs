//! Integers of 2 to 8 bits with a scale for each row and group.

use super::Foreign;
use super::decode::{Loaded, all_bytes, code, part_error};
use crate::Result;
use crate::storage::Storage;
use crate::tensor::StoredId;

/// The order of the codes in their stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// `[rows, cols·bits/32]`: the words of a row follow each other.
    Rows,
    /// `[rows, cols/(32 div bits)]`: as `Rows`, but no code crosses a word; high bits are unused.
    WholeWords,
    /// GPTQ, `[cols·bits/32, rows]`: the words of a row lie below each other.
    Columns,
    /// AWQ, `[cols, rows/8]`: a word holds a column of eight rows, as 0 2 4 6 1 3 5 7.
    Awq,
}

/// What is subtracted or added.
#[derive(Debug, Clone, Copy)]
pub(super) enum Zeros {
    /// `(q − z)·s` with a constant z.
    Constant(f32),
    /// `q·s + b` with a stored float b for each scale.
    Bias(StoredId),
    /// `(q − z)·s` with packed codes z of `[groups, rows]`; `plus` is added to each code, and the
    /// sum keeps `bits` bits.
    PackedRows { id: StoredId, plus: u32 },
    /// As `PackedRows`, in the order of AWQ.
    PackedAwq(StoredId),
    /// `(q − z)·s` with codes packed down the rows, `[rows·bits/32, groups]`, in words as the order
    /// has them.
    PackedDown(StoredId),
}

impl Order {
    /// 32-bit words of `n` codes of a line.
    pub(super) fn words(self, n: usize, bits: usize) -> usize {
        match self {
            Self::WholeWords => n.div_ceil(32 / bits),
            _ => (n * bits).div_ceil(32),
        }
    }

    /// Code `i` of a line.
    fn code(self, bytes: &[u8], i: usize, bits: usize) -> u32 {
        match self {
            Self::WholeWords => {
                let in_word = 32 / bits;
                code(&bytes[i / in_word * 4..][..4], i % in_word, bits)
            }
            _ => code(bytes, i, bits),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Packed {
    pub(super) bits: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) groups: usize,
    /// Columns of a group, where no order says otherwise.
    pub(super) group: usize,
    pub(super) order: Order,
    pub(super) codes: StoredId,
    pub(super) scales: StoredId,
    /// Whether scales are stored `[groups, rows]` instead of `[rows, groups]`.
    pub(super) scales_by_group: bool,
    pub(super) zeros: Zeros,
    /// I32 of the group of each column.
    pub(super) group_index: Option<StoredId>,
}

/// Position in a word of AWQ of each of eight rows.
const AWQ_POSITION: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Packed {
    pub(super) fn load(&self, storage: &Storage, _: &Foreign) -> Result<Loaded> {
        let scales = storage.floats(self.scales)?;
        let scales = if self.scales_by_group {
            self.by_row(|row, group| scales[group * self.rows + row])
        } else {
            scales
        };
        let codes = match self.order {
            Order::Rows | Order::WholeWords => vec![],
            Order::Columns | Order::Awq => all_bytes(storage, self.codes)?,
        };
        Ok(Loaded {
            codes,
            scales,
            zeros: self.load_zeros(storage)?,
            group_of: self.load_groups(storage)?,
        })
    }

    /// A number for each row and group, by rows.
    fn by_row(&self, number: impl Fn(usize, usize) -> f32) -> Vec<f32> {
        let (rows, groups) = (self.rows, self.groups);
        let all = (0..rows).flat_map(|row| (0..groups).map(move |group| (row, group)));
        all.map(|(row, group)| number(row, group)).collect()
    }

    fn load_zeros(&self, storage: &Storage) -> Result<Vec<f32>> {
        let bits = self.bits;
        let mask = (1 << bits) - 1;
        Ok(match self.zeros {
            Zeros::Constant(_) => vec![],
            Zeros::Bias(id) => storage.floats(id)?,
            Zeros::PackedRows { id, plus } => {
                let bytes = all_bytes(storage, id)?;
                let line = self.rows * bits / 8;
                self.by_row(|row, group| {
                    ((code(&bytes[group * line..], row, bits) + plus) & mask) as f32
                })
            }
            Zeros::PackedAwq(id) => {
                let bytes = all_bytes(storage, id)?;
                self.by_row(|row, group| self.awq_code(&bytes, group, row) as f32)
            }
            Zeros::PackedDown(id) => {
                let bytes = all_bytes(storage, id)?;
                let words = self.order.words(self.rows, bits);
                let columns: Vec<Vec<u8>> = (0..self.groups)
                    .map(|group| column(&bytes, words, self.groups, group))
                    .collect();
                self.by_row(|row, group| self.order.code(&columns[group], row, bits) as f32)
            }
        })
    }

    fn load_groups(&self, storage: &Storage) -> Result<Vec<u32>> {
        let in_order = || (0..self.cols).map(|c| (c / self.group) as u32).collect();
        let Some(id) = self.group_index else {
            return Ok(in_order());
        };
        let bytes = all_bytes(storage, id)?;
        let groups: Vec<u32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect();
        // compressed-tensors: -1 is an index that was never set, and columns are in order then.
        let compressed = matches!(self.order, Order::Rows | Order::WholeWords);
        if compressed && groups.contains(&u32::MAX) {
            return Ok(in_order());
        }
        if let Some(bad) = groups.iter().find(|&&g| g as usize >= self.groups) {
            let expected = format!("groups below {}", self.groups);
            let got = (*bad as i32).to_string();
            return Err(part_error(storage, id, expected, got));
        }
        Ok(groups)
    }

    /// The code of a row in a line of words of AWQ.
    fn awq_code(&self, bytes: &[u8], line: usize, row: usize) -> u32 {
        let word = line * (self.rows / 8) + row / 8;
        code(&bytes[word * 4..word * 4 + 4], AWQ_POSITION[row % 8], 4)
    }

    pub(super) fn row(
        &self,
        storage: &Storage,
        loaded: &Loaded,
        row: usize,
        bytes: &mut Vec<u8>,
        out: &mut [f32],
    ) -> Result<()> {
        match self.order {
            Order::Rows | Order::WholeWords => {
                let len = self.order.words(self.cols, self.bits) * 4;
                bytes.resize(len, 0);
                storage.read(self.codes, (row * len) as u64, bytes)?;
            }
            Order::Columns => {
                *bytes = column(&loaded.codes, self.cols * self.bits / 32, self.rows, row);
            }
            Order::Awq => {}
        }
        let scales = &loaded.scales[row * self.groups..][..self.groups];
        let zeros = loaded.zeros.get(row * self.groups..).unwrap_or_default();
        let columns = out.iter_mut().zip(&loaded.group_of).enumerate();
        for (c, (out, &group)) in columns {
            let group = group as usize;
            let q = match self.order {
                Order::Awq => self.awq_code(&loaded.codes, c, row),
                order => order.code(bytes, c, self.bits),
            } as f32;
            *out = match self.zeros {
                Zeros::Constant(z) => (q - z) * scales[group],
                Zeros::Bias(_) => q * scales[group] + zeros[group],
                _ => (q - zeros[group]) * scales[group],
            };
        }
        Ok(())
    }
}

/// The 32-bit words of column `c` of `[words, stride]`.
fn column(bytes: &[u8], words: usize, stride: usize, c: usize) -> Vec<u8> {
    let word = |w: usize| &bytes[(w * stride + c) * 4..][..4];
    (0..words).flat_map(|w| word(w).iter().copied()).collect()
}
