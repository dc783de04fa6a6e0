//! `bitnet embed`, and embedding models through quantize and convert.

mod common;

use common::{Dir, Run};
use serde_json::{Value, json};
use std::fs;
use std::io::{Write, pipe};
use std::path::{Path, PathBuf};
use std::process::Stdio;

const TEXTS: [&str; 3] = ["a cat", "two kittens sleeping", "the market fell"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../bitnet-inference/tests/golden")
        .join(name)
}

/// A copy of a golden embedding model as the folder m.
fn model(name: &str) -> Dir {
    let dir = Dir::new();
    for sub in ["", "1_Pooling/"] {
        for entry in fs::read_dir(golden(name).join(sub)).into_iter().flatten() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_file() && !file.starts_with("golden") {
                dir.write(&format!("m/{sub}{file}"), fs::read(&path).unwrap());
            }
        }
    }
    dir
}

/// The vectors of [`TEXTS`].
fn vectors(dir: &Dir, model: &str, more: &[&str]) -> Vec<Vec<f64>> {
    let args = [&["embed", model, "--json", "--quiet"], &TEXTS[..], more].concat();
    let document = dir.run(&args).is(0).json();
    numbers(&document["embeddings"])
}

fn numbers(matrix: &Value) -> Vec<Vec<f64>> {
    let row = |row: &Value| -> Vec<f64> {
        let row = row.as_array().unwrap().iter();
        row.map(|x| f64::from(x.as_f64().unwrap() as f32)).collect()
    };
    matrix.as_array().unwrap().iter().map(row).collect()
}

fn difference(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()))
}

fn with_stdin(dir: &Dir, args: &[&str], text: Option<&str>) -> Run {
    let mut command = dir.command(args);
    let stdin = text.map_or(Stdio::null(), |_| Stdio::piped());
    command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    if let (Some(mut stdin), Some(text)) = (child.stdin.take(), text) {
        stdin.write_all(text.as_bytes()).unwrap();
    }
    Run {
        args: args.iter().map(|&a| a.into()).collect(),
        output: child.wait_with_output().unwrap(),
    }
}

#[test]
fn one_vector_for_each_text_in_each_format() {
    let dir = model("embed-bert");
    let expected = vectors(&dir, "m", &[]);
    assert_eq!((expected.len(), expected[0].len()), (3, 44));
    dir.write("lines.txt", TEXTS.join("\n") + "\n");
    for args in [
        &["embed", "m", "--file", "lines.txt"][..],
        &["embed", "m", TEXTS[0], TEXTS[1], TEXTS[2]],
    ] {
        let run = dir.run(args);
        let text = run.is(0).stdout();
        let parse = |line: &str| line.split(' ').map(|x| x.parse().unwrap()).collect();
        let got: Vec<Vec<f64>> = text.lines().map(parse).collect();
        assert!(difference(&got, &expected) < 1e-7);
        assert_eq!(run.stderr(), "");
    }
    for args in [
        &["embed", "m", "--format", "jsonl"][..],
        &["embed", "m", "--format", "jsonl", "-f", "-"],
    ] {
        let run = with_stdin(
            &dir,
            args,
            Some("a cat\r\ntwo kittens sleeping\nthe market fell"),
        );
        let text = run.is(0).stdout();
        for (i, line) in text.lines().enumerate() {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["text"], TEXTS[i]);
            let got = numbers(&json!([line["embedding"]]));
            assert_eq!(got[0], expected[i]);
        }
        assert_eq!(text.lines().count(), 3);
    }
    let run = dir.run(&["embed", "m", "--file", "lines.txt", "--format", "npy"]);
    let bytes = &run.is(0).output.stdout;
    assert!(bytes.starts_with(b"\x93NUMPY\x01\x00"));
    let data = bytes[bytes.len() - 3 * 44 * 4..].as_chunks().0.iter();
    let data: Vec<f64> = data.map(|b| f64::from(f32::from_le_bytes(*b))).collect();
    assert_eq!(data, expected.concat());
}

