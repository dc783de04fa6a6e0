//! `genai_config.json`, with which onnxruntime-genai opens the folder.

use super::{Facts, MODEL};
use serde_json::{Value, json};

/// The configuration of onnxruntime-genai for this graph.
pub(crate) fn genai_config(facts: &Facts) -> Value {
    let eos = match facts.eos.as_slice() {
        [one] => json!(one),
        several => json!(several),
    };
    let first_eos = facts.eos.first().copied().unwrap_or_default();
    json!({
        "model": {
            "bos_token_id": facts.bos.unwrap_or_default(),
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
            "eos_token_id": eos,
            "pad_token_id": facts.pad.unwrap_or(first_eos),
            // A decoder without anything of its own, whatever its architecture.
            "type": "llama",
            "vocab_size": facts.vocab,
        },
        "search": {
            "do_sample": false,
            "max_length": facts.context,
            "past_present_share_buffer": false,
        },
    })
}
