//! Tests every kernel on every instruction set of the machine: the results have the bits of the
//! scalar kernel.
//!
//! [`cases`] has a function for each kernel of [`for_kernels`]: it calls the kernel on inputs
//! around the lengths of its blocks and returns everything that the kernel wrote. A kernel without
//! one does not compile. That the scalar kernels are right is up to the tests of the crate.

use crate::kernels::Kernels;
use crate::table::{Table, for_kernels};

type KernelCase = fn(&Table) -> String;

macro_rules! cases_of_kernels {
    ({} $(
        $(#[$doc:meta])*
        fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block
    )*) => {
        const CASES: &[(&str, KernelCase)] = &[$((stringify!($name), cases::$name)),*];
    };
}
for_kernels!(cases_of_kernels);

#[test]
fn every_kernel_gives_the_bits_of_the_scalar_one() {
    let all: Vec<Kernels> = Kernels::all().collect();
    for (name, case) in CASES {
        let expected = case(all[0].table);
        assert!(!expected.is_empty(), "{name} did nothing");
        for kernels in &all[1..] {
            // Texts are long: the first difference is enough.
            let got = case(kernels.table);
            let at = got.bytes().zip(expected.bytes()).position(|(a, b)| a != b);
            assert!(
                got == expected,
                "{name} on {}: differs at {at:?} of its results",
                kernels.isa()
            );
        }
    }
}

mod graph;

/// A case for each kernel, of its name.
mod cases {
    use super::Table;
    pub(super) use super::graph::*;
    use crate::dense::{
        BlockRow, BlockStrip, BlockType, Blocks, DenseData, DenseMatrix, quantize_int4,
        quantize_int8,
    };
    use crate::error::Error;
    use crate::matmul::coding::Coding;
    use crate::matmul::float::{self, FloatTables};
    use crate::matmul::shape::{PANEL, STEP_BYTES};
    use crate::matmul::tiles::{Columns, TOKENS, Term};
    use crate::parallel::ColumnsMut;
    use crate::pool::Pool;
    use crate::update::{Adam, Decay, Sgd};
    use bitnet_core::ops::{Cuts, Key, Uniform};
    use bitnet_core::random::nth;
    use bitnet_core::scheme::Rounding;
    use half::{bf16, f16};
    use std::fmt::Write;

    /// Lengths around the blocks of every kernel.
    const LENGTHS: [usize; 20] = [
        0, 1, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 320, 321, 1285, 2561,
    ];
    const CODINGS: [Coding; 5] = [
        Coding::Bits1,
        Coding::Bits2,
        Coding::Bits4,
        Coding::Bits8,
        Coding::Trits,
    ];

    /// Random bits that depend on `i` alone.
    fn mix(i: usize) -> u64 {
        nth(i as u64, 0)
    }

    fn bytes(n: usize) -> Vec<u8> {
        (0..n).map(|i| mix(i) as u8).collect()
    }

    pub(super) fn int8(n: usize) -> Vec<i8> {
        (0..n).map(|i| mix(i) as i8).collect()
    }

    fn trits(n: usize) -> Vec<i8> {
        (0..n).map(|i| (mix(i) % 3) as i8 - 1).collect()
    }

    /// Between −1 and 1, some of them 0.
    pub(super) fn floats(n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (mix(i) % 2001) as f32 / 1000.0 - 1.0)
            .collect()
    }

    /// The results of a case, one after another: floats by their bits.
    #[derive(Default)]
    pub(super) struct Results(pub(super) String);

    impl Results {
        pub(super) fn add(&mut self, result: impl std::fmt::Debug) {
            let _ = write!(self.0, "{result:?};");
        }

        pub(super) fn floats(&mut self, x: &[f32]) {
            self.add(x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        }
    }

    /// What `case` adds for each length.
    pub(super) fn each_length(mut case: impl FnMut(usize, &mut Results)) -> String {
        let mut results = Results::default();
        for n in LENGTHS {
            case(n, &mut results);
        }
        results.0
    }

    const KEYS: [Key; 2] = [Key::Magnitude, Key::Signed];
    const CUTS: Cuts = Cuts {
        low: -0.3,
        high: 0.4,
    };

    fn quantizers() -> [Uniform; 3] {
        [Rounding::HalfEven, Rounding::HalfAway, Rounding::HalfUp].map(|rounding| Uniform {
            scale: 0.125,
            zero: 1.0,
            low: -8,
            high: 7,
            rounding,
        })
    }

    pub(super) fn moments(table: &Table) -> String {
        each_length(|n, results| results.add(table.moments(&floats(n))))
    }

    pub(super) fn magnitudes(table: &Table) -> String {
        each_length(|n, results| {
            results.add(table.magnitudes(&floats(n)));
            let ternary: Vec<f32> = trits(n).into_iter().map(f32::from).collect();
            results.add(table.magnitudes(&ternary));
        })
    }

    pub(super) fn magnitudes_each(table: &Table) -> String {
        each_length(|n, results| {
            for width in [1, 40, 64] {
                let mut out = vec![];
                table.magnitudes_each(&floats(n), width, &mut out);
                results.add(out);
            }
        })
    }

    pub(super) fn inside(table: &Table) -> String {
        each_length(|n, results| {
            for key in KEYS {
                let mut out = vec![7.0];
                table.inside(&floats(n), key, -0.25, 0.5, &mut out);
                results.floats(&out);
            }
        })
    }

    pub(super) fn above_both(table: &Table) -> String {
        each_length(|n, results| {
            for key in KEYS {
                results.add(table.above_both(&floats(n), key, [0.25, -0.5]));
            }
        })
    }

    pub(super) fn above(table: &Table) -> String {
        each_length(|n, results| {
            let h: Vec<f32> = floats(n).iter().map(|h| h.abs()).collect();
            for key in KEYS {
                results.add(table.above(&floats(n), None, key, 0.25));
                results.add(table.above(&floats(n), Some(&h), key, 0.25));
            }
        })
    }

    pub(super) fn uniform_error(table: &Table) -> String {
        each_length(|n, results| {
            let h: Vec<f32> = floats(n).iter().map(|h| h.abs()).collect();
            for quantizer in quantizers() {
                for h in [None, Some(&h[..])] {
                    results.add(table.uniform_error(&floats(n), h, &quantizer).to_bits());
                }
            }
        })
    }

    pub(super) fn encode_cut(table: &Table) -> String {
        each_length(|n, results| {
            let mut out = vec![9; n];
            table.encode_cut(&floats(n), CUTS, &mut out);
            results.add(out);
        })
    }

    pub(super) fn encode_uniform(table: &Table) -> String {
        each_length(|n, results| {
            for quantizer in quantizers() {
                let mut out = vec![9; n];
                table.encode_uniform(&floats(n), &quantizer, &mut out);
                results.add(out);
            }
        })
    }

    /// Packers write nothing of meaning for values outside the alphabet.
    fn packed(results: &mut Results, ok: bool, out: &[u8]) {
        results.add(ok);
        if ok {
            results.add(out);
        }
    }

    pub(super) fn pack_two_bit(table: &Table) -> String {
        each_length(|n, results| {
            let mut out = vec![0; n.div_ceil(4)];
            let ok = table.pack_two_bit(&trits(n), 1, 2, &mut out);
            packed(results, ok, &out);
            let int2: Vec<i8> = (0..n).map(|i| (mix(i) % 4) as i8 - 2).collect();
            let ok = table.pack_two_bit(&int2, 2, 3, &mut out);
            packed(results, ok, &out);
            let ok = table.pack_two_bit(&int2, 1, 2, &mut out);
            packed(results, ok, &out);
        })
    }

    /// What `unpack` makes of `out`, at two alignments.
    fn unpacked(results: &mut Results, len: usize, mut unpack: impl FnMut(&mut [i8]) -> bool) {
        for shift in [0, 1] {
            let mut out = vec![9; len + shift];
            let ok = unpack(&mut out[shift..]);
            results.add(ok);
            if ok {
                results.add(&out[shift..]);
            }
        }
    }

    fn two_bit_bytes(n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n.div_ceil(4)];
        for (i, v) in trits(n).into_iter().enumerate() {
            bytes[i / 4] |= (v + 1).cast_unsigned() << (i % 4 * 2);
        }
        bytes
    }

    fn each_two_bit(unpack: impl Fn(&[u8], i8, u8, &mut [i8]) -> bool) -> String {
        each_length(|n, results| {
            let good = two_bit_bytes(n);
            unpacked(results, n, |out| unpack(&good, 1, 2, out));
            unpacked(results, n, |out| unpack(&good, 2, 3, out));
            let mut bad = good;
            if let Some(byte) = bad.last_mut() {
                *byte = 0xff;
            }
            unpacked(results, n, |out| unpack(&bad, 1, 2, out));
        })
    }

    pub(super) fn unpack_two_bit(table: &Table) -> String {
        each_two_bit(|bytes, bias, top, out| table.unpack_two_bit(bytes, bias, top, out))
    }

    pub(super) fn unpack_two_bit_streamed(table: &Table) -> String {
        each_two_bit(|bytes, bias, top, out| table.unpack_two_bit_streamed(bytes, bias, top, out))
    }

    pub(super) fn pack_base3(table: &Table) -> String {
        each_length(|n, results| {
            let mut out = vec![0; n.div_ceil(5)];
            let ok = table.pack_base3(&trits(n), &mut out);
            packed(results, ok, &out);
            let ok = table.pack_base3(&int8(n), &mut out);
            packed(results, ok, &out);
        })
    }

    pub(super) fn unpack_base3(table: &Table) -> String {
        each_length(|n, results| {
            let mut good = vec![0; n.div_ceil(5)];
            for (i, v) in trits(n).into_iter().enumerate() {
                good[i / 5] += (v + 1).cast_unsigned() * 3u8.pow((i % 5) as u32);
            }
            unpacked(results, n, |out| table.unpack_base3(&good, out));
            let bad = bytes(n.div_ceil(5));
            unpacked(results, n, |out| table.unpack_base3(&bad, out));
        })
    }

    /// Four codes a byte, none of them 3.
    fn quad_bytes(n: usize) -> Vec<u8> {
        two_bit_bytes(4 * n)
    }

    pub(super) fn unpack_quads(table: &Table) -> String {
        each_length(|n, results| {
            for input in [quad_bytes(n), bytes(n)] {
                unpacked(results, 4 * n, |out| {
                    let (front, back) = out.split_at_mut(2 * n);
                    let ((a, b), (c, d)) = (front.split_at_mut(n), back.split_at_mut(n));
                    table.unpack_quads(&input, [0, 2, 4, 6], [a, b, c, d])
                });
            }
        })
    }

    fn each_quad_blocks(
        block: usize,
        unpack: impl Fn(&[u8], [u32; 4], &mut [i8]) -> bool,
    ) -> String {
        let mut results = Results::default();
        for blocks in [0, 1, 2, 5, 9] {
            for input in [quad_bytes(block * blocks), bytes(block * blocks)] {
                unpacked(&mut results, 4 * block * blocks, |out| {
                    unpack(&input, [6, 4, 2, 0], out)
                });
            }
        }
        results.0
    }

    pub(super) fn unpack_quads_32(table: &Table) -> String {
        each_quad_blocks(32, |bytes, shifts, out| {
            table.unpack_quads_32(bytes, shifts, out)
        })
    }

    pub(super) fn unpack_quads_16(table: &Table) -> String {
        each_quad_blocks(16, |bytes, shifts, out| {
            table.unpack_quads_16(bytes, shifts, out)
        })
    }

    pub(super) fn unpack_tq1(table: &Table) -> String {
        let mut results = Results::default();
        for blocks in [0, 1, 2, 5] {
            // Digits are fractions: ceil(256·q / 243); the last four bytes have four.
            let digits = |q: usize| (q * 256).div_ceil(243) as u8;
            let good: Vec<[u8; 54]> = (0..blocks)
                .map(|b| {
                    std::array::from_fn(|i| {
                        let q = mix(54 * b + i) as usize;
                        digits(if i < 48 { q % 243 } else { q % 81 * 3 })
                    })
                })
                .collect();
            let bad: Vec<[u8; 54]> = bytes(54 * blocks).as_chunks().0.to_vec();
            for input in [good, bad] {
                unpacked(&mut results, 256 * blocks, |out| {
                    table.unpack_tq1(&input, out.as_chunks_mut().0)
                });
            }
        }
        results.0
    }

    pub(super) fn unpack_tq2(table: &Table) -> String {
        let mut results = Results::default();
        for blocks in [0, 1, 2, 5] {
            for input in [quad_bytes(66 * blocks), bytes(66 * blocks)] {
                unpacked(&mut results, 256 * blocks, |out| {
                    table.unpack_tq2(input.as_chunks().0, out.as_chunks_mut().0)
                });
            }
        }
        results.0
    }

    pub(super) fn encode_two_bit(table: &Table) -> String {
        each_length(|n, results| {
            let mut out = vec![0; n.div_ceil(4)];
            table.encode_two_bit(&floats(n), CUTS, &mut out);
            results.add(out);
        })
    }

    pub(super) fn encode_two_bit_and_measure(table: &Table) -> String {
        each_length(|n, results| {
            let mut out = vec![0; n.div_ceil(4)];
            for next in [floats(n), floats(n / 2)] {
                results.add(table.encode_two_bit_and_measure(&floats(n), CUTS, &mut out, &next));
                results.add(&out);
            }
        })
    }

    pub(super) fn scale(table: &Table) -> String {
        each_length(|n, results| {
            let mut out = vec![9.0; n];
            table.scale(&int8(n), 0.37, &mut out);
            results.floats(&out);
        })
    }

    pub(super) fn scale_streamed(table: &Table) -> String {
        each_length(|n, results| {
            // One of these begins at a multiple of 64 bytes.
            for shift in 0..16 {
                let mut out = vec![9.0; n + shift];
                table.scale_streamed(&int8(n), 0.37, &mut out[shift..]);
                results.floats(&out);
            }
        })
    }

    pub(super) fn absmax(table: &Table) -> String {
        each_length(|n, results| {
            let mut x = floats(n);
            results.add(table.absmax(&x));
            if let Some(last) = x.last_mut() {
                *last = f32::NEG_INFINITY;
                results.add(table.absmax(&x));
            }
        })
    }

    pub(super) fn round_to_int8(table: &Table) -> String {
        each_length(|n, results| {
            let mut out = vec![9; n];
            results.add(table.round_to_int8(&floats(n), 127.0, &mut out));
            results.add(out);
        })
    }

    pub(super) fn widen_f16(table: &Table) -> String {
        each_length(|n, results| {
            // Every 25th of all numbers, so that each exponent comes up.
            let from: Vec<f16> = (0..n).map(|i| f16::from_bits(25 * i as u16)).collect();
            let mut out = vec![9.0; n];
            table.widen_f16(&from, &mut out);
            results.floats(&out);
        })
    }

    pub(super) fn widen_bf16(table: &Table) -> String {
        each_length(|n, results| {
            // Every 25th of all numbers, so that each exponent comes up.
            let from: Vec<bf16> = (0..n).map(|i| bf16::from_bits(25 * i as u16)).collect();
            let mut out = vec![9.0; n];
            table.widen_bf16(&from, &mut out);
            results.floats(&out);
        })
    }

    const DECAY: Decay = Decay {
        scale: 0.75,
        coupled: 0.01,
        decay: 0.999,
    };

    const SGD: Sgd = Sgd {
        decay: DECAY,
        rate: 0.1,
        momentum: 0.9,
        nesterov: true,
    };

    pub(super) fn sgd_step(table: &Table) -> String {
        each_length(|n, results| {
            let mut w = floats(n);
            table.sgd_step(&mut w, &floats(n + 1)[1..], &SGD);
            results.floats(&w);
        })
    }

    pub(super) fn sgd_momentum_step(table: &Table) -> String {
        each_length(|n, results| {
            for nesterov in [false, true] {
                let (mut w, mut velocity) = (floats(n), floats(n + 2)[2..].to_vec());
                let step = Sgd { nesterov, ..SGD };
                table.sgd_momentum_step(&mut w, &floats(n + 1)[1..], &mut velocity, &step);
                results.floats(&w);
                results.floats(&velocity);
            }
        })
    }

    pub(super) fn adam_step(table: &Table) -> String {
        let step = Adam {
            decay: DECAY,
            rate: 0.01,
            root: 1.7,
            new1: 0.1,
            beta2: 0.999,
            new2: 0.001,
            eps: 1e-8,
        };
        each_length(|n, results| {
            let (mut w, mut m) = (floats(n), floats(n + 2)[2..].to_vec());
            let mut v: Vec<f32> = floats(n).iter().map(|v| v.abs()).collect();
            table.adam_step(&mut w, &floats(n + 1)[1..], &mut m, &mut v, &step);
            results.floats(&w);
            results.floats(&m);
            results.floats(&v);
        })
    }

    pub(super) fn sum_squares(table: &Table) -> String {
        each_length(|n, results| results.add(table.sum_squares(&floats(n)).to_bits()))
    }

    /// Matrices of every kind of weights.
    fn matrices(rows: usize, cols: usize) -> Vec<DenseMatrix> {
        let w = floats(rows * cols);
        let blocks = |kind, quantize: fn(&[f32], &mut BlockRow<'_>)| {
            let fill = |first: usize, strip: &mut BlockStrip| {
                for i in 0..strip.rows() {
                    quantize(&w[(first + i) * cols..][..cols], &mut strip.row(i));
                }
                Ok::<(), Error>(())
            };
            Blocks::new(&Pool::single(), rows, cols, kind, fill).expect("blocks fit the columns")
        };
        let halves = w.iter().map(|&w| f16::from_f32(w).to_bits()).collect();
        let brains = w.iter().map(|&w| bf16::from_f32(w).to_bits()).collect();
        let of = |data| DenseMatrix::new(rows, cols, data).expect("lengths fit");
        vec![
            of(DenseData::F32(w.clone())),
            of(DenseData::F16(halves)),
            of(DenseData::Bf16(brains)),
            blocks(BlockType::INT8, quantize_int8).into(),
            blocks(BlockType::INT4, quantize_int4).into(),
        ]
    }

    pub(super) fn dense_product(table: &Table) -> String {
        let mut results = Results::default();
        for (rows, cols, tokens) in [(1, 1, 1), (5, 31, 2), (9, 160, 5), (17, 257, 9)] {
            let (x, bias) = (floats(tokens * cols), floats(rows));
            for w in matrices(rows, cols) {
                for bias in [None, Some(&bias[..])] {
                    let mut out = vec![9.0; tokens * rows];
                    let product = |mut columns: ColumnsMut<'_, f32>| {
                        table.dense_product(&w, &x, bias, &mut columns)
                    };
                    let shape = (tokens, rows);
                    Pool::single().for_columns(&mut out, shape, 8, 1, product);
                    results.floats(&out);
                }
            }
        }
        results.0
    }

    pub(super) fn pack_lanes(table: &Table) -> String {
        each_length(|n, results| {
            let mut lanes = vec![9; n.div_ceil(16) + 1];
            results.add(table.pack_lanes(&trits(n), 1, &mut lanes));
            results.add(lanes);
        })
    }

    pub(super) fn any_outside(table: &Table) -> String {
        each_length(|n, results| {
            for no_zero in [false, true] {
                results.add(table.any_outside(&trits(n), -1, 1, no_zero));
                results.add(table.any_outside(&int8(n), -120, 120, no_zero));
            }
        })
    }

    /// Steps of a product: around blocks of every kernel.
    const STEPS: [usize; 5] = [0, 1, 4, 7, 33];

    pub(super) fn packed_sums(table: &Table) -> String {
        let mut results = Results::default();
        for coding in CODINGS {
            for (steps, tokens) in STEPS
                .into_iter()
                .flat_map(|s| (1..=TOKENS).map(move |t| (s, t)))
            {
                let columns = steps * coding.step();
                let (weights, x) = (bytes(steps * STEP_BYTES), int8(tokens * (columns + 4)));
                let x = Columns {
                    values: &x,
                    stride: columns + 4,
                };
                let mut sums = vec![[7; PANEL]; tokens];
                table.packed_sums(coding, &weights, x, &mut sums);
                results.add(sums);
            }
        }
        results.0
    }

    pub(super) fn unpacked_sums(table: &Table) -> String {
        let mut results = Results::default();
        for most in [2, 3, 15, 255] {
            for (quads, tokens) in STEPS
                .into_iter()
                .flat_map(|s| (1..=TOKENS).map(move |t| (s, t)))
            {
                let codes: Vec<u8> = bytes(quads * STEP_BYTES)
                    .iter()
                    .map(|&b| (usize::from(b) % (most + 1)) as u8)
                    .collect();
                let x = int8(tokens * (4 * quads + 4));
                let x = Columns {
                    values: &x,
                    stride: 4 * quads + 4,
                };
                let mut sums = vec![[7; PANEL]; tokens];
                table.unpacked_sums(most, &codes, x, &mut sums);
                results.add(sums);
            }
        }
        results.0
    }

    pub(super) fn unpack_codes(table: &Table) -> String {
        let mut results = Results::default();
        for coding in CODINGS {
            for steps in STEPS {
                let mut out = vec![9; steps * coding.step_codes()];
                table.unpack_codes(coding, &bytes(steps * STEP_BYTES), &mut out);
                results.add(out);
            }
        }
        results.0
    }

    pub(super) fn finish_sums(table: &Table) -> String {
        let mut results = Results::default();
        let numbers = floats(3 * PANEL);
        let (scales, shift) = (numbers.first_chunk(), numbers[PANEL..].first_chunk());
        let (scales, shift) = (scales.expect("a panel"), shift.expect("a panel"));
        let sums = std::array::from_fn(|i| mix(i) as i32 >> 8);
        let bias = &numbers[2 * PANEL..];
        for rows in [1, 17, PANEL - 1, PANEL] {
            for shift in [None, Some((shift, -321))] {
                for last in [None, Some((0.5, None)), Some((0.5, Some(bias)))] {
                    for first in [true, false] {
                        let term = Term {
                            scales,
                            shift,
                            first,
                            last,
                        };
                        let mut out = vec![0.25; rows];
                        table.finish_sums(&term, &sums, &mut out);
                        results.floats(&out);
                    }
                }
            }
        }
        results.0
    }

    pub(super) fn float_sums(table: &Table) -> String {
        let mut results = Results::default();
        for steps in STEPS {
            let mut tables = vec![0.0; steps * float::STEP_TABLES];
            float::tables(&floats(steps * float::STEP), &mut tables);
            let mut sums = [[0.5; PANEL]; 2];
            let weights = bytes(steps * STEP_BYTES);
            table.float_sums(&weights, FloatTables(&tables), &mut sums);
            results.floats(sums.as_flattened());
        }
        results.0
    }
}
