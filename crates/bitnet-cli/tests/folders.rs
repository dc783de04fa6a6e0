//! Model folders that are not what they should be, and the scale conventions of HF `bitnet`.

mod common;

use common::{Dir, T, f32s, gauss, llama, normal, raw, safetensors, with_tensor};
use serde_json::{Value, json};
use std::fs;

/// A folder `m` with this config and these files.
fn folder(config: &Value, files: &[(&str, Vec<u8>)]) -> Dir {
    let dir = Dir::new();
    dir.write_json("m/config.json", config);
    for (name, bytes) in files {
        dir.write(&format!("m/{name}"), bytes);
    }
    dir
}

fn weights() -> Vec<u8> {
    safetensors(&[gauss("a.weight", &[8, 16], 0.02)])
}

/// A folder with this index over shards a and b of one tensor each.
fn indexed(map: &Value) -> Dir {
    let shard = |name| safetensors(&[gauss(name, &[8, 16], 0.02)]);
    let index = json!({"metadata": {"total_size": 1024}, "weight_map": map})
        .to_string()
        .into_bytes();
    folder(
        &json!({}),
        &[
            ("a.safetensors", shard("a.weight")),
            ("b.safetensors", shard("b.weight")),
            ("model.safetensors.index.json", index),
        ],
    )
}

#[test]
fn a_folder_without_config() {
    let dir = Dir::new();
    dir.write("m/model.safetensors", weights());
    dir.refuses(
        &["inspect", "m"],
        &["m: expected", "config.json", "model.safetensors without it"],
    );
    dir.refuses(
        &["quantize", "m", "--out", "out"],
        &["m: expected", "config.json", "model.safetensors without it"],
    );
    dir.refuses(
        &["verify", "m"],
        &["m: expected", "config.json", "model.safetensors without it"],
    );
}

#[test]
fn a_folder_without_weights() {
    folder(&json!({}), &[]).refuses_input("m", &["m: expected a .safetensors file"]);
    folder(&json!({}), &[("pytorch_model.bin", vec![1])]).refuses_input(
        "m",
        &["pytorch_model.bin", "expected an archive of torch.save"],
    );
}

