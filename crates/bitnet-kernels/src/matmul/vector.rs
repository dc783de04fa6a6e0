//! The products once, over the few operations that an instruction set has for them.
//!
//! ```text
//! for each block of steps that an accumulator has room for
//!     for each run of rows that fits the registers
//!         for each step: load codes; for each field: mask, and for each token: broadcast four activations, multiply and add
//!         add the accumulators to the sums
//! ```
//!
//! A tile goes through a block several times where the registers do not hold all 64 rows; blocks
//! follow one another, which keeps the stream of weights sequential.

use super::tiles::{Columns, Sums, TOKENS};
use super::{PANEL, STEP_BYTES};
use std::hint::black_box;

/// What a code times an activation adds to a 16-bit sum at most, for each unit of the code.
const ACTIVATION: usize = 128;

/// The registers of an instruction set.
///
/// # Safety
/// Every function but `room` is to be called only where the machine has the instruction set.
pub(crate) unsafe trait Vector {
    /// [`Vector::ROWS`] rows of four bytes: codes, or four activations for each row.
    type Bytes: Copy;
    /// Sums of products of as many rows.
    type Sum: Copy;
    /// Rows of a register.
    const ROWS: usize;
    /// Whether codes above 127 can be multiplied.
    const UNSIGNED: bool;

    /// Products that a sum takes, at least, when no code exceeds `most`.
    fn room(most: usize) -> usize;

