//! A step of 16 floats in the registers of an instruction set. Every operation rounds as its plain
//! form does, so all give the same bits.

pub(crate) use bitnet_core::ops::LANES;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Adds the partial sums in pairs: 16 → 8 → 4 → 2 → 1.
#[inline(always)]
pub(crate) fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// binary16 to binary32 without a branch, so that it vectorises: the fields are shifted into place,
/// a multiplication by 2^112 rebases the exponent (exact, also for subnormals), and infinities and
/// NaN get their exponent filled.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if bits & 0x7c00 == 0x7c00 {
        0x7f80_0000
    } else {
        0
    };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

/// The registers of an instruction set, for 16 lanes of f32.
///
/// Weights in blocks come from a line of codes (`blocks`), whose rows' 16 lanes hold `BITS` bits
/// for each step.
///
/// # Safety
/// A value of the implementor exists only where the machine has its instruction set: that is what
/// every function rests on. The callers of [`Lanes::codes`] keep to its own contract beside that.
pub(crate) unsafe trait Lanes: Copy {
    /// 16 floats.
    type Floats: Copy;
    /// The codes of a row in a line.
    type Codes: Copy;
    /// Scale and minimum, prepared for turning codes into weights.
    type Table: Copy;
    /// Rows of a register tile of a product.
    const TILE_ROWS: usize;
    /// Tokens of a register tile of a product.
    const TILE_TOKENS: usize;
    /// Zeros.
    fn zero(self) -> Self::Floats;
    /// As they are.
    fn f32(self, from: &[f32; LANES]) -> Self::Floats;
    /// From binary16.
    fn f16(self, from: &[u16; LANES]) -> Self::Floats;
    /// From bfloat16.
    fn bf16(self, from: &[u16; LANES]) -> Self::Floats;
    /// From integers.
    fn i8(self, from: &[i8; LANES]) -> Self::Floats;
    /// `(code − offset) · scale + minimum`, rounded once.
    fn table<const BITS: usize>(self, offset: u8, scale: f32, minimum: f32) -> Self::Table;
    /// The codes of row `row` of a line.
    ///
    /// # Safety
    /// `row` is below 4, and 67 bytes at `line` are readable: the line and three bytes more.
    unsafe fn codes<const BITS: usize>(self, line: *const u8, row: usize) -> Self::Codes;
    /// The weights of a step of a line.
    fn weights<const BITS: usize>(
        self,
        codes: Self::Codes,
        step: usize,
        table: Self::Table,
    ) -> Self::Floats;
    /// Prefetches the cache line at `at`, to the nearest cache or to the one after it; the address
    /// may be out of bounds.
    fn prefetch<const NEAR: bool>(self, at: *const u8);
    /// `a · b`, lane by lane.
    fn times(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `sum + w · x` with one rounding.
    fn add_product(self, sum: Self::Floats, w: Self::Floats, x: Self::Floats) -> Self::Floats;
    /// Writes the lanes.
    fn store(self, from: Self::Floats, to: &mut [f32; LANES]);
    /// The unnormalised Walsh–Hadamard transform of the lanes: for h = 1, 2, 4, 8 the sum and the
    /// difference of each pair i, i + h.
    fn butterflies(self, x: Self::Floats) -> Self::Floats;
    /// The sum, in pairs: 16 → 8 → 4 → 2 → 1, lane i with the one half the width above it.
    fn total(self, lanes: Self::Floats) -> f32;
    /// The sum of each.
    #[inline(always)]
    fn totals(self, all: &[Self::Floats; 16]) -> [f32; 16] {
        let mut totals = [0.0; 16];
        for (total, lanes) in totals.iter_mut().zip(all) {
            *total = self.total(*lanes);
        }
        totals
    }
}

/// The plain form.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Plain {
    /// As other registers have it.
    ///
    /// # Safety
    /// Always safe.
    pub(crate) const unsafe fn assume_available() -> Self {
        Self
    }
}

