"""Stacked experts and reordered groups quantized by other programs, each with the floats that its
own reader makes of it: more folders beside those of make-foreign-golden.py, in the same form.

    PYTHONPATH=… python scripts/make-foreign-golden-experts.py OUT

Needs torch, transformers, and on the path mlx with mlx-lm, and compressed-tensors 0.10.2 (later
versions no longer read weight_g_idx).
"""

import json
import os
import sys

import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from mlx_lm.models.switch_layers import SwitchLinear
from safetensors.torch import save_file
from transformers.integrations import finegrained_fp8

OUT = sys.argv[1]
E, N, K, G = 4, 32, 64, 32
torch.manual_seed(11)
mx.random.seed(11)
MLP = "model.layers.0.mlp."


def write(name, tensors, expected, **config):
    folder = os.path.join(OUT, name)
    os.makedirs(folder, exist_ok=True)
    assert expected.shape[-2:] == (N, K) and expected.dtype == torch.float32
    tensors = {MLP + k: v.contiguous() for k, v in tensors.items()} | {"expected": expected.contiguous()}
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=1)
        file.write("\n")


for bits in [4, 6]:
    layer = SwitchLinear(K, N, E, bias=False).to_quantized(group_size=G, bits=bits)
    layer.scales, layer.biases = layer.scales.astype(mx.float16), layer.biases.astype(mx.float16)
    wide = [x.astype(mx.float32) for x in (layer.scales, layer.biases)]
    expected = mx.dequantize(layer.weight, *wide, group_size=G, bits=bits)
    to = lambda x: torch.from_numpy(np.array(x))
    parts = {"weight": to(layer.weight.view(mx.int32)).view(torch.uint32), "scales": to(layer.scales), "biases": to(layer.biases)}
    parts = {f"switch_mlp.up_proj.{k}": v for k, v in parts.items()}
    write(f"mlx-experts-{bits}", parts, to(expected), quantization={"group_size": G, "bits": bits})

w = (torch.randn(E, N, K) * 20).to(torch.float8_e4m3fn)
blocks = torch.rand(E, 2, 2)
expected = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(w, blocks, torch.float32)
config = {"quant_method": "fp8", "weight_block_size": [16, 32]}
write("fp8-experts-block", {"experts.up_proj": w, "experts.up_proj_scale_inv": blocks}, expected, quantization_config=config)
for name, scale in [("row", torch.rand(E, N, 1)), ("column", torch.rand(E, 1, K)), ("tensor", torch.rand(E, 1, 1))]:
    write(f"fp8-experts-{name}", {"experts.up_proj": w, "experts.up_proj_scale": scale}, w.float() * scale)
scale = torch.rand(E)
write("fp8-experts-each", {"experts.up_proj": w, "experts.up_proj_scale": scale}, w.float() * scale[:, None, None])

args = QuantizationArgs(num_bits=4, group_size=G, symmetric=True, strategy="group", actorder="group")
for name, order in [("order", (torch.arange(K) // G)[torch.randperm(K)]), ("no-order", torch.full((K,), -1))]:
    values = torch.randint(-8, 8, (N, K)).to(torch.int8)
    scale = (torch.rand(N, K // G) * 0.02).bfloat16()
    parts = {"weight_packed": pack_to_int32(values, 4), "weight_scale": scale, "weight_shape": torch.tensor([N, K]), "weight_g_idx": order.int()}
    reader = PackedQuantizationCompressor()
    expected = reader.decompress_weight(parts | {"weight_scale": scale.float()}, args).float()
    weights = {"num_bits": 4, "group_size": G, "symmetric": True, "type": "int", "strategy": "group", "actorder": "group"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}
    write(f"compressed-tensors-{name}", {f"up_proj.{k}": v for k, v in parts.items()}, expected, quantization_config=config)

# In versions up to 0.17 no code crosses a word.
for bits in [3, 5, 6, 7]:
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (N, K)).to(torch.int8)
    zero = torch.randint(-half, half, (N, K // G)).to(torch.int8)
    scale = (torch.rand(N, K // G) * 0.02).bfloat16()
    # Its own padding of this dimension adds columns: whole words of rows need none.
    rows = 32 // bits * -(-N // (32 // bits))
    whole = torch.nn.functional.pad(zero, (0, 0, 0, rows - N))
    packed, zeros = pack_to_int32(values, bits), pack_to_int32(whole, bits, packed_dim=0)
    codes = unpack_from_int32(packed, bits, torch.Size([N, K]))
    zero = unpack_from_int32(zeros, bits, torch.Size([N, K // G]), packed_dim=0)
    wide = lambda x: x.float().repeat_interleave(G, dim=1)
    expected = (codes.float() - wide(zero)) * wide(scale)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_zero_point": zeros, "weight_shape": torch.tensor([N, K])}
    weights = {"num_bits": bits, "group_size": G, "symmetric": False, "type": "int"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}
    write(f"compressed-tensors-words-{bits}", {f"up_proj.{k}": v for k, v in parts.items()}, expected, quantization_config=config)
