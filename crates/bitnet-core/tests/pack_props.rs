//! Properties of every layout in the list, for every precision that it holds.

use bitnet_core::pack::{
    Layout, LayoutOrigin, PackedLen, Unpacked, auto, bits_per_weight, by_name, layouts,
    of_ggml_type, of_origin, plain,
};
use bitnet_core::random::Random;
use bitnet_core::{Error, Granularity, MatrixSpec, Precision, ScaleDtype, ZeroPoints};
use proptest::prelude::*;

fn alphabet(precision: Precision) -> Vec<i8> {
    (i8::MIN..=i8::MAX)
        .filter(|&v| precision.contains(v))
        .collect()
}

/// Contents that are hard for one coding or another: uniform, mostly one value, constant at either
/// end, alternating, one exception.
fn values(spec: &MatrixSpec, style: u64, random: &mut Random) -> Vec<i8> {
    let alphabet = alphabet(spec.precision);
    let (first, last, middle) = (
        alphabet[0],
        alphabet[alphabet.len() - 1],
        alphabet[alphabet.len() / 2],
    );
    let n = spec.values_len();
    let mut any = |odds: usize| {
        if random.below(odds) == 0 {
            alphabet[random.below(alphabet.len())]
        } else {
            middle
        }
    };
    match style {
        0 => (0..n).map(|_| any(1)).collect(),
        1 => (0..n).map(|_| any(20)).collect(),
        2 => vec![first; n],
        3 => vec![last; n],
        4 => (0..n)
            .map(|i| if i % 2 == 0 { first } else { last })
            .collect(),
        5 => vec![middle; n],
        _ => {
            let mut values = vec![middle; n];
            if n > 0 {
                values[random.below(n)] = last;
            }
            values
        }
    }
}
const STYLES: u64 = 7;

/// Random distinct numbers that every scale type holds, of either sign.
fn scales(spec: &MatrixSpec, random: &mut Random) -> Vec<f32> {
    (0..spec.scales_len())
        .map(|_| (random.below(255) as f32 - 127.0) / 64.0)
        .collect()
}

/// A spec that the layout holds: rows and columns rounded up to multiples of its block.
fn fitted(
    layout: &dyn Layout,
    rows: usize,
    cols: usize,
    precision: Precision,
    granularity: Granularity,
) -> Option<MatrixSpec> {
    for (rows_by, cols_by) in [(1, 1), (4, 1), (1, 32), (1, 64), (1, 128), (1, 256)] {
        for granularity in [granularity, Granularity::Tensor] {
            for scale_dtype in [ScaleDtype::F32, ScaleDtype::F16] {
                let (rows, cols) = (
                    rows.next_multiple_of(rows_by),
                    cols.next_multiple_of(cols_by),
                );
                let spec = MatrixSpec {
                    scale_dtype,
                    ..MatrixSpec::new(rows, cols, precision, granularity)
                };
                if layout.check(&spec).is_ok() {
                    return Some(spec);
                }
            }
        }
    }
    None
}

fn packed(layout: &dyn Layout, spec: &MatrixSpec, values: &[i8], scales: &[f32]) -> Vec<u8> {
    let mut out = vec![0xaa];
    layout.pack_into(spec, values, scales, &mut out).unwrap();
    assert_eq!(out.remove(0), 0xaa);
    match layout.packed_len(spec) {
        PackedLen::Exact(n) => assert_eq!(out.len(), n, "{} {spec:?}", layout.name()),
        PackedLen::AtMost(n) => assert!(
            out.len() <= n,
            "{} {spec:?}: {} > {n}",
            layout.name(),
            out.len()
        ),
    }
    out
}

fn round_trip(layout: &dyn Layout, spec: &MatrixSpec, values: &[i8], scales: &[f32]) -> Vec<u8> {
    let bytes = packed(layout, spec, values, scales);
    let back = layout
        .unpack(spec, &bytes)
        .unwrap_or_else(|e| panic!("{spec:?}: {e}"));
    assert!(back.values == values, "{} {spec:?}", layout.name());
    assert_eq!(
        back.scales.as_deref(),
        layout.stores_scales().then_some(scales),
        "{} {spec:?}",
        layout.name()
    );
    bytes
}

