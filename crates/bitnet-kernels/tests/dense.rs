//! Float products, attention and elementwise steps against f64, and every instruction set and thread count against one another.

use bitnet_kernels::dense::{Attention, BLOCK, Cached, Data, Heads, Matrix, Pairing, f16_to_f32, quantize_blocks, quantize_nibbles};
use bitnet_kernels::{Kernels, Pool};

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The same weights in every format, and what each holds.
fn formats(rows: usize, cols: usize) -> Vec<(&'static str, Matrix)> {
    let w = random(rows as u64 * 1000 + cols as u64, rows * cols);
    let halves: Vec<u16> = w.iter().map(|&w| half::f16::from_f32(w).to_bits()).collect();
    let brains: Vec<u16> = w.iter().map(|&w| half::bf16::from_f32(w).to_bits()).collect();
    let blocks = cols.div_ceil(BLOCK);
    let (mut values, mut scales) = (vec![0; rows * cols], vec![0; rows * blocks]);
    let (mut codes, mut coarse) = (vec![0; rows * blocks * 16], vec![0; rows * blocks]);
    for r in 0..rows {
        quantize_blocks(&w[r * cols..][..cols], &mut values[r * cols..][..cols], &mut scales[r * blocks..][..blocks]);
        let of_row = &mut codes[r * blocks * 16..][..blocks * 16];
        quantize_nibbles(&w[r * cols..][..cols], of_row, &mut coarse[r * blocks..][..blocks]);
        // Codes after the end of a row must not count.
        (cols..blocks * 32).for_each(|c| of_row[c / 32 * 16 + c % 16] ^= if c % 32 < 16 { 0x05 } else { 0x50 });
    }
    let matrix = |data| Matrix::new(rows, cols, data).unwrap();
    vec![
        ("f32", matrix(Data::F32(w))),
        ("f16", matrix(Data::F16(halves))),
        ("bf16", matrix(Data::Bf16(brains))),
        ("int8", matrix(Data::Int8 { values, scales })),
        ("int4", matrix(Data::Int4 { codes, scales: coarse })),
    ]
}

