//! Caches with the states of gated delta nets: what can be taken back, and what is computed again.

use bitnet_inference::{
    CacheType, Config, ForwardBuffers, ForwardStep, KvCache, LoadOptions, Model, WantedLogits,
};
use std::path::Path;

const TOKENS: [u32; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];

fn model(name: &str) -> Model {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    Model::load(golden.join(name)).unwrap()
}

fn forward(model: &Model, cache: &mut KvCache, tokens: &[u32]) -> Vec<u32> {
    let step = ForwardStep {
        cache,
        tokens,
        want: WantedLogits::Last,
    };
    let mut buffers = ForwardBuffers::default();
    let logits = model.forward(&mut [step], &mut buffers).unwrap();
    logits.iter().map(|x| x.to_bits()).collect()
}

/// An emptied cache is a new one: perplexity's windows begin so.
#[test]
fn a_state_goes_back_to_the_start_alone() {
    for (name, states) in [("qwen35", true), ("qwen35-mixed", true), ("gemma3", false)] {
        let model = model(name);
        let mut cache = KvCache::new(model.config(), 32, CacheType::F16);
        assert_eq!(cache.has_states(), states);
        let first = forward(&model, &mut cache, &TOKENS);
        assert_eq!(cache.truncate(20), 12, "nothing to drop");
        assert_eq!(cache.truncate(12), 12, "nothing to drop");
        let left = cache.truncate(5);
        assert_eq!((left, cache.len()), if states { (0, 0) } else { (5, 5) });
        assert_eq!(
            forward(&model, &mut cache, &TOKENS[left..]),
            first,
            "{name}"
        );
        assert_eq!(cache.truncate(0), 0);
        assert!(cache.is_empty());
        assert_eq!(forward(&model, &mut cache, &TOKENS), first, "{name}");
    }
}

/// What chat does: the next prompt continues the session, or parts from it earlier.
#[test]
fn a_session_computes_again_what_it_cannot_keep() {
    let model = model("qwen35");
    let fresh = |tokens: &[u32]| {
        let mut session = model.session(40, CacheType::F16).unwrap();
        session.prefill(tokens).unwrap().0.to_vec()
    };
    let mut session = model.session(40, CacheType::F16).unwrap();
    session.prefill(&TOKENS[..6]).unwrap();
    session.decode(7).unwrap();
    let mut longer = [&TOKENS[..6], &[7, 8, 9]].concat();
    let (logits, computed) = session.prefill(&longer).unwrap();
    assert_eq!((logits, computed), (&fresh(&longer)[..], 2));
    longer[7] = 10;
    let (logits, computed) = session.prefill(&longer).unwrap();
    assert_eq!((logits, computed), (&fresh(&longer)[..], longer.len()));
    assert_eq!(session.tokens(), longer);
    session.clear();
    let (logits, computed) = session.prefill(&TOKENS).unwrap();
    assert_eq!((logits, computed), (&fresh(&TOKENS)[..], TOKENS.len()));
}

/// States do not grow with the text.
#[test]
fn bytes_of_states() {
    let model = model("qwen35");
    let bytes = |capacity| KvCache::new(model.config(), capacity, CacheType::F32).bytes();
    // Keys and values of one layer of four: 2 heads of 24.
    assert_eq!(bytes(100) - bytes(0), 100 * 4 * 2 * 2 * 24);
    // In three layers: 3 inputs of 2 · 2 · 12 + 72 channels, 6 heads of 12 × 16 (12 rows of S).
    assert_eq!(bytes(0), 3 * 4 * (3 * 120 + 6 * 12 * 16));
}

/// A pass that fails leaves no state half way: the cache is empty, and the next text is as the
/// first of a new one.
#[test]
fn a_failed_pass_empties_a_cache_with_states() {
    let json = serde_json::json!({
        "model_type": "qwen3_5_text", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "vocab_size": 32, "max_position_embeddings": 64,
        "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 32, "tie_word_embeddings": true,
    });
    let config = Config::from_hf(Path::new("config.json"), &json).unwrap();
    let mut bad = config.clone();
    // The first layers compute; the last one, whose inputs are too large, does not.
    bad.scales.residual = f32::MAX;
    let options = LoadOptions {
        threads: 1,
        ..LoadOptions::default()
    };
    let [good, bad] = [config, bad].map(|c| Model::synthetic(c, &options).unwrap());
    let mut cache = KvCache::new(good.config(), 32, CacheType::F32);
    let first = forward(&good, &mut cache, &TOKENS);
    let step = ForwardStep {
        cache: &mut cache,
        tokens: &TOKENS[..3],
        want: WantedLogits::Last,
    };
    let mut buffers = ForwardBuffers::default();
    let error = bad.forward(&mut [step], &mut buffers).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    assert!(cache.is_empty());
    assert_eq!(forward(&good, &mut cache, &TOKENS), first);
}
