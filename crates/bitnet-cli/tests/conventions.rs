//! Scale conventions, biases, metadata and other places where a file can say something else than it
//! seems to.

mod common;

use common::{Dir, T, f32s, gauss, llama, safetensors};
use serde_json::{Value, json};
use std::io::Read;
use std::process::Stdio;

fn bf16(name: &'static str, shape: &[usize], weights: &[f32]) -> T {
    T(
        name,
        "BF16",
        shape.to_vec(),
        weights
            .iter()
            .flat_map(|w| ((w.to_bits() >> 16) as u16).to_le_bytes())
            .collect(),
    )
}

/// A folder as b1.58-2B-4T is: autobitlinear, a bf16 scale that is no power of two, and none of our
/// documents.
fn autobitlinear(scale: f32) -> Dir {
    let dir = Dir::new();
    let codes: Vec<u8> = (0..2 * 64)
        .map(|i| [0x58, 0x21, 0x86, 0x19][i % 4] & 0xaa | [0, 1, 4, 16][i % 4])
        .map(valid)
        .collect();
    dir.write_json(
        "m/config.json",
        &json!({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}),
    );
    let tensors = [
        T("a.weight", "U8", vec![2, 64], codes),
        bf16("a.weight_scale", &[1], &[scale]),
    ];
    dir.write("m/model.safetensors", safetensors(&tensors));
    dir
}

/// The byte with every code 3 made 2.
fn valid(byte: u8) -> u8 {
    (0..4).fold(0, |b, f| b | ((byte >> (2 * f) & 3).min(2)) << (2 * f))
}

fn exact(dir: &Dir, a: &str, b: &str) -> bool {
    dir.run(&["compare", a, b, "--json"]).is(0).json()["all"]["exact"] == true
}

#[test]
fn scales_that_are_no_powers_of_two_survive_both_conventions() {
    // 1.1640625 and 0.0214844 are bf16 numbers.
    for scale in [1.1640625, 0.021484375] {
        let dir = autobitlinear(scale);
        dir.run(&[
            "convert",
            "m",
            "--out",
            "bit",
            "--format",
            "hf-bitnet",
            "--linear-class",
            "bitlinear",
        ])
        .is(0);
        for folder in ["m", "bit"] {
            dir.run(&["inspect", folder]).is(0);
        }
        // An f32 whose inverse is the scale exactly need not exist; the last bit may differ, and
        // nothing else.
        let error = dir.run(&["compare", "m", "bit", "--json"]).is(0).json()["all"]["max_error"]
            .as_f64()
            .unwrap();
        assert!(error <= f64::from(scale) * 1.2e-7, "{error}");
        dir.run(&[
            "convert",
            "bit",
            "--out",
            "again",
            "--format",
            "hf-bitnet",
            "--linear-class",
            "autobitlinear",
        ])
        .is(0);
        assert!(exact(&dir, "m", "again"), "there and back");
        dir.run(&[
            "convert",
            "bit",
            "--out",
            "same",
            "--format",
            "hf-bitnet",
            "--linear-class",
            "bitlinear",
        ])
        .is(0);
        assert!(exact(&dir, "bit", "same"), "the same convention");
    }
}

#[test]
fn a_gguf_with_one_scale_becomes_a_bitlinear_folder() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.run(&[
        "quantize",
        "m",
        "--out",
        "g.gguf",
        "--granularity",
        "tensor",
    ])
    .is(0);
    dir.run(&["convert", "g.gguf", "--out", "h", "--format", "hf-bitnet"])
        .is(0);
    dir.run(&["verify", "h"]).is(0);
    let run = dir.run(&["compare", "g.gguf", "h", "--json"]);
    for tensor in run.is(0).json()["tensors"].as_array().unwrap() {
        let (mse, name) = (
            tensor["mse"].as_f64().unwrap(),
            tensor["name"].as_str().unwrap().to_string(),
        );
        assert!(mse < 1e-14, "{name}: {mse}");
    }
}

