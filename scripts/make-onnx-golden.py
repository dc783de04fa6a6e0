#!/usr/bin/env python3
"""Writes crates/bitnet-formats/tests/data/onnx/blocks.json: low-bit matrices packed by onnxruntime's own quantizer.

Weights lie on the grid of known values, scales and zero points, so that the quantizer finds exactly these; its bytes are then what `MatMulNBits` reads.
Each packed matrix is also multiplied by `MatMulNBits` here, against numpy. Needs onnxruntime, onnx and numpy (scripts/requirements-truth.txt).
"""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as c

OUT = Path(__file__).resolve().parents[1] / "crates/bitnet-formats/tests/data/onnx/blocks.json"


def product(bits, block, cols, codes, scales, zeros, x):
    """x·Wᵀ by onnxruntime."""
    tensors = {"codes": codes, "scales": scales.reshape(-1)} | ({} if zeros is None else {"zeros": zeros.reshape(-1)})
    node = helper.make_node("MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=cols, N=len(codes), bits=bits, block_size=block)
    value = lambda name, n: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n])
    graph = helper.make_graph([node], "g", [value("x", cols)], [value("y", len(codes))], [numpy_helper.from_array(t, n) for n, t in tensors.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def case(bits, rows, cols, block, symmetric, precision, rng):
    blocks, high = -(-cols // block), 2 ** (bits - 1)
    values = rng.integers(-high, high, (rows, cols))
    if precision == "ternary":
        values = rng.integers(-1, 2, (rows, cols))
    scales = np.exp2(rng.integers(-3, 3, (rows, blocks))).astype(np.float32)
    zeros = np.zeros((rows, blocks), np.int64)
    for b in range(blocks):
        part = values[:, b * block : (b + 1) * block]
        # Both ends of the range occur, so that the quantizer finds this scale and this zero point.
        part[:, 0], part[:, 1] = -high, high - 1
        if not symmetric:
            zeros[:, b] = rng.integers(-high + 1, high - 1, rows)
    wide = lambda t: t.repeat(block, 1)[:, :cols]
    weights = ((values - wide(zeros)) * wide(scales)).astype(np.float32)
    codes = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    found, packed_zeros = np.zeros((rows, blocks), np.float32), np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
    quantize = getattr(c, f"quantize_matmul_{bits}bits")
    quantize(codes, np.ascontiguousarray(weights.T), found.reshape(-1), packed_zeros.reshape(-1), block, rows, cols, symmetric)
    if symmetric:
        # The quantizer may choose −scale, which turns values round; ours are given with its sign.
        values, scales = np.where(wide(found) < 0, -values, values), found
    assert np.array_equal(found, scales), (found, scales)
    x = rng.standard_normal((1, cols)).astype(np.float32)
    y = product(bits, block, cols, codes, scales, None if symmetric else packed_zeros, x)
    assert np.allclose(y, x @ weights.T, rtol=1e-4, atol=1e-3)
    return {
        "precision": precision, "bits": bits, "rows": rows, "cols": cols, "block": block, "symmetric": symmetric,
        "values": values.reshape(-1).tolist(), "scales": scales.reshape(-1).tolist(), "zero_points": [] if symmetric else zeros.reshape(-1).tolist(),
        "codes_hex": codes.tobytes().hex(), "zero_points_hex": "" if symmetric else packed_zeros.tobytes().hex(),
    }


rng = np.random.default_rng(13)
cases = [case(bits, 3, cols, block, symmetric, f"int{bits}", rng)
         for bits in (2, 4, 8) for cols, block in ((64, 32), (48, 16)) for symmetric in (True, False)]
OUT.parent.mkdir(parents=True, exist_ok=True)
OUT.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
print(OUT, len(cases), onnx.__version__, ort.__version__)
