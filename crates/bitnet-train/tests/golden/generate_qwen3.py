"""Writes qwen3.json beside this file: three training steps of small models of transformers' Qwen3ForCausalLM, in float64.

    python generate_qwen3.py        needs torch and transformers

One model trains in floats. In the others every matrix, embedding and output matrix too, is ternary by absmean in groups of 4 in the forward pass,
with gradients straight through; inputs stay floats. A seed is taken only if every weight that is rounded stays away from the middle between two
integers, so that the last bits of f32 decide nothing.
"""

import json
import pathlib

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV, HEAD_DIM = 11, 8, 12, 2, 2, 1, 6
BATCH, LENGTH, STEPS, GROUP = 2, 6, 3, 4


class Unsafe(Exception):
    """A rounding that the last bits of f32 could turn round."""


def ternary(w):
    groups = w.detach().reshape(-1, GROUP)
    scale = groups.abs().mean(1, keepdim=True)
    v = groups / scale
    if ((v - v.floor() - 0.5).abs() < 2e-5).any():
        raise Unsafe
    hat = (scale * torch.round(v).clamp(-1, 1)).reshape(w.shape)
    return w + (hat - w).detach()


def run(tied, quantized, seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV,
        head_dim=HEAD_DIM, max_position_embeddings=LENGTH, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=tied, attn_implementation="eager",
        initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
        p.data = p.data.float()
    model = model.double()
    p = dict(model.named_parameters())
    initial = {k: v.detach().clone() for k, v in p.items()}
    tokens, targets = (torch.randint(VOCAB, (BATCH, LENGTH)) for _ in range(2))
    groups = [
        {"params": [v for v in p.values() if v.dim() > 1], "weight_decay": 0.1},
        {"params": [v for v in p.values() if v.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.004, betas=(0.9, 0.95), eps=1e-6)
    losses, first = [], None
    for _ in range(STEPS):
        weights = {k: ternary(v) if quantized and v.dim() > 1 else v for k, v in p.items()}
        logits = torch.func.functional_call(model, weights, (tokens,)).logits
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
        "architecture": "qwen3",
        "tied": tied,
        "quantized": quantized,
        "group": GROUP,
        "shape": dict(vocab=VOCAB, hidden=HIDDEN, ffn=FFN, layers=LAYERS, heads=HEADS, kv_heads=KV, head_dim=HEAD_DIM),
        "tokens": tokens.tolist(),
        "targets": targets.tolist(),
        "initial": numbers(initial),
        "losses": losses,
        "first": numbers(first),
        "final": numbers(p),
    }


def main():
    cases = []
    for tied, quantized in ((True, False), (True, True), (False, True)):
        for seed in range(1000):
            try:
                cases.append(run(tied, quantized, seed))
                break
            except Unsafe:
                pass
        else:
            raise SystemExit("no seed")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    pathlib.Path(__file__).with_name("qwen3.json").write_text(json.dumps({**versions, "cases": cases}))
    print([(c["seed"], c["losses"]) for c in cases])


main()