/// `torch.save` wrote the file: `bitnet-formats/tests/data/pytorch/make.py`.
#[test]
fn weights_of_pytorch() {
    let data = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../bitnet-formats/tests/data/pytorch/"
    );
    let expected = fs::read(format!("{data}expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    let weight = expected["module.bin"]["weight"]["bytes"].as_str().unwrap();
    let whole = fs::read(format!("{data}module.bin")).unwrap();
    let map = json!({"weight": "a.bin", "bias": "a.bin"});
    let index = json!({"weight_map": map}).to_string().into_bytes();
    for files in [
        vec![("pytorch_model.bin", whole.clone())],
        vec![
            ("pytorch_model.bin.index.json", index),
            ("a.bin", whole.clone()),
        ],
    ] {
        let dir = folder(&json!({"model_type": "toy"}), &files);
        dir.run(&["dequantize", "m", "--out", "out"]).is(0);
        let written = hex(&dir.read("out/model.safetensors"));
        assert!(written.contains(weight), "{written}");
        let copied = dir.files();
        assert!(
            !copied
                .keys()
                .any(|name| name.starts_with("out/") && name.contains("bin"))
        );
    }
}

#[test]
fn several_files_without_an_index() {
    let dir = folder(
        &json!({}),
        &[("a.safetensors", weights()), ("b.safetensors", weights())],
    );
    dir.refuses_input(
        "m",
        &["m: expected", "model.safetensors.index.json", "2 of them"],
    );
}

#[test]
fn a_single_file_of_another_name_is_taken() {
    folder(&json!({}), &[("weights.safetensors", weights())])
        .run(&["quantize", "m", "--out", "out"])
        .is(0);
}

#[test]
fn shards_are_read_through_their_index() {
    let dir = indexed(&json!({"a.weight": "a.safetensors", "b.weight": "b.safetensors"}));
    let run = dir.run(&["quantize", "m", "--out", "out", "--json"]);
    assert_eq!(run.is(0).json()["totals"]["quantized_tensors"], 2);
    dir.run(&["verify", "out"]).is(0);
    dir.run(&["compare", "m", "out"]).is(0);
    assert!(!dir.at("out/model.safetensors.index.json").exists());
}

#[test]
fn an_index_that_names_a_missing_file() {
    let dir = indexed(&json!({"a.weight": "a.safetensors", "b.weight": "c.safetensors"}));
    dir.refuses(
        &["inspect", "m"],
        &["m/c.safetensors", "no such file", "1 of 2 shards"],
    );
    dir.refuses(
        &["quantize", "m", "--out", "out"],
        &["m/c.safetensors", "no such file", "1 of 2 shards"],
    );
}

/// The order of transformers. In each case the run says what it does not read.
#[test]
fn one_file_comes_before_an_index() {
    let note = |dir: &Dir, tensors: u64, parts: &[&str]| {
        let run = dir.run(&["inspect", "m", "--json"]);
        let document = run.is(0).json();
        assert_eq!(
            document["tensors"].as_array().unwrap().len() as u64,
            tensors
        );
        let notes = document["notes"].to_string();
        for part in parts {
            assert!(notes.contains(part), "'{part}' is not in {notes}");
        }
        assert_eq!(parts.is_empty(), notes == "[]", "{notes}");
    };
    let two = json!({"a.weight": "a.safetensors", "b.weight": "b.safetensors"});
    let gone = json!({"a.weight": "x-1.safetensors", "b.weight": "x-2.safetensors"});
    for map in [&two, &gone] {
        let dir = indexed(map);
        dir.write("m/model.safetensors", weights());
        note(&dir, 1, &["read from model.safetensors", "index.json"]);
    }
    // The only file, where no shard of the index is there.
    let dir = indexed(&gone);
    fs::remove_file(dir.at("m/b.safetensors")).unwrap();
    note(
        &dir,
        1,
        &["read from a.safetensors", "shards are not there"],
    );
    // An index of another name.
    let dir = indexed(&two);
    let index = dir.read("m/model.safetensors.index.json");
    fs::remove_file(dir.at("m/model.safetensors.index.json")).unwrap();
    dir.write("m/unet.safetensors.index.json", &index);
    note(&dir, 2, &[]);
    dir.write("m/vae.safetensors.index.json", &index);
    dir.refuses_input("m", &["one index", "unet.safetensors.index.json", "vae"]);
    // A tensor that the index leaves out.
    let dir = indexed(&two);
    dir.write(
        "m/a.safetensors",
        safetensors(&[
            gauss("a.weight", &[8, 16], 0.02),
            gauss("b.weight", &[8, 16], 0.02),
            gauss("c.weight", &[8, 16], 0.02),
        ]),
    );
    note(&dir, 3, &["1 tensors", "'c.weight'"]);
    let shard = safetensors(&[
        gauss("b.weight", &[8, 16], 0.02),
        gauss("c.weight", &[8, 16], 0.02),
    ]);
    dir.write("m/b.safetensors", shard);
    dir.refuses_input("m", &["b.safetensors", "'c.weight'", "no other shard"]);
}

/// transformers 5 takes the head that is in the file, and so do all outputs.
#[test]
fn a_head_that_differs_from_the_embedding_it_is_tied_to() {
    let dir = Dir::new();
    llama(&dir, "plain");
    let model = dir.read("plain/model.safetensors");
    let head = |values: &[f32]| f32s("lm_head.weight", &[32, 256], values);
    let name = "model.embed_tokens.weight";
    let embedding = normal(name.len() as u64 + 32, 32 * 256, 0.02);
    let mut other = embedding.clone();
    other[7] += 1.0;
    for (values, differs) in [(&embedding, false), (&other, true)] {
        let config: Value = serde_json::from_slice(&dir.read("plain/config.json")).unwrap();
        dir.write("m/model.safetensors", with_tensor(&model, &head(values)))
            .write_json("m/config.json", &config);
        let run = dir.run(&["inspect", "m", "--json"]);
        let document = run.is(0).json();
        let findings = document["findings"].to_string();
        assert_eq!(findings.contains("\"tied\""), differs, "{findings}");
        let notes = document["notes"].to_string();
        assert_eq!(notes.contains("lm_head.weight"), differs, "{notes}");
        dir.run(&["quantize", "m", "--out", "q", "--force"]).is(0);
        let written: Value = serde_json::from_slice(&dir.read("q/config.json")).unwrap();
        assert_eq!(written["tie_word_embeddings"], !differs);
        let run = dir.run(&["convert", "m", "--out", "m.gguf", "--force", "--json"]);
        let notes = run.is(0).json()["notes"].to_string();
        assert_eq!(notes.contains("lm_head.weight"), differs, "{notes}");
    }
}

/// The names of a model that was saved inside a wrapper, and a name that is nobody's.
#[test]
fn names_inside_a_wrapper() {
    let dir = Dir::new();
    llama(&dir, "m");
    let model = dir.read("m/model.safetensors");
    let rename = |from: &str, to: &str| {
        let (size, rest) = model.split_at(8);
        let size = u64::from_le_bytes(size.try_into().unwrap()) as usize;
        let header = String::from_utf8(rest[..size].to_vec()).unwrap();
        let file = raw(&header.replace(from, to), &rest[size..]);
        dir.write("m/model.safetensors", file);
    };
    rename("\"model.", "\"_orig_mod.module.model.");
    let run = dir.run(&["convert", "m", "--out", "m.gguf", "--json"]);
    let notes = run.is(0).json()["notes"].to_string();
    assert!(notes.contains("_orig_mod.module.model."), "{notes}");
    dir.run(&[
        "bench", "m.gguf", "--prompt", "1", "--tokens", "1", "--repeat", "1",
    ])
    .is(0);
    dir.run(&[
        "bench", "m", "--prompt", "1", "--tokens", "1", "--repeat", "1",
    ])
    .is(0);
    rename("0.mlp.up_proj", "0.mlp.upp_proj");
    dir.refuses(
        &["bench", "m"],
        &[
            "0.mlp.up_proj.weight'",
            "nearest",
            "'model.layers.0.mlp.upp_proj.weight'",
        ],
    );
}

#[test]
fn an_index_whose_tensor_is_not_in_its_file() {
    let dir = indexed(&json!({"a.weight": "a.safetensors", "b.weight": "a.safetensors"}));
    dir.refuses_input("m", &["m/a.safetensors", "'b.weight'", "none of that name"]);
}

#[test]
fn an_index_that_leaves_the_folder() {
    for path in [
        "../b.safetensors",
        "/etc/passwd",
        "sub/b.safetensors",
        "..",
        ".",
        "",
        "./a.safetensors",
    ] {
        let dir = indexed(&json!({"a.weight": "a.safetensors", "b.weight": path}));
        dir.write(
            "b.safetensors",
            safetensors(&[gauss("b.weight", &[8, 16], 0.02)]),
        );
        dir.refuses_input(
            "m",
            &[
                "m/model.safetensors.index.json",
                "'b.weight'",
                "a file name in the same folder",
                path,
            ],
        );
    }
    indexed(&json!({"a.weight": 3}))
        .refuses_input("m", &["model.safetensors.index.json", "'a.weight'", "3"]);
}

#[test]
fn an_index_that_is_none() {
    indexed(&json!(["a"])).refuses_input("m", &["model.safetensors.index.json", "weight_map"]);
    let dir = indexed(&json!({}));
    dir.write("m/model.safetensors.index.json", "not json");
    dir.refuses_input("m", &["model.safetensors.index.json", "JSON", "line 1"]);
}

#[test]
fn an_index_without_tensors() {
    indexed(&json!({})).refuses(&["quantize", "m", "--out", "out"], &["m"]);
}

#[test]
fn a_config_that_is_not_json() {
    let dir = folder(&json!({}), &[("model.safetensors", weights())]);
    dir.write("m/config.json", "{\"hidden_size\": 16,");
    dir.refuses_input("m", &["m/config.json", "JSON", "line 1 column 19"]);
}

#[test]
fn another_quantization_method_over_floats_is_said() {
    let with_method = |method| {
        folder(
            &json!({"quantization_config": {"quant_method": method}}),
            &[("model.safetensors", weights())],
        )
    };
    let dir = with_method(json!(3));
    dir.refuses_input("m", &["m/config.json", "quantization_config.quant_method"]);
    let dir = with_method(json!("gptq"));
    let inspect = dir.run(&["inspect", "m"]);
    inspect.is(0);
    let note = "note: quant_method is 'gptq', and no tensor is packed";
    assert!(inspect.stdout().contains(note), "{}", inspect.stdout());
}

#[test]
fn an_unknown_linear_class_or_mode() {
    for (key, value) in [("linear_class", "BitLinear"), ("quantization_mode", "off")] {
        let mut config = json!({"quantization_config": {"quant_method": "bitnet"}});
        config["quantization_config"][key] = value.into();
        let dir = folder(&config, &[("model.safetensors", weights())]);
        dir.refuses_input("m", &["m/config.json", key, &format!("'{value}'")]);
    }
}

/// A folder as another program writes it: packed weights, a scale, no document of ours.
fn foreign(linear_class: &str, packed: &[u8], scale: Option<f32>) -> Dir {
    let mut tensors = vec![T(
        "a.weight",
        "U8",
        vec![2, packed.len() / 2],
        packed.to_vec(),
    )];
    tensors.extend(scale.map(|scale| f32s("a.weight_scale", &[1], &[scale])));
    let config =
        json!({"quantization_config": {"quant_method": "bitnet", "linear_class": linear_class}});
    folder(&config, &[("model.safetensors", safetensors(&tensors))])
}

/// Packed columns of −1, 0, 1, 0.
fn codes(cols: usize) -> Vec<u8> {
    vec![0b01_10_01_00; 2 * cols]
}

#[test]
fn a_foreign_folder_is_read_in_both_conventions() {
    for (class, stored) in [("bitlinear", 64.0), ("autobitlinear", 1.0 / 64.0)] {
        let dir = foreign(class, &codes(256), Some(stored));
        dir.run(&["dequantize", "m", "--out", "f.safetensors"])
            .is(0);
        let file = dir.read("f.safetensors");
        let data = &file[file.len() - 4 * 8 * 256..];
        let floats: Vec<f32> = data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        // Byte row r holds rows r, 2 + r, 4 + r and 6 + r, lowest bits first.
        let first_column: Vec<f32> = floats.iter().step_by(256).copied().collect();
        let s = 1.0 / 64.0;
        assert_eq!(first_column, [-s, -s, 0.0, 0.0, s, s, 0.0, 0.0], "{class}");
    }
}

#[test]
fn packed_weights_without_a_config_that_says_what_they_are() {
    let dir = foreign("bitlinear", &codes(16), Some(64.0));
    dir.write("m/config.json", "{}");
    dir.refuses_input(
        "m",
        &[
            "m/model.safetensors",
            "'a.weight_scale'",
            "quantization_config",
        ],
    );
    let dir = foreign("bitlinear", &codes(16), Some(64.0));
    dir.refuses_input(
        "m/model.safetensors",
        &[
            "m/model.safetensors",
            "'a.weight_scale'",
            "quantization_config",
        ],
    );
}

#[test]
fn packed_weights_without_a_scale() {
    foreign("bitlinear", &codes(16), None).refuses_input(
        "m",
        &["m/model.safetensors", "'a.weight'", "a.weight_scale"],
    );
}

#[test]
fn a_scale_of_the_wrong_size_or_type() {
    let config =
        json!({"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}});
    let packed = || T("a.weight", "U8", vec![2, 16], codes(16));
    let dir = folder(
        &config,
        &[(
            "model.safetensors",
            safetensors(&[packed(), f32s("a.weight_scale", &[2], &[1.0; 2])]),
        )],
    );
    dir.refuses_input(
        "m",
        &[
            "m/model.safetensors",
            "'a.weight_scale'",
            "1 elements",
            "2 of",
        ],
    );
    let scale = T("a.weight_scale", "I32", vec![1], vec![0; 4]);
    let dir = folder(
        &config,
        &[("model.safetensors", safetensors(&[packed(), scale]))],
    );
    dir.refuses_input("m", &["m/model.safetensors", "'a.weight_scale'", "I32"]);
    for class in ["bitlinear", "autobitlinear"] {
        let config =
            json!({"quantization_config": {"quant_method": "bitnet", "linear_class": class}});
        let scale = T("a.weight_scale", "I64", vec![1], vec![0; 8]);
        let dir = folder(
            &config,
            &[("model.safetensors", safetensors(&[packed(), scale]))],
        );
        dir.refuses_input("m", &["m/model.safetensors", "'a.weight_scale'", "I64"]);
    }
}

#[test]
fn a_packed_vector() {
    let config = json!({"quantization_config": {"quant_method": "bitnet"}});
    let tensors = [
        T("a.weight", "U8", vec![16], vec![0; 16]),
        f32s("a.weight_scale", &[1], &[64.0]),
    ];
    folder(&config, &[("model.safetensors", safetensors(&tensors))])
        .refuses_input("m", &["m/model.safetensors", "'a.weight'", "[16]"]);
}

#[test]
fn code_three() {
    let mut packed = codes(16);
    packed[19] = 0b01_11_01_00;
    let dir = foreign("bitlinear", &packed, Some(64.0));
    let inspect = dir.run(&["inspect", "m", "--json"]);
    let finding = inspect.is(0).json()["findings"][0].clone();
    assert_eq!(
        (&finding["check"], &finding["tensor"]),
        (&"corrupt".into(), &"a.weight".into())
    );
    assert!(
        finding["what"].as_str().unwrap().contains("byte 19"),
        "{finding}"
    );
    for args in [
        &["dequantize", "m", "--out", "out.safetensors"][..],
        &["convert", "m", "--out", "out.safetensors"],
        &["convert", "m", "--out", "out"],
        &[
            "convert",
            "m",
            "--out",
            "out.safetensors",
            "--layout",
            "auto",
        ],
        &["compare", "m", "m"],
    ] {
        dir.refuses(args, &["m/model.safetensors", "'a.weight'", "byte 19", "3"]);
    }
}

#[test]
fn scales_that_are_none() {
    for (scale, word) in [
        (f32::NAN, "NaN"),
        (-1.0, "-1"),
        (f32::INFINITY, "inf"),
        (f32::NEG_INFINITY, "-inf"),
    ] {
        for class in ["bitlinear", "autobitlinear"] {
            foreign(class, &codes(16), Some(scale))
                .refuses_input("m", &["m/model.safetensors", "'a.weight_scale'", word]);
        }
    }
    // 1/0 is no scale; 0 itself is that of a dead tensor.
    foreign("bitlinear", &codes(16), Some(0.0))
        .refuses_input("m", &["m/model.safetensors", "'a.weight_scale'", "got 0"]);
    let dead = foreign("autobitlinear", &codes(16), Some(0.0)).run(&["inspect", "m", "--json"]);
    assert_eq!(dead.is(0).json()["findings"][0]["check"], "dead");
}

/// The numbers of an ordinary model under the other convention amplify thousands of times.
#[test]
fn numbers_that_contradict_the_convention() {
    for (says, stored) in [("autobitlinear", 1.0 / 0.016), ("bitlinear", 0.016)] {
        let dir = foreign(says, &codes(2560), Some(stored));
        dir.refuses_input(
            "m",
            &[
                "m/config.json",
                "quantization_config.linear_class",
                &format!("'{says}'"),
                "amplify",
            ],
        );
    }
    for (says, stored) in [("bitlinear", 1.0 / 0.016), ("autobitlinear", 0.016)] {
        foreign(says, &codes(2560), Some(stored))
            .run(&["inspect", "m"])
            .is(0);
    }
}

#[test]
fn a_config_that_contradicts_our_document() {
    let dir = Dir::new();
    llama(&dir, "m");
    for (class, other) in [
        ("bitlinear", "autobitlinear"),
        ("autobitlinear", "bitlinear"),
    ] {
        dir.run(&[
            "quantize",
            "m",
            "--out",
            class,
            "--format",
            "hf-bitnet",
            "--linear-class",
            class,
        ])
        .is(0);
        dir.run(&["verify", class]).is(0);
        let path = format!("{class}/config.json");
        let text = String::from_utf8(dir.read(&path)).unwrap();
        assert!(
            text.contains(&format!("\"linear_class\": \"{class}\"")),
            "{text}"
        );
        dir.write(
            &path,
            text.replace(&format!("\"{class}\""), &format!("\"{other}\"")),
        );
        for args in [
            &["inspect", class][..],
            &["dequantize", class, "--out", "f.safetensors"],
            &["convert", class, "--out", "c.safetensors"],
        ] {
            dir.refuses(
                args,
                &[
                    &path,
                    "quantization_config.linear_class",
                    &format!("'{other}'"),
                ],
            );
        }
        dir.run(&["verify", class]).is(1);
    }
}

#[test]
fn hf_bitnet_names_the_layers_that_stay() {
    let dir = Dir::new();
    llama(&dir, "m");
    dir.run(&[
        "quantize",
        "m",
        "--out",
        "out",
        "--format",
        "hf-bitnet",
        "--exclude",
        "*.down_proj.*",
    ])
    .is(0);
    let config: Value = serde_json::from_slice(&dir.read("out/config.json")).unwrap();
    assert_eq!(
        config["quantization_config"]["modules_to_not_convert"],
        json!(["model.layers.0.mlp.down_proj", "lm_head"])
    );
    assert_eq!(config["hidden_size"], 256);
    // Floats again: nothing says that they are packed.
    dir.run(&["dequantize", "out", "--out", "f"]).is(0);
    let config: Value = serde_json::from_slice(&dir.read("f/config.json")).unwrap();
    assert_eq!(config["quantization_config"], Value::Null);
    dir.run(&["inspect", "f"]).is(0);
}

/// Rows that are no multiple of four would be padded, and transformers would not load that: such a
/// layer stays as it is, and says so.
#[test]
fn hf_bitnet_keeps_what_it_cannot_hold() {
    let config = json!({"torch_dtype": "bfloat16"});
    let tensors = [
        gauss("odd.weight", &[6, 16], 0.02),
        gauss("even.weight", &[8, 16], 0.02),
    ];
    let dir = folder(&config, &[("model.safetensors", safetensors(&tensors))]);
    let run = dir.run(&[
        "quantize",
        "m",
        "--out",
        "out",
        "--format",
        "hf-bitnet",
        "--json",
    ]);
    let tensors = run.is(0).json()["tensors"].clone();
    assert!(
        tensors[0]["note"]
            .as_str()
            .unwrap()
            .contains("not quantized")
            && tensors[0]["became"] == "copied F32",
        "{tensors}"
    );
    assert_eq!(tensors[1]["became"], "ternary");
    dir.run(&["verify", "out"]).is(0);
}
