//! A decoded token allocates nothing.

use bitnet_inference::{ActivationType, CacheType, Config, FloatType, LoadOptions, Model};
use std::path::Path;

fn decodes_without_allocating(what: &str, model: &Model) {
    for cache in [CacheType::F32, CacheType::F16, CacheType::Int8] {
        let mut session = model.session(40, cache).unwrap();
        session.prefill(&[1, 2, 3, 4, 5]).unwrap();
        // Two buffers of quantized inputs take turns.
        (0..2).for_each(|token| _ = session.decode(token).unwrap());
        let counted = allocation_counter::measure(|| {
            (0..30).for_each(|token| _ = session.decode(token).unwrap())
        });
        assert_eq!(counted.count_total, 0, "{what}, {cache:?}");
        // The counter counts.
        assert!(
            allocation_counter::measure(|| drop(model.session(1, cache).unwrap())).count_total > 0
        );
    }
}

#[test]
fn a_decoded_token_allocates_nothing() {
    for embedding in [FloatType::Exact, FloatType::Int8, FloatType::Int4] {
        let options = LoadOptions {
            threads: 1,
            embedding,
            ..LoadOptions::default()
        };
        let model = Model::synthetic(Config::shape("tiny").unwrap(), &options).unwrap();
        decodes_without_allocating("bitnet, made up", &model);
    }
    for activations in [ActivationType::Float, ActivationType::Int8] {
        let options = LoadOptions {
            threads: 1,
            activations,
            ..LoadOptions::default()
        };
        let model = Model::synthetic_shape("bonsai-tiny", &options).unwrap();
        // Two bits a weight and a scale for each 128, f16 or f32: 2.125 or 2.25 bits, and the norms.
        let c = model.config();
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let layer = c.hidden * (2 * q + 2 * kv + 3 * c.ffn);
        let weights = c.layers * layer + 2 * c.vocab * c.hidden;
        let bits = 8.0 * model.bytes() as f64 / weights as f64;
        assert!((2.1..2.6).contains(&bits), "{bits} bits, {activations:?}");
        decodes_without_allocating("bonsai, made up", &model);
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    // Ternary experts with int8 inputs.
    let path = golden.join("qwen2-moe/config.json");
    let config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let config = Config::from_hf(&path, &config).unwrap();
    let options = LoadOptions {
        threads: 1,
        ..LoadOptions::default()
    };
    let model = Model::synthetic(config, &options).unwrap();
    decodes_without_allocating("qwen2_moe, made up", &model);
    let mut models = 0;
    for entry in std::fs::read_dir(golden).unwrap() {
        let path = entry.unwrap().path();
        let config = std::fs::read_to_string(path.join("config.json"));
        // Not the encoders.
        if config.is_ok_and(|config| config.contains("ForCausalLM")) {
            let model = Model::load_with(
                &path,
                &LoadOptions {
                    threads: 1,
                    ..LoadOptions::default()
                },
            )
            .unwrap();
            decodes_without_allocating(&path.display().to_string(), &model);
            models += 1;
        }
    }
    assert!(models >= 23, "{models} models");
}