#[test]
fn products_are_near_f64_and_the_same_everywhere() {
    // WebAssembly has one thread.
    let pools: Vec<Pool> = (1..=if cfg!(target_family = "wasm") { 1 } else { 3 }).map(|threads| Pool::new(threads).unwrap()).collect();
    let shapes = [(1, 1, 1), (3, 15, 2), (9, 16, 5), (17, 33, 4), (5, 64, 0), (70, 341, 7), (300, 576, 9)];
    // Those that an emulated machine, as in `scripts/cross-test`, can take.
    for (rows, cols, tokens) in shapes.into_iter().take(if std::env::var_os("BITNET_EMULATED").is_some() { 5 } else { 7 }) {
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
                        kernels.dense_matmul(pool, &w, &x[token * cols..][..cols], Some(&bias), &mut alone);
                        assert_eq!(bits(&alone), bits(&out[token * rows..][..rows]), "{name} {rows}×{cols}, token {token}");
                    }
                    let expected = first.get_or_insert_with(|| bits(&out));
                    assert_eq!(*expected, bits(&out), "{name} {rows}×{cols}, {} on {} threads", kernels.isa(), pool.threads());
                }
            }
            let out = first.unwrap();
            let mut row = vec![0.0; cols];
            for n in 0..rows {
                w.row_into(n, &mut row);
                for token in 0..tokens {
                    let terms = row.iter().zip(&x[token * cols..]).map(|(&w, &x)| f64::from(w) * f64::from(x));
                    let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                    let got = f64::from(f32::from_bits(out[token * rows + n]));
                    // K / 16 + 4 additions and one for the bias, each half an ulp of at most the sum of magnitudes.
                    let bound = (cols as f64 / 16.0 + 6.0) * f64::from(f32::EPSILON) * (magnitude + 1.0);
                    assert!((got - sum - f64::from(bias[n])).abs() <= bound, "{name} {rows}×{cols}: {got} and {sum}");
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
        for (name, w) in &formats[1..] {
            w.row_into(row, &mut rounded);
            let step = match *name {
                "f16" => |w: f32, _: f32| w.abs() * 2f32.powi(-11) + 2f32.powi(-25),
                "bf16" => |w: f32, _: f32| w.abs() * 2f32.powi(-8),
                "int8" => |_: f32, top: f32| top / 127.0 * 0.51,
                // The end of the scale that has no value of its own is a whole step away.
                _ => |_: f32, top: f32| top / 8.0 * 1.01,
            };
            let worst = exact.chunks(BLOCK).zip(rounded.chunks(BLOCK)).all(|(e, r)| {
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
    assert!(Matrix::new(2, 3, Data::F32(vec![0.0; 5])).unwrap_err().to_string().contains('6'));
    assert!(Matrix::new(1, 33, Data::Int8 { values: vec![0; 33], scales: vec![0; 1] }).is_err());
    assert!(Matrix::new(usize::MAX, 3, Data::F16(vec![])).is_err());
}

/// Softmax attention in f64, straight from its definition.
fn attention_truth(q: &[f32], k: &[f32], v: &[f32], len: usize, d: usize) -> Vec<f64> {
    let scores: Vec<f64> =
        (0..len).map(|j| (0..d).map(|i| f64::from(q[i]) * f64::from(k[j * d + i])).sum::<f64>() / (d as f64).sqrt()).collect();
    let top = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..d).map(|i| (0..len).map(|j| weights[j] / sum * f64::from(v[j * d + i])).sum()).collect()
}

#[test]
fn attention_is_that_of_the_definition() {
    for (d, len, group) in [(8, 1, 3), (32, 63, 1), (64, 64, 2), (64, 65, 3), (128, 200, 4), (20, 7, 5), (80, 130, 9)] {
        // Scores far apart, so that the running maximum moves.
        let q: Vec<f32> = random(1, group * d).iter().map(|x| x * 6.0).collect();
        let (k, v) = (random(2, len * d), random(3, len * d));
        let half = |x: &[f32]| x.iter().map(|&x| half::f16::from_f32(x).to_bits()).collect::<Vec<_>>();
        let widened = |x: &[u16]| x.iter().map(|&b| f16_to_f32(b)).collect::<Vec<_>>();
        let int8 = |x: &[f32]| -> (Vec<i8>, Vec<f32>) {
            let scales: Vec<f32> = x.chunks(d).map(|r| r.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0).collect();
            (x.chunks(d).zip(&scales).flat_map(|(r, s)| r.iter().map(move |x| (x / s).round() as i8)).collect(), scales)
        };
        let restored = |(q, s): &(Vec<i8>, Vec<f32>)| q.iter().enumerate().map(|(i, &q)| f32::from(q) * s[i / d]).collect::<Vec<_>>();
        let (kh, vh, ki, vi) = (half(&k), half(&v), int8(&k), int8(&v));
        let caches = [
            (Cached::F32(&k), Cached::F32(&v), k.clone(), v.clone()),
            (Cached::F16(&kh), Cached::F16(&vh), widened(&kh), widened(&vh)),
            (Cached::Int8(&ki.0, &ki.1), Cached::Int8(&vi.0, &vi.1), restored(&ki), restored(&vi)),
        ];
        for (keys, values, k, v) in caches {
            let mut first = None;
            for kernels in Kernels::all() {
                let mut out = vec![f32::NAN; group * d];
                kernels.attend(&Attention { keys, values, len, head_dim: d, scale: 1.0 / (d as f32).sqrt() }, &q, &mut out);
                for (q, out) in q.chunks(d).zip(out.chunks(d)) {
                    for (truth, &got) in attention_truth(q, &k, &v, len, d).iter().zip(out) {
                        assert!((truth - f64::from(got)).abs() < 1e-5, "{d} × {len}: {truth} and {got}");
                    }
                }
                assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out), "{}", kernels.isa());
                // A head alone gives the same bits as among others.
                let mut alone = vec![f32::NAN; d];
                let a = Attention { keys, values, len, head_dim: d, scale: 1.0 / (d as f32).sqrt() };
                kernels.attend(&a, &q[(group - 1) * d..], &mut alone);
                assert_eq!(bits(&alone), bits(&out[(group - 1) * d..]));
            }
        }
    }
}

#[test]
fn attention_of_a_run_is_that_of_its_tokens() {
    for (d, len, tokens, group) in
        [(8, 1, 1, 3), (16, 1, 70, 4), (64, 60, 9, 2), (128, 130, 8, 4), (20, 63, 3, 5), (80, 64, 66, 9), (128, 1, 20, 8)]
    {
        let (positions, width) = (len + tokens - 1, group * d);
        let stride = width + 24;
        let q: Vec<f32> = random(1, tokens * stride).iter().map(|x| x * 6.0).collect();
        let (k, v) = (random(2, positions * d), random(3, positions * d));
        let half = |x: &[f32]| x.iter().map(|&x| half::f16::from_f32(x).to_bits()).collect::<Vec<_>>();
        let bytes = |x: &[f32]| x.iter().map(|x| (x * 40.0) as i8).collect::<Vec<_>>();
        let (kh, vh, ki, vi, scales) = (half(&k), half(&v), bytes(&k), bytes(&v), random(4, positions));
        let caches = [
            [Cached::F32(&k), Cached::F32(&v)],
            [Cached::F16(&kh), Cached::F16(&vh)],
            [Cached::Int8(&ki, &scales), Cached::Int8(&vi, &scales)],
        ];
        for (kernels, [keys, values]) in Kernels::all().flat_map(|k| caches.map(|c| (k, c))) {
            let attention = |len| Attention { keys, values, len, head_dim: d, scale: 0.3 };
            let mut out = vec![f32::NAN; tokens * stride];
            kernels.attend_run(&attention(len), Heads { tokens, width, stride }, &q, &mut out);
            for token in 0..tokens {
                let mut alone = vec![f32::NAN; width];
                kernels.attend(&attention(len + token), &q[token * stride..][..width], &mut alone);
                let here = &out[token * stride..][..stride];
                assert_eq!(bits(&alone), bits(&here[..width]), "{}, token {token} of {tokens} after {len} × {d}", kernels.isa());
                assert!(here[width..].iter().all(|x| x.is_nan()), "nothing beside the heads is written");
            }
        }
    }
}

#[test]
fn elementwise_steps() {
    for n in [1, 15, 16, 341] {
        let (x, w) = (random(4, n), random(5, n));
        let mut all: [Option<Vec<u32>>; 4] = Default::default();
        for kernels in Kernels::all() {
            let mut norm = vec![f32::NAN; n];
            kernels.rms_norm(&x, &w, 1e-5, &mut norm);
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
            let (mut in_place, mut sum) = (x.clone(), x.clone());
            kernels.rms_norm_in_place(&mut in_place, &w, 1e-5);
            assert_eq!(bits(&in_place), bits(&norm));
            let [mut silu, mut relu2] = [vec![f32::NAN; n], vec![f32::NAN; n]];
            kernels.silu_mul(&x, &w, &mut silu);
            kernels.relu2_mul(&x, &w, &mut relu2);
            kernels.add(&mut sum, &w);
            for i in 0..n {
                let (x, w) = (f64::from(x[i]), f64::from(w[i]));
                let near = |got: f32, truth: f64| (f64::from(got) - truth).abs() <= 2e-6 * truth.abs() + 1e-9;
                assert!(near(norm[i], w * x / (mean + 1e-5).sqrt()));
                assert!(near(silu[i], x / (1.0 + (-x).exp()) * w));
                assert!(near(relu2[i], x.max(0.0).powi(2) * w));
                assert!(near(sum[i], x + w));
            }
            for (first, got) in all.iter_mut().zip([norm, silu, relu2, sum]) {
                assert_eq!(*first.get_or_insert_with(|| bits(&got)), bits(&got), "{}", kernels.isa());
            }
        }
    }
}

#[test]
fn rotations_pair_what_they_say() {
    let angles: Vec<(f32, f32)> = [0.3f32, 1.0].iter().map(|a| (a.cos(), a.sin())).collect();
    // Two heads of four elements; element (cos, sin) applied to the unit vector of the first of each pair.
    for kernels in Kernels::all() {
        let mut x = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0];
        kernels.rotate(&mut x, &angles, Pairing::Halves);
        let (a, b) = (angles[0], angles[1]);
        assert_eq!(x, [a.0, 2.0 * b.0, a.1, 2.0 * b.1, -a.1, 0.0, a.0, 0.0]);
        let mut x = [1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0];
        kernels.rotate(&mut x, &angles, Pairing::Adjacent);
        assert_eq!(x, [a.0, a.1, 2.0 * b.0, 2.0 * b.1, -a.1, a.0, 0.0, 0.0]);
    }
}
