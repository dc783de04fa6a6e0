#!/usr/bin/env python3
"""Writes crates/bitnet-inference/tests/golden/qwen35-rotated: a GGUF of a qwen35 model whose ssm_out is in a rotated basis with its value heads grouped
(`prism.hadamard.gdn_v_grouped`), and the logits that mlx-lm's prism_hadamard_qwen35 computes for it on the CPU.

    scripts/make-rotated-delta-golden.py            (with a python that has mlx[cpu], mlx-lm, gguf and safetensors)

model.gguf is written by gguf-py: names, order of heads, −exp(A_log) and 1 + w as llama.cpp's converter has them; mlx-lm has Hugging Face's order.
golden.safetensors: as scripts/make-inference-golden.py.
"""

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from mlx_lm.models.prism_hadamard_qwen35 import Model, ModelArgs
from safetensors.numpy import save_file

OUT = Path(__file__).resolve().parents[1] / "crates/bitnet-inference/tests/golden/qwen35-rotated"
PROMPT, STEPS = 23, 16
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, TAPS = 48, 44, 4, 2, 24, 61, 4
KEYS, VALUES, KEY_DIM, VALUE_DIM = 2, 4, 16, 128
CONV, WIDTH = 2 * KEYS * KEY_DIM + VALUES * VALUE_DIM, VALUES * VALUE_DIM
ROPE = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
TEXT = dict(model_type="qwen3_5_text", hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM, rms_norm_eps=1e-6, vocab_size=VOCAB, max_position_embeddings=64, linear_num_value_heads=VALUES, linear_num_key_heads=KEYS,
            linear_key_head_dim=KEY_DIM, linear_value_head_dim=VALUE_DIM, linear_conv_kernel_dim=TAPS, tie_word_embeddings=True,
            full_attention_interval=2, rope_parameters=ROPE)


