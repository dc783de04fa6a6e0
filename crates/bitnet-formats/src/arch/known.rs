//! The architectures that the program knows. A new one is a `static` here and a place in
//! [`ARCHITECTURES`].

use super::architecture::{
    Activation, Architecture, BiasRule, DecoderGraph, GgufName, HfDefaults, LayerRule, ModelKind,
    ScaleRule,
};
use super::experts::ExpertRule;

/// All architectures. Of those that share a name in GGUF files the first reads it.
pub static ARCHITECTURES: &[&Architecture] = &[
    &LLAMA, &BITNET, &QWEN2, &QWEN3, &MISTRAL, &SMOLLM3, &PHI3, &MINICPM, &GEMMA3, &QWEN2_MOE,
    &QWEN3_MOE, &QWEN35, &BERT,
];

/// `llama` on both sides.
pub static LLAMA: Architecture = Architecture {
    kind: ModelKind::Decoder,
    name: "llama",
    hf_class: "LlamaForCausalLM",
    gguf_names: &[GgufName {
        name: "llama",
        activation: Activation::Silu,
    }],
    // A window makes it a mistral.
    gguf_keys: &["attention.sliding_window"],
    modules: &DECODER_MODULES,
    layer_modules: &LAYER_MODULES,
    layer_tensors: &[],
    gguf_adjacent_pairs: true,
    gguf_biases: true,
    gguf_head: true,
    gguf_tied: true,
    gguf_activation: false,
    heads_fill_hidden: false,
    gguf_rope_freqs: true,
    gguf_rope_factors: false,
    gguf_window: false,
    partial_rotary: false,
    biases: BiasRule::Config,
    layers: LayerRule::Uniform,
    scales: ScaleRule::Plain,
    experts: None,
    hf_norms_from_one: false,
    hf_activation: "hidden_act",
    activations: &[Activation::Silu],
    new_activation: Activation::Silu,
    hf_defaults: Some(DEFAULTS),
    int8_activations: false,
    inference: Some(DecoderGraph::LLAMA),
    training: Some(DecoderGraph::LLAMA),
};

/// `bitnet` in Hugging Face folders; `bitnet`, `bitnet-b1.58` or `bitnet-25` in GGUF files.
///
/// Mainline llama.cpp knows the name `bitnet` alone, and computes SiLU for a file without the key
/// `bitnet.hidden_activation`: so that key is always written. Hugging Face's configuration class
/// has defaults, on which no published model relies.
pub static BITNET: Architecture = Architecture {
    name: "bitnet",
    hf_class: "BitNetForCausalLM",
    gguf_names: &[
        GgufName {
            name: "bitnet",
            activation: Activation::Silu,
        },
        GgufName {
            name: "bitnet-b1.58",
            activation: Activation::Relu2,
        },
        GgufName {
            name: "bitnet-25",
            activation: Activation::Relu2,
        },
    ],
    gguf_keys: &[],
    gguf_adjacent_pairs: false,
    gguf_biases: false,
    gguf_head: false,
    gguf_activation: true,
    heads_fill_hidden: true,
    gguf_rope_freqs: false,
    activations: &[Activation::Silu, Activation::Relu2],
    new_activation: Activation::Relu2,
    hf_defaults: None,
    int8_activations: true,
    inference: Some(BITNET_GRAPH),
    training: Some(BITNET_GRAPH),
    ..LLAMA
};

const BITNET_GRAPH: DecoderGraph = DecoderGraph {
    sub_norms: true,
    ..DecoderGraph::LLAMA
};

/// Qwen2 and Qwen2.5: biases of q, k and v.
pub static QWEN2: Architecture = Architecture {
    name: "qwen2",
    hf_class: "Qwen2ForCausalLM",
    gguf_names: &[GgufName {
        name: "qwen2",
        activation: Activation::Silu,
    }],
    gguf_adjacent_pairs: false,
    gguf_rope_freqs: false,
    biases: BiasRule::Qkv,
    layers: LayerRule::UpperWindow,
    hf_defaults: Some(HfDefaults {
        kv_heads: Some(32),
        ..DEFAULTS
    }),
    training: Some(DecoderGraph::LLAMA),
    ..LLAMA
};

