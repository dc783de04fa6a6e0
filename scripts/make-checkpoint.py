#!/usr/bin/env python3
"""Writes a made-up sharded llama checkpoint of about a given size, for tests of speed and bounded memory.

    scripts/make-checkpoint.py OUT [--gib 4] [--dtype f32|bf16] [--shards 4] [--seed 0]

OUT receives config.json, model-0000i-of-0000n.safetensors and model.safetensors.index.json. Weights look trained: normal with
standard deviation 0.02 times a scale per tensor and per row, a few input channels larger than the rest and about
one value in 100,000 twenty times larger. The same arguments give the same bytes with the same numpy. Only numpy is needed,
and memory stays under 200 MB whatever the size: rows are written as they are made.

The size is rounded up to a whole layer. From 1.26 GiB in f32 the shapes are those of a 1-2B llama (hidden 2048, MLP 5632,
vocabulary 32000); smaller checkpoints halve the width and the vocabulary until four layers fit.
"""

import argparse
import json
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np

BLOCK = 1 << 22  # values of the random block that every matrix is cut from (16 MiB in f32)
CHUNK = 1 << 21  # values written at a time
BYTES = {"f32": 4, "bf16": 2}


def shapes_for(parameters):
    """(config, {name: shape} in file order) with at least this many parameters."""
    for hidden in (2048, 1024, 512, 256, 128):
        mlp, vocab, kv = hidden * 11 // 4, 32000 * hidden // 2048, hidden
        outside = 2 * vocab * hidden + hidden
        layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * mlp * hidden + 2 * hidden
        if outside + 4 * layer <= parameters:
            break
    layers = max(1, -(-(parameters - outside) // layer))
    head = min(64, hidden // 4)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": hidden // head,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv // head,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(layers):
        at = f"model.layers.{n}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[at + "self_attn.k_proj.weight"] = (kv, hidden)
        shapes[at + "self_attn.v_proj.weight"] = (kv, hidden)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        shapes[at + "mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[at + "mlp.up_proj.weight"] = (mlp, hidden)
        shapes[at + "mlp.down_proj.weight"] = (hidden, mlp)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return config, shapes


def split(shapes, width, count):
    """Names per shard, in file order, of about equal bytes; fewer shards than asked when tensors are few."""
    sizes = {name: int(np.prod(shape)) * width for name, shape in shapes.items()}
    total, seen, shards = sum(sizes.values()), 0, [[] for _ in range(count)]
    for name, size in sizes.items():
        shards[min(count - 1, (seen + size // 2) * count // total)].append(name)
        seen += size
    return [names for names in shards if names]


def to_bf16(x):
    """The upper 16 bits of f32 after rounding half to even; x holds no NaN. x is overwritten."""
    bits = x.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype("<u2")


def rows_of(shape, rng, block):
    """Chunks of whole rows of one tensor, f32. Each chunk may be overwritten by the caller."""
    if len(shape) == 1:
        yield (1.0 + 0.1 * rng.standard_normal(shape, dtype=np.float32)).astype(np.float32)
        return
    rows, columns = shape
    tensor_scale = 0.02 * np.exp(0.3 * rng.standard_normal())
    channels = np.ones(columns, dtype=np.float32)
    channels[rng.integers(0, columns, size=3)] = 4.0
    step = max(1, min(CHUNK // columns, rows))
    buffer = np.empty((step, columns), dtype=np.float32)
    for first in range(0, rows, step):
        n = min(step, rows - first)
        start = int(rng.integers(0, BLOCK - n * columns + 1))
        source = block[start : start + n * columns].reshape(n, columns)[rng.permutation(n)]
        scale = tensor_scale * np.exp(0.15 * rng.standard_normal((n, 1))) * rng.choice([-1.0, 1.0], size=(n, 1))
        chunk = np.multiply(source, scale.astype(np.float32), out=buffer[:n])
        chunk *= channels
        chunk.reshape(-1)[rng.integers(0, n * columns, size=max(1, n * columns // 100_000))] *= 20.0
        yield chunk


def write_shard(path, names, shapes, dtype, order, seed, block):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        size = int(np.prod(shapes[name])) * BYTES[dtype]
        header[name] = {"dtype": dtype.upper(), "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            rng = np.random.Generator(np.random.PCG64([seed, order[name]]))
            for chunk in rows_of(shapes[name], rng, block):
                raw = memoryview(to_bf16(chunk) if dtype == "bf16" else chunk.astype("<f4", copy=False)).cast("B")
                while raw:
                    raw = raw[file.write(raw) :]
        if file.tell() != 8 + len(text) + offset:
            raise AssertionError(f"{path}: wrote {file.tell()} bytes, expected {8 + len(text) + offset}")
    os.replace(partial, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a folder that is empty or does not exist yet")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the weights in GiB (default 4)")
    parser.add_argument("--dtype", choices=sorted(BYTES), default="f32")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0.001 <= args.gib <= 1024 or not 1 <= args.shards <= 99999 or args.seed < 0:
        parser.error("--gib must be 0.001 to 1024, --shards 1 to 99999, --seed 0 or more")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} exists and is not an empty folder")
    args.out.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    width = BYTES[args.dtype]
    config, shapes = shapes_for(int(args.gib * 2**30) // width)
    config["torch_dtype"] = {"f32": "float32", "bf16": "bfloat16"}[args.dtype]
    order = {name: i for i, name in enumerate(shapes)}
    total = sum(int(np.prod(shape)) for shape in shapes.values()) * width
    shards = split(shapes, width, args.shards)
    block = np.random.Generator(np.random.PCG64(args.seed)).standard_normal(BLOCK, dtype=np.float32)

    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_shard(args.out / file, names, shapes, args.dtype, order, args.seed, block)
        weight_map.update(dict.fromkeys(names, file))
        print(f"{file}: {len(names)} tensors", file=sys.stderr)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    seconds = time.monotonic() - started
    print(f"{len(shapes)} tensors, {total / 2**30:.3f} GiB, {config['num_hidden_layers']} layers of {config['hidden_size']}, {seconds:.1f} s", file=sys.stderr)
    print(args.out)


if __name__ == "__main__":
    main()
