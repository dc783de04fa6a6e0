//! GGUF in parts and big-endian, and PyTorch's views and legacy files, through the commands.
//! `make.py` beside each file wrote it.

mod common;

use common::Dir;
use serde_json::Value;
use std::fs;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bitnet-formats/tests/data/");

/// A folder with copies of these files.
fn copies(files: &[&str]) -> Dir {
    let dir = Dir::new();
    for file in files {
        let name = file.rsplit('/').next().unwrap();
        dir.write(name, fs::read(format!("{DATA}{file}")).unwrap());
    }
    dir
}

#[test]
fn a_model_in_parts_is_the_model_in_one_file() {
    let parts = [1, 2, 3, 4].map(|i| format!("gguf/split/m-0000{i}-of-00004.gguf"));
    let mut files: Vec<&str> = parts.iter().map(String::as_str).collect();
    files.push("gguf/split/whole.gguf");
    let dir = copies(&files);
    dir.run(&["convert", "whole.gguf", "--out", "whole-out.gguf"])
        .is(0);
    for part in ["m-00001-of-00004.gguf", "m-00003-of-00004.gguf"] {
        let inspect = dir.run(&["inspect", part, "--json"]);
        let tensors = inspect.is(0).json()["tensors"].as_array().unwrap().len();
        assert_eq!(tensors, 5);
        dir.run(&["convert", part, "--out", "out.gguf", "--force"])
            .is(0);
        assert!(dir.read("out.gguf") == dir.read("whole-out.gguf"), "{part}");
        dir.run(&["verify", "out.gguf"]).is(0);
        dir.run(&["compare", part, "whole.gguf"]).is(0);
        // No part of the input is a target.
        let other = "m-00004-of-00004.gguf";
        dir.refuses(&["convert", part, "--out", other, "--force"], &[other]);
    }
    fs::remove_file(dir.at("m-00002-of-00004.gguf")).unwrap();
    for command in ["convert", "dequantize", "quantize"] {
        dir.refuses(
            &[command, "m-00001-of-00004.gguf", "--out", "o.gguf"],
            &["all 4 parts", "m-00002-of-00004.gguf"],
        );
    }
}

#[test]
fn a_big_endian_model_is_the_little_endian_one() {
    let dir = copies(&["gguf/big.gguf", "gguf/little.gguf"]);
    for order in ["big", "little"] {
        let (input, out) = (format!("{order}.gguf"), format!("{order}-out.gguf"));
        dir.run(&["convert", &input, "--out", &out]).is(0);
    }
    assert!(dir.read("big-out.gguf") == dir.read("little-out.gguf"));
    dir.run(&["inspect", "big.gguf"]).is(0);
    dir.run(&["compare", "big.gguf", "little.gguf"]).is(0);
    dir.run(&["verify", "big-out.gguf"]).is(0);
}

#[test]
fn views_and_legacy_files_of_pytorch() {
    let expected = fs::read(format!("{DATA}pytorch/expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    for (file, tensor) in [
        ("strided.bin", "part of permuted"),
        ("strided.bin", "repeated"),
        ("legacy.bin", "transposed"),
    ] {
        let dir = copies(&[&format!("pytorch/{file}")]);
        dir.run(&["convert", file, "--out", "out.safetensors"])
            .is(0);
        let written = hex(&dir.read("out.safetensors"));
        let bytes = expected[file][tensor]["bytes"].as_str().unwrap();
        assert!(written.contains(bytes), "{file} {tensor}");
    }
}
