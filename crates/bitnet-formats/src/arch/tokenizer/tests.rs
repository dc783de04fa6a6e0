use super::plan::BEFORE_SPACE;
use super::pre::{LLAMA3, QWEN2};
use super::to_gguf::{Pairs, express};
use super::*;
use crate::arch::values::find;
use crate::gguf::Array;
use crate::gguf::Value as G;
use serde_json::{Value, json};
use std::fs;

/// A small byte-level BPE with the words of Llama 3.
fn byte_level() -> Value {
    json!({
        "added_tokens": [
            {"id": 0, "content": "<s>", "special": true},
            {"id": 1, "content": "</s>", "special": true},
            {"id": 6, "content": "<tool>", "special": false},
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
        ]},
        "model": {"type": "BPE", "dropout": null, "end_of_word_suffix": null, "ignore_merges": true, "byte_fallback": false,
            "vocab": {"<s>": 0, "</s>": 1, "a": 2, "Ġ": 3, "Ġa": 4, "b": 5}, "merges": [["Ġ", "a"]]},
    })
}

/// A small BPE on text with ▁ for a space; `bytes` adds the 256 byte tokens.
fn spaced(bytes: bool) -> Value {
    let mut vocab = json!({"<unk>": 0, "a": 1, "▁": 2, "ab": 3, "▁ab": 4, "b": 5});
    if bytes {
        (0..256).for_each(|b| vocab[format!("<0x{b:02X}>")] = json!(6 + b));
    }
    json!({
        "added_tokens": [{"id": 0, "content": "<unk>", "special": true}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": null,
        "post_processor": null,
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": bytes, "vocab": vocab, "merges": ["a b", "▁ ab"]},
    })
}

fn settings() -> Value {
    json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
}

fn done(tokenizer: &Value, size: usize) -> (Pairs, Vec<String>) {
    express(tokenizer, &settings(), &json!({}), size).unwrap()
}

fn refused(tokenizer: &Value, size: usize) -> String {
    express(tokenizer, &settings(), &json!({}), size).unwrap_err()
}

fn get<'a>(pairs: &'a Pairs, key: &str) -> Option<&'a G> {
    find(pairs, &format!("tokenizer.ggml.{key}"))
}

fn strings(items: &[&str]) -> G {
    Array::String(items.iter().map(|s| s.to_string()).collect()).into()
}

#[test]
fn byte_level_keys() {
    let (pairs, notes) = done(&byte_level(), 9);
    assert_eq!(get(&pairs, "model"), Some(&G::from("gpt2")));
    assert_eq!(get(&pairs, "pre"), Some(&G::from("llama-bpe")));
    assert_eq!(
        get(&pairs, "tokens"),
        Some(&strings(&[
            "<s>", "</s>", "a", "Ġ", "Ġa", "b", "<tool>", "[PAD7]", "[PAD8]"
        ]))
    );
    assert_eq!(
        get(&pairs, "token_type"),
        Some(&Array::I32(vec![3, 3, 1, 1, 1, 1, 4, 5, 5]).into())
    );
    assert_eq!(get(&pairs, "merges"), Some(&strings(&["Ġ a"])));
    assert_eq!(get(&pairs, "bos_token_id"), Some(&G::U32(0)));
    assert_eq!(get(&pairs, "eos_token_id"), Some(&G::U32(1)));
    assert_eq!(get(&pairs, "add_bos_token"), Some(&G::Bool(true)));
    assert_eq!(get(&pairs, "add_eos_token"), Some(&G::Bool(false)));
    assert_eq!(get(&pairs, "scores"), None);
    assert!(
        matches!(notes.as_slice(), [one] if one.contains("2 rows")),
        "{notes:?}"
    );
}

#[test]
fn words_of_byte_level() {
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
    let regex = |regex: &str| {
        let plain = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        json!({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}, plain]})
    };
    let digits = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes]});
    for (split, ignore, pre) in [
        (bytes.clone(), false, Some("gpt-2")),
        (digits.clone(), false, Some("smollm")),
        (regex(LLAMA3), true, Some("llama-bpe")),
        (regex(LLAMA3), false, Some("smaug-bpe")),
        (regex(QWEN2), false, Some("qwen2")),
        (bytes, true, None),
        (digits, true, None),
        (regex(QWEN2), true, None),
        (regex(r"\s+"), false, None),
        (
            json!({"type": "ByteLevel", "add_prefix_space": true}),
            false,
            None,
        ),
    ] {
        let mut tokenizer = byte_level();
        tokenizer["pre_tokenizer"] = split.clone();
        tokenizer["model"]["ignore_merges"] = ignore.into();
        let got = express(&tokenizer, &settings(), &json!({}), 7)
            .ok()
            .map(|(pairs, _)| get(&pairs, "pre").unwrap().clone());
        assert_eq!(got, pre.map(G::from), "{split}");
    }
}

