//! Which weights are quantized by default, and along which dimension: by shape and config.json.

mod common;

use common::{Dir, T, f32s, gauss, safetensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The layout, or the float type, of each tensor of a checkpoint.
fn stored(dir: &Dir, name: &str) -> BTreeMap<String, String> {
    let report = dir.run(&["inspect", name, "--headers", "--json"]).json();
    let tensors = report["tensors"].as_array().unwrap().iter();
    let text = |v: &Value| v.as_str().unwrap().to_string();
    tensors
        .map(|t| (text(&t["name"]), text(&t["stored_as"])))
        .collect()
}

/// The names that are no floats.
fn quantized(dir: &Dir, name: &str) -> Vec<String> {
    let stored = stored(dir, name).into_iter();
    stored
        .filter(|(_, what)| what != "F32")
        .map(|(name, _)| name)
        .collect()
}

/// A folder `m` with these matrices of 1024 weights or fewer.
fn folder(config: &Value, matrices: &[(&'static str, &[usize])]) -> Dir {
    let dir = Dir::new();
    let tensors: Vec<T> = matrices
        .iter()
        .map(|&(name, shape)| gauss(name, shape, 0.02))
        .collect();
    dir.write("m/model.safetensors", safetensors(&tensors))
        .write_json("m/config.json", config);
    dir
}

#[test]
fn embeddings_heads_and_routers_stay_under_any_name() {
    let dir = folder(
        &json!({
            "architectures": ["XForSequenceClassification"], "vocab_size": 100, "n_positions": 24,
            "id2label": {"0": "a", "1": "b", "2": "c"}, "num_experts": 8,
            "relative_attention_num_buckets": 20,
        }),
        &[
            ("shared.weight", &[100, 64]),
            ("wpe.weight", &[24, 64]),
            ("cls.decoder.weight", &[100, 64]),
            ("turned.weight", &[64, 100]),
            ("score.weight", &[3, 64]),
            ("dense.weight", &[64, 64]),
            ("block.0.att.table.weight", &[20, 4]),
            ("block.0.att.q.weight", &[64, 64]),
            ("block.0.mlp.picker.weight", &[8, 64]),
            ("block.0.mlp.shared_picker.weight", &[1, 64]),
            ("block.0.mlp.experts.0.up.weight", &[8, 64]),
        ],
    );
    dir.run(&["quantize", "m", "--out", "q"]).is(0);
    let layers = [
        "block.0.att.q.weight",
        "block.0.mlp.experts.0.up.weight",
        "dense.weight",
    ];
    assert_eq!(quantized(&dir, "q"), layers);
    // A rule and an own selection come first.
    dir.run(&["quantize", "m", "--out", "r", "--rule", "shared*=int8"])
        .is(0);
    assert!(quantized(&dir, "r").contains(&"shared.weight".into()));
    dir.run(&["quantize", "m", "--out", "i", "--include", "wpe.*"])
        .is(0);
    assert_eq!(quantized(&dir, "i"), ["wpe.weight"]);
}

#[test]
fn a_vocabulary_is_seen_without_a_config() {
    let dir = Dir::new();
    let file = |inner: &[usize]| {
        safetensors(&[
            gauss("emb.weight", &[100, 64], 0.02),
            gauss("head.weight", &[100, 64], 0.02),
            gauss("blocks.0.key.weight", inner, 0.02),
        ])
    };
    dir.write("a.safetensors", file(&[64, 64]))
        .write("b.safetensors", file(&[100, 64]));
    dir.run(&["quantize", "a.safetensors", "--out", "qa.safetensors"])
        .is(0);
    assert_eq!(quantized(&dir, "qa.safetensors"), ["blocks.0.key.weight"]);
    // Layers have that size too: it proves nothing.
    dir.run(&["quantize", "b.safetensors", "--out", "qb.safetensors"])
        .is(0);
    assert_eq!(quantized(&dir, "qb.safetensors").len(), 3);
}

#[test]
fn the_share_of_floats_is_said_with_the_rule_that_changes_it() {
    let dir = Dir::new();
    let convolutions = [
        gauss("encoder.conv1.weight", &[64, 64, 3], 0.02),
        gauss("encoder.conv2.weight", &[16, 64, 4], 0.02),
        gauss("layers.0.q_proj.weight", &[64, 64], 0.02),
    ];
    dir.write("in.safetensors", safetensors(&convolutions));
    let args = ["quantize", "in.safetensors", "--out", "q.safetensors"];
    let said = dir.run(&[&args[..], &["--quiet"]].concat()).is(0).stdout();
    for part in [
        "note: 80% of the weights stay floats: 80% tensors of 3 dimensions",
        "--rule 'encoder.conv*.weight=ternary' quantizes them",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let rule = [
        "--force",
        "--quiet",
        "--rule",
        "encoder.conv*.weight=ternary",
    ];
    let said = dir.run(&[&args[..], &rule].concat()).is(0).stdout();
    assert!(!said.contains("note"), "{said}");
}

/// One scale for each row of each expert: a row that is far larger changes no other.
#[test]
fn stacked_experts_are_a_batch_of_matrices() {
    let dir = Dir::new();
    let mut weights = common::normal(1, 2 * 3 * 64, 0.02);
    weights[64..128].iter_mut().for_each(|w| *w *= 1e3);
    let row = |w: &[f32]| f32s("experts.row", &[1, 64], w);
    dir.write(
        "in.safetensors",
        safetensors(&[f32s("experts.up", &[2, 3, 64], &weights)]),
    );
    dir.write(
        "row.safetensors",
        safetensors(&[row(&weights[2 * 64..3 * 64])]),
    );
    for (input, q, f) in [
        ("in.safetensors", "q.safetensors", "f.safetensors"),
        ("row.safetensors", "qr.safetensors", "fr.safetensors"),
    ] {
        let options = ["--rule", "*experts*=ternary", "--granularity", "channel"];
        dir.run(&[&["quantize", input, "--out", q][..], &options].concat())
            .is(0);
        dir.run(&["verify", q]).is(0);
        dir.run(&["dequantize", q, "--out", f]).is(0);
    }
    let floats = |name: &str| {
        let bytes = dir.read(name);
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header..].to_vec()
    };
    let (all, one) = (floats("f.safetensors"), floats("fr.safetensors"));
    assert_eq!(all[2 * 64 * 4..3 * 64 * 4], one);
}

#[test]
fn hf_bitnet_refuses_layers_that_transformers_does_not_replace() {
    let dir = folder(
        &json!({"model_type": "gpt2", "vocab_size": 100}),
        &[
            ("h.0.mlp.c_fc.weight", &[64, 128]),
            ("h.0.mlp.c_fc.bias", &[128]),
        ],
    );
    let hf = ["quantize", "m", "--out", "q", "--format", "hf-bitnet"];
    dir.refuses(
        &hf,
        &["h.0.mlp.c_fc.weight", "Conv1D", "--format safetensors"],
    );
    let said = dir.run(&["quantize", "m", "--out", "q"]).is(0).stdout();
    assert!(said.contains("1 weights are stored [in, out]"), "{said}");

    let dir = folder(
        &json!({"architectures": ["BertModel"], "vocab_size": 100}),
        &[
            ("embeddings.words.weight", &[100, 64]),
            ("layer.0.q.weight", &[64, 64]),
            ("layer.0.experts.up", &[2, 64, 64]),
            ("pooler.dense.weight", &[64, 64]),
        ],
    );
    dir.refuses(
        &[&hf[..], &["--rule", "*experts*=ternary"]].concat(),
        &["layer.0.experts.up", "3 dimensions"],
    );
    let said = dir.run(&hf).is(0).stdout();
    let why = "stacked experts, e.g. layer.0.experts.up (--format safetensors quantizes them)";
    assert!(said.contains(why), "{said}");
    // Without a list transformers would leave the last module, which is packed, alone.
    let config: Value = serde_json::from_slice(&dir.read("q/config.json")).unwrap();
    let kept = &config["quantization_config"]["modules_to_not_convert"];
    let first = [&kept[0], &kept[1]];
    assert_eq!(first, ["embeddings.words", "lm_head"]);
    assert!(!kept.to_string().contains("pooler"), "{kept}");
}
