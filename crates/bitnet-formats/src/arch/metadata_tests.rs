use super::*;
use crate::gguf::Value as G;

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 10, "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": true, "head_dim": null, "rope_scaling": null,
    })
}

fn bitnet() -> Value {
    with(
        with(llama(), "model_type", json!("bitnet")),
        "hidden_act",
        json!("relu2"),
    )
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

fn without(mut config: Value, key: &str) -> Value {
    config.as_object_mut().unwrap().remove(key);
    config
}

fn made(config: &Value) -> Result<GgufMetadata> {
    let folder = tempfile::tempdir().unwrap();
    gguf_metadata(folder.path(), config)
}

fn refused(config: &Value) -> String {
    made(config).unwrap_err().to_string()
}

#[test]
fn llama_keys() {
    let made = made(&llama()).unwrap();
    let get = |key: &str| {
        find(&made.metadata, key)
            .unwrap_or_else(|| panic!("no {key}"))
            .clone()
    };
    assert_eq!(get("general.architecture"), G::from("llama"));
    for (key, n) in [
        ("block_count", 2),
        ("context_length", 256),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", 16),
        ("vocab_size", 10),
    ] {
        assert_eq!(get(&format!("llama.{key}")), G::U32(n), "{key}");
    }
    assert_eq!(get("llama.attention.layer_norm_rms_epsilon"), G::F32(1e-5));
    assert_eq!(get("llama.rope.freq_base"), G::F32(500_000.0));
    assert_eq!(get("tokenizer.ggml.model"), G::from("none"));
    assert!(
        made.losses.iter().any(|n| n.contains("no tokenizer.json")),
        "{:?}",
        made.losses
    );
    for absent in [
        "llama.attention.key_length",
        "llama.hidden_activation",
        "llama.rope.scaling.type",
    ] {
        assert_eq!(find(&made.metadata, absent), None);
    }
    assert_eq!(made.rope_tensors, []);
}

#[test]
fn defaults_of_hugging_face_and_no_others() {
    let mut config = llama();
    for key in [
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "hidden_act",
        "head_dim",
        "rope_scaling",
    ] {
        config = without(config, key);
    }
    let made = made(&config).unwrap();
    assert_eq!(
        find(&made.metadata, "llama.attention.head_count_kv"),
        Some(&G::U32(4))
    );
    assert_eq!(
        find(&made.metadata, "llama.attention.layer_norm_rms_epsilon"),
        Some(&G::F32(1e-6))
    );
    assert_eq!(
        find(&made.metadata, "llama.rope.freq_base"),
        Some(&G::F32(10000.0))
    );
    for key in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ] {
        let message = refused(&without(llama(), key));
        assert!(
            message.contains(key)
                && message.contains("config.json")
                && message.contains("got none"),
            "{message}"
        );
    }
    for key in [
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "hidden_act",
    ] {
        assert!(
            refused(&without(bitnet(), key)).contains(key),
            "bitnet has no default of {key}"
        );
    }
}

#[test]
fn bitnet_says_its_activation() {
    let relu2 = made(&bitnet()).unwrap();
    assert_eq!(
        find(&relu2.metadata, "general.architecture"),
        Some(&G::from("bitnet"))
    );
    assert_eq!(
        find(&relu2.metadata, "bitnet.hidden_activation"),
        Some(&G::from("relu2"))
    );
    assert!(
        relu2.notes.iter().any(|n| n.contains("SiLU")),
        "{:?}",
        relu2.notes
    );
    let silu = made(&with(bitnet(), "hidden_act", json!("silu"))).unwrap();
    assert_eq!(
        find(&silu.metadata, "bitnet.hidden_activation"),
        Some(&G::from("silu"))
    );
    let untied = made(&with(bitnet(), "tie_word_embeddings", json!(false))).unwrap();
    assert!(
        untied.notes.iter().any(|n| n.contains("output.weight")),
        "{:?}",
        untied.notes
    );
}

