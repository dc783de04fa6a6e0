use super::plan::BEFORE_SPACE;
use super::pre::{LLAMA3, PRE, QWEN2, split};
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
            split(LLAMA3),
            pre::byte_level(false, true, false),
        ]},
        "post_processor": {"type": "Sequence", "processors": [
            pre::byte_level(true, false, true),
            {"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ]},
        ]},
        "model": {
            "type": "BPE",
            "dropout": null,
            "end_of_word_suffix": null,
            "ignore_merges": true,
            "byte_fallback": false,
            "vocab": {"<s>": 0, "</s>": 1, "a": 2, "Ġ": 3, "Ġa": 4, "b": 5},
            "merges": [["Ġ", "a"]],
        },
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
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": bytes,
            "vocab": vocab,
            "merges": ["a b", "▁ ab"],
        },
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
    let bytes = pre::byte_level(false, true, true);
    let sequence = |steps: &[Value]| json!({"type": "Sequence", "pretokenizers": steps});
    let regex = |regex: &str| sequence(&[split(regex), pre::byte_level(false, true, false)]);
    let single = json!({"type": "Digits", "individual_digits": true});
    let digits = sequence(&[single, bytes.clone()]);
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
        // No merge makes this token, so `ignore_merges` matters.
        tokenizer["model"]["vocab"]["ab"] = json!(7);
        let got = express(&tokenizer, &settings(), &json!({}), 8)
            .ok()
            .map(|(pairs, _)| get(&pairs, "pre").unwrap().clone());
        assert_eq!(got, pre.map(G::from), "{split}");
        tokenizer["model"]["vocab"]
            .as_object_mut()
            .unwrap()
            .remove("ab");
        let got = express(&tokenizer, &settings(), &json!({}), 7).map(|(pairs, _)| pairs);
        let written = got.ok().and_then(|pairs| get(&pairs, "pre").cloned());
        let words = found_words(&tokenizer).is_some_and(|found| {
            let same = |p: &pre::PreTokenizer| pre::compare(&found, p.steps) == pre::Match::Same;
            PRE.iter().any(same)
        });
        assert_eq!(written.is_some(), words, "{split}");
    }
}

fn found_words(tokenizer: &Value) -> Option<Vec<pre::FoundStep>> {
    pre::found_steps(&plan::steps(tokenizer, "pre_tokenizer", "pretokenizers"))
}

#[test]
fn spaced_with_bytes_is_llama() {
    let mut tokenizer = spaced(true);
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        tokenizer["normalizer"],
    ]});
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
    tokenizer["pre_tokenizer"] = split(BEFORE_SPACE);
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
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": false,
        },
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": false,
            "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["b", -2.25]],
        },
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
        ("/model/type", json!("WordLevel"), "WordLevel"),
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
            "Whitespace",
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
        r#"{"bos_token": "<s>", "chat_template": [
            {"name": "tool", "template": "x"},
            {"name": "default", "template": "y"}
        ]}"#,
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
fn only_known_tokenizers_go_back() {
    let refused = |pairs: &Pairs| hf_tokenizer(pairs).unwrap_err();
    assert!(refused(&vec![]).contains("tokenizer.ggml.model"));
    let (pairs, _) = done(&byte_level(), 7);
    for (key, says) in [
        ("token_type", "a number for each of 7 tokens, got nothing"),
        ("tokens", "a list of texts"),
        ("merges", "a list of texts"),
        ("pre", "got none; convert the model again"),
    ] {
        let mut pairs = pairs.clone();
        pairs.retain(|(k, _)| *k != format!("tokenizer.ggml.{key}"));
        let reason = refused(&pairs);
        assert!(reason.contains(key) && reason.contains(says), "{reason}");
    }
    for (key, value, says) in [
        ("model", G::from("rwkv"), "got \"rwkv\""),
        ("pre", G::from("falcon"), "qwen2, qwen35"),
        ("merges", strings(&["ab"]), "got \"ab\""),
    ] {
        let mut pairs = pairs.clone();
        put(&mut pairs, key, value);
        let reason = refused(&pairs);
        assert!(reason.contains(key) && reason.contains(says), "{reason}");
    }
}

fn put(pairs: &mut Pairs, key: &str, value: G) {
    let key = format!("tokenizer.ggml.{key}");
    pairs.retain(|(k, _)| *k != key);
    pairs.push((key, value));
}

