use super::*;

/// The keys of a file with matrices a (8 columns), b (12 columns) and a table of 8 columns.
fn keys() -> Vec<(String, Value)> {
    let names =
        |all: &[&str]| Value::from(Array::String(all.iter().map(|n| n.to_string()).collect()));
    let mut signs = vec![1i8; 20];
    for i in [1, 5, 8, 19] {
        signs[i] = -1;
    }
    [
        ("version", Value::U8(1)),
        ("transform", TRANSFORM.into()),
        ("axis", AXIS.into()),
        ("block_size", Value::I64(4)),
        ("sign_mode", "explicit".into()),
        ("sign_widths", Array::U64(vec![8, 12]).into()),
        ("sign_values", Array::I8(signs).into()),
        ("weight_names", names(&["a.weight", "b"])),
        ("inverse_weight_names", names(&["token_embd.weight"])),
        ("gdn_v_grouped", Value::Bool(false)),
    ]
    .into_iter()
    .map(|(key, value)| (format!("{ROTATION_PREFIX}.{key}"), value))
    .collect()
}

fn shape(name: &str) -> Option<Vec<usize>> {
    match name {
        "a.weight" => Some(vec![3, 8]),
        "b.weight" => Some(vec![2, 5, 12]),
        "blk.0.ssm_out.weight" => Some(vec![3, 8]),
        "token_embd.weight" => Some(vec![100, 8]),
        "bias" => Some(vec![8]),
        "odd.weight" => Some(vec![2, 6]),
        "other.weight" => Some(vec![2, 16]),
        _ => None,
    }
}

fn read(keys: &[(String, Value)]) -> Result<Option<Rotation>, RotationError> {
    let names = ["a.weight", "b.weight", "token_embd.weight"];
    RotationFacts::from_gguf(keys)?
        .map(|facts| Rotation::check(ROTATION_PREFIX, facts, &shape, &mut names.into_iter()))
        .transpose()
}

/// The keys with another value of one; `None` removes it.
fn with(key: &str, value: Option<Value>) -> Vec<(String, Value)> {
    let full = format!("{ROTATION_PREFIX}.{key}");
    let mut all: Vec<_> = keys().into_iter().filter(|(k, _)| *k != full).collect();
    all.extend(value.map(|value| (full, value)));
    all
}

