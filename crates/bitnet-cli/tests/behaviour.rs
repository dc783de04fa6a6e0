//! What the commands answer: proofs, gates, the same bytes for every number of threads, and codes
//! that survive every container.

mod common;

use common::{Dir, T, f32s, gauss, llama, normal, random, safetensors};
use serde_json::Value;
use std::collections::BTreeMap;

/// in.safetensors with a matrix of three strips, one of one strip and a norm.
fn large() -> Dir {
    let dir = Dir::new();
    let tensors = [
        gauss("a.weight", &[700, 1100], 0.02),
        gauss("b.weight", &[64, 65], 1.0),
        gauss("norm.weight", &[64], 1.0),
    ];
    dir.write("in.safetensors", safetensors(&tensors));
    dir
}

fn quantize(dir: &Dir, out: &str, more: &[&str]) {
    dir.run(&[&["quantize", "in.safetensors", "--out", out], more].concat())
        .is(0);
}

/// The header's end and the byte range of each stored tensor by name.
fn ranges(file: &[u8]) -> (usize, Vec<(String, std::ops::Range<usize>)>) {
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..end]).unwrap();
    let tensors = header
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "__metadata__");
    let at = |t: &Value, i: usize| end + t["data_offsets"][i].as_u64().unwrap() as usize;
    (
        end,
        tensors
            .map(|(name, t)| (name.clone(), at(t, 0)..at(t, 1)))
            .collect(),
    )
}

/// The bytes of each stored tensor.
fn stored(file: &[u8]) -> BTreeMap<String, Vec<u8>> {
    ranges(file)
        .1
        .into_iter()
        .map(|(name, range)| (name, file[range].to_vec()))
        .collect()
}

/// The floats of a file as bits, by tensor.
fn floats(dir: &Dir, input: &str) -> BTreeMap<String, Vec<u8>> {
    dir.run(&[
        "dequantize",
        input,
        "--out",
        "floats.safetensors",
        "--force",
    ])
    .is(0);
    stored(&dir.read("floats.safetensors"))
}

#[test]
fn what_was_written_is_whole() {
    let dir = large();
    quantize(&dir, "out.safetensors", &[]);
    let run = dir.run(&["verify", "out.safetensors", "--json"]);
    let json = run.is(0).json();
    assert_eq!(
        (&json["whole"], &json["checked"]),
        (&true.into(), &5.into())
    );
    assert!(
        dir.run(&["verify", "out.safetensors"])
            .stdout()
            .contains("whole")
    );
}

#[test]
fn a_flipped_bit_of_data_is_found_and_named() {
    let dir = large();
    quantize(&dir, "out.safetensors", &["--layout", "auto"]);
    let good = dir.read("out.safetensors");
    let (end, ranges) = ranges(&good);
    let mut next = random(7);
    let mut places: Vec<usize> = (0..12)
        .map(|_| end + next() as usize % (good.len() - end))
        .collect();
    places.extend(ranges.iter().flat_map(|(_, r)| [r.start, r.end - 1]));
    for place in places {
        let mut bad = good.clone();
        bad[place] ^= 1 << (next() % 8);
        dir.write("bad.safetensors", &bad);
        let run = dir.run(&["verify", "bad.safetensors", "--json"]);
        let json = run.is(1).json();
        let name = &ranges.iter().find(|(_, r)| r.contains(&place)).unwrap().0;
        assert_eq!(json["whole"], false);
        assert!(
            json["damage"]
                .as_array()
                .unwrap()
                .iter()
                .any(|d| d["part"] == *name),
            "byte {place} of {name}: {json}"
        );
        let text = dir.run(&["verify", "bad.safetensors"]);
        assert!(
            text.is(1).stdout().contains(&format!("damaged: {name}: ")),
            "{}",
            text.stdout()
        );
    }
}

#[test]
fn a_flipped_bit_of_the_header_is_found() {
    let dir = large();
    quantize(&dir, "out.safetensors", &[]);
    let good = dir.read("out.safetensors");
    let end = ranges(&good).0;
    let text = String::from_utf8_lossy(&good[..end]).into_owned();
    let padding = good[..end].iter().rev().take_while(|&&b| b == b' ').count();
    let mut next = random(8);
    let mut places: Vec<usize> = (0..60).map(|_| next() as usize % (end - padding)).collect();
    places.extend(
        [
            "checksums",
            "digest",
            "bitnet-quant",
            "spec",
            "layout",
            "absmean",
        ]
        .map(|word| text.find(word).unwrap()),
    );
    for place in places {
        for bit in [0, next() % 7] {
            let mut bad = good.clone();
            bad[place] ^= 1 << bit;
            dir.write("bad.safetensors", &bad);
            let run = dir.run(&["verify", "bad.safetensors"]);
            // The one byte that turns the document's name into another leaves a file that never had
            // a document.
            if run.output.status.code() == Some(2) {
                run.refused(&["bad.safetensors", "bitnet.document"]);
                let key = text.find("bitnet.document").unwrap();
                assert!(
                    (key - 20..key + 20).contains(&place),
                    "byte {place}: {}",
                    run.stderr()
                );
            } else {
                run.is(1);
            }
        }
    }
}

