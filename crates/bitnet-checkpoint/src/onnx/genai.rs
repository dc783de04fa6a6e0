//! `genai_config.json`, with which onnxruntime-genai opens the folder.

use super::{Facts, MODEL};
use serde_json::{Value, json};

/// The configuration of onnxruntime-genai for this graph.
pub(crate) fn genai_config(facts: &Facts) -> Value {
    let mut config = json!({
        "model": {
            "context_length": facts.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": facts.head_dim,
                "hidden_size": facts.hidden,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": facts.heads,
                "num_hidden_layers": facts.layers,
                "num_key_value_heads": facts.kv_heads,
            },
            // A decoder without anything of its own, whatever its architecture.
            "type": "llama",
            "vocab_size": facts.vocab,
        },
        "search": {
            "do_sample": false,
            "max_length": facts.context,
            "past_present_share_buffer": false,
        },
    });
    let eos = match facts.eos.as_slice() {
        [] => None,
        [one] => Some(json!(one)),
        several => Some(json!(several)),
    };
    let pad = facts.pad.or(facts.eos.first().copied());
    for (key, ids) in [
        ("bos_token_id", facts.bos.map(Value::from)),
        ("eos_token_id", eos),
        ("pad_token_id", pad.map(Value::from)),
    ] {
        if let Some(ids) = ids {
            config["model"][key] = ids;
        }
    }
    config
}
