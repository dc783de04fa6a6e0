//! What is refused, and by which name.

use super::*;

#[test]
fn what_a_graph_does_not_compute_is_refused_by_its_key() {
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit, &[&str]); 12] = [
        (
            "gemma3",
            |c| c["attn_logit_softcapping"] = 50.into(),
            &["attn_logit_softcapping", "50"],
        ),
        (
            "gemma3",
            |c| c["use_bidirectional_attention"] = true.into(),
            &["use_bidirectional_attention"],
        ),
        (
            "gemma3",
            |c| c["layer_types"][0] = "chunked_attention".into(),
            &["layer_types", "chunked_attention"],
        ),
        (
            "qwen2-bias",
            |c| c["layer_types"][0] = "sliding_attention".into(),
            &["sliding_window"],
        ),
        (
            "qwen3-bias",
            |c| c["attention_bias"] = false.into(),
            &["proj.bias", "no place"],
        ),
        (
            "phi3-partial",
            |c| c["attention_bias"] = true.into(),
            &["attention_bias", "phi3"],
        ),
        (
            "phi3-longrope",
            |c| c["rope_parameters"]["short_factor"] = vec![1.0, 2.0].into(),
            &["short_factor", "3 positive numbers"],
        ),
        (
            "mistral-window",
            |c| c["rope_parameters"]["partial_rotary_factor"] = 0.5.into(),
            &["partial_rotary_factor", "0.5"],
        ),
        (
            "qwen3-yarn",
            |c| c["model_type"] = "llama".into(),
            &["_norm", "llama graph", "no place"],
        ),
        (
            "qwen35",
            |c| c["layer_types"][0] = "sliding_attention".into(),
            &["layer_types", "linear_attention"],
        ),
        (
            "qwen35",
            |c| c["linear_num_key_heads"] = 4.into(),
            &["linear_num_value_heads", "multiple of", "4", "6"],
        ),
        (
            "qwen35-mixed",
            |c| c["linear_conv_kernel_dim"] = 4.into(),
            &["conv1d.weight", "[150, 1, 4]", "[150, 1, 3]"],
        ),
    ];
    for (name, edit, parts) in cases {
        let dir = copy(name);
        edit_config(dir.path(), edit);
        refused(dir.path(), parts);
    }
}

/// The context of a longrope model ends where its other factors begin.
#[test]
fn long_texts_of_longrope_are_refused() {
    let model = load(&folder("phi3-longrope"), 1, Kernels::detect());
    assert_eq!(model.config().context, 40);
    let notes = model.notes().join("\n");
    assert!(notes.contains("up to 40 tokens"), "{notes}");
}

#[test]
fn what_is_not_known_is_refused() {
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit, &[&str]); 12] = [
        (
            "llama-f32",
            |c| c["model_type"] = "mamba".into(),
            &["model_type", "'llama'", "'bitnet'", "mamba"],
        ),
        (
            "llama-f32",
            |c| c["hidden_act"] = "gelu".into(),
            &["hidden_act", "gelu"],
        ),
        (
            "llama-f32",
            |c| c["rope_parameters"]["rope_type"] = "xpos".into(),
            &["rope_type", "xpos"],
        ),
        (
            "llama-f32",
            |c| c["num_key_value_heads"] = 3.into(),
            &["num_key_value_heads", "divisor of 4"],
        ),
        (
            "llama-f32",
            |c| c["hidden_size"] = 52.into(),
            &[
                "model.safetensors",
                "model.embed_tokens.weight",
                "[61, 52]",
                "[61, 48]",
            ],
        ),
        (
            "llama-f32",
            |c| c["num_hidden_layers"] = 3.into(),
            &["model.layers.2.", "no such tensor"],
        ),
        (
            "llama-f32",
            |c| c["num_hidden_layers"] = 1.into(),
            &["model.layers.1.", "no place"],
        ),
        (
            "llama-f32",
            |c| c["attention_bias"] = false.into(),
            &["self_attn.k_proj.bias", "no place"],
        ),
        (
            "llama-f32",
            |c| c["vocab_size"] = serde_json::Value::Null,
            &["vocab_size", "positive number"],
        ),
        (
            "llama-bitlinear",
            |c| c["quantization_config"]["linear_class"] = "other".into(),
            &["linear_class", "'other'"],
        ),
        (
            "llama-online",
            |c| c["quantization_config"]["linear_class"] = "bitlinear".into(),
            &["linear_class", "autobitlinear"],
        ),
        (
            "bitnet-float",
            |c| c["model_type"] = "llama".into(),
            &["ffn_sub_norm", "llama graph", "no place"],
        ),
    ];
    for (name, edit, parts) in cases {
        let dir = copy(name);
        edit_config(dir.path(), edit);
        refused(dir.path(), parts);
    }
}

#[test]
fn broken_weights_are_refused() {
    let dir = copy("llama-f32");
    edit_tensor(dir.path(), "model.layers.1.mlp.up_proj.weight", |b| {
        b[400..404].copy_from_slice(&f32::NAN.to_le_bytes())
    });
    refused(
        dir.path(),
        &[
            "model.safetensors",
            "model.layers.1.mlp.up_proj.weight",
            "finite",
            "NaN at index 100",
        ],
    );
    let dir = copy("bitnet-bitlinear");
    edit_tensor(dir.path(), "model.layers.0.mlp.up_proj.weight", |b| {
        b[7] |= 3
    });
    refused(
        dir.path(),
        &["model.safetensors", "model.layers.0.mlp.up_proj.weight"],
    );
    let dir = copy("llama-f32");
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    fs::write(
        dir.path().join("model.safetensors"),
        &bytes[..bytes.len() - 4],
    )
    .unwrap();
    refused(dir.path(), &["model.safetensors"]);
    let alone = folder("llama-f32").join("model.safetensors");
    let message = Model::load(&alone).unwrap_err().to_string();
    assert!(message.contains("weights alone are no model"), "{message}");
}

#[test]
fn tokens_and_lengths_that_do_not_fit() {
    let model = load(&folder("llama-f32"), 1, Kernels::detect());
    let (mut cache, mut scratch) = (
        KvCache::new(model.config(), 8, CacheType::F16),
        ForwardBuffers::default(),
    );
    let mut message = |tokens: &[u32]| {
        let error = model
            .forward(
                &mut [ForwardStep {
                    cache: &mut cache,
                    tokens,
                    want: WantedLogits::Last,
                }],
                &mut scratch,
            )
            .unwrap_err();
        assert_eq!(cache.len(), 0);
        error.to_string()
    };
    assert!(message(&[61]).contains("token 61 is outside the vocabulary of 61"));
    assert!(message(&[5; 9]).contains("9 tokens do not fit the context of 8"));
    assert!(message(&[]).contains("empty prompt"));
    assert!(
        model
            .session(65, CacheType::F16)
            .unwrap_err()
            .to_string()
            .contains("at most 64")
    );
    assert!(
        model
            .tokenizer()
            .unwrap_err()
            .to_string()
            .contains("tokenizer.json")
    );
}
