"""Small matrices quantized by other programs, each with the floats that its own reader makes of it.

Writes crates/bitnet-formats/tests/data/foreign/NAME/{config.json,model.safetensors}; the tensor
`expected` is the reader's answer in f32.

    PYTHONPATH=… python scripts/make-foreign-golden.py OUT

Needs torch, transformers, and on the path mlx, compressed-tensors, AutoGPTQ's qlinear_cuda.py and
AutoAWQ's packing_utils.py as modules.
"""

import json
import os
import sys

import mlx.core as mx
import numpy as np
import packing_utils as awq
import qlinear_cuda as gptq
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import save_file
from transformers.integrations import finegrained_fp8

OUT = sys.argv[1]
N, K, G = 32, 64, 32
torch.manual_seed(7)
P = "model.layers.0.mlp.up_proj."


def write(name, tensors, expected, **config):
    folder = os.path.join(OUT, name)
    os.makedirs(folder, exist_ok=True)
    assert expected.shape[-1] == K and expected.dtype == torch.float32
    tensors = {P + k: v.contiguous() for k, v in tensors.items()} | {"expected": expected.contiguous()}
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=1)
        file.write("\n")


def gptq_module(bits, order):
    module = gptq.QuantLinear(bits, G, K, N, bias=False)
    linear = torch.nn.Linear(K, N, bias=False).half()
    groups = K // G
    scales = (torch.rand(N, groups) * 0.02 + 0.01).half()
    zeros = torch.randint(1, 2**bits, (N, groups)).float()
    g_idx = (torch.arange(K) // G).int()
    if order:
        g_idx = g_idx[torch.randperm(K)]
    codes = torch.randint(0, 2**bits, (N, K)).float()
    linear.weight.data = (codes - zeros[:, g_idx.long()]) * scales.float()[:, g_idx.long()]
    module.pack(linear, scales.float(), zeros, g_idx)
    module.scales = module.scales.half()
    parts = {k: getattr(module, k).clone() for k in ["qweight", "qzeros", "scales", "g_idx"]}
    # The reader's own product, in f32 instead of f16: the identity times the weights.
    module.scales = module.scales.float()
    with torch.no_grad():
        return parts, module(torch.eye(K)).T.float()


for bits in [2, 3, 4, 8]:
    parts, expected = gptq_module(bits, order=bits == 4)
    config = {"quant_method": "gptq", "bits": bits, "group_size": G, "desc_act": bits == 4}
    write(f"gptq-{bits}", parts, expected, quantization_config=config)
parts, expected = gptq_module(4, order=False)
parts["qzeros"] = (parts["qzeros"].long() + 0x11111111).to(torch.int32)
config = {"quant_method": "gptq", "bits": 4, "group_size": G, "checkpoint_format": "gptq_v2"}
write("gptq-v2", parts, expected, quantization_config=config)

words = lambda *shape: torch.randint(-(2**31), 2**31, shape).to(torch.int32)
qweight, qzeros = words(K, N // 8), words(K // G, N // 8)
scales = (torch.rand(K // G, N) * 0.02).half()
expected = awq.dequantize_gemm(qweight, qzeros, scales.float(), 4, G).T
config = {"quant_method": "awq", "bits": 4, "group_size": G, "version": "gemm", "zero_point": True}
parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
write("awq", parts, expected, quantization_config=config)

for bits in [2, 3, 4, 5, 6, 8]:
    w = mx.array((torch.randn(N, K) * 0.1).numpy()).astype(mx.float16)
    codes, scales, biases = mx.quantize(w, group_size=G, bits=bits)
    wide = [x.astype(mx.float32) for x in (scales, biases)]
    expected = mx.dequantize(codes, *wide, group_size=G, bits=bits)
    to = lambda x: torch.from_numpy(np.array(x))
    parts = {"weight": to(codes.view(mx.int32)).view(torch.uint32), "scales": to(scales), "biases": to(biases)}
    write(f"mlx-{bits}", parts, to(expected), quantization={"group_size": G, "bits": bits})

for bits in [3, 4, 8]:
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (N, K)).to(torch.int8)
    zero = torch.randint(-half, half, (N, K // G)).to(torch.int8)
    scale = (torch.rand(N, K // G) * 0.02).bfloat16()
    packed, zeros = pack_to_int32(values, bits), pack_to_int32(zero, bits, packed_dim=0)
    codes = unpack_from_int32(packed, bits, torch.Size([N, K]))
    wide = lambda x: x.float().repeat_interleave(G, dim=1)
    zero = unpack_from_int32(zeros, bits, torch.Size([N, K // G]), packed_dim=0)
    expected = (codes.float() - wide(zero)) * wide(scale)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_zero_point": zeros, "weight_shape": torch.tensor([N, K])}
    weights = {"num_bits": bits, "group_size": G, "symmetric": False, "type": "int"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}
    write(f"compressed-tensors-{bits}", parts, expected, quantization_config=config)

for name, dtype, scale in [
    ("block", torch.float8_e4m3fn, torch.rand(2, 2)),
    ("row", torch.float8_e4m3fn, torch.rand(N, 1)),
    ("tensor", torch.float8_e5m2, torch.rand(1)),
]:
    w = (torch.randn(N, K) * 20).to(dtype)
    if name == "block":
        expected = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(w, scale, torch.float32)
        config = {"quant_method": "fp8", "weight_block_size": [16, 32]}
        write("fp8-block", {"weight": w, "weight_scale_inv": scale}, expected, quantization_config=config)
    else:
        write(f"fp8-{name}", {"weight": w, "weight_scale": scale}, w.float() * scale)
