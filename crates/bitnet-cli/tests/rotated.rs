//! Models in a rotated basis through every command. The input is a GGUF of gguf-py, with the logits
//! of transformers for its original basis (scripts/make-rotated-golden.py).

mod common;

use bitnet_formats::Source;
use bitnet_formats::gguf::Value;
use bitnet_inference::{CacheType, ForwardBuffers, ForwardStep, KvCache, Model, WantedLogits};
use common::Dir;
use std::fs;
use std::path::{Path, PathBuf};

const PREFIX: &str = "prism.hadamard.";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../bitnet-inference/tests/golden/llama-rotated")
        .join(name)
}

/// A folder with the golden as model.gguf.
fn with_model() -> Dir {
    let dir = Dir::new();
    fs::copy(golden("model.gguf"), dir.at("model.gguf")).unwrap();
    dir
}

/// The largest difference between a model's logits and transformers', relative to the largest.
fn error(path: &Path) -> f32 {
    let truth = Source::open(&golden("golden.safetensors")).unwrap();
    let numbers = |name: &str| -> Vec<[u8; 4]> {
        let bytes = truth.read_all(truth.find_stored(name).unwrap()).unwrap();
        bytes.as_chunks().0.to_vec()
    };
    let tokens: Vec<u32> = numbers("tokens")
        .into_iter()
        .map(u32::from_le_bytes)
        .collect();
    let expected: Vec<f32> = numbers("logits")
        .into_iter()
        .map(f32::from_le_bytes)
        .collect();
    let model = Model::load(path).unwrap();
    let mut cache = KvCache::new(model.config(), 64, CacheType::F32);
    let step = ForwardStep {
        cache: &mut cache,
        tokens: &tokens,
        want: WantedLogits::All,
    };
    let mut buffers = ForwardBuffers::default();
    let got = model.forward(&mut [step], &mut buffers).unwrap();
    let top = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let differences = got.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0f32, |m, d| if d <= m { m } else { d }) / top
}

fn keys(path: &Path) -> Vec<(String, Value)> {
    let source = Source::open(path).unwrap();
    let keys = source.gguf().iter().cloned();
    keys.filter(|(key, _)| key.starts_with(PREFIX)).collect()
}

#[test]
fn conversions_carry_the_rotation() {
    let dir = with_model();
    let before = keys(&dir.at("model.gguf"));
    assert_eq!(before.len(), 9);
    // GGUF to GGUF: the same keys and the same bytes of each tensor.
    dir.run(&["convert", "model.gguf", "--out", "same.gguf"])
        .is(0);
    assert_eq!(keys(&dir.at("same.gguf")), before);
    // Our own folder has them in its document, by the names of its tensors.
    let run = dir.run(&["convert", "model.gguf", "--out", "folder"]);
    let said = run.is(0).stdout();
    assert!(
        said.contains("7 matrices are stored in a rotated basis"),
        "{said}"
    );
    let source = Source::open(&dir.at("folder")).unwrap();
    let rotation = source.document().unwrap().rotation.clone().unwrap();
    assert_eq!(rotation["block_size"], 128);
    assert_eq!(rotation["signs"]["512"].as_str().unwrap().len(), 512);
    assert_eq!(
        rotation["weight_names"][0],
        "model.layers.0.self_attn.q_proj.weight"
    );
    assert_eq!(
        rotation["inverse_weight_names"][0],
        "model.embed_tokens.weight"
    );
    assert!(error(&dir.at("folder")) < 2e-5);
    dir.run(&["verify", "folder"]).is(0);
    // And back: the facts are those of the first file, whatever the width of its integers.
    dir.run(&["convert", "folder", "--out", "back.gguf"]).is(0);
    let facts = |name: &str| {
        let source = Source::open(&dir.at(name)).unwrap();
        let rotation = source.rotation().unwrap().unwrap();
        rotation.renamed(&|name| Some(name.into()))
    };
    assert_eq!(facts("back.gguf"), facts("model.gguf"));
    assert!(error(&dir.at("back.gguf")) < 2e-5);
    // A file without config.json, and quantizing what is ternary already.
    dir.run(&[
        "convert",
        "folder/model.safetensors",
        "--out",
        "one.safetensors",
    ])
    .is(0);
    assert!(
        Source::open(&dir.at("one.safetensors"))
            .unwrap()
            .rotation()
            .unwrap()
            .is_some()
    );
    dir.run(&["quantize", "model.gguf", "--out", "q.gguf"])
        .is(0);
    assert_eq!(keys(&dir.at("q.gguf")), before);
}

