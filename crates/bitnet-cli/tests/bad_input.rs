//! Checkpoints that are not what they should be: one clear line, status 2, nothing left behind, the
//! input as it was.

mod common;

use common::{Dir, T, f32s, gauss, raw, safetensors};
use serde_json::{Value, json};

/// `bad.safetensors` with these bytes must be refused by every command with a line that names it
/// and holds `parts`.
#[track_caller]
fn bad(bytes: &[u8], parts: &[&str]) {
    let dir = Dir::new();
    dir.write("bad.safetensors", bytes);
    dir.refuses_input("bad.safetensors", &[&["bad.safetensors"], parts].concat());
}

/// The same with this header and this number of data bytes.
#[track_caller]
fn bad_header(header: Value, data: usize, parts: &[&str]) {
    bad(&raw(&header.to_string(), &vec![0; data]), parts);
}

fn good() -> Vec<u8> {
    safetensors(&[
        gauss("a.weight", &[8, 16], 0.02),
        gauss("norm.weight", &[16], 1.0),
    ])
}

#[test]
fn an_empty_file() {
    bad(b"", &["at least 8 bytes", "got 0 bytes"]);
}

#[test]
fn seven_bytes() {
    bad(&[0; 7], &["at least 8 bytes", "got 7 bytes"]);
}

#[test]
fn a_header_longer_than_the_file() {
    let mut bytes = 1000u64.to_le_bytes().to_vec();
    bytes.extend(b"{}");
    bad(&bytes, &["10 bytes", "got 1000 bytes"]);
}

#[test]
fn a_huge_header() {
    let mut bytes = good();
    bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    bad(&bytes, &["100000000", "1152921504606846976"]);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    bad(&bytes, &["18446744073709551615"]);
}

#[test]
fn a_header_that_is_not_json() {
    bad(
        &raw("this is not JSON", b""),
        &["header in JSON", "line 1 column"],
    );
    bad(&raw("{\"a\u{0}\": 1", b""), &["header in JSON"]);
    let mut bytes = raw("{}", b"");
    bytes[8] = 0xff;
    bad(&bytes, &["header in JSON"]);
}

#[test]
fn deeply_nested_json() {
    bad(&raw(&"{\"a\":".repeat(100_000), b""), &["header in JSON"]);
    bad(
        &raw(&format!("{{\"a\":{}", "[".repeat(100_000)), b""),
        &["header in JSON"],
    );
}

