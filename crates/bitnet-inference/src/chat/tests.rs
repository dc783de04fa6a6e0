//! Rendering of templates.

use super::*;
use serde_json::Value;
use std::fs;

const CHATML: &str = "{% for message in messages %}\
    {% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}\
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn of(text: &str, specials: &[(&str, &str)]) -> ChatTemplate {
    let owned = |(name, text): &(&str, &str)| (name.to_string(), text.to_string());
    let found = Found {
        templates: vec![owned(&(DEFAULT, text))],
        specials: specials.iter().map(owned).collect(),
        notes: vec![],
    };
    ChatTemplate::new(Path::new("some/model"), found, None)
}

#[test]
fn templates_render_as_in_transformers() {
    let template = of(CHATML, &[]);
    let text = template
        .render(&[ChatMessage::new("user", "Hi")], None)
        .unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    // b1.58-2B-4T: python's string methods, special tokens, line breaks after blocks.
    let text = "{% set loop_messages = messages %}{% for message in loop_messages %}\n\
        {% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}\
        {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}\
        {{ content }}{% endfor %}{% if add_generation_prompt %}\
        {{ 'Assistant: '.strip() + ' ' }}{% endif %}";
    let template = of(text, &[("bos_token", "<|begin_of_text|>")]);
    let text = template
        .render(&[ChatMessage::new("user", " Hi ")], None)
        .unwrap();
    assert_eq!(text, "<|begin_of_text|>User: Hi<|eot_id|>Assistant: ");
}

#[test]
fn what_a_template_refuses_is_said() {
    let refused = |text: &str| {
        let refused = of(text, &[]).render(&[], None);
        refused.unwrap_err().to_string()
    };
    let message = refused("{{ raise_exception('only users speak here') }}");
    assert!(message.contains("only users speak here"), "{message}");
    assert!(refused("{% if %}").contains("some/model: syntax error"));
}

/// The templates of tests/golden/chat, against what transformers renders of them.
#[test]
fn templates_of_models_render_as_in_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat");
    let golden = fs::read_to_string(folder.join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let now: jiff::civil::DateTime = golden["now"].as_str().unwrap().parse().unwrap();
    let now = now.in_tz("UTC").unwrap();
    let conversations = golden["conversations"].as_object().unwrap();
    let mut wrong = vec![];
    for (name, texts) in golden["templates"].as_object().unwrap() {
        let text = fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let specials = golden["specials"].as_object().unwrap();
        let found = Found {
            templates: vec![(DEFAULT.into(), text)],
            specials: specials
                .iter()
                .map(|(k, v)| (k.clone(), v.as_str().unwrap().into()))
                .collect(),
            notes: vec![],
        };
        let template = ChatTemplate::new(Path::new(name), found, Some(now.clone()));
        for (case, want) in texts.as_object().unwrap() {
            let conversation = &conversations[case];
            let tools = &conversation["tools"];
            let tools = (!tools.is_null()).then(|| Tools::from_json(&tools.to_string()).unwrap());
            let messages = Jinja::from(minijinja::value::Serde(&conversation["messages"]));
            let got = template.render_values(messages, tools.as_ref());
            if got.as_deref().ok() != want.as_str() {
                wrong.push(format!(
                    "{name}, {case}:\n got {got:?}\nwant {:?}\n",
                    want.as_str()
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn a_hostile_template_ends_with_one_line() {
    let deep =
        |open: &str, close: &str, n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
    for text in [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".into(),
        "{% set x = namespace(t='x') %}{% for i in range(99) %}{% set x.t = x.t ~ x.t %}{% endfor %}"
            .into(),
        "{{ 'x' * 10000000000 }}".into(),
        "{{ '%9999999999d' % 1 }}".into(),
        "{{ '%*d' % (999999999, 1) }}".into(),
        "{{ '{:999999999}'.format(1) }}".into(),
        "{{ 'x'.center(9999999999) }}".into(),
        "{{ 'x'.zfill(18446744073709551615) }}".into(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% include 'default' %}".into(),
        "{{ range(999999999) | list | tojson }}".into(),
        "{{ strftime_now('%' * 99999999) }}".into(),
        format!("{{{{ {}1 }}}}", "-".repeat(20_000)),
        format!("{{{{ {}1 }}}}", "1 % ".repeat(200)),
        format!("{{{{ {} }}}}", deep("(", ")", 200)),
        format!("{{{{ {} }}}}", deep("[", "]", 200)),
        deep("{% if true %}", "{% endif %}", 200),
        deep("{% generation %}", "{% endgeneration %}", 200),
        "x".repeat(MAX_TEMPLATE + 1),
    ] {
        let shown = text.get(..60).unwrap_or(&text).to_string();
        let rendered = of(&text, &[]).render(&[], None);
        let message = rendered.map(|t| t.len()).expect_err(&shown).to_string();
        assert!(!message.contains('\n'), "{shown}: {message}");
    }
    // As many operations as are allowed do not exhaust the stack of a thread.
    for text in [
        format!("{{{{ {}1 }}}}", "-".repeat(240)),
        format!("{{{{ {}1 }}}}", "1+".repeat(240)),
        format!("{{{{ 'a'{} }}}}", "|trim".repeat(240)),
        format!("{{{{ {}1 }}}}", "1 % ".repeat(30)),
        format!("{{{{ {} }}}}", deep("(1 % (1 + ", "))", 15)),
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(240)),
    ] {
        let shown = &text[..20];
        assert!(of(&text, &[]).render(&[], None).is_ok(), "{shown}");
    }
}

#[test]
fn tools_take_the_template_for_them() {
    let named = |name: &str, text: &str| (name.to_string(), text.to_string());
    let found = Found {
        templates: vec![
            named("default", "plain"),
            named("tool_use", "{{ tools | length }}"),
        ],
        ..Found::default()
    };
    let template = ChatTemplate::new(Path::new("m"), found, None);
    let tools = Tools::from_json(r#"[{"name": "f"}]"#).unwrap();
    assert_eq!(template.render(&[], None).unwrap(), "plain");
    assert_eq!(template.render(&[], Some(&tools)).unwrap(), "1");
    assert!(Tools::from_json("{}").is_err());
    assert!(Tools::from_json("[1]").is_err());
    let found = Found {
        templates: vec![named("rag", ""), named("other", "")],
        ..Found::default()
    };
    let message = ChatTemplate::new(Path::new("m"), found, None).render(&[], None);
    let message = message.unwrap_err().to_string();
    assert!(
        message.contains("default") && message.contains("other, rag"),
        "{message}"
    );
}

#[test]
fn templates_in_a_folder_of_their_own_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    write("additional_chat_templates/tool_use.jinja", "with tools");
    write("additional_chat_templates/notes.txt", "no template");
    write("chat_template.jinja", "without");
    write("config.json", r#"{"model_type": "llama"}"#);
    let header = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend_from_slice(&[0; 4]);
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let found = Found::read(&bitnet_formats::Source::open(folder.path()).unwrap()).unwrap();
    let owned = |name: &str, text: &str| (name.to_string(), text.to_string());
    let expected = [owned(DEFAULT, "without"), owned("tool_use", "with tools")];
    assert_eq!(found.templates, expected);
}
