#!/usr/bin/env python3
"""Writes qat.json: ten training steps of a small BitLinear MLP for each estimator, and losses of distillation, in torch with float64.

    python generate_qat.py      (torch of scripts/requirements-truth.txt)

The equations are written here from the papers that src/qat/ste.rs names, not from the Rust code. What is rounded must not depend on the
last bits of a sum, so a seed is taken only if every number that is rounded stays away from the middle between two integers.
"""

import json
import math
import pathlib

import torch

torch.set_default_dtype(torch.float64)
SIZES = [12, 20, 8, 5]
BATCH = 16
STEPS = 10


class Unsafe(Exception):
    """A rounding that the last bits of f32 could turn round."""


def rounded(v, margin=2e-5):
    """round(v), ties to even; refuses what is close to the middle."""
    if ((v - v.floor() - 0.5).abs() < margin * v.abs().clamp(min=1.0)).any():
        raise Unsafe
    return torch.round(v)


def straight(x, hat):
    return x + (hat - x).detach()


def tokens(x):
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return straight(x, rounded(x.detach() / scale).clamp(-128, 127) * scale)


class Rounded(torch.autograd.Function):
    """ŵ with the gradients `mask` for w and `of_scale` for the scale."""

    @staticmethod
    def forward(ctx, w, scale, hat, mask, of_scale, factor):
        ctx.save_for_backward(mask, of_scale)
        ctx.factor, ctx.shape = factor, scale.shape
        return hat.clone()

    @staticmethod
    def backward(ctx, grad):
        mask, of_scale = ctx.saved_tensors
        of = (grad * of_scale).sum() if ctx.shape == (1,) else (grad * of_scale).sum(1)
        return grad * mask, of.reshape(ctx.shape) * ctx.factor, None, None, None, None


def weights(w, alpha, case):
    """Ŵ. One scale for the tensor, or for each row."""
    d = w.detach()
    rows = case["granularity"] == "channel"
    mean = (lambda x: x.mean(1, keepdim=True)) if rows else (lambda x: x.mean())
    qn, qp = {"ternary": (-1, 1), "binary": (-1, 1), "int2": (-2, 1), "int3": (-4, 3), "int4": (-8, 7), "int8": (-128, 127)}[case["precision"]]
    kind, _, number = case["estimator"].partition(":")
    if alpha is not None:
        a = alpha.detach().reshape(-1, 1) if rows else alpha.detach()
        factor = 1 / math.sqrt((d.shape[1] if rows else d.numel()) * qp)
        v = d / a
        if kind == "lsq" and case["precision"] != "binary":
            q = rounded(v).clamp(qn, qp)
            inside = (v > qn) & (v < qp)
            return Rounded.apply(w, alpha, a * q, inside.double(), torch.where(inside, q - v, q), factor)
        if case["precision"] == "binary":
            q = torch.where(d >= 0, 1.0, -1.0)
            return Rounded.apply(w, alpha, a * q, (v.abs() < 1).double(), q, factor)
        levels = 3 if case["precision"] == "ternary" else 4
        # Middles of k equal parts of [-1, 1].
        shift = 0.0 if levels == 3 else 0.5
        q = (rounded(v.clamp(-0.99, 0.99) * levels / 2 - shift) + shift) * 2 / levels
        inside = v.abs() < 1
        return Rounded.apply(w, alpha, a * q, inside.double(), torch.where(inside, q - v, q), factor)
    if case["precision"] == "ternary":
        s = mean(d.abs())
        q = rounded(d / s).clamp(-1, 1)
    elif case["precision"] == "binary":
        s = mean(d.abs())
        q = torch.where(d >= 0, 1.0, -1.0)
    else:
        s = (d.abs().amax(1, keepdim=True) if rows else d.abs().max()) / qp
        q = rounded(d / s).clamp(qn, qp)
    hat, v = s * q, d / s
    if kind == "plain":
        return straight(w, hat)
    if kind == "clipped":
        mask = ((v >= qn * float(number)) & (v <= qp * float(number))).double()
    else:
        t = float(number)
        if case["precision"] == "binary":
            u = v
        else:
            cell = v.floor().clamp(qn, qp - 1)
            u = (v - cell - 0.5) * 2
        mask = (1 - torch.tanh(u / t) ** 2) / (t * math.tanh(1 / t)) * ((v >= qn) & (v <= qp))
    return Rounded.apply(w, torch.zeros(1, requires_grad=True), hat, mask, torch.zeros_like(w), 0.0)