#[test]
fn flags_change_what_they_say() {
    let dir = model("embed-bert");
    let unit = vectors(&dir, "m", &[]);
    let plain = vectors(&dir, "m", &["--no-normalize"]);
    let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (unit, plain) in unit.iter().zip(&plain) {
        assert!((length(unit) - 1.0).abs() < 1e-6 && (length(plain) - 1.0).abs() > 1e-3);
        let scaled: Vec<f64> = plain.iter().map(|x| x / length(plain)).collect();
        assert!(difference(&[scaled], std::slice::from_ref(unit)) < 1e-6);
    }
    let mut seen = vec![unit.clone()];
    for pooling in ["cls", "last", "max"] {
        let got = vectors(&dir, "m", &["--pooling", pooling]);
        assert!(
            seen.iter().all(|other| difference(other, &got) > 1e-3),
            "{pooling}"
        );
        seen.push(got);
    }
    assert_eq!(vectors(&dir, "m", &["--pooling", "mean"]), unit);

    let args = [&["embed", "m", "--similarity", "--json"], &TEXTS[..]].concat();
    let document = dir.run(&args).is(0).json();
    let similarity = numbers(&document["similarity"]);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for i in 0..3 {
        for j in 0..3 {
            assert!((similarity[i][j] - dot(&unit[i], &unit[j])).abs() < 1e-6);
        }
    }
    assert_eq!(
        (&document["pooling"], &document["dimensions"]),
        (&json!("mean"), &json!(44))
    );
    assert!(document.get("embeddings").is_none());
    let table = dir.run(
        &args[..args.len()]
            .iter()
            .filter(|a| **a != "--json")
            .copied()
            .collect::<Vec<_>>(),
    );
    assert!(
        table
            .is(0)
            .stdout()
            .contains(&format!("{:.4}", similarity[0][1]))
    );

    let dir = model("embed-qwen3");
    let queries = vectors(&dir, "m", &["--prompt-name", "query"]);
    assert!(difference(&queries, &vectors(&dir, "m", &[])) > 1e-3);
}

#[test]
fn what_is_cut_and_what_is_refused() {
    let dir = model("embed-bert");
    let long = "a cat ".repeat(40);
    let run = dir.run(&["embed", "m", "two", &long, &long]);
    let note = run.is(0).stderr();
    assert!(
        note.contains("text 2 is cut to 20 of its 82 tokens"),
        "{note}"
    );
    assert!(note.contains("and 1 more text"), "{note}");
    assert_eq!(
        dir.run(&["embed", "m", &long, "--quiet"]).is(0).stderr(),
        ""
    );
    dir.write("blank.txt", "a cat\n\ntwo\n")
        .write("none.txt", "");
    dir.write("latin.txt", b"caf\xe9\n");
    for (args, parts) in [
        (&["embed", "m", ""][..], &["text 1", "empty text"][..]),
        (
            &["embed", "m", "-f", "blank.txt"],
            &["text 2", "empty text"],
        ),
        (
            &["embed", "m", "-f", "none.txt"],
            &["none.txt", "a text in each line"],
        ),
        (&["embed", "m", "-f", "latin.txt"], &["latin.txt"]),
        (&["embed", "m", "-f", "missing.txt"], &["missing.txt"]),
        (&["embed", "m", "a", "-f", "blank.txt"], &["--file"]),
        (
            &["embed", "m", "a", "--prompt-name", "q"],
            &["no prompts", "'q'"],
        ),
        (
            &["embed", "m", "a", "--pooling", "men"],
            &["did you mean 'mean'?"],
        ),
        (
            &["embed", "m", "a", "--format", "np"],
            &["did you mean 'npy'?"],
        ),
        (&["embed", "nowhere", "a"], &["nowhere"]),
        (&["run", "m", "-p", "a"], &["model_type", "bitnet embed"]),
    ] {
        dir.refuses(args, parts);
    }
    let closed = with_stdin(&dir, &["embed", "m"], None);
    closed.refused(&["stdin", "a text in each line"]);
    let steps =
        json!([{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}]);
    dir.write_json("m/modules.json", &steps);
    dir.refuses(&["embed", "m", "a"], &["modules.json", "[1].type", "Dense"]);
    dir.write_json(
        "m/modules.json",
        &json!([{"path": "", "type": "x.Transformer"}]),
    );
    dir.refuses(&["embed", "m", "a"], &["--pooling"]);
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let dir = model("embed-bert");
    for format in ["text", "jsonl", "npy"] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut command = dir.command(&["embed", "m", "a cat", "--format", format]);
        command
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(
            (output.status.code(), &output.stderr[..]),
            (Some(0), &b""[..])
        );
    }
}

