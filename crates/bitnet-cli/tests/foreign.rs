//! Models that other programs quantized: listed always, read where the method is known, and
//! otherwise refused by name. Nothing packed goes into a result.

mod common;

use common::{Dir, T, f32s, gauss, safetensors};
use serde_json::{Value, json};

const GOLDEN: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../bitnet-formats/tests/data/foreign"
);

/// A tensor of `p.` with zero bytes.
fn zeros(name: &'static str, dtype: &'static str, shape: &[usize], bytes: usize) -> T {
    T(name, dtype, shape.to_vec(), vec![0; bytes])
}

/// A folder `m` of these tensors beside one of floats.
fn folder(config: &Value, mut tensors: Vec<T>) -> Dir {
    let dir = Dir::new();
    tensors.push(gauss("other.weight", &[8, 32], 0.02));
    dir.write("m/model.safetensors", safetensors(&tensors));
    dir.write_json("m/config.json", config);
    dir
}

/// `inspect` names it, and whatever needs its values is refused with `parts`.
#[track_caller]
fn listed_and_refused(dir: &Dir, what: &str, parts: &[&str]) {
    let inspect = dir.run(&["inspect", "m"]);
    inspect.is(0);
    let out = inspect.stdout();
    assert!(
        out.lines()
            .any(|l| l.starts_with("note: ") && l.contains(what)),
        "{out}"
    );
    assert!(out.contains("quantized already: "), "{out}");
    dir.run(&["inspect", "m", "--headers"]).is(0);
    for command in ["quantize", "convert", "dequantize"] {
        for to in ["o", "o.safetensors"] {
            dir.refuses(&[command, "m", "--out", to], parts);
            dir.refuses(&[command, "m", "--out", to], &[what]);
        }
    }
    dir.refuses(&["compare", "m", "m"], &[what]);
    dir.refuses(&["run", "m", "--prompt", "a"], &[what]);
    dir.refuses(&["bench", "m"], &[what]);
}

fn gptq() -> Vec<T> {
    vec![
        zeros("p.qweight", "I32", &[4, 8], 128),
        zeros("p.qzeros", "I32", &[1, 1], 4),
        zeros("p.scales", "F16", &[1, 8], 16),
        zeros("p.g_idx", "I32", &[32], 128),
    ]
}

#[test]
fn bitsandbytes_is_refused_by_name() {
    let nf4 = [
        zeros("p.weight", "U8", &[128, 1], 128),
        zeros("p.weight.absmax", "F32", &[4], 16),
        zeros("p.weight.quant_map", "F32", &[16], 64),
        zeros("p.weight.quant_state.bitsandbytes__nf4", "U8", &[9], 9),
    ];
    for config in [
        json!({}),
        json!({"quantization_config": {"quant_method": "bitsandbytes"}}),
    ] {
        let dir = folder(&config, nf4.iter().map(copy).collect());
        listed_and_refused(&dir, "bitsandbytes", &["1 matrix is", "'p.weight'"]);
    }
    let int8 = vec![
        zeros("p.weight", "I8", &[8, 32], 256),
        zeros("p.SCB", "F32", &[8], 32),
    ];
    listed_and_refused(&folder(&json!({}), int8), "bitsandbytes", &["'p.weight'"]);
}

fn copy(T(name, dtype, shape, bytes): &T) -> T {
    T(name, dtype, shape.clone(), bytes.clone())
}

#[test]
fn four_bit_floats_are_refused_by_name() {
    let mxfp4 = vec![
        zeros("p.gate_up_proj_blocks", "U8", &[2, 8, 2, 16], 512),
        zeros("p.gate_up_proj_scales", "U8", &[2, 8, 2], 32),
    ];
    listed_and_refused(&folder(&json!({}), mxfp4), "MXFP4", &["'p.gate_up_proj'"]);
    let nvfp4 = vec![
        zeros("p.weight", "U8", &[8, 16], 128),
        zeros("p.weight_scale", "F8_E4M3", &[8, 2], 16),
        zeros("p.weight_scale_2", "F32", &[1], 4),
    ];
    listed_and_refused(&folder(&json!({}), nvfp4), "NVFP4", &["'p.weight'"]);
}

#[test]
fn an_unknown_method_is_refused_by_its_name() {
    let hqq = || {
        vec![
            zeros("p.W_q", "U8", &[8, 16], 128),
            zeros("q.W_q", "U8", &[8, 16], 128),
            zeros("ids", "I64", &[1, 4], 32),
        ]
    };
    let config = json!({"quantization_config": {"quant_method": "hqq"}});
    listed_and_refused(
        &folder(&config, hqq()),
        "2 matrices are packed",
        &["quant_method 'hqq'", "dequantize it with"],
    );
    let words = vec![zeros("p.q_weight", "I32", &[4, 8], 128)];
    listed_and_refused(&folder(&json!({}), words), "1 matrix is packed", &["I32"]);
}