def run(case, seed):
    g = torch.Generator().manual_seed(seed)
    f32 = lambda x: x.float().double()
    normal = lambda *shape: f32(torch.randn(*shape, generator=g))
    layers = list(zip(SIZES, SIZES[1:]))
    params = {}
    for i, (k, n) in enumerate(layers):
        params[f"{i}.weight"] = f32(normal(n, k) / math.sqrt(k))
        params[f"{i}.bias"] = f32(0.1 * normal(n))
        if case["estimator"] in ("lsq", "stretched"):
            w = params[f"{i}.weight"].abs()
            mean = w.mean(1) if case["granularity"] == "channel" else w.mean().reshape(1)
            params[f"{i}.learned_scale"] = f32(1.7 * mean / math.sqrt({"int4": 7, "int3": 3, "int8": 127}.get(case["precision"], 1)))
    initial = {k: v.clone() for k, v in params.items()}
    params = {k: v.requires_grad_() for k, v in params.items()}
    x, target = normal(BATCH, SIZES[0]), torch.randint(SIZES[-1], (BATCH,), generator=g)
    if case["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(params.values(), lr=0.05)
    else:
        optimizer = torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses, gradients = [], []
    for _ in range(STEPS):
        h = x
        for i in range(len(layers)):
            w = weights(params[f"{i}.weight"], params.get(f"{i}.learned_scale"), case)
            h = (tokens(h) if case["activations"] == "int8" else h) @ w.T + params[f"{i}.bias"]
            if i + 1 < len(layers):
                h = torch.relu(h)
        loss = torch.nn.functional.cross_entropy(h, target)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append({k: v.grad.clone() for k, v in params.items()})
        optimizer.step()
    plain = lambda t: [float(f"{v:.9g}") for v in t.detach().reshape(-1).tolist()]
    numbers = lambda t: {k: plain(v) for k, v in t.items()}
    return case | {
        "sizes": SIZES,
        "batch": BATCH,
        "x": plain(x),
        "target": target.tolist(),
        "initial": numbers(initial),
        "losses": losses,
        "first": numbers(gradients[0]),
        "last": numbers(gradients[-1]),
        "final": numbers(params),
    }


def distillation():
    """Losses of distillation with their gradients for the student, by the definitions."""
    g = torch.Generator().manual_seed(3)
    f32 = lambda x: x.float().double()
    plain = lambda t: [float(f"{v:.9g}") for v in t.detach().reshape(-1).tolist()]
    B, T, D, V = 2, 6, 12, 9
    cases = []

    def case(name, student, teacher, loss, **more):
        student.requires_grad_()
        value = loss(student, teacher)
        (grad,) = torch.autograd.grad(value, student)
        tensors = dict(student=plain(student), teacher=plain(teacher), loss=value.item(), gradient=plain(grad))
        cases.append(dict(name=name, shape=list(student.shape), teacher_shape=list(teacher.shape)) | more | tensors)

    def kl(t):
        return lambda s, u: t**2 * (torch.softmax(u / t, -1) * (torch.log_softmax(u / t, -1) - torch.log_softmax(s / t, -1))).sum(-1).mean()

    def relation(s, u, heads=3):
        def r(x):
            a = x.reshape(B, T, heads, -1).transpose(1, 2)
            return a @ a.transpose(-1, -2) / math.sqrt(x.shape[-1] / heads)

        return kl(1.0)(r(s), r(u))

    normal = lambda *shape: f32(torch.randn(*shape, generator=g))
    for t in (1.0, 2.0):
        case("logits", normal(B, T, V), normal(B, T, V), kl(t), temperature=t)
    case("logits", f32(3e4 * normal(B, T, V)), f32(3e4 * normal(B, T, V)), kl(4.0), temperature=4.0)
    case("mse", normal(B, T, D), normal(B, T, D), torch.nn.functional.mse_loss)
    case("cosine", normal(B, T, D), normal(B, T, D), lambda s, u: (1 - torch.cosine_similarity(s, u, dim=-1)).mean())
    case("relation", normal(B, T, D), normal(B, T, 2 * D), relation, heads=3)
    return cases


def main():
    cases = []
    for estimator, precision, granularity, activations, optimizer in [
        ("plain", "ternary", "tensor", "int8", "sgd"),
        ("plain", "ternary", "tensor", "int8", "adamw"),
        ("plain", "int4", "channel", "int8", "adamw"),
        ("plain", "ternary", "channel", "float", "sgd"),
        ("clipped:1.5", "ternary", "channel", "int8", "adamw"),
        ("lsq", "ternary", "tensor", "int8", "adamw"),
        ("lsq", "int3", "channel", "int8", "sgd"),
        ("lsq", "binary", "channel", "int8", "adamw"),
        ("stretched", "ternary", "channel", "int8", "sgd"),
        ("stretched", "int2", "channel", "int8", "adamw"),
        ("soft:0.5", "ternary", "tensor", "int8", "adamw"),
        ("soft:0.8", "binary", "channel", "int8", "sgd"),
    ]:
        case = dict(estimator=estimator, precision=precision, granularity=granularity, activations=activations, optimizer=optimizer)
        for seed in range(2000):
            try:
                cases.append(run(case, seed) | {"seed": seed})
                break
            except Unsafe:
                pass
        else:
            raise SystemExit(f"no seed for {case}")
    pathlib.Path(__file__).with_name("qat.json").write_text(json.dumps({"torch": torch.__version__, "cases": cases, "distillation": distillation()}))
    print([c["seed"] for c in cases])


main()
