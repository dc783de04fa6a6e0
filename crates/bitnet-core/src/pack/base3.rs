//! `base-3`: five trits a byte, 1.6 bits each. Ours.
//!
//! `byte = Σ (value_i + 1) · 3^i`, i = 0 … 4: the first trit is the least significant digit and a
//! byte is at most 242. Each row begins a byte; the digits that the last byte of a row has left
//! over are 0. So 243 … 255 and a left-over digit that is not 0 are corruption.
//!
//! ```text
//! −1 +1 0 0 −1 | +1     0 + 2·3 + 1·9 + 1·27 + 0·81 = 42,   2
//! ```

use super::{Bad, FastPath, Layout, PackedLen, Unpacked, check_len, check_precision, check_values};
use crate::{MatrixSpec, Precision, Result};

/// Five trits a byte.
#[derive(Debug)]
pub(super) struct Base3;

/// The five values of each byte below 243.
const VALUES: [[i8; 5]; 256] = {
    let mut table = [[0; 5]; 256];
    let mut byte = 0;
    while byte < 243 {
        let (mut rest, mut i) = (byte, 0);
        while i < 5 {
            table[byte][i] = (rest % 3) as i8 - 1;
            rest /= 3;
            i += 1;
        }
        byte += 1;
    }
    table
};

impl Layout for Base3 {
    fn name(&self) -> &'static str {
        "base-3"
    }

    fn summary(&self) -> &'static str {
        "ternary, 5 values a byte, 1.6 bits per weight (ours)"
    }

    fn fast_path(&self) -> Option<FastPath> {
        Some(FastPath::BaseThree)
    }

    fn check(&self, spec: &MatrixSpec) -> Result<()> {
        check_precision(self.name(), spec, &[Precision::Ternary])
    }

    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen {
        PackedLen::Exact(spec.stacked_rows() * packed_len(spec.cols))
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
        for (row, out) in values
            .chunks_exact(spec.cols)
            .zip(out[start..].chunks_exact_mut(packed_len(spec.cols)))
        {
            pack_row(row, out);
        }
        Ok(())
    }

    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked> {
        self.check(spec)?;
        check_len("packed bytes", self.packed_len(spec).bound(), bytes.len())?;
        let mut values = vec![0; spec.values_len()];
        if !values.is_empty() {
            let stride = packed_len(spec.cols);
            for (i, (bytes, row)) in bytes
                .chunks_exact(stride)
                .zip(values.chunks_exact_mut(spec.cols))
                .enumerate()
            {
                unpack_row(bytes, row).map_err(|bad| bad.at(self.name(), i * stride))?;
            }
        }
        Ok(Unpacked {
            values,
            scales: None,
        })
    }
}

/// Bytes that `n` trits take.
pub(super) const fn packed_len(n: usize) -> usize {
    n.div_ceil(5)
}

fn byte_of(values: &[i8]) -> u8 {
    values.iter().rev().fold(0u8, |byte, &v| {
        byte.wrapping_mul(3)
            .wrapping_add(v.wrapping_add(1).cast_unsigned())
    })
}

/// Packs trits into `out` of [`packed_len`] bytes.
pub(super) fn pack_row(values: &[i8], out: &mut [u8]) {
    let (fives, tail) = values.as_chunks::<5>();
    let (body, end) = out.split_at_mut(fives.len());
    for (byte, values) in body.iter_mut().zip(fives) {
        *byte = byte_of(values);
    }
    if let [byte] = end {
        *byte = byte_of(tail);
    }
}

/// Unpacks [`packed_len`] bytes.
pub(super) fn unpack_row(bytes: &[u8], values: &mut [i8]) -> Result<(), Bad> {
    if bytes.iter().fold(0u8, |bad, &b| bad | u8::from(b > 242)) != 0
        && let Some(i) = bytes.iter().position(|&b| b > 242)
    {
        return Err(Bad::new(
            i,
            format!("{}, more than the 242 of five trits", bytes[i]),
        ));
    }
    let (fives, tail) = values.as_chunks_mut::<5>();
    let (body, end) = bytes.split_at(fives.len());
    for (values, &byte) in fives.iter_mut().zip(body) {
        *values = VALUES[usize::from(byte)];
    }
    if let [byte] = *end {
        let (digits, padding) = VALUES[usize::from(byte)].split_at(tail.len());
        tail.copy_from_slice(digits);
        if padding.iter().any(|&v| v != -1) {
            return Err(Bad::new(
                body.len(),
                format!("{byte}, with digits beyond the last {} trits", tail.len()),
            ));
        }
    }
    Ok(())
}

/// [`unpack_row`] of bytes whose number is not known to be right.
pub(super) fn decode_body(body: &[u8], values: &mut [i8]) -> Result<(), Bad> {
    let expected = packed_len(values.len());
    if body.len() < expected {
        return Err(super::framed::ends(body));
    }
    super::framed::check_end(body, expected)?;
    unpack_row(body, values)
}
