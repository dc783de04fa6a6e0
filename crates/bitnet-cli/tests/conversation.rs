//! Prompts, templates and conversations as people have them.

mod common;

use common::Dir;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

const TEMPLATE: &str =
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}assistant:";

/// A folder with the committed model as `model`, with this `tokenizer_config.json`.
fn model(settings: &Value) -> Dir {
    let dir = Dir::new();
    fs::create_dir(dir.at("model")).unwrap();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/glassllm-en");
    for entry in fs::read_dir(assets).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.at("model").join(path.file_name().unwrap())).unwrap();
    }
    dir.write_json("model/tokenizer_config.json", settings);
    dir
}

/// Runs the program with this on stdin.
fn piped(dir: &Dir, args: &[&str], stdin: &[u8]) -> Output {
    let mut child = dir
        .command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin).unwrap();
    child.wait_with_output().unwrap()
}

fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_full_context_drops_the_oldest_turns() {
    let dir = model(&json!({"chat_template": TEMPLATE}));
    let questions: String = (0..8).map(|i| format!("Who is number {i}?\n")).collect();
    let args = [
        "chat",
        "model",
        "--json",
        "-n",
        "6",
        "--system",
        "Be kind",
        "--context",
        "96",
    ];
    let output = piped(&dir, &args, questions.as_bytes());
    let document = document(&output);
    assert_eq!(document["turns"].as_array().unwrap().len(), 8);
    let dropped = document["dropped_turns"].as_u64().unwrap();
    assert!((1..8).contains(&dropped), "{dropped}");
    assert_eq!(document["refused_messages"], 0);
    let said = stderr(&output);
    assert!(said.contains("no longer sees the oldest"), "{said}");
    assert!(output.status.success());
}

#[test]
fn a_message_that_is_too_long_does_not_end_the_conversation() {
    let dir = model(&json!({"chat_template": TEMPLATE}));
    let input = format!("Hello\n{}\nHow are you?\n", "Alice ".repeat(200));
    let output = piped(
        &dir,
        &["chat", "model", "--json", "-n", "4"],
        input.as_bytes(),
    );
    assert!(output.status.success());
    let document = document(&output);
    assert_eq!(document["turns"].as_array().unwrap().len(), 2);
    assert_eq!(
        (&document["refused_messages"], &document["dropped_turns"]),
        (&1.into(), &0.into())
    );
    assert!(stderr(&output).contains("not sent"));
}

#[test]
fn the_document_of_a_conversation_that_fails_has_its_turns() {
    let dir = model(&json!({"chat_template": TEMPLATE}));
    let output = piped(
        &dir,
        &["chat", "model", "--json", "-n", "4"],
        b"Hello\n\xff\xfe\n",
    );
    assert_eq!(output.status.code(), Some(2));
    let document = document(&output);
    assert_eq!(document["turns"][0]["user"], "Hello");
    assert!(document["error"].as_str().unwrap().contains("stdin"));
}

#[test]
fn a_template_that_does_not_parse_is_an_error_of_chats_only() {
    let dir = model(&json!({"chat_template": "{% if %}"}));
    dir.run(&["run", "model", "-p", "Alice", "-n", "2"]).is(0);
    dir.refuses(
        &["run", "model", "--chat", "-p", "Alice"],
        &["chat template", "model", "syntax error"],
    );
    let output = piped(&dir, &["chat", "model"], b"Hello\n");
    assert_eq!(output.status.code(), Some(2));
    // Python writes numbers that JSON does not have, and editors a byte order mark.
    dir.write(
        "model/tokenizer_config.json",
        "\u{feff}{\"model_max_length\": Infinity, \"x\": NaN}",
    );
    dir.run(&["run", "model", "-p", "Alice", "-n", "2"]).is(0);
}