#[test]
fn the_rotation_is_undone_on_request() {
    let dir = with_model();
    dir.run(&["dequantize", "model.gguf", "--out", "floats"])
        .is(0);
    let run = dir.run(&["convert", "model.gguf", "--unrotate", "--out", "plain.gguf"]);
    let said = run.is(0).stdout();
    let note = "7 matrices are in their original basis again";
    assert!(said.contains(note), "{said}");
    dir.run(&["convert", "model.gguf", "--out", "folder"]).is(0);
    dir.run(&["convert", "folder", "--unrotate", "--out", "again"])
        .is(0);
    for name in ["floats", "plain.gguf", "again"] {
        let source = Source::open(&dir.at(name)).unwrap();
        assert!(source.rotation().unwrap().is_none(), "{name}");
        // The logits of transformers, which has the weights of numpy's product.
        let error = error(&dir.at(name));
        assert!(error < 2e-5, "{name}: {error:.2e}");
        // Compared in the original basis.
        let args = ["compare", "model.gguf", name, "--min-sqnr", "120"];
        dir.run(&args).is(0);
        dir.run(&["compare", name, "folder", "--min-sqnr", "120"])
            .is(0);
    }
    assert_eq!(keys(&dir.at("plain.gguf")), []);
    dir.refuses(
        &["convert", "plain.gguf", "--unrotate", "--out", "x.gguf"],
        &[
            "plain.gguf",
            "no weights in a rotated basis",
            "without --unrotate",
        ],
    );
}

#[test]
fn what_cannot_say_it_or_is_not_known_is_refused() {
    let dir = with_model();
    for format in ["hf-bitnet", "mlx"] {
        dir.refuses(
            &["convert", "model.gguf", "--format", format, "--out", "x"],
            &[format, "rotated basis", "--unrotate"],
        );
    }
    let inspect = dir.run(&["inspect", "model.gguf", "--json"]);
    let findings = inspect.is(0).json()["findings"].clone();
    assert_eq!(findings[0]["check"], "rotation");

    // A version that does not exist yet: the file can be listed, and nothing else.
    let mut bytes = dir.read("model.gguf");
    let key = b"prism.hadamard.version";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    bytes[at + key.len() + 4] = 2;
    dir.write("next.gguf", &bytes);
    let inspect = dir.run(&["inspect", "next.gguf", "--json"]);
    let what = inspect.is(0).json()["findings"][0]["what"].to_string();
    let parts = ["prism.hadamard.version", "expected 1, got 2"];
    assert!(parts.iter().all(|part| what.contains(part)), "{what}");
    let parts = &["next.gguf", parts[0], parts[1]];
    dir.refuses(&["convert", "next.gguf", "--out", "x.gguf"], parts);
    dir.refuses(&["quantize", "next.gguf", "--out", "x.gguf"], parts);
    dir.refuses(&["dequantize", "next.gguf", "--out", "x"], parts);
    dir.refuses(&["compare", "next.gguf", "model.gguf"], parts);
    dir.refuses(&["run", "next.gguf", "-p", "x"], parts);
    dir.write("text.txt", "some words");
    dir.refuses(&["perplexity", "next.gguf", "--text", "text.txt"], parts);
}
