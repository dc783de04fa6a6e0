//! Matrices that other programs quantized, against the floats that their own readers make of them:
//! `scripts/make-foreign-golden.py` and `scripts/make-foreign-golden-experts.py` wrote both.

use bitnet_formats::{Content, Source};
use std::path::{Path, PathBuf};

const WEIGHT: &str = "model.layers.0.mlp.up_proj.weight";

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/foreign")
        .join(name)
}

fn floats(source: &Source, name: &str, range: std::ops::Range<usize>) -> Vec<f32> {
    let Content::Float(stored) = source.find(name).unwrap().content else {
        panic!("{name}: {:?}", source.notes());
    };
    let mut out = vec![0.0; range.len()];
    source
        .read_floats(stored, range, &mut vec![], &mut out)
        .unwrap();
    out
}

/// Checks a golden folder and returns the type of its matrix.
fn check(name: &str) -> String {
    check_tensor(name, WEIGHT, &[32, 64])
}

fn check_tensor(name: &str, weight: &str, shape: &[usize]) -> String {
    let source = Source::open(&folder(name)).unwrap();
    // The parts are no tensors of the model.
    assert_eq!(source.tensors().len(), 2, "{name}");
    assert_eq!(source.find("expected").unwrap().shape, shape, "{name}");
    assert_eq!(source.find(weight).unwrap().shape, shape, "{name}");
    let n = shape.iter().product();
    let expected = floats(&source, "expected", 0..n);
    assert_eq!(floats(&source, weight, 0..n), expected, "{name}");
    // A range need not begin or end with a row.
    let part = 70..n - 100;
    assert_eq!(
        floats(&source, weight, part.clone()),
        expected[part],
        "{name}"
    );
    source.refuse_undecoded().unwrap();
    let stored = source.find_stored(weight).unwrap();
    // Its bytes are several tensors.
    assert!(source.read_all(stored).is_err());
    assert_eq!(source.notes().len(), 1, "{:?}", source.notes());
    source.stored(stored).dtype.to_string()
}

#[test]
fn gptq_of_2_3_4_and_8_bits_as_autogptq_reads_it() {
    for bits in [2, 3, 4, 8] {
        assert_eq!(
            check(&format!("gptq-{bits}")),
            format!("GPTQ {bits}-bit group 32")
        );
    }
}

#[test]
fn gptq_v2_stores_zero_points_as_they_are() {
    assert_eq!(check("gptq-v2"), "GPTQ 4-bit group 32");
}

#[test]
fn awq_as_autoawq_reads_it() {
    assert_eq!(check("awq"), "AWQ 4-bit group 32");
}

#[test]
fn mlx_as_mlx_reads_it() {
    for bits in [2, 3, 4, 5, 6, 8] {
        assert_eq!(
            check(&format!("mlx-{bits}")),
            format!("MLX {bits}-bit group 32")
        );
    }
}

#[test]
fn compressed_tensors_as_their_package_reads_them() {
    for bits in [3, 4, 8] {
        let got = check(&format!("compressed-tensors-{bits}"));
        assert_eq!(got, format!("compressed-tensors {bits}-bit group 32"));
    }
}

#[test]
fn fp8_with_scales_of_blocks_rows_and_the_tensor() {
    assert_eq!(check("fp8-block"), "FP8 8-bit group 32");
    assert_eq!(check("fp8-row"), "FP8 8-bit");
    assert_eq!(check("fp8-tensor"), "FP8 8-bit");
}

#[test]
fn compressed_tensors_with_an_order_of_groups() {
    // The index of the second was never set.
    for name in ["compressed-tensors-order", "compressed-tensors-no-order"] {
        assert_eq!(check(name), "compressed-tensors 4-bit group 32");
    }
}

/// As versions up to 0.17 packed: no code crosses a word.
#[test]
fn compressed_tensors_in_whole_words() {
    for bits in [3, 5, 6, 7] {
        let got = check(&format!("compressed-tensors-words-{bits}"));
        assert_eq!(got, format!("compressed-tensors {bits}-bit group 32"));
    }
}

#[test]
fn stacked_experts_of_mlx() {
    let weight = "model.layers.0.mlp.switch_mlp.up_proj.weight";
    for bits in [4, 6] {
        let got = check_tensor(&format!("mlx-experts-{bits}"), weight, &[4, 32, 64]);
        assert_eq!(got, format!("MLX {bits}-bit group 32"));
    }
}

#[test]
fn stacked_experts_in_fp8() {
    let weight = "model.layers.0.mlp.experts.up_proj";
    for (name, group) in [
        ("block", " group 32"),
        ("row", ""),
        ("column", " group 1"),
        ("tensor", ""),
        ("each", ""),
    ] {
        let got = check_tensor(&format!("fp8-experts-{name}"), weight, &[4, 32, 64]);
        assert_eq!(got, format!("FP8 8-bit{group}"), "{name}");
    }
}