#[test]
fn heads_of_another_size_are_said() {
    let made = made(&with(llama(), "head_dim", json!(32))).unwrap();
    for key in [
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
    ] {
        assert_eq!(
            find(&made.metadata, &format!("llama.{key}")),
            Some(&G::U32(32)),
            "{key}"
        );
    }
}

#[test]
fn what_llama_cpp_cannot_follow_is_refused() {
    for (config, key, value) in [
        (llama(), "model_type", json!("mamba")),
        (llama(), "hidden_act", json!("gelu")),
        (llama(), "hidden_size", json!("64")),
        (llama(), "hidden_size", json!(0)),
        (llama(), "hidden_size", json!(1u64 << 40)),
        (llama(), "num_key_value_heads", json!(3)),
        (llama(), "head_dim", json!(15)),
        (llama(), "head_dim", json!(1_073_741_832)),
        (llama(), "vocab_size", json!(2_147_483_648u64)),
        (llama(), "rms_norm_eps", json!(-1.0)),
        (llama(), "rope_theta", json!("big")),
        (bitnet(), "hidden_act", json!("gelu")),
        (bitnet(), "head_dim", json!(32)),
        (bitnet(), "attention_bias", json!(true)),
        (bitnet(), "mlp_bias", json!(1)),
    ] {
        let message = refused(&with(config, key, value.clone()));
        assert!(
            message.contains(key) && message.contains(&value.to_string()),
            "{message}"
        );
    }
    let message = refused(&with(llama(), "hidden_size", json!(66)));
    assert!(message.contains("head_dim"), "{message}");
}

#[test]
fn rope_scaling() {
    let linear = json!({"type": "linear", "factor": 4.0});
    let done = made(&with(llama(), "rope_scaling", linear)).unwrap();
    assert_eq!(
        find(&done.metadata, "llama.rope.scaling.type"),
        Some(&G::from("linear"))
    );
    assert_eq!(
        find(&done.metadata, "llama.rope.scaling.factor"),
        Some(&G::F32(4.0))
    );

    let newer = with(
        without(llama(), "rope_theta"),
        "rope_parameters",
        json!({"rope_type": "default", "rope_theta": 1234.0}),
    );
    assert_eq!(
        find(&made(&newer).unwrap().metadata, "llama.rope.freq_base"),
        Some(&G::F32(1234.0))
    );

    let bad = |value: Value, config: Value| refused(&with(config, "rope_scaling", value));
    assert!(
        bad(json!({"rope_type": "xpos", "factor": 4.0}), llama())
            .contains("rope_scaling.rope_type")
    );
    assert!(bad(json!({"factor": 4.0}), llama()).contains("got none"));
    assert!(bad(json!({"rope_type": "linear"}), llama()).contains("rope_scaling.factor"));
    assert!(
        bad(
            json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
            llama()
        )
        .contains("partial_rotary_factor")
    );
    let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192});
    assert!(bad(llama3.clone(), bitnet()).contains("got 'llama3'"));
    assert!(
        bad(without(llama3.clone(), "low_freq_factor"), llama())
            .contains("rope_scaling.low_freq_factor")
    );
    assert!(
        bad(with(llama3.clone(), "low_freq_factor", json!(4)), llama())
            .contains("high_freq_factor")
    );

    // transformers 5.23, ROPE_INIT_FUNCTIONS["llama3"] for θ = 500000, d = 16: plain frequency over
    // scaled one.
    let freqs = made(&with(llama(), "rope_scaling", llama3))
        .unwrap()
        .rope_tensors
        .remove(0);
    assert_eq!(freqs.0, ROPE_FREQS);
    let freqs = freqs.1;
    let expected = [1.0, 1.0, 1.0, 1.0, 2.694_530_2, 8.0, 8.0, 8.0];
    assert_eq!(freqs.len(), 8);
    for (i, (got, expected)) in freqs.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() <= 1e-5 * expected,
            "{i}: {got} is not {expected}"
        );
    }
}

fn gguf_of(config: &Value) -> Vec<(String, G)> {
    made(config).unwrap().metadata
}

fn shape(name: &str) -> Option<Vec<usize>> {
    (name == "token_embd.weight").then(|| vec![10, 64])
}