/// Packs strips of `chunk_rows` (times `times`) stacked rows apart and compares.
fn strips(
    layout: &dyn Layout,
    spec: &MatrixSpec,
    values: &[i8],
    scales: &[f32],
    times: usize,
    whole: &[u8],
) {
    let Some(rows) = layout.chunk_rows(spec) else {
        return;
    };
    let rows = rows * times;
    let mut bytes = Vec::new();
    for start in (0..spec.stacked_rows()).step_by(rows) {
        let strip = MatrixSpec {
            planes: 1,
            ..spec.with_rows(rows.min(spec.stacked_rows() - start))
        };
        let values = &values[start * spec.cols..][..strip.values_len()];
        let scales = if !layout.stores_scales() {
            &[]
        } else if spec.granularity == Granularity::Tensor {
            scales
        } else {
            &scales[start * spec.granules_per_row()..][..strip.scales_len()]
        };
        layout
            .pack_into(&strip, values, scales, &mut bytes)
            .unwrap();
    }
    assert!(
        bytes == whole,
        "{} {spec:?} in strips of {rows}",
        layout.name()
    );
}

/// Accepted bytes are a matrix; if the length is fixed, packing that matrix gives the same bytes.
fn accepted(layout: &dyn Layout, spec: &MatrixSpec, bytes: &[u8], found: Unpacked) {
    assert_eq!(found.values.len(), spec.values_len());
    assert!(
        found.values.iter().all(|&v| spec.precision.contains(v)),
        "{} {spec:?}",
        layout.name()
    );
    let scales = found.scales.unwrap_or_default();
    if layout.stores_scales() {
        assert_eq!(scales.len(), spec.scales_len());
        assert!(scales.iter().all(|s| s.is_finite()));
    }
    let again = packed(layout, spec, &found.values, &scales);
    if let PackedLen::Exact(_) = layout.packed_len(spec) {
        // i2_s: 28 bytes of padding that are not read.
        let read = if layout.name().starts_with("i2_s") {
            bytes.len() - 28
        } else {
            bytes.len()
        };
        assert!(again[..read] == bytes[..read], "{} {spec:?}", layout.name());
    }
}

