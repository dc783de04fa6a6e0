//! ONNX folders. `tests/python/test_onnx.py` runs them in onnxruntime; here their parts are read by
//! the format's definition.

mod common;

use common::{Dir, f32s, gauss, safetensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Fields of a protobuf message: (number, value); a varint is its number, bytes are bytes.
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut n, mut shift) = (0, 0);
    loop {
        let (&byte, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        n |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return n;
        }
    }
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut found = vec![];
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut bytes)),
            kind => {
                let len = if kind == 5 {
                    4
                } else {
                    varint(&mut bytes) as usize
                };
                let (value, rest) = bytes.split_at(len);
                bytes = rest;
                Field::Bytes(value.to_vec())
            }
        };
        found.push((key >> 3, field));
    }
    found
}

fn all(message: &[u8], number: u64) -> Vec<Vec<u8>> {
    let bytes = |(n, field)| match field {
        Field::Bytes(bytes) if n == number => Some(bytes),
        _ => None,
    };
    fields(message).into_iter().filter_map(bytes).collect()
}

fn text(message: &[u8], number: u64) -> String {
    String::from_utf8(all(message, number).concat()).unwrap()
}

/// Name → (shape, offset, length) of the external tensors of a model.
fn external(model: &[u8]) -> BTreeMap<String, (Vec<u64>, usize, usize)> {
    let graph = all(model, 7).concat();
    let mut found = BTreeMap::new();
    for tensor in all(&graph, 5) {
        let entries: BTreeMap<_, _> = all(&tensor, 13)
            .iter()
            .map(|entry| (text(entry, 1), text(entry, 2)))
            .collect();
        if entries.is_empty() {
            continue;
        }
        assert_eq!(entries["location"], "model.onnx.data");
        let shape = fields(&tensor)
            .into_iter()
            .filter_map(|(n, field)| match field {
                Field::Number(dim) if n == 1 => Some(dim),
                _ => None,
            });
        let place = |key: &str| entries[key].parse().unwrap();
        let region = (shape.collect(), place("offset"), place("length"));
        assert!(found.insert(text(&tensor, 8), region).is_none());
    }
    found
}

fn operators(model: &[u8]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for node in all(&all(model, 7).concat(), 1) {
        *counts.entry(text(&node, 4)).or_default() += 1;
    }
    counts
}

/// A llama of one layer, its embedding as the head.
fn llama() -> Dir {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "hidden_act": "silu", "eos_token_id": 2,
    });
    let norm = |name| f32s(name, &[64], &[1.0; 64]);
    let dir = Dir::new();
    dir.write_json("model/config.json", &config);
    dir.write(
        "model/model.safetensors",
        safetensors(&[
            gauss("model.embed_tokens.weight", &[40, 64], 1.0),
            norm("model.norm.weight"),
            norm("model.layers.0.input_layernorm.weight"),
            norm("model.layers.0.post_attention_layernorm.weight"),
            gauss("model.layers.0.self_attn.q_proj.weight", &[64, 64], 0.1),
            gauss("model.layers.0.self_attn.k_proj.weight", &[32, 64], 0.1),
            gauss("model.layers.0.self_attn.v_proj.weight", &[32, 64], 0.1),
            gauss("model.layers.0.self_attn.o_proj.weight", &[64, 64], 0.1),
            gauss("model.layers.0.mlp.gate_proj.weight", &[96, 64], 0.1),
            gauss("model.layers.0.mlp.up_proj.weight", &[96, 64], 0.1),
            gauss("model.layers.0.mlp.down_proj.weight", &[64, 96], 0.1),
        ]),
    );
    dir
}

fn export(dir: &Dir, from: &str, to: &str) {
    dir.run(&["convert", from, "--format", "onnx", "--out", to])
        .is(0);
}

#[test]
fn the_graph_refers_to_the_bytes_of_the_data() {
    let dir = llama();
    let quantize = [
        "quantize",
        "model",
        "--out",
        "q",
        "--granularity",
        "group:32",
    ];
    dir.run(&[&quantize[..], &["--rule", "*embed*=int4"]].concat())
        .is(0);
    export(&dir, "q", "o");
    let (model, data) = (dir.read("o/model.onnx"), dir.read("o/model.onnx.data"));
    let counts = operators(&model);
    for (operator, count) in [
        ("MatMulNBits", 8),
        ("GatherBlockQuantized", 1),
        ("GroupQueryAttention", 1),
        ("SkipSimplifiedLayerNormalization", 2),
        ("RMSNormalization", 1),
    ] {
        assert_eq!(
            counts.get(operator),
            Some(&count),
            "{operator} in {counts:?}"
        );
    }
    let header_len = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&data[8..8 + header_len]).unwrap();
    let external = external(&model);
    for (name, (shape, offset, len)) in &external {
        // The rows of the embedding are the same bytes as the codes of the head.
        let stored = &header[name.trim_end_matches("_rows")];
        let at = |i: usize| 8 + header_len + stored["data_offsets"][i].as_u64().unwrap() as usize;
        assert_eq!((*offset, offset + len), (at(0), at(1)), "{name}");
        let bytes = match &stored["dtype"] {
            Value::String(dtype) if dtype == "U8" => 1,
            _ => 4,
        };
        assert_eq!(
            shape.iter().product::<u64>() as usize * bytes,
            *len,
            "{name}"
        );
    }
    let tensors = header.as_object().unwrap().len() - 1;
    assert_eq!(external.len(), tensors + 2);
    // Trits −1, 0, 1 are codes 1, 2, 3.
    let (_, start, len) = &external["model.layers.0.mlp.up_proj.weight_codes"];
    let codes = data[*start..start + len].iter();
    assert!(
        codes
            .flat_map(|b| [b & 3, b >> 2 & 3, b >> 4 & 3, b >> 6])
            .all(|code| code > 0)
    );
    let (_, start, _) = &external["cos_cache"];
    assert_eq!(data[*start..start + 4], 1.0f32.to_le_bytes());
}