// SAFETY: every machine runs it.
unsafe impl Lanes for Plain {
    type Floats = [f32; LANES];
    type Codes = [u8; LANES];
    type Table = (f32, f32, f32);
    const TILE_ROWS: usize = 2;
    const TILE_TOKENS: usize = 2;

    fn zero(self) -> Self::Floats {
        [0.0; LANES]
    }

    fn f32(self, from: &[f32; LANES]) -> Self::Floats {
        *from
    }

    fn f16(self, from: &[u16; LANES]) -> Self::Floats {
        from.map(f16_to_f32)
    }

    fn bf16(self, from: &[u16; LANES]) -> Self::Floats {
        from.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    fn i8(self, from: &[i8; LANES]) -> Self::Floats {
        from.map(f32::from)
    }

    fn table<const BITS: usize>(self, offset: u8, scale: f32, minimum: f32) -> Self::Table {
        (offset.into(), scale, minimum)
    }

    unsafe fn codes<const BITS: usize>(self, line: *const u8, row: usize) -> Self::Codes {
        // SAFETY: the function's contract has 67 readable bytes there.
        let line: &[u8; 64] = unsafe { &*line.cast() };
        std::array::from_fn(|j| {
            line[if BITS == 8 {
                LANES * row + j
            } else {
                4 * j + row
            }]
        })
    }

    fn weights<const BITS: usize>(
        self,
        codes: Self::Codes,
        step: usize,
        (offset, scale, minimum): Self::Table,
    ) -> Self::Floats {
        codes.map(|byte| {
            let code = if BITS == 8 {
                f32::from(byte.cast_signed())
            } else {
                f32::from(byte >> (BITS * step) & ((1 << BITS) - 1))
            };
            (code - offset).mul_add(scale, minimum)
        })
    }

    fn prefetch<const NEAR: bool>(self, _: *const u8) {}

    fn times(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|i| a[i] * b[i])
    }

    fn add_product(self, sum: Self::Floats, w: Self::Floats, x: Self::Floats) -> Self::Floats {
        fused(sum, w, x)
    }

    fn store(self, from: Self::Floats, to: &mut [f32; LANES]) {
        *to = from;
    }

    fn butterflies(self, x: Self::Floats) -> Self::Floats {
        let stage = |h: usize, x: Self::Floats| -> Self::Floats {
            std::array::from_fn(|i| {
                if i & h == 0 {
                    x[i] + x[i + h]
                } else {
                    x[i - h] - x[i]
                }
            })
        };
        stage(8, stage(4, stage(2, stage(1, x))))
    }

    fn total(self, lanes: Self::Floats) -> f32 {
        total(lanes)
    }
}

/// `w · x + sum`. Not inlined where the target has no fused multiply-add: each is a call there, and
/// sixteen of them in every copy of every loop are a quarter of this crate's code.
#[cfg_attr(target_arch = "aarch64", inline(always))]
#[cfg_attr(not(target_arch = "aarch64"), inline(never))]
fn fused(sum: [f32; LANES], w: [f32; LANES], x: [f32; LANES]) -> [f32; LANES] {
    std::array::from_fn(|i| w[i].mul_add(x[i], sum[i]))
}

/// The sum of eight lanes in pairs.
///
/// # Safety
/// The machine has AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn total_of_8(eight: __m256) -> f32 {
    // SAFETY: the function's contract: the machine has AVX.
    unsafe {
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// The stages h = 1, 2, 4 of [`Lanes::butterflies`]: each register is added to its swapped lanes,
/// negated where the lane's bit h is set.
///
/// # Safety
/// The machine has AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn butterflies_of_8(x: __m256) -> __m256 {
    // SAFETY: the function's contract: the machine has AVX.
    unsafe {
        let (p, n) = (0.0, -0.0);
        let x = _mm256_add_ps(
            _mm256_permute_ps::<0b10_11_00_01>(x),
            _mm256_xor_ps(x, _mm256_setr_ps(p, n, p, n, p, n, p, n)),
        );
        let x = _mm256_add_ps(
            _mm256_permute_ps::<0b01_00_11_10>(x),
            _mm256_xor_ps(x, _mm256_setr_ps(p, p, n, n, p, p, n, n)),
        );
        _mm256_add_ps(
            _mm256_permute2f128_ps::<0x01>(x, x),
            _mm256_xor_ps(x, _mm256_setr_ps(p, p, p, p, n, n, n, n)),
        )
    }
}