/// Folder, GGUF and the folder made of it compute the same.
#[test]
fn containers_compute_the_same() {
    for name in ["embed-bert", "embed-bert-inside", "embed-qwen3"] {
        let dir = model(name);
        let expected = vectors(&dir, "m", &[]);
        let convert = dir.run(&["convert", "m", "--out", "m.gguf"]);
        let notes = convert.is(0).stdout();
        assert_eq!(
            notes.contains("has no place for cls."),
            name == "embed-bert-inside",
            "{notes}"
        );
        dir.run(&["convert", "m.gguf", "--out", "back"]).is(0);
        for model in ["m.gguf", "back"] {
            let got = vectors(&dir, model, &[]);
            assert!(difference(&got, &expected) < 1e-6, "{name}, {model}");
        }
        let compared = dir.run(&["compare", "m", "m.gguf", "--json"]).is(0).json();
        assert_eq!(compared["all"]["exact"], true, "{name}");
        let said = dir.run(&["embed", "m.gguf", "a cat"]).is(0).stderr();
        assert_eq!(
            said.contains("no file names the pooling"),
            name == "embed-bert-inside",
            "{said}"
        );
    }
}

/// The folder of a step of sentence-transformers belongs to the model: copied, checked, replaced.
#[test]
fn quantized_models_embed() {
    for name in ["embed-bert", "embed-qwen3"] {
        let dir = model(name);
        let quantize = ["quantize", "m", "--out", "q", "--granularity", "channel"];
        let notes = dir.run(&quantize).is(0).stdout();
        assert!(!notes.contains("is not copied"), "{notes}");
        assert_eq!(
            dir.read("q/1_Pooling/config.json"),
            dir.read("m/1_Pooling/config.json")
        );
        let (float, ternary) = (vectors(&dir, "m", &[]), vectors(&dir, "q", &[]));
        let error = difference(&float, &ternary);
        assert!(error > 1e-3 && error < 1.0, "{name}: {error}");
        let int8 = vectors(&dir, "q", &["--activations", "int8"]);
        let error = difference(&int8, &ternary);
        assert!(error > 0.0 && error < 0.1, "{name}: {error}");
        dir.run(&["verify", "q"]).is(0);
        dir.run(&[&quantize[..], &["--force"]].concat()).is(0);
        assert_eq!(vectors(&dir, "q", &[]), ternary);
        let gguf = [
            "quantize",
            "m",
            "--out",
            "q.gguf",
            "--granularity",
            "channel",
        ];
        dir.run(&gguf).is(0);
        assert!(
            vectors(&dir, "q.gguf", &[])
                .iter()
                .flatten()
                .all(|x| x.is_finite())
        );
        dir.write("q/1_Pooling/config.json", "{}");
        let damage = dir.run(&["verify", "q", "--json"]);
        assert_eq!(
            damage.is(1).json()["damage"][0]["part"],
            "1_Pooling/config.json"
        );
    }
}
