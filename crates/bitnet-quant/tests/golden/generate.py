#!/usr/bin/env python3
"""Writes bitlinear.json and quantizers.json: what torch, transformers and numpy compute.

    TORCHDYNAMO_DISABLE=1 python generate.py      (torch, transformers and numpy of scripts/requirements-truth.txt)

bitlinear.json: forward and gradients of BitLinear. `int8` is transformers' AutoBitLinear with online quantization (its WeightQuant and
ActQuant); the others replace ActQuant by the published formula for 4 bits and signs, or leave activations alone. The loss is sum(y * r).
quantizers.json: codes and scale of absmean weights and absmax activations, in numpy with f64 sums and half-even rounding.
"""
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from transformers.integrations.bitnet import ActQuant, AutoBitLinear, WeightQuant

here = pathlib.Path(__file__).parent
rng = np.random.default_rng(158)


def numbers(t):
    return [float(v) for v in np.asarray(t.detach() if torch.is_tensor(t) else t, dtype=np.float32).ravel()]


def int4(x):
    scale = 7 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    return x + ((x * scale).round().clamp(-8, 7) / scale - x).detach()


def sign(x):
    q = torch.where(x >= 0, 1.0, -1.0) * x.abs().mean(dim=-1, keepdim=True)
    return x + (q - x).detach()


def case(name, activations, shape, k, n, bias, norm):
    x = torch.tensor(rng.normal(size=shape + (k,)), dtype=torch.float32, requires_grad=True)
    w = torch.tensor(rng.normal(size=(n, k)) / np.sqrt(k), dtype=torch.float32, requires_grad=True)
    b = torch.tensor(rng.normal(size=n), dtype=torch.float32, requires_grad=True) if bias else None
    g = torch.tensor(rng.normal(size=k) + 1, dtype=torch.float32, requires_grad=True) if norm else None
    c = torch.tensor(rng.normal(size=k), dtype=torch.float32, requires_grad=True) if norm == "layer" else None
    r = torch.tensor(rng.normal(size=shape + (n,)), dtype=torch.float32)
    h = x
    if norm == "rms":
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g
    if norm == "layer":
        h = F.layer_norm(x, (k,), g, c, 1e-6)
    if activations == "int8":
        layer = AutoBitLinear(k, n, bias=bias, online_quant=True)
        layer.weight = torch.nn.Parameter(w.detach().clone())
        if bias:
            layer.bias = torch.nn.Parameter(b.detach().clone())
        y = layer(h)
        w, b = layer.weight, layer.bias
    else:
        quantize = {"int4": int4, "sign": sign, "float": lambda h: h}[activations]
        y = F.linear(quantize(h), WeightQuant.apply(w), b)
    (y * r).sum().backward()
    out = {"name": name, "activations": activations, "norm": norm, "x_shape": list(x.shape), "n": n, "x": numbers(x), "w": numbers(w), "r": numbers(r)}
    out |= {"y": numbers(y), "dx": numbers(x.grad), "dw": numbers(w.grad)}
    for key, t in (("b", b), ("g", g), ("c", c)):
        if t is not None:
            out[key], out["d" + key] = numbers(t), numbers(t.grad)
    return out


cases = [
    case("int8", "int8", (5,), 48, 7, False, None),
    case("int8 bias, three dimensions", "int8", (2, 3), 32, 8, True, None),
    case("int8 rms", "int8", (4,), 40, 6, True, "rms"),
    case("int8 layer norm", "int8", (4,), 40, 6, True, "layer"),
    case("int4", "int4", (3,), 64, 5, True, None),
    case("sign", "sign", (3,), 64, 5, True, None),
    case("float", "float", (3,), 64, 5, True, "rms"),
]
(here / "bitlinear.json").write_text(json.dumps({"cases": cases}) + "\n")


def absmean(w):
    s = np.float32(np.abs(w.astype(np.float64)).mean())
    if s == 0:
        return 0.0, np.zeros(w.shape, int)
    return float(s), np.clip(np.rint(w.astype(np.float32) / s), -1, 1).astype(int)


def absmax(x):
    x = x.astype(np.float32)
    inverse = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    return np.clip(np.rint(x * inverse), -128, 127).astype(int)


def weights(name, w):
    w = np.asarray(w, dtype=np.float32)
    s, q = absmean(w)
    entry = {"name": name, "shape": list(w.shape), "w": numbers(w), "scale": s, "q": q.ravel().tolist()}
    if s >= 1e-5 and np.isfinite(w).all() and np.abs(w).max() < 1e30:
        # Where transformers' epsilon does not act, it must say the same.
        theirs = WeightQuant.apply(torch.tensor(w)).numpy()
        assert np.allclose(theirs, q * np.float32(s), rtol=1e-5, atol=0), name
    return entry


tensors = [
    weights("normal", rng.normal(size=(8, 24))),
    weights("heavy tails", rng.standard_t(2, size=(4, 33))),
    weights("constant", np.full((3, 5), -0.25)),
    weights("zero", np.zeros((2, 7))),
    weights("denormal", rng.normal(size=(2, 9)) * 1e-41),
    weights("huge", rng.normal(size=(2, 9)) * 3e37),
    weights("one element", [[0.75]]),
    weights("vector", rng.normal(size=19)),
    weights("convolution", rng.normal(size=(4, 2, 3, 3))),
    weights("ties", [[0.5, 1.5, -0.5, -1.5, 1.0, 1.0, 1.0, 1.0]]),
]
x = rng.normal(size=(6, 50)) * 10.0 ** rng.integers(-8, 8, size=(6, 1))
acts = {"shape": [6, 50], "x": numbers(x), "q": absmax(np.asarray(numbers(x), dtype=np.float32).reshape(6, 50)).ravel().tolist()}
theirs = ActQuant.apply(torch.tensor(x, dtype=torch.float32)).numpy()
scale = np.maximum(np.abs(x.astype(np.float32)).max(-1, keepdims=True), np.float32(1e-5)) / np.float32(127)
assert np.allclose(theirs, np.asarray(acts["q"]).reshape(6, 50) * scale, rtol=1e-5, atol=0)
(here / "quantizers.json").write_text(json.dumps({"weights": tensors, "activations": acts}) + "\n")