    /// Reads `4 · ROWS` bytes, aligned or not.
    unsafe fn load(from: *const u8) -> Self::Bytes;
    /// The same byte everywhere.
    unsafe fn fill(byte: u8) -> Self::Bytes;
    /// Four bytes for each row.
    unsafe fn splat(four: i32) -> Self::Bytes;
    unsafe fn and(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Shifts down by 1, 2, 4 or 8 bits; what comes into a byte from its neighbour is masked away
    /// later.
    unsafe fn down(codes: Self::Bytes, bits: usize) -> Self::Bytes;
    unsafe fn zero() -> Self::Sum;
    /// `sum[r] + Σ_{b < 4} codes[4r + b] · x[4r + b]`, codes unsigned, x signed.
    unsafe fn dot(sum: Self::Sum, codes: Self::Bytes, x: Self::Bytes) -> Self::Sum;
    /// Asks for what will be read some way after the step at `at`, which need not be memory of
    /// ours.
    #[inline(always)]
    unsafe fn ask(_at: *const u8) {}
    /// `sums[r] += (sum[r] << up) >> down` for [`Vector::ROWS`] sums from `sums` on.
    unsafe fn add(sum: Self::Sum, up: u32, down: u32, sums: *mut i32);
}

/// Products that fit 16-bit sums which take two at a time.
pub(crate) const fn room_of_pairs(most: usize) -> usize {
    (1 << 15) / (2 * ACTIVATION * most)
}
/// Products that fit 16-bit sums which take one at a time.
pub(crate) const fn room_of_products(most: usize) -> usize {
    (1 << 15) / (ACTIVATION * most)
}
const _: () = assert!(
    room_of_products(15) * 15 * ACTIVATION <= 1 << 15
        && room_of_products(3) * 3 * ACTIVATION <= 1 << 15
);

/// Sums of four products that a 32-bit sum takes without a wrap.
pub(crate) const fn room_of_quads(most: usize) -> usize {
    i32::MAX as usize / (4 * ACTIVATION * most)
}
const _: () = assert!(
    room_of_pairs(15) * 2 * 15 * ACTIVATION <= 1 << 15
        && room_of_pairs(3) * 2 * 3 * ACTIVATION <= 1 << 15
);

/// Four activations.
///
/// # Safety
/// `x + 4` bytes are readable.
#[inline(always)]
unsafe fn four(x: *const i8) -> i32 {
    // SAFETY: the caller's; the read needs no alignment.
    unsafe { x.cast::<i32>().read_unaligned() }
}

/// `sums[t][r] += Σ_k code[r, k] · x[t, k]` from steps with codes of `BITS` bits, R registers of
/// rows and T tokens at a time.
///
/// Fields f with the same f mod C share accumulators and stay where they are in their bytes, so
/// that only every C-th needs a shift: their sums are multiples of a power of 2. Their products
/// with 8-bit tops are counted in `room` (`most` is what a masked byte can hold).
///
/// # Safety
/// The machine has V; `x` holds T rows of the columns of `weights`' steps; there are T sums.
#[inline(always)]
pub(crate) unsafe fn direct<
    V: Vector,
    const BITS: usize,
    const R: usize,
    const T: usize,
    const C: usize,
>(
    weights: &[u8],
    x: Columns<'_>,
    sums: &mut [Sums],
) {
    const { assert!(BITS * C <= 8 && R * V::ROWS <= PANEL && T <= TOKENS) };
    let fields = 8 / BITS;
    let low = ((1u16 << BITS) - 1) as u8;
    let room = (V::room(usize::from(low) << (BITS * (C - 1))) * C / fields).max(1);
    // SAFETY: the caller's, and the bounds named beside each access.
    unsafe {
        let mut masks = [V::fill(low); C];
        for (c, mask) in masks.iter_mut().enumerate() {
            *mask = V::fill(low << (BITS * c));
        }
        for (block, weights) in weights.chunks(room * STEP_BYTES).enumerate() {
            for part in 0..PANEL / (R * V::ROWS) {
                let mut acc = [[[V::zero(); R]; C]; T];
                for step in 0..weights.len() / STEP_BYTES {
                    // Inside `weights`, which has so many steps of PANEL rows.
                    let at = weights
                        .as_ptr()
                        .add(step * STEP_BYTES + part * R * 4 * V::ROWS);
                    if part == 0 {
                        V::ask(at);
                    }
                    let mut w = [masks[0]; R];
                    for (r, w) in w.iter_mut().enumerate() {
                        *w = V::load(at.add(r * 4 * V::ROWS));
                    }
                    for field in 0..fields {
                        if field > 0 && field % C == 0 {
                            for w in &mut w {
                                *w = V::down(*w, BITS * C);
                            }
                        }
                        let mut codes = w;
                        if BITS < 8 {
                            for codes in &mut codes {
                                *codes = V::and(*codes, masks[field % C]);
                            }
                        }
                        for (token, acc) in acc.iter_mut().enumerate() {
                            // Inside `x`, which the caller vouches for.
                            let column = ((block * room + step) * fields + field) * 4;
                            let x =
                                V::splat(four(x.values.as_ptr().add(token * x.stride + column)));
                            for r in 0..R {
                                acc[field % C][r] = V::dot(acc[field % C][r], codes[r], x);
                            }
                        }
                    }
                }
                for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                    for (c, acc) in acc.iter().enumerate() {
                        for (r, &acc) in acc.iter().enumerate() {
                            // A binary code stands for twice itself.
                            V::add(
                                acc,
                                u32::from(BITS == 1),
                                (BITS * c) as u32,
                                sums[(part * R + r) * V::ROWS..].as_mut_ptr(),
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Quads between two jumps of [`dense`].
const UNROLLED: usize = 4;

/// Four columns, from `column` on, of T tokens, whose rows begin at `x`, times the codes at `at`.
///
/// # Safety
/// The machine has V; the codes of R registers and the columns of each row are readable.
#[inline(always)]
unsafe fn add_quad<V: Vector, const R: usize, const T: usize>(
    acc: &mut [[V::Sum; R]; T],
    at: *const u8,
    x: &[*const i8; T],
    column: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut w = [V::fill(0); R];
        for (r, w) in w.iter_mut().enumerate() {
            *w = V::load(at.add(r * 4 * V::ROWS));
        }
        for (acc, x) in acc.iter_mut().zip(x) {
            let x = V::splat(four(x.add(column)));
            for r in 0..R {
                acc[r] = V::dot(acc[r], w[r], x);
            }
        }
    }
}

/// The same from steps that are unpacked to a code in each byte, none above `most`.
///
/// # Safety
/// The machine has V and multiplies codes up to `most`; `x` holds T rows of the columns of `codes`;
/// there are T sums.
#[inline(always)]
pub(crate) unsafe fn dense<V: Vector, const R: usize, const T: usize>(
    codes: &[u8],
    most: usize,
    x: Columns<'_>,
    sums: &mut [Sums],
) {
    const { assert!(R * V::ROWS <= PANEL && T <= TOKENS) };
    let room = V::room(most);
    // SAFETY: the caller's, and the bounds named beside each access.
    unsafe {
        for (block, codes) in codes.chunks(room.saturating_mul(STEP_BYTES)).enumerate() {
            for part in 0..PANEL / (R * V::ROWS) {
                let mut acc = [[V::zero(); R]; T];
                // A pointer for each token, all moved by one index: sums of strides would take the
                // ports of the products.
                let mut rows = [x.values.as_ptr(); T];
                for (token, row) in rows.iter_mut().enumerate() {
                    *row = black_box(row.add(token * x.stride + block * room * 4));
                }
                let at = codes.as_ptr().add(part * R * 4 * V::ROWS);
                let quads = codes.len() / STEP_BYTES;
                let mut quad = 0;
                while quad + UNROLLED <= quads {
                    for i in 0..UNROLLED {
                        add_quad::<V, R, T>(
                            &mut acc,
                            at.add((quad + i) * STEP_BYTES),
                            &rows,
                            4 * (quad + i),
                        );
                    }
                    quad += UNROLLED;
                }
                for quad in quad..quads {
                    add_quad::<V, R, T>(&mut acc, at.add(quad * STEP_BYTES), &rows, 4 * quad);
                }
                for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                    for (r, &acc) in acc.iter().enumerate() {
                        V::add(acc, 0, 0, sums[(part * R + r) * V::ROWS..].as_mut_ptr());
                    }
                }
            }
        }
    }
}

/// The same from codes of eight bits where only small ones can be multiplied: the two halves of a
/// byte, one after the other.
///
/// # Safety
/// As [`dense`].
#[inline(always)]
pub(crate) unsafe fn halves<V: Vector, const R: usize, const T: usize>(
    codes: &[u8],
    x: Columns<'_>,
    sums: &mut [Sums],
) {
    const { assert!(R * V::ROWS <= PANEL && T <= TOKENS) };
    let room = V::room(15);
    // SAFETY: the caller's, and the bounds named beside each access.
    unsafe {
        let mask = V::fill(15);
        for (block, codes) in codes.chunks(room.saturating_mul(STEP_BYTES)).enumerate() {
            for part in 0..PANEL / (R * V::ROWS) {
                let mut acc = [[[V::zero(); R]; 2]; T];
                for quad in 0..codes.len() / STEP_BYTES {
                    // Inside `codes`, which has so many quads of PANEL rows.
                    let at = codes
                        .as_ptr()
                        .add(quad * STEP_BYTES + part * R * 4 * V::ROWS);
                    let mut w = [[mask; R]; 2];
                    let [low, high] = &mut w;
                    for (r, (low, high)) in low.iter_mut().zip(high).enumerate() {
                        let both = V::load(at.add(r * 4 * V::ROWS));
                        *low = V::and(both, mask);
                        *high = V::and(V::down(both, 4), mask);
                    }
                    for (token, acc) in acc.iter_mut().enumerate() {
                        // Inside `x`, which the caller vouches for.
                        let x = V::splat(four(
                            x.values
                                .as_ptr()
                                .add(token * x.stride + (block * room + quad) * 4),
                        ));
                        for (acc, w) in acc.iter_mut().zip(&w) {
                            for r in 0..R {
                                acc[r] = V::dot(acc[r], w[r], x);
                            }
                        }
                    }
                }
                for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                    for (half, acc) in acc.iter().enumerate() {
                        for (r, &acc) in acc.iter().enumerate() {
                            V::add(
                                acc,
                                4 * half as u32,
                                0,
                                sums[(part * R + r) * V::ROWS..].as_mut_ptr(),
                            );
                        }
                    }
                }
            }
        }
    }
}

/// The entry points of one instruction set: bounds, and coding and number of tokens as constants.
///
/// `$rows` registers of rows to a tile, `$one` and `$two` the fields that stay in place for one and
/// for two tokens (1, 2 or 4).
macro_rules! entries {
    ($vector:ty, $features:literal, rows $rows:literal, in place $one:literal $two:literal) => {
        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn direct(coding: Coding, weights: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
            x.check(weights.len() / STEP_BYTES * coding.step(), sums.len());
            // SAFETY: the tile's bound was checked on the line above.
            unsafe {
                match coding {
                    Coding::Bits1 => entries!(@tokens $vector, 1, weights, x, sums, $rows, $one, $two),
                    Coding::Bits2 => entries!(@tokens $vector, 2, weights, x, sums, $rows, $one, $two),
                    Coding::Bits4 => entries!(@tokens $vector, 4, weights, x, sums, $rows, { if $one > 2 { 2 } else { $one } }, { if $two > 2 { 2 } else { $two } }),
                    Coding::Bits8 if <$vector as Vector>::UNSIGNED => entries!(@tokens $vector, 8, weights, x, sums, $rows, 1, 1),
                    Coding::Bits8 => bytes(weights, x, sums),
                    Coding::Trits => tiles::by_unpacking(coding, weights, x, sums, |codes, x, sums| dense(coding.most(), codes, x, sums)),
                }
            }
        }

        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn dense(most: usize, codes: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
            x.check(codes.len() / STEP_BYTES * 4, sums.len());
            // SAFETY: the tile's bound was checked on the line above.
            unsafe {
                if most > 15 {
                    return bytes(codes, x, sums);
                }
                match sums.len() {
                    1 => vector::dense::<$vector, $rows, 1>(codes, most, x, sums),
                    2 => vector::dense::<$vector, $rows, 2>(codes, most, x, sums),
                    3 => vector::dense::<$vector, $rows, 3>(codes, most, x, sums),
                    4 => vector::dense::<$vector, $rows, 4>(codes, most, x, sums),
                    5 => vector::dense::<$vector, $rows, 5>(codes, most, x, sums),
                    6 => vector::dense::<$vector, $rows, 6>(codes, most, x, sums),
                    _ => {}
                }
            }
        }

        /// # Safety
        #[doc = concat!("The machine has ", $features, ", and `x` and `sums` are checked.")]
        #[target_feature(enable = $features)]
        unsafe fn bytes(codes: &[u8], x: Columns<'_>, sums: &mut [Sums]) {
            // SAFETY: the caller's.
            unsafe {
                if <$vector as Vector>::UNSIGNED {
                    match sums.len() {
                        1 => vector::dense::<$vector, $rows, 1>(codes, 255, x, sums),
                        2 => vector::dense::<$vector, $rows, 2>(codes, 255, x, sums),
                        3 => vector::dense::<$vector, $rows, 3>(codes, 255, x, sums),
                        4 => vector::dense::<$vector, $rows, 4>(codes, 255, x, sums),
                        5 => vector::dense::<$vector, $rows, 5>(codes, 255, x, sums),
                        6 => vector::dense::<$vector, $rows, 6>(codes, 255, x, sums),
                        _ => {}
                    }
                } else {
                    for (i, sums) in sums.chunks_mut(2).enumerate() {
                        let x = Columns { values: &x.values[2 * i * x.stride..], ..x };
                        match sums.len() {
                            1 => vector::halves::<$vector, $rows, 1>(codes, x, sums),
                            _ => vector::halves::<$vector, $rows, 2>(codes, x, sums),
                        }
                    }
                }
            }
        }

        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn unpack_codes(coding: Coding, weights: &[u8], out: &mut [u8]) {
            unpack(coding, weights, out);
        }

        /// # Safety
        #[doc = concat!("The machine has ", $features, ".")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn finish_rows(term: &Term<'_>, sums: &Sums, out: &mut [f32]) {
            // With a constant length the loops have no tail.
            match out.as_chunks_mut::<PANEL>().0 {
                [out] => finish(term, sums, out),
                _ => finish(term, sums, out),
            }
        }
    };
    (@tokens $vector:ty, $bits:literal, $weights:ident, $x:ident, $sums:ident, $rows:literal, $one:expr, $two:expr) => {
        match $sums.len() {
            1 => vector::direct::<$vector, $bits, $rows, 1, { $one }>($weights, $x, $sums),
            2 => vector::direct::<$vector, $bits, $rows, 2, { $two }>($weights, $x, $sums),
            3 => vector::direct::<$vector, $bits, $rows, 3, 1>($weights, $x, $sums),
            4 => vector::direct::<$vector, $bits, $rows, 4, 1>($weights, $x, $sums),
            5 => vector::direct::<$vector, $bits, $rows, 5, 1>($weights, $x, $sums),
            6 => vector::direct::<$vector, $bits, $rows, 6, 1>($weights, $x, $sums),
            _ => {}
        }
    };
}
pub(super) use entries;