#[test]
fn a_truncated_or_longer_file_is_damaged() {
    let dir = large();
    quantize(&dir, "out.safetensors", &[]);
    let good = dir.read("out.safetensors");
    for len in [0, 5, 8, 100, good.len() / 2, good.len() - 1] {
        dir.write("bad.safetensors", &good[..len]);
        // Too short to tell that it was one of ours: bad input, not a damaged file.
        let ours = good[..len].windows(15).any(|w| w == b"bitnet.document");
        dir.run(&["verify", "bad.safetensors"])
            .is(if ours { 1 } else { 2 });
        dir.refuses(&["inspect", "bad.safetensors"], &["bad.safetensors"]);
    }
    dir.write("bad.safetensors", [good, vec![0]].concat());
    dir.run(&["verify", "bad.safetensors"]).is(1);
}

#[test]
fn a_file_without_a_document_cannot_be_verified() {
    large().refuses(
        &["verify", "in.safetensors"],
        &["in.safetensors", "bitnet.document"],
    );
}

#[test]
fn gates_of_compare() {
    let dir = large();
    quantize(&dir, "out.safetensors", &[]);
    for (gate, pass, fail) in [
        ("--min-sqnr", "3", "9"),
        ("--min-cosine", "0.7", "0.99"),
        ("--max-mse", "1", "1e-9"),
        ("--max-bpw", "8", "1"),
        ("--max-sign-flips", "1", "-1"),
    ] {
        let run = |limit: &str| {
            dir.run(&[
                "compare",
                "in.safetensors",
                "out.safetensors",
                &format!("{gate}={limit}"),
                "--json",
            ])
        };
        assert_eq!(
            run(pass).is(0).json()["failed"],
            Value::Array(vec![]),
            "{gate}"
        );
        let failed = run(fail).is(1).json()["failed"].clone();
        assert!(
            !failed.as_array().unwrap().is_empty()
                && failed[0].as_str().unwrap().contains("the limit"),
            "{gate} {failed}"
        );
    }
    let same = dir.run(&["compare", "in.safetensors", "in.safetensors", "--json"]);
    assert_eq!(same.is(0).json()["all"]["exact"], true);
}

#[test]
fn models_that_do_not_match() {
    let dir = large();
    dir.write(
        "fewer.safetensors",
        safetensors(&[gauss("a.weight", &[700, 1100], 0.02)]),
    );
    dir.refuses(
        &["compare", "in.safetensors", "fewer.safetensors"],
        &["fewer.safetensors", "'b.weight'"],
    );
    let turned = [
        gauss("a.weight", &[1100, 700], 0.02),
        gauss("b.weight", &[64, 65], 1.0),
        gauss("norm.weight", &[64], 1.0),
    ];
    dir.write("turned.safetensors", safetensors(&turned));
    let parts = [
        "turned.safetensors",
        "'a.weight'",
        "[700, 1100]",
        "[1100, 700]",
    ];
    dir.refuses(&["compare", "in.safetensors", "turned.safetensors"], &parts);
}

