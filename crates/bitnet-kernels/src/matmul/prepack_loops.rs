//! Loops of prepacking: checks of values, and codes of many columns at once.

/// Values that [`pack_lanes`] packs at once: four steps of a row.
pub(crate) const RUN: usize = 64;

/// The lanes of whole steps of a row of trits or int2: `value + offset` of column 4f + b in bits
/// 2f, 2f + 1 of byte b. Writes the lanes of whole runs of [`RUN`] values, and returns their
/// number.
#[inline(always)]
pub(crate) fn pack_lanes(values: &[i8], offset: u8, lanes: &mut [u32]) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    for (values, lanes) in values
        .as_chunks::<RUN>()
        .0
        .iter()
        .zip(lanes.as_chunks_mut::<4>().0)
    {
        let mut pairs = [0; 8];
        for (pair, eight) in pairs.iter_mut().zip(values.as_chunks::<8>().0) {
            let eight = u64::from_le_bytes(eight.map(i8::cast_unsigned));
            // Bytes are added without a carry into the next one.
            let codes =
                ((eight & (0x7f * EACH)) + u64::from(offset) * EACH) ^ (eight & (0x80 * EACH));
            // The columns from 4 on come to bits 2 and 3 of the first four.
            *pair = codes | codes >> 30;
        }
        for (lane, [low, high]) in lanes.iter_mut().zip(pairs.as_chunks::<2>().0) {
            *lane = (low | high << 4) as u32;
        }
    }
    values.len() / RUN * 4
}

/// Whether a value is outside `low … high`, or 0 where that is none.
#[inline(always)]
pub(crate) fn any_outside(values: &[i8], low: i8, high: i8, no_zero: bool) -> bool {
    // Without an early exit this runs in wide registers.
    values.iter().fold(false, |bad, &v| {
        bad | (v < low) | (v > high) | (no_zero & (v == 0))
    })
}
