//! Commands that run models, on the committed one and on shapes with synthetic weights.

mod common;

use bitnet_formats::Source;
use bitnet_inference::Config;
use common::{Dir, Run};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

fn glassllm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/glassllm-en")
}

/// A folder with a copy of the committed model as `model`.
fn with_model() -> Dir {
    let dir = Dir::new();
    fs::create_dir(dir.at("model")).unwrap();
    for entry in fs::read_dir(glassllm()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.at("model").join(path.file_name().unwrap())).unwrap();
    }
    dir
}

const PROMPT: &str = "Alice was beginning to";

fn generated(dir: &Dir, more: &[&str]) -> Value {
    let run = dir.run(&[&["run", "model", "--json", "-p", PROMPT, "-n", "24"], more].concat());
    run.is(0);
    run.json()
}

#[test]
fn run_streams_what_the_document_holds() {
    let dir = with_model();
    let document = generated(&dir, &[]);
    let text = document["text"].as_str().unwrap();
    assert_eq!(document["tokens"].as_array().unwrap().len(), 24);
    assert_eq!(document["finish"], "max_tokens");
    assert_eq!(document["speed"]["decoded_tokens"], 23);
    let plain = dir.run(&["run", "model", "-p", PROMPT, "-n", "24"]);
    plain.is(0);
    assert_eq!(
        plain.stdout().trim_end_matches('\n'),
        text.trim_end_matches('\n')
    );
    assert!(plain.stderr().contains("tokens/s"), "speeds go to stderr");
    // The same prompt by stdin.
    let mut child = dir
        .command(&["run", "model", "-n", "24"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(PROMPT.as_bytes())
        .unwrap();
    assert_eq!(
        child.wait_with_output().unwrap().stdout,
        plain.output.stdout
    );
}

#[test]
fn the_same_seed_gives_the_same_text_on_any_number_of_threads() {
    let dir = with_model();
    let sampled = |seed: &str, threads: &str| {
        generated(
            &dir,
            &[
                "--temperature",
                "1",
                "--top-p",
                "0.95",
                "--seed",
                seed,
                "--threads",
                threads,
            ],
        )["tokens"]
            .clone()
    };
    let first = sampled("1", "1");
    assert_eq!(first, sampled("1", "2"));
    assert_ne!(first, sampled("2", "1"));
    let greedy = generated(&dir, &[])["tokens"].clone();
    assert_ne!(first, greedy);
    assert_eq!(
        generated(&dir, &["--temperature", "1", "--top-k", "1"])["tokens"],
        greedy,
        "the likeliest of one"
    );
    for isa in ["scalar", "avx2"] {
        let run = dir.run_with(
            &["run", "model", "--json", "-p", PROMPT, "-n", "24"],
            &[("BITNET_ISA", isa)],
        );
        // A machine without it says so.
        assert!(
            run.output.status.code() == Some(2) || run.json()["tokens"] == greedy,
            "{isa}"
        );
    }
}

#[test]
fn stops_and_contexts() {
    let dir = with_model();
    let all = generated(&dir, &[])["text"].as_str().unwrap().to_string();
    let stop: String = all.chars().skip(20).take(4).collect();
    let document = generated(&dir, &["--stop", &stop, "--stop", "never said"]);
    let before = all.find(&stop).map(|at| &all[..at]).unwrap();
    assert_eq!(
        (document["text"].as_str().unwrap(), &document["finish"]),
        (before, &json!("stop"))
    );
    let run = dir.run(&["run", "model", "--json", "-p", PROMPT, "-n", "1000"]);
    run.is(0);
    assert_eq!(run.json()["finish"], "context");
    assert!(
        run.stderr().contains("context of 128 positions is full"),
        "{}",
        run.stderr()
    );
    let long = "Alice ".repeat(200);
    dir.refuses(
        &["run", "model", "-p", &long],
        &["tokens do not fit the context of 128"],
    );
    dir.refuses(
        &["run", "model", "-p", "a", "--context", "129"],
        &["context", "129", "128"],
    );
    dir.refuses(&["run", "model", "-p", ""], &["empty prompt"]);
}

/// generation_config.json comes before config.json, lists are kept whole, and a GGUF ends texts at
/// the same tokens as the folder.
#[test]
fn every_token_that_ends_a_text_does() {
    let dir = with_model();
    let all = generated(&dir, &[]);
    let third = all["tokens"][3].as_u64().unwrap();
    dir.write_json(
        "model/generation_config.json",
        &json!({"eos_token_id": [1023, third]}),
    );
    let ended = generated(&dir, &[]);
    assert_ne!(ended["finish"], "max_tokens");
    assert!(ended["tokens"].as_array().unwrap().len() <= 4, "{ended}");
    let eos = |name: &str| {
        let source = Source::open(&dir.at(name)).unwrap();
        let mut eos = Config::read(&source).unwrap().eos;
        eos.sort_unstable();
        eos
    };
    assert_eq!(eos("model"), [third as u32, 1023]);
    let convert = |ids: Value| {
        dir.write_json(
            "model/generation_config.json",
            &json!({"eos_token_id": ids}),
        );
        let run = dir.run(&["convert", "model", "--out", "m.gguf", "--force", "--json"]);
        run.is(0).json()["notes"].to_string()
    };
    // 3 is the eos_token of tokenizer_config.json.
    let notes = convert(json!([3, 20, 21]));
    assert!(!notes.contains("ends a text"), "{notes}");
    assert_eq!(eos("m.gguf"), eos("model"));
    let notes = convert(json!([20, 21, 3, 22]));
    assert!(
        notes.contains("token 22") && notes.contains("three"),
        "{notes}"
    );
    let notes = convert(json!(20));
    assert!(
        notes.contains("token 3") && notes.contains("tokenizer_config.json"),
        "{notes}"
    );
    assert_eq!(eos("m.gguf"), [3, 20]);
}

#[test]
fn what_a_model_needs_is_said_when_it_is_missing() {
    let dir = with_model();
    let run = |args: &[&str], parts: &[&str]| dir.refuses(args, parts);
    run(
        &["run", "model", "-p", "a", "--temperature", "-1"],
        &["temperature", "-1"],
    );
    run(&["run", "model", "-p", "a", "--top-p", "0"], &["top-p"]);
    run(
        &["run", "model", "-p", "a", "--cache", "int4"],
        &["--cache", "int4"],
    );
    run(
        &["run", "model", "-p", "a", "--threads", "100000"],
        &["--threads", "100000"],
    );
    run(&["run", "nothing", "-p", "a"], &["nothing"]);
    run(
        &["run", "model/model.safetensors", "-p", "a"],
        &["model.safetensors", "config.json"],
    );
    run(&["run", "model", "--chat", "-p", "a"], &["chat template"]);
    run(&["chat", "model"], &["model", "chat template"]);
    run(
        &["bench", "--shape", "huge"],
        &["shape", "huge", "bitnet-2b-4t"],
    );
    run(&["bench"], &["MODEL"]);
    run(
        &["perplexity", "model", "--text", "none.txt"],
        &["none.txt"],
    );
    fs::remove_file(dir.at("model/tokenizer.json")).unwrap();
    dir.refuses(&["run", "model", "-p", "a"], &["tokenizer.json"]);
}

#[test]
fn perplexity_and_the_distance_from_a_reference() {
    let dir = with_model();
    let text = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.\n".repeat(3);
    dir.write("text.txt", &text);
    for (name, recipe) in [
        ("int8", "--precision=int8"),
        ("ternary", "--precision=ternary"),
        ("q8.gguf", "--precision=int8"),
    ] {
        dir.run(&["quantize", "model", "--out", name, recipe]).is(0);
    }
    let measure = |model: &str, more: &[&str]| {
        let run = dir.run(
            &[
                &[
                    "perplexity",
                    model,
                    "--text",
                    "text.txt",
                    "--context",
                    "64",
                    "--json",
                    "--quiet",
                ],
                more,
            ]
            .concat(),
        );
        run.is(0);
        run.json()
    };
    let number = |v: &Value| v.as_f64().unwrap();
    let own = measure("model", &["--reference", "model"]);
    assert_eq!(
        (
            number(&own["divergence"]["mean"]),
            number(&own["same_top"]["mean"])
        ),
        (0.0, 1.0)
    );
    let perplexity = number(&own["model"]["perplexity"]);
    assert!(perplexity > 2.0 && perplexity < 100.0, "{perplexity}");
    assert_eq!(measure("model", &[])["model"], own["reference"]);
    let divergence = |model: &str| {
        let measured = measure(model, &["--reference", "model"]);
        (
            number(&measured["divergence"]["mean"]),
            number(&measured["same_top"]["mean"]),
            number(&measured["loss_difference"]["mean"]),
        )
    };
    let (int8, ternary) = (divergence("int8"), divergence("ternary"));
    assert!(
        int8.0 > 0.0 && int8.0 < 0.01 && int8.1 > 0.9 && int8.2.abs() < 0.05,
        "{int8:?}"
    );
    assert!(
        ternary.0 > 0.5 && ternary.1 < 0.9 && ternary.2 > 0.1,
        "{ternary:?}"
    );
    // The same tokens by the tokenizer of a GGUF.
    let gguf = measure("q8.gguf", &[]);
    assert_eq!(gguf["tokens"], own["tokens"]);
    let loss = |measured: &Value| number(&measured["loss"]["mean"]);
    let (own, gguf) = (loss(&own["reference"]), loss(&gguf["model"]));
    assert!((own - gguf).abs() < 0.05, "{own}, {gguf}");
    dir.write("short.txt", "a");
    dir.refuses(
        &["perplexity", "model", "--text", "short.txt"],
        &["text", "at least 2 tokens"],
    );
    dir.refuses(
        &[
            "perplexity",
            "model",
            "--text",
            "text.txt",
            "--context",
            "129",
        ],
        &["--context", "128", "129"],
    );
}

/// A model with a template: user lines and answers.
fn with_template() -> Dir {
    let dir = with_model();
    let template =
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}assistant:";
    dir.write_json(
        "model/tokenizer_config.json",
        &json!({"chat_template": template, "eos_token": "<eos>"}),
    );
    dir
}

#[test]
fn chat_keeps_the_conversation() {
    let dir = with_template();
    let mut child = dir
        .command(&["chat", "model", "--json", "-n", "8", "--system", "Be kind"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"one\n\ntwo\n")
        .unwrap();
    let document: Value =
        serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap();
    let turns = document["turns"].as_array().unwrap();
    assert_eq!(turns.len(), 2);
    // The second answer is that to the whole conversation, computed from where it differs from the
    // first.
    let answer = |turn: &Value| turn["assistant"].as_str().unwrap().trim().to_string();
    let whole = format!(
        "system: Be kind\nuser: one\nassistant: {}\nuser: two\nassistant:",
        answer(&turns[0])
    );
    let run = dir.run(&["run", "model", "--json", "-n", "8", "-p", &whole]);
    assert_eq!(run.json()["text"], turns[1]["assistant"]);
    let (all, computed) = (
        run.json()["prompt_tokens"].as_array().unwrap().len() as u64,
        turns[1]["speed"]["prompt_tokens"].as_u64().unwrap(),
    );
    assert!(computed < all, "{computed} of {all} tokens computed");
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let dir = with_template();
    let config = fs::read_to_string(dir.at("model/config.json")).unwrap();
    // Room for an answer that takes far longer than this test.
    dir.write(
        "model/config.json",
        config.replace(
            "\"max_position_embeddings\": 128",
            "\"max_position_embeddings\": 1000000",
        ),
    );
    let args = [
        "chat",
        "model",
        "-n",
        "900000",
        "--context",
        "1000000",
        "--ignore-eos",
        "--cache",
        "int8",
    ];
    let mut child = dir
        .command(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let interrupt = |id: u32| {
        assert!(
            std::process::Command::new("kill")
                .args(["-INT", &id.to_string()])
                .status()
                .unwrap()
                .success()
        )
    };
    let mut stdin = child.stdin.take().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let (seen, see) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut line = vec![];
        while out.read_until(b'\n', &mut line).unwrap() > 0 {
            let _ = seen.send(());
            line.clear();
        }
    });
    for message in ["one\n", "two\n"] {
        // Nothing more comes of the answer before.
        while see
            .recv_timeout(std::time::Duration::from_millis(300))
            .is_ok()
        {}
        stdin.write_all(message.as_bytes()).unwrap();
        // Something of the answer is there: it is being made.
        see.recv().unwrap();
        interrupt(child.id());
        let mut note = String::new();
        while !note.contains("stopped") {
            note.clear();
            assert!(err.read_line(&mut note).unwrap() > 0, "the program ended");
        }
    }
    drop((stdin, see));
    assert!(child.wait().unwrap().success());
    reader.join().unwrap();
}

#[test]
fn bench_measures_models_and_shapes() {
    let dir = with_model();
    for args in [
        &["model"][..],
        &["--shape", "tiny", "--embedding", "int8"],
        &["--shape", "tiny", "--embedding", "int4"],
        &["--shape", "bonsai-tiny"],
        &["--shape", "bonsai-tiny", "--activations", "int8"],
    ] {
        let run: Run = dir.run(
            &[
                &[
                    "bench", "--json", "--prompt", "16", "--tokens", "4", "--repeat", "2",
                ],
                args,
            ]
            .concat(),
        );
        run.is(0);
        let document = run.json();
        for key in [
            "prefill_tokens_per_second",
            "decode_tokens_per_second",
            "read_bytes_per_second",
        ] {
            let figure = |which: &str| document[key][which].as_f64().unwrap();
            assert!(
                figure("smallest") > 0.0
                    && figure("smallest") <= figure("median")
                    && figure("median") <= figure("largest"),
                "{document}"
            );
        }
        assert!(document["weight_bytes"].as_u64().unwrap() > 100_000);
        let number = |key: &str| document[key].as_f64().unwrap();
        let share = document["decode_tokens_per_second"]["median"]
            .as_f64()
            .unwrap()
            * number("bytes_per_token")
            / document["read_bytes_per_second"]["median"]
                .as_f64()
                .unwrap();
        assert!(
            (number("decode_share_of_read") / share - 1.0).abs() < 1e-9,
            "{document}"
        );
        // 2 layers of 256 and 16 tokens: q of 256, k and v of 128; o of 256 and three of 512, in
        // the last layer for one token.
        let products = 256.0 * (32.0 * (256.0 + 2.0 * 128.0) + 17.0 * (256.0 + 3.0 * 512.0));
        assert!(
            args[1..].first() != Some(&"tiny")
                || number("int8_multiply_adds_of_prefill") == products,
            "{document}"
        );
    }
    dir.refuses(&["bench", "model", "--shape", "tiny"], &["--shape"]);
    dir.refuses(
        &["bench", "model", "--prompt", "128"],
        &["context", "160", "128"],
    );
}