#[test]
fn the_same_bytes_for_every_number_of_threads_and_instruction_set() {
    let dir = large();
    llama(&dir, "m");
    dir.write("wide/config.json", "{}").write(
        "wide/model.safetensors",
        safetensors(&[gauss("a.weight", &[1200, 700], 0.02)]),
    );
    let settings: [(&str, &str, &[&str]); 12] = [
        ("in.safetensors", "channel.safetensors", &[]),
        (
            "in.safetensors",
            "tensor.safetensors",
            &["--granularity", "tensor"],
        ),
        (
            "in.safetensors",
            "group.safetensors",
            &[
                "--granularity",
                "group:64",
                "--threshold",
                "optimal",
                "--scale-dtype",
                "f16",
            ],
        ),
        (
            "in.safetensors",
            "best.safetensors",
            &["--granularity", "tensor", "--threshold", "optimal"],
        ),
        (
            "in.safetensors",
            "median.safetensors",
            &["--granularity", "tensor", "--threshold", "median"],
        ),
        (
            "in.safetensors",
            "planes.safetensors",
            &["--planes", "2", "--granularity", "group:128"],
        ),
        (
            "in.safetensors",
            "entropy.safetensors",
            &["--layout", "entropy"],
        ),
        (
            "in.safetensors",
            "auto.safetensors",
            &["--layout", "auto", "--granularity", "tensor"],
        ),
        (
            "in.safetensors",
            "int4.safetensors",
            &[
                "--precision",
                "int4",
                "--clip",
                "search",
                "--mapping",
                "asymmetric",
            ],
        ),
        (
            "in.safetensors",
            "seed.safetensors",
            &[
                "--precision",
                "binary",
                "--seed",
                "3",
                "--granularity",
                "tensor",
            ],
        ),
        ("wide", "hf", &["--format", "hf-bitnet"]),
        ("m", "m.gguf", &["--threshold", "optimal"]),
    ];
    let mut first = dir.files();
    for (i, (threads, isa)) in [
        ("1", None),
        ("1", None),
        ("2", None),
        ("2", None),
        ("2", Some("scalar")),
    ]
    .into_iter()
    .enumerate()
    {
        for (input, out, more) in settings {
            let args = [
                &[
                    "quantize",
                    input,
                    "--out",
                    out,
                    "--force",
                    "--threads",
                    threads,
                ],
                more,
            ]
            .concat();
            let env: Vec<_> = isa.iter().map(|isa| ("BITNET_ISA", *isa)).collect();
            dir.run_with(&args, &env).is(0);
        }
        let files = dir.files();
        for (name, bytes) in &files {
            assert!(
                i == 0 || first.get(name) == Some(bytes),
                "{name} differs with {threads} threads, {isa:?}"
            );
        }
        first = files;
    }
}

#[test]
fn json_of_every_command() {
    let dir = large();
    llama(&dir, "m");
    for (args, status) in [
        (
            &["quantize", "in.safetensors", "--out", "q.safetensors"][..],
            0,
        ),
        (&["quantize", "m", "--out", "q.gguf"], 0),
        (&["inspect", "q.safetensors"], 0),
        (&["inspect", "in.safetensors", "--headers"], 0),
        (&["inspect", "q.gguf"], 0),
        (
            &[
                "convert",
                "q.safetensors",
                "--out",
                "c.safetensors",
                "--layout",
                "base-3",
            ],
            0,
        ),
        (
            &[
                "dequantize",
                "q.safetensors",
                "--out",
                "d.safetensors",
                "--dtype",
                "bf16",
            ],
            0,
        ),
        (&["compare", "in.safetensors", "q.safetensors"], 0),
        (
            &[
                "compare",
                "in.safetensors",
                "q.safetensors",
                "--min-sqnr",
                "50",
            ],
            1,
        ),
        (&["verify", "c.safetensors"], 0),
    ] {
        let run = dir.run(&[args, &["--json"]].concat());
        assert!(run.is(status).json().is_object(), "{args:?}");
        assert_eq!(run.stderr(), "");
    }
    let quantized = dir
        .run(&[
            "--json",
            "quantize",
            "in.safetensors",
            "--out",
            "q2.safetensors",
        ])
        .is(0)
        .json();
    assert_eq!(quantized["file_bytes"], dir.read("q2.safetensors").len());
    assert_eq!(quantized["tensors"].as_array().unwrap().len(), 3);
}

#[test]
fn ternary_weights_keep_codes_and_scales() {
    let dir = Dir::new();
    let mut next = random(5);
    let mut ternary = |rows: usize, cols: usize, scale: &dyn Fn(usize) -> f32| -> Vec<f32> {
        (0..rows * cols)
            .map(|i| [0.0, scale(i / cols), -scale(i / cols)][next() as usize % 3])
            .collect()
    };
    let (one, rows) = (
        ternary(300, 1000, &|_| 0.037),
        ternary(300, 1000, &|row| 0.01 + row as f32 * 1e-4),
    );
    dir.write(
        "tensor.safetensors",
        safetensors(&[f32s("a.weight", &[300, 1000], &one)]),
    );
    dir.write(
        "channel.safetensors",
        safetensors(&[f32s("a.weight", &[300, 1000], &rows)]),
    );
    for granularity in ["tensor", "channel"] {
        let input = format!("{granularity}.safetensors");
        for threshold in [
            "absmean",
            "mean",
            "median",
            "adaptive",
            "optimal",
            "factor:0.9",
        ] {
            for scale in ["rule", "least-squares"] {
                let flags = [
                    "--granularity",
                    granularity,
                    "--threshold",
                    threshold,
                    "--scale",
                    scale,
                ];
                dir.run(
                    &[
                        &["quantize", &input, "--out", "q.safetensors", "--force"][..],
                        &flags,
                    ]
                    .concat(),
                )
                .is(0);
                let run = dir.run(&["compare", &input, "q.safetensors", "--json"]);
                assert_eq!(run.is(0).json()["all"]["exact"], true, "{flags:?}");
            }
        }
    }
}