#[test]
fn a_bias_under_autobitlinear_is_refused_both_ways() {
    let dir = Dir::new();
    dir.write(
        "m/model.safetensors",
        safetensors(&[
            gauss("a.weight", &[8, 64], 0.02),
            f32s("a.bias", &[8], &[0.5; 8]),
        ]),
    );
    dir.write_json("m/config.json", &json!({}));
    dir.refuses(
        &[
            "quantize",
            "m",
            "--out",
            "q",
            "--format",
            "hf-bitnet",
            "--linear-class",
            "autobitlinear",
        ],
        &[
            "m/model.safetensors",
            "'a.weight'",
            "'a.bias'",
            "autobitlinear",
        ],
    );
    dir.run(&["quantize", "m", "--out", "q", "--format", "hf-bitnet"])
        .is(0);
    let mut config: Value = serde_json::from_slice(&dir.read("q/config.json")).unwrap();
    config["quantization_config"]["linear_class"] = "autobitlinear".into();
    // Without our document: somebody else's folder.
    let scale = f32s("a.weight_scale", &[1], &[0.02]);
    let packed = T("a.weight", "U8", vec![2, 64], vec![0x55; 128]);
    dir.write(
        "f/model.safetensors",
        safetensors(&[packed, scale, f32s("a.bias", &[8], &[0.5; 8])]),
    );
    dir.write_json("f/config.json", &config);
    dir.refuses_input("f", &["f/model.safetensors", "'a.bias'", "autobitlinear"]);
}

#[test]
fn an_extra_norm_is_refused() {
    let dir = autobitlinear(1.0);
    let config = json!({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": true}});
    dir.write_json("m/config.json", &config);
    dir.refuses_input("m", &["m/config.json", "use_rms_norm", "true"]);
}

#[test]
fn the_scale_type_of_a_folder_is_the_model_s() {
    let dir = autobitlinear(1.0);
    dir.refuses(
        &[
            "quantize",
            "m",
            "--out",
            "q",
            "--format",
            "hf-bitnet",
            "--scale-dtype",
            "f32",
        ],
        &["bf16", "f32"],
    );
}

#[test]
fn floats_that_a_type_cannot_hold_are_named() {
    let dir = Dir::new();
    dir.write(
        "in.safetensors",
        safetensors(&[f32s("a.weight", &[2, 2], &[1.0, 2.0, 1e6, 3.0])]),
    );
    dir.refuses(
        &[
            "dequantize",
            "in.safetensors",
            "--out",
            "o.safetensors",
            "--dtype",
            "f16",
        ],
        &["in.safetensors", "'a.weight'", "weight 2", "1000000"],
    );
    dir.run(&[
        "dequantize",
        "in.safetensors",
        "--out",
        "o.safetensors",
        "--dtype",
        "bf16",
    ])
    .is(0);
}

#[test]
fn metadata_and_files_beside_are_proven_too() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.run(&["quantize", "m", "--out", "q"]).is(0);
    dir.run(&["verify", "q"]).is(0);
    let config = String::from_utf8(dir.read("q/config.json")).unwrap();
    dir.write("q/config.json", config.replace("256", "257"));
    assert!(
        dir.run(&["verify", "q"])
            .is(1)
            .stdout()
            .contains("config.json")
    );
    dir.write("q/config.json", &config);
    dir.run(&["verify", "q"]).is(0);
    dir.run(&["quantize", "m", "--out", "q.gguf"]).is(0);
    dir.run(&["verify", "q.gguf"]).is(0);
    let mut file = dir.read("q.gguf");
    let key = b"llama.rope.freq_base";
    let at = file.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    file[at..at + 4].copy_from_slice(&123.0f32.to_le_bytes());
    dir.write("q.gguf", &file);
    assert!(
        dir.run(&["verify", "q.gguf"])
            .is(1)
            .stdout()
            .contains("metadata")
    );
}

#[test]
fn a_tensor_that_another_program_retyped_is_noticed() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.run(&["quantize", "m", "--out", "q.gguf", "--precision", "int4"])
        .is(0);
    let mut file = dir.read("q.gguf");
    let name = b"blk.0.attn_v.weight";
    let at = file.windows(name.len()).rposition(|w| w == name).unwrap() + name.len() + 4 + 16;
    assert_eq!(file[at..at + 4], 2u32.to_le_bytes(), "Q4_0");
    // IQ4_NL: blocks of the same size with another meaning.
    file[at..at + 4].copy_from_slice(&20u32.to_le_bytes());
    dir.write("q.gguf", &file);
    dir.refuses(
        &["inspect", "q.gguf"],
        &["q.gguf", "'blk.0.attn_v.weight'", "Q4_0", "IQ4_NL"],
    );
    // With other bytes it is what its type says: llama-quantize keeps the document. Still, it is
    // not what was written.
    let name = "blk.0.attn_v.weight";
    let original = dir.run(&["quantize", "m", "--out", "o.gguf", "--precision", "int4"]);
    original.is(0);
    let source = bitnet_formats::Source::open(&dir.at("o.gguf")).unwrap();
    let stored = source.stored(source.find_stored(name).unwrap());
    file[stored.offset as usize + 5] ^= 1;
    dir.write("q.gguf", &file);
    let run = dir.run(&["inspect", "q.gguf", "--json"]);
    let document = run.is(0).json();
    let notes = document["notes"].to_string();
    assert!(
        notes.contains("rewritten 1 tensors") && notes.contains(name),
        "{notes}"
    );
    let tensors = document["tensors"].as_array().unwrap();
    let tensor = tensors.iter().find(|t| t["name"] == name).unwrap();
    assert_eq!(tensor["stored_as"], "IQ4_NL");
    dir.run(&["verify", "q.gguf"]).is(1);
}

