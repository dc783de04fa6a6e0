//! For every small model of the tests: run, convert → run and quantize → run say the same tokens.

mod common;

use common::Dir;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Models with a fact that no GGUF can say, and the key that the refusal names.
const WITHOUT_GGUF: [(&str, &str); 4] = [
    ("qwen2-window", "max_window_layers"),
    ("qwen3-bias", "attention_bias"),
    ("qwen35-mixed", "attention_bias"),
    ("qwen3-moe-stacked", "norm_topk_prob"),
];

/// The folders that transformers wrote, one for each graph and convention.
fn models() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitnet-inference/tests/golden");
    let entries = fs::read_dir(golden).unwrap();
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| generates(path))
        .collect();
    folders.sort();
    folders
}

/// Whether a folder holds a model that generates text; encoders do not.
fn generates(path: &Path) -> bool {
    let Ok(config) = fs::read(path.join("config.json")) else {
        return false;
    };
    let config: Value = serde_json::from_slice(&config).unwrap();
    let class = config["architectures"][0].as_str();
    class.is_some_and(|class| class.ends_with("ForCausalLM"))
}

/// A byte-level BPE of `size` tokens without merges: three special tokens, then single characters.
fn tokenizer(size: usize) -> Value {
    let letters = ('a'..='z').chain('A'..='Z').chain("Ġ.,!?'".chars());
    let specials = ["<pad>", "<s>", "</s>"].map(String::from);
    let all = specials.iter().cloned().chain(letters.map(String::from));
    let vocabulary: Map<String, Value> = all
        .take(size)
        .enumerate()
        .map(|(id, token)| (token, id.into()))
        .collect();
    let added = specials.iter().enumerate().map(|(id, token)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    });
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocabulary, "merges": []},
    })
}

/// The tokens that `run` generates, and why it ends.
fn said(dir: &Dir, model: &str, more: &[&str]) -> (Value, Value) {
    let prompt = "Which of the models is it";
    let args = [
        "run", model, "--json", "-p", prompt, "-n", "20", "--cache", "f32",
    ];
    let run = dir.run(&[&args, more].concat());
    let document = run.is(0).json();
    (document["tokens"].clone(), document["finish"].clone())
}

/// Converts `model` to a GGUF and that back to a folder; both must say what the model says.
fn converted(dir: &Dir, model: &str, more: &[&str], name: &str) {
    let (gguf, back) = (format!("{model}.gguf"), format!("{model}-back"));
    let expected = said(dir, model, more);
    let convert = dir.run(&["convert", model, "--out", &gguf, "--quiet"]);
    if let Some((_, key)) = WITHOUT_GGUF.iter().find(|(refused, _)| *refused == name) {
        convert.refused(&[key]);
        dir.run(&["convert", model, "--out", &back, "--quiet"])
            .is(0);
        return assert_eq!(said(dir, &back, more), expected, "{name}: {model} copied");
    }
    convert.is(0);
    assert_eq!(said(dir, &gguf, more), expected, "{name}: {model} as GGUF");
    dir.run(&["convert", &gguf, "--out", &back, "--quiet"])
        .is(0);
    assert_eq!(
        said(dir, &back, more),
        expected,
        "{name}: {model} from GGUF"
    );
}

#[test]
fn every_model_says_the_same_tokens_in_every_form() {
    let models = models();
    assert!(models.len() >= 10, "{models:?}");
    for model in models {
        let name = model.file_name().unwrap().to_string_lossy().into_owned();
        let dir = Dir::new();
        for file in ["config.json", "model.safetensors"] {
            dir.write(&format!("m/{file}"), fs::read(model.join(file)).unwrap());
        }
        let config: Value = serde_json::from_slice(&dir.read("m/config.json")).unwrap();
        let size = config["vocab_size"].as_u64().unwrap() as usize;
        dir.write_json("m/tokenizer.json", &tokenizer(size));
        let floats = ["--activations", "float"];
        let mode = &config["quantization_config"]["quantization_mode"];
        let granularity = if mode == "online" {
            // What the model does in each forward pass is done once.
            dir.refuses(
                &["convert", "m", "--out", "m.gguf"],
                &["online", "bitnet quantize"],
            );
            "tensor"
        } else {
            // Rows too short for a ternary type of GGUF are floats there, with float inputs.
            let more = if mode == "offline" { &floats[..] } else { &[] };
            converted(&dir, "m", more, &name);
            "channel"
        };
        // A model that is ternary already has nothing left to quantize.
        if mode == "offline" {
            continue;
        }
        let flags = ["--granularity", granularity, "--quiet"];
        dir.run(&[&["quantize", "m", "--out", "q"], &flags[..]].concat())
            .is(0);
        if mode == "online" {
            assert_eq!(
                said(&dir, "q", &[]),
                said(&dir, "m", &[]),
                "{name}: quantized"
            );
        }
        converted(&dir, "q", &floats, &name);
        dir.run(&["dequantize", "q", "--out", "d", "--quiet"]).is(0);
        assert_eq!(
            said(&dir, "d", &floats),
            said(&dir, "q", &floats),
            "{name}: dequantized"
        );
    }
}
