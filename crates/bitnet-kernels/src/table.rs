//! The kernels, and which of them runs on which instruction set: one table for each.
//!
//! A kernel is declared in [`for_kernels`] with its signature and its plain loop. The loop is
//! compiled for every instruction set of [`for_instruction_sets`](crate::isa); a kernel that is
//! written for one of them by hand replaces the loop in [`tables`]. `battery.rs` holds every
//! declared kernel to the bits of its scalar form, and does not compile without a case for it.

use crate::dense::lanes::{self, Lanes};
use crate::dense::{
    Attention, AttentionScratch, DeltaTokens, DenseMatrix, RotaryPairing, TokenHeads,
};
use crate::dense::{attention, attention_run, delta, elementwise, product};
use crate::hadamard::{self, Signs};
use crate::isa::{Isa, for_instruction_sets};
use crate::matmul::coding::{self, Coding};
use crate::matmul::float::{self, FloatSums, FloatTables};
use crate::matmul::prepack_loops;
use crate::matmul::shape::PANEL;
use crate::matmul::tiles::{self, Columns, PanelSums, Term};
use crate::parallel::ColumnsMut;
use crate::stream::plain;
use crate::update::{self, Adam, Sgd};
use bitnet_core::ops::{self, Above, Cuts, Key, Magnitudes, Moments, Uniform};
use half::{bf16, f16};