/// Qwen3: a norm of each head of q and k.
pub static QWEN3: Architecture = Architecture {
    name: "qwen3",
    hf_class: "Qwen3ForCausalLM",
    gguf_names: &[GgufName {
        name: "qwen3",
        activation: Activation::Silu,
    }],
    gguf_biases: false,
    biases: BiasRule::Attention,
    hf_defaults: Some(HfDefaults {
        kv_heads: Some(32),
        head_dim: Some(128),
        ..DEFAULTS
    }),
    inference: Some(QWEN3_GRAPH),
    training: Some(QWEN3_GRAPH),
    ..QWEN2
};

const QWEN3_GRAPH: DecoderGraph = DecoderGraph {
    head_norms: true,
    ..DecoderGraph::LLAMA
};

/// Mistral and Ministral's first: llama with a sliding window. A GGUF calls it `llama`.
pub static MISTRAL: Architecture = Architecture {
    name: "mistral",
    hf_class: "MistralForCausalLM",
    biases: BiasRule::None,
    layers: LayerRule::Window,
    hf_defaults: Some(HfDefaults {
        kv_heads: Some(8),
        ..DEFAULTS
    }),
    training: Some(DecoderGraph::LLAMA),
    ..LLAMA
};

/// SmolLM3: one layer in four without rotary positions.
pub static SMOLLM3: Architecture = Architecture {
    name: "smollm3",
    hf_class: "SmolLM3ForCausalLM",
    gguf_names: &[GgufName {
        name: "smollm3",
        activation: Activation::Silu,
    }],
    gguf_keys: &[],
    gguf_biases: false,
    layers: LayerRule::SomeRotate,
    hf_defaults: Some(HfDefaults {
        rope_theta: 2e6,
        tied: true,
        kv_heads: Some(4),
        ..DEFAULTS
    }),
    training: Some(DecoderGraph::LLAMA),
    ..LLAMA
};

/// Phi-3, Phi-3.5 and Phi-4: q, k and v in one matrix, gate and up in another.
pub static PHI3: Architecture = Architecture {
    name: "phi3",
    hf_class: "Phi3ForCausalLM",
    gguf_names: &[GgufName {
        name: "phi3",
        activation: Activation::Silu,
    }],
    layer_modules: &PHI3_MODULES,
    gguf_adjacent_pairs: false,
    gguf_biases: false,
    gguf_rope_freqs: false,
    gguf_rope_factors: true,
    partial_rotary: true,
    biases: BiasRule::None,
    layers: LayerRule::Window,
    hf_defaults: Some(HfDefaults {
        rms_norm_eps: 1e-5,
        ..DEFAULTS
    }),
    inference: Some(DecoderGraph {
        fused: true,
        ..DecoderGraph::LLAMA
    }),
    training: None,
    ..LLAMA
};

/// MiniCPM 1 and 2: scaled embedding, residuals and logits.
pub static MINICPM: Architecture = Architecture {
    name: "minicpm",
    hf_class: "MiniCPMForCausalLM",
    gguf_names: &[GgufName {
        name: "minicpm",
        activation: Activation::Silu,
    }],
    gguf_keys: &["embedding_scale", "residual_scale", "logit_scale"],
    gguf_rope_factors: true,
    gguf_biases: false,
    biases: BiasRule::Attention,
    scales: ScaleRule::Minicpm,
    hf_defaults: Some(HfDefaults {
        tied: true,
        ..DEFAULTS
    }),
    training: None,
    ..LLAMA
};