#[test]
fn parts_that_disagree_are_named() {
    let mut parts = gptq();
    parts[2] = zeros("p.scales", "F16", &[1, 16], 32);
    listed_and_refused(
        &folder(&json!({}), parts),
        "shapes of its parts disagree",
        &[
            "'p.qweight' I32 [4, 8]",
            "'p.scales' F16 [1, 16]",
            "'p.qzeros'",
        ],
    );
    let config = json!({"quantization_config": {"quant_method": "gptq", "bits": 8}});
    listed_and_refused(
        &folder(&config, gptq()),
        "GPTQ",
        &["the config says 8 bits", "say 4"],
    );
    let fp8 = vec![
        zeros("p.weight", "F8_E4M3", &[8, 32], 256),
        zeros("p.weight_scale_inv", "F32", &[3, 1], 12),
    ];
    listed_and_refused(
        &folder(&json!({}), fp8),
        "FP8",
        &[
            "'p.weight' F8_E4M3 [8, 32]",
            "'p.weight_scale_inv' F32 [3, 1]",
        ],
    );
}

#[test]
fn mlx_needs_the_config_for_its_bits() {
    let parts = vec![
        zeros("p.weight", "U32", &[8, 8], 256),
        zeros("p.scales", "F16", &[8, 2], 32),
        zeros("p.biases", "F16", &[8, 2], 32),
    ];
    listed_and_refused(&folder(&json!({}), parts), "MLX", &["config.json"]);
}

#[test]
fn a_group_of_gptq_that_does_not_exist_is_an_error() {
    let mut parts = gptq();
    parts[3].3[4] = 7;
    folder(&json!({}), parts).refuses(
        &["dequantize", "m", "--out", "o.safetensors"],
        &["'p.g_idx'", "groups below 1", "7"],
    );
}

/// The data of a tensor of a safetensors file that holds nothing packed.
fn floats(file: &[u8], name: &str) -> Vec<u8> {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + len]).unwrap();
    for (name, tensor) in header.as_object().unwrap() {
        assert!(
            name == "__metadata__" || tensor["dtype"] == "F32",
            "{name}: {tensor}"
        );
    }
    let at = |i: usize| 8 + len + header[name]["data_offsets"][i].as_u64().unwrap() as usize;
    file[at(0)..at(1)].to_vec()
}

#[test]
fn the_version_of_gptq_is_said_where_it_is_assumed() {
    let dir = Dir::new();
    for (name, assumed) in [("gptq-4", true), ("gptq-v2", false), ("awq", false)] {
        let inspect = dir.run(&["inspect", &format!("{GOLDEN}/{name}")]);
        let said = inspect
            .is(0)
            .stdout()
            .contains("no config names the checkpoint_format");
        assert_eq!(said, assumed, "{name}");
    }
}

#[test]
fn known_methods_become_floats_and_leave_no_trace() {
    const WEIGHT: &str = "model.layers.0.mlp.up_proj.weight";
    let dir = Dir::new();
    for name in [
        "gptq-4",
        "awq",
        "mlx-3",
        "compressed-tensors-4",
        "fp8-block",
    ] {
        let model = format!("{GOLDEN}/{name}");
        let file = format!("{name}.safetensors");
        let run = dir.run(&["dequantize", &model, "--out", &file, "--quiet"]);
        run.is(0);
        assert!(
            run.stdout().contains("quantized already"),
            "{}",
            run.stdout()
        );
        let bytes = dir.read(&file);
        assert_eq!(floats(&bytes, WEIGHT), floats(&bytes, "expected"), "{name}");
        dir.run(&["convert", &model, "--out", name]).is(0);
        let bytes = dir.read(&format!("{name}/model.safetensors"));
        assert_eq!(floats(&bytes, WEIGHT), floats(&bytes, "expected"), "{name}");
        let config: Value =
            serde_json::from_slice(&dir.read(&format!("{name}/config.json"))).unwrap();
        assert_eq!(config, json!({}), "{name}");
        dir.run(&["compare", &model, name]).is(0);
        let low = format!("{name}-low.safetensors");
        dir.run(&["quantize", &model, "--include", WEIGHT, "--out", &low])
            .is(0);
        dir.run(&["verify", &low]).is(0);
    }
}

#[test]
fn the_config_beside_the_model_is_read_and_not_copied() {
    let dir = folder(&json!({}), gptq());
    dir.write_json(
        "m/quantize_config.json",
        &json!({"bits": 4, "group_size": 32}),
    );
    dir.run(&["convert", "m", "--out", "o"]).is(0);
    assert!(!dir.at("o/quantize_config.json").exists());
    dir.write_json(
        "m/quantize_config.json",
        &json!({"bits": 2, "group_size": 32}),
    );
    dir.refuses(&["convert", "m", "--out", "p"], &["the config says 2 bits"]);
}

#[test]
fn f8_without_scales_are_floats() {
    let dir = Dir::new();
    // 1, -2 and 448; the smallest.
    let bytes = [0x38, 0xc0, 0x7e, 0x01].repeat(64);
    let f8 = T("a.weight", "F8_E4M3", vec![8, 32], bytes);
    dir.write("m.safetensors", safetensors(&[f8, f32s("b", &[1], &[1.0])]));
    dir.run(&["dequantize", "m.safetensors", "--out", "o.safetensors"])
        .is(0);
    let expected: Vec<u8> = [1.0f32, -2.0, 448.0, 2f32.powi(-9)]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    assert_eq!(
        floats(&dir.read("o.safetensors"), "a.weight"),
        expected.repeat(64)
    );
    dir.run(&["quantize", "m.safetensors", "--out", "q.safetensors"])
        .is(0);
}