#[test]
fn json_that_is_no_object_of_tensors() {
    bad_header(json!([1, 2]), 0, &["an object of tensors"]);
    bad_header(json!("tensors"), 0, &["an object of tensors"]);
    bad_header(json!({"a.weight": 3}), 0, &["a.weight"]);
    bad_header(
        json!({"a.weight": {"dtype": "F32", "shape": [1]}}),
        0,
        &["a.weight", "data_offsets"],
    );
    bad_header(
        json!({"a.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        4,
        &["a.weight", "-1"],
    );
    bad_header(json!({"__metadata__": {"a": 1}}), 0, &["string"]);
}

#[test]
fn truncated_data() {
    let bytes = good();
    bad(
        &bytes[..bytes.len() - 1],
        &["norm.weight", "512..576", "0..575"],
    );
    bad(
        &bytes[..bytes.len() - 64 - 100],
        &["a.weight", "0..512", "0..412"],
    );
}

#[test]
fn trailing_bytes() {
    let bytes = [good(), vec![0]].concat();
    bad(
        &bytes,
        &[
            &format!("{} bytes", bytes.len() - 1),
            &format!("got {}", bytes.len()),
        ],
    );
}

#[test]
fn overlapping_offsets() {
    let tensor = |begin: usize| json!({"dtype": "F32", "shape": [2, 2], "data_offsets": [begin, begin + 16]});
    bad_header(
        json!({"a.weight": tensor(0), "b.weight": tensor(12)}),
        28,
        &["b.weight", "overlap"],
    );
    bad_header(
        json!({"a.weight": tensor(0), "b.weight": tensor(0)}),
        16,
        &["b.weight", "overlap"],
    );
}

#[test]
fn a_hole_between_tensors() {
    let tensor = |begin: usize| json!({"dtype": "F32", "shape": [2, 2], "data_offsets": [begin, begin + 16]});
    bad_header(
        json!({"a.weight": tensor(0), "b.weight": tensor(20)}),
        36,
        &["b.weight", "hole"],
    );
    bad_header(json!({"a.weight": tensor(4)}), 20, &["a.weight", "hole"]);
}

#[test]
fn offsets_outside_the_file() {
    let tensor = |begin: u64, end: u64| json!({"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [begin, end]}});
    bad_header(
        tensor(0, 1 << 40),
        16,
        &["a.weight", "1099511627776", "0..16"],
    );
    bad_header(
        tensor(u64::MAX - 15, u64::MAX),
        16,
        &["a.weight", "18446744073709551615"],
    );
    bad_header(tensor(16, 0), 16, &["a.weight", "16..0"]);
}

#[test]
fn a_shape_that_does_not_fit_its_bytes() {
    bad_header(
        json!({"a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]}}),
        16,
        &["a.weight", "24 bytes", "got 16"],
    );
    bad_header(
        json!({"a.weight": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 16]}}),
        16,
        &["a.weight", "8 bytes", "F16"],
    );
}

#[test]
fn an_overflowing_shape() {
    for shape in [
        json!([u64::MAX, 2]),
        json!([1u64 << 32, 1u64 << 32]),
        json!([1u64 << 62, 2]),
    ] {
        bad_header(
            json!({"a.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}),
            16,
            &["a.weight", "shape"],
        );
    }
    // Zero times too much is still zero bytes, and the product of any prefix must not wrap.
    bad_header(
        json!({"a.weight": {"dtype": "F32", "shape": [u64::MAX, 2, 0], "data_offsets": [0, 0]}}),
        0,
        &["a.weight", "countable", "18446744073709551615"],
    );
}

#[test]
fn an_unknown_dtype() {
    bad_header(
        json!({"a.weight": {"dtype": "F31", "shape": [2, 2], "data_offsets": [0, 16]}}),
        16,
        &["a.weight", "F31"],
    );
}

#[test]
fn the_same_name_twice() {
    let header = r#"{"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    bad(
        &raw(header, &[0; 8]),
        &["a.weight", "one tensor of that name", "two"],
    );
    bad(
        &raw(
            r#"{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}"#,
            b"",
        ),
        &["__metadata__"],
    );
}

#[test]
fn integers_are_no_weights() {
    let dir = Dir::new();
    let ids = || T("ids.weight", "I32", vec![4, 4], vec![0; 64]);
    dir.write("ids.safetensors", safetensors(&[ids()]));
    dir.refuses(
        &["quantize", "ids.safetensors", "--out", "o.safetensors"],
        &["ids.safetensors", "selects no tensor"],
    );
    dir.write(
        "i64.safetensors",
        safetensors(&[
            T("ids.weight", "I64", vec![4, 4], vec![0; 128]),
            gauss("a.weight", &[4, 4], 1.0),
        ]),
    );
    // Asked for by name: an error, not a silent copy.
    let args = [
        "quantize",
        "i64.safetensors",
        "--rule",
        "ids.weight=int8",
        "--out",
        "o.safetensors",
    ];
    dir.refuses(&args, &["i64.safetensors", "ids.weight"]);
    let args = [
        "quantize",
        "i64.safetensors",
        "--include",
        "ids.*",
        "--out",
        "o.safetensors",
    ];
    dir.refuses(&args, &["i64.safetensors"]);
    // Beside weights they are copied.
    dir.run(&["quantize", "i64.safetensors", "--out", "o.safetensors"])
        .is(0);
}

#[test]
fn weights_that_are_not_finite() {
    let mut weights = vec![0.5f32; 12 * 16];
    for (value, word) in [
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
        (f32::NEG_INFINITY, "-inf"),
    ] {
        for index in [0, 37, 12 * 16 - 1] {
            weights.fill(0.5);
            weights[index] = value;
            let dir = Dir::new();
            dir.write(
                "nan.safetensors",
                safetensors(&[
                    gauss("a.weight", &[4, 16], 1.0),
                    f32s("b.weight", &[12, 16], &weights),
                ]),
            );
            for more in [
                &["--granularity", "tensor"][..],
                &["--granularity", "channel"],
                &["--granularity", "group:5"],
                &["--threshold", "optimal", "--granularity", "tensor"],
                &["--threshold", "median"],
                &["--planes", "2"],
                &["--precision", "binary"],
                &["--precision", "int4", "--granularity", "tensor"],
                &["--precision", "int8", "--mapping", "asymmetric"],
                &["--precision", "int3", "--clip", "search"],
                &["--layout", "entropy"],
            ] {
                let args = [
                    &["quantize", "nan.safetensors", "--out", "o.safetensors"],
                    more,
                ]
                .concat();
                let index = format!("weight {index} ");
                dir.refuses(&args, &["nan.safetensors", "'b.weight'", &index, word]);
            }
        }
    }
    let dir = Dir::new();
    weights[5] = f32::NAN;
    dir.write(
        "nan.safetensors",
        safetensors(&[f32s("b.weight", &[12, 16], &weights)]),
    );
    let inspect = dir.run(&["inspect", "nan.safetensors", "--json"]);
    assert_eq!(inspect.is(0).json()["findings"][0]["check"], "not-finite");
}

#[test]
fn the_first_of_several_bad_weights_is_named_whatever_the_threads() {
    // More than one strip of 2^18 weights, a bad weight in the second and the third.
    let mut weights = vec![0.5f32; 800 * 1100];
    (weights[300_000], weights[700_000]) = (f32::NAN, f32::INFINITY);
    let dir = Dir::new();
    dir.write(
        "nan.safetensors",
        safetensors(&[f32s("b.weight", &[800, 1100], &weights)]),
    );
    for threads in ["1", "2", "4"] {
        for granularity in ["tensor", "channel", "group:64"] {
            let args = [
                "quantize",
                "nan.safetensors",
                "--out",
                "o.safetensors",
                "--threads",
                threads,
                "--granularity",
                granularity,
            ];
            dir.refuses(
                &args,
                &["nan.safetensors", "'b.weight'", "weight 300000 ", "NaN"],
            );
        }
    }
}

/// A GGUF of one tensor of 32 zeros, by hand.
fn gguf(version: u32, tensors: u64, pairs: u64, id: u32, cols: u64) -> Vec<u8> {
    let mut b = b"GGUF".to_vec();
    b.extend(version.to_le_bytes());
    b.extend(tensors.to_le_bytes());
    b.extend(pairs.to_le_bytes());
    b.extend(8u64.to_le_bytes());
    b.extend(b"a.weight");
    b.extend(2u32.to_le_bytes());
    b.extend(cols.to_le_bytes());
    b.extend(2u64.to_le_bytes());
    b.extend(id.to_le_bytes());
    b.extend(0u64.to_le_bytes());
    b.resize(b.len().next_multiple_of(32) + 128, 0);
    b
}

#[track_caller]
fn bad_gguf(bytes: &[u8], parts: &[&str]) {
    let dir = Dir::new();
    dir.write("bad.gguf", bytes);
    dir.refuses_input("bad.gguf", &[&["bad.gguf"], parts].concat());
}

#[test]
fn a_good_gguf_is_read() {
    let dir = Dir::new();
    dir.write("good.gguf", gguf(3, 1, 0, 0, 16));
    dir.run(&["inspect", "good.gguf"]).is(0);
}

#[test]
fn an_empty_gguf() {
    bad_gguf(b"", &["4 bytes", "0 left"]);
}

#[test]
fn a_gguf_of_garbage() {
    bad_gguf(&[0xa5; 1000], &["not a GGUF file", "a5"]);
    bad_gguf(&[&b"GGUF"[..], &[0xff; 1000]].concat(), &["version"]);
}

#[test]
fn a_gguf_that_ends_early() {
    let file = gguf(3, 1, 0, 0, 16);
    for len in [
        1,
        4,
        7,
        8,
        15,
        23,
        24,
        30,
        40,
        50,
        70,
        76,
        100,
        file.len() - 1,
    ] {
        bad_gguf(&file[..len], &[]);
    }
}

#[test]
fn a_gguf_of_huge_counts() {
    for n in [1 << 20, 1 << 40, u64::MAX] {
        bad_gguf(&gguf(3, n, 0, 0, 16), &[]);
        bad_gguf(&gguf(3, 1, n, 0, 16), &[]);
        bad_gguf(&gguf(3, 1, 0, 0, n), &["a.weight"]);
    }
}

#[test]
fn a_gguf_of_another_version() {
    for version in [0, 4, 1000] {
        bad_gguf(
            &gguf(version, 1, 0, 0, 16),
            &[&format!("version {version}"), "expected 1, 2 or 3"],
        );
    }
}

#[test]
fn a_gguf_of_an_unknown_type() {
    bad_gguf(&gguf(3, 1, 0, 4711, 16), &["a.weight", "4711"]);
}

#[test]
fn a_gguf_whose_rows_are_no_whole_blocks() {
    // Type 8 is Q8_0, of blocks of 32.
    bad_gguf(&gguf(3, 1, 0, 8, 16), &["a.weight", "16", "32"]);
}

#[test]
fn a_path_that_is_no_file() {
    let dir = Dir::new();
    for command in [
        &["inspect", "no.safetensors"][..],
        &["verify", "no.safetensors"],
        &["quantize", "no.safetensors", "--out", "o.safetensors"],
    ] {
        dir.refuses(command, &["cannot open no.safetensors", "No such file"]);
    }
    dir.refuses(&["inspect", "/dev/null"], &["/dev/null", "regular file"]);
    // Text that is not a checkpoint at all.
    dir.write("notes.txt", "Dear reader, this is not a model.");
    dir.refuses_input("notes.txt", &["notes.txt"]);
}