/// The text models of Gemma 3: norms before and after, windows in five layers of six.
pub static GEMMA3: Architecture = Architecture {
    name: "gemma3_text",
    hf_class: "Gemma3ForCausalLM",
    gguf_names: &[GgufName {
        name: "gemma3",
        activation: Activation::GeluTanh,
    }],
    gguf_keys: &[
        "attention.scale",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
        "final_logit_softcapping",
    ],
    layer_modules: &GEMMA3_MODULES,
    gguf_adjacent_pairs: false,
    gguf_biases: false,
    gguf_rope_freqs: false,
    gguf_window: true,
    biases: BiasRule::Attention,
    layers: LayerRule::Local,
    scales: ScaleRule::Gemma,
    hf_norms_from_one: true,
    hf_activation: "hidden_activation",
    activations: &[Activation::GeluTanh],
    new_activation: Activation::GeluTanh,
    hf_defaults: Some(HfDefaults {
        rope_theta: 1e6,
        activation: Activation::GeluTanh,
        tied: true,
        kv_heads: Some(4),
        head_dim: Some(256),
        ..DEFAULTS
    }),
    inference: Some(DecoderGraph {
        ffn_norm: "pre_feedforward_layernorm",
        post_norms: Some(["post_attention_layernorm", "post_feedforward_layernorm"]),
        head_norms: true,
        ..DecoderGraph::LLAMA
    }),
    training: None,
    ..LLAMA
};

/// The text models of Qwen3.5, 3.6 and 3.8: gated delta nets, and gated attention in one layer of
/// four.
pub static QWEN35: Architecture = Architecture {
    name: "qwen3_5_text",
    hf_class: "Qwen3_5ForCausalLM",
    gguf_names: &[GgufName {
        name: "qwen35",
        activation: Activation::Silu,
    }],
    gguf_keys: &[
        "full_attention_interval",
        "ssm.conv_kernel",
        "ssm.group_count",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
        // Of the three positions of a picture's part; those of text are equal.
        "rope.dimension_sections",
    ],
    layer_modules: &QWEN35_MODULES,
    layer_tensors: &[
        ("linear_attn.A_log", "ssm_a"),
        ("linear_attn.dt_bias", "ssm_dt.bias"),
    ],
    gguf_adjacent_pairs: false,
    gguf_biases: false,
    gguf_rope_freqs: false,
    partial_rotary: true,
    biases: BiasRule::Attention,
    layers: LayerRule::Delta,
    hf_norms_from_one: true,
    hf_defaults: Some(HfDefaults {
        kv_heads: Some(4),
        head_dim: Some(256),
        rotary_factor: 0.25,
        ..DEFAULTS
    }),
    inference: Some(DecoderGraph {
        head_norms: true,
        output_gate: true,
        ..DecoderGraph::LLAMA
    }),
    training: None,
    ..LLAMA
};

/// Bert, the encoder: norms after attention and feed-forward, learned positions, no output matrix.
/// [`HfEncoder`](super::HfEncoder) reads its config.json; the facts of decoders are not looked at.
pub static BERT: Architecture = Architecture {
    kind: ModelKind::Encoder,
    name: "bert",
    hf_class: "BertModel",
    gguf_names: &[GgufName {
        name: "bert",
        activation: Activation::GeluTanh,
    }],
    gguf_keys: &["attention.layer_norm_epsilon"],
    modules: &[
        ("embeddings.word_embeddings", "token_embd"),
        ("embeddings.position_embeddings", "position_embd"),
        ("embeddings.token_type_embeddings", "token_types"),
        ("embeddings.LayerNorm", "token_embd_norm"),
    ],
    layer_modules: &[
        ("attention.self.query", "attn_q"),
        ("attention.self.key", "attn_k"),
        ("attention.self.value", "attn_v"),
        ("attention.output.dense", "attn_output"),
        ("attention.output.LayerNorm", "attn_output_norm"),
        ("intermediate.dense", "ffn_up"),
        ("output.dense", "ffn_down"),
        ("output.LayerNorm", "layer_output_norm"),
    ],
    gguf_adjacent_pairs: false,
    gguf_rope_freqs: false,
    hf_defaults: None,
    inference: None,
    training: None,
    ..LLAMA
};