#[test]
fn all_keys_are_read_and_written() {
    assert_eq!(read(&[("general.name".into(), "x".into())]).unwrap(), None);
    let rotation = read(&keys()).unwrap().unwrap();
    let a = rotation.of("a.weight").unwrap().unwrap();
    assert_eq!((a.width(), a.block()), (8, 4));
    assert_eq!(
        a.signs().unwrap(),
        [1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    );
    let b = rotation.of("b.weight").unwrap().unwrap();
    assert_eq!(
        (b.width(), b.signs().unwrap()[0], b.signs().unwrap()[11]),
        (12, -1.0, -1.0)
    );
    assert!(rotation.contains("b.weight") && !rotation.contains("bias"));
    assert!(rotation.is_table("token_embd.weight") && !rotation.is_table("a.weight"));
    assert_eq!(rotation.tensors(), 3);
    assert_eq!(rotation.of("output.weight").unwrap(), None);

    // The names change, the rest does not; written keys say the same.
    let facts = rotation.renamed(&|name| Some(name.replace("token_embd", "a")));
    assert_eq!(facts.weights, ["a.weight", "b.weight"]);
    assert_eq!(facts.inverse_weights, ["a.weight"]);
    assert_eq!(
        RotationFacts::from_gguf(&facts.to_gguf()).unwrap().unwrap(),
        facts
    );
    let json = serde_json::to_value(&facts).unwrap();
    assert_eq!(RotationFacts::from_document(&json).unwrap(), facts);
}

#[test]
fn identity_needs_no_signs() {
    let identity: Vec<_> = with("sign_mode", Some("identity".into()))
        .into_iter()
        .filter(|(key, _)| !key.contains("sign_widths") && !key.contains("sign_values"))
        .collect();
    let rotation = read(&identity).unwrap().unwrap();
    assert_eq!(rotation.of("a.weight").unwrap().unwrap().signs(), None);
    let written = rotation.renamed(&|name| Some(name.into())).to_gguf();
    assert!(!written.iter().any(|(key, _)| key.contains("sign_values")));
    // Signs of -1 beside it contradict it.
    let error = read(&with("sign_mode", Some("identity".into()))).unwrap_err();
    assert!(error.key.ends_with("sign_values"), "{error:?}");
}

#[test]
fn grouped_value_heads_are_refused_by_conversions() {
    let grouped = |names: Vec<String>| {
        let mut all = with("gdn_v_grouped", Some(true.into()));
        all.retain(|(key, _)| !key.ends_with(".weight_names"));
        let key = format!("{ROTATION_PREFIX}.weight_names");
        all.push((key, Array::String(names).into()));
        read(&all).unwrap().unwrap()
    };
    let rotation = grouped(vec!["a.weight".into(), "blk.0.ssm_out.weight".into()]);
    assert!(rotation.of("a.weight").unwrap().is_some());
    let error = rotation.of("blk.0.ssm_out.weight").unwrap_err();
    assert!(error.key.ends_with("gdn_v_grouped") && error.expected.contains("ssm_out"));
    let input = rotation.of_input("blk.0.ssm_out.weight").unwrap();
    assert!(input.grouped_heads && !rotation.of_input("a.weight").unwrap().grouped_heads);
}

#[test]
fn what_is_not_in_the_contract_is_refused_by_its_key() {
    let strings =
        |all: &[&str]| Some(Array::String(all.iter().map(|n| n.to_string()).collect()).into());
    let int8 = |all: Vec<i8>| Some(Value::from(Array::I8(all)));
    let mut zero = vec![1i8; 20];
    zero[3] = 0;
    for (key, value, expected) in [
        ("rounds", Some(Value::U32(1)), "one of the keys"),
        ("version", Some(Value::U32(2)), "expected 1, got 2"),
        ("version", None, "got none"),
        ("transform", Some("hadamard".into()), TRANSFORM),
        ("transform", None, TRANSFORM),
        ("axis", Some("output".into()), AXIS),
        (
            "sign_mode",
            Some("random".into()),
            "\"identity\" or \"explicit\"",
        ),
        ("sign_mode", None, "got none"),
        ("block_size", Some(Value::U32(6)), "a power of two"),
        ("block_size", Some(Value::U32(0)), "a power of two"),
        ("block_size", Some(Value::I32(-4)), "a positive number"),
        (
            "block_size",
            Some(Value::U32(8)),
            "do not divide 12 columns",
        ),
        ("block_size", None, "got none"),
        ("sign_values", None, "20 signs"),
        ("sign_values", int8(vec![1; 19]), "20 signs"),
        ("sign_values", int8(vec![1; 21]), "20 signs"),
        ("sign_values", int8(zero), "0 at index 3"),
        (
            "sign_values",
            Some(Array::F32(vec![1.0; 20]).into()),
            "whole numbers",
        ),
        ("sign_widths", None, "at least one width"),
        (
            "sign_widths",
            Some(Array::I32(vec![20]).into()),
            "signs for the width 8",
        ),
        (
            "sign_widths",
            Some(Array::I32(vec![8, -12]).into()),
            "positive widths",
        ),
        (
            "sign_widths",
            Some(Array::I32(vec![10, 10]).into()),
            "each width once",
        ),
        (
            "weight_names",
            strings(&["c.weight"]),
            "nearest name is 'a.weight'",
        ),
        ("weight_names", strings(&["bias"]), "names of matrices"),
        (
            "weight_names",
            strings(&["other.weight"]),
            "signs for the width 16",
        ),
        ("weight_names", Some("a.weight".into()), "a list of names"),
        ("weight_names", None, "a list of names"),
        ("inverse_weight_names", strings(&["c"]), "names of tensors"),
        ("gdn_v_grouped", Some(Value::U8(1)), "true or false"),
    ] {
        let error = read(&with(key, value)).unwrap_err();
        let text = error.of_file(Path::new("x.gguf")).to_string();
        assert!(text.contains(expected), "{key}: {text}");
        assert!(text.starts_with("x.gguf: prism.hadamard."), "{text}");
    }
    // Without signs no width is missing one; blocks still have to divide it.
    let mut odd = with("sign_mode", Some("identity".into()));
    odd.retain(|(key, _)| !key.contains("sign_values"));
    odd.retain(|(key, _)| !key.ends_with(".weight_names"));
    odd.push((
        format!("{ROTATION_PREFIX}.weight_names"),
        strings(&["odd"]).unwrap(),
    ));
    let error = read(&odd).unwrap_err();
    assert!(error.got.contains("do not divide 6 columns"), "{error:?}");
    let prefix = (ROTATION_PREFIX.to_string(), Value::U32(1));
    assert!(
        read(&[prefix])
            .unwrap_err()
            .expected
            .contains("one of the keys")
    );
}
