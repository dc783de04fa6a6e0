//! Streams on every instruction set of this machine and on one and three threads: the bits of
//! bitnet-core.

use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::ops::Scalar;
use bitnet_core::pack::{by_name, layouts};
use bitnet_core::random::Random;
use bitnet_core::scheme::{Rounding, ScaleRule, Scheme, Threshold};
use bitnet_core::{Error, Granularity, Matrix, MatrixSpec, Precision, ScaleDtype, quantize};
use bitnet_kernels::stream::{
    FloatWeights, dequantize, pack, quantize as quantize_packed, quantize_token, unpack,
};
use bitnet_kernels::{Isa, Kernels, Pool};
use half::{bf16, f16};
use proptest::prelude::*;

/// Lengths around every block of every loop.
const COLS: [usize; 22] = [
    1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 64, 127, 128, 129, 255, 257, 319, 320, 321, 1281, 2563,
];

/// Whether `scripts/cross-test` emulates this machine: sizes are then small.
fn emulated() -> bool {
    std::env::var_os("BITNET_EMULATED").is_some()
}

/// Every kernel on one and on three threads; failures are collected and reported together.
fn everywhere(mut each: impl FnMut(Kernels, &Pool) -> Result<(), String>) {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        println!("skipped: this machine does not run {isa}");
    }
    let mut failures = vec![];
    // WebAssembly has one thread.
    for &threads in if cfg!(target_family = "wasm") {
        &[1][..]
    } else {
        &[1, 3]
    } {
        let pool = Pool::new(threads).expect("threads start");
        for kernels in Kernels::all() {
            if let Err(failure) = each(kernels, &pool) {
                failures.push(format!("{} on {threads} threads: {failure}", kernels.isa()));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn trits(random: &mut Random, n: usize) -> Vec<i8> {
    (0..n).map(|_| random.trit()).collect()
}

/// Normally distributed.
fn floats(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.normal() as f32 * 0.03).collect()
}

fn spec(rows: usize, cols: usize, granularity: Granularity, scale_dtype: ScaleDtype) -> MatrixSpec {
    MatrixSpec {
        scale_dtype,
        ..MatrixSpec::new(rows, cols, Precision::Ternary, granularity)
    }
}

fn check_layout(
    name: &str,
    spec: &MatrixSpec,
    values: &[i8],
    scales: &[f32],
    kernels: Kernels,
    pool: &Pool,
) -> Result<(), String> {
    let layout = by_name(name).expect("a layout");
    let what = format!("{name} {} × {}", spec.rows, spec.cols);
    let mut expected = vec![9];
    layout
        .pack_into(spec, values, scales, &mut expected)
        .map_err(|e| format!("{what}: {e}"))?;
    let mut packed = vec![9];
    pack(kernels, pool, layout, spec, values, scales, &mut packed)
        .map_err(|e| format!("{what}: {e}"))?;
    if packed != expected {
        return Err(format!("{what}: packed bytes differ"));
    }
    let mut back = vec![77; values.len()];
    let found = unpack(kernels, pool, layout, spec, &packed[1..], &mut back)
        .map_err(|e| format!("{what}: {e}"))?;
    if back != values
        || found.is_some() != layout.stores_scales()
        || found.is_some_and(|found| found != scales)
    {
        return Err(format!("{what}: unpacked values or scales differ"));
    }
    let matrix = Matrix {
        spec: spec.clone(),
        values: values.to_vec(),
        scales: scales.to_vec(),
        zero_points: vec![],
    };
    let mut floats = vec![f32::NAN; spec.weights_len()];
    dequantize(
        kernels,
        pool,
        layout,
        spec,
        &packed[1..],
        scales,
        &mut floats,
    )
    .map_err(|e| format!("{what}: {e}"))?;
    let bits = |w: &[f32]| w.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
    if bits(&floats) != bits(&matrix.dequantize()) {
        return Err(format!("{what}: dequantized floats differ"));
    }
    Ok(())
}

#[test]
fn dense_layouts_of_every_length() {
    let mut random = Random::new(1);
    for cols in COLS {
        for (rows, granularity) in [
            (1, Granularity::Tensor),
            (3, Granularity::Channel),
            (4, Granularity::Group(24)),
        ] {
            let spec = spec(rows, cols, granularity, ScaleDtype::F32);
            let (values, scales) = (
                trits(&mut random, rows * cols),
                floats(&mut random, spec.scales_len()),
            );
            everywhere(|kernels, pool| {
                check_layout("two-bit", &spec, &values, &scales, kernels, pool)?;
                check_layout("base-3", &spec, &values, &scales, kernels, pool)
            });
            let int2 = MatrixSpec {
                precision: Precision::Int2,
                ..spec.clone()
            };
            let values: Vec<i8> = (0..rows * cols)
                .map(|_| random.below(4) as i8 - 2)
                .collect();
            everywhere(|kernels, pool| {
                check_layout("two-bit", &int2, &values, &scales, kernels, pool)
            });
        }
    }
}

#[test]
fn many_rows_in_many_parts() {
    let mut random = Random::new(2);
    let shapes = [(2, 400_001), (700, 1280), (701, 1283), (40_000, 19)];
    for (rows, cols) in shapes.into_iter().take(if emulated() { 1 } else { 4 }) {
        let spec = spec(rows, cols, Granularity::Channel, ScaleDtype::F32);
        let (values, scales) = (trits(&mut random, rows * cols), floats(&mut random, rows));
        everywhere(|kernels, pool| {
            check_layout("two-bit", &spec, &values, &scales, kernels, pool)?;
            check_layout("base-3", &spec, &values, &scales, kernels, pool)
        });
    }
}

/// Outputs so large that they are written past the caches, at every alignment.
#[test]
fn large_outputs() {
    let mut random = Random::new(3);
    let spec = spec(4099, 4096, Granularity::Tensor, ScaleDtype::F32);
    let values = trits(&mut random, spec.values_len());
    let layout = by_name("two-bit").expect("a layout");
    let mut packed = vec![];
    layout
        .pack_into(&spec, &values, &[1.0], &mut packed)
        .expect("packs");
    let pool = Pool::new(if cfg!(target_family = "wasm") { 1 } else { 2 }).expect("threads start");
    let mut back = vec![77; values.len() + 65];
    for kernels in Kernels::all() {
        for shift in [0, 1, 4, 60, 63] {
            back.fill(77);
            unpack(
                kernels,
                &pool,
                layout,
                &spec,
                &packed,
                &mut back[shift..shift + values.len()],
            )
            .expect("unpacks");
            assert!(
                back[shift..shift + values.len()] == values[..],
                "{} at {shift}",
                kernels.isa()
            );
            assert!(
                back[..shift]
                    .iter()
                    .chain(&back[shift + values.len()..])
                    .all(|&v| v == 77),
                "{} at {shift}",
                kernels.isa()
            );
        }
    }
}

#[test]
fn foreign_layouts() {
    let mut random = Random::new(4);
    let shapes = [(4, 256), (12, 512), (8, 1280), (6, 256), (400, 2560)];
    for (rows, cols) in shapes.into_iter().take(if emulated() { 4 } else { 5 }) {
        let values = trits(&mut random, rows * cols);
        let scale = |dtype: ScaleDtype| dtype.round(0.037);
        let tensor = spec(rows, cols, Granularity::Tensor, ScaleDtype::F32);
        let f16 = spec(rows, cols, Granularity::Tensor, ScaleDtype::F16);
        let names: &[&str] = if rows % 4 == 0 {
            &["hf-bitnet", "i2_s", "i2_s-g64", "i2_s-x4"]
        } else {
            &["hf-bitnet", "i2_s", "i2_s-g64"]
        };
        everywhere(|kernels, pool| {
            for name in names {
                check_layout(
                    name,
                    &tensor,
                    &values,
                    &[scale(ScaleDtype::F32)],
                    kernels,
                    pool,
                )?;
            }
            for name in ["tq1_0", "tq2_0"] {
                check_layout(
                    name,
                    &f16,
                    &values,
                    &[scale(ScaleDtype::F16)],
                    kernels,
                    pool,
                )?;
                for granularity in [
                    Granularity::Channel,
                    Granularity::Group(256),
                    Granularity::Group(1024),
                ] {
                    let spec = MatrixSpec {
                        granularity,
                        ..f16.clone()
                    };
                    let scales: Vec<f32> = (0..spec.scales_len())
                        .map(|i| 0.5 + i as f32 / 1024.0)
                        .collect();
                    let scales: Vec<f32> = scales
                        .into_iter()
                        .map(|s| ScaleDtype::F16.round(s))
                        .collect();
                    check_layout(name, &spec, &values, &scales, kernels, pool)?;
                }
            }
            Ok(())
        });
    }
}

/// Each byte replaced by each other one: the error or the values are those of the layout in core.
#[test]
fn every_damaged_byte_is_seen() {
    let mut random = Random::new(5);
    let names = [
        "two-bit",
        "base-3",
        "hf-bitnet",
        "i2_s",
        "i2_s-g64",
        "i2_s-x4",
        "tq1_0",
        "tq2_0",
    ];
    for name in names {
        let layout = by_name(name).expect("a layout");
        for (rows, cols) in if name.contains('-') && name != "hf-bitnet" && !name.contains("i2_s") {
            [(2, 1283), (1, 643)]
        } else {
            [(4, 512), (4, 256)]
        } {
            let dtype = if name.starts_with("tq") {
                ScaleDtype::F16
            } else {
                ScaleDtype::F32
            };
            let spec = spec(rows, cols, Granularity::Tensor, dtype);
            let values = trits(&mut random, rows * cols);
            let mut bytes = vec![];
            layout
                .pack_into(&spec, &values, &[0.5], &mut bytes)
                .expect("packs");
            everywhere(|kernels, pool| {
                let mut out = vec![0; values.len()];
                for at in (0..bytes.len())
                    .step_by(if bytes.len() > 200 { 7 } else { 1 })
                    .chain([bytes.len() - 1])
                {
                    for new in [
                        0x00, 0x03, 0x0c, 0x30, 0x55, 0x7f, 0xa9, 0xc0, 0xf2, 0xf3, 0xff,
                    ] {
                        let old = std::mem::replace(&mut bytes.clone()[at], new);
                        let mut bad = bytes.clone();
                        bad[at] = new;
                        let (expected, got) = (
                            layout.unpack(&spec, &bad),
                            unpack(kernels, pool, layout, &spec, &bad, &mut out),
                        );
                        let same = match (&expected, &got) {
                            (Ok(e), Ok(scales)) => e.values == out && e.scales == *scales,
                            (Err(e), Err(g)) => e == g,
                            _ => false,
                        };
                        if !same {
                            return Err(format!(
                                "{name}: byte {at}, {old:#x} → {new:#x}: {expected:?} and {got:?}"
                            ));
                        }
                    }
                }
                Ok(())
            });
        }
    }
}

#[test]
fn errors_are_those_of_core() {
    let spec = spec(3, 700, Granularity::Channel, ScaleDtype::F32);
    everywhere(|kernels, pool| {
        for name in ["two-bit", "base-3"] {
            let layout = by_name(name).expect("a layout");
            for at in [0, 1, 639, 699, 700, 2099] {
                for bad in [2, 3, -2, 127, -128] {
                    let mut values = vec![1; 2100];
                    values[at] = bad;
                    let mut out = vec![1, 2, 3];
                    let got = pack(kernels, pool, layout, &spec, &values, &[], &mut out);
                    let expected = Error::Value {
                        index: at,
                        got: bad.into(),
                        expected: "{-1, 0, 1}",
                    };
                    if got != Err(expected) || out != [1, 2, 3] {
                        return Err(format!("{name}: {bad} at {at}: {got:?}"));
                    }
                }
            }
            let short = unpack(kernels, pool, layout, &spec, &[0; 10], &mut vec![0; 2100]);
            let expected = layout.unpack(&spec, &[0; 10]);
            if short.clone().err() != expected.err() || short.is_ok() {
                return Err(format!("{name}: {short:?}"));
            }
            if !matches!(
                unpack(kernels, pool, layout, &spec, &[0; 525], &mut [0; 5]),
                Err(Error::Length { what: "values", .. })
            ) {
                return Err(format!("{name}: values of another length"));
            }
        }
        Ok(())
    });
}

#[test]
fn nothing_is_nothing() {
    everywhere(|kernels, pool| {
        for (rows, cols) in [(0, 0), (0, 7), (7, 0)] {
            for name in ["two-bit", "base-3", "hf-bitnet", "i8"] {
                let layout = by_name(name).expect("a layout");
                let scheme = Scheme::ternary(Threshold::Absmean);
                let expected = quantize::quantize(&Scalar, &[], rows, cols, &scheme, None)
                    .map_err(|e| e.to_string())?;
                let packed = quantize_packed(
                    kernels,
                    pool,
                    FloatWeights::F32(&[]),
                    rows,
                    cols,
                    &scheme,
                    layout,
                )
                .map_err(|e| e.to_string())?;
                if packed.scales != expected.scales || packed.spec != expected.spec {
                    return Err(format!("{name} {rows} × {cols}: {packed:?}"));
                }
                unpack(kernels, pool, layout, &packed.spec, &packed.bytes, &mut [])
                    .map_err(|e| e.to_string())?;
                dequantize(
                    kernels,
                    pool,
                    layout,
                    &packed.spec,
                    &packed.bytes,
                    &packed.scales,
                    &mut [],
                )
                .map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    });
}

fn check_quantize(
    w: FloatWeights<'_>,
    f32s: &[f32],
    shape: (usize, usize),
    scheme: &Scheme,
    kernels: Kernels,
    pool: &Pool,
) -> Result<(), String> {
    let (rows, cols) = shape;
    let expected = quantize::quantize(&Scalar, f32s, rows, cols, scheme, None);
    for layout in layouts() {
        let got = quantize_packed(kernels, pool, w, rows, cols, scheme, *layout);
        let expected = match &expected {
            Ok(matrix) => {
                let mut bytes = vec![];
                layout
                    .check(&matrix.spec)
                    .and_then(|()| {
                        layout.pack_into(&matrix.spec, &matrix.values, &matrix.scales, &mut bytes)
                    })
                    .map(|()| (&matrix.spec, bytes, &matrix.scales, &matrix.zero_points))
            }
            Err(e) => Err(e.clone()),
        };
        let same = match (&expected, &got) {
            (Ok((spec, bytes, scales, zeros)), Ok(got)) => {
                (*spec, bytes, *scales, *zeros)
                    == (&got.spec, &got.bytes, &got.scales, &got.zero_points)
            }
            (Err(e), Err(g)) => e == g || matches!(g, Error::Unsupported { .. }),
            _ => false,
        };
        if !same {
            return Err(format!(
                "{} {rows} × {cols} {scheme:?}: {:?} and {:?}",
                layout.name(),
                expected.err(),
                got.err()
            ));
        }
    }
    Ok(())
}

fn schemes() -> Vec<Scheme> {
    let thresholds = Threshold::PLAIN.iter().chain(&[Threshold::Factor(0.6)]);
    let mut all: Vec<Scheme> = thresholds.map(|&t| Scheme::ternary(t)).collect();
    for rounding in [Rounding::HalfAway, Rounding::HalfUp] {
        all.push(Scheme { rounding, ..all[0] });
    }
    all.push(Scheme::new(bitnet_core::scheme::Method::Ternary {
        threshold: Threshold::Absmean,
        scale: ScaleRule::LeastSquares,
        planes: 1,
    }));
    all.push(Scheme::planes(2));
    all.push(Scheme::int(2));
    all.push(Scheme::int(4));
    all
}

#[test]
fn quantize_and_pack_is_quantize_then_pack() {
    let mut random = Random::new(6);
    let shapes = [(1, 1), (3, 33), (4, 256), (3, 1291)];
    for (rows, cols) in shapes.into_iter().take(if emulated() { 2 } else { 4 }) {
        let w = floats(&mut random, rows * cols);
        let halves: Vec<f16> = w.iter().map(|&w| f16::from_f32(w)).collect();
        let brains: Vec<bf16> = w.iter().map(|&w| bf16::from_f32(w)).collect();
        let wide_halves: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
        let wide_brains: Vec<f32> = brains.iter().map(|h| h.to_f32()).collect();
        for scheme in schemes() {
            for granularity in [
                Granularity::Tensor,
                Granularity::Channel,
                Granularity::Group(64),
                Granularity::Group(30),
            ] {
                for dtype in [ScaleDtype::F32, ScaleDtype::F16] {
                    let scheme = scheme.with_granularity(granularity).with_scale_dtype(dtype);
                    everywhere(|kernels, pool| {
                        check_quantize(
                            FloatWeights::F32(&w),
                            &w,
                            (rows, cols),
                            &scheme,
                            kernels,
                            pool,
                        )?;
                        check_quantize(
                            FloatWeights::F16(&halves),
                            &wide_halves,
                            (rows, cols),
                            &scheme,
                            kernels,
                            pool,
                        )?;
                        check_quantize(
                            FloatWeights::Bf16(&brains),
                            &wide_brains,
                            (rows, cols),
                            &scheme,
                            kernels,
                            pool,
                        )
                    });
                }
            }
        }
    }
}

/// More than one strip of the tensor, and a sum whose last bits depend on the order.
#[test]
fn a_large_tensor_has_the_scale_of_core() {
    let mut random = Random::new(7);
    let (rows, cols) = (if emulated() { 129 } else { 300 }, 2049);
    let w: Vec<f32> = floats(&mut random, rows * cols)
        .into_iter()
        .map(|w| w * w * w * 1e5)
        .collect();
    for threshold in [Threshold::Absmean, Threshold::Median, Threshold::Optimal] {
        let scheme = Scheme::ternary(threshold);
        everywhere(|kernels, pool| {
            check_quantize(
                FloatWeights::F32(&w),
                &w,
                (rows, cols),
                &scheme,
                kernels,
                pool,
            )
        });
    }
}

#[test]
fn ternary_in_the_same_ternary_out() {
    let mut random = Random::new(8);
    let (rows, cols) = (5, 1283);
    let trits = trits(&mut random, rows * cols);
    for scheme in schemes().into_iter().take(9) {
        for granularity in [
            Granularity::Tensor,
            Granularity::Channel,
            Granularity::Group(64),
        ] {
            let scheme = scheme.with_granularity(granularity);
            let w: Vec<f32> = trits.iter().map(|&t| f32::from(t) * 0.037).collect();
            everywhere(|kernels, pool| {
                let layout = by_name("two-bit").expect("a layout");
                let packed = quantize_packed(
                    kernels,
                    pool,
                    FloatWeights::F32(&w),
                    rows,
                    cols,
                    &scheme,
                    layout,
                )
                .map_err(|e| e.to_string())?;
                let mut values = vec![9; w.len()];
                unpack(
                    kernels,
                    pool,
                    layout,
                    &packed.spec,
                    &packed.bytes,
                    &mut values,
                )
                .map_err(|e| e.to_string())?;
                let scales = packed.scales.iter().all(|&s| s == 0.037);
                if values == trits && scales {
                    Ok(())
                } else {
                    Err(format!("{scheme:?}: {:?}", packed.scales))
                }
            });
        }
    }
}

#[test]
fn a_weight_that_is_not_finite_is_an_error_wherever_it_is() {
    let (rows, cols) = (300, 1030);
    let mut w = vec![0.25f32; rows * cols];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 17, 1029, 1030, 150_000, rows * cols - 1] {
            w[at] = bad;
            for granularity in [
                Granularity::Tensor,
                Granularity::Channel,
                Granularity::Group(128),
            ] {
                for threshold in [Threshold::Absmean, Threshold::Optimal] {
                    let scheme = Scheme::ternary(threshold).with_granularity(granularity);
                    everywhere(|kernels, pool| {
                        let layout = by_name("base-3").expect("a layout");
                        match quantize_packed(
                            kernels,
                            pool,
                            FloatWeights::F32(&w),
                            rows,
                            cols,
                            &scheme,
                            layout,
                        ) {
                            Err(Error::NotFinite { index, .. }) if index == at => Ok(()),
                            other => Err(format!("{bad} at {at}: {other:?}")),
                        }
                    });
                }
            }
            w[at] = 0.25;
        }
    }
}

/// Every f16 and every bf16 becomes the f32 that it is.
#[test]
fn every_half_is_widened_exactly() {
    let halves: Vec<f16> = (0..=u16::MAX)
        .map(f16::from_bits)
        .filter(|h| h.is_finite())
        .collect();
    let brains: Vec<bf16> = (0..=u16::MAX)
        .map(bf16::from_bits)
        .filter(|h| h.is_finite())
        .collect();
    let scheme = Scheme::int(8).with_granularity(Granularity::Group(1));
    let layout = by_name("i8").expect("a layout");
    let expected_halves: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
    let expected_brains: Vec<f32> = brains.iter().map(|h| h.to_f32()).collect();
    everywhere(|kernels, pool| {
        for (w, expected) in [
            (FloatWeights::F16(&halves), &expected_halves),
            (FloatWeights::Bf16(&brains), &expected_brains),
        ] {
            let got = quantize_packed(kernels, pool, w, 1, w.len(), &scheme, layout)
                .map_err(|e| e.to_string())?;
            let expected = quantize::quantize(&Scalar, expected, 1, w.len(), &scheme, None)
                .map_err(|e| e.to_string())?;
            if got.scales != expected.scales
                || got
                    .bytes
                    .iter()
                    .zip(&expected.values)
                    .any(|(&b, &v)| b as i8 != v)
            {
                return Err("scales differ".into());
            }
        }
        for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
            let w = [f16::ONE, bad];
            if !matches!(
                quantize_packed(kernels, pool, FloatWeights::F16(&w), 1, 2, &scheme, layout),
                Err(Error::NotFinite { index: 1, .. })
            ) {
                return Err(format!("{bad} passes"));
            }
        }
        Ok(())
    });
}

fn check_token(x: &[f32], group: usize, stride: usize) {
    everywhere(|kernels, _| {
        let groups = x.len().div_ceil(group);
        let (mut out, mut sums) = (vec![99; groups * stride + 3], vec![i32::MIN; groups]);
        let scale = quantize_token(kernels, x, group, stride, &mut out, &mut sums)
            .map_err(|e| e.to_string())?;
        let expected = activation::quantize(
            x,
            x.len().max(1),
            ActivationMethod::Int8,
            ActivationGranularity::Token,
            Rounding::HalfEven,
        )
        .map_err(|e| e.to_string())?;
        let mut laid = vec![99; out.len()];
        for (g, values) in expected.values.chunks(group).enumerate() {
            laid[g * stride..][..values.len()].copy_from_slice(values);
            if sums[g] != values.iter().map(|&v| i32::from(v)).sum::<i32>() {
                return Err(format!(
                    "{} columns, sum of group {g}: {}",
                    x.len(),
                    sums[g]
                ));
            }
        }
        if laid != out
            || expected
                .scales
                .first()
                .is_some_and(|s| s.to_bits() != scale.to_bits())
        {
            return Err(format!("{} columns in groups of {group}: {scale}", x.len()));
        }
        Ok(())
    });
}

#[test]
fn tokens_of_every_length() {
    let mut random = Random::new(9);
    for cols in COLS {
        let x = floats(&mut random, cols);
        check_token(&x, cols, cols);
        check_token(&x, 48, 64);
        check_token(&x.iter().map(|x| x * 1e-6).collect::<Vec<_>>(), 7, 7);
        check_token(&x.iter().map(|x| x * 1e38).collect::<Vec<_>>(), 100, 130);
    }
    check_token(&vec![0.0; 300], 300, 300);
    // Every tie, and numbers that round up to the largest value.
    let ties: Vec<f32> = (-254..=254).map(|i| i as f32 / 2.0).collect();
    check_token(&ties, ties.len(), ties.len());
    check_token(
        &ties.iter().map(|x| x * 0.007_812_499).collect::<Vec<_>>(),
        128,
        128,
    );
}

#[test]
fn tokens_that_cannot_be() {
    everywhere(|kernels, _| {
        for at in [0, 63, 64, 129] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![1.0; 130];
                x[at] = bad;
                let mut out = [5; 130];
                let result = quantize_token(kernels, &x, 130, 130, &mut out, &mut [0]);
                if !matches!(result, Err(Error::NotFinite { index, .. }) if index == at)
                    || out != [5; 130]
                {
                    return Err(format!("{bad} at {at}: {result:?}"));
                }
            }
        }
        let x = [1.0; 10];
        for (group, stride, out, sums) in [
            (5, 4, 10, 2),
            (5, 5, 9, 2),
            (5, 5, 10, 1),
            (5, 5, 10, 3),
            (10, 10, 0, 1),
        ] {
            if !matches!(
                quantize_token(
                    kernels,
                    &x,
                    group,
                    stride,
                    &mut vec![0; out],
                    &mut vec![0; sums]
                ),
                Err(Error::Length { .. })
            ) {
                return Err(format!("{group} {stride} {out} {sums} passes"));
            }
        }
        Ok(())
    });
}

proptest! {
    #[test]
    fn any_floats(w in prop::collection::vec(-4.0f32..4.0, 1..700), cols in 1usize..90, g in 1usize..40) {
        let rows = w.len() / cols;
        let w = &w[..rows * cols];
        for threshold in [Threshold::Absmean, Threshold::Optimal] {
            for granularity in [Granularity::Tensor, Granularity::Group(g)] {
                let scheme = Scheme::ternary(threshold).with_granularity(granularity);
                everywhere(|kernels, pool| check_quantize(FloatWeights::F32(w), w, (rows, cols), &scheme, kernels, pool));
            }
        }
    }
}
