//! Which loop runs on which instruction set: a table for each.

use super::plain;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::Isa;
use crate::Kernels;
use bitnet_core::ops::{self, Cuts, Key, Magnitudes};
use half::{bf16, f16};

/// The loops of one instruction set. Their contracts are those of [`plain`].
///
/// Calling an entry is safe where the machine has the features of the instruction set whose table
/// it is; [`Kernels::loops`] gives no other.
#[derive(Clone, Copy)]
#[allow(clippy::type_complexity, reason = "signatures, each used once")]
pub(super) struct Loops {
    pub(super) pack_two_bit: unsafe fn(&[i8], i8, u8, &mut [u8]) -> bool,
    pub(super) unpack_two_bit: unsafe fn(&[u8], i8, u8, &mut [i8]) -> bool,
    /// [`plain::unpack_two_bit`] that writes past the caches.
    pub(super) unpack_two_bit_streamed: unsafe fn(&[u8], i8, u8, &mut [i8]) -> bool,
    pub(super) pack_base3: unsafe fn(&[i8], &mut [u8]) -> bool,
    pub(super) unpack_base3: unsafe fn(&[u8], &mut [i8]) -> bool,
    pub(super) unpack_quads: unsafe fn(&[u8], [u32; 4], [&mut [i8]; 4]) -> bool,
    pub(super) unpack_quads_32: unsafe fn(&[u8], [u32; 4], &mut [i8]) -> bool,
    pub(super) unpack_quads_16: unsafe fn(&[u8], [u32; 4], &mut [i8]) -> bool,
    pub(super) unpack_tq1: unsafe fn(&[[u8; 54]], &mut [[i8; 256]]) -> bool,
    pub(super) unpack_tq2: unsafe fn(&[[u8; 66]], &mut [[i8; 256]]) -> bool,
    pub(super) encode_two_bit: unsafe fn(&[f32], Cuts, &mut [u8]),
    pub(super) encode_two_bit_and_size: unsafe fn(&[f32], Cuts, &mut [u8], &[f32]) -> Magnitudes,
    pub(super) scale: unsafe fn(&[i8], f32, &mut [f32]),
    /// [`plain::scale`] that writes past the caches.
    pub(super) scale_streamed: unsafe fn(&[i8], f32, &mut [f32]),
    pub(super) absmax: unsafe fn(&[f32]) -> u32,
    pub(super) int8: unsafe fn(&[f32], f32, &mut [i8]) -> i32,
    /// [`ops::magnitudes`].
    pub(super) magnitudes: unsafe fn(&[f32]) -> Magnitudes,
    /// [`ops::magnitudes_each`].
    pub(super) magnitudes_each: unsafe fn(&[f32], usize, &mut Vec<Magnitudes>),
    /// [`ops::inside`].
    pub(super) inside: unsafe fn(&[f32], Key, f32, f32, &mut Vec<f32>),
    pub(super) widen_f16: unsafe fn(&[f16], &mut [f32]),
    pub(super) widen_bf16: unsafe fn(&[bf16], &mut [f32]),
}