#[test]
fn spaced_with_bytes_is_llama() {
    let mut tokenizer = spaced(true);
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, tokenizer["normalizer"]]});
    let (pairs, _) = done(&tokenizer, 262);
    assert_eq!(get(&pairs, "model"), Some(&G::from("llama")));
    assert_eq!(get(&pairs, "pre"), None);
    assert_eq!(get(&pairs, "merges"), None);
    assert_eq!(get(&pairs, "add_space_prefix"), Some(&G::Bool(true)));
    assert_eq!(get(&pairs, "unknown_token_id"), Some(&G::U32(0)));
    let Some(Array::F32(scores)) = get(&pairs, "scores").and_then(G::as_array) else {
        panic!("no scores")
    };
    assert_eq!(&scores[..6], &[-2.0, -3.0, -4.0, 0.0, -1.0, -7.0]);
    let Some(Array::I32(types)) = get(&pairs, "token_type").and_then(G::as_array) else {
        panic!("no types")
    };
    assert_eq!(&types[..6], &[2, 1, 1, 1, 1, 1]);
    assert!(types[6..].iter().all(|&t| t == kind::BYTE));
}

#[test]
fn spaced_without_bytes_merges_by_rank() {
    let (pairs, notes) = done(&spaced(false), 6);
    assert_eq!(get(&pairs, "model"), Some(&G::from("gpt2")));
    assert_eq!(get(&pairs, "pre"), Some(&G::from("sarvam-moe")));
    assert_eq!(get(&pairs, "merges"), Some(&strings(&["a b", "▁ ab"])));
    assert!(
        notes.iter().any(|n| n.contains("does not know")),
        "{notes:?}"
    );
    let mut prefixed = spaced(false);
    prefixed["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    assert!(refused(&prefixed, 6).contains("no byte tokens"));
}

#[test]
fn merges_that_the_pieces_cut_are_refused() {
    let mut tokenizer = spaced(false);
    tokenizer["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": BEFORE_SPACE}, "behavior": "Isolated", "invert": false});
    assert!(express(&tokenizer, &settings(), &json!({}), 6).is_ok());
    tokenizer["model"]["merges"] = json!(["a b", "ab ▁"]);
    assert!(refused(&tokenizer, 6).contains("'ab' + '▁'"));
    let mut tokenizer = spaced(true);
    tokenizer["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true});
    tokenizer["model"]["merges"] = json!(["▁ ▁"]);
    assert!(refused(&tokenizer, 262).contains("'▁' + '▁'"));
}

#[test]
fn unigram_is_t5() {
    let tokenizer = json!({
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["b", -2.25]]},
    });
    let (pairs, notes) = done(&tokenizer, 3);
    assert_eq!(get(&pairs, "model"), Some(&G::from("t5")));
    assert_eq!(
        get(&pairs, "scores"),
        Some(&Array::F32(vec![0.0, -1.5, -2.25]).into())
    );
    assert_eq!(
        get(&pairs, "token_type"),
        Some(&Array::I32(vec![2, 1, 1]).into())
    );
    assert!(notes.iter().any(|n| n.contains("Metaspace")), "{notes:?}");
}

#[test]
fn what_gguf_cannot_express() {
    for (pointer, value, says) in [
        ("/model/type", json!("WordPiece"), "WordPiece"),
        ("/model/dropout", json!(0.1), "dropout"),
        (
            "/model/end_of_word_suffix",
            json!("</w>"),
            "end_of_word_suffix",
        ),
        ("/model/vocab", json!(null), "vocabulary"),
        ("/model/vocab/a", json!(100), "'a' has id 100"),
        ("/model/vocab/a", json!("x"), "'a' has id"),
        ("/model/vocab/a", json!(7), "token 'a' has id 7"),
        ("/model/merges", json!(["ab"]), "a merge is"),
        ("/model/merges", json!([["a", "b c"]]), "a merge is"),
        ("/added_tokens/0", json!({"id": "x"}), "an added token is"),
        ("/added_tokens/2/id", json!(50), "'<tool>' has id 50"),
        ("/added_tokens/2/content", json!("a"), "'a' is there twice"),
        ("/normalizer", json!({"type": "Lowercase"}), "Lowercase"),
        (
            "/pre_tokenizer",
            json!({"type": "Whitespace"}),
            "ignores merges",
        ),
        (
            "/post_processor",
            json!({"type": "BertProcessing"}),
            "BertProcessing",
        ),
        (
            "/post_processor/processors/1/single/0",
            json!({"SpecialToken": {"id": "</s>"}}),
            "template",
        ),
    ] {
        let mut tokenizer = byte_level();
        *tokenizer
            .pointer_mut(pointer)
            .unwrap_or_else(|| panic!("{pointer}")) = value;
        let reason = refused(&tokenizer, 7);
        assert!(reason.contains(says), "{pointer}: {reason}");
    }
}