#[test]
fn a_part_that_does_not_say_which_it_is() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.run(&["quantize", "m", "--out", "q.gguf"]).is(0);
    // The head of a version 3 file with one u16 key and no tensor.
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend(0u64.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    file.extend(11u64.to_le_bytes());
    file.extend(b"split.count");
    file.extend(2u32.to_le_bytes());
    file.extend(3u16.to_le_bytes());
    dir.write("part.gguf", &file);
    dir.refuses(
        &["inspect", "part.gguf"],
        &["part.gguf", "split.no", "below the 3 of split.count"],
    );
}

#[test]
fn a_folder_with_other_things_in_it_is_not_replaced() {
    let dir = Dir::new();
    llama(&dir, "m");
    llama(&dir, "q");
    dir.write("q/src/a.txt", "mine");
    dir.refuses(
        &["quantize", "m", "--out", "q", "--force"],
        &["q", "a directory with src"],
    );
}

#[test]
fn names_do_not_steer_the_terminal() {
    let dir = Dir::new();
    dir.write(
        "in.safetensors",
        safetensors(&[gauss("a\n\u{1b}[31mOK b.weight", &[4, 8], 1.0)]),
    );
    let run = dir.run(&["inspect", "in.safetensors"]);
    assert!(
        !run.is(0).stdout().contains('\u{1b}') && run.stdout().contains("\\u{1b}"),
        "{}",
        run.stdout()
    );
}

#[test]
fn a_reader_that_leaves_does_not_turn_no_into_yes() {
    let dir = Dir::new();
    let tensors: Vec<T> = (0..3000)
        .map(|i| T(format!("{i}.weight").leak(), "F32", vec![1, 1], vec![0; 4]))
        .collect();
    dir.write("in.safetensors", safetensors(&tensors));
    let mut child = dir
        .command(&[
            "compare",
            "in.safetensors",
            "in.safetensors",
            "--max-bpw=-1",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn columns_that_no_block_divides_stay_exact_floats_in_a_converted_gguf() {
    let dir = Dir::new();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/glassllm-en");
    dir.run(&["quantize", model, "--out", "h", "--format", "hf-bitnet"])
        .is(0);
    let run = dir.run(&["convert", "h", "--out", "g.gguf"]);
    assert!(
        run.is(0).stdout().contains("341 columns") && run.stdout().contains("kept exactly, as F32"),
        "{}",
        run.stdout()
    );
    // The scales of the packed ones are rounded to f16, which a note says; the others are equal to
    // the bit.
    let run = dir.run(&["compare", "h", "g.gguf", "--json"]);
    for tensor in run.is(0).json()["tensors"].as_array().unwrap() {
        let name = tensor["name"].as_str().unwrap();
        assert!(
            tensor["stored_as"] != "F32" || tensor["exact"] == true,
            "{name}"
        );
        assert!(tensor["cosine"].as_f64().unwrap() > 0.999999, "{name}");
    }
    // A layout that is named is not replaced.
    dir.refuses(
        &["convert", "h", "--out", "n.gguf", "--layout", "q2_0"],
        &["down_proj", "q2_0", "341 columns"],
    );
}