/// Calls a macro with every kernel: documentation, signature and plain loop.
///
/// In a loop, `REGISTERS` is the proof that the machine has the registers of [`Lanes`] for which
/// the loop is compiled, `ROWS` and `TOKENS` are the tile that they hold.
macro_rules! for_kernels {
    ($then:ident $($context:tt)*) => {
        $then! {
            { $($context)* }

            // Statistics and rounding of weights: `bitnet_core::ops`.

            /// [`ops::moments`].
            fn moments(w: &[f32]) -> Moments {
                ops::moments(w)
            }
            /// [`ops::magnitudes`].
            fn magnitudes(w: &[f32]) -> Magnitudes {
                ops::magnitudes(w)
            }
            /// [`ops::magnitudes_each`].
            fn magnitudes_each(w: &[f32], width: usize, out: &mut Vec<Magnitudes>) {
                ops::magnitudes_each(w, width, out);
            }
            /// [`ops::inside`].
            fn inside(w: &[f32], key: Key, low: f32, high: f32, out: &mut Vec<f32>) {
                ops::inside(w, key, low, high, out);
            }
            /// [`ops::above_both`].
            fn above_both(w: &[f32], key: Key, t: [f32; 2]) -> [Above; 2] {
                match key {
                    Key::Magnitude => ops::above_both(w, Key::Magnitude, t),
                    Key::Signed => ops::above_both(w, Key::Signed, t),
                }
            }
            /// [`ops::above`].
            fn above(w: &[f32], h: Option<&[f32]>, key: Key, t: f32) -> Above {
                match key {
                    Key::Magnitude => ops::above(w, h, Key::Magnitude, t),
                    Key::Signed => ops::above(w, h, Key::Signed, t),
                }
            }
            /// [`ops::uniform_error`].
            fn uniform_error(w: &[f32], h: Option<&[f32]>, quantizer: &Uniform) -> f64 {
                ops::uniform_error(w, h, quantizer)
            }
            /// [`ops::encode_cut`].
            fn encode_cut(w: &[f32], cuts: Cuts, out: &mut [i8]) {
                ops::encode_cut(w, cuts, out);
            }
            /// [`ops::encode_uniform`].
            fn encode_uniform(w: &[f32], quantizer: &Uniform, out: &mut [i8]) {
                ops::encode_uniform(w, quantizer, out);
            }

            // Wire layouts and activations: `stream`.

            /// [`plain::pack_two_bit`].
            fn pack_two_bit(values: &[i8], bias: i8, top: u8, out: &mut [u8]) -> bool {
                plain::pack_two_bit(values, bias, top, out)
            }
            /// [`plain::unpack_two_bit`].
            fn unpack_two_bit(bytes: &[u8], bias: i8, top: u8, values: &mut [i8]) -> bool {
                plain::unpack_two_bit(bytes, bias, top, values)
            }
            /// [`plain::unpack_two_bit`] that writes past the caches.
            fn unpack_two_bit_streamed(bytes: &[u8], bias: i8, top: u8, values: &mut [i8]) -> bool {
                plain::unpack_two_bit(bytes, bias, top, values)
            }
            /// [`plain::pack_base3`].
            fn pack_base3(values: &[i8], out: &mut [u8]) -> bool {
                plain::pack_base3(values, out)
            }
            /// [`plain::unpack_base3`].
            fn unpack_base3(bytes: &[u8], values: &mut [i8]) -> bool {
                plain::unpack_base3(bytes, values)
            }
            /// [`plain::unpack_quads`].
            fn unpack_quads(bytes: &[u8], shifts: [u32; 4], quarters: [&mut [i8]; 4]) -> bool {
                plain::unpack_quads(bytes, shifts, quarters)
            }
            /// [`plain::unpack_quad_blocks`] of 32 bytes.
            fn unpack_quads_32(bytes: &[u8], shifts: [u32; 4], values: &mut [i8]) -> bool {
                plain::unpack_quad_blocks::<32>(bytes, shifts, values)
            }
            /// [`plain::unpack_quad_blocks`] of 16 bytes.
            fn unpack_quads_16(bytes: &[u8], shifts: [u32; 4], values: &mut [i8]) -> bool {
                plain::unpack_quad_blocks::<16>(bytes, shifts, values)
            }
            /// [`plain::unpack_tq1`].
            fn unpack_tq1(blocks: &[[u8; 54]], values: &mut [[i8; 256]]) -> bool {
                plain::unpack_tq1(blocks, values)
            }
            /// [`plain::unpack_tq2`].
            fn unpack_tq2(blocks: &[[u8; 66]], values: &mut [[i8; 256]]) -> bool {
                plain::unpack_tq2(blocks, values)
            }
            /// [`plain::encode_two_bit`].
            fn encode_two_bit(w: &[f32], cuts: Cuts, out: &mut [u8]) {
                plain::encode_two_bit(w, cuts, out);
            }
            /// [`plain::encode_two_bit_and_measure`].
            fn encode_two_bit_and_measure(
                w: &[f32],
                cuts: Cuts,
                out: &mut [u8],
                next: &[f32],
            ) -> Magnitudes {
                plain::encode_two_bit_and_measure(w, cuts, out, next)
            }
            /// [`plain::scale`].
            fn scale(values: &[i8], scale: f32, out: &mut [f32]) {
                plain::scale(values, scale, out);
            }
            /// [`plain::scale`] that writes past the caches.
            fn scale_streamed(values: &[i8], scale: f32, out: &mut [f32]) {
                plain::scale(values, scale, out);
            }
            /// [`plain::absmax`].
            fn absmax(x: &[f32]) -> u32 {
                plain::absmax(x)
            }
            /// [`plain::round_to_int8`].
            fn round_to_int8(x: &[f32], inverse: f32, out: &mut [i8]) -> i32 {
                plain::round_to_int8(x, inverse, out)
            }
            /// [`plain::widen_f16`].
            fn widen_f16(from: &[f16], to: &mut [f32]) {
                plain::widen_f16(from, to);
            }
            /// [`plain::widen_bf16`].
            fn widen_bf16(from: &[bf16], to: &mut [f32]) {
                plain::widen_bf16(from, to);
            }

            // Optimizers: `update`.

            /// [`update::descend`].
            fn sgd_step(w: &mut [f32], g: &[f32], step: &Sgd) {
                update::descend(w, g, step);
            }
            /// [`update::sgd`].
            fn sgd_momentum_step(w: &mut [f32], g: &[f32], velocity: &mut [f32], step: &Sgd) {
                update::sgd(w, g, velocity, step);
            }
            /// [`update::adam`].
            fn adam_step(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &Adam) {
                update::adam(w, g, m, v, step);
            }
            /// [`update::sum_squares`].
            fn sum_squares(x: &[f32]) -> f64 {
                update::sum_squares(x)
            }

            // Products of floats and the steps between them: `dense`.

            /// [`product::product`].
            fn dense_product(
                w: &DenseMatrix,
                x: &[f32],
                bias: Option<&[f32]>,
                out: &mut ColumnsMut<'_, f32>,
            ) {
                product::product::<_, ROWS, TOKENS>(REGISTERS, w, x, bias, out);
            }
            /// [`attention::attend`].
            fn attend(a: &Attention<'_>, q: &[f32], out: &mut [f32]) {
                attention::attend::<_, ROWS, TOKENS>(REGISTERS, a, q, out);
            }
            /// [`attention_run::attend_run`].
            fn attend_run(
                a: &Attention<'_>,
                at: TokenHeads,
                q: &[f32],
                out: &mut [f32],
                scratch: &mut AttentionScratch,
            ) {
                attention_run::attend_run::<_, ROWS, TOKENS>(REGISTERS, a, at, q, out, scratch);
            }
            /// [`elementwise::rms_norm`].
            fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                elementwise::rms_norm(REGISTERS, x, weight, eps, out);
            }
            /// [`elementwise::rms_norm_in_place`].
            fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
                elementwise::rms_norm_in_place(REGISTERS, x, weight, eps);
            }
            /// [`elementwise::layer_norm`].
            fn layer_norm(x: &[f32], weights: [&[f32]; 2], eps: f32, out: &mut [f32]) {
                elementwise::layer_norm(REGISTERS, x, weights, eps, out);
            }
            /// [`elementwise::rotate`].
            fn rotate(x: &mut [f32], angles: &[(f32, f32)], pairing: RotaryPairing) {
                elementwise::rotate(x, angles, pairing);
            }
            /// [`elementwise::silu_mul`].
            fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                elementwise::silu_mul(gate, up, out);
            }
            /// [`elementwise::relu2_mul`].
            fn relu2_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                elementwise::relu2_mul(gate, up, out);
            }
            /// [`elementwise::gelu_tanh_mul`].
            fn gelu_tanh_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                elementwise::gelu_tanh_mul(gate, up, out);
            }
            /// [`delta::sigmoid_mul`].
            fn sigmoid_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
                delta::sigmoid_mul(gate, up, out);
            }
            /// [`delta::conv_silu`].
            fn conv_silu(x: &[f32], w: &[f32], out: &mut [f32]) {
                delta::conv_silu(x, w, out);
            }
            /// [`delta::delta_tokens`].
            fn delta_tokens(tokens: &DeltaTokens<'_>, state: &mut [f32], out: &mut [f32]) {
                delta::delta_tokens(REGISTERS, tokens, state, out);
            }
            /// [`elementwise::gelu`].
            fn gelu(x: &mut [f32]) {
                elementwise::gelu(x);
            }
            /// [`elementwise::add`].
            fn add(x: &mut [f32], y: &[f32]) {
                elementwise::add(x, y);
            }

            /// [`hadamard::transform`].
            fn hadamard(x: &mut [f32], block: usize, signs: Signs<'_>) {
                hadamard::transform(REGISTERS, x, block, signs);
            }

            // Products of low-bit weights: `matmul`.

            /// [`prepack_loops::pack_lanes`].
            fn pack_lanes(values: &[i8], offset: u8, lanes: &mut [u32]) -> usize {
                prepack_loops::pack_lanes(values, offset, lanes)
            }
            /// [`prepack_loops::any_outside`].
            fn any_outside(values: &[i8], low: i8, high: i8, no_zero: bool) -> bool {
                prepack_loops::any_outside(values, low, high, no_zero)
            }
            /// [`tiles::packed_sums`].
            fn packed_sums(
                coding: Coding,
                weights: &[u8],
                x: Columns<'_>,
                sums: &mut [PanelSums],
            ) {
                tiles::packed_sums(coding, weights, x, sums);
            }
            /// [`tiles::unpacked_sums`].
            fn unpacked_sums(most: usize, codes: &[u8], x: Columns<'_>, sums: &mut [PanelSums]) {
                tiles::unpacked_sums(most, codes, x, sums);
            }
            /// [`coding::unpack`].
            fn unpack_codes(coding: Coding, weights: &[u8], out: &mut [u8]) {
                coding::unpack(coding, weights, out);
            }
            /// [`tiles::finish`].
            fn finish_sums(term: &Term<'_>, sums: &PanelSums, out: &mut [f32]) {
                // With a constant length the loops have no tail.
                match out.as_chunks_mut::<PANEL>().0 {
                    [out] => tiles::finish(term, sums, out),
                    _ => tiles::finish(term, sums, out),
                }
            }
            /// [`float::table_sums`].
            fn float_sums(weights: &[u8], x: FloatTables<'_>, sums: &mut FloatSums) {
                float::table_sums(weights, x, sums);
            }
        }
    };
}
#[cfg(test)]
pub(crate) use for_kernels;

