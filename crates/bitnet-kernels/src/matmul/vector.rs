//! The products once, over the few operations that an instruction set has for them.
//!
//! ```text
//! for each block of steps whose products an accumulator holds
//!     for each run of rows that fits the registers
//!         for each step: load codes; for each field: mask, and for each token: broadcast four activations, multiply and add
//!         add the accumulators to the sums
//! ```
//!
//! A tile goes through a block several times where the registers do not hold all 64 rows; blocks
//! follow one another, which keeps the stream of weights sequential.

use super::shape::{PANEL, STEP_BYTES};
use super::tiles::{Columns, PanelSums, TOKENS};
use std::hint::black_box;

/// The largest |activation|.
const ACTIVATION: usize = 128;

/// The registers of an instruction set.
///
/// # Safety
/// Every unsafe function is called only where the machine has the instruction set, and with
/// pointers to the bytes or sums that its documentation names. An implementor needs nothing else.
pub(crate) unsafe trait Vector {
    /// [`Vector::ROWS`] rows of four bytes: codes, or four activations for each row.
    type Bytes: Copy;
    /// Sums of products of [`Vector::ROWS`] rows.
    type Sum: Copy;
    /// Rows of a register.
    const ROWS: usize;
    /// Whether codes above 127 can be multiplied.
    const UNSIGNED: bool;

    /// How many dot products a sum holds without overflow when codes are ≤ `most`.
    fn max_products(most: usize) -> usize;

    /// Reads `4 · ROWS` bytes, aligned or not.
    unsafe fn load(from: *const u8) -> Self::Bytes;
    /// The same byte everywhere.
    unsafe fn fill(byte: u8) -> Self::Bytes;
    /// Four bytes for each row.
    unsafe fn splat(four: i32) -> Self::Bytes;
    unsafe fn and(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Shifts down by 1, 2, 4 or 8 bits; bits that come from the next byte are masked away later.
    unsafe fn down(codes: Self::Bytes, bits: usize) -> Self::Bytes;
    unsafe fn zero() -> Self::Sum;
    /// `sum[r] + Σ_{b < 4} codes[4r + b] · x[4r + b]`, codes unsigned, x signed.
    unsafe fn dot(sum: Self::Sum, codes: Self::Bytes, x: Self::Bytes) -> Self::Sum;
    /// Prefetches ahead of the step at `at`; the address may be out of bounds.
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
    /// `sums[r] += (sum[r] << up) >> down` for [`Vector::ROWS`] sums from `sums` on.
    unsafe fn add(sum: Self::Sum, up: u32, down: u32, sums: *mut i32);
}

/// How many pairs of products a 16-bit sum holds when codes are ≤ `most`.
pub(crate) const fn max_pairs(most: usize) -> usize {
    (1 << 15) / (2 * ACTIVATION * most)
}
/// How many single products a 16-bit sum holds when codes are ≤ `most`.
pub(crate) const fn max_singles(most: usize) -> usize {
    (1 << 15) / (ACTIVATION * most)
}
const _: () = assert!(
    max_singles(15) * 15 * ACTIVATION <= 1 << 15 && max_singles(3) * 3 * ACTIVATION <= 1 << 15
);

/// How many sums of four products a 32-bit sum holds when codes are ≤ `most`.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) const fn max_quads(most: usize) -> usize {
    i32::MAX as usize / (4 * ACTIVATION * most)
}
const _: () = assert!(
    max_pairs(15) * 2 * 15 * ACTIVATION <= 1 << 15 && max_pairs(3) * 2 * 3 * ACTIVATION <= 1 << 15
);

/// Four activations.
///
/// # Safety
/// Four bytes at `x` are readable.
#[inline(always)]
unsafe fn four(x: *const i8) -> i32 {
    // SAFETY: the function's contract has four bytes there; the read needs no alignment.
    unsafe { x.cast::<i32>().read_unaligned() }
}

/// `sums[t][r] += Σ_k code[r, k] · x[t, k]` from steps with codes of `BITS` bits, R registers of
/// rows and T tokens at a time.
///
/// Fields f with the same f mod C share accumulators and stay where they are in their bytes, so
/// that only every C-th needs a shift: their sums are multiples of a power of 2. Their products
/// with 8-bit tops count in `held`: the largest masked byte takes the place of the largest code.
///
/// # Safety
/// The machine has V; [`Columns::check`] passed for the columns of `weights` and T tokens.
#[inline(always)]
pub(crate) unsafe fn packed_sums<
    V: Vector,
    const BITS: usize,
    const R: usize,
    const T: usize,
    const C: usize,
