#!/usr/bin/env python3
"""Writes a made-up ternary checkpoint of the shape of BitNet b1.58-2B-4T, for measuring how fast a real file is loaded and how much memory it takes.

    scripts/make-shape-checkpoint.py OUT [--layers 30] [--seed 0]

OUT receives config.json, model.safetensors and tokenizer.json as Hugging Face has them (1.18 GB): packed trits, the embedding in bf16, a byte-level BPE of
128,256 tokens whose merges are made up. A GGUF of it with an int8 head is

    bitnet quantize OUT --out OUT.gguf --rule '*embed*=int8'

The same arguments give the same bytes with the same numpy. Only numpy is needed.
"""

import argparse
import itertools
import json
import os
import random
import struct
from pathlib import Path

import numpy as np

HIDDEN, FFN, HEADS, KV_HEADS, HEAD, VOCAB, SPECIAL = 2560, 6912, 20, 5, 128, 128_256, 256
CONFIG = {
    "architectures": ["BitNetForCausalLM"],
    "attention_bias": False,
    "bos_token_id": VOCAB - SPECIAL,
    "eos_token_id": VOCAB - SPECIAL + 1,
    "hidden_act": "relu2",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "max_position_embeddings": 4096,
    "model_type": "bitnet",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "quantization_config": {"linear_class": "autobitlinear", "quant_method": "bitnet", "quantization_mode": "offline"},
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}
# Llama 3's own expression: GGUF knows vocabularies by it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tensors(layers):
    """(name, dtype, shape) in file order."""
    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)
    kv = KV_HEADS * HEAD
    for n in range(layers):
        at = f"model.layers.{n}."
        for norm, size in [("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN), ("self_attn.attn_sub_norm", HIDDEN), ("mlp.ffn_sub_norm", FFN)]:
            yield f"{at}{norm}.weight", "BF16", (size,)
        shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
                  "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
        for name, (rows, columns) in shapes.items():
            yield f"{at}{name}.weight", "U8", (rows // 4, columns)
            yield f"{at}{name}.weight_scale", "BF16", (1,)
    yield "model.norm.weight", "BF16", (HIDDEN,)


def to_bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def chunks(name, dtype, shape, rng):
    """The bytes of a tensor, some megabytes at a time."""
    if dtype == "U8":
        # Four codes 0, 1, 2 in every byte.
        codes = np.array([a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product(range(3), repeat=4)], np.uint8)
        for _ in range(shape[0] // 32):
            yield codes[rng.integers(0, 81, size=(32, shape[1]), dtype=np.uint8)]
    elif name.endswith("weight_scale"):
        # Keeps activations of order 1.
        yield to_bf16([1.2 / np.sqrt(HIDDEN)])
    elif len(shape) == 1:
        yield to_bf16(1 + 0.1 * rng.standard_normal(shape, dtype=np.float32))
    else:
        for _ in range(shape[0] // 1002):
            yield to_bf16(0.05 * rng.standard_normal((1002, shape[1]), dtype=np.float32))


def write_tensors(path, layers, seed):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    all_tensors = list(tensors(layers))
    for name, dtype, shape in all_tensors:
        size = int(np.prod(shape)) * (1 if dtype == "U8" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (name, dtype, shape) in enumerate(all_tensors):
            for chunk in chunks(name, dtype, shape, np.random.Generator(np.random.PCG64([seed, i]))):
                file.write(chunk.tobytes())
        if file.tell() != 8 + len(text) + offset:
            raise AssertionError(f"{path}: wrote {file.tell()} bytes, expected {8 + len(text) + offset}")
    os.replace(partial, path)


def byte_names():
    """The characters that byte-level vocabularies have for the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def tokenizer(seed):
    rng, tokens, merges = random.Random(seed), byte_names(), []
    seen = set(tokens)
    while len(tokens) < VOCAB - SPECIAL:
        a, b = rng.choice(tokens), rng.choice(tokens)
        if len(a + b) <= 12 and a + b not in seen:
            seen.add(a + b)
            tokens.append(a + b)
            merges.append([a, b])
    special = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_special_token_{i}|>" for i in range(SPECIAL - 2)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": VOCAB - SPECIAL + i, "content": text, **flags} for i, text in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": True, "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a folder that is empty or does not exist yet")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.layers < 1 or args.seed < 0:
        parser.error("--layers must be 1 or more, --seed 0 or more")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} exists and is not an empty folder")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": args.layers}, indent=2) + "\n")
    (args.out / "tokenizer.json").write_text(json.dumps(tokenizer(args.seed), ensure_ascii=False) + "\n")
    write_tensors(args.out / "model.safetensors", args.layers, args.seed)
    print(args.out)


if __name__ == "__main__":
    main()