#[test]
fn a_token_without_a_row_is_refused_where_it_occurs() {
    let dir = model(&json!({}));
    let tokenizer = fs::read_to_string(dir.at("model/tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    let mut token = tokenizer["added_tokens"][0].clone();
    (token["id"], token["content"]) = (1024.into(), "<tool>".into());
    tokenizer["added_tokens"]
        .as_array_mut()
        .unwrap()
        .push(token);
    dir.write_json("model/tokenizer.json", &tokenizer);
    let run = dir.run(&["run", "model", "-p", "Alice", "-n", "2"]);
    run.is(0);
    let said = run.stderr();
    assert!(
        said.contains("token 1024 \"<tool>\"") && said.contains("1024 rows"),
        "{said}"
    );
    dir.refuses(
        &["run", "model", "-p", "Alice <tool>", "--quiet"],
        &["tokenizer.json", "1024", "<tool>", "1024 rows"],
    );
}

#[test]
fn what_is_printed_is_what_the_model_said() {
    let dir = model(&json!({}));
    let tokenizer = fs::read_to_string(dir.at("model/tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    tokenizer["decoder"]["decoders"][0]["content"] = "\r\u{1b}[".into();
    dir.write_json("model/tokenizer.json", &tokenizer);
    let run = dir.run(&[
        "run",
        "model",
        "-p",
        "Alice was beginning to",
        "-n",
        "8",
        "--quiet",
    ]);
    run.is(0);
    assert!(run.stdout().contains("\r\u{1b}["), "{:?}", run.stdout());
}

#[test]
fn a_start_token_that_the_tokenizer_adds_too_is_said() {
    let dir = model(&json!({"add_bos_token": true, "bos_token": "<bos>"}));
    let run = |prompt: &str| {
        let run = dir.run(&["run", "model", "--json", "-n", "1", "-p", prompt]);
        run.is(0);
        (
            run.json()["prompt_tokens"].clone(),
            run.stderr().contains("twice"),
        )
    };
    let (tokens, said) = run("<bos>Alice");
    assert_eq!((&tokens[0], &tokens[1], said), (&2.into(), &2.into(), true));
    let (tokens, said) = run("Alice");
    assert!(tokens[0] == 2 && tokens[1] != 2 && !said);
}

#[test]
fn a_byte_order_mark_is_no_text() {
    let dir = model(&json!({"chat_template": TEMPLATE}));
    let run = |args: &[&str], text: &str| {
        let marked = piped(&dir, args, format!("\u{feff}{text}").as_bytes());
        assert!(stderr(&marked).contains("byte order mark"));
        (
            document(&marked),
            document(&piped(&dir, args, text.as_bytes())),
        )
    };
    let (marked, plain) = run(&["run", "model", "--json", "-n", "4"], "Alice was");
    assert_eq!(marked["prompt_tokens"], plain["prompt_tokens"]);
    let (marked, plain) = run(&["chat", "model", "--json", "-n", "4"], "Hello\n");
    assert_eq!(marked["turns"][0]["user"], plain["turns"][0]["user"]);
    dir.write(
        "plain.txt",
        "Alice was beginning to get very tired of sitting.",
    );
    dir.write(
        "marked.txt",
        "\u{feff}Alice was beginning to get very tired of sitting.",
    );
    let measure = |text: &str| {
        let run = dir.run(&["perplexity", "model", "--json", "--text", text]);
        run.is(0);
        run.json()
    };
    assert_eq!(measure("plain.txt"), measure("marked.txt"));
}

#[test]
fn tools_reach_the_template() {
    let dir = model(&json!({"chat_template": [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }} {{ messages[0].content }}"},
    ]}));
    dir.write(
        "tools.json",
        r#"[{"type": "function", "function": {"name": "Alice"}}]"#,
    );
    let tokens = |args: &[&str]| {
        let run = dir.run(&[&["run", "model", "--json", "-n", "1"], args].concat());
        run.is(0);
        run.json()["prompt_tokens"].clone()
    };
    let chat = ["--chat", "-p", "was"];
    assert_eq!(tokens(&chat), tokens(&["-p", "was"]));
    let with = [&chat[..], &["--tools", "tools.json"]].concat();
    assert_eq!(tokens(&with), tokens(&["-p", "Alice was"]));
    dir.write("tools.json", "{}");
    dir.refuses(
        &[&["run", "model"], &with[..]].concat(),
        &["tools.json", "JSON list"],
    );
    dir.refuses(
        &["run", "model", "-p", "x", "--tools", "tools.json"],
        &["--chat"],
    );
}