>(
    weights: &[u8],
    x: Columns<'_>,
    sums: &mut [PanelSums],
) {
    const { assert!(BITS * C <= 8 && R * V::ROWS <= PANEL && T <= TOKENS) };
    let fields = 8 / BITS;
    let low = ((1u16 << BITS) - 1) as u8;
    let held = (V::max_products(usize::from(low) << (BITS * (C - 1))) * C / fields).max(1);
    // SAFETY: the function's contract: the machine has V, and `Columns::check` found the columns of
    // every step of `weights` in T rows of `x`. Loads are inside a step, sums inside a panel's.
    unsafe {
        let mut masks = [V::fill(low); C];
        for (c, mask) in masks.iter_mut().enumerate() {
            *mask = V::fill(low << (BITS * c));
        }
        for (block, weights) in weights.chunks(held * STEP_BYTES).enumerate() {
            for part in 0..PANEL / (R * V::ROWS) {
                let mut acc = [[[V::zero(); R]; C]; T];
                for step in 0..weights.len() / STEP_BYTES {
                    let at = weights
                        .as_ptr()
                        .add(step * STEP_BYTES + part * R * 4 * V::ROWS);
                    if part == 0 {
                        V::prefetch(at);
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
                            let column = ((block * held + step) * fields + field) * 4;
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

/// Quads between two jumps of [`unpacked_sums`].
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
    // SAFETY: the function's contract: the machine has V, and codes and columns are readable.
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
/// The machine has V and multiplies codes up to `most`; [`Columns::check`] passed for the columns
/// of `codes` and T tokens.
#[inline(always)]
pub(crate) unsafe fn unpacked_sums<V: Vector, const R: usize, const T: usize>(
    codes: &[u8],
    most: usize,
    x: Columns<'_>,
    sums: &mut [PanelSums],
) {
    const { assert!(R * V::ROWS <= PANEL && T <= TOKENS) };
    let held = V::max_products(most);
    // SAFETY: the function's contract: the machine has V, and `Columns::check` found four columns
    // for each STEP_BYTES of `codes` in T rows of `x`. Loads are inside those, sums inside a
    // panel's.
    unsafe {
        for (block, codes) in codes.chunks(held.saturating_mul(STEP_BYTES)).enumerate() {
            for part in 0..PANEL / (R * V::ROWS) {
                let mut acc = [[V::zero(); R]; T];
                // A pointer for each token, all moved by one index: sums of strides would take the
                // ports of the products.
                let mut rows = [x.values.as_ptr(); T];
                for (token, row) in rows.iter_mut().enumerate() {
                    *row = black_box(row.add(token * x.stride + block * held * 4));
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
/// The machine has V; [`Columns::check`] passed for the columns of `codes` and T tokens.
#[inline(always)]
pub(crate) unsafe fn halved_sums<V: Vector, const R: usize, const T: usize>(
    codes: &[u8],
    x: Columns<'_>,
    sums: &mut [PanelSums],
) {
    const { assert!(R * V::ROWS <= PANEL && T <= TOKENS) };
    let held = V::max_products(15);
    // SAFETY: the function's contract: the machine has V, and `Columns::check` found four columns
    // for each STEP_BYTES of `codes` in T rows of `x`. Loads are inside those, sums inside a
    // panel's.
    unsafe {
        let mask = V::fill(15);
        for (block, codes) in codes.chunks(held.saturating_mul(STEP_BYTES)).enumerate() {
            for part in 0..PANEL / (R * V::ROWS) {
                let mut acc = [[[V::zero(); R]; 2]; T];
                for quad in 0..codes.len() / STEP_BYTES {
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
                        let x = V::splat(four(
                            x.values
                                .as_ptr()
                                .add(token * x.stride + (block * held + quad) * 4),
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

/// Functions of a [`Vector`] that are made of intrinsics.
macro_rules! vector_functions {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? $body:block)*) => {
        $(
            #[inline(always)]
            unsafe fn $name($($argument: $type),*) $(-> $result)? {
                // SAFETY: the contract of `Vector`: the machine has the intrinsics, and pointers
                // are to the bytes or sums that it names. Loads and stores need no alignment.
                unsafe { $body }
            }
        )*
    };
}
pub(super) use vector_functions;

/// The kernels of one instruction set: they check the bounds, and make constants of coding and
/// number of tokens.
///
/// `$rows` registers of rows to a tile, `$one` and `$two` the fields that stay in place for one and
/// for two tokens (1, 2 or 4).
macro_rules! entries {
    ($vector:ty, $features:literal, rows $rows:literal, in place $one:literal $two:literal) => {
        /// [`tiles::packed_sums`].
        #[target_feature(enable = $features)]
        pub(crate) fn packed_sums(
            coding: Coding,
            weights: &[u8],
            x: Columns<'_>,
            sums: &mut [PanelSums],
        ) {
            x.check(weights.len() / STEP_BYTES * coding.step(), sums.len());
            // SAFETY: this function enables the features of the registers, and `Columns::check`
            // passed on the line above.
            unsafe {
                match coding {
                    Coding::Bits1 => {
                        entries!(@tokens $vector, 1, weights, x, sums, $rows, $one, $two)
                    }
                    Coding::Bits2 => {
                        entries!(@tokens $vector, 2, weights, x, sums, $rows, $one, $two)
                    }
                    Coding::Bits4 => {
                        const ONE: usize = if $one > 2 { 2 } else { $one };
                        const TWO: usize = if $two > 2 { 2 } else { $two };
                        entries!(@tokens $vector, 4, weights, x, sums, $rows, ONE, TWO)
                    }
                    Coding::Bits8 if <$vector as Vector>::UNSIGNED => {
                        entries!(@tokens $vector, 8, weights, x, sums, $rows, 1, 1)
                    }
                    Coding::Bits8 => byte_sums(weights, x, sums),
                    Coding::Trits => {
                        tiles::unpack_and_sum(coding, weights, x, sums, |codes, x, sums| {
                            unpacked_sums(coding.most(), codes, x, sums)
                        })
                    }
                }
            }
        }

        /// [`tiles::unpacked_sums`].
        #[target_feature(enable = $features)]
        pub(crate) fn unpacked_sums(
            most: usize,
            codes: &[u8],
            x: Columns<'_>,
            sums: &mut [PanelSums],
        ) {
            x.check(codes.len() / STEP_BYTES * 4, sums.len());
            // SAFETY: this function enables the features of the registers, and `Columns::check`
            // passed on the line above.
            unsafe {
                if most > 15 {
                    return byte_sums(codes, x, sums);
                }
                entries!(@unpacked $vector, $rows, most, codes, x, sums)
            }
        }

        /// [`unpacked_sums`] of codes up to 255.
        ///
        /// # Safety
        /// [`Columns::check`] passed for the columns of `codes` and the number of `sums`.
        #[target_feature(enable = $features)]
        unsafe fn byte_sums(codes: &[u8], x: Columns<'_>, sums: &mut [PanelSums]) {
            // SAFETY: this function enables the features of the registers, and `Columns::check`
            // passed by its contract.
            unsafe {
                if <$vector as Vector>::UNSIGNED {
                    return entries!(@unpacked $vector, $rows, 255, codes, x, sums);
                }
                for (i, sums) in sums.chunks_mut(2).enumerate() {
                    let x = Columns { values: &x.values[2 * i * x.stride..], ..x };
                    match sums.len() {
                        1 => vector::halved_sums::<$vector, $rows, 1>(codes, x, sums),
                        _ => vector::halved_sums::<$vector, $rows, 2>(codes, x, sums),
                    }
                }
            }
        }
    };
    (
        @tokens $vector:ty, $bits:literal, $weights:ident, $x:ident, $sums:ident, $rows:literal,
        $one:expr, $two:expr
    ) => {
        match $sums.len() {
            1 => vector::packed_sums::<$vector, $bits, $rows, 1, { $one }>($weights, $x, $sums),
            2 => vector::packed_sums::<$vector, $bits, $rows, 2, { $two }>($weights, $x, $sums),
            3 => vector::packed_sums::<$vector, $bits, $rows, 3, 1>($weights, $x, $sums),
            4 => vector::packed_sums::<$vector, $bits, $rows, 4, 1>($weights, $x, $sums),
            5 => vector::packed_sums::<$vector, $bits, $rows, 5, 1>($weights, $x, $sums),
            6 => vector::packed_sums::<$vector, $bits, $rows, 6, 1>($weights, $x, $sums),
            _ => {}
        }
    };
    (
        @unpacked $vector:ty, $rows:literal, $most:expr, $codes:ident, $x:ident, $sums:ident
    ) => {
        match $sums.len() {
            1 => vector::unpacked_sums::<$vector, $rows, 1>($codes, $most, $x, $sums),
            2 => vector::unpacked_sums::<$vector, $rows, 2>($codes, $most, $x, $sums),
            3 => vector::unpacked_sums::<$vector, $rows, 3>($codes, $most, $x, $sums),
            4 => vector::unpacked_sums::<$vector, $rows, 4>($codes, $most, $x, $sums),
            5 => vector::unpacked_sums::<$vector, $rows, 5>($codes, $most, $x, $sums),
            6 => vector::unpacked_sums::<$vector, $rows, 6>($codes, $most, $x, $sums),
            _ => {}
        }
    };
}
pub(super) use entries;