/// The plain loops under the target features of one instruction set.
macro_rules! table {
    ($module:ident $(, $features:literal)?) => {
        pub(super) mod $module {
            use super::{Cuts, Key, Loops, Magnitudes, bf16, f16, ops, plain};

            pub(in super::super) const LOOPS: Loops = Loops {
                pack_two_bit,
                unpack_two_bit,
                unpack_two_bit_streamed: unpack_two_bit,
                pack_base3,
                unpack_base3,
                unpack_quads,
                unpack_quads_32,
                unpack_quads_16,
                unpack_tq1,
                unpack_tq2,
                encode_two_bit,
                encode_two_bit_and_size,
                scale,
                scale_streamed: scale,
                absmax,
                int8,
                magnitudes,
                magnitudes_each,
                inside,
                widen_f16,
                widen_bf16,
            };

            $(#[target_feature(enable = $features)])?
            fn pack_two_bit(values: &[i8], bias: i8, top: u8, out: &mut [u8]) -> bool {
                plain::pack_two_bit(values, bias, top, out)
            }

            $(#[target_feature(enable = $features)])?
            fn unpack_two_bit(bytes: &[u8], bias: i8, top: u8, values: &mut [i8]) -> bool {
                plain::unpack_two_bit(bytes, bias, top, values)
            }

            $(#[target_feature(enable = $features)])?
            fn pack_base3(values: &[i8], out: &mut [u8]) -> bool {
                plain::pack_base3(values, out)
            }

            $(#[target_feature(enable = $features)])?
            fn unpack_base3(bytes: &[u8], values: &mut [i8]) -> bool {
                plain::unpack_base3(bytes, values)
            }

            $(#[target_feature(enable = $features)])?
            fn unpack_quads(bytes: &[u8], shifts: [u32; 4], quarters: [&mut [i8]; 4]) -> bool {
                plain::unpack_quads(bytes, shifts, quarters)
            }

            $(#[target_feature(enable = $features)])?
            fn unpack_quads_32(bytes: &[u8], shifts: [u32; 4], values: &mut [i8]) -> bool {
                plain::unpack_quad_blocks::<32>(bytes, shifts, values)
            }

            $(#[target_feature(enable = $features)])?
            fn unpack_quads_16(bytes: &[u8], shifts: [u32; 4], values: &mut [i8]) -> bool {
                plain::unpack_quad_blocks::<16>(bytes, shifts, values)
            }

            $(#[target_feature(enable = $features)])?
            fn unpack_tq1(blocks: &[[u8; 54]], values: &mut [[i8; 256]]) -> bool {
                plain::unpack_tq1(blocks, values)
            }

            $(#[target_feature(enable = $features)])?
            fn unpack_tq2(blocks: &[[u8; 66]], values: &mut [[i8; 256]]) -> bool {
                plain::unpack_tq2(blocks, values)
            }

            $(#[target_feature(enable = $features)])?
            fn encode_two_bit(w: &[f32], cuts: Cuts, out: &mut [u8]) {
                plain::encode_two_bit(w, cuts, out);
            }

            $(#[target_feature(enable = $features)])?
            fn encode_two_bit_and_size(w: &[f32], cuts: Cuts, out: &mut [u8], next: &[f32]) -> Magnitudes {
                plain::encode_two_bit_and_size(w, cuts, out, next)
            }

            $(#[target_feature(enable = $features)])?
            fn scale(values: &[i8], scale: f32, out: &mut [f32]) {
                plain::scale(values, scale, out);
            }

            $(#[target_feature(enable = $features)])?
            fn absmax(x: &[f32]) -> u32 {
                plain::absmax(x)
            }

            $(#[target_feature(enable = $features)])?
            fn int8(x: &[f32], inverse: f32, out: &mut [i8]) -> i32 {
                plain::int8(x, inverse, out)
            }

            $(#[target_feature(enable = $features)])?
            fn magnitudes(w: &[f32]) -> Magnitudes {
                ops::magnitudes(w)
            }

            $(#[target_feature(enable = $features)])?
            fn magnitudes_each(w: &[f32], width: usize, out: &mut Vec<Magnitudes>) {
                ops::magnitudes_each(w, width, out);
            }

            $(#[target_feature(enable = $features)])?
            fn inside(w: &[f32], key: Key, low: f32, high: f32, out: &mut Vec<f32>) {
                ops::inside(w, key, low, high, out);
            }

            $(#[target_feature(enable = $features)])?
            fn widen_f16(from: &[f16], to: &mut [f32]) {
                plain::widen_f16(from, to);
            }

            $(#[target_feature(enable = $features)])?
            fn widen_bf16(from: &[bf16], to: &mut [f32]) {
                plain::widen_bf16(from, to);
            }
        }
    };
}

table!(scalar);
#[cfg(target_arch = "x86_64")]
table!(sse41, "ssse3,sse4.1");
#[cfg(target_arch = "x86_64")]
table!(avx2, "avx2");
#[cfg(target_arch = "x86_64")]
table!(avx512, "avx512f,avx512bw,avx512dq,avx512vl");

/// AVX-512 with the loops of AVX2, which it includes, for blocks of at most 32 bytes.
#[cfg(target_arch = "x86_64")]
const fn narrow_blocks(loops: Loops) -> Loops {
    let Loops {
        unpack_quads_32,
        unpack_quads_16,
        unpack_tq1,
        unpack_tq2,
        ..
    } = avx2::LOOPS;
    Loops {
        unpack_quads_32,
        unpack_quads_16,
        unpack_tq1,
        unpack_tq2,
        ..loops
    }
}

impl Kernels {
    /// The loops of this instruction set, whose features the machine has: `Kernels::new` made this
    /// value after `Isa::is_available`.
    pub(super) fn loops(self) -> Loops {
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Sse41 => sse41::LOOPS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => super::x86::avx2(avx2::LOOPS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => super::x86::avx512(narrow_blocks(avx512::LOOPS)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => super::x86::vbmi(super::x86::avx512(narrow_blocks(avx512::LOOPS))),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon | Isa::NeonDotprod => super::neon::neon(scalar::LOOPS),
            // The baseline of aarch64 has NEON, so the plain loops are compiled with it; wasm has
            // simd128 or not when it is compiled.
            _ => scalar::LOOPS,
        }
    }
}
