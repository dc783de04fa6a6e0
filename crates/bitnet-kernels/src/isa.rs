//! Instruction sets: what each includes, and how it is detected.

use std::fmt;

/// Calls a macro with every instruction set, narrow to wide within an architecture:
///
/// ```text
/// /// Documentation of the variant.
/// Variant function "name" on (cfg) with [detection "feature" …] compiled Lanes;
/// ```
///
/// `function` is the one in `table.rs` that returns its kernels. `with` lists every feature that
/// its kernels may use: the same list is detected and compiled with. With `compiled`, each kernel's
/// plain loop is compiled for it, with floats in the registers `Lanes` of `dense/lanes.rs`.
macro_rules! for_instruction_sets {
    ($then:ident) => {
        $then! {
            /// The target's baseline.
            Scalar scalar "scalar" on (all()) with [baseline] compiled Plain;
            /// x86-64 with SSSE3 and SSE4.1.
            Sse41 sse41 "sse41" on (target_arch = "x86_64")
                with [x86 "ssse3" "sse4.1"] compiled Plain;
            /// x86-64 with AVX2, and with FMA and F16C, which come with it.
            Avx2 avx2 "avx2" on (target_arch = "x86_64")
                with [x86 "avx2" "fma" "f16c"] compiled Avx2;
            /// [`Isa::Avx2`] with AVX-VNNI.
            AvxVnni avx_vnni "avxvnni" on (target_arch = "x86_64")
                with [x86 "avx2" "fma" "f16c" "avxvnni"];
            /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI, and with AVX2, FMA, F16C and BMI2.
            Avx512 avx512 "avx512" on (target_arch = "x86_64")
                with [x86 "avx2" "fma" "f16c" "bmi2"
                    "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni"] compiled Avx512;
            /// [`Isa::Avx512`] with VBMI.
            Avx512Vbmi avx512_vbmi "avx512vbmi" on (target_arch = "x86_64")
                with [x86 "avx2" "fma" "f16c" "bmi2"
                    "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni" "avx512vbmi"];
            /// aarch64.
            Neon neon "neon" on (target_arch = "aarch64") with [aarch64 "neon"];
            /// aarch64 with dot products.
            NeonDotprod neon_dotprod "neon-dotprod" on (target_arch = "aarch64")
                with [aarch64 "neon" "dotprod"];
            /// WebAssembly compiled with simd128.
            Simd128 simd128 "simd128" on (all(target_arch = "wasm32", target_feature = "simd128"))
                with [baseline];
        }
    };
}
pub(crate) use for_instruction_sets;

/// Whether the machine has every feature of a list.
#[allow(
    unused_macro_rules,
    reason = "the target decides which of them are used"
)]
macro_rules! detected {
    (baseline) => { true };
    (x86 $($feature:tt)*) => { true $(&& std::arch::is_x86_feature_detected!($feature))* };
    (aarch64 $($feature:tt)*) => {
        true $(&& std::arch::is_aarch64_feature_detected!($feature))*
    };
}

macro_rules! isa {
    ($(
        #[doc = $doc:literal]
        $isa:ident $function:ident $name:literal on ($($cfg:tt)*) with [$($features:tt)*]
            $(compiled $lanes:ident)?;
    )*) => {
        /// An instruction set that kernels are compiled for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Isa {
            $(#[doc = $doc] $isa,)*
        }

        impl Isa {
            /// All instruction sets, by architecture and from narrow to wide.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$isa),*];

            /// Whether this machine runs it.
            pub fn is_available(self) -> bool {
                match self {
                    $(
                        #[cfg($($cfg)*)]
                        Self::$isa => detected!($($features)*),
                    )*
                    #[allow(
                        unreachable_patterns,
                        reason = "which instruction sets remain depends on the target"
                    )]
                    _ => false,
                }
            }
        }

        impl fmt::Display for Isa {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self {
                    $(Self::$isa => $name,)*
                })
            }
        }
    };
}
for_instruction_sets!(isa);