macro_rules! table {
    ({} $(
        $(#[$doc:meta])*
        fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    )*) => {
        /// The kernels of one instruction set.
        ///
        /// Outside of this module a reference to one comes from [`Table::of`] alone, which is why
        /// calling a kernel is safe.
        #[derive(Clone, Copy)]
        #[allow(clippy::type_complexity, reason = "signatures, each used once")]
        pub(crate) struct Table {
            $($(#[$doc])* $name: unsafe fn($($ty),*) $(-> $ret)?,)*
        }

        impl Table {
            $(
                $(#[$doc])*
                #[inline(always)]
                pub(crate) fn $name(&self, $($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: a kernel needs the features of its instruction set and nothing else;
                    // `Kernels::new` called `Table::of` after `Isa::is_available` found them all.
                    unsafe { (self.$name)($($arg),*) }
                }
            )*
        }
    };
}
for_kernels!(table);

/// A function with the features of an instruction set.
#[allow(
    unused_macro_rules,
    reason = "the target decides which of them are used"
)]
macro_rules! compiled_kernel {
    ([baseline] $($function:tt)*) => { $($function)* };
    ([$detection:ident $($feature:tt)*] $($function:tt)*) => {
        $(#[target_feature(enable = $feature)])*
        $($function)*
    };
}

macro_rules! compiled_kernels {
    ({ $features:tt } $(
        $(#[$doc:meta])*
        fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    )*) => {
        $(compiled_kernel! { $features fn $name($($arg: $ty),*) $(-> $ret)? $body })*

        pub(in super::super) const TABLE: Table = Table { $($name),* };
    };
}

/// A module with the plain loops compiled for one instruction set.
macro_rules! compiled_module {
    ([$($cfg:tt)*] $module:ident $features:tt) => {};
    ([$($cfg:tt)*] $module:ident $features:tt $lanes:ident) => {
        #[cfg($($cfg)*)]
        pub(super) mod $module {
            use super::super::*;

            // SAFETY: only the functions of this module use it, and they are compiled with the
            // features that the registers need.
            const REGISTERS: lanes::$lanes = unsafe { lanes::$lanes::assume_available() };
            const ROWS: usize = <lanes::$lanes as Lanes>::TILE_ROWS;
            const TOKENS: usize = <lanes::$lanes as Lanes>::TILE_TOKENS;

            for_kernels!(compiled_kernels $features);
        }
    };
}

macro_rules! select {
    ($(
        #[doc = $doc:literal]
        $isa:ident $function:ident $name:literal on ($($cfg:tt)*) with $features:tt
            $(compiled $lanes:ident)?;
    )*) => {
        /// The plain loops, for each instruction set that they are compiled for.
        mod compiled {
            $(compiled_module! { [$($cfg)*] $function $features $($lanes)? })*
        }

        impl Table {
            /// The kernels of an instruction set.
            ///
            /// # Safety
            /// The machine runs it, as [`Isa::is_available`] says.
            pub(crate) unsafe fn of(isa: Isa) -> &'static Self {
                match isa {
                    $(
                        #[cfg($($cfg)*)]
                        Isa::$isa => {
                            static TABLE: Table = tables::$function();
                            &TABLE
                        }
                    )*
                    #[allow(
                        unreachable_patterns,
                        reason = "which instruction sets remain depends on the target"
                    )]
                    _ => unreachable!("no machine of this architecture runs {isa}"),
                }
            }
        }
    };
}
for_instruction_sets!(select);

/// The table of each instruction set: the plain loops that are compiled for it, or the table of a
/// narrower one, and the kernels that are written for it.
mod tables {
    use super::{Table, compiled};

    pub(super) const fn scalar() -> Table {
        compiled::scalar::TABLE
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) use x86::*;

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use super::{Table, compiled};
        use crate::matmul::{float, x86 as products};
        use crate::stream::x86 as stream;

        pub(in super::super) const fn sse41() -> Table {
            // SSE4.1 has no fused multiply-add: these loops are compiled once, for the baseline.
            let baseline = compiled::scalar::TABLE;
            Table {
                dense_product: baseline.dense_product,
                attend: baseline.attend,
                attend_run: baseline.attend_run,
                packed_sums: products::sse41::packed_sums,
                unpacked_sums: products::sse41::unpacked_sums,
                ..compiled::sse41::TABLE
            }
        }

        pub(in super::super) const fn avx2() -> Table {
            Table {
                pack_two_bit: stream::pack_two_bit_256,
                packed_sums: products::avx2::packed_sums,
                unpacked_sums: products::avx2::unpacked_sums,
                float_sums: float::x86::table_sums_256,
                ..compiled::avx2::TABLE
            }
        }

        pub(in super::super) const fn avx_vnni() -> Table {
            Table {
                packed_sums: products::avx_vnni::packed_sums,
                unpacked_sums: products::avx_vnni::unpacked_sums,
                ..avx2()
            }
        }

        pub(in super::super) const fn avx512() -> Table {
            // Blocks of at most 32 bytes fill the registers of AVX2, and no wider ones.
            let narrow = compiled::avx2::TABLE;
            Table {
                unpack_quads_32: narrow.unpack_quads_32,
                unpack_quads_16: narrow.unpack_quads_16,
                unpack_tq1: narrow.unpack_tq1,
                unpack_tq2: narrow.unpack_tq2,
                pack_two_bit: stream::pack_two_bit_512,
                encode_two_bit: stream::encode_two_bit_512,
                encode_two_bit_and_measure: stream::encode_two_bit_and_measure_512,
                scale_streamed: stream::scale_streamed_512,
                absmax: stream::absmax_512,
                round_to_int8: stream::round_to_int8_512,
                magnitudes: stream::magnitudes_512,
                magnitudes_each: stream::magnitudes_each_512,
                inside: stream::inside_512,
                packed_sums: products::avx512::packed_sums,
                unpacked_sums: products::avx512::unpacked_sums,
                float_sums: float::x86::table_sums_512,
                ..compiled::avx512::TABLE
            }
        }

        pub(in super::super) const fn avx512_vbmi() -> Table {
            Table {
                unpack_two_bit: stream::unpack_two_bit_vbmi,
                unpack_two_bit_streamed: stream::unpack_two_bit_streamed,
                pack_base3: stream::pack_base3_vbmi,
                unpack_base3: stream::unpack_base3_vbmi,
                packed_sums: products::vbmi::packed_sums,
                unpack_codes: products::vbmi::unpack_codes,
                ..avx512()
            }
        }
    }

    // The baseline of aarch64 has NEON, so that the scalar loops are compiled with it.
    #[cfg(target_arch = "aarch64")]
    pub(super) const fn neon() -> Table {
        use crate::{matmul::neon as products, stream::neon as stream};
        Table {
            pack_two_bit: stream::pack_two_bit,
            unpack_two_bit: stream::unpack_two_bit,
            unpack_two_bit_streamed: stream::unpack_two_bit,
            packed_sums: products::plain::packed_sums,
            unpacked_sums: products::plain::unpacked_sums,
            unpack_codes: products::unpack_codes,
            float_sums: products::table_sums,
            ..scalar()
        }
    }

    #[cfg(target_arch = "aarch64")]
    pub(super) const fn neon_dotprod() -> Table {
        use crate::matmul::neon as products;
        Table {
            packed_sums: products::dotprod::packed_sums,
            unpacked_sums: products::dotprod::unpacked_sums,
            ..neon()
        }
    }

    // Whether WebAssembly has simd128 is known when the scalar loops are compiled.
    #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
    pub(super) const fn simd128() -> Table {
        use crate::matmul::simd128 as products;
        Table {
            packed_sums: products::packed_sums,
            unpacked_sums: products::unpacked_sums,
            ..scalar()
        }
    }
}