#[test]
fn the_same_bytes_and_what_may_be_replaced() {
    let dir = llama();
    export(&dir, "model", "one");
    dir.run(&[
        "convert",
        "model",
        "--format",
        "onnx",
        "--out",
        "two",
        "--threads",
        "1",
    ])
    .is(0);
    let names = [
        "config.json",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
    ];
    for name in names {
        assert_eq!(
            dir.read(&format!("one/{name}")),
            dir.read(&format!("two/{name}")),
            "{name}"
        );
    }
    let again = ["convert", "model", "--format", "onnx", "--out", "one"];
    dir.refuses(&again, &["exists already", "--force"]);
    dir.write("one/mine.txt", "mine");
    dir.run(&["quantize", "model", "--out", "q"]).is(0);
    dir.run(&[
        "convert", "q", "--format", "onnx", "--out", "one", "--force",
    ])
    .is(0);
    assert_ne!(dir.read("one/model.onnx"), dir.read("two/model.onnx"));
    dir.run(&[&again[..], &["--force"]].concat()).is(0);
    assert_eq!(
        dir.read("one/model.onnx.data"),
        dir.read("two/model.onnx.data")
    );
    assert_eq!(dir.read("one/mine.txt"), b"mine");
    // An ONNX folder gives way to another model, and leaves nothing of its own.
    dir.run(&["convert", "model", "--out", "one", "--force"])
        .is(0);
    assert!(!dir.at("one/model.onnx").exists() && dir.at("one/model.safetensors").exists());
}

#[test]
fn what_onnx_cannot_hold_is_refused_with_the_next_step() {
    let dir = llama();
    let onnx = |from: &'static str| ["convert", from, "--format", "onnx", "--out", "o"];
    dir.run(&[
        "quantize",
        "model",
        "--out",
        "groups",
        "--granularity",
        "group:24",
    ])
    .is(0);
    dir.refuses(&onnx("groups"), &["_proj", "groups of 24", "dequantize"]);
    dir.run(&["quantize", "model", "--out", "planes", "--planes", "2"])
        .is(0);
    dir.refuses(&onnx("planes"), &["_proj", "2 trit planes", "--planes 1"]);
    dir.refuses(
        &["quantize", "model", "--format", "onnx", "--out", "o"],
        &["onnx takes a model as it is", "bitnet convert"],
    );
    dir.refuses(
        &["convert", "model", "--out", "model.onnx"],
        &["ONNX is a folder", "--format onnx --out model"],
    );
    dir.refuses(
        &[
            "convert",
            "model",
            "--format",
            "onnx",
            "--out",
            "m.safetensors",
        ],
        &["format onnx writes a folder"],
    );
    dir.refuses(&onnx("model/model.safetensors"), &["config.json"]);
    export(&dir, "model", "written");
    dir.refuses(&["inspect", "written"], &["ONNX", "does not read"]);

    let mut config: Value = serde_json::from_slice(&dir.read("model/config.json")).unwrap();
    config["intermediate_size"] = 95.into();
    dir.write_json("model/config.json", &config);
    dir.refuses(&onnx("model"), &["gate_proj", "[95, 64]", "[96, 64]"]);
    config["num_attention_heads"] = 8.into();
    dir.write_json("model/config.json", &config);
    dir.refuses(&onnx("model"), &["head_dim", "a multiple of 16", "got 8"]);
    config["num_attention_heads"] = 4.into();
    config["num_hidden_layers"] = 2.into();
    config["intermediate_size"] = 96.into();
    dir.write_json("model/config.json", &config);
    dir.refuses(
        &onnx("model"),
        &["model.layers.1.input_layernorm.weight", "none"],
    );
}

#[test]
fn float_activations_are_said() {
    let dir = llama();
    dir.run(&["quantize", "model", "--format", "hf-bitnet", "--out", "hf"])
        .is(0);
    let run = dir.run(&["convert", "hf", "--format", "onnx", "--out", "o", "--quiet"]);
    run.is(0);
    assert!(
        run.stdout().contains("float activations"),
        "{}",
        run.stdout()
    );
}