/// A config of another architecture.
fn other(name: &str, more: Value) -> Value {
    let mut config = with(llama(), "model_type", json!(name));
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn gemma3(more: Value) -> Value {
    let config = other("gemma3_text", more);
    let config = with(config, "hidden_activation", json!("gelu_pytorch_tanh"));
    with(without(config, "hidden_act"), "sliding_window", json!(9))
}

fn no_values(_: &str) -> Result<Option<Vec<f32>>> {
    Ok(None)
}

#[test]
fn divisors_of_short_and_long_texts_are_tensors() {
    let scaling = json!({"rope_type": "longrope", "short_factor": vec![1.5; 8], "long_factor": vec![2.5; 8],
                         "original_max_position_embeddings": 64, "attention_factor": 1.25});
    let config = other(
        "phi3",
        json!({"rope_scaling": scaling, "sliding_window": null}),
    );
    let done = made(&config).unwrap();
    let values = |name: &str| {
        let tensor = done.rope_tensors.iter().find(|(n, _)| *n == name);
        Ok(tensor.map(|(_, values)| values.clone()))
    };
    assert_eq!(
        values("rope_factors_long.weight").unwrap(),
        Some(vec![2.5; 8])
    );
    // Files of phi3 without a window say 0.
    let mut metadata = done.metadata.clone();
    metadata.push(("phi3.attention.sliding_window".into(), G::U32(0)));
    let back = hf_config(Path::new("m.gguf"), &metadata, &shape, &values).unwrap();
    assert_eq!(back["rope_scaling"], config["rope_scaling"]);
    assert_eq!(back["sliding_window"], Value::Null);
    let refused = refused(&with(
        llama(),
        "rope_scaling",
        config["rope_scaling"].clone(),
    ));
    assert!(refused.contains("longrope"), "{refused}");
}

#[test]
fn config_goes_round() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    for config in [
        other(
            "qwen2",
            json!({"use_sliding_window": false, "rope_scaling": yarn}),
        ),
        other(
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 0}),
        ),
        other("qwen3", json!({"head_dim": 32, "attention_bias": false})),
        other("mistral", json!({"sliding_window": 5})),
        other("smollm3", json!({"no_rope_layer_interval": 4})),
        other(
            "phi3",
            json!({"partial_rotary_factor": 0.75, "sliding_window": 100}),
        ),
        other(
            "minicpm",
            json!({"scale_emb": 12.0, "dim_model_base": 16.0}),
        ),
        gemma3(json!({"head_dim": 32, "query_pre_attn_scalar": 32.0, "sliding_window_pattern": 6})),
        gemma3(
            json!({"head_dim": 32, "query_pre_attn_scalar": 4.0, "sliding_window_pattern": 2,
                      "rope_local_base_freq": 5000.0, "final_logit_softcapping": 30.0}),
        ),
        llama(),
        bitnet(),
        with(bitnet(), "hidden_act", json!("silu")),
        with(llama(), "head_dim", json!(32)),
        with(
            llama(),
            "rope_scaling",
            json!({"rope_type": "linear", "factor": 4.0}),
        ),
    ] {
        let back = hf_config(Path::new("m.gguf"), &gguf_of(&config), &shape, &no_values).unwrap();
        for (key, value) in config.as_object().unwrap() {
            let value = if key == "head_dim" && value.is_null() {
                &json!(16)
            } else {
                value
            };
            assert_eq!(&back[key], value, "{key}");
        }
        assert_eq!(back["torch_dtype"], "float32");
    }
}