def tiled(w, first=0, unit=VALUE_DIM):
    """Rows from `first` on as ggml has the value heads: those of one turn, key after key."""
    heads = w[first:].reshape(KEYS, VALUES // KEYS, unit, *w.shape[1:]).swapaxes(0, 1)
    return np.concatenate([w[:first], heads.reshape(w[first:].shape)])


def main():
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(20261129)
    path = "model.layers.0.linear_attn.out_proj"
    args = ModelArgs.from_dict({"model_type": "prism_hadamard_qwen35", "schema_version": 1, "tensor_namespace": "mlx-lm-text", "text_config": TEXT,
                                "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
                                "modules": [{"path": path, "embedding": False, "dtype": "float16", "block": 512}]})
    model = Model(args)
    writer = gguf.GGUFWriter(OUT / "model.gguf", "qwen35")
    OUT.mkdir(parents=True, exist_ok=True)
    weights = {}

    def put(name, hf_name, values, mlx=None, file=None):
        """A tensor of the file, and of mlx-lm's model where it has another form there."""
        half = values.ndim > 1 and "conv1d" not in name
        values = values.astype(np.float16 if half else np.float32)
        weights[hf_name] = mx.array((mlx or (lambda w: w))(values.astype(np.float32)))
        stored = (file or (lambda w: w))(values)
        writer.add_tensor(name, np.ascontiguousarray(stored))

    def normal(*shape, scale=0.15):
        return scale * rng.standard_normal(shape)

    def gain(size):
        return 1 + 0.2 * rng.standard_normal(size)

    put("token_embd.weight", "model.embed_tokens.weight", normal(VOCAB, HIDDEN))
    put("output_norm.weight", "model.norm.weight", gain(HIDDEN))
    for layer in range(2):
        blk, hf = f"blk.{layer}", f"model.layers.{layer}"
        put(f"{blk}.attn_norm.weight", f"{hf}.input_layernorm.weight", gain(HIDDEN))
        put(f"{blk}.post_attention_norm.weight", f"{hf}.post_attention_layernorm.weight", gain(HIDDEN))
        put(f"{blk}.ffn_gate.weight", f"{hf}.mlp.gate_proj.weight", normal(FFN, HIDDEN))
        put(f"{blk}.ffn_up.weight", f"{hf}.mlp.up_proj.weight", normal(FFN, HIDDEN))
        put(f"{blk}.ffn_down.weight", f"{hf}.mlp.down_proj.weight", normal(HIDDEN, FFN))
    blk, hf = "blk.0", "model.layers.0.linear_attn"
    qkv = 2 * KEYS * KEY_DIM
    put(f"{blk}.attn_qkv.weight", f"{hf}.in_proj_qkv.weight", normal(CONV, HIDDEN), file=lambda w: tiled(w, qkv))
    put(f"{blk}.attn_gate.weight", f"{hf}.in_proj_z.weight", normal(WIDTH, HIDDEN), file=tiled)
    put(f"{blk}.ssm_beta.weight", f"{hf}.in_proj_b.weight", normal(VALUES, HIDDEN), file=lambda w: tiled(w, unit=1))
    put(f"{blk}.ssm_alpha.weight", f"{hf}.in_proj_a.weight", normal(VALUES, HIDDEN), file=lambda w: tiled(w, unit=1))
    put(f"{blk}.ssm_conv1d.weight", f"{hf}.conv1d.weight", normal(CONV, TAPS, scale=0.5), mlx=lambda w: w[:, :, None], file=lambda w: tiled(w, qkv))
    put(f"{blk}.ssm_a", f"{hf}.A_log", np.linspace(-4, 1, VALUES), file=lambda w: tiled(-np.exp(w), unit=1))
    put(f"{blk}.ssm_dt.bias", f"{hf}.dt_bias", normal(VALUES, scale=0.3), file=lambda w: tiled(w, unit=1))
    put(f"{blk}.ssm_norm.weight", f"{hf}.norm.weight", gain(VALUE_DIM))
    codes = rng.integers(0, 3, (HIDDEN, WIDTH))
    scales = (rng.integers(8, 24, (HIDDEN, WIDTH // 128)) / 128).astype(np.float32)
    signs = rng.choice([-1, 1], WIDTH)
    words = (codes.reshape(HIDDEN, -1, 16).astype(np.uint32) << (2 * np.arange(16, dtype=np.uint32))).sum(-1).astype(np.uint32)
    out = f"{hf}.out_proj"
    weights.update({f"{out}.weight": mx.array(words), f"{out}.scales": mx.array(scales), f"{out}.biases": mx.array(-scales),
                    f"{out}.signs": mx.array(signs.astype(np.float32))})
    # In the rotated basis the heads are grouped, as mlx-lm has them.
    writer.add_tensor(f"{blk}.ssm_out.weight", ((codes - 1) * np.repeat(scales, 128, 1)).astype(np.float16))
    blk, hf = "blk.1", "model.layers.1.self_attn"
    put(f"{blk}.attn_q.weight", f"{hf}.q_proj.weight", normal(2 * HEADS * HEAD_DIM, HIDDEN))
    put(f"{blk}.attn_k.weight", f"{hf}.k_proj.weight", normal(KV_HEADS * HEAD_DIM, HIDDEN))
    put(f"{blk}.attn_v.weight", f"{hf}.v_proj.weight", normal(KV_HEADS * HEAD_DIM, HIDDEN))
    put(f"{blk}.attn_output.weight", f"{hf}.o_proj.weight", normal(HIDDEN, HEADS * HEAD_DIM))
    put(f"{blk}.attn_q_norm.weight", f"{hf}.q_norm.weight", gain(HEAD_DIM))
    put(f"{blk}.attn_k_norm.weight", f"{hf}.k_norm.weight", gain(HEAD_DIM))
    model.load_weights([(f"language_model.{name}", w) for name, w in weights.items()])

    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD_DIM // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_sections([1, 1, 1, 0])
    writer.add_vocab_size(VOCAB)
    writer.add_full_attention_interval(2)
    writer.add_ssm_conv_kernel(TAPS)
    writer.add_ssm_group_count(KEYS)
    writer.add_ssm_inner_size(WIDTH)
    writer.add_ssm_state_size(KEY_DIM)
    writer.add_ssm_time_step_rank(VALUES)
    kind, prefix = gguf.GGUFValueType, "prism.hadamard"
    writer.add_uint32(f"{prefix}.version", 1)
    writer.add_string(f"{prefix}.transform", "normalized-sylvester-walsh-hadamard")
    writer.add_string(f"{prefix}.axis", "input-last-dimension")
    writer.add_uint32(f"{prefix}.block_size", 512)
    writer.add_string(f"{prefix}.sign_mode", "explicit")
    writer.add_key_value(f"{prefix}.sign_widths", [WIDTH], kind.ARRAY, sub_type=kind.INT32)
    writer.add_key_value(f"{prefix}.sign_values", [int(s) for s in signs], kind.ARRAY, sub_type=kind.INT8)
    writer.add_array(f"{prefix}.weight_names", ["blk.0.ssm_out.weight"])
    writer.add_bool(f"{prefix}.gdn_v_grouped", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    cache = model.make_cache()
    tokens = rng.integers(3, VOCAB, PROMPT).tolist()
    logits = [np.array(model(mx.array([tokens]), cache=cache).astype(mx.float32))[0]]
    for _ in range(STEPS):
        tokens.append(int(logits[-1][-1].argmax()))
        logits.append(np.array(model(mx.array([tokens[-1:]]), cache=cache).astype(mx.float32))[0])
    logits = np.ascontiguousarray(np.concatenate(logits))
    assert np.isfinite(logits).all() and len(logits) == len(tokens)
    save_file({"tokens": np.array(tokens, np.int32), "logits": logits}, OUT / "golden.safetensors")
    print(f"{sum(f.stat().st_size for f in OUT.iterdir())} bytes, largest logit {np.abs(logits).max():.3f}, spread {logits.std():.3f}")


if __name__ == "__main__":
    main()
