#!/usr/bin/env python3
"""Writes crates/bitnet-inference/tests/golden/llama-rotated: a GGUF whose weights are in a rotated basis (`prism.hadamard.*`), and the logits that
transformers computes in f32 for the same model in its original basis.

    scripts/make-rotated-golden.py            (with the python of scripts/python-truth --print-python)

model.gguf is written by gguf-py. Most linear layers are ternary (TQ2_0) in the rotated basis; k_proj is not rotated, so that layers of one input
differ; the embedding is a table of rotated rows and the output matrix too. W = W'·H·diag(s) is computed here in f64, from Sylvester's matrix itself.
golden.safetensors: as scripts/make-inference-golden.py. --identity writes other files without signs, for a try by hand.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).resolve().parents[1] / "crates/bitnet-inference/tests/golden/llama-rotated"
PROMPT, STEPS = 23, 16
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, BLOCK = 256, 512, 4, 2, 61, 128
SHAPES = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
          "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
HF = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
      "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
FLOAT = {"attn_v"}
NOT_ROTATED = {"attn_k"}


def sylvester(block):
    """H[i][j] = (-1)^popcount(i & j) / sqrt(block)."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]) / np.sqrt(block)


def rotation(signs):
    """R = H·diag(s) in blocks: rotate(x) = R·x."""
    return np.kron(np.eye(len(signs) // BLOCK), sylvester(BLOCK)) @ np.diag(signs)


def permuted(w, heads):
    """Rows of rotate-half pairs as neighbours, as llama.cpp's llama has them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def main():
    rng = np.random.default_rng(20261128)
    signs = {width: rng.choice([-1, 1], width) if "--identity" not in sys.argv else np.ones(width, int) for width in (HIDDEN, FFN)}
    matrix = {width: rotation(s) for width, s in signs.items()}

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=1, num_attention_heads=HEADS,
                                         num_key_value_heads=KV_HEADS, vocab_size=VOCAB, max_position_embeddings=64, tie_word_embeddings=True,
                                         rms_norm_eps=1e-5))
    twin = dict(model.named_parameters())
    OUT.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(OUT / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)

    def put(name, hf_name, stored, dtype=None):
        """A tensor of the file, and its twin in the original basis."""
        original = stored.astype(np.float64)
        if name.split(".")[-2] not in NOT_ROTATED:
            original = original @ matrix[stored.shape[1]]
        with torch.no_grad():
            twin[hf_name].copy_(torch.from_numpy(original))
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        rows = permuted(stored, heads) if heads else stored
        if dtype is None:
            writer.add_tensor(name, rows.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(rows), dtype), raw_dtype=dtype)

    for name, shape in SHAPES.items():
        full, hf_name = f"blk.0.{name}.weight", f"model.layers.0.{HF[name]}.weight"
        if name in FLOAT or name in NOT_ROTATED:
            put(full, hf_name, (rng.standard_normal(shape) * 0.08).astype(np.float16).astype(np.float32))
        else:
            put(full, hf_name, rng.choice([-1, 0, 1], shape).astype(np.float32) * np.float32(0.078125), gguf.GGMLQuantizationType.TQ2_0)
    put("token_embd.weight", "model.embed_tokens.weight", rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16).astype(np.float32))
    for name, hf_name in [("blk.0.attn_norm", "model.layers.0.input_layernorm"), ("blk.0.ffn_norm", "model.layers.0.post_attention_layernorm"),
                          ("output_norm", "model.norm")]:
        gain = (1 + 0.2 * rng.standard_normal(HIDDEN)).astype(np.float32)
        with torch.no_grad():
            twin[f"{hf_name}.weight"].copy_(torch.from_numpy(gain))
        writer.add_tensor(f"{name}.weight", gain)

    kind, prefix = gguf.GGUFValueType, "prism.hadamard"
    writer.add_uint32(f"{prefix}.version", 1)
    writer.add_string(f"{prefix}.transform", "normalized-sylvester-walsh-hadamard")
    writer.add_string(f"{prefix}.axis", "input-last-dimension")
    writer.add_uint32(f"{prefix}.block_size", BLOCK)
    writer.add_string(f"{prefix}.sign_mode", "explicit")
    writer.add_key_value(f"{prefix}.sign_widths", list(signs), kind.ARRAY, sub_type=kind.INT32)
    writer.add_key_value(f"{prefix}.sign_values", [int(s) for width in signs for s in signs[width]], kind.ARRAY, sub_type=kind.INT8)
    writer.add_array(f"{prefix}.weight_names", [f"blk.0.{name}.weight" for name in SHAPES if name not in NOT_ROTATED])
    writer.add_array(f"{prefix}.inverse_weight_names", ["token_embd.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model.eval().float()
    tokens = torch.randint(3, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model(tokens, use_cache=True)
        logits = [out.logits[0]]
        for _ in range(STEPS):
            token = logits[-1][-1:].argmax(-1)[None]
            tokens = torch.cat([tokens, token], 1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    save_file({"tokens": tokens[0].int(), "logits": torch.cat(logits).contiguous()}, OUT / "golden.safetensors")


if __name__ == "__main__":
    main()
