"""Writes decoder.json beside this file: ten training steps of small decoders with ternary weights and int8 activations, in torch with float64.

    python generate.py        needs torch

The graphs are those of transformers' llama and bitnet, written out; weights by absmean with one scale for the tensor, tokens by absmax, both straight
through. What is rounded must not depend on the last bits of a sum, so a seed is taken only if every number that is rounded stays away from
the middle between two integers.
"""

import json
import math
import pathlib

import torch

torch.set_default_dtype(torch.float64)
VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV, D = 11, 16, 12, 2, 4, 2, 4
BATCH, LENGTH, STEPS, EPS, THETA = 2, 6, 10, 1e-6, 10000.0


class Unsafe(Exception):
    """A rounding that the last bits of f32 could turn round."""


def rounded(v, margin):
    if ((v - v.floor() - 0.5).abs() < margin).any():
        raise Unsafe
    return torch.round(v)


def straight(x, hat):
    return x + (hat - x).detach()


def linear(x, w):
    scale = w.detach().abs().mean()
    hat = scale * rounded(w.detach() / scale, 2e-5).clamp(-1, 1)
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    token = step * rounded(x.detach() / step, 1e-4)
    return straight(x, token) @ straight(w, hat).T


def norm(x, gain):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * gain


def rotate(x):
    """[B, H, T, D]: rotate-half."""
    frequency = THETA ** (-torch.arange(0, D, 2) / D)
    angle = torch.arange(LENGTH)[:, None] * frequency[None]
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    half = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
    return x * cos + half * sin


def forward(p, tokens, bitnet):
    x = p["model.embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        z = norm(x, p[at + "input_layernorm.weight"])
        q, k, v = (linear(z, p[f"{at}self_attn.{n}_proj.weight"]) for n in "qkv")
        split = lambda y, heads: y.reshape(BATCH, LENGTH, heads, D).transpose(1, 2)
        q, k = rotate(split(q, HEADS)), rotate(split(k, KV)).repeat_interleave(HEADS // KV, 1)
        v = split(v, KV).repeat_interleave(HEADS // KV, 1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
        mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(BATCH, LENGTH, HEADS * D)
        if bitnet:
            mixed = norm(mixed, p[at + "self_attn.attn_sub_norm.weight"])
        x = x + linear(mixed, p[at + "self_attn.o_proj.weight"])
        z = norm(x, p[at + "post_attention_layernorm.weight"])
        gate, up = (linear(z, p[f"{at}mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        product = (torch.relu(gate) ** 2 if bitnet else torch.nn.functional.silu(gate)) * up
        if bitnet:
            product = norm(product, p[at + "mlp.ffn_sub_norm.weight"])
        x = x + linear(product, p[at + "mlp.down_proj.weight"])
    return norm(x, p["model.norm.weight"]) @ p.get("lm_head.weight", p["model.embed_tokens.weight"]).T


def run(architecture, tied, seed):
    g = torch.Generator().manual_seed(seed)
    bitnet = architecture == "bitnet"
    f32 = lambda x: x.float().double()
    matrix = lambda n, k, std=None: f32(torch.randn(n, k, generator=g) * (std or 1 / math.sqrt(k)))
    gain = lambda k: f32(1 + 0.1 * torch.randn(k, generator=g))
    p = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 0.5), "model.norm.weight": gain(HIDDEN)}
    if not tied:
        p["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name, n in (("q", HEADS * D), ("k", KV * D), ("v", KV * D)):
            p[f"{at}self_attn.{name}_proj.weight"] = matrix(n, HIDDEN)
        p[at + "self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * D)
        p[at + "mlp.gate_proj.weight"], p[at + "mlp.up_proj.weight"] = matrix(FFN, HIDDEN), matrix(FFN, HIDDEN)
        p[at + "mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
        p[at + "input_layernorm.weight"], p[at + "post_attention_layernorm.weight"] = gain(HIDDEN), gain(HIDDEN)
        if bitnet:
            p[at + "self_attn.attn_sub_norm.weight"], p[at + "mlp.ffn_sub_norm.weight"] = gain(HEADS * D), gain(FFN)
    initial = {k: v.clone() for k, v in p.items()}
    p = {k: v.requires_grad_() for k, v in p.items()}
    tokens, targets = (torch.randint(VOCAB, (BATCH, LENGTH), generator=g) for _ in range(2))
    # No decay of gains.
    groups = [
        {"params": [v for v in p.values() if v.dim() > 1], "weight_decay": 0.1},
        {"params": [v for v in p.values() if v.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.004, betas=(0.9, 0.95), eps=1e-6)
    losses, first = [], None
    for _ in range(STEPS):
        logits = forward(p, tokens, bitnet)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        first = first or {k: v.grad.clone() for k, v in p.items()}
        optimizer.step()
    plain = lambda t: [float(f"{v:.9g}") for v in t.detach().reshape(-1).tolist()]
    numbers = lambda t: {k: plain(v) for k, v in t.items()}
    return {
        "seed": seed,
        "architecture": architecture,
        "tied": tied,
        "shape": dict(vocab=VOCAB, hidden=HIDDEN, ffn=FFN, layers=LAYERS, heads=HEADS, kv_heads=KV),
        "tokens": tokens.tolist(),
        "targets": targets.tolist(),
        "initial": numbers(initial),
        "losses": losses,
        "first": numbers(first),
        "final": numbers(p),
    }


def main():
    cases = []
    for architecture, tied in (("llama", True), ("llama", False), ("bitnet", True)):
        for seed in range(20000):
            try:
                cases.append(run(architecture, tied, seed))
                break
            except Unsafe:
                pass
        else:
            raise SystemExit(f"no seed for {architecture}")
    pathlib.Path(__file__).with_name("decoder.json").write_text(json.dumps({"torch": torch.__version__, "cases": cases}))
    print([c["seed"] for c in cases])


main()
