//! Paths and folders that are no model: the message says what is there, and the next step.

mod common;

use common::{Dir, gauss, safetensors};
use serde_json::json;
use std::fs;
use std::path::Path;

fn weights() -> Vec<u8> {
    safetensors(&[gauss("a.weight", &[8, 16], 0.02)])
}

/// Names and bytes.
type Files<'a> = [(&'a str, &'a [u8])];

/// A folder `m` of these files.
fn folder(files: &Files) -> Dir {
    let dir = Dir::new();
    for (name, bytes) in files {
        dir.write(&format!("m/{name}"), bytes);
    }
    dir
}

#[test]
fn folders_of_something_else() {
    let weights = weights();
    let adapter = json!({"peft_type": "LORA", "base_model_name_or_path": "org/base"});
    let adapter = adapter.to_string();
    let cases: &[(&Files, &[&str])] = &[
        (&[], &["m: expected", "config.json", "an empty folder"]),
        (&[("a.txt", b"a")], &["none among a.txt"]),
        (
            &[
                ("adapter_config.json", adapter.as_bytes()),
                ("adapter_model.safetensors", &weights),
            ],
            &["LORA adapter", "'org/base'", "merge"],
        ),
        (
            &[
                ("adapter_config.json", b"{}"),
                ("adapter_model.safetensors", &weights),
                ("config.json", b"{}"),
            ],
            &["adapter", "merge"],
        ),
        (
            &[("config.json", b"{}"), ("pytorch_model.bin", b"PK")],
            &["pytorch_model.bin", "torch.save"],
        ),
        (
            &[("config.json", b"{}"), ("tf_model.h5", b"")],
            &["tf_model.h5", "save_pretrained"],
        ),
        (
            &[("toy-Q4.gguf", b"GGUF")],
            &["give the file", "m/toy-Q4.gguf"],
        ),
        (
            &[
                ("consolidated.safetensors", &weights),
                ("params.json", b"{}"),
            ],
            &["consolidated.safetensors", "config.json"],
        ),
        (
            &[("checkpoint-9/config.json", b"{}")],
            &["give m/checkpoint-9"],
        ),
        (
            &[
                ("refs/main", b"0123"),
                ("snapshots/0123/config.json", b"{}"),
            ],
            &["cache", "m/snapshots/0123"],
        ),
    ];
    for (files, parts) in cases {
        let dir = folder(files);
        fs::create_dir_all(dir.at("m")).unwrap();
        dir.refuses_input("m", parts);
        dir.refuses(&["run", "m", "--prompt", "a"], parts);
    }
}

#[test]
fn paths_of_nothing() {
    let dir = Dir::new();
    for (path, parts) in [
        ("org/toy-1.5B", &["hub", "does not download"][..]),
        ("toy", &["cannot open toy: No such file"]),
        ("a/b/c", &["cannot open a/b/c: No such file"]),
        ("a/b.safetensors", &["No such file"]),
    ] {
        dir.refuses_input(path, parts);
    }
    fs::create_dir(dir.at("here")).unwrap();
    dir.refuses_input("here/toy", &["No such file"]);
}

#[test]
fn files_of_something_else() {
    let dir = Dir::new();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n";
    for (bytes, parts) in [
        (pointer.as_bytes(), &["git-lfs pointer", "git lfs pull"][..]),
        (b"<!DOCTYPE html><html></html>", &["HTML", "/resolve/"]),
        (b"Entry not found", &["download the file again"]),
    ] {
        dir.write("in.safetensors", bytes);
        dir.refuses_input("in.safetensors", parts);
        dir.write("in.gguf", bytes);
        dir.refuses_input("in.gguf", parts);
    }
    let zip = b"PK\x03\x04 and more of it";
    dir.write("in.safetensors", zip);
    dir.refuses_input("in.safetensors", &["torch.save"]);
    dir.write("in.gguf", zip);
    dir.refuses_input("in.gguf", &["PyTorch"]);
    let dir = folder(&[
        ("config.json", pointer.as_bytes()),
        ("a.safetensors", &weights()),
    ]);
    dir.refuses_input("m", &["m/config.json", "git lfs pull"]);
}

#[cfg(unix)]
#[test]
fn links_that_lead_nowhere() {
    use std::os::unix::fs::symlink;
    let dir = folder(&[("config.json", b"{}")]);
    symlink("../blobs/gone", dir.at("m/model.safetensors")).unwrap();
    dir.refuses_input("m", &["model.safetensors", "../blobs/gone", "not there"]);
    let dir = folder(&[("config.json", b"{}"), ("model.safetensors", &weights())]);
    symlink("../blobs/gone", dir.at("m/tokenizer.json")).unwrap();
    dir.refuses(
        &["quantize", "m", "--out", "out"],
        &["m/tokenizer.json", "../blobs/gone", "not there"],
    );
    let run = dir.run(&["quantize", "m", "--out", "out.safetensors"]);
    assert!(run.is(0).stdout().contains("tokenizer.json is a link"));
    let none = Path::new("gone");
    symlink(none, dir.at("config")).unwrap();
    dir.refuses_input("config", &["a link that leads to gone"]);
}

/// The name in a GGUF is the model's and not that of a version in the cache.
#[test]
fn a_gguf_from_the_hub_cache_has_the_name_of_its_model() {
    let dir = Dir::new();
    let snapshot = "models--org--toy--x/snapshots/0123abc";
    common::llama(&dir, snapshot);
    dir.run(&["convert", snapshot, "--out", "m.gguf"]).is(0);
    let bytes = dir.read("m.gguf");
    let holds = |text: &str| bytes.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(holds("toy--x") && !holds("0123abc"));
}

/// What Python writes for numbers that JSON does not have is read, and written back.
#[test]
fn infinity_in_a_config() {
    let dir = Dir::new();
    common::llama(&dir, "m");
    let config = String::from_utf8(dir.read("m/config.json")).unwrap();
    let limits = r#"{"limits":[0.0,Infinity,-Infinity],"other":NaN,"name":"NaN","#;
    dir.write("m/config.json", config.replacen('{', limits, 1));
    dir.run(&["quantize", "m", "--out", "q"]).is(0);
    dir.run(&["convert", "m", "--out", "m.gguf"]).is(0);
    let written = String::from_utf8(dir.read("q/config.json")).unwrap();
    let written: String = written.split_whitespace().collect();
    for part in [
        "[0.0,Infinity,-Infinity]",
        r#""other":NaN"#,
        r#""name":"NaN""#,
    ] {
        assert!(written.contains(part), "{written}");
    }
    dir.run(&["inspect", "q"]).is(0);
    let used = config.replace("10000.0", "Infinity");
    assert_ne!(used, config);
    dir.write("m/config.json", used);
    dir.refuses(
        &["convert", "m", "--out", "n.gguf"],
        &["rope_theta", "positive number", "got Infinity"],
    );
}