/// Names of gguf-py's constants, and what llama.cpp's graphs take without a key.
#[test]
fn keys_of_the_other_decoders() {
    let key = |config: &Value, key: &str| find(&gguf_of(config), key).cloned();
    let gemma = gemma3(
        json!({"head_dim": 32, "query_pre_attn_scalar": 4, "sliding_window_pattern": 2,
                              "rope_local_base_freq": 5000.0, "final_logit_softcapping": 30.0}),
    );
    for (name, value) in [
        ("general.architecture", G::from("gemma3")),
        ("gemma3.attention.key_length", G::U32(32)),
        ("gemma3.attention.sliding_window", G::U32(9)),
        ("gemma3.attention.sliding_window_pattern", G::U32(2)),
        ("gemma3.attention.scale", G::F32(0.5)),
        ("gemma3.rope.freq_base_swa", G::F32(5000.0)),
        ("gemma3.final_logit_softcapping", G::F32(30.0)),
    ] {
        assert_eq!(key(&gemma, name), Some(value), "{name}");
    }
    let notes = made(&gemma).unwrap().notes.join(" ");
    assert!(notes.contains("query_pre_attn_scalar"), "{notes}");
    let usual = gemma3(json!({"head_dim": 32, "query_pre_attn_scalar": 32}));
    for name in [
        "attention.scale",
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
    ] {
        assert_eq!(key(&usual, &format!("gemma3.{name}")), None, "{name}");
    }
    let minicpm = other(
        "minicpm",
        json!({"scale_emb": 12, "scale_depth": 2, "dim_model_base": 16}),
    );
    for (name, value) in [
        ("minicpm.embedding_scale", 12.0),
        ("minicpm.residual_scale", std::f32::consts::SQRT_2),
        ("minicpm.logit_scale", 4.0),
    ] {
        assert_eq!(key(&minicpm, name), Some(G::F32(value)), "{name}");
    }
    let mistral = other("mistral", json!({"sliding_window": 5}));
    assert_eq!(
        key(&mistral, "general.architecture"),
        Some(G::from("llama"))
    );
    assert_eq!(
        key(&mistral, "llama.attention.sliding_window"),
        Some(G::U32(5))
    );
    let notes = made(&mistral).unwrap().notes.join(" ");
    assert!(notes.contains("more than 5 tokens"), "{notes}");
    let phi3 = other("phi3", json!({"partial_rotary_factor": 0.75}));
    assert_eq!(key(&phi3, "phi3.rope.dimension_count"), Some(G::U32(12)));
    for (config, key) in [
        (
            other("smollm3", json!({"no_rope_layer_interval": 2})),
            "no_rope_layer_interval",
        ),
        (
            other("qwen3", json!({"attention_bias": true})),
            "attention_bias",
        ),
        (
            other("gemma3_text", json!({"hidden_act": "silu"})),
            "sliding_window",
        ),
        (
            other(
                "qwen2",
                json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 1}),
            ),
            "max_window_layers",
        ),
    ] {
        assert!(refused(&config).contains(key), "{key}");
    }
}

#[test]
fn tensors_tell_biases_and_the_output_matrix() {
    let all = |name: &str| {
        if name == ROPE_FREQS {
            None
        } else {
            Some(vec![10, 64])
        }
    };
    let back = hf_config(Path::new("m.gguf"), &gguf_of(&llama()), &all, &no_values).unwrap();
    assert_eq!(
        (
            &back["tie_word_embeddings"],
            &back["attention_bias"],
            &back["mlp_bias"]
        ),
        (&json!(false), &json!(true), &json!(true))
    );
}

#[test]
fn activation_of_the_bitnet_names() {
    let named = |name: &str| {
        let mut metadata = gguf_of(&bitnet());
        metadata.retain(|(k, _)| k != "bitnet.hidden_activation");
        for (key, value) in &mut metadata {
            *key = key.replace("bitnet.", &format!("{name}."));
            if key == "general.architecture" {
                *value = name.into();
            }
        }
        hf_config(Path::new("m.gguf"), &metadata, &shape, &no_values).unwrap()["hidden_act"].clone()
    };
    assert_eq!(
        (named("bitnet"), named("bitnet-b1.58"), named("bitnet-25")),
        (json!("silu"), json!("relu2"), json!("relu2"))
    );
}