#[test]
fn codes_survive_every_layout() {
    let dir = large();
    for (i, more) in [
        &["--granularity", "group:96", "--scale-dtype", "f16"][..],
        &["--planes", "2"],
        &["--granularity", "tensor"],
    ]
    .iter()
    .enumerate()
    {
        let start = format!("{i}.safetensors");
        quantize(&dir, &start, more);
        let expected = floats(&dir, &start);
        let mut at = start.clone();
        for layout in [
            "base-3",
            "entropy",
            "auto",
            "i8",
            "hybrid",
            "run-length",
            "sparse",
            "byte-aligned",
            "two-bit",
        ] {
            let out = format!("{i}-{layout}.safetensors");
            dir.run(&["convert", &at, "--out", &out, "--layout", layout])
                .is(0);
            dir.run(&["verify", &out]).is(0);
            assert!(floats(&dir, &out) == expected, "{layout} {more:?}");
            at = out;
        }
        // Back where it began: the same packed bytes, in whichever order.
        let (a, b) = (stored(&dir.read(&start)), stored(&dir.read(&at)));
        assert!(a == b, "{more:?}");
    }
}

/// A llama folder whose layers are ternary with a power of two as scale, so that every scale type
/// holds it and its inverse.
fn ternary_llama(dir: &Dir) {
    llama(dir, "m");
    let file = dir.read("m/model.safetensors");
    let mut next = random(3);
    let tensors = ranges(&file).1.into_iter().map(|(name, range)| {
        let name: &'static str = name.leak();
        match name.contains("proj") {
            true => f32s(
                name,
                &[256, 256],
                &(0..256 * 256)
                    .map(|_| [0.0, 0.015625, -0.015625][next() as usize % 3])
                    .collect::<Vec<_>>(),
            ),
            false if name.contains("embed") => T(name, "F32", vec![32, 256], file[range].to_vec()),
            false => T(name, "F32", vec![256], file[range].to_vec()),
        }
    });
    let tensors: Vec<T> = tensors.collect();
    dir.write("m/model.safetensors", safetensors(&tensors));
}

#[test]
fn codes_survive_every_container() {
    let dir = Dir::new();
    ternary_llama(&dir);
    let expected = floats(&dir, "m/model.safetensors");
    dir.run(&["quantize", "m", "--out", "q", "--granularity", "tensor"])
        .is(0);
    let chain: [(&str, &str, &[&str]); 7] = [
        ("q", "e", &["--layout", "entropy"]),
        ("e", "bit", &["--format", "hf-bitnet"]),
        (
            "bit",
            "auto",
            &["--format", "hf-bitnet", "--linear-class", "autobitlinear"],
        ),
        ("auto", "tq2.gguf", &["--layout", "tq2_0"]),
        ("tq2.gguf", "tq1.gguf", &["--layout", "tq1_0"]),
        (
            "tq1.gguf",
            "back",
            &["--format", "safetensors", "--layout", "two-bit"],
        ),
        ("back", "b3", &["--layout", "base-3"]),
    ];
    for (from, to, more) in chain {
        dir.run(&[&["convert", from, "--out", to], more].concat())
            .is(0);
        dir.run(&["verify", to]).is(0);
        let run = dir.run(&["compare", "m", to, "--json"]);
        assert_eq!(run.is(0).json()["all"]["exact"], true, "{to}");
        if !to.ends_with(".gguf") {
            dir.run(&["dequantize", to, "--out", "f", "--force"]).is(0);
            assert!(floats(&dir, "f/model.safetensors") == expected, "{to}");
        }
    }
}

#[test]
fn a_dead_and_a_huge_layer_survive() {
    let dir = Dir::new();
    let huge: Vec<f32> = normal(1, 64 * 64, 1e30);
    dir.write(
        "in.safetensors",
        safetensors(&[
            f32s("dead.weight", &[64, 64], &[0.0; 4096]),
            f32s("huge.weight", &[64, 64], &huge),
        ]),
    );
    for granularity in ["tensor", "channel", "group:7"] {
        quantize(
            &dir,
            "out.safetensors",
            &[
                "--granularity",
                granularity,
                "--threshold",
                "optimal",
                "--force",
            ],
        );
        let json = dir
            .run(&["compare", "in.safetensors", "out.safetensors", "--json"])
            .is(0)
            .json();
        assert_eq!(json["tensors"][0]["exact"], true);
        assert!(
            json["tensors"][1]["sqnr_db"].as_f64().unwrap() > 5.0,
            "{json}"
        );
    }
}