/// Qwen3-30B-A3B and its siblings: qwen3 whose feed-forward layers are mixtures of experts.
pub static QWEN3_MOE: Architecture = Architecture {
    name: "qwen3_moe",
    hf_class: "Qwen3MoeForCausalLM",
    gguf_names: &[GgufName {
        name: "qwen3moe",
        activation: Activation::Silu,
    }],
    gguf_keys: &EXPERT_KEYS,
    layer_modules: &MOE_MODULES,
    layers: LayerRule::SwitchedWindow,
    hf_defaults: Some(HfDefaults {
        kv_heads: Some(4),
        ..DEFAULTS
    }),
    experts: Some(ExpertRule {
        gguf_normalized: true,
        shared: false,
    }),
    training: None,
    ..QWEN3
};

/// Qwen1.5-MoE and Qwen2-57B-A14B: qwen2 with experts, one of which sees every token.
pub static QWEN2_MOE: Architecture = Architecture {
    name: "qwen2_moe",
    hf_class: "Qwen2MoeForCausalLM",
    gguf_names: &[GgufName {
        name: "qwen2moe",
        activation: Activation::Silu,
    }],
    gguf_keys: &EXPERT_KEYS,
    gguf_tied: false,
    layer_modules: &MOE_MODULES,
    hf_defaults: Some(HfDefaults {
        kv_heads: Some(16),
        ..DEFAULTS
    }),
    experts: Some(ExpertRule {
        gguf_normalized: false,
        shared: true,
    }),
    training: None,
    ..QWEN2
};

/// Values that the configuration classes of Hugging Face share.
const DEFAULTS: HfDefaults = HfDefaults {
    rope_theta: 10000.0,
    rms_norm_eps: 1e-6,
    activation: Activation::Silu,
    tied: false,
    kv_heads: None,
    head_dim: None,
    rotary_factor: 1.0,
};

/// Modules of a decoder outside its layers.
const DECODER_MODULES: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Modules of a decoder's layer, sub-norms and norms of heads among them.
const LAYER_MODULES: [(&str, &str); 13] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.attn_sub_norm", "attn_sub_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.ffn_sub_norm", "ffn_sub_norm"),
];

/// Modules of a layer with experts, or without in the same model. The stacks of one projection have
/// the names of MLX; [`ExpertTensor`](super::ExpertTensor) knows the others.
const MOE_MODULES: [(&str, &str); 19] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.switch_mlp.gate_proj", "ffn_gate_exps"),
    ("mlp.switch_mlp.up_proj", "ffn_up_exps"),
    ("mlp.switch_mlp.down_proj", "ffn_down_exps"),
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
];

/// Keys of a GGUF with experts.
const EXPERT_KEYS: [&str; 7] = [
    "attention.sliding_window",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_gating_func",
    "expert_weights_norm",
];

/// Modules of a layer of phi3.
const PHI3_MODULES: [(&str, &str); 6] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Modules of a layer of gemma3.
const GEMMA3_MODULES: [(&str, &str); 13] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Modules of a layer of qwen3_5.
const QWEN35_MODULES: [(&str, &str); 18] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("linear_attn.in_proj_qkv", "attn_qkv"),
    ("linear_attn.in_proj_z", "attn_gate"),
    ("linear_attn.in_proj_b", "ssm_beta"),
    ("linear_attn.in_proj_a", "ssm_alpha"),
    ("linear_attn.conv1d", "ssm_conv1d"),
    ("linear_attn.norm", "ssm_norm"),
    ("linear_attn.out_proj", "ssm_out"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Keys of a GGUF, without prefix, that all decoders follow or that do not affect them.
pub(super) const DECODER_KEYS: &[&str] = &[
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
    "hidden_activation",
    "tensor_data_layout",
    "attention.causal",
    "pooling_type",
    "tie_word_embeddings",
];
