//! Fixed-width codes, dense, least significant bit first. Ours.
//!
//! `code = value − smallest value` (binary, whose values are two apart: `(value + 1) / 2`). With
//! `b` bits a code, code `j` of a row takes bits `b·j … b·j + b − 1` of the row, and bit `i` of the
//! row is bit `i % 8` of its byte `i / 8`. Each row begins a byte; the bits that are left over are
//! 0.
//!
//! ```text
//! two-bit, a row of 6:   byte 0  [c3 c3 c2 c2 c1 c1 c0 c0]   byte 1  [0 0 0 0 c5 c5 c4 c4]
//! three-bit, a row of 3: byte 0  [c2 c2 c1 c1 c1 c0 c0 c0]   byte 1  [0 0 0 0 0 0 0 c2]
//! ```
//!
//! `byte-aligned` is `two-bit` with each row followed by zero bytes up to a multiple of 64: rows
//! begin on cache lines, and a file that is mapped into memory needs no repacking to be read row by
//! row.

use super::{
    Bad, FastPath, Layout, PackedLen, Unpacked, check_len, check_precision, check_values,
    first_outside,
};
use crate::{Error, MatrixSpec, Precision, Result};

/// A fixed-width layout.
#[derive(Debug)]
pub(super) struct Bits {
    name: &'static str,
    summary: &'static str,
    precisions: &'static [Precision],
    /// A row takes a multiple of this many bytes.
    align: usize,
    fast_path: Option<FastPath>,
}

/// {−1, +1}, one bit.
pub(super) const ONE_BIT: Bits = Bits {
    name: "one-bit",
    summary: "binary, 8 values a byte, 1 bit per weight (ours)",
    precisions: &[Precision::Binary],
    align: 1,
    fast_path: None,
};

/// Ternary and int2 in two bits.
pub(super) const TWO_BIT: Bits = Bits {
    name: "two-bit",
    summary: "ternary and int2, 4 values a byte, 2 bits per weight (ours)",
    precisions: &[Precision::Ternary, Precision::Int2],
    align: 1,
    fast_path: Some(FastPath::TwoBit),
};

/// −4 … 3 in three bits.
pub(super) const THREE_BIT: Bits = Bits {
    name: "three-bit",
    summary: "int3, 8 values in 3 bytes, 3 bits per weight (ours)",
    precisions: &[Precision::Int3],
    align: 1,
    fast_path: None,
};

/// −8 … 7 in four bits.
pub(super) const FOUR_BIT: Bits = Bits {
    name: "four-bit",
    summary: "int4, 2 values a byte, 4 bits per weight (ours)",
    precisions: &[Precision::Int4],
    align: 1,
    fast_path: None,
};

/// `two-bit` with rows on cache lines.
pub(super) const BYTE_ALIGNED: Bits = Bits {
    name: "byte-aligned",
    summary: "ternary and int2, 4 values a byte, each row padded to 64 bytes (ours)",
    precisions: &[Precision::Ternary, Precision::Int2],
    align: 64,
    fast_path: None,
};

impl Bits {
    /// Bytes of a row before the alignment.
    fn used(&self, spec: &MatrixSpec) -> usize {
        packed_len(spec.precision, spec.cols)
    }

    /// Bytes from one row to the next.
    fn stride(&self, spec: &MatrixSpec) -> usize {
        self.used(spec).next_multiple_of(self.align)
    }
}

impl Layout for Bits {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn default_for(&self) -> &'static [Precision] {
        if self.align == 1 {
            self.precisions
        } else {
            &[]
        }
    }

    fn fast_path(&self) -> Option<FastPath> {
        self.fast_path
    }

    fn check(&self, spec: &MatrixSpec) -> Result<()> {
        check_precision(self.name, spec, self.precisions)?;
        match spec.stacked_rows().checked_mul(self.stride(spec)) {
            Some(n) if n <= isize::MAX as usize => Ok(()),
            _ => Err(Error::TooLarge {
                rows: spec.rows,
                cols: spec.cols,
            }),
        }
    }

    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen {
        PackedLen::Exact(spec.stacked_rows().saturating_mul(self.stride(spec)))
    }

    fn chunk_rows(&self, _: &MatrixSpec) -> Option<usize> {
        Some(1)
    }

    fn pack_into(
        &self,
        spec: &MatrixSpec,
        values: &[i8],
        _: &[f32],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.check(spec)?;
        check_values(spec, values)?;
        if values.is_empty() {
            return Ok(());
        }
        let start = out.len();
        out.resize(start + self.packed_len(spec).bound(), 0);
        let used = self.used(spec);
        for (row, out) in values
            .chunks_exact(spec.cols)
            .zip(out[start..].chunks_exact_mut(self.stride(spec)))
        {
            pack_row(spec.precision, row, &mut out[..used]);
        }
        Ok(())
    }

    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked> {
        self.check(spec)?;
        check_len("packed bytes", self.packed_len(spec).bound(), bytes.len())?;
        let mut values = vec![0; spec.values_len()];
        if values.is_empty() {
            return Ok(Unpacked {
                values,
                scales: None,
            });
        }
        let (used, stride) = (self.used(spec), self.stride(spec));
        for (i, (bytes, row)) in bytes
            .chunks_exact(stride)
            .zip(values.chunks_exact_mut(spec.cols))
            .enumerate()
        {
            unpack_row(spec.precision, &bytes[..used], row)
                .map_err(|bad| bad.at(self.name, i * stride))?;
            if let Some(pad) = bytes[used..].iter().position(|&b| b != 0) {
                return Err(Bad::new(
                    used + pad,
                    format!("{:#04x} in the padding of row {i}", bytes[used + pad]),
                )
                .at(self.name, i * stride));
            }
        }
        Ok(Unpacked {
            values,
            scales: None,
        })
    }
}