/// The weights of eight lanes of codes.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn weights_of_8<const BITS: usize>(
    codes: __m256i,
    step: usize,
    (offset, scale, minimum): (__m256, __m256, __m256),
) -> __m256 {
    // SAFETY: the function's contract: the machine has AVX2 and FMA.
    unsafe {
        if BITS == 8 {
            return _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scale, minimum);
        }
        let shifted = _mm256_srl_epi32(codes, _mm_cvtsi32_si128((BITS * step) as i32));
        let codes = _mm256_cvtepi32_ps(_mm256_and_si256(
            shifted,
            _mm256_set1_epi32((1 << BITS) - 1),
        ));
        _mm256_fmadd_ps(_mm256_sub_ps(codes, offset), scale, minimum)
    }
}

/// Registers whose functions are made of intrinsics.
#[cfg(target_arch = "x86_64")]
macro_rules! registers {
    (
        $(#[doc = $doc:literal])*
        $registers:ident needs $features:literal {
            $(type $type:ident = $is:ty;)*
            $(const $const:ident: usize = $value:literal;)*
            unsafe fn codes<const BITS: usize>($line:ident: *const u8, $row:ident: usize)
                $codes:block
            $(
                $(#[doc = $function_doc:literal])*
                fn $function:ident $(<const $generic:ident: $generic_type:ty>)?
                    ($($argument:ident: $argument_type:ty),*) $(-> $result:ty)? $body:block
            )*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $registers(());

        impl $registers {
            /// The proof that the machine has the instruction set.
            ///
            /// # Safety
            #[doc = concat!("The machine has ", $features, ".")]
            pub(crate) const unsafe fn assume_available() -> Self {
                Self(())
            }
        }

        // SAFETY: `assume_available` is the only way to a value.
        unsafe impl Lanes for $registers {
            $(type $type = $is;)*
            $(const $const: usize = $value;)*

            #[inline(always)]
            unsafe fn codes<const BITS: usize>(
                self,
                $line: *const u8,
                $row: usize,
            ) -> Self::Codes {
                // SAFETY: `self` proves that the machine has the intrinsics. The function's
                // contract has 67 readable bytes at the line, and the loads end with the 67th at
                // most.
                unsafe { $codes }
            }

            $(
                $(#[doc = $function_doc])*
                #[inline(always)]
                fn $function $(<const $generic: $generic_type>)?(
                    self,
                    $($argument: $argument_type),*
                ) $(-> $result)? {
                    // SAFETY: `self` proves that the machine has the intrinsics. Loads and stores
                    // need no alignment and lie inside the arrays of the arguments' types.
                    unsafe { $body }
                }
            )*
        }
    };
}

#[cfg(target_arch = "x86_64")]
registers! {
    /// AVX-512 F, BW, DQ and VL.
    Avx512 needs "AVX-512 F, BW, DQ and VL" {
        type Floats = __m512;
        type Codes = __m512i;
        type Table = (__m512, __m512);
        const TILE_ROWS: usize = 4;
        const TILE_TOKENS: usize = 4;

        unsafe fn codes<const BITS: usize>(line: *const u8, row: usize) {
            if BITS == 8 {
                return _mm512_cvtepi8_epi32(_mm_loadu_si128(line.add(LANES * row).cast()));
            }
            _mm512_loadu_si512(line.add(row).cast())
        }

        fn zero() -> Self::Floats {
            _mm512_setzero_ps()
        }

        fn f32(from: &[f32; LANES]) -> Self::Floats {
            _mm512_loadu_ps(from.as_ptr())
        }

        fn f16(from: &[u16; LANES]) -> Self::Floats {
            _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))
        }

        fn bf16(from: &[u16; LANES]) -> Self::Floats {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }

        fn i8(from: &[i8; LANES]) -> Self::Floats {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast())))
        }

        fn table<const BITS: usize>(offset: u8, scale: f32, minimum: f32) -> Self::Table {
            let (scale, minimum) = (_mm512_set1_ps(scale), _mm512_set1_ps(minimum));
            if BITS == 8 {
                return (scale, minimum);
            }
            // All 16 codes, or four times four: a place in the table is the lower four bits of a
            // lane.
            let codes: [f32; LANES] = std::array::from_fn(|i| (i % (1 << BITS)) as f32);
            let codes = _mm512_sub_ps(
                _mm512_loadu_ps(codes.as_ptr()),
                _mm512_set1_ps(offset.into()),
            );
            (_mm512_fmadd_ps(codes, scale, minimum), minimum)
        }

        fn weights<const BITS: usize>(
            codes: Self::Codes, step: usize, table: Self::Table
        ) -> Self::Floats {
            let (table, minimum) = table;
            if BITS == 8 {
                return _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), table, minimum);
            }
            _mm512_permutexvar_ps(
                _mm512_srl_epi32(codes, _mm_cvtsi32_si128((BITS * step) as i32)),
                table,
            )
        }

        fn prefetch<const NEAR: bool>(at: *const u8) {
            if NEAR {
                _mm_prefetch::<_MM_HINT_T0>(at.cast())
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at.cast())
            }
        }

        fn times(a: Self::Floats, b: Self::Floats) -> Self::Floats {
            _mm512_mul_ps(a, b)
        }

        fn add_product(sum: Self::Floats, w: Self::Floats, x: Self::Floats) -> Self::Floats {
            _mm512_fmadd_ps(w, x, sum)
        }

        fn store(from: Self::Floats, to: &mut [f32; LANES]) {
            _mm512_storeu_ps(to.as_mut_ptr(), from)
        }

        /// Each register is added to its swapped lanes, or subtracted from them where the lane's
        /// bit h is set.
        fn butterflies(x: Self::Floats) -> Self::Floats {
            let stage = |swapped: __m512, subtracted: __mmask16, x: __m512| {
                _mm512_mask_sub_ps(_mm512_add_ps(swapped, x), subtracted, swapped, x)
            };
            let x = stage(_mm512_permute_ps::<0b10_11_00_01>(x), 0xaaaa, x);
            let x = stage(_mm512_permute_ps::<0b01_00_11_10>(x), 0xcccc, x);
            let x = stage(_mm512_shuffle_f32x4::<0b10_11_00_01>(x, x), 0xf0f0, x);
            stage(_mm512_shuffle_f32x4::<0b01_00_11_10>(x, x), 0xff00, x)
        }

        fn total(lanes: Self::Floats) -> f32 {
            total_of_8(_mm256_add_ps(
                _mm512_castps512_ps256(lanes),
                _mm512_extractf32x8_ps::<1>(lanes),
            ))
        }

        /// Halves of two registers side by side, level after level, so that each level adds the
        /// pairs of [`Lanes::total`] for two at once.
        fn totals(all: &[Self::Floats; 16]) -> [f32; 16] {
            let zero = _mm512_setzero_ps();
            let (mut eights, mut fours, mut twos) = ([zero; 8], [zero; 4], [zero; 2]);
            for i in 0..8 {
                let [a, b] = [all[2 * i], all[2 * i + 1]];
                eights[i] = _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
                    _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
                );
            }
            for i in 0..4 {
                let [a, b] = [eights[2 * i], eights[2 * i + 1]];
                fours[i] = _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
                );
            }
            for i in 0..2 {
                let [a, b] = [fours[2 * i], fours[2 * i + 1]];
                twos[i] = _mm512_add_ps(
                    _mm512_shuffle_ps::<0b01_00_01_00>(a, b),
                    _mm512_shuffle_ps::<0b11_10_11_10>(a, b),
                );
            }
            let [a, b] = twos;
            let ones = _mm512_add_ps(
                _mm512_shuffle_ps::<0b10_00_10_00>(a, b),
                _mm512_shuffle_ps::<0b11_01_11_01>(a, b),
            );
            // Lane 4k + m is the sum of register 4m + k.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let mut totals = [0.0; 16];
            _mm512_storeu_ps(totals.as_mut_ptr(), _mm512_permutexvar_ps(order, ones));
            totals
        }
    }
}