#[test]
fn normal_forms_are_a_note() {
    let mut tokenizer = byte_level();
    tokenizer["normalizer"] = json!({"type": "NFC"});
    let (_, notes) = done(&tokenizer, 7);
    assert!(
        matches!(notes.as_slice(), [one] if one.contains("NFC")),
        "{notes:?}"
    );
}

#[test]
fn ids_from_config_json_and_flags_from_the_settings() {
    let mut tokenizer = byte_level();
    tokenizer["post_processor"] = Value::Null;
    let settings = json!({"add_bos_token": true, "add_eos_token": true});
    let (pairs, _) = express(
        &tokenizer,
        &settings,
        &json!({"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 99}),
        7,
    )
    .unwrap();
    assert_eq!(get(&pairs, "bos_token_id"), Some(&G::U32(0)));
    assert_eq!(get(&pairs, "eos_token_id"), Some(&G::U32(1)));
    assert_eq!(get(&pairs, "padding_token_id"), None);
    assert_eq!(
        (get(&pairs, "add_bos_token"), get(&pairs, "add_eos_token")),
        (Some(&G::Bool(true)), Some(&G::Bool(true)))
    );
    let (pairs, notes) = express(&tokenizer, &settings, &json!({}), 7).unwrap();
    assert_eq!(get(&pairs, "add_bos_token"), Some(&G::Bool(false)));
    assert!(notes.iter().any(|n| n.contains("end-of-text")), "{notes:?}");
}

#[test]
fn folders() {
    let folder = tempfile::tempdir().unwrap();
    let made = |losses: &mut Vec<String>| {
        gguf_tokenizer(folder.path(), &json!({}), 7, (losses, &mut vec![]))
    };
    let put = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let mut notes = vec![];
    assert_eq!(
        made(&mut notes).unwrap(),
        [("tokenizer.ggml.model".to_string(), G::from("none"))]
    );
    assert!(notes[0].contains("no tokenizer.json"));

    put(
        "tokenizer.json",
        r#"{"model": {"type": "WordLevel", "vocab": {}}}"#,
    );
    assert_eq!(made(&mut notes).unwrap().len(), 1);
    assert!(notes[1].contains("WordLevel"), "{notes:?}");

    put("tokenizer.json", "{");
    assert!(
        made(&mut notes)
            .unwrap_err()
            .to_string()
            .contains("tokenizer.json: expected JSON")
    );

    put("tokenizer.json", &byte_level().to_string());
    put(
        "tokenizer_config.json",
        r#"{"bos_token": "<s>", "chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]}"#,
    );
    let template = |pairs: &Pairs| find(pairs, "tokenizer.chat_template").cloned();
    assert_eq!(template(&made(&mut notes).unwrap()), Some(G::from("y")));
    put("chat_template.jinja", "z");
    assert_eq!(template(&made(&mut notes).unwrap()), Some(G::from("z")));
}

#[test]
fn added_tokens_beyond_the_embedding_are_left_out_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let mut tokenizer = byte_level();
    tokenizer["model"]["vocab"]["<tool>"] = json!(6);
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let settings = folder.path().join("tokenizer_config.json");
    fs::write(settings, r#"{"bos_token": "<s>"}"#).unwrap();
    for (rows, expected) in [(7, 0), (6, 1)] {
        let (mut losses, mut notes) = (vec![], vec![]);
        let said = (&mut losses, &mut notes);
        let pairs = gguf_tokenizer(folder.path(), &json!({}), rows, said).unwrap();
        assert!(
            find(&pairs, "tokenizer.ggml.tokens").is_some(),
            "{losses:?}"
        );
        assert_eq!(losses.len(), expected, "{losses:?}");
        assert!(
            losses.iter().all(|loss| loss.contains("token 6 '<tool>'")),
            "{losses:?}"
        );
    }
}

#[test]
fn byte_level_goes_round() {
    let (pairs, _) = done(&byte_level(), 9);
    let (tokenizer, settings) = hf_tokenizer(&pairs).unwrap();
    assert_eq!(tokenizer["pre_tokenizer"], byte_level()["pre_tokenizer"]);
    assert_eq!(
        tokenizer["model"]["merges"],
        byte_level()["model"]["merges"]
    );
    assert_eq!(tokenizer["model"]["ignore_merges"], true);
    assert_eq!(
        (&settings["bos_token"], &settings["eos_token"]),
        (&json!("<s>"), &json!("</s>"))
    );
    let (again, _) = express(&tokenizer, &settings, &json!({}), 9).unwrap();
    assert_eq!(pairs, again);
}

#[test]
fn only_known_byte_level_tokenizers_go_back() {
    assert_eq!(hf_tokenizer(&[]), None);
    assert_eq!(hf_tokenizer(&done(&spaced(true), 262).0), None);
    assert_eq!(hf_tokenizer(&done(&spaced(false), 6).0), None);
    let (mut pairs, _) = done(&byte_level(), 7);
    pairs.retain(|(k, _)| k != "tokenizer.ggml.token_type");
    assert_eq!(hf_tokenizer(&pairs), None);
}