#[test]
fn scored_merges_go_back_as_all_splits() {
    let mut tokenizer = spaced(true);
    tokenizer["model"]["vocab"]["▁a"] = json!(262);
    tokenizer["model"]["merges"] = json!(["a b", "▁ ab", "▁ a", "▁a b"]);
    let (mut pairs, _) = done(&tokenizer, 263);
    let (back, settings) = hf_tokenizer(&pairs).unwrap();
    let expected = json!([["a", "b"], ["▁a", "b"], ["▁", "ab"], ["▁", "a"]]);
    assert_eq!(back["model"]["merges"], expected);
    assert_eq!(back["model"]["byte_fallback"], true);
    assert_eq!(back["model"]["unk_token"], "<unk>");
    assert_eq!(back["normalizer"], tokenizer["normalizer"]);
    assert_eq!(settings["add_bos_token"], false);
    // What llama.cpp takes without the keys.
    pairs.retain(|(k, _)| !k.contains("add_"));
    let (back, settings) = hf_tokenizer(&pairs).unwrap();
    assert_eq!(settings["add_bos_token"], true);
    assert_eq!(back["normalizer"]["normalizers"][0]["type"], "Prepend");
    // Without all bytes.
    let Some(G::Array(Array::String(mut tokens))) = get(&pairs, "tokens").cloned() else {
        panic!("no tokens")
    };
    tokens[6] = "x".into();
    put(&mut pairs, "tokens", Array::String(tokens).into());
    assert!(hf_tokenizer(&pairs).unwrap_err().contains("256 bytes"));
}

#[test]
fn merges_that_no_scores_describe_are_ranked() {
    let mut tokenizer = spaced(true);
    // Nothing joins ▁ and a, though "▁a" is a token.
    tokenizer["model"]["vocab"]["▁a"] = json!(262);
    let (pairs, _) = done(&tokenizer, 263);
    assert_eq!(get(&pairs, "pre"), Some(&G::from("sarvam-moe")));
    assert_eq!(get(&pairs, "scores"), None);
    let (back, _) = hf_tokenizer(&pairs).unwrap();
    assert_eq!(back["model"]["merges"], json!([["a", "b"], ["▁", "ab"]]));
    assert_eq!(back["pre_tokenizer"], split(plan::LINES));
    let (again, _) = done(&back, 263);
    assert_eq!(get(&again, "merges"), get(&pairs, "merges"));
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        tokenizer["normalizer"],
    ]});
    let reason = refused(&tokenizer, 263);
    assert!(reason.contains("two pieces of the token '▁a'"), "{reason}");
}

#[test]
fn digits_that_never_merge_are_runs_of_digits() {
    let mut tokenizer = byte_level();
    let pre = PRE.iter().find(|pre| pre.name() == "deepseek-llm").unwrap();
    let mut words = pre::hf_pre_tokenizer(pre.steps);
    let steps = words["pretokenizers"].as_array_mut().unwrap();
    let at = steps.len() - 2;
    steps[at] = json!({"type": "Digits", "individual_digits": true});
    tokenizer["pre_tokenizer"] = words;
    tokenizer["model"]["ignore_merges"] = false.into();
    let (pairs, _) = done(&tokenizer, 7);
    assert_eq!(get(&pairs, "pre"), Some(&G::from("deepseek-llm")));
    for (token, id) in [("1", 7), ("2", 8), ("12", 9)] {
        tokenizer["model"]["vocab"][token] = json!(id);
    }
    tokenizer["model"]["merges"] = json!(["1 2"]);
    assert!(refused(&tokenizer, 10).contains("its pre-tokenizer is"));
}

#[test]
fn every_pre_tokenizer_is_written_as_itself() {
    for pre in PRE.iter() {
        let mut tokenizer = byte_level();
        tokenizer["pre_tokenizer"] = pre::hf_pre_tokenizer(pre.steps);
        tokenizer["model"]["ignore_merges"] = pre.ignore_merges.into();
        let (mut pairs, notes) = done(&tokenizer, 7);
        let first = PRE.iter().find(|p| {
            pre::compare(&found_words(&tokenizer).unwrap(), p.steps) == pre::Match::Same
                && p.ignore_merges == pre.ignore_merges
        });
        let name = first.unwrap().name();
        assert_eq!(get(&pairs, "pre"), Some(&G::from(name)));
        let differs = |n: &String| pre.differs == Some(n.as_str());
        assert_eq!(notes.iter().any(differs), pre.differs.is_some(), "{name}");
        for name in pre.names {
            put(&mut pairs, "pre", G::from(*name));
            let (back, _) = hf_tokenizer(&pairs).unwrap();
            assert_eq!(back["pre_tokenizer"], tokenizer["pre_tokenizer"], "{name}");
            let ignores = &back["model"]["ignore_merges"];
            assert_eq!(*ignores, pre.ignore_merges, "{name}");
        }
    }
}

#[test]
fn spellings_of_the_same_words() {
    let cl100k = concat!(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    );
    let mut step = split(cl100k);
    step["behavior"] = "Removed".into();
    step["invert"] = true.into();
    let bytes = pre::byte_level(false, true, false);
    let found = pre::found_steps(&[&step, &bytes]).unwrap();
    let known = [pre::Step::Regex(LLAMA3)];
    assert_eq!(pre::compare(&found, &known), pre::Match::Same);
    // Words that leave something between them cannot be what is kept.
    step["pattern"]["Regex"] = r"\p{N}".into();
    assert_eq!(pre::found_steps(&[&step, &bytes]), None);
}

