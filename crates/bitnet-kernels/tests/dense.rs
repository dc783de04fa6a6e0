//! Float products, attention and elementwise steps against f64, and every instruction set and
//! thread count against one another.

use bitnet_core::random::Random;
use bitnet_kernels::dense::{
    Attention, BLOCK, BlockCodes, BlockRow, BlockStrip, BlockType, Blocks, Cached, DenseData,
    DenseMatrix, RotaryPairing, SUPER, ScaleType, TokenHeads, f16_to_f32, quantize_int4,
    quantize_int8,
};
use bitnet_kernels::{Error, Kernels, Pool};
use std::sync::Mutex;

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut next = || random.uniform() as f32 - 0.5;
    (0..n).map(|_| next() + next() + next()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The same weights in every format, and what each holds.
fn formats(rows: usize, cols: usize) -> Vec<(&'static str, DenseMatrix)> {
    let w = random(rows as u64 * 1000 + cols as u64, rows * cols);
    let halves: Vec<u16> = w
        .iter()
        .map(|&w| half::f16::from_f32(w).to_bits())
        .collect();
    let brains: Vec<u16> = w
        .iter()
        .map(|&w| half::bf16::from_f32(w).to_bits())
        .collect();
    let rounded = |kind, quantize: fn(&[f32], &mut BlockRow<'_>)| {
        let fill = |first: usize, strip: &mut BlockStrip| -> Result<(), Error> {
            (0..strip.rows())
                .for_each(|i| quantize(&w[(first + i) * cols..][..cols], &mut strip.row(i)));
            Ok(())
        };
        DenseMatrix::from(Blocks::new(&Pool::single(), rows, cols, kind, fill).unwrap())
    };
    let (int8, int4) = (
        rounded(BlockType::INT8, quantize_int8),
        rounded(BlockType::INT4, quantize_int4),
    );
    let matrix = |data| DenseMatrix::new(rows, cols, data).unwrap();
    let mut all = vec![
        ("f32", matrix(DenseData::F32(w))),
        ("f16", matrix(DenseData::F16(halves))),
        ("bf16", matrix(DenseData::Bf16(brains))),
        ("int8", int8),
        ("int4", int4),
    ];
    all.extend(
        types(cols)
            .into_iter()
            .map(|(name, kind)| (name, filled(rows, cols, kind).0)),
    );
    all
}

/// Block types that rows of `cols` columns can have.
fn types(cols: usize) -> Vec<(&'static str, BlockType)> {
    use BlockCodes::{Int4, Int8, Trits};
    use ScaleType::{F16, F32, Nested};
    [
        ("q4_1", Int4, F16, true),
        ("q5_1", Int8, F16, true),
        ("q2_k", Int8, Nested { group: 16 }, true),
        ("q4_k", Int4, Nested { group: 32 }, true),
        ("q5_k", Int8, Nested { group: 32 }, true),
        ("q6_k", Int8, Nested { group: 16 }, false),
        ("trits", Trits, F32 { group: cols }, false),
        ("trits of 64", Trits, F32 { group: 64 }, false),
        ("int4 of 96", Int4, F32 { group: 96 }, false),
        ("int8 of 48", Int8, F32 { group: 48 }, false),
    ]
    .map(|(name, codes, scales, minimum)| {
        (
            name,
            BlockType {
                codes,
                scales,
                minimum,
            },
        )
    })
    .into()
}

/// A matrix of random codes, scales and minima, and the weights that they are by definition,
/// computed in f64, which holds all of them exactly.
fn filled(rows: usize, cols: usize, kind: BlockType) -> (DenseMatrix, Vec<f32>) {
    let truth = Mutex::new(vec![f32::NAN; rows * cols]);
    let fill = |first: usize, strip: &mut BlockStrip| -> Result<(), Error> {
        for i in 0..strip.rows() {
            let mut noise = random((first + i) as u64 + 99, 9 * cols + 64)
                .into_iter()
                .map(f32::to_bits);
            let mut row = strip.row(i);
            let (low, high) = match kind.codes {
                BlockCodes::Trits => (0, 2),
                BlockCodes::Int4 => (0, 15),
                BlockCodes::Int8 => (-128, 127),
            };
            let mut bits = || noise.next().unwrap() >> 3;
            row.codes
                .iter_mut()
                .for_each(|code| *code = (low + (bits() % (high - low + 1) as u32) as i32) as u8);
            row.floats
                .iter_mut()
                .for_each(|s| *s = f32::from_bits(0x3f80_0000 | bits() << 3 & 0x807f_fff8));
            // Every finite binary16, subnormals and zeros among them.
            row.halves
                .iter_mut()
                .flat_map(|all| all.iter_mut())
                .for_each(|h| *h = (bits() & 0xffff) as u16 & 0xfbff);
            row.factors
                .iter_mut()
                .flat_map(|all| all.iter_mut())
                .for_each(|f| *f = bits() as i8);
            let offset = match (kind.codes, kind.minimum) {
                (BlockCodes::Trits, _) => 1,
                (BlockCodes::Int4, false) => 8,
                _ => 0,
            };
            let part = |which: usize, column: usize| -> f64 {
                let half = |i: usize| f64::from(f16_to_f32(row.halves[which][i]));
                match kind.scales {
                    ScaleType::F32 { group } => f64::from(row.floats[column / group]),
                    ScaleType::F16 => half(column / BLOCK),
                    ScaleType::Nested { group } => {
                        half(column / SUPER) * f64::from(row.factors[which][column / group])
                    }
                }
            };
            for (c, &code) in row.codes.iter().enumerate() {
                let code = if kind.codes == BlockCodes::Int8 {
                    i32::from(code as i8)
                } else {
                    i32::from(code) - offset
                };
                let minimum = if kind.minimum { part(1, c) } else { -0.0 };
                truth.lock().unwrap()[(first + i) * cols + c] =
                    (f64::from(code) * part(0, c) + minimum) as f32;
            }
        }
        Ok(())
    };
    let blocks = Blocks::new(&Pool::single(), rows, cols, kind, fill).unwrap();
    (blocks.into(), truth.into_inner().unwrap())
}

#[test]
fn blocks_are_their_weights_and_multiply_as_floats_do() {
    for (rows, cols) in [(1, 1), (5, 64), (7, 256), (6, 341), (9, 576), (66, 1056)] {
        for (name, kind) in types(cols)
            .into_iter()
            .chain([("int4", BlockType::INT4), ("int8", BlockType::INT8)])
        {
            let (matrix, truth) = filled(rows, cols, kind);
            let mut row = vec![f32::NAN; cols];
            for (n, truth) in truth.chunks(cols).enumerate() {
                matrix.row_into(n, &mut row);
                assert_eq!(bits(&row), bits(truth), "{name} {rows}×{cols}, row {n}");
            }
            let floats = DenseMatrix::new(rows, cols, DenseData::F32(truth)).unwrap();
            for tokens in [1, 6] {
                let (x, mut out, mut expected) = (
                    random(3, tokens * cols),
                    vec![f32::NAN; tokens * rows],
                    vec![f32::NAN; tokens * rows],
                );
                for kernels in Kernels::all() {
                    kernels.dense_matmul(&Pool::single(), &matrix, &x, None, &mut out);
                    kernels.dense_matmul(&Pool::single(), &floats, &x, None, &mut expected);
                    assert_eq!(
                        bits(&out),
                        bits(&expected),
                        "{name} {rows}×{cols}, {tokens} tokens, {}",
                        kernels.isa()
                    );
                }
            }
        }
    }
}

#[test]
fn strips_are_filled_once_and_errors_come_back() {
    // Several strips, the last one short.
    let (rows, cols) = (1030, 256);
    for pool in (1..=if cfg!(target_family = "wasm") { 1 } else { 2 })
        .map(|threads| Pool::new(threads).unwrap())
    {
        let seen = Mutex::new(vec![0; rows]);
        let blocks = Blocks::new(&pool, rows, cols, BlockType::INT8, |first, strip| {
            for i in 0..strip.rows() {
                seen.lock().unwrap()[first + i] += 1;
                let row = strip.row(i);
                row.codes.fill(((first + i) % 100) as u8);
                row.halves[0].fill(0x3c00);
            }
            Ok::<(), Error>(())
        })
        .unwrap();
        assert!(seen.into_inner().unwrap().iter().all(|n| *n == 1));
        let mut row = vec![0.0; cols];
        for n in 0..rows {
            blocks.row_into(n, &mut row);
            assert!(row.iter().all(|w| *w == (n % 100) as f32), "row {n}");
        }
        let failed = Blocks::new(&pool, rows, cols, BlockType::INT8, |first, _| {
            if first > 300 { Err(at(first)) } else { Ok(()) }
        });
        assert_eq!(failed.unwrap_err().to_string(), at(512).to_string());
    }
    let wrong = |codes, scales, minimum| {
        Blocks::new(
            &Pool::single(),
            4,
            256,
            BlockType {
                codes,
                scales,
                minimum,
            },
            |_, _| Ok::<(), Error>(()),
        )
    };
    assert!(
        wrong(BlockCodes::Trits, ScaleType::F16, false)
            .unwrap_err()
            .to_string()
            .contains("whole 64 columns")
    );
    assert!(wrong(BlockCodes::Int4, ScaleType::Nested { group: 16 }, true).is_err());
    assert!(wrong(BlockCodes::Int8, ScaleType::Nested { group: 64 }, true).is_err());
    assert!(wrong(BlockCodes::Int8, ScaleType::F32 { group: 32 }, true).is_err());
    assert!(wrong(BlockCodes::Int8, ScaleType::F32 { group: 0 }, false).is_err());
}

/// Some error with a number in it.
fn at(row: usize) -> Error {
    bitnet_core::Error::Length {
        what: "rows",
        expected: 0,
        got: row,
    }
    .into()
}

#[test]
fn products_are_near_f64_and_the_same_everywhere() {
    // WebAssembly has one thread.
    let pools: Vec<Pool> = (1..=if cfg!(target_family = "wasm") { 1 } else { 3 })
        .map(|threads| Pool::new(threads).unwrap())
        .collect();
    let shapes = [
        (1, 1, 1),
        (3, 15, 2),
        (9, 16, 5),
        (17, 33, 4),
        (5, 64, 0),
        (70, 341, 7),
        (300, 576, 9),
    ];
    // Those that an emulated machine, as in `scripts/cross-test`, can take.
    for (rows, cols, tokens) in
        shapes
            .into_iter()
            .take(if std::env::var_os("BITNET_EMULATED").is_some() {
                5
            } else {
                7
            })
    {
        for (name, w) in formats(rows, cols) {
            let (x, bias) = (random(7, tokens * cols), random(8, rows));
            let mut first: Option<Vec<u32>> = None;
            for kernels in Kernels::all() {
                for pool in &pools {
                    let mut out = vec![f32::NAN; tokens * rows];
                    kernels.dense_matmul(pool, &w, &x, Some(&bias), &mut out);
                    // One token alone gives the same bits as among others.
                    for token in 0..tokens {
                        let mut alone = vec![f32::NAN; rows];
                        kernels.dense_matmul(
                            pool,
                            &w,
                            &x[token * cols..][..cols],
                            Some(&bias),
                            &mut alone,
                        );
                        assert_eq!(
                            bits(&alone),
                            bits(&out[token * rows..][..rows]),
                            "{name} {rows}×{cols}, token {token}"
                        );
                    }
                    let expected = first.get_or_insert_with(|| bits(&out));
                    assert_eq!(
                        *expected,
                        bits(&out),
                        "{name} {rows}×{cols}, {} on {} threads",
                        kernels.isa(),
                        pool.threads()
                    );
                }
            }
            let out = first.unwrap();
            let mut row = vec![0.0; cols];
            for n in 0..rows {
                w.row_into(n, &mut row);
                for token in 0..tokens {
                    let terms = row
                        .iter()
                        .zip(&x[token * cols..])
                        .map(|(&w, &x)| f64::from(w) * f64::from(x));
                    let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                    let got = f64::from(f32::from_bits(out[token * rows + n]));
                    // K / 16 + 4 additions and one for the bias, each half an ulp of at most the
                    // sum of magnitudes.
                    let bound =
                        (cols as f64 / 16.0 + 6.0) * f64::from(f32::EPSILON) * (magnitude + 1.0);
                    assert!(
                        (got - sum - f64::from(bias[n])).abs() <= bound,
                        "{name} {rows}×{cols}: {got} and {sum}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_are_what_the_formats_hold() {
    let formats = formats(4, 70);
    let mut exact = vec![0.0; 70];
    let mut rounded = vec![0.0; 70];
    for row in 0..4 {
        formats[0].1.row_into(row, &mut exact);
        for (name, w) in &formats[1..5] {
            w.row_into(row, &mut rounded);
            let step = match *name {
                "f16" => |w: f32, _: f32| w.abs() * 2f32.powi(-11) + 2f32.powi(-25),
                "bf16" => |w: f32, _: f32| w.abs() * 2f32.powi(-8),
                "int8" => |_: f32, top: f32| top / 127.0 * 0.51,
                // The end of the scale that has no value of its own is a whole step away.
                _ => |_: f32, top: f32| top / 8.0 * 1.01,
            };
            let worst = exact
                .chunks(BLOCK)
                .zip(rounded.chunks(BLOCK))
                .all(|(e, r)| {
                    let top = e.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                    e.iter().zip(r).all(|(e, r)| (e - r).abs() <= step(*e, top))
                });
            assert!(worst, "{name}, row {row}");
        }
    }
    assert!((0..=u16::MAX).all(|b| {
        let (ours, theirs) = (f16_to_f32(b), half::f16::from_bits(b).to_f32());
        ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan())
    }));
}

#[test]
fn lengths_that_do_not_fit_are_errors() {
    assert!(
        DenseMatrix::new(2, 3, DenseData::F32(vec![0.0; 5]))
            .unwrap_err()
            .to_string()
            .contains('6')
    );
    let (blocks, _) = filled(2, 33, BlockType::INT8);
    let DenseData::Blocks(blocks) = blocks.data() else {
        panic!("blocks")
    };
    assert!(
        DenseMatrix::new(2, 34, DenseData::Blocks(blocks.clone())).is_err()
            && DenseMatrix::new(2, 33, DenseData::Blocks(blocks.clone())).is_ok()
    );
    assert!(DenseMatrix::new(usize::MAX, 3, DenseData::F16(vec![])).is_err());
}

/// Softmax attention in f64, straight from its definition.
fn attention_truth(q: &[f32], k: &[f32], v: &[f32], len: usize, d: usize) -> Vec<f64> {
    let scores: Vec<f64> = (0..len)
        .map(|j| {
            (0..d)
                .map(|i| f64::from(q[i]) * f64::from(k[j * d + i]))
                .sum::<f64>()
                / (d as f64).sqrt()
        })
        .collect();
    let top = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..d)
        .map(|i| {
            (0..len)
                .map(|j| weights[j] / sum * f64::from(v[j * d + i]))
                .sum()
        })
        .collect()
}

#[test]
fn attention_is_that_of_the_definition() {
    for (d, len, group) in [
        (8, 1, 3),
        (32, 63, 1),
        (64, 64, 2),
        (64, 65, 3),
        (128, 200, 4),
        (20, 7, 5),
        (80, 130, 9),
    ] {
        // Scores far apart, so that the running maximum moves.
        let q: Vec<f32> = random(1, group * d).iter().map(|x| x * 6.0).collect();
        let (k, v) = (random(2, len * d), random(3, len * d));
        let half = |x: &[f32]| {
            x.iter()
                .map(|&x| half::f16::from_f32(x).to_bits())
                .collect::<Vec<_>>()
        };
        let widened = |x: &[u16]| x.iter().map(|&b| f16_to_f32(b)).collect::<Vec<_>>();
        let int8 = |x: &[f32]| -> (Vec<i8>, Vec<f32>) {
            let scales: Vec<f32> = x
                .chunks(d)
                .map(|r| r.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0)
                .collect();
            (
                x.chunks(d)
                    .zip(&scales)
                    .flat_map(|(r, s)| r.iter().map(move |x| (x / s).round() as i8))
                    .collect(),
                scales,
            )
        };
        let restored = |(q, s): &(Vec<i8>, Vec<f32>)| {
            q.iter()
                .enumerate()
                .map(|(i, &q)| f32::from(q) * s[i / d])
                .collect::<Vec<_>>()
        };
        let (kh, vh, ki, vi) = (half(&k), half(&v), int8(&k), int8(&v));
        let caches = [
            (Cached::F32(&k), Cached::F32(&v), k.clone(), v.clone()),
            (
                Cached::F16(&kh),
                Cached::F16(&vh),
                widened(&kh),
                widened(&vh),
            ),
            (
                Cached::Int8(&ki.0, &ki.1),
                Cached::Int8(&vi.0, &vi.1),
                restored(&ki),
                restored(&vi),
            ),
        ];
        let windows = [None, Some(1), Some(5), Some(64), Some(1000)];
        let cases = caches.iter().flat_map(|c| windows.map(|w| (c, w)));
        for ((keys, values, k, v), window) in cases {
            let (keys, values, mut first) = (*keys, *values, None);
            let hidden = len - window.unwrap_or(len).min(len);
            let (k, v, seen) = (&k[hidden * d..], &v[hidden * d..], len - hidden);
            for kernels in Kernels::all() {
                let mut out = vec![f32::NAN; group * d];
                kernels.attend(
                    &Attention {
                        keys,
                        values,
                        len,
                        window,
                        head_dim: d,
                        scale: 1.0 / (d as f32).sqrt(),
                    },
                    &q,
                    &mut out,
                );
                for (q, out) in q.chunks(d).zip(out.chunks(d)) {
                    for (truth, &got) in attention_truth(q, k, v, seen, d).iter().zip(out) {
                        assert!(
                            (truth - f64::from(got)).abs() < 1e-5,
                            "{d} × {len}: {truth} and {got}"
                        );
                    }
                }
                assert_eq!(
                    *first.get_or_insert_with(|| bits(&out)),
                    bits(&out),
                    "{}",
                    kernels.isa()
                );
                // A head alone gives the same bits as among others.
                let mut alone = vec![f32::NAN; d];
                let a = Attention {
                    keys,
                    values,
                    len,
                    window,
                    head_dim: d,
                    scale: 1.0 / (d as f32).sqrt(),
                };
                kernels.attend(&a, &q[(group - 1) * d..], &mut alone);
                assert_eq!(bits(&alone), bits(&out[(group - 1) * d..]));
            }
        }
    }
}

#[test]
fn attention_of_a_run_is_that_of_its_tokens() {
    for (d, len, tokens, group) in [
        (8, 1, 1, 3),
        (16, 1, 70, 4),
        (64, 60, 9, 2),
        (128, 130, 8, 4),
        (20, 63, 3, 5),
        (80, 64, 66, 9),
        (128, 1, 20, 8),
    ] {
        let (positions, width) = (len + tokens - 1, group * d);
        let stride = width + 24;
        let q: Vec<f32> = random(1, tokens * stride).iter().map(|x| x * 6.0).collect();
        let (k, v) = (random(2, positions * d), random(3, positions * d));
        let half = |x: &[f32]| {
            x.iter()
                .map(|&x| half::f16::from_f32(x).to_bits())
                .collect::<Vec<_>>()
        };
        let bytes = |x: &[f32]| x.iter().map(|x| (x * 40.0) as i8).collect::<Vec<_>>();
        let (kh, vh, ki, vi, scales) = (
            half(&k),
            half(&v),
            bytes(&k),
            bytes(&v),
            random(4, positions),
        );
        let caches = [
            [Cached::F32(&k), Cached::F32(&v)],
            [Cached::F16(&kh), Cached::F16(&vh)],
            [Cached::Int8(&ki, &scales), Cached::Int8(&vi, &scales)],
        ];
        let cases = [None, Some(1), Some(7), Some(64), Some(100)]
            .into_iter()
            .flat_map(|w| Kernels::all().map(move |k| (w, k)))
            .flat_map(|(w, k)| caches.map(|c| (w, k, c)));
        for (window, kernels, [keys, values]) in cases {
            let attention = |len| Attention {
                keys,
                values,
                len,
                window,
                head_dim: d,
                scale: 0.3,
            };
            let mut out = vec![f32::NAN; tokens * stride];
            kernels.attend_run(
                &attention(len),
                TokenHeads {
                    tokens,
                    width,
                    stride,
                },
                &q,
                &mut out,
            );
            for token in 0..tokens {
                let mut alone = vec![f32::NAN; width];
                kernels.attend(
                    &attention(len + token),
                    &q[token * stride..][..width],
                    &mut alone,
                );
                let here = &out[token * stride..][..stride];
                assert_eq!(
                    bits(&alone),
                    bits(&here[..width]),
                    "{}, token {token} of {tokens} after {len} × {d}",
                    kernels.isa()
                );
                assert!(
                    here[width..].iter().all(|x| x.is_nan()),
                    "nothing beside the heads is written"
                );
            }
        }
    }
}

#[test]
fn elementwise_steps() {
    for n in [1, 15, 16, 341] {
        let (x, w) = (random(4, n), random(5, n));
        let mut all: [Option<Vec<u32>>; 5] = Default::default();
        for kernels in Kernels::all() {
            let mut norm = vec![f32::NAN; n];
            kernels.rms_norm(&x, &w, 1e-5, &mut norm);
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
            let (mut in_place, mut sum) = (x.clone(), x.clone());
            kernels.rms_norm_in_place(&mut in_place, &w, 1e-5);
            assert_eq!(bits(&in_place), bits(&norm));
            let [mut silu, mut relu2, mut gelu] = [0; 3].map(|_| vec![f32::NAN; n]);
            kernels.silu_mul(&x, &w, &mut silu);
            kernels.relu2_mul(&x, &w, &mut relu2);
            kernels.gelu_tanh_mul(&x, &w, &mut gelu);
            kernels.add(&mut sum, &w);
            for i in 0..n {
                let (x, w) = (f64::from(x[i]), f64::from(w[i]));
                let near = |got: f32, truth: f64| {
                    (f64::from(got) - truth).abs() <= 2e-6 * truth.abs() + 1e-9
                };
                assert!(near(norm[i], w * x / (mean + 1e-5).sqrt()));
                assert!(near(silu[i], x / (1.0 + (-x).exp()) * w));
                assert!(near(relu2[i], x.max(0.0).powi(2) * w));
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                assert!(near(gelu[i], 0.5 * x * (1.0 + u.tanh()) * w));
                assert!(near(sum[i], x + w));
            }
            for (first, got) in all.iter_mut().zip([norm, silu, relu2, gelu, sum]) {
                assert_eq!(
                    *first.get_or_insert_with(|| bits(&got)),
                    bits(&got),
                    "{}",
                    kernels.isa()
                );
            }
        }
    }
}

#[test]
fn layer_norms_take_the_mean_away() {
    for n in [1, 15, 16, 341] {
        let (x, w, b) = (random(4, n), random(5, n), random(6, n));
        let x: Vec<f32> = x.iter().map(|x| 0.3 * x + 7.0).collect();
        let mut first: Option<Vec<u32>> = None;
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
        let square = |x: &f32| (f64::from(*x) - mean).powi(2);
        let variance = x.iter().map(square).sum::<f64>() / n as f64;
        for kernels in Kernels::all() {
            let mut norm = vec![f32::NAN; n];
            kernels.layer_norm(&x, &w, &b, 1e-3, &mut norm);
            for i in 0..n {
                let unit = (f64::from(x[i]) - mean) / (variance + 1e-3).sqrt();
                let truth = f64::from(w[i]) * unit + f64::from(b[i]);
                assert!((f64::from(norm[i]) - truth).abs() < 2e-5, "{n}: {i}");
            }
            let bits = bits(&norm);
            assert_eq!(
                *first.get_or_insert(bits.clone()),
                bits,
                "{}",
                kernels.isa()
            );
        }
    }
}

/// Against values of Python's `math.erf`: `x · (1 + erf(x / √2)) / 2`.
#[test]
fn gelu_is_that_of_erf() {
    let cases = [
        (0.0, 0.0),
        (1e-06, 5.000003976798997e-07),
        (0.01, 0.005039893449604255),
        (-0.01, -0.004960106326878326),
        (0.1, 0.0539827845912596),
        (-0.1, -0.04601721689885652),
        (0.5, 0.34573123063700656),
        (-0.5, -0.15426876936299344),
        (-0.75, -0.16997051428265114),
        (1.0, 0.8413447460685429),
        (-1.0, -0.15865525393145707),
        (1.25, 1.1179377829164308),
        (1.4140625, 1.3028156914536415),
        (-1.4140625, -0.11124680854635836),
        (1.421875, 1.3116352241012008),
        (-1.421875, -0.11023977589879913),
        (2.0, 1.9544997361036416),
        (-2.0, -0.04550026389635844),
        (3.0, 2.99595030590511),
        (-3.0, -0.004049694094890287),
        (4.5, 4.4999847104709385),
        (-4.5, -1.5289529061285276e-05),
        (6.0, 5.999999994080474),
        (-6.0, -5.919525870226207e-09),
        (9.5, 9.5),
        (-9.5, -9.969789321594591e-21),
        (20.0, 20.0),
        (-20.0, -5.507248237212663e-88),
        (100.0, 100.0),
        (-100.0, -0.0),
    ];
    let mut first: Option<Vec<u32>> = None;
    for kernels in Kernels::all() {
        let mut x: Vec<f32> = cases.iter().map(|(x, _)| *x).collect();
        kernels.gelu(&mut x);
        for (got, (x, truth)) in x.iter().zip(cases) {
            let error = (f64::from(*got) - truth).abs();
            let bound = if x > 0.0 { 3e-7 * truth } else { 2e-7 };
            assert!(error <= bound, "{x}: {got} {truth}");
        }
        let bits = bits(&x);
        assert_eq!(
            *first.get_or_insert(bits.clone()),
            bits,
            "{}",
            kernels.isa()
        );
    }
}

#[test]
fn rotations_pair_what_they_say() {
    let angles: Vec<(f32, f32)> = [0.3f32, 1.0].iter().map(|a| (a.cos(), a.sin())).collect();
    // Two heads of four elements; element (cos, sin) applied to the unit vector of the first of
    // each pair.
    for kernels in Kernels::all() {
        let mut x = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0];
        kernels.rotate(&mut x, &angles, RotaryPairing::Halves);
        let (a, b) = (angles[0], angles[1]);
        assert_eq!(x, [a.0, 2.0 * b.0, a.1, 2.0 * b.1, -a.1, 0.0, a.0, 0.0]);
        let mut x = [1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0];
        kernels.rotate(&mut x, &angles, RotaryPairing::Adjacent);
        assert_eq!(x, [a.0, a.1, 2.0 * b.0, 2.0 * b.1, -a.1, a.0, 0.0, 0.0]);
    }
}