#[cfg(target_arch = "x86_64")]
registers! {
    /// AVX2, FMA and F16C.
    Avx2 needs "AVX2, FMA and F16C" {
        type Floats = (__m256, __m256);
        type Codes = (__m256i, __m256i);
        type Table = (__m256, __m256, __m256);
        const TILE_ROWS: usize = 2;
        const TILE_TOKENS: usize = 2;

        unsafe fn codes<const BITS: usize>(line: *const u8, row: usize) {
            if BITS == 8 {
                let all = _mm_loadu_si128(line.add(LANES * row).cast());
                return (
                    _mm256_cvtepi8_epi32(all),
                    _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(all)),
                );
            }
            (
                _mm256_loadu_si256(line.add(row).cast()),
                _mm256_loadu_si256(line.add(32 + row).cast()),
            )
        }

        fn zero() -> Self::Floats {
            (_mm256_setzero_ps(), _mm256_setzero_ps())
        }

        fn f32(from: &[f32; LANES]) -> Self::Floats {
            (
                _mm256_loadu_ps(from.as_ptr()),
                _mm256_loadu_ps(from[8..].as_ptr()),
            )
        }

        fn f16(from: &[u16; LANES]) -> Self::Floats {
            let half = |from: &[u16]| _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()));
            (half(&from[..8]), half(&from[8..]))
        }

        fn bf16(from: &[u16; LANES]) -> Self::Floats {
            let wide = |from: &[u16]| _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            let shifted = |wide: __m256i| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide));
            (shifted(wide(&from[..8])), shifted(wide(&from[8..])))
        }

        fn i8(from: &[i8; LANES]) -> Self::Floats {
            let all = _mm_loadu_si128(from.as_ptr().cast());
            let upper = _mm_srli_si128::<8>(all);
            (
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(upper)),
            )
        }

        fn table<const BITS: usize>(offset: u8, scale: f32, minimum: f32) -> Self::Table {
            (
                _mm256_set1_ps(offset.into()),
                _mm256_set1_ps(scale),
                _mm256_set1_ps(minimum),
            )
        }

        fn weights<const BITS: usize>(
            codes: Self::Codes, step: usize, table: Self::Table
        ) -> Self::Floats {
            (
                weights_of_8::<BITS>(codes.0, step, table),
                weights_of_8::<BITS>(codes.1, step, table),
            )
        }

        fn prefetch<const NEAR: bool>(at: *const u8) {
            if NEAR {
                _mm_prefetch::<_MM_HINT_T0>(at.cast())
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at.cast())
            }
        }

        fn times(a: Self::Floats, b: Self::Floats) -> Self::Floats {
            (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1))
        }

        fn add_product(sum: Self::Floats, w: Self::Floats, x: Self::Floats) -> Self::Floats {
            (
                _mm256_fmadd_ps(w.0, x.0, sum.0),
                _mm256_fmadd_ps(w.1, x.1, sum.1),
            )
        }

        fn store(from: Self::Floats, to: &mut [f32; LANES]) {
            _mm256_storeu_ps(to.as_mut_ptr(), from.0);
            _mm256_storeu_ps(to[8..].as_mut_ptr(), from.1);
        }

        fn butterflies(x: Self::Floats) -> Self::Floats {
            let (a, b) = (butterflies_of_8(x.0), butterflies_of_8(x.1));
            (_mm256_add_ps(a, b), _mm256_sub_ps(a, b))
        }

        fn total(lanes: Self::Floats) -> f32 {
            total_of_8(_mm256_add_ps(lanes.0, lanes.1))
        }
    }
}