/// Bytes that `n` codes take.
pub(super) fn packed_len(precision: Precision, n: usize) -> usize {
    (n * precision.code_bits() as usize).div_ceil(8)
}

/// Packs `values`, which are all in the alphabet, into `out` of [`packed_len`] bytes.
pub(super) fn pack_row(precision: Precision, values: &[i8], out: &mut [u8]) {
    match precision {
        Precision::Binary => {
            pack_codes::<1>(values, out, |v| v.wrapping_add(1).cast_unsigned() >> 1)
        }
        Precision::Ternary => pack_codes::<2>(values, out, |v| v.wrapping_add(1).cast_unsigned()),
        Precision::Int2 => pack_codes::<2>(values, out, |v| v.wrapping_add(2).cast_unsigned()),
        Precision::Int3 => pack_codes::<3>(values, out, |v| v.wrapping_add(4).cast_unsigned()),
        Precision::Int4 => pack_codes::<4>(values, out, |v| v.wrapping_add(8).cast_unsigned()),
        Precision::Int8 => pack_codes::<8>(values, out, |v| v.cast_unsigned() ^ 0x80),
    }
}

/// Unpacks [`packed_len`] bytes into `values`; a code outside the alphabet and left-over bits that
/// are not 0 are [`Bad`].
pub(super) fn unpack_row(precision: Precision, bytes: &[u8], values: &mut [i8]) -> Result<(), Bad> {
    let padded = match precision {
        Precision::Binary => {
            unpack_codes::<1>(bytes, values, |c| (c << 1).cast_signed().wrapping_sub(1))
        }
        Precision::Ternary => unpack_codes::<2>(bytes, values, |c| c.cast_signed().wrapping_sub(1)),
        Precision::Int2 => unpack_codes::<2>(bytes, values, |c| c.cast_signed().wrapping_sub(2)),
        Precision::Int3 => unpack_codes::<3>(bytes, values, |c| c.cast_signed().wrapping_sub(4)),
        Precision::Int4 => unpack_codes::<4>(bytes, values, |c| c.cast_signed().wrapping_sub(8)),
        Precision::Int8 => unpack_codes::<8>(bytes, values, |c| (c ^ 0x80).cast_signed()),
    };
    if precision == Precision::Ternary
        && let Some(i) = first_outside(precision, values)
    {
        return Err(Bad::new(
            i / 4,
            format!("{:#04x}, whose code {} is 3", bytes[i / 4], i % 4),
        ));
    }
    if padded {
        Ok(())
    } else {
        let last = bytes.len() - 1;
        Err(Bad::new(
            last,
            format!(
                "{:#04x}, with bits beyond the row's {} codes",
                bytes[last],
                values.len()
            ),
        ))
    }
}

/// A word with the low `width` bits of each `step` bits set.
const fn mask(width: usize, step: usize) -> u64 {
    let low = if width == 64 {
        u64::MAX
    } else {
        (1 << width) - 1
    };
    let mut word = 0;
    let mut at = 0;
    while at < 64 {
        word |= low << at;
        at += step;
    }
    word
}

/// Eight codes of `B` bits, one a byte, moved together into the low `8·B` bits: neighbours first,
/// then pairs, then fours.
const fn gather<const B: usize>(codes: [u8; 8]) -> u64 {
    let x = u64::from_le_bytes(codes);
    let x = (x | x >> (8 - B)) & const { mask(2 * B, 16) };
    let x = (x | x >> (16 - 2 * B)) & const { mask(4 * B, 32) };
    (x | x >> (32 - 4 * B)) & const { mask(8 * B, 64) }
}

/// The inverse of [`gather`].
const fn spread<const B: usize>(x: u64) -> [u8; 8] {
    let x = (x | x << (32 - 4 * B)) & const { mask(4 * B, 32) };
    let x = (x | x << (16 - 2 * B)) & const { mask(2 * B, 16) };
    ((x | x << (8 - B)) & const { mask(B, 8) }).to_le_bytes()
}

fn pack_codes<const B: usize>(values: &[i8], out: &mut [u8], code: impl Fn(i8) -> u8) {
    let (eights, tail) = values.as_chunks::<8>();
    let (body, end) = out.split_at_mut(B * eights.len());
    for (values, out) in eights.iter().zip(body.as_chunks_mut::<B>().0) {
        out.copy_from_slice(&gather::<B>(values.map(&code)).to_le_bytes()[..B]);
    }
    let mut codes = [0; 8];
    for (slot, &value) in codes.iter_mut().zip(tail) {
        *slot = code(value);
    }
    end.copy_from_slice(&gather::<B>(codes).to_le_bytes()[..end.len()]);
}

/// Returns whether the left-over bits are 0.
fn unpack_codes<const B: usize>(bytes: &[u8], values: &mut [i8], value: impl Fn(u8) -> i8) -> bool {
    let (eights, tail) = values.as_chunks_mut::<8>();
    let (body, end) = bytes.split_at(B * eights.len());
    for (bytes, values) in body.as_chunks::<B>().0.iter().zip(eights) {
        let mut word = [0; 8];
        word[..B].copy_from_slice(bytes);
        *values = spread::<B>(u64::from_le_bytes(word)).map(&value);
    }
    let mut word = [0; 8];
    word[..end.len()].copy_from_slice(end);
    let codes = spread::<B>(u64::from_le_bytes(word));
    for (slot, &code) in tail.iter_mut().zip(&codes) {
        *slot = value(code);
    }
    codes[tail.len()..].iter().all(|&c| c == 0)
}