#[test]
fn a_gguf_that_no_config_can_say_is_refused() {
    let message = |key: &str, value: Option<G>| {
        let mut metadata = gguf_of(&llama());
        metadata.retain(|(k, _)| k != key);
        metadata.extend(value.map(|v| (key.to_string(), v)));
        hf_config(Path::new("m.gguf"), &metadata, &shape, &no_values)
            .unwrap_err()
            .to_string()
    };
    for key in [
        "embedding_length",
        "block_count",
        "attention.head_count",
        "feed_forward_length",
        "context_length",
        "attention.layer_norm_rms_epsilon",
    ] {
        let key = format!("llama.{key}");
        assert!(
            message(&key, None).contains(&format!("m.gguf: {key}")),
            "{}",
            message(&key, None)
        );
    }
    for (key, value) in [
        ("llama.rope.dimension_count", G::U32(8)),
        ("llama.attention.value_length", G::U32(8)),
        ("llama.rope.scaling.type", G::from("longrope")),
        ("llama.attention.head_count", G::from("four")),
        ("general.architecture", G::from("gemma")),
    ] {
        assert!(message(key, Some(value)).contains(key), "{key}");
    }
    let tensors = |name: &'static str| {
        hf_config(
            Path::new("m.gguf"),
            &gguf_of(&llama()),
            &move |n| (n == name || n == "token_embd.weight").then(|| vec![8, 1]),
            &no_values,
        )
    };
    assert!(
        tensors(ROPE_FREQS)
            .unwrap_err()
            .to_string()
            .contains(ROPE_FREQS)
    );
    assert!(
        hf_config(
            Path::new("m.gguf"),
            &gguf_of(&llama()),
            &|_| None,
            &no_values
        )
        .unwrap_err()
        .to_string()
        .contains("token_embd.weight")
    );
}

#[test]
fn experts_go_round() {
    let experts = json!({
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": true, "head_dim": 16,
    });
    let qwen3 = other("qwen3_moe", experts.clone());
    let mut qwen2 = other("qwen2_moe", experts);
    qwen2["norm_topk_prob"] = false.into();
    qwen2["shared_expert_intermediate_size"] = 40.into();
    let keys = [
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "shared_expert_intermediate_size",
    ];
    let path = Path::new("m.gguf");
    for (config, name) in [(&qwen3, "qwen3moe"), (&qwen2, "qwen2moe")] {
        let metadata = made(config).unwrap().metadata;
        let count = find(&metadata, &format!("{name}.expert_count"));
        assert_eq!(count, Some(&G::U32(8)));
        let back = hf_config(path, &metadata, &shape, &no_values).unwrap();
        for key in keys {
            assert_eq!(back.get(key), config.get(key), "{name}: {key}");
        }
        // What llama.cpp's graph does not follow.
        for (key, value) in [
            ("expert_gating_func", G::U32(2)),
            ("expert_weights_norm", G::Bool(name == "qwen2moe")),
        ] {
            let mut metadata = metadata.clone();
            metadata.push((format!("{name}.{key}"), value));
            let error = hf_config(path, &metadata, &shape, &no_values).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }
    // An older file says the size by its matrices.
    let mut metadata = made(&qwen3).unwrap().metadata;
    metadata.retain(|(key, _)| !key.ends_with("expert_feed_forward_length"));
    let shape = |name: &str| match name {
        "blk.0.ffn_gate_exps.weight" => Some(vec![8, 24, 64]),
        _ => shape(name),
    };
    let back = hf_config(path, &metadata, &shape, &no_values).unwrap();
    assert_eq!(back["moe_intermediate_size"], 24);
    for (config, key, value) in [
        (&qwen3, "norm_topk_prob", json!(false)),
        (&qwen2, "norm_topk_prob", json!(true)),
        (&qwen3, "mlp_only_layers", json!([1])),
        (&qwen3, "decoder_sparse_step", json!(2)),
        (&qwen2, "qkv_bias", json!(false)),
    ] {
        let message = refused(&with(config.clone(), key, value));
        assert!(message.contains(key), "{message}");
    }
    let notes = made(&with(qwen2, "tie_word_embeddings", json!(true)))
        .unwrap()
        .notes;
    assert!(
        notes.iter().any(|note| note.contains("output matrix")),
        "{notes:?}"
    );
}