/// A small WordPiece tokenizer.
fn words() -> Value {
    json!({
        "added_tokens": [
            {"id": 0, "content": "[PAD]", "special": true},
            {"id": 1, "content": "[UNK]", "special": true},
            {"id": 2, "content": "[CLS]", "special": true},
            {"id": 3, "content": "[SEP]", "special": true},
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": true,
            "strip_accents": null,
            "lowercase": true,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "##a": 5, "##": 6},
        },
    })
}

#[test]
fn wordpiece_is_bert() {
    let (pairs, notes) = express(&words(), &json!({}), &json!({}), 8).unwrap();
    assert_eq!(get(&pairs, "model"), Some(&G::from("bert")));
    let expected = [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁a", "a", "▁##", "[PAD7]",
    ];
    assert_eq!(get(&pairs, "tokens"), Some(&strings(&expected)));
    for (key, id) in [
        ("bos_token_id", 2),
        ("cls_token_id", 2),
        ("seperator_token_id", 3),
        ("unknown_token_id", 1),
    ] {
        assert_eq!(get(&pairs, key), Some(&G::U32(id)), "{key}");
    }
    assert_eq!(get(&pairs, "normalizer.lowercase"), None);
    assert!(
        notes.iter().any(|n| n.contains("100 characters")),
        "{notes:?}"
    );

    let (back, settings) = hf_tokenizer(&pairs).unwrap();
    assert_eq!(back["model"], words()["model"]);
    let template = &back["post_processor"];
    assert_eq!(template["single"][0]["SpecialToken"]["id"], "[CLS]");
    assert_eq!(template["pair"].as_array().unwrap().len(), 5);
    assert_eq!(settings["cls_token"], "[CLS]");
    let (again, _) = express(&back, &settings, &json!({}), 8).unwrap();
    assert_eq!(get(&again, "tokens"), get(&pairs, "tokens"));

    let mut cased = words();
    cased["normalizer"]["lowercase"] = false.into();
    let (pairs, _) = express(&cased, &json!({}), &json!({}), 8).unwrap();
    assert_eq!(get(&pairs, "normalizer.lowercase"), Some(&G::Bool(false)));
    let (back, _) = hf_tokenizer(&pairs).unwrap();
    assert_eq!(back["normalizer"]["strip_accents"], false);
}

#[test]
fn what_bert_cannot_express() {
    for (pointer, value, says) in [
        ("/model/continuing_subword_prefix", json!("@@"), "@@"),
        ("/normalizer/clean_text", json!(false), "normalizer"),
        ("/normalizer", json!(null), "normalizer"),
        ("/pre_tokenizer/type", json!("Whitespace"), "Whitespace"),
        ("/post_processor", json!(null), "no special tokens"),
        (
            "/post_processor/cls/0",
            json!("[X]"),
            "'[X]', which is not there",
        ),
    ] {
        let mut tokenizer = words();
        *tokenizer.pointer_mut(pointer).unwrap() = value;
        let reason = express(&tokenizer, &json!({}), &json!({}), 8).unwrap_err();
        assert!(reason.contains(says), "{pointer}: {reason}");
    }
}

#[test]
fn unigram_keeps_its_table_and_drops_spaces() {
    // 4 bytes of trie, and one replacement.
    let table = charsmap::encode(&[4, 0, 0, 0, 1, 2, 3, 4, b'x', 0]);
    let tokenizer = json!({
        "added_tokens": [{"id": 0, "content": "<unk>", "special": true}],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        ]},
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["b", -2.25], ["▁", -3.0]],
        },
    });
    let (pairs, notes) = done(&tokenizer, 5);
    assert!(!notes.iter().any(|n| n.contains("space")), "{notes:?}");
    let collapse = get(&pairs, "remove_extra_whitespaces");
    assert_eq!(collapse, Some(&G::Bool(true)));
    let (back, _) = hf_tokenizer(&pairs).unwrap();
    assert_eq!(
        back["normalizer"]["normalizers"][0],
        tokenizer["normalizer"]
    );
    let unused = json!(["[PAD4]", -1e6]);
    assert_eq!(back["model"]["vocab"][4], unused);
    assert_eq!(back["model"]["unk_id"], 0);
    let (again, _) = done(&back, 5);
    assert_eq!(
        get(&again, "precompiled_charsmap"),
        get(&pairs, "precompiled_charsmap")
    );

    let mut cut = tokenizer.clone();
    cut["model"]["vocab"][1][0] = "a▁b".into();
    assert!(refused(&cut, 5).contains("cuts its token 'a▁b'"));
    let mut short = tokenizer.clone();
    short["normalizer"]["precompiled_charsmap"] = "BAAAAAA=".into();
    assert!(refused(&short, 5).contains("precompiled_charsmap"));
}