fn each(mut f: impl FnMut(&'static dyn Layout, Precision)) {
    for &layout in layouts() {
        for precision in Precision::ALL.iter().copied() {
            if fitted(layout, 4, 256, precision, Granularity::Tensor).is_some() {
                f(layout, precision);
            }
        }
    }
}

#[test]
fn a_layout_holds_what_it_says_of_itself() {
    for &layout in layouts() {
        let name = layout.name();
        assert!(
            layout.origin() != LayoutOrigin::Own || !layout.stores_scales(),
            "{name}: `auto` leaves scales to the container"
        );
        for &precision in layout.default_for() {
            let granularities = layout.default_granularities();
            let fits = |&granularity: &Granularity| {
                fitted(layout, 4, 256, precision, granularity)
                    .is_some_and(|spec| spec.granularity == granularity)
            };
            assert!(granularities.iter().any(fits), "{name} for {precision}");
        }
        if let Some(spec) = layout.foreign_spec(4, 256) {
            layout.check(&spec).unwrap();
        }
        if let LayoutOrigin::Ggml(id)
        | LayoutOrigin::GgmlOlder(id)
        | LayoutOrigin::GgmlVariant(id) = layout.origin()
        {
            let first = of_ggml_type(id).next().unwrap();
            assert_eq!(first.origin(), LayoutOrigin::Ggml(id), "{name}");
        }
    }
    for &precision in Precision::ALL {
        let plain = plain(precision);
        assert!(plain.origin() == LayoutOrigin::Own && plain.default_for().contains(&precision));
    }
}

#[test]
fn every_layout_takes_some_precision() {
    let mut pairs = Vec::new();
    each(|layout, precision| pairs.push((layout.name(), precision)));
    for &layout in layouts() {
        assert!(
            pairs.iter().any(|&(name, _)| name == layout.name()),
            "{}",
            layout.name()
        );
        assert!(!layout.summary().is_empty());
        assert_eq!(
            by_name(layout.name()).unwrap().name(),
            layout.name(),
            "names are unique"
        );
    }
    assert_eq!(pairs.len(), 39, "{pairs:?}");
    assert!(matches!(by_name("q9"), Err(Error::UnknownName { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn packed_and_unpacked_is_the_same(seed: u64, rows in 0usize..40, cells in 0usize..1000, planes in 1usize..4, style in 0..STYLES, coarse in 0usize..5) {
        let granularity = [Granularity::Tensor, Granularity::Channel, Granularity::Group(32), Granularity::Group(256), Granularity::Group(7)][coarse];
        let mut random = Random::new(seed);
        each(|layout, precision| {
            let Some(mut spec) = fitted(layout, rows, cells / rows.max(1), precision, granularity) else { return };
            if layout.check(&MatrixSpec { planes, ..spec.clone() }).is_ok() {
                spec.planes = planes;
            }
            let (values, scales) = (values(&spec, style, &mut random), scales(&spec, &mut random));
            let bytes = round_trip(layout, &spec, &values, &scales);
            strips(layout, &spec, &values, &scales, 1 + random.below(3), &bytes);
        });
    }

    #[test]
    fn damage_is_an_error_or_another_matrix(seed: u64, rows in 1usize..5, cols in 1usize..80, style in 0..STYLES) {
        let mut random = Random::new(seed);
        each(|layout, precision| {
            let Some(spec) = fitted(layout, rows, cols, precision, Granularity::Channel) else { return };
            let (values, scales) = (values(&spec, style, &mut random), scales(&spec, &mut random));
            let bytes = packed(layout, &spec, &values, &scales);
            for cut in 0..bytes.len() {
                assert!(layout.unpack(&spec, &bytes[..cut]).is_err(), "{} {spec:?} cut at {cut}", layout.name());
            }
            let longer = [&bytes[..], &[0]].concat();
            assert!(matches!(layout.unpack(&spec, &longer), Err(Error::Length { .. })), "{}", layout.name());
            for _ in 0..40 {
                let mut damaged = bytes.clone();
                for _ in 0..=random.below(3) {
                    let at = random.below(damaged.len());
                    damaged[at] = random.bits() as u8;
                }
                if let Ok(found) = layout.unpack(&spec, &damaged) {
                    accepted(layout, &spec, &damaged, found);
                }
            }
        });
    }

    #[test]
    fn garbage_is_an_error_or_a_matrix(seed: u64, rows in 0usize..5, cols in 0usize..80) {
        let mut random = Random::new(seed);
        each(|layout, precision| {
            let Some(spec) = fitted(layout, rows, cols, precision, Granularity::Tensor) else { return };
            let bound = layout.packed_len(&spec).bound();
            for _ in 0..20 {
                let variable = matches!(layout.packed_len(&spec), PackedLen::AtMost(_));
                let len = if variable { random.below(bound + 3) } else { bound };
                let few = random.below(2) == 0;
                let mut bytes: Vec<u8> = (0..len).map(|_| if few { random.below(4) as u8 } else { random.bits() as u8 }).collect();
                if variable && bytes.len() > 4 {
                    // The header and the tag right, so that the body is looked at.
                    let body = (bytes.len() - 4) as u32;
                    bytes[..4].copy_from_slice(&body.to_le_bytes());
                    bytes[4] %= 3;
                }
                if let Ok(found) = layout.unpack(&spec, &bytes) {
                    accepted(layout, &spec, &bytes, found);
                }
            }
        });
    }

    #[test]
    fn auto_is_the_shortest_of_our_own(seed: u64, rows in 0usize..20, cols in 0usize..200, style in 0..STYLES) {
        let mut random = Random::new(seed);
        for precision in Precision::ALL.iter().copied() {
            let spec = MatrixSpec::new(rows, cols, precision, Granularity::Tensor);
            let (values, scales) = (values(&spec, style, &mut random), scales(&spec, &mut random));
            let (chosen, bytes) = auto(&spec, &values, &scales).unwrap();
            assert!(chosen.unpack(&spec, &bytes).unwrap().values == values);
            let own = of_origin(LayoutOrigin::Own).filter(|l| l.check(&spec).is_ok());
            let shortest = own.map(|l| (packed(l, &spec, &values, &scales).len(), l.name())).reduce(|a, b| if b.0 < a.0 { b } else { a });
            assert_eq!(Some((bytes.len(), chosen.name())), shortest);
        }
    }
}

/// Blocks of 16 rows, of one row, and of one row that is longer than a block would be.
#[test]
fn long_blocks() {
    let mut random = Random::new(1);
    for (rows, cols) in [
        (37, 4096),
        (3, 40_000),
        (2, 70_000),
        (70_000, 1),
        (1, 65_536),
        (4097, 16),
    ] {
        for style in 0..STYLES {
            each(|layout, precision| {
                let spec = MatrixSpec::new(rows, cols, precision, Granularity::Tensor);
                if layout.stores_scales() || layout.check(&spec).is_err() {
                    return;
                }
                let values = values(&spec, style, &mut random);
                let bytes = round_trip(layout, &spec, &values, &[]);
                strips(layout, &spec, &values, &[], 1, &bytes);
            });
        }
    }
    assert_eq!(
        by_name("entropy").unwrap().chunk_rows(&MatrixSpec::new(
            37,
            4096,
            Precision::Ternary,
            Granularity::Tensor
        )),
        Some(16)
    );
}

fn entropy_bits(values: &[i8]) -> f64 {
    let mut counts = [0u64; 256];
    values.iter().for_each(|&v| counts[v as u8 as usize] += 1);
    let n = values.len() as f64;
    counts
        .iter()
        .filter(|&&c| c > 0)
        .map(|&c| -(c as f64) * (c as f64 / n).log2())
        .sum::<f64>()
        / n
}

/// Ternary with the optimal threshold of normal weights, ±0.612: within 0.3 % of the entropy and
/// 1.55 bits, headers and all.
#[test]
fn entropy_comes_close_to_the_entropy() {
    let mut random = Random::new(2);
    let layout = by_name("entropy").unwrap();
    let spec = MatrixSpec::new(64, 4096, Precision::Ternary, Granularity::Tensor);
    let ternary: Vec<i8> = (0..spec.values_len())
        .map(|_| random.normal())
        .map(|w| i8::from(w > 0.612) - i8::from(w < -0.612))
        .collect();
    let bits = bits_per_weight(round_trip(layout, &spec, &ternary, &[]).len(), 0, &spec);
    println!(
        "entropy, ternary: {bits:.5} bits per weight, of {:.5}",
        entropy_bits(&ternary)
    );
    assert!(
        bits <= 1.55 && bits <= 1.003 * entropy_bits(&ternary),
        "{bits}"
    );
    for (precision, sigma, slack) in [
        (Precision::Int4, 2.0, 1.003),
        (Precision::Int8, 29.0, 1.007),
        (Precision::Int8, 3.0, 1.003),
    ] {
        let spec = MatrixSpec {
            precision,
            ..spec.clone()
        };
        let (low, high) = precision.range();
        let values: Vec<i8> = (0..spec.values_len())
            .map(|_| {
                (random.normal() * sigma)
                    .round()
                    .clamp(low.into(), high.into()) as i8
            })
            .collect();
        let bits = bits_per_weight(round_trip(layout, &spec, &values, &[]).len(), 0, &spec);
        println!(
            "entropy, {precision} of sigma {sigma}: {bits:.5} bits per weight, of {:.5}",
            entropy_bits(&values)
        );
        assert!(bits <= slack * entropy_bits(&values), "{bits}");
    }
}

#[test]
fn refusals_leave_the_output_alone() {
    let f16 = |spec: MatrixSpec| MatrixSpec {
        scale_dtype: ScaleDtype::F16,
        ..spec
    };
    let spec =
        |rows, cols, precision, granularity| MatrixSpec::new(rows, cols, precision, granularity);
    let unsupported = [
        (
            "one-bit",
            spec(1, 1, Precision::Ternary, Granularity::Tensor),
        ),
        (
            "hf-bitnet",
            spec(1, 1, Precision::Ternary, Granularity::Channel),
        ),
        (
            "hf-bitnet",
            MatrixSpec {
                planes: 2,
                ..spec(4, 1, Precision::Ternary, Granularity::Tensor)
            },
        ),
        ("i2_s", spec(1, 64, Precision::Ternary, Granularity::Tensor)),
        (
            "i2_s-g64",
            spec(1, 32, Precision::Ternary, Granularity::Tensor),
        ),
        (
            "i2_s-x4",
            spec(3, 64, Precision::Ternary, Granularity::Tensor),
        ),
        (
            "i2_s",
            spec(1, 128, Precision::Ternary, Granularity::Group(128)),
        ),
        (
            "tq2_0",
            f16(spec(1, 128, Precision::Ternary, Granularity::Tensor)),
        ),
        (
            "tq2_0",
            spec(1, 256, Precision::Ternary, Granularity::Tensor),
        ),
        (
            "tq2_0",
            f16(spec(1, 256, Precision::Ternary, Granularity::Group(128))),
        ),
        (
            "q2_0",
            f16(spec(1, 64, Precision::Int3, Granularity::Tensor)),
        ),
        (
            "q4_0",
            MatrixSpec {
                zero_points: ZeroPoints::I8,
                ..f16(spec(1, 32, Precision::Int4, Granularity::Tensor))
            },
        ),
        (
            "q8_0",
            f16(spec(0, 32, Precision::Int8, Granularity::Tensor)),
        ),
    ];
    for (name, spec) in unsupported {
        let layout = by_name(name).unwrap();
        let mut out = vec![1];
        assert!(
            matches!(layout.check(&spec), Err(Error::Unsupported { .. })),
            "{name} {spec:?}"
        );
        assert!(
            layout
                .pack_into(
                    &spec,
                    &vec![0; spec.values_len()],
                    &vec![1.0; spec.scales_len()],
                    &mut out
                )
                .is_err()
        );
        assert!(layout.unpack(&spec, &[]).is_err());
        assert_eq!(out, [1]);
    }
    each(|layout, precision| {
        let spec = fitted(layout, 4, 256, precision, Granularity::Channel).unwrap();
        let good = values(&spec, 0, &mut Random::new(3));
        let scales = vec![0.5; spec.scales_len()];
        let mut out = vec![1];
        let mut refuse = |values: &[i8], scales: &[f32]| {
            let error = layout
                .pack_into(&spec, values, scales, &mut out)
                .unwrap_err();
            assert_eq!(out, [1], "{}", layout.name());
            error
        };
        assert!(matches!(
            refuse(&good[1..], &scales),
            Error::Length { what: "values", .. }
        ));
        if let Some(outside) = (i8::MIN..=i8::MAX).rev().find(|&v| !precision.contains(v)) {
            let mut bad = good.clone();
            bad[300] = outside;
            assert!(
                matches!(refuse(&bad, &scales), Error::Value { index: 300, got, .. } if got == i32::from(outside))
            );
        }
        if layout.stores_scales() {
            assert!(matches!(
                refuse(&good, &[]),
                Error::Length { what: "scales", .. }
            ));
            for bad in [
                f32::NAN,
                f32::INFINITY,
                if spec.scale_dtype == ScaleDtype::F16 {
                    0.1
                } else {
                    f32::NEG_INFINITY
                },
            ] {
                assert!(
                    matches!(
                        refuse(&good, &vec![bad; spec.scales_len()]),
                        Error::Unsupported { .. }
                    ),
                    "{} {bad}",
                    layout.name()
                );
            }
        }
    });
}

/// Sizes beyond any memory are rejected by arithmetic, and large ones with too few bytes before
/// anything is allocated.
#[test]
fn absurd_sizes() {
    let huge = isize::MAX as usize / 16;
    each(|layout, precision| {
        for (rows, cols) in [
            (usize::MAX, 2),
            (huge, 1),
            (1, huge),
            (usize::MAX, 0),
            (0, usize::MAX),
            (1 << 29, 1 << 29),
            (256, huge / 256),
        ] {
            for planes in [1, 3] {
                for scale_dtype in [ScaleDtype::F32, ScaleDtype::F16] {
                    let empty = rows == 0 || cols == 0;
                    let spec = MatrixSpec {
                        planes,
                        scale_dtype,
                        ..MatrixSpec::new(rows, cols, precision, Granularity::Tensor)
                    };
                    if empty {
                        let _ = (layout.unpack(&spec, &[]), layout.unpack(&spec, &[0; 40]));
                    } else {
                        assert!(
                            layout.unpack(&spec, &[0; 40]).is_err(),
                            "{} {spec:?}",
                            layout.name()
                        );
                    }
                    assert!(layout.pack_into(&spec, &[], &[], &mut Vec::new()).is_err() || empty);
                }
            }
        }
    });
}
