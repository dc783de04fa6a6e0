//! Each graph of bitnet-inference as a folder and as a GGUF: the logits of transformers from both,
//! and the way back to a folder.

mod common;

use bitnet_inference::{
    CacheType, ForwardBuffers, ForwardStep, KvCache, LoadOptions, Model, WantedLogits,
};
use common::Dir;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// As in bitnet-inference's tests of the folders.
const BOUND: f32 = 2e-5;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitnet-inference/tests/golden")
}

/// A tensor of 32-bit elements of a golden file.
fn tensor(name: &str, tensor: &str) -> Vec<[u8; 4]> {
    let file = fs::read(goldens().join(name).join("golden.safetensors")).unwrap();
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + len]).unwrap();
    let at = |i: usize| 8 + len + header[tensor]["data_offsets"][i].as_u64().unwrap() as usize;
    file[at(0)..at(1)].as_chunks().0.to_vec()
}

fn logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let options = LoadOptions {
        threads: 1,
        ..LoadOptions::default()
    };
    let model = Model::load_with(path, &options).unwrap_or_else(|e| panic!("{e}"));
    let mut cache = KvCache::new(model.config(), tokens.len(), CacheType::F32);
    let step = ForwardStep {
        cache: &mut cache,
        tokens,
        want: WantedLogits::All,
    };
    let mut buffers = ForwardBuffers::default();
    model.forward(&mut [step], &mut buffers).unwrap().to_vec()
}

/// The largest difference to the golden, relative to its largest logit.
fn error(path: &Path, name: &str) -> f32 {
    let tokens: Vec<u32> = tensor(name, "tokens")
        .into_iter()
        .map(u32::from_le_bytes)
        .collect();
    let expected: Vec<f32> = tensor(name, "logits")
        .into_iter()
        .map(f32::from_le_bytes)
        .collect();
    let got = logits(path, &tokens);
    assert_eq!(got.len(), expected.len(), "{name}");
    let top = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let differences = got.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0f32, |m, d| if d <= m { m } else { d }) / top
}

/// A folder with a golden's config and weights.
fn model(name: &str) -> Dir {
    let dir = Dir::new();
    for file in ["config.json", "model.safetensors"] {
        let bytes = fs::read(goldens().join(name).join(file)).unwrap();
        dir.write(&format!("m/{file}"), bytes);
    }
    dir
}

const MODELS: [&str; 14] = [
    "llama-f32",
    "llama-f16-rope",
    "qwen2-bias",
    "qwen3-yarn",
    "mistral-window",
    "smollm3-nope",
    "phi3-longrope",
    "phi3-partial",
    "minicpm",
    "gemma3",
    "qwen35",
    "bitnet-float",
    "qwen3-moe",
    "qwen2-moe",
];

#[test]
fn a_gguf_computes_what_the_folder_does() {
    for name in MODELS {
        let dir = model(name);
        dir.run(&["convert", "m", "--out", "m.gguf"]).is(0);
        let got = error(&dir.at("m.gguf"), name);
        assert!(got < BOUND, "{name}: {got:e}");
        if name == "llama-f16-rope" {
            // Divisors of rotation frequencies have no place in a config.json.
            continue;
        }
        dir.run(&["convert", "m.gguf", "--out", "back"]).is(0);
        let got = error(&dir.at("back"), name);
        assert!(got < BOUND, "{name} and back: {got:e}");
        let there = dir.run(&["compare", "m", "m.gguf", "--json"]).is(0).json();
        let back = dir.run(&["compare", "m", "back", "--json"]).is(0).json();
        if !["gemma3", "qwen35"].contains(&name) {
            // Norms of 1 + w lose bits of small w, and −e^w some of w.
            assert_eq!(there["all"]["exact"], true, "{name}");
            assert_eq!(back["all"]["exact"], true, "{name} and back");
        }
    }
}

#[test]
fn ternary_weights_of_each_graph_run() {
    for name in MODELS {
        let dir = model(name);
        dir.run(&["quantize", "m", "--out", "t", "--granularity", "channel"])
            .is(0);
        let tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3];
        let ternary = logits(&dir.at("t"), &tokens);
        assert!(ternary.iter().all(|x| x.is_finite()), "{name}");
        assert!(error(&dir.at("t"), name) > 100.0 * BOUND, "{name}");
    }
}

/// What a GGUF cannot say is refused by the key's name.
#[test]
fn facts_without_a_place_in_a_gguf_are_refused() {
    for (name, key) in [
        ("qwen2-window", "max_window_layers"),
        ("qwen3-bias", "attention_bias"),
        ("qwen35-mixed", "attention_bias"),
        ("qwen3-moe-stacked", "norm_topk_prob"),
    ] {
        let dir = model(name);
        dir.refuses(&["convert", "m", "--out", "m.gguf"], &[key]);
    }
    // Full attention in the third and fourth layer.
    let dir = model("qwen35");
    let mut config: Value = serde_json::from_slice(&dir.read("m/config.json")).unwrap();
    config["layer_types"][2] = "full_attention".into();
    dir.write_json("m/config.json", &config);
    dir.refuses(&["convert", "m", "--out", "m.gguf"], &["layer_types"]);
}
